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

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
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

VERSION = 2  # of the key of kept verdicts
ARENA_BENCH = "arena-hard-v0.1"
# Arena-Hard's script looks up what answers are compared with by this file name, whoever wrote them.
ARENA_BASELINE = "gpt-4-0314"
MAX_LENGTH = 4096  # tokens of a chat, where the reward model could read more
_WON_BY_A = {"A=B": [0.5], "A>B": [1.0], "A>>B": [1.0] * 3, "A<B": [0.0], "A<<B": [0.0] * 3}
_WON_BY_A |= {"B=A": [0.5], "B<A": [1.0], "B<<A": [1.0] * 3, "B>A": [0.0], "B>>A": [0.0] * 3}

Texts = Mapping[str, Sequence[str]]  # method -> replies; the first is what others are compared to


def win_rate(
    rows: Sequence[dict], ours: Sequence[str], theirs: Sequence[str], verdicts: Mapping[str, list]
) -> tuple[float, float, int]:
    """(win rate, its standard error over items, items) from the verdicts in [0, 1] on each row.

    An item counts by the number of its verdicts (1, or several of Arena-Hard's): with outcomes o,
    weights w and p = sum w o / sum w the error is sqrt(sum (w (o - p))^2) / sum w. Rows without a
    verdict count nowhere; equal texts tie. AlloError where no row has a verdict.
    """
    # Arena-Hard asks twice, so that a tie of equal texts weighs two.
    tie = [0.5] * min(2, max(map(len, verdicts.values()), default=1))
    found = [
        tie if our == their else verdicts.get(row["id"], [])
        for row, our, their in zip(rows, ours, theirs, strict=True)
    ]
    found = [one for one in found if one]
    if not found:
        raise AlloError(f"the judge gave no verdict on any of {len(rows)} replies; see its log")
    sums, weights = np.array([sum(one) for one in found]), np.array([len(one) for one in found])
    rate = sums.sum() / weights.sum()
    error = np.sqrt(((sums - weights * rate) ** 2).sum()) / weights.sum()
    return float(rate), float(error), len(found)


# --- the benchmarks' own files -------------------------------------------------------------------


def write_outputs(dataset: str, folder: Path, rows: Sequence[dict], texts: Texts) -> None:
    """Write the replies to "alpaca_eval" or "arena_hard" in that benchmark's own format.

    AlpacaEval: `<method>.json` (a `model_outputs.json`). Arena-Hard: `question.jsonl` and
    `model_answer/<method>.jsonl`, the first method's once more under the baseline's name. As ASCII,
    because Arena-Hard's scripts open files in the encoding of the machine. Equal replies give equal
    bytes: time stamps are 0 and answers have the ids of their questions, as no script reads either.

    Args:
        rows: instructions (`benchmarks.load_rows`), no question twice (AlpacaEval's key).
        texts: replies in the order of the rows.
    """
    made = {}
    if dataset == "alpaca_eval":
        for method, replies in texts.items():
            outputs = [
                {"dataset": row.get("subset", "alpaca_eval"), "instruction": row["question"],
                 "output": text, "generator": method}
                for row, text in zip(rows, replies, strict=True)
            ]  # fmt: skip
            made[f"{method}.json"] = json.dumps(outputs, indent=2) + "\n"
    else:
        made["question.jsonl"] = _lines(
            {"uid": row["id"], "category": ARENA_BENCH, "cluster": row.get("cluster", ""),
             "prompt": row["question"]}
            for row in rows
        )  # fmt: skip
        for method, replies in texts.items():
            made[f"model_answer/{method}.jsonl"] = _lines(
                {"uid": row["id"], "ans_id": row["id"], "model": method, "messages": [
                    {"role": "user", "content": row["question"]},
                    {"role": "assistant", "content": {"answer": text}},
                ], "tstamp": 0}
                for row, text in zip(rows, replies, strict=True)
            )  # fmt: skip
        first = next(iter(texts))
        made[f"model_answer/{ARENA_BASELINE}.jsonl"] = made[f"model_answer/{first}.jsonl"]
    for name, text in made.items():
        replace_file(folder / name, text.encode("ascii"))


