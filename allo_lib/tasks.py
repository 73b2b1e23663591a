"""The questions of a domain behind one face: generated ones (miniature) and real ones (choice).

A task gives questions of a split, a solution to learn from, the verdict on a response, and its
minimally corrected form. Splits: "sft", "pairs", "dev" and "test"; no question is in two of them.
"""

import random
from dataclasses import dataclass

from allo_lib import miniature, realdata
from allo_lib.config import Domain, Supervised
from allo_lib.errors import AlloError
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


class Choice:
    """Real multiple-choice questions; seeds share the test set and draw everything else apart."""

    def __init__(self, domain: Domain, seed: int, data_dir=None):
        self.domain, self.seed, self.data_dir = domain, seed, data_dir
        self._rows: dict[tuple[str, str], list[dict]] = {}

    def questions(self, split: str, count: int, mix: tuple[float, ...] = ()) -> list[Question]:
        """`count` questions, equally many of each data set, or in the shares of `mix`.

        Test questions come from the test file, in an order that no seed changes; the others from
        consecutive parts of the seed's own order of the training file.
        """
        counts = self._counts(count, mix)
        return _interleaved([self._of_dataset(n, split, c) for n, c in counts.items()])

    def _counts(self, count: int, mix: tuple[float, ...] = ()) -> dict[str, int]:
        shares = zip(self.domain.datasets, mix or _equal(self.domain.datasets), strict=True)
        return {name: round(count * share) for name, share in shares}

    def _of_dataset(self, name: str, split: str, count: int) -> list[Question]:
        file = "test" if split == "test" else "train"
        rows = self._load(name, file)
        start = 0 if split == "test" else self._start(split, name)
        if start + count > len(rows):
            raise AlloError(
                f"{name}/{file} has {len(rows)} rows, but {split} needs rows {start} to "
                f"{start + count}: lower the counts of the profile"
            )
        return [self._question(name, row) for row in rows[start : start + count]]

    def _load(self, name: str, file: str) -> list[dict]:
        if (name, file) not in self._rows:
            rows = realdata.load_rows(name, file, self.data_dir)
            seed = 0 if file == "test" else self.seed
            random.Random(derive(seed, "rows", name, file)).shuffle(rows)
            self._rows[name, file] = rows
        return self._rows[name, file]

    def _start(self, split: str, name: str) -> int:
        """Rows of the data set that belong to the splits before this one."""
        phases = self.domain.pretrain, self.domain.sft
        supervised = max(self._counts(phase.examples, phase.mix)[name] for phase in phases)
        pairs = self._counts(self.domain.pairs.questions)[name]
        return {"sft": 0, "pairs": supervised, "dev": supervised + pairs}[split]

    def _question(self, name: str, row: dict) -> Question:
        explain = self.domain.explain
        solution = realdata.qa_target(row, explain=explain)
        return Question(str(row["id"]), name, realdata.qa_prompt(row), solution, row)

    def demonstration(self, question: Question, phase: Supervised) -> str:
        """The gold response."""
        return question.solution

    def answered(self, question: Question, response: str) -> bool:
        """Whether the response ends in one of the options."""
        return realdata.read_choice(response, question.source) is not None

    def right(self, question: Question, response: str) -> bool:
        """Whether it ends in the gold option."""
        return realdata.is_right(question.source, response)

    def correction(self, question: Question, response: str) -> str:
        """The response with its final answer replaced by the gold option."""
        return realdata.correction(question.source, response)


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
    return Choice(domain, seed, data_dir)
