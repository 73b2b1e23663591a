"""Preference pairs of a study: sampled and sorted by the verifier, or compared by people.

Every question (or conversation) is in one split only: `train` for the compared methods (and
`train1`, `train2`, ... for the further pair sets of a profile with replicates), `mask` for
importance scores and the reward model, `heldout` for reward accuracy, `dev` for learning rates of
domains without a verifier. `wrong` (`wrong1`, ...) holds every distinct wrong sample of a training
set's questions, and of its share of those that gave no right one, beside the solution, as far as
that fits.
"""

import itertools
import logging
import random
import re
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from allo_lib.data.benchmarks import load_rows
from allo_lib.engine.encoding import encode_prompt, encode_response
from allo_lib.engine.generation import generate
from allo_lib.engine.rewriter import Correction
from allo_lib.engine.store import Artifact, write_json
from allo_lib.errors import AlloError, short
from allo_lib.profiles.config import fingerprint
from allo_lib.seeds import derive

_TURNS = re.compile(r"\n\n(Human|Assistant):")  # the beginnings of hh-rlhf's
SPLITS = ("train", "heldout", "dev", "mask")  # and `train_split`, those with "wrong" for "train"
COLUMNS = ("prompt", "chosen", "rejected")


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
        """Return the split as a `datasets.Dataset` with the columns prompt, chosen, rejected."""
        rows = self.rows[split]
        return Dataset.from_list([{name: row[name] for name in COLUMNS} for row in rows])

    def corrections(self, split: str) -> list[Correction]:
        """Return examples for the rewriter; rows without a correction keep their prediction."""
        examples = []
        for row in self.rows[split]:
            corrected = row["rejected"] if row["corrected"] is None else row["corrected"]
            examples.append(Correction(row["prompt"], row["solution"], row["rejected"], corrected))
        return examples

    def save(self, folder: Path) -> None:
        """Write one JSON file per split and the summary."""
        for split, rows in self.rows.items():
            write_json(folder / f"{split}.json", rows)
        write_json(folder / "record.json", self.summary)

    @classmethod
    def load(cls, artifact: Artifact) -> "Pairs":
        """Read what `save` wrote."""
        names = {path.stem for path in artifact.path.glob("*.json")} - {"record", "manifest"}
        splits = dict.fromkeys((*SPLITS, *sorted(names)))
        rows = {split: artifact.json(f"{split}.json") for split in splits}
        return cls(rows, artifact.json(), artifact.key)


def train_split(pair_set: int) -> str:
    """Name the split that holds a pair set's training pairs: "train", "train1", ..."""
    return f"train{pair_set or ''}"


def make_pairs(study, name: str) -> Pairs:
    """Make the pairs of a domain of a study, in the splits of the module's text.

    Raises:
        AlloError: fewer questions gave a pair than the smallest split needs.
    """
    domain = study.domain(name)
    is_human = domain.kind == "preferences"
    counts = {
        split: getattr(domain.pairs, split)
        for split in ("train", "dev" if is_human else "heldout", "mask")
    }
    # Further pair sets come last, to change none before them.
    further = range(1, study.profile.replicates.pair_sets)
    counts |= {train_split(number): domain.pairs.train for number in further}
    if is_human:
        rows, summary = _human_pairs(study, name, "train")
        splits, heldout = _split(rows, counts, name), {}
        taken = {row["id"] for split in splits.values() for row in split}
        # Where the test file has too few, what no other split took.
        for row in [*_human_pairs(study, name, "test")[0], *rows]:
            if row["id"] not in taken:
                heldout.setdefault(row["id"], row)
        return Pairs(splits | {"heldout": [*heldout.values()][: domain.pairs.heldout]}, summary)
    rows, wrong, summary = _sampled_pairs(study, name)
    splits = _split(rows, counts, name)
    return Pairs(splits | _wrong_splits(splits, rows, wrong) | {"dev": []}, summary)


