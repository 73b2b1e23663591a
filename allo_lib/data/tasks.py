"""The questions of a domain behind one face: generated ones (miniature) and real ones.

A task gives questions of a split, a solution to learn from, the verdict on a response, and its
minimally corrected form. Splits: "sft", "pairs", "dev" and "test"; no question is in two of them.
"""

import random
from dataclasses import dataclass

from allo_lib.data import miniature, questions, realdata, shares
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
        """`count` questions, families interleaved in equal shares, or in those of `mix`."""
        found = []
        for family, share in zip(self.datasets, mix or _equal(self.datasets), strict=True):
            problems = miniature.problems(family, split, round(count * share), self.seed)
            found.append([self._question(problem) for problem in problems])
        return _interleaved(found)

    def _question(self, problem) -> Question:
        rng = random.Random(derive(self.seed, "solution", problem.id))
        text = miniature.solution(problem, rng)
        return Question(problem.id, problem.family, problem.prompt, text, problem)

    def demonstration(self, question: Question, phase: Supervised) -> str:
        """A solution to imitate, in the wording and with the errors of a supervised phase."""
        rng = random.Random(derive(self.seed, "demonstration", question.id, phase.error_scale))
        return miniature.solution(
            question.source, rng, phase.error_scale, plain=phase.plain_wording
        )

    def answered(self, question: Question, response: str) -> bool:
        """Whether a final answer can be read from the response."""
        return miniature.read_answer(response) is not None

    def right(self, question: Question, response: str) -> bool:
        """Whether the final answer is the gold one."""
        return miniature.is_right(question.source, response)

    def correction(self, question: Question, response: str) -> str | None:
        """The response with only its wrong words changed; None when it cannot be read."""
        return miniature.correct(question.source, response)

    def wrong_tokens(self, question: Question, response: str) -> list[bool]:
        """Which words of the response are wrong decisions, known to the generator alone."""
        return miniature.wrong_tokens(question.source, response)


class RealQuestions:
    """Real questions with a gold answer, of one data set or of several trained on jointly.

    Seeds share the test set and draw everything else apart. A data set whose training rows do not
    make up an equal share gives what it has, and the others give more; what a phase's `mix` asks
    for is given as it is or refused.
    """

    def __init__(self, domain: Domain, seed: int, data_dir=None):
        self.domain, self.seed, self.data_dir = domain, seed, data_dir
        self._rows: dict[tuple[str, str], list[dict]] = {}
        self._planned: dict[str, dict[str, int]] = {}

    def questions(self, split: str, count: int, mix: tuple[float, ...] = ()) -> list[Question]:
        """`count` questions, equally many of each data set as far as it has them, or by `mix`.

        Test questions come from the test file, in an order that no seed changes; the others from
        consecutive parts of the seed's own order of the training file.

        Raises:
            AlloError: more than there are, or rows that are no questions of the domain's kind.
        """
        file = "test" if split == "test" else "train"
        counts, starts = self._parts(split, count, mix)
        groups = []
        for name, number in counts.items():
            rows = self._load(name, file)[starts[name] : starts[name] + number]
            groups.append([self._question(name, row) for row in rows])
        return _interleaved(groups)

    def _load(self, name: str, file: str) -> list[dict]:
        if (name, file) not in self._rows:
            rows = realdata.load_rows(name, file, self.data_dir)
            seed = 0 if file == "test" else self.seed
            random.Random(derive(seed, "rows", name, file)).shuffle(rows)
            self._rows[name, file] = rows
        return self._rows[name, file]

    def _parts(self, split: str, count: int, mix) -> tuple[dict[str, int], dict[str, int]]:
        """Number of questions of each data set, and the number of its first row."""
        names = self.domain.datasets
        if split == "test":
            sizes = {name: len(self._load(name, "test")) for name in names}
            return shares.of_test(count, sizes), dict.fromkeys(names, 0)
        if not self._planned:
            sizes = {name: len(self._load(name, "train")) for name in names}
            self._planned = shares.plan(self.domain, sizes)
        room = self._planned[split]
        counts = shares.by_mix(count, names, mix) if mix else shares.spread(count, room)
        if counts is None or any(counts[name] > room[name] for name in names):
            raise AlloError(
                f"{count} questions of {split} asked for, but the profile sets "
                f"{', '.join(f'{n} of {name}' for name, n in room.items())} aside"
            )
        before = shares.ORDER[: shares.ORDER.index(split)]
        return counts, {name: sum(self._planned[s][name] for s in before) for name in names}

    def _question(self, name: str, row: dict) -> Question:
        if self.domain.kind == "choice" and not row.get("choices"):
            raise AlloError(f"question {row['id']!r} has no options; expected multiple choice")
        questions.check(name, row)
        # Only a data set's own ids are known to differ.
        alone = len(self.domain.datasets) == 1 or row["id"].startswith(f"{name}-")
        solution = questions.target(name, row, explain=self.domain.explain)
        row_id = row["id"] if alone else f"{name}/{row['id']}"
        return Question(row_id, name, questions.prompt(name, row), solution, row)

    def demonstration(self, question: Question, phase: Supervised) -> str:
        """The gold response."""
        return question.solution

    def answered(self, question: Question, response: str) -> bool:
        """Whether the response ends in an answer of the question's kind."""
        return questions.read(question.dataset, question.source, response) is not None

    def right(self, question: Question, response: str) -> bool:
        """Whether it ends in the gold answer."""
        return questions.is_right(question.dataset, question.source, response)

    def correction(self, question: Question, response: str) -> str:
        """The response with its final answer replaced by the gold one."""
        return questions.correction(question.dataset, question.source, response)


def _equal(datasets) -> tuple[float, ...]:
    return (1 / len(datasets),) * len(datasets)


def _interleaved(groups: list[list[Question]]) -> list[Question]:
    """All questions, each group spread evenly over the whole, so that any part has the same mix."""
    placed = [
        ((number + 0.5) / len(group), position, question)
        for position, group in enumerate(groups)
        for number, question in enumerate(group)
    ]
    return [question for _, _, question in sorted(placed, key=lambda item: item[:2])]


def open_task(domain: Domain, seed: int, data_dir=None):
    """The task of a domain that has questions."""
    if domain.kind == "miniature":
        return Miniature(domain, seed)
    return RealQuestions(domain, seed, data_dir)
