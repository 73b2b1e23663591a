"""The questions of a domain: generated ones (miniature) and real ones, with one interface.

A task gives questions of a split, a solution to learn from, the verdict on a response, and its
minimally corrected form. Splits: "sft", "pairs", "dev" and "test"; no question is in two of them.

A real question is a row as `benchmarks` describes it, with the name of its data set there; of other
names the kind of answer is inferred from the row.
"""

import itertools
import random
import re
from dataclasses import dataclass
from functools import lru_cache

from allo_lib.data import answers, miniature
from allo_lib.data.answers import LETTERS, MARKER
from allo_lib.data.benchmarks import BENCHMARKS, load_rows
from allo_lib.errors import AlloError
from allo_lib.profiles.config import Domain, Supervised
from allo_lib.seeds import derive


@dataclass(frozen=True)
class Question:
    """`source` is what the task made it from; `solution` is right and worked out."""

    id: str
    dataset: str
    prompt: str
    solution: str
    source: object


class Miniature:
    """Generated problems; every seed draws its own ones in every split."""

    def __init__(self, domain: Domain, seed: int):
        self.datasets, self.seed = domain.datasets, seed

    def questions(self, split: str, count: int, mix: tuple[float, ...] = ()) -> list[Question]:
        """Return `count` questions, families interleaved in equal shares, or in those of `mix`."""
        shares = mix or (1 / len(self.datasets),) * len(self.datasets)
        groups = []
        for family, share in zip(self.datasets, shares, strict=True):
            problems = miniature.problems(family, split, round(count * share), self.seed)
            groups.append([self._question(problem) for problem in problems])
        return _interleaved(groups)

    def _question(self, problem: miniature.Problem) -> Question:
        rng = random.Random(derive(self.seed, "solution", problem.id))
        text = miniature.solution(problem, rng)
        return Question(problem.id, problem.family, problem.prompt, text, problem)

    def demonstration(self, question: Question, phase: Supervised) -> str:
        """Write a solution to imitate, in the wording and with the errors of a phase."""
        rng = random.Random(derive(self.seed, "demonstration", question.id, phase.error_scale))
        return miniature.solution(
            question.source, rng, phase.error_scale, plain=phase.plain_wording
        )

    def answered(self, question: Question, response: str) -> bool:
        """Whether a final answer can be read from the response."""
        return miniature.read_answer(response) is not None

    def right(self, question: Question, response: str) -> bool:
        """Whether the final answer is the gold one."""
        return miniature.read_answer(response) == question.source.answer

    def correction(self, question: Question, response: str) -> str | None:
        """Return the response with only its wrong words changed; None when it cannot be read."""
        return miniature.correct(question.source, response)

    def wrong_tokens(self, question: Question, response: str) -> list[bool]:
        """Return which words of the response are wrong decisions, as only the generator knows."""
        return miniature.wrong_tokens(question.source, response)


