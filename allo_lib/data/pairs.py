"""Preference pairs: sampled from the SFT model and sorted by the verifier, or given by people.

Every question (or conversation) is in one split only: `train` for the compared methods (and
`train1`, `train2`, ... for the further pair sets of a profile with replicates), `mask` for
importance scores and the reward model, `heldout` for reward accuracy, `dev` for learning rates of
domains without a verifier. `wrong` (`wrong1`, ...) holds every distinct wrong sample of a training
set's questions, and of its share of those that gave no right one, beside the solution.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from allo_lib.data import realdata
from allo_lib.engine.encoding import encode_prompt, encode_response
from allo_lib.engine.generation import generate
from allo_lib.engine.rewriter import Correction
from allo_lib.engine.store import Artifact, write_json
from allo_lib.errors import AlloError
from allo_lib.profiles.config import fingerprint
from allo_lib.seeds import derive

SPLITS = ("train", "heldout", "dev", "mask")  # and `train_split`, `wrong_split`
COLUMNS = ("prompt", "chosen", "rejected")
_FURTHER = re.compile(r"train[1-9]\d*|wrong\d*")


@dataclass
class Pairs:
    """Rows of each split: TRL's columns and `id`, `dataset`, `solution`, `corrected`.

    `corrected` is the minimally edited rejected response, what the rewriter learns to write; None
    where there is none. `summary` counts questions, samples and pairs.
    """

    rows: dict[str, list[dict]]
    summary: dict
    key: str = ""

    def dataset(self, split: str) -> Dataset:
        """The split as a `datasets.Dataset` with the columns prompt, chosen, rejected."""
        rows = self.rows[split]
        return Dataset.from_list([{name: row[name] for name in COLUMNS} for row in rows])

    def corrections(self, split: str) -> list[Correction]:
        """Examples for the rewriter; rows without a correction keep their prediction."""
        return [
            Correction(
                row["prompt"],
                row["solution"],
                row["rejected"],
                row["rejected"] if row["corrected"] is None else row["corrected"],
            )
            for row in self.rows[split]
        ]

    def save(self, folder: Path) -> None:
        """Write one JSON file per split and the summary."""
        for split, rows in self.rows.items():
            write_json(folder / f"{split}.json", rows)
        write_json(folder / "record.json", self.summary)

    @classmethod
    def load(cls, artifact: Artifact) -> "Pairs":
        """Read what `save` wrote."""
        names = [path.stem for path in artifact.path.glob("*.json")]
        splits = [name for name in names if name in SPLITS or _FURTHER.fullmatch(name)]
        rows = {split: artifact.json(f"{split}.json") for split in (*SPLITS, *splits)}
        return cls(rows, artifact.json(), artifact.key)


def train_split(pair_set: int) -> str:
    """The split that holds a pair set's training pairs: "train", "train1", ..."""
    return f"train{pair_set or ''}"


def wrong_split(pair_set: int) -> str:
    """The split of all wrong samples that goes with a pair set: "wrong", "wrong1", ..."""
    return f"wrong{pair_set or ''}"


def make_pairs(study, name: str) -> Pairs:
    """The pairs of a domain of a study; see the module's text for the splits."""
    domain = study.domain(name)
    if domain.kind == "preferences":
        rows, summary = _given_pairs(study, name)
        heldout_rows, _ = _given_pairs(study, name, "test")
        split = _split(rows, _counts(study, domain, ("train", "dev", "mask")), name)
        return Pairs(split | {"heldout": heldout_rows[: domain.pairs.heldout]}, summary)
    rows, wrong, summary = _sampled_pairs(study, name)
    counts = _counts(study, domain, ("train", "heldout", "mask"))
    splits = _split(rows, counts, name)
    return Pairs(splits | _wrong_splits(splits, rows, wrong) | {"dev": []}, summary)


def _counts(study, domain, splits: tuple[str, ...]) -> dict[str, int]:
    """Pairs of each split; further pair sets come last, so that none of them changes another."""
    counts = {split: getattr(domain.pairs, split) for split in splits}
    further = range(1, study.profile.replicates.pair_sets)
    return counts | {train_split(number): domain.pairs.train for number in further}


def _split(rows: list[dict], counts: dict[str, int], name: str) -> dict[str, list[dict]]:
    """Deal the rows out by question; when there are too few, every split shrinks alike."""
    ids = list(dict.fromkeys(row["id"] for row in rows))
    wanted = sum(counts.values())
    shrink = min(1.0, len(ids) / wanted) if wanted else 0.0
    if not ids or min((int(n * shrink) for n in counts.values() if n), default=0) < 2:
        raise AlloError(
            f"{name}: only {len(ids)} questions gave a pair, {wanted} were asked for; "
            "sample more questions or ask for fewer pairs"
        )
    result, start = {}, 0
    for split, count in counts.items():
        chosen = set(ids[start : start + int(count * shrink)])
        start += len(chosen)
        result[split] = [row for row in rows if row["id"] in chosen]
    return result