def _split(rows: list[dict], counts: dict[str, int], name: str) -> dict[str, list[dict]]:
    """Deal the rows out by question; when there are too few, every split shrinks alike."""
    ids = list(dict.fromkeys(row["id"] for row in rows))
    wanted = sum(counts.values())
    shrink = min(1.0, len(ids) / wanted) if wanted else 0.0
    if not ids or min((int(n * shrink) for n in counts.values() if n), default=0) < 2:
        raise AlloError(
            f"{name}: only {len(ids)} questions gave a pair, {wanted} are requested; "
            "sample more questions or request fewer pairs"
        )
    result, start = {}, 0
    for split, count in counts.items():
        chosen = set(ids[start : start + int(count * shrink)])
        start += len(chosen)
        result[split] = [row for row in rows if row["id"] in chosen]
    return result


def _wrong_splits(splits: dict[str, list[dict]], rows, wrong: list[dict]) -> dict[str, list[dict]]:
    """Deal all wrong samples to the training sets as their questions are.

    Questions without a pair are dealt out in the same proportion.
    """
    paired = {row["id"] for row in rows}
    without = list(dict.fromkeys(row["id"] for row in wrong if row["id"] not in paired))
    result, start = {}, 0
    for split in [name for name in splits if name.startswith("train")]:
        ids = {row["id"] for row in splits[split]}
        share = round(len(without) * len(ids) / len(paired))
        ids |= set(without[start : start + share])
        start += share
        result[split.replace("train", "wrong")] = [row for row in wrong if row["id"] in ids]
    return result


def _sampled_pairs(study, name: str) -> tuple[list[dict], list[dict], dict]:
    """Return random (right, wrong) pairs of each question, all wrong samples, and the summary."""
    domain, task = study.domain(name), study.task(name)
    settings = domain.pairs
    questions = task.questions("pairs", settings.questions)
    groups = generate(
        study.load_sft(name), study.tokenizer, [question.prompt for question in questions],
        max_new_tokens=domain.max_new_tokens, batch_size=study.profile.compute.generation_batch,
        samples=settings.samples, temperature=settings.temperature,
        seed=derive(study.seed, "sampling", name),
    )  # fmt: skip
    rows, all_wrong, right_share, both, too_long, unsolved = [], [], 0.0, 0, 0, 0
    for question, group in zip(questions, groups, strict=True):
        # Sampling bounds the response only; training takes no longer row.
        room = domain.max_length - len(encode_prompt(study.tokenizer, question.prompt))
        fits = lambda text, room=room: len(encode_response(study.tokenizer, text)) <= room  # noqa: E731
        ended = list(dict.fromkeys(response.text for response in group if response.ended))
        fitting = list(filter(fits, ended))
        too_long += len(ended) - len(fitting)
        right = [text for text in fitting if task.right(question, text)]
        # A response without an answer is no wrong answer: it would teach the form, not the matter.
        wrong = [t for t in fitting if t not in right and task.answered(question, t)]
        share = [task.right(question, r.text) and r.ended for r in group]
        right_share += sum(share) / len(share)
        both += bool(right and wrong)
        pairs = [(chosen, rejected) for chosen in right for rejected in wrong]
        random.Random(derive(study.seed, "pairs", question.id)).shuffle(pairs)
        rows += [_row(task, question, *pair) for pair in pairs[: settings.per_question]]
        unsolved += 0 if fits(question.solution) else len(wrong)
        if fits(question.solution):
            all_wrong += [_row(task, question, question.solution, text) for text in wrong]
    summary = {
        "questions": len(questions), "samples": settings.samples,
        "right": right_share / len(questions), "too_long": too_long,
        "questions_with_both": both, "pairs": len(rows), "wrong": len(all_wrong),
        "wrong_beside_too_long_a_solution": unsolved,
    }  # fmt: skip
    return rows, all_wrong, summary


def _row(task, question, chosen: str, rejected: str) -> dict:
    return {
        "id": question.id, "dataset": question.dataset, "prompt": question.prompt,
        "chosen": chosen, "rejected": rejected, "solution": question.solution,
        "corrected": task.correction(question, rejected),
    }  # fmt: skip