class RealQuestions:
    """Real questions with a gold answer, of one data set or of several trained on jointly.

    Seeds share the test set and draw everything else apart. A data set whose training rows do not
    make up an equal share gives what it has, and the others give more.
    """

    def __init__(self, domain: Domain, seed: int, data_dir=None):
        if domain.pretrain.mix or domain.sft.mix:
            raise AlloError("mix is of the miniature's families; leave it out of real data sets")
        self.domain, self.seed, self.data_dir = domain, seed, data_dir

    def questions(self, split: str, count: int, mix: tuple[float, ...] = ()) -> list[Question]:
        """Return `count` questions, equally many of each data set as far as it has them.

        Test questions come from the test file, in an order that no seed changes; the others from
        consecutive parts ("sft", "pairs", "dev") of the seed's own order of the training file.
        `mix` is always ().

        Raises:
            AlloError: more than there are, or rows that are no questions with a gold answer.
        """
        file = "test" if split == "test" else "train"
        sizes = {name: len(self._load(name, file)) for name in self.domain.datasets}
        room, starts = sizes, dict.fromkeys(sizes, 0)
        if file == "train":
            # Development and pairs first, which every data set should have; then the supervised
            # rows, of which there are the most.
            supervised = max(self.domain.pretrain.examples, self.domain.sft.examples)
            requested = {"dev": self.domain.dev, "pairs": self.domain.pairs.questions}
            planned = plan(requested | {"sft": supervised}, sizes, "train")
            room, order = planned[split], ("sft", "pairs", "dev")
            for before in order[: order.index(split)]:
                starts = {name: start + planned[before][name] for name, start in starts.items()}
        groups = []
        for name, number in plan({split: count}, room, split)[split].items():
            rows = self._load(name, file)[starts[name] :][:number]
            groups.append([self.question(name, row) for row in rows])
        return _interleaved(groups)

    @lru_cache
    def _load(self, name: str, file: str) -> list[dict]:
        rows = list(self._files()[name, file])
        seed = 0 if file == "test" else self.seed
        random.Random(derive(seed, "rows", name, file)).shuffle(rows)
        return rows

    @lru_cache
    def _files(self) -> dict[tuple[str, str], list[dict]]:
        """Rows of every file, those for training without what was asked before or is tested.

        The same stem and options are the same question, in whatever order, spaces and case.
        """
        found, seen = {}, set()
        for file, name in itertools.product(("test", "train"), self.domain.datasets):
            found[name, file] = []
            for row in load_rows(name, file, self.data_dir):
                if file == "test" or _asked(row) not in seen:
                    found[name, file].append(row)
                seen.add(_asked(row))
        return found

    def question(self, name: str, row: dict) -> Question:
        """Return the question that a row of a data set asks.

        Raises:
            AlloError: no gold answer, or one that would not be read, or not as right.
        """
        if "answer" not in row:
            raise AlloError(f"{name} has no gold answers (a judge is needed); expected questions")
        # Only a data set's own ids are known to differ.
        alone = len(self.domain.datasets) == 1 or row["id"].startswith(f"{name}-")
        row_id = row["id"] if alone else f"{name}/{row['id']}"
        solution = target(name, row, explain=self.domain.explain)
        question = Question(row_id, name, prompt(name, row), solution, row)
        if not self.right(question, solution):
            raise AlloError(
                f"question {row_id!r}: answer is {row['answer'][:40]!r}, expected one that reads "
                f"as {kind(name, row)}"
            )
        return question

    def demonstration(self, question: Question, phase: Supervised) -> str:
        """Return the gold response."""
        return question.solution

    def _read(self, question: Question, response: str) -> str | None:
        row = question.source
        return answers.read(kind(question.dataset, row), response, row["choices"])

    def answered(self, question: Question, response: str) -> bool:
        """Whether the response ends in an answer of the question's kind, read strictly."""
        return self._read(question, response) is not None

    def right(self, question: Question, response: str) -> bool:
        """Whether it ends in the gold answer."""
        answer, row = self._read(question, response), question.source
        what = kind(question.dataset, row)
        return answer is not None and answers.is_same(what, answer, row["answer"], row["question"])

    def correction(self, question: Question, response: str) -> str:
        """Return the response with as little changed as makes its final answer right.

        What follows the last `The answer is` is replaced by the gold answer; a response without one
        gets it appended. Made from the gold answer alone, so what stands before it stays as it was.
        """
        if self.right(question, response):
            return response
        before, marker, _ = response.rpartition(MARKER)
        return (before if marker else response.rstrip() + " ") + _final(question.source)


def _asked(row: dict) -> tuple:
    """What a row asks, without spaces, marks of sentences, case and the order of its options."""
    texts = (_stem(row), *(row.get("choices") or ()))
    stem, *options = (re.sub(_NO_MATTER, "", text.casefold()) for text in texts)
    return stem, *sorted(options)


