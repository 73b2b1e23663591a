"""Who replied better: a reward model that runs here, or AlpacaEval's and Arena-Hard's programs.

Those programs ask models that cost money and are the user's to run: this module writes the files
that they read, and reads the verdicts that they write. Formats as read in the sources of
tatsu-lab/alpaca_eval (cd543a1) and lmarena/arena-hard-auto (196f6b8).

A tie counts half. Two equal texts are a tie whoever judges, so that the SFT model against itself
is at .5 (50.00 in the paper's tables) by construction. A judge reads what models wrote and can be
swayed by it: a win rate says what this judge prefers, so it is given with the judge's name.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from allo_lib.engine.encoding import render_chat, special_tokens_in
from allo_lib.errors import AlloError
from allo_lib.evaluation.outcomes import replace_file

KINDS = ("reward_model", "programs")
ARENA_BENCH = "arena-hard-v0.1"
# Arena-Hard's script looks up what answers are compared with by this file name, whoever wrote them.
ARENA_BASELINE = "gpt-4-0314"
STRONG = 3  # how often Arena-Hard counts a verdict such as A>>B
MAX_LENGTH = 4096  # tokens of a chat, where the reward model could read more
_SPARE = 8  # a text that was cut may need a few tokens more when it is encoded again
_VERDICT = re.compile(r"([AB])(>>|>|=|<|<<)([AB])")


@dataclass(frozen=True)
class Judgement:
    """Outcomes in [0, 1] by item, 1 for ours and .5 for a tie, and what they add up to.

    `weights`: how many verdicts stand behind each outcome (Arena-Hard); else every one is 1.
    """

    ids: tuple[str, ...]
    outcomes: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def win_rate(self) -> float:
        """Mean outcome, a fraction."""
        pairs = zip(self.weights, self.outcomes, strict=True)
        return math.fsum(w * o for w, o in pairs) / math.fsum(self.weights)

    @property
    def stderr(self) -> float:
        """Of the win rate p over items: sqrt(sum of (w (o - p))^2) / sum of w."""
        rate, pairs = self.win_rate, zip(self.weights, self.outcomes, strict=True)
        return math.sqrt(math.fsum((w * (o - rate)) ** 2 for w, o in pairs)) / sum(self.weights)


def judgement(
    rows: Sequence[dict], ours: Sequence[str], theirs: Sequence[str], verdicts: Mapping[str, list]
) -> Judgement:
    """Outcomes from the verdicts on each row's id; rows with none count nowhere, equal texts tie.

    Raises AlloError where no row has a verdict.
    """
    most = max((len(found) for found in verdicts.values()), default=1)
    given = {row["id"]: verdicts.get(row["id"]) for row in rows}
    for row, our, their in zip(rows, ours, theirs, strict=True):
        if our == their:
            given[row["id"]] = [0.5] * min(most, 2)  # Arena-Hard asks twice
    judged = {key: found for key, found in given.items() if found}
    if not judged:
        raise AlloError(f"the judge gave no verdict on any of {len(rows)} replies; see its log")
    outcomes = tuple(math.fsum(found) / len(found) for found in judged.values())
    return Judgement(tuple(judged), outcomes, tuple(float(len(f)) for f in judged.values()))


# --- the benchmarks' own files -------------------------------------------------------------------


def write_outputs(
    dataset: str, folder: Path, rows: Sequence[dict], texts: Mapping[str, Sequence[str]]
) -> list[Path]:
    """Write the replies to "alpaca_eval" or "arena_hard" in that benchmark's own format.

    AlpacaEval: `<method>.json` (a `model_outputs.json`). Arena-Hard: `question.jsonl` and
    `model_answer/<method>.jsonl`, the first method's once more under the baseline's name. As ASCII,
    because Arena-Hard's scripts open files in the encoding of the machine. Equal replies give equal
    bytes: time stamps are 0 and the ids of answers follow from them, as no script reads either.

    Args:
        rows: instructions (`benchmarks.load_rows`), no question twice (AlpacaEval's key).
        texts: method -> replies in the order of the rows; the first is what others are compared to.
    """
    if dataset == "alpaca_eval":
        made = {f"{m}.json": _alpaca_outputs(rows, given, m) for m, given in texts.items()}
    else:
        made = {"question.jsonl": _lines(map(_arena_question, rows))}
        for place, method in [*zip(texts, texts, strict=True), (ARENA_BASELINE, next(iter(texts)))]:
            answers = map(_arena_answer, rows, texts[method], [method] * len(rows))
            made[f"model_answer/{place}.jsonl"] = _lines(answers)
    for name, text in made.items():
        replace_file(folder / name, text.encode("ascii"))
    return [folder / name for name in made]


def _alpaca_outputs(rows: Sequence[dict], texts: Sequence[str], generator: str) -> str:
    outputs = [
        {"dataset": row.get("subset", "alpaca_eval"), "instruction": row["question"],
         "output": text, "generator": generator}
        for row, text in zip(rows, texts, strict=True)
    ]  # fmt: skip
    return json.dumps(outputs, indent=2) + "\n"


def _arena_question(row: dict) -> dict:
    return {"uid": row["id"], "category": ARENA_BENCH, "cluster": row.get("cluster", ""),
            "prompt": row["question"]}  # fmt: skip


def _arena_answer(row: dict, text: str, model: str) -> dict:
    name = hashlib.sha256(json.dumps([row["id"], model, text]).encode()).hexdigest()[:22]
    said = [{"role": "user", "content": row["question"]}]
    said.append({"role": "assistant", "content": {"answer": text}})
    return {"uid": row["id"], "ans_id": name, "model": model, "messages": said, "tstamp": 0}


def _lines(values) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def read_verdicts(
    dataset: str, folder: Path, rows: Sequence[dict], texts: Sequence[str], method: str
) -> tuple[dict[str, list[float]], str]:
    """What a benchmark's program said of a method's replies; (verdicts by row id, judge's name).

    A verdict is 1 where ours won. AlpacaEval gives one, Arena-Hard 2 to 6: it asks in both orders
    and counts A>>B three times. Rows without them are left out.

    Raises AlloError where there is no file, or it is malformed or about other replies.
    """
    alpaca = dataset == "alpaca_eval"
    pattern = f"{method}/*/annotations.json" if alpaca else f"model_judgment/*/{method}.jsonl"
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise AlloError(
            f"{len(found)} files {folder / pattern}, expected one judge's: have these replies "
            "judged by the benchmark's program, as docs/run.md says"
        )
    said = {row["id"]: text for row, text in zip(rows, texts, strict=True)}
    try:
        lines = found[0].read_bytes().decode("utf-8").split("\n")
        if alpaca:
            ids = {row["question"]: row["id"] for row in rows}
            verdicts = _alpaca_verdicts(json.loads("\n".join(lines)), ids, said)
        else:
            verdicts = _arena_verdicts([json.loads(x) for x in lines if x.strip()], said)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise AlloError(
            f"{found[0]} holds no verdicts on these replies ({reason}); have them judged again"
        ) from error
    return verdicts, found[0].parent.name


def _alpaca_verdicts(entries: list, ids: dict[str, str], said: dict[str, str]) -> dict:
    verdicts = {}
    for entry in entries:
        key, preference = ids.get(entry["instruction"]), entry["preference"]
        if key is None or preference is None:
            continue
        if entry.get("output_2", said[key]) != said[key]:
            raise ValueError(f"another reply to {key}")
        preference = 1.5 if preference == 0 else preference  # 0 is a draw
        if not 1 <= preference <= 2:
            raise ValueError(f"preference {preference}, expected 1 to 2")
        verdicts[key] = [preference - 1.0]
    return verdicts


def _arena_verdicts(entries: list, said: dict[str, str]) -> dict:
    verdicts = {}
    for entry in entries:
        key, games = entry["uid"], [game or {} for game in entry["games"]]
        for message in (games[0].get("prompt") or [])[-1:]:
            if key in said and said[key] not in message["content"]:
                raise ValueError(f"another reply to {key}")
        first, second = (_for_a(game.get("score")) for game in games)
        if first and second:  # ours is B in the first game and A in the second
            verdicts[key] = second + [1.0 - score for score in first]
    return verdicts


def _for_a(verdict) -> list[float]:
    found = _VERDICT.fullmatch(verdict or "")
    if not found or found[1] == found[3]:
        return []
    if found[2] == "=":
        return [0.5]
    winner = found[1] if found[2][0] == ">" else found[3]
    return [float(winner == "A")] * (STRONG if len(found[2]) == 2 else 1)


# --- a reward model ------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardModel:
    """A loaded sequence classifier; `note` says what it is (name, revision, sha256, dtype)."""

    model: object
    tokenizer: object
    note: dict


def load_reward_model(name, *, dtype="float32", device="cpu", revision=None) -> RewardModel:
    """A reward model from a hub id or a folder; no code of its own is run, no pickle read.

    Raises AlloError when it cannot be loaded, or is no reward model: a sequence classifier with one
    label and safetensors weights, whose tokenizer has a chat template.
    """
    from transformers import AutoModelForSequenceClassification as Kind

    from allo_lib.engine import models  # it imports torch

    expected = "a hub id or a folder of a sequence classifier with one label, safetensors "
    expected += "weights and a chat template"
    about = {"named": "reward model", "expected": expected}
    dtype_of = models.DTYPES[dtype]
    model, tokenizer, report = models.read_pretrained(Kind, name, dtype_of, revision, **about)
    lacks = None
    if report["missing_keys"]:
        # A language model named as a reward model: its score would be a random direction.
        lacks = f"no weights for {sorted(report['missing_keys'])[0]}"
    elif model.config.num_labels != 1:
        lacks = f"{model.config.num_labels} labels"
    elif not getattr(tokenizer, "chat_template", None):
        lacks = "no chat template"
    if lacks:
        raise AlloError(f"reward model {str(name)!r} has {lacks}; expected {expected}")
    models.check_finite(model)
    note = {"name": str(name), "revision": getattr(model.config, "_commit_hash", None)}
    note |= {"sha256": models.weights_hash(model), "dtype": dtype}
    return RewardModel(model.to(device).eval(), tokenizer, note)


def scores(judge: RewardModel, questions, texts, batch_size: int) -> list[float]:
    """The reward of each text as the reply to its question; equal replies have equal ones.

    Replies that do not fit with their question into the model, or into MAX_LENGTH tokens, are cut
    at the end, with a warning. AlloError for a question that leaves no room, or a score of NaN.
    """
    import torch

    chats = [tuple(_chat(judge, *pair)) for pair in zip(questions, texts, strict=True)]
    order, by_chat = sorted(set(chats), key=lambda ids: (len(ids), ids)), {}
    # A classifier takes its score at the last token that is not its padding, so only the token it
    # was made to pad with will do.
    pad = judge.model.config.get_text_config().pad_token_id
    size = batch_size if pad is not None else 1
    for rows in (order[start : start + size] for start in range(0, len(order), size)):
        width = max(map(len, rows))
        ids = [[*row, *[pad] * (width - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        with torch.inference_mode():
            ids, mask = (torch.tensor(x, device=judge.model.device) for x in (ids, mask))
            logits = judge.model(input_ids=ids, attention_mask=mask).logits[:, 0]  # [rows]
        if not logits.isfinite().all():
            raise AlloError("the reward model gave a score that is no number; load it in float32")
        by_chat |= zip(rows, logits.float().tolist(), strict=True)
    return [by_chat[chat] for chat in chats]


def _chat(judge: RewardModel, question: str, text: str) -> list[int]:
    """Token ids of a chat that ends with the assistant's message, the text cut where it must be."""
    tokenizer, config = judge.tokenizer, judge.model.config.get_text_config()
    question, text = _plain(tokenizer, question), _plain(tokenizer, text)
    most = min(getattr(config, "max_position_embeddings", None) or MAX_LENGTH, MAX_LENGTH)
    room = most - _SPARE - len(_rendered(tokenizer, question, "x"))
    if room < 1:
        raise AlloError(
            f"an instruction leaves no room for a reply in the {most} tokens of the reward model; "
            "leave it out or name a model with a longer context"
        )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) > room:
        logging.getLogger(__name__).warning("a reply of %d tokens cut to %d", len(ids), room)
        text = tokenizer.decode(ids[:room])
    return _rendered(tokenizer, question, text)


def _rendered(tokenizer, question: str, text: str) -> list[int]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    expected = "expected one for a user's and an assistant's"
    return render_chat(tokenizer, messages, expected, "reward model", add_generation_prompt=False)


def _plain(tokenizer, text: str) -> str:
    """The text with a blank in every name of a special token, so that it is not that token.

    Some tokenizers cannot read such a name as letters (`encoding`); a reply that a model wrote must
    not stop the judging of all others.
    """
    for name in sorted(special_tokens_in(tokenizer, text), key=len, reverse=True):
        text = text.replace(name, f"{name[0]} {name[1:]}")
    return text