def _human_pairs(study, name: str, split: str) -> tuple[list[dict], dict]:
    """Return human pairs; the chosen reply stands in for the solution and for the correction."""
    domain = study.domain(name)
    rows, count = [], 0
    for dataset in domain.datasets:
        loaded = load_rows(dataset, split, study.data_dir)
        count += len(loaded)
        for pair in preference_pairs(loaded, study.tokenizer, domain.max_length):
            first_turn = pair["prompt"]
            if not isinstance(first_turn, str):
                first_turn = first_turn[0]["content"]
                pair |= {side: pair[side][-1]["content"] for side in COLUMNS[1:]}
            elif first_turn.startswith("\n\nHuman:"):  # without a chat template
                first_turn = _TURNS.split(first_turn)[2].strip()
            # Several pairs may continue the same conversation: its first turn tells it apart.
            own = {"id": f"{dataset}-{fingerprint(first_turn)[:16]}", "dataset": dataset}
            rows.append(pair | own | {"solution": pair["chosen"], "corrected": pair["chosen"]})
    if split == "train":
        random.Random(derive(study.seed, "rows", name)).shuffle(rows)
    first_of = {row["id"]: row for row in reversed(rows)}  # one pair a conversation
    rows = [row for row in rows if row is first_of[row["id"]]]
    return rows, {"given": count, "pairs": len(rows)}


def preference_pairs(rows: list[dict], tokenizer, max_tokens: int) -> list[dict]:
    r"""Bring preference rows of a data folder into TRL's columns prompt, chosen, rejected.

    With a tokenizer that has a chat template, prompts in the `\n\nHuman: ... \n\nAssistant:`
    form become chat messages and both replies one assistant message each; else all stay strings, a
    reply to that form with a blank before it. Pairs of which prompt and longer reply, end token
    included, exceed `max_tokens` are dropped, and a warning says how many.

    Raises:
        AlloError: no pair left, rows of another kind, or a malformed prompt.
    """
    if "chosen" not in rows[0]:  # a file holds one kind of rows
        raise AlloError(f"rows are no preferences; expected the keys {', '.join(COLUMNS)}")
    pairs = [_columns(row, bool(getattr(tokenizer, "chat_template", None))) for row in rows]
    pairs = [pair for pair in pairs if pair_tokens(pair, tokenizer) <= max_tokens]
    if not pairs:
        raise AlloError(f"none of {len(rows)} pairs has at most {max_tokens} tokens; raise that")
    if dropped := len(rows) - len(pairs):
        message = "%d of %d pairs dropped: longer than %d tokens"
        logging.getLogger(__name__).warning(message, dropped, len(rows), max_tokens)
    return pairs


def pair_tokens(pair: dict, tokenizer) -> int:
    """Count the tokens of a pair's prompt and longer reply, end token included."""
    prompt = len(encode_prompt(tokenizer, pair["prompt"]))
    return prompt + max(len(encode_response(tokenizer, pair[key])) for key in COLUMNS[1:])


def _columns(row: dict, chat: bool) -> dict:
    prompt, *replies = (row[key] for key in COLUMNS)
    if prompt.startswith("\n\nHuman:"):
        if chat:
            prompt = helpful_prompt(prompt)
            replies = [[{"role": "assistant", "content": text.strip()}] for text in replies]
        else:  # the prompt ends in "Assistant:"; the blank after it belongs to the reply
            replies = [" " + text for text in replies]
    return dict(zip(COLUMNS, (prompt, *replies), strict=True))


def helpful_prompt(text: str) -> list[dict]:
    r"""Read a conversation in the `\n\nHuman: ... \n\nAssistant:` form as chat messages.

    The form ends in an open Assistant turn; the messages end with the human turn before it. Turns
    of one speaker in a row, as a few prompts have them, become one message.

    Raises:
        AlloError: a text that does not start with a human turn or not end in an open Assistant turn
            after one, or with an empty turn.
    """
    before, *parts = _TURNS.split(text)
    turns = [(who, said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]
    messages = []
    for who, said in itertools.groupby(turns[:-1], key=lambda turn: turn[0]):
        content = "\n\n".join(text for _, text in said if text)
        messages.append({"role": "user" if who == "Human" else "assistant", "content": content})
    roles, contents = ([message[key] for message in messages] for key in ("role", "content"))
    is_open = turns[-1:] == [("Assistant", "")] and roles[:1] == roles[-1:] == ["user"]
    if before.strip() or not is_open or not all(contents):
        raise AlloError(
            f"prompt {short(text)}: expected turns with text, '\\n\\nHuman: ...' first, and "
            "the open turn '\\n\\nAssistant:' after a human one last"
        )
    return messages
