"""Who replied better: a reward model that runs here, or AlpacaEval's and Arena-Hard's programs.

Those programs ask models that cost money and are the user's to run: this module writes the files
that they read, and reads the verdicts that they write. Formats as read in the sources of
tatsu-lab/alpaca_eval (cd543a1) and lmarena/arena-hard-auto (196f6b8).

A tie counts half. Two equal texts are a tie whoever judges, so that the SFT model against itself
is at .5 (50.00 in the paper's tables) by construction. A judge reads what models wrote and can be
swayed by it: a win rate says what this judge prefers, so it is given with the judge's name. A judge
that is named later judges the replies that there are: what a reward model said is kept, apart from
training; the verdicts of the programs are read beside the replies.
"""

import hashlib
import json
import logging
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from allo_lib.engine import models
from allo_lib.engine.encoding import render_chat, special_tokens_in
from allo_lib.engine.store import write_json
from allo_lib.errors import AlloError
from allo_lib.evaluation import outcomes
from allo_lib.evaluation.comparisons import JUDGED_BY
from allo_lib.evaluation.outcomes import Measurement, replace_file
from allo_lib.profiles.config import fingerprint
from allo_lib.study import scoring
from allo_lib.study.scoring import REFERENCE

VERSION = 1  # of the key of kept verdicts
LENGTH, CUT = "response_characters", "response_cut"
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
    by_id = {row["id"]: verdicts.get(row["id"]) for row in rows}
    for row, our, their in zip(rows, ours, theirs, strict=True):
        if our == their:
            by_id[row["id"]] = [0.5] * min(most, 2)  # Arena-Hard asks twice
    judged = {key: found for key, found in by_id.items() if found}
    if not judged:
        raise AlloError(f"the judge gave no verdict on any of {len(rows)} replies; see its log")
    rights = tuple(math.fsum(found) / len(found) for found in judged.values())
    return Judgement(tuple(judged), rights, tuple(float(len(f)) for f in judged.values()))


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
        made = {f"{m}.json": _alpaca_outputs(rows, replies, m) for m, replies in texts.items()}
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
    messages = [{"role": "user", "content": row["question"]}]
    messages.append({"role": "assistant", "content": {"answer": text}})
    return {"uid": row["id"], "ans_id": name, "model": model, "messages": messages, "tstamp": 0}


def _lines(values) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def read_verdicts(
    dataset: str, folder: Path, rows: Sequence[dict], texts: Sequence[str], method: str
) -> tuple[dict[str, list[float]], str]:
    """A benchmark's verdicts on a method's replies; (verdicts by row id, judge's name).

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
    by_id = {row["id"]: text for row, text in zip(rows, texts, strict=True)}
    try:
        lines = found[0].read_bytes().decode("utf-8").split("\n")
        if alpaca:
            ids = {row["question"]: row["id"] for row in rows}
            verdicts = _alpaca_verdicts(json.loads("\n".join(lines)), ids, by_id)
        else:
            verdicts = _arena_verdicts([json.loads(x) for x in lines if x.strip()], by_id)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise AlloError(
            f"{found[0]} holds no verdicts on these replies ({reason}); have them judged again"
        ) from error
    return verdicts, found[0].parent.name


def _alpaca_verdicts(entries: list, ids: dict[str, str], by_id: dict[str, str]) -> dict:
    verdicts = {}
    for entry in entries:
        key, preference = ids.get(entry["instruction"]), entry["preference"]
        if key is None or preference is None:
            continue
        if entry.get("output_2", by_id[key]) != by_id[key]:
            raise ValueError(f"another reply to {key}")
        preference = 1.5 if preference == 0 else preference  # 0 is a draw
        if not 1 <= preference <= 2:
            raise ValueError(f"preference {preference}, expected 1 to 2")
        verdicts[key] = [preference - 1.0]
    return verdicts


def _arena_verdicts(entries: list, by_id: dict[str, str]) -> dict:
    verdicts = {}
    for entry in entries:
        key, games = entry["uid"], [game or {} for game in entry["games"]]
        for message in (games[0].get("prompt") or [])[-1:]:
            if key in by_id and by_id[key] not in message["content"]:
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
    """A loaded sequence classifier; `sha256` is of its weights."""

    model: object
    tokenizer: object
    sha256: str


def load_reward_model(name, *, dtype="float32", device="cpu", revision=None) -> RewardModel:
    """A reward model from a hub id or a folder; no code of its own is run, no pickle read.

    Raises AlloError when it cannot be loaded, or is no reward model: a sequence classifier with one
    label and safetensors weights, whose tokenizer has a chat template.
    """
    expected = "a hub id or a folder of a sequence classifier with one label, safetensors "
    expected += "weights and a chat template"
    model, tokenizer, report = models.read_pretrained(
        AutoModelForSequenceClassification, name, models.DTYPES[dtype], revision,
        named="reward model", expected=expected,
    )  # fmt: skip
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
    return RewardModel(model.to(device).eval(), tokenizer, models.weights_hash(model))


def scores(judge: RewardModel, questions, texts, batch_size: int) -> list[float]:
    """The reward of each text as the reply to its question; equal replies have equal ones.

    Replies that do not fit with their question into the model, or into MAX_LENGTH tokens, are cut
    at the end, with a warning. AlloError for a question that leaves no room, or a score of NaN.
    """
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


# --- the replies of a study ----------------------------------------------------------------------


def replies(study, name: str, results: dict[str, dict]) -> dict[str, dict[str, list[list]]]:
    """data set -> method -> its rows of `scoring.reply`, REFERENCE first; {} without instructions.

    results: method -> result, as `training.result` gives it.
    """
    if not study.domain(name).instructions.datasets:
        return {}
    by_method = {REFERENCE: study.replies(name)}
    by_method |= {m: found["instructions"] for m, found in results.items() if m != REFERENCE}
    return {
        dataset: {m: [row for row in rows if row[1] == dataset] for m, rows in by_method.items()}
        for dataset in study.domain(name).instructions.datasets
    }


def _texts(by_method: dict[str, list[list]]) -> dict[str, list[str]]:
    """Texts without blank ends, in the order of `scoring.chosen`."""
    return {method: [row[2].strip() for row in rows] for method, rows in by_method.items()}


def folder_of(study, name: str) -> Path:
    """Where a domain's replies are written, and the benchmarks' verdicts on them looked for."""
    return study.results_dir / "instructions" / f"seed{study.seed}" / name


def write_replies(study, name: str, results: dict[str, dict]) -> list[Path]:
    """Write all replies in the formats of AlpacaEval and Arena-Hard (`write_outputs`), each data
    set's into a folder in `folder_of`; the files, none without instructions."""
    return [
        path
        for dataset, by_method in replies(study, name, results).items()
        for path in write_outputs(
            dataset,
            folder_of(study, name) / dataset,
            scoring.chosen(study, name)[dataset],
            _texts(by_method),
        )
    ]