def _lines(values) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def read_verdicts(
    dataset: str, folder: Path, rows: Sequence[dict], texts: Texts, method: str
) -> tuple[dict[str, list[float]], str]:
    """A benchmark's verdicts on a method's replies, beside the first one's of `texts`; (verdicts by
    row id, judge's name).

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
    (path,) = found
    first = next(iter(texts.values()))
    both = {row["id"]: pair for row, *pair in zip(rows, texts[method], first, strict=True)}
    try:
        content = path.read_bytes().decode("utf-8")
        if alpaca:
            ids = {row["question"]: row["id"] for row in rows}
            verdicts = _alpaca_verdicts(json.loads(content), ids, both)
        else:
            entries = [json.loads(line) for line in content.split("\n") if line.strip()]
            verdicts = _arena_verdicts(entries, both)
    except Exception as error:  # a file of another program: whatever is wrong with it
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise AlloError(
            f"{path} holds no verdicts on these replies ({reason}); have them judged again"
        ) from error
    return verdicts, path.parent.name


def _alpaca_verdicts(entries: list, ids: dict[str, str], both: dict[str, list[str]]) -> dict:
    verdicts = {}
    for entry in entries:
        key, preference = ids.get(entry["instruction"]), entry["preference"]
        if key is None or preference is None:
            continue
        for output, reply in zip(("output_2", "output_1"), both[key], strict=True):
            if entry.get(output, reply) != reply:
                raise ValueError(f"another reply to {key}, as {output}")
        preference = 1.5 if preference == 0 else preference  # 0 is a draw
        if not 1 <= preference <= 2:
            raise ValueError(f"preference {preference}, expected 1 to 2")
        verdicts[key] = [preference - 1.0]
    return verdicts


def _arena_verdicts(entries: list, both: dict[str, list[str]]) -> dict:
    verdicts = {}
    for entry in entries:
        key, games = entry["uid"], [game or {} for game in entry["games"]]
        for message in (games[0].get("prompt") or [])[-1:]:
            if any(reply not in message["content"] for reply in both.get(key, ())):
                raise ValueError(f"another reply to {key}")
        first, second = (_WON_BY_A.get(game.get("score")) for game in games)
        if first and second:  # ours is B in the first game and A in the second
            verdicts[key] = second + [1.0 - score for score in first]
    return verdicts


# --- a reward model ------------------------------------------------------------------------------


class RewardModel(NamedTuple):
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
    lacks = {
        # A language model named as a reward model: its score would be a random direction.
        "no weights for its score": report["missing_keys"],
        f"{model.config.num_labels} labels": model.config.num_labels != 1,
        "no chat template": not getattr(tokenizer, "chat_template", None),
    }
    for what, is_so in lacks.items():
        if is_so:
            raise AlloError(f"reward model {str(name)!r} has {what}; expected {expected}")
    models.check_finite(model)
    return RewardModel(model.to(device).eval(), tokenizer, models.weights_hash(model))


def scores(judge: RewardModel, questions, texts, batch_size: int) -> list[float]:
    """The reward of each text as the reply to its question; equal chats have equal ones.

    Chats that do not fit into the model, or into MAX_LENGTH tokens, are cut at the end, with a
    warning. AlloError for a score that is not finite.
    """
    chats = [tuple(_chat(judge, *pair)) for pair in zip(questions, texts, strict=True)]
    order, by_chat = sorted(set(chats), key=lambda ids: (len(ids), ids)), {}
    # A classifier takes its score at the last token that is not its padding, so only the token it
    # was made to pad with will do.
    pad = judge.model.config.get_text_config().pad_token_id
    size = 1 if pad is None else batch_size
    for rows in (order[start : start + size] for start in range(0, len(order), size)):
        ids = pad_sequence([torch.tensor(row) for row in rows], True, pad or 0)  # [rows, tokens]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True)
        with torch.inference_mode():
            ids, mask = ids.to(judge.model.device), mask.to(judge.model.device)
            logits = judge.model(input_ids=ids, attention_mask=mask).logits[:, 0]  # [rows]
        if not logits.isfinite().all():
            raise AlloError("the reward model gave a score that is no number; load it in float32")
        by_chat |= zip(rows, logits.float().tolist(), strict=True)
    return [by_chat[chat] for chat in chats]


def _chat(judge: RewardModel, question: str, text: str) -> list[int]:
    """Token ids of a chat that ends with the assistant's message."""
    turns = zip(("user", "assistant"), (question, text), strict=True)
    messages = [{"role": role, "content": _plain(judge.tokenizer, t)} for role, t in turns]
    expected = "expected one for a user's and an assistant's"
    ids = render_chat(
        judge.tokenizer, messages, expected, "reward model", add_generation_prompt=False
    )
    config = judge.model.config.get_text_config()
    most = min(getattr(config, "max_position_embeddings", None) or MAX_LENGTH, MAX_LENGTH)
    if len(ids) > most:
        logging.getLogger(__name__).warning("a chat of %d tokens cut to %d", len(ids), most)
    return ids[:most]


def _plain(tokenizer, text: str) -> str:
    """The text with a blank in every name of a special token, so that it is not that token: a reply
    must not end its turn, nor stop the judging of all others."""
    for name in sorted(special_tokens_in(tokenizer, text), key=len, reverse=True):
        text = text.replace(name, f"{name[0]} {name[1:]}")
    return text


# --- the replies of a study ----------------------------------------------------------------------


def replies(study, name: str, results: dict[str, dict]) -> dict[str, dict[str, list[list]]]:
    """data set -> method -> its rows of `scoring.reply`, REFERENCE first; {} without instructions.

    results: method -> result, as `training.result` gives it.
    """
    datasets = study.domain(name).instructions.datasets
    if not datasets:
        return {}
    by_method = {REFERENCE: study.replies(name)}
    by_method |= {m: found["instructions"] for m, found in results.items() if m != REFERENCE}
    return {
        dataset: {m: [row for row in rows if row[1] == dataset] for m, rows in by_method.items()}
        for dataset in datasets
    }