def _interleaved(groups: list[list[Question]]) -> list[Question]:
    """Spread each group evenly over the whole, so that any part has the same mix."""
    placed = [
        ((number + 0.5) / len(group), position, question)
        for position, group in enumerate(groups)
        for number, question in enumerate(group)
    ]
    return [question for _, _, question in sorted(placed, key=lambda item: item[:2])]


# --- one real question ---------------------------------------------------------------------------


def kind(name: str, row: dict) -> str:
    """Kind of a row's answer: "choice" where there are options, else that of its data set."""
    if row["choices"]:
        return "choice"
    if name in BENCHMARKS:
        return BENCHMARKS[name].answer
    gold = row["answer"]
    if answers.plain(gold) in ("yes", "no"):
        return "yes_no"
    return "number" if answers.number(gold) is not None else "latex"


# Stops and commas that stand in no number, quotes, and blanks.
_NO_MATTER = r"(?<![0-9])[.,]|[.,](?![0-9])|[\s?!'\"]"


def _stem(row: dict) -> str:
    """The question without its options, which are always the last lines."""
    lines = row["question"].split("\n")
    return "\n".join(lines[: len(lines) - len(row.get("choices") or ())])


def prompt(name: str, row: dict) -> str:
    """Return what the model is asked: the stem, the options' texts on one line, and `Answer:`.

    Small models tell texts apart but not letters. The response begins with a space.
    """
    lines, choices = _stem(row).split("\n"), row["choices"] or ()
    if kind(name, row) == "yes_no":
        choices = ("yes", "no")
    if choices:
        lines.append(f"Options: {', '.join(choices)}")
    return "\n".join([*lines, "Answer:"])


def target(name: str, row: dict, explain: int = 0) -> str:
    """Return the gold response, starting with a space, without the end token.

    Before `The answer is: X` comes the whole derivation where the data set has such (for MAWPS the
    equation), and else `explain` statements of the human explanation (at most what there is).
    """
    solution = row["solution"] or ""
    if name in BENCHMARKS and BENCHMARKS[name].worked:
        before = [solution.strip()] if solution.strip() else []
    else:
        before = [" ".join(line.split()) for line in solution.split("\n") if line.strip()]
        before = before[:explain]
    ended = [text if text[-1] in ".!?" else text + "." for text in before]
    return " " + " ".join([*ended, _final(row)])


def _final(row: dict) -> str:
    gold, choices = row["answer"], row["choices"]
    return f"{MARKER}: {choices[LETTERS.index(gold)] if choices else gold}"


# --- how many rows each data set gives to each split ---------------------------------------------


def plan(counts: dict[str, int], sizes: dict[str, int], file: str) -> dict[str, dict[str, int]]:
    """Deal rows out to splits, in equal shares of the data sets as far as each has rows.

    counts: rows of each split, the first ones dealt out first. sizes: rows that each data set has
    in a `file`. Returns split -> data set -> rows.

    Raises:
        AlloError: more rows are requested than there are.
    """
    if sum(counts.values()) > sum(sizes.values()):
        present = ", ".join(f"{name}/{file} has {rows} rows" for name, rows in sizes.items())
        requested = ", ".join(f"{count} of {split}" for split, count in counts.items() if count)
        raise AlloError(
            f"{present}, but the profile requests {requested}: lower the counts of the profile"
        )
    left, planned = sizes, {}
    for split, count in counts.items():
        planned[split] = _spread(count, left)
        left = {name: rows - planned[split][name] for name, rows in left.items()}
    return planned


def _spread(count: int, room: dict[str, int]) -> dict[str, int]:
    """Deal `count` out in equal shares, none above its room."""
    counts, left = {}, count
    for position, name in enumerate(sorted(room, key=room.get)):
        counts[name] = min(room[name], round(left / (len(room) - position)))
        left -= counts[name]
    # Rounding up may have left the last ones short by one.
    for name in counts:
        more = min(left, room[name] - counts[name])
        counts[name], left = counts[name] + more, left - more
    return {name: counts[name] for name in room}
