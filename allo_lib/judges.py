"""Judges of instruction following, where no gold answer exists: one function, five kinds.

- "preferences": held-out pairs that the implicit reward of the aligned model ranks right.
- "reward_model", "judge_model": our texts against theirs, by a local model that the user names.
- "alpaca_eval", "arena_hard": the same by these benchmarks' own programs and the user's key.

A tie counts half. Two equal texts are a tie whoever judges, so that the SFT model against itself is
at .5 (50.00 in the paper's tables) by construction. A judge reads what models wrote and can be
swayed by it: a win rate says what this judge prefers, so it is given with the judge's name.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

from allo_lib.benchmark_files import checked
from allo_lib.errors import AlloError
from allo_lib.judge_programs import (
    ask_alpaca_eval,
    ask_arena_hard,
    write_for_alpaca_eval,
    write_for_arena_hard,
)
from allo_lib.local_judges import LOCAL, LocalJudge, load_judge, margins
from allo_lib.measurements import Measurement

PROGRAMS = ("alpaca_eval", "arena_hard")
KINDS = ("preferences", *LOCAL, *PROGRAMS)


@dataclass(frozen=True)
class Judgement:
    """Outcomes in [0, 1] by item, 1 for ours and .5 for a tie, and what they add up to.

    `weights`: how many verdicts stand behind each outcome (Arena-Hard); else every one is 1.
    `unjudged`: items that the judge gave no verdict on; they count nowhere.
    """

    kind: str
    ids: tuple[str, ...]
    outcomes: tuple[float, ...]
    weights: tuple[float, ...]
    unjudged: int = 0

    @property
    def n(self) -> int:
        """Judged items."""
        return len(self.outcomes)

    @property
    def ties(self) -> int:
        """Items whose outcome is exactly half."""
        return sum(outcome == 0.5 for outcome in self.outcomes)

    @property
    def win_rate(self) -> float:
        """Mean outcome, a fraction."""
        pairs = zip(self.weights, self.outcomes, strict=True)
        return math.fsum(w * o for w, o in pairs) / math.fsum(self.weights)

    @property
    def stderr(self) -> float:
        """Of the win rate p over items: sqrt(sum of (w (o - p))^2) / sum of w.

        With weights of 1 and outcomes of 0 and 1 that is sqrt(p (1 - p) / n).
        """
        rate, pairs = self.win_rate, zip(self.weights, self.outcomes, strict=True)
        return math.sqrt(math.fsum((w * (o - rate)) ** 2 for w, o in pairs)) / sum(self.weights)


@dataclass(frozen=True)
class Comparison:
    """Two responses to each of some instructions.

    rows: dicts with `id` and `question`, a string or, for the local judges, chat messages;
    `subset` or `cluster` go into the files of the benchmarks. ours, theirs: texts in their order.

    Raises AlloError for no rows, unequal lengths, an id given twice, or no valid Unicode.
    """

    rows: Sequence[dict]
    ours: Sequence[str]
    theirs: Sequence[str]
    names: tuple[str, str] = ("ours", "theirs")

    def __post_init__(self):
        if not self.rows or not len(self.rows) == len(self.ours) == len(self.theirs):
            raise AlloError(
                f"{len(self.rows)} instructions with {len(self.ours)} and {len(self.theirs)} "
                "responses; expected at least one, and two responses to each"
            )
        if len(set(self.ids)) < len(self.rows):
            raise AlloError("an id of an instruction occurs twice; expected one row an id")
        for name, texts in zip(self.names, (self.ours, self.theirs), strict=True):
            for row_id, text in zip(self.ids, texts, strict=True):
                checked(text, f"{name}, response to {row_id!r}")
        for row in self.rows:
            if isinstance(row["question"], str):
                checked(row["question"], f"instruction {row['id']!r}")

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(row["id"] for row in self.rows)

    @property
    def differing(self) -> list[int]:
        """Places of the rows whose two responses are not the same text."""
        pairs = zip(self.ours, self.theirs, strict=True)
        return [place for place, (ours, theirs) in enumerate(pairs) if ours != theirs]


def judge(
    kind: str,
    evidence,
    *,
    model: LocalJudge | str | None = None,
    batch_size: int = 8,
    folder=None,
    checkout=None,
    **loading,
) -> Judgement:
    """Who follows instructions better, by one kind of judge.

    Args:
        kind: one of KINDS.
        evidence: for "preferences" the implicit reward of chosen minus rejected of held-out pairs
            (`evaluation.implicit_margins`); for the others a `Comparison`.
        model: for the kinds in LOCAL, what `load_judge` gives, or its `name`.
        batch_size: texts that a local judge reads at once.
        folder: for the kinds in PROGRAMS, where the files to be judged are written.
        checkout: of Arena-Hard, see `judge_programs.ask_arena_hard`.
        loading: more for `load_judge`: dtype, device, revision.

    Raises:
        AlloError: an unknown kind, evidence or judge that cannot be used, no verdict at all; for
            PROGRAMS also a missing key or program (after the files are written).
    """
    if kind not in KINDS:
        raise AlloError(f"judge {kind!r}: expected one of {', '.join(KINDS)}")
    if kind == "preferences":
        return _preferences(evidence)
    if not isinstance(evidence, Comparison):
        raise AlloError(f"judge {kind!r} given a {type(evidence).__name__}; expected a Comparison")
    if not evidence.differing:
        return _judgement(kind, evidence.ids, dict.fromkeys(evidence.ids, [0.5]))
    if kind in PROGRAMS:
        return _by_program(kind, evidence, folder, checkout)
    if not isinstance(model, LocalJudge):
        model = load_judge(kind, model, **loading)
    if model.kind != kind:
        raise AlloError(f"judge {kind!r} given a {model.kind}; expected one loaded as {kind}")
    return _by_model(model, evidence, batch_size)


def win_rates(
    kind: str,
    rows: Sequence[dict],
    texts: Mapping[str, Sequence[str]],
    *,
    baseline: str,
    seed: int,
    dataset: str,
    **settings,
) -> list[Measurement]:
    """Rows `win_rate` of `measurements.csv`: each method's texts against the baseline's.

    Args:
        kind: of `judge`, any but "preferences".
        rows: instructions, as for `Comparison`.
        texts: method -> its responses in the order of the rows; the baseline's among them, whose
            own row is .5 by construction.
        settings: for `judge`; a model named there is loaded once.

    Raises AlloError as `judge` does, and when the baseline has no texts.
    """
    if baseline not in texts:
        raise AlloError(f"no texts of the baseline {baseline!r} among {', '.join(texts)}")
    if kind in LOCAL and not isinstance(settings.get("model"), LocalJudge):
        loading = {k: settings.pop(k) for k in ("dtype", "device", "revision") if k in settings}
        settings["model"] = load_judge(kind, settings.get("model"), **loading)
    compared = [
        Comparison(rows, ours, texts[baseline], (method, baseline))
        for method, ours in texts.items()
    ]
    if kind in PROGRAMS:  # all files, even where the first method's cannot be judged
        for one in compared:
            if one.names[0] != baseline:
                _write(kind, one, settings.get("folder"))
    return [
        measurement(judge(kind, one, **settings), seed, one.names[0], dataset) for one in compared
    ]


def measurement(
    judgement: Judgement, seed: int, method: str, dataset: str, metric: str = "win_rate"
) -> Measurement:
    """A judgement as a row of `measurements.csv`."""
    told = judgement.win_rate, judgement.stderr, judgement.n
    return Measurement(seed, method, dataset, metric, *told)


def _preferences(margins_of_pairs) -> Judgement:
    if not isinstance(margins_of_pairs, Sequence) or not margins_of_pairs:
        raise AlloError("judge 'preferences' given no margins; expected a list of at least one")
    verdicts = {
        str(number): [_outcome(margin, f"margin of pair {number}")]
        for number, margin in enumerate(margins_of_pairs)
    }
    return _judgement("preferences", tuple(verdicts), verdicts)


def _by_model(model: LocalJudge, comparison: Comparison, batch_size: int) -> Judgement:
    places = comparison.differing
    questions = [comparison.rows[place]["question"] for place in places]
    ours, theirs = ([texts[i] for i in places] for texts in (comparison.ours, comparison.theirs))
    verdicts = dict.fromkeys(comparison.ids, [0.5])
    found = margins(model, questions, ours, theirs, batch_size)
    for place, margin in zip(places, found, strict=True):
        row_id = comparison.ids[place]
        verdicts[row_id] = [_outcome(margin, f"{model.kind} {model.note['name']!r} on {row_id!r}")]
    return _judgement(model.kind, comparison.ids, verdicts)


def _write(kind: str, comparison: Comparison, folder):
    if folder is None:
        raise AlloError(f"judge {kind!r} without a folder; expected one to write its files to")
    write = write_for_alpaca_eval if kind == "alpaca_eval" else write_for_arena_hard
    given = comparison.rows, comparison.ours, comparison.theirs, comparison.names
    return write(*given, folder)


def _by_program(kind: str, comparison: Comparison, folder, checkout) -> Judgement:
    folder = _write(kind, comparison, folder)
    given = folder, comparison.rows, comparison.names
    if kind == "alpaca_eval":
        verdicts = {key: [outcome] for key, outcome in ask_alpaca_eval(*given).items()}
    else:
        verdicts = ask_arena_hard(*given, checkout=checkout)
    same = set(comparison.ids) - {comparison.ids[place] for place in comparison.differing}
    tie = [0.5] if kind == "alpaca_eval" else [0.5, 0.5]  # Arena-Hard asks twice
    return _judgement(kind, comparison.ids, verdicts | dict.fromkeys(same, tie))


def _outcome(margin: float, place: str) -> float:
    if not isinstance(margin, Real) or math.isnan(margin):
        raise AlloError(
            f"{place}: {margin!r} is no number; load the models in float32 or mend them"
        )
    return 0.5 if margin == 0 else float(margin > 0)


def _judgement(kind: str, ids, verdicts: dict[str, list[float]]) -> Judgement:
    judged = [row_id for row_id in ids if verdicts.get(row_id)]
    if not judged:
        raise AlloError(f"judge {kind!r} gave no verdict on any of {len(ids)} items; see its log")
    outcomes = tuple(math.fsum(verdicts[key]) / len(verdicts[key]) for key in judged)
    weights = tuple(float(len(verdicts[key])) for key in judged)
    return Judgement(kind, tuple(judged), outcomes, weights, len(ids) - len(judged))