def folder_of(study, name: str) -> Path:
    """Where a domain's replies are written, and the benchmarks' verdicts on them looked for."""
    return study.results_dir / "instructions" / f"seed{study.seed}" / name


def reply_rows(study, name: str, results: dict[str, dict]) -> list[Measurement]:
    """All rows of `measurements.csv` that the replies of a domain's methods give.

    Before, the replies are written into `folder_of`, in a folder for each data set.

    Of every method and of the SFT model, on each data set: `response_characters` (their mean) and
    `response_cut` (the share that had not ended). With a judge also `win_rate` against the SFT
    model (whose own is .5) and who judged, with the share of comparisons that had a verdict.

    Raises:
        AlloError: the judge cannot be loaded or its verdicts read; what was judged before is kept.
    """
    found, seed = [], study.seed
    by_dataset = replies(study, name, results)
    for dataset, by_method in by_dataset.items():
        asked = scoring.chosen(study, name)[dataset]
        write_outputs(dataset, folder_of(study, name) / dataset, asked, _texts(by_method))
        for method, rows in by_method.items():
            lengths, n = [len(row[2].strip()) for row in rows], len(rows)
            mean, error = float(np.mean(lengths)), float(np.std(lengths)) / n**0.5
            found.append(Measurement(seed, method, dataset, "response_characters", mean, error, n))
            cut = [not row[3] for row in rows]
            found.append(outcomes.proportion(seed, method, dataset, "response_cut", cut))
    for dataset, by_method in by_dataset.items() if study.profile.judge.kind else ():
        rows, texts = scoring.chosen(study, name)[dataset], _texts(by_method)
        verdicts, judge = _verdicts(study, folder_of(study, name) / dataset, dataset, rows, texts)
        judged = 0
        for method, ours in texts.items():
            rate = win_rate(rows, ours, texts[REFERENCE], verdicts.get(method, {}))
            found.append(Measurement(seed, method, dataset, "win_rate", *rate))
            judged += rate[2] if method != REFERENCE else 0
        total = len(rows) * (len(texts) - 1)
        metric, share = f"{JUDGED_BY}{judge}", judged / max(1, total)
        found.append(Measurement(seed, REFERENCE, dataset, metric, share, 0.0, total))
    return found


def _texts(by_method: dict[str, list[list]]) -> dict[str, list[str]]:
    """Texts without blank ends, in the order of `scoring.chosen`."""
    return {method: [row[2].strip() for row in rows] for method, rows in by_method.items()}


def _verdicts(study, folder: Path, dataset: str, rows, texts: Texts) -> tuple[dict, str]:
    """(method -> verdicts by row id, the judge's name, `<kind>:<model>`).

    Those of a reward model are kept in the store, with the SHA-256 of its weights.
    """
    settings, methods = study.profile.judge, [method for method in texts if method != REFERENCE]
    if settings.kind == "programs":
        read = {m: read_verdicts(dataset, folder, rows, texts, m) for m in methods}
        judges = {judge for _, judge in read.values()}
        if len(judges) > 1:
            raise AlloError(f"{folder} holds verdicts of {sorted(judges)}; have one judge all")
        judge = f"{dataset}:{_plain_name(max(judges, default=''))}"
        return {m: found for m, (found, _) in read.items()}, judge
    dtype = models.dtype_on(study.device, settings.dtype or study.profile.model.dtype)
    inputs = {"kind": settings.kind, "model": settings.model, "revision": settings.revision}
    inputs |= {"version": VERSION, "dtype": dtype, "device": study.device}
    inputs |= {"read": fingerprint([rows, texts])}

    def make(folder: Path) -> None:
        judge = load_reward_model(
            settings.model, dtype=dtype, device=study.device, revision=settings.revision or None
        )
        questions = [row["question"] for row in rows] * len(texts)
        every = scores(judge, questions, sum(texts.values(), []), settings.batch_size)
        by_method = dict(zip(texts, np.array(every).reshape(len(texts), -1), strict=True))
        verdicts = {
            m: {
                row["id"]: [0.5 + 0.5 * float(np.sign(ours - theirs))]
                for row, ours, theirs in zip(rows, by_method[m], by_method[REFERENCE], strict=True)
            }
            for m in methods
        }
        write_json(folder / "record.json", {"verdicts": verdicts, "sha256": judge.sha256})

    record = study.store.get("judgement", inputs, make).json()
    judge = f"{settings.kind}:{_plain_name(settings.model)}+{record['sha256'][:8]}"
    return record["verdicts"], judge


def _plain_name(name: str) -> str:
    """A judge's name as a metric can hold it; a folder is known by its last part."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name.rstrip("/").rpartition("/")[2]) or "_"