def _wrong_splits(splits: dict[str, list[dict]], rows, wrong: list[dict]) -> dict[str, list[dict]]:
    """All wrong samples, dealt to the training sets as their questions are.

    Questions without a pair are dealt out in the same proportion.
    """
    paired = list(dict.fromkeys(row["id"] for row in rows))
    without = list(dict.fromkeys(r["id"] for r in wrong if r["id"] not in set(paired)))
    found, start = {}, 0
    for split in [name for name in splits if name.startswith("train")]:
        ids = {row["id"] for row in splits[split]}
        share = round(len(without) * len(ids) / len(paired))
        ids |= set(without[start : start + share])
        start += share
        found[split.replace("train", "wrong")] = [row for row in wrong if row["id"] in ids]
    return found


def _sampled_pairs(study, name: str) -> tuple[list[dict], list[dict], dict]:
    domain, task = study.domain(name), study.task(name)
    settings = domain.pairs
    questions = task.questions("pairs", settings.questions)
    groups = generate(
        study.load_sft(name),
        study.tokenizer,
        [question.prompt for question in questions],
        max_new_tokens=domain.max_new_tokens,
        batch_size=study.profile.compute.generation_batch,
        samples=settings.samples,
        temperature=settings.temperature,
        seed=derive(study.seed, "sampling", name),
    )
    rows, all_wrong, right_share, both, too_long = [], [], 0.0, 0, 0
    for question, group in zip(questions, groups, strict=True):
        ended = list(dict.fromkeys(response.text for response in group if response.ended))
        short = _that_fit(study.tokenizer, question.prompt, ended, domain.max_length)
        too_long += len(ended) - len(short)
        right = [text for text in short if task.right(question, text)]
        # A response without an answer is no wrong answer: it would teach the form, not the matter.
        wrong = [t for t in short if task.answered(question, t) and not task.right(question, t)]
        share = [task.right(question, r.text) and r.ended for r in group]
        right_share += sum(share) / len(share)
        both += bool(right and wrong)
        rows += _pairs_of(study, task, question, right, wrong, settings.per_question)
        if _that_fit(study.tokenizer, question.prompt, [question.solution], domain.max_length):
            all_wrong += [_row(task, question, question.solution, text) for text in wrong]
    summary = {
        "questions": len(questions),
        "samples": settings.samples,
        "right": right_share / len(questions),
        "too_long": too_long,
        "questions_with_both": both,
        "pairs": len(rows),
        "wrong": len(all_wrong),
    }
    return rows, all_wrong, summary


def _that_fit(tokenizer, prompt, responses: list[str], max_length: int) -> list[str]:
    """The responses that fit into `max_length` tokens together with the prompt.

    Sampling bounds the response only; training takes no longer row.
    """
    room = max_length - len(encode_prompt(tokenizer, prompt))
    return [text for text in responses if len(encode_response(tokenizer, text)) <= room]


def _pairs_of(study, task, question, right, wrong, most: int) -> list[dict]:
    """At most `most` random (right, wrong) pairs of one question, without repeats."""
    pairs = [(chosen, rejected) for chosen in right for rejected in wrong]
    random.Random(derive(study.seed, "pairs", question.id)).shuffle(pairs)
    return [_row(task, question, *pair) for pair in pairs[:most]]


def _row(task, question, chosen: str, rejected: str) -> dict:
    return {
        "id": question.id,
        "dataset": question.dataset,
        "prompt": question.prompt,
        "chosen": chosen,
        "rejected": rejected,
        "solution": question.solution,
        "corrected": task.correction(question, rejected),
    }


def _given_pairs(study, name: str, split: str = "train") -> tuple[list[dict], dict]:
    """Human pairs; the chosen reply stands in for the solution and for the correction."""
    domain = study.domain(name)
    rows, count = [], 0
    for dataset in domain.datasets:
        given = realdata.load_rows(dataset, split, study.data_dir)
        count += len(given)
        pairs = realdata.preference_pairs(given, study.tokenizer, domain.max_length)
        rows += [_given(dataset, pair) for pair in pairs]
    if split == "train":
        random.Random(derive(study.seed, "rows", name)).shuffle(rows)
    first_of = {row["id"]: row for row in reversed(rows)}  # one pair a conversation
    rows = [row for row in rows if row is first_of[row["id"]]]
    return rows, {"given": count, "pairs": len(rows)}


def _first_turn(prompt) -> str:
    """What tells conversations apart: several pairs may continue the same one."""
    return prompt if isinstance(prompt, str) else prompt[0]["content"]


def _given(dataset: str, pair: dict) -> dict:
    chosen, rejected = (_text(pair[side]) for side in ("chosen", "rejected"))
    return {
        "id": f"{dataset}-{fingerprint(_first_turn(pair['prompt']))[:16]}",
        "dataset": dataset,
        "prompt": pair["prompt"],
        "chosen": chosen,
        "rejected": rejected,
        "solution": chosen,
        "corrected": chosen,
    }


def _text(response) -> str:
    return response if isinstance(response, str) else response[-1]["content"]