def reply_rows(study, name: str, results: dict[str, dict]) -> list[Measurement]:
    """All rows of `measurements.csv` that the replies of a domain's methods give.

    Of every method and of the SFT model, on each data set: `response_characters` (their mean) and
    `response_cut` (the share that had not ended). With a judge also `win_rate` against the SFT
    model (whose own is .5) and who judged.

    Raises:
        AlloError: the judge cannot be loaded or its verdicts read; what was judged before is kept.
    """
    found, seed, settings = [], study.seed, study.profile.judge
    dtype = models.dtype_on(study.device, settings.dtype or study.profile.model.dtype)

    @cache  # for this call only, as a judge may be larger than all the rest
    def load() -> RewardModel:
        revision = settings.revision or None
        return load_reward_model(
            settings.model, dtype=dtype, device=study.device, revision=revision
        )

    by_dataset = replies(study, name, results)
    for dataset, by_method in by_dataset.items():
        for method, rows in by_method.items():
            lengths = [len(row[2].strip()) for row in rows]
            n, error = len(rows), statistics.pstdev(lengths) / len(rows) ** 0.5
            mean = float(statistics.fmean(lengths))
            found.append(Measurement(seed, method, dataset, LENGTH, mean, error, n))
            cut = [not row[3] for row in rows]
            found.append(outcomes.proportion(seed, method, dataset, CUT, cut))
    for dataset, by_method in by_dataset.items() if settings.kind else ():
        found += _win_rates(study, name, dataset, _texts(by_method), dtype, load)
    return found


def _win_rates(study, name: str, dataset: str, texts, dtype: str, load) -> list[Measurement]:
    rows, theirs = scoring.chosen(study, name)[dataset], texts[REFERENCE]
    judged = {REFERENCE: judgement(rows, theirs, theirs, {})}
    judge = _judge_name(study, dataset, "")
    for method, ours in texts.items():
        if method == REFERENCE:
            continue
        if study.profile.judge.kind == "programs":
            place = folder_of(study, name) / dataset
            verdicts, judge = read_verdicts(dataset, place, rows, ours, method)
            judge = _judge_name(study, dataset, judge)
        else:
            record = _rewards_compared(study, rows, ours, theirs, dtype, load)
            verdicts = record["verdicts"]
            judge = f"{_judge_name(study, dataset, '')}+{record['sha256'][:8]}"
        judged[method] = judgement(rows, ours, theirs, verdicts)
    found = [
        Measurement(study.seed, method, dataset, "win_rate", one.win_rate, one.stderr, len(one.ids))
        for method, one in judged.items()
    ]
    # Who judged, and the share of comparisons that had a verdict.
    count = sum(len(one.ids) for method, one in judged.items() if method != REFERENCE)
    total = len(rows) * (len(judged) - 1)
    share, metric = count / total if total else 1.0, f"{JUDGED_BY}{judge}"
    return [*found, Measurement(study.seed, REFERENCE, dataset, metric, share, 0.0, total)]


def _judge_name(study, dataset: str, name: str) -> str:
    """`<kind>:<model>`; a folder is known by its last part."""
    settings = study.profile.judge
    kind = dataset if settings.kind == "programs" else settings.kind
    name = (name or settings.model).rstrip("/").rpartition("/")[2]
    return f"{kind}:{re.sub(r'[^A-Za-z0-9_.-]', '_', name) or '_'}"


def _rewards_compared(study, rows, ours, theirs, dtype: str, load) -> dict:
    """The reward model's verdicts by row id and the SHA-256 of its weights, kept in the store."""
    settings = study.profile.judge
    inputs = {"kind": settings.kind, "model": settings.model, "revision": settings.revision}
    inputs |= {"version": VERSION, "dtype": dtype, "device": study.device}
    inputs |= {"read": fingerprint([rows, ours, theirs])}

    def make(folder: Path) -> None:
        judge, questions = load(), [row["question"] for row in rows]
        sides = (scores(judge, questions, x, settings.batch_size) for x in (ours, theirs))
        rewards = zip(rows, *sides, strict=True)
        verdicts = {row["id"]: [0.5 if a == b else float(a > b)] for row, a, b in rewards}
        write_json(folder / "record.json", {"verdicts": verdicts, "sha256": judge.sha256})

    return study.store.get("judgement", inputs, make).json()
