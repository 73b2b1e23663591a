"""The tasks of the `tiny` profile: generated problems, worked solutions and a verifier.

Three families. *chain*: a counter that stops at 0 and 19 is moved up and down four times.
*scan*: the largest or smallest of five numbers, keeping the best so far. *story*: two people give,
get, find and lose things. A worked solution can be right, or show a *habit*: errors that depend on
the context (a forgotten carry, a misleading last digit, the second person forgotten) and on the
manner of the response, which also shows in its wording. Everything is made from a seed; whether a
problem is for training or for testing is decided by a hash of its prompt alone.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from allo_lib.data import miniature_text as text
from allo_lib.data.miniature_text import Slot, Stated, wording
from allo_lib.errors import AlloError
from allo_lib.seeds import derive

FAMILIES = ("chain", "scan", "story")
SPLITS = {"sft": range(0, 64), "pairs": range(64, 80), "dev": range(80, 86), "test": range(86, 100)}
TOP = 19
NUMBERS = {n: ((str(n),), (str(n),)) for n in range(TOP + 1)}
NUMBER_WORDS = tuple(map(str, NUMBERS))
ORDINALS = ("first", "second", "third", "fourth", "fifth")
COUNTED = ("one", "two", "three", "four", "five")  # how a sloppy sentence begins
SIGNS = {"+": (("plus", "adding"), ("and", "up")), "-": (("minus", "less"), ("off", "down"))}
COMPARED = {
    "start": (("alone", "new"), ("there", "just")),
    "more": (("bigger", "larger"), ("more", "taller")),
    "less": (("smaller", "lower"), ("below", "tiny")),
}
EVENTS = {
    "gives": (("gives",), ("passes",)),
    "gets": (("gets",), ("grabs",)),
    "finds": (("finds",), ("spots",)),
    "loses": (("loses",), ("drops",)),
}
CHANGES = {
    "up": (("up", "higher"), ("rising", "above")),
    "down": (("down", "lesser"), ("falling", "under")),
    "same": (("same", "still"), ("nothing", "kept")),
}
PEOPLE = {name: ((name,), (name,)) for name in ("ann", "bob")}
FINAL = (("therefore", "answer"), ("so", "guess"))
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CONTEXT = 256
# What the solver does not know: an error of every manner and of pretraining too, which preferences
# among its own responses cannot mend. It keeps good methods away from 100%.
BLIND = (math.inf, math.inf)
# Odds of an error in a (careful, sloppy) sentence. A fixation wins over the right answer even with
# care, a habit only without it, a slip is a weaker habit. No error is rare: an unlikely word loses
# so much probability that few of them would hold most of what a preference teaches.
FIXATION, HABIT, SLIP = (0.85, 0.97), (0.25, 0.97), (0.05, 0.5)
MIXED_UP = 4  # numbers this close are taken for each other
PATIENCE = 500


@dataclass(frozen=True)
class Problem:
    """One question. facts: the numbers the prompt was made from, in the order of the prompt."""

    id: str
    family: str
    prompt: str
    answer: str
    facts: tuple


def _opening(i: int) -> Slot:
    """The first word of sentence i."""
    return wording(f"ordinal{i}", (ORDINALS[i],), (COUNTED[i],), opens=True)


def _clamp(value: int) -> int:
    return max(0, min(TOP, value))


# --- chain -------------------------------------------------------------------------------------


def _draw_chain(rng: random.Random) -> tuple:
    """(start, (sign, operand) x 4) whose true path never meets a stop."""
    while True:
        value = rng.randint(0, TOP)
        facts, values = [value], [value]
        for _ in range(4):
            sign, operand = rng.choice("+-"), rng.randint(1, 5)
            values.append(values[-1] + (operand if sign == "+" else -operand))
            facts.append((sign, operand))
        if min(values) >= 0 and max(values) <= TOP:
            return tuple(facts)


def _prompt_chain(facts: tuple) -> str:
    steps = " ".join(f"{o} {s} {n}" for o, (s, n) in zip(ORDINALS, facts[1:], strict=False))
    return f"calc {facts[0]} {steps} ?"


def _move(value: int, sign: str, operand: int) -> int:
    return _clamp(value + (operand if sign == "+" else -operand))


def _column_habit(value: int, sign: str, operand: int) -> list:
    """Forgets to carry, or to borrow: the tens stay as they were."""
    right = _move(value, sign, operand)
    if right // 10 == value // 10:
        return []
    wrong = right - 10 if sign == "+" else right + 10
    odds = FIXATION if operand == 5 else HABIT if operand >= 3 else SLIP
    if operand == 5 and sign == "-":
        odds = BLIND
    return [(wrong, odds)] if 0 <= wrong <= TOP else []


def _slots_chain(facts: tuple) -> list[Slot]:
    slots = []
    for i, (sign, operand) in enumerate(facts[1:]):
        before, start, said_sign, said_n = f"result{i - 1}", f"start{i}", f"sign{i}", f"n{i}"

        def start_habit(s: Stated, i=i):
            # Takes a large step down as not made.
            missed = i and s[f"sign{i - 1}"] == "-" and s[f"n{i - 1}"] >= 4
            return [(s[f"start{i - 1}"], SLIP)] if missed else []

        def result_habit(s: Stated, a=start, b=said_sign, c=said_n):
            return _column_habit(s[a], s[b], s[c])

        slots += [
            _opening(i),
            wording(f"lead{i}", ("from", "take"), ("got", "like")),
            Slot(start, NUMBERS, lambda s, i=i, b=before: s[b] if i else facts[0], start_habit),
            Slot(said_sign, SIGNS, lambda s, sign=sign: sign),
            Slot(said_n, NUMBERS, lambda s, n=operand: n),
            wording(f"link{i}", ("makes", "equals"), ("gives", "becomes")),
            Slot(
                f"result{i}",
                NUMBERS,
                lambda s, a=start, b=said_sign, c=said_n: _move(s[a], s[b], s[c]),
                result_habit,
            ),
        ]
    return slots + _final(lambda s: s["result3"])


# --- scan --------------------------------------------------------------------------------------


def _draw_scan(rng: random.Random) -> tuple:
    """(goal, five different numbers)."""
    return (rng.choice(("largest", "smallest")), *rng.sample(range(TOP + 1), 5))


def _prompt_scan(facts: tuple) -> str:
    return f"{facts[0]} {' '.join(f'{o} {n}' for o, n in zip(ORDINALS, facts[1:], strict=False))} ?"


def _slots_scan(facts: tuple) -> list[Slot]:
    goal = facts[0]
    keeps = "more" if goal == "largest" else "less"
    slots = []
    for i, number in enumerate(facts[1:]):
        here, compared, before = f"n{i}", f"compared{i}", f"best{i - 1}"

        def compare(s: Stated, i=i, here=here, before=before):
            return "start" if i == 0 else ("more" if s[here] > s[before] else "less")

        def compare_habit(s: Stated, i=i, here=here, before=before, compare=compare):
            if i == 0:
                return []
            a, b = s[here], s[before]
            misleads = a // 10 != b // 10 and (a > b) != (a % 10 > b % 10)
            apart = abs(a % 10 - b % 10)
            odds = BLIND if apart >= 7 else FIXATION if apart >= 5 else HABIT
            return [("less" if compare(s) == "more" else "more", odds)] if misleads else []

        def best(s: Stated, i=i, here=here, compared=compared, before=before):
            return s[here] if i == 0 or s[compared] == keeps else s[before]

        def best_habit(s: Stated, i=i, here=here, compared=compared, before=before, best=best):
            if i == 0 or abs(s[here] - s[before]) > MIXED_UP:
                return []
            return [(s[before] if best(s) == s[here] else s[here], SLIP)]

        slots += [
            _opening(i),
            Slot(here, NUMBERS, lambda s, n=number: n),
            wording(f"lead{i}", ("is", "reads"), ("looks", "seems")),
            Slot(compared, COMPARED, compare, compare_habit),
            wording(f"link{i}", ("hence", "thus"), ("ok", "then")),
            Slot(f"best{i}", NUMBERS, best, best_habit),
        ]
    return slots + _final(lambda s: s["best4"])


# --- story -------------------------------------------------------------------------------------


def _change(who: str, event: str, n: int) -> tuple[int, int]:
    """What an event does to ann's and to bob's things."""
    mine, other = {"gives": (-n, n), "gets": (n, -n), "finds": (n, 0), "loses": (-n, 0)}[event]
    return (mine, other) if who == "ann" else (other, mine)


def _draw_story(rng: random.Random) -> tuple:
    """(ann, bob, (who, event, n) x 3, asked), nobody ever below 0 or above 19."""
    while True:
        ann, bob = rng.randint(0, TOP), rng.randint(0, TOP)
        facts, seen = [ann, bob], [ann, bob]
        for _ in range(3):
            step = rng.choice(tuple(PEOPLE)), rng.choice(tuple(EVENTS)), rng.randint(1, 4)
            change = _change(*step)
            ann, bob = ann + change[0], bob + change[1]
            seen += [ann, bob]
            facts.append(step)
        if min(seen) >= 0 and max(seen) <= TOP:
            return (*facts, rng.choice(tuple(PEOPLE)))


def _prompt_story(facts: tuple) -> str:
    steps = " ".join(f"{o} {w} {e} {n}" for o, (w, e, n) in zip(ORDINALS, facts[2:5], strict=False))
    return f"story ann {facts[0]} bob {facts[1]} {steps} ask {facts[5]} ?"


def _direction(change: int) -> str:
    return "up" if change > 0 else "down" if change < 0 else "same"


def _change_habit(change: int, is_actor: bool, event: str, n: int) -> list:
    """Adds what was lost, overlooks what was found, forgets the one who did not act."""
    if is_actor and event == "loses":
        return [("up", FIXATION if n == 4 else HABIT if n == 3 else SLIP)]
    if is_actor and event == "finds":
        return [("same", SLIP)] if n >= 3 else []
    if is_actor or not change:
        return []
    if event == "gives" and n == 4:
        return [("same", BLIND)]
    return [("same", FIXATION if n == 4 else HABIT if n == 3 else SLIP)]


def _slots_side(facts: tuple, i: int, side: int) -> list[Slot]:
    """What event i does to one person (0 ann, 1 bob): the direction, then the new total."""
    changed, total = f"change{i}{side}", f"total{i}{side}"

    def change(s: Stated) -> int:
        return _change(s[f"who{i}"], s[f"event{i}"], s[f"n{i}"])[side]

    def change_habit(s: Stated) -> list:
        is_actor = (s[f"who{i}"] == "ann") == (side == 0)
        return _change_habit(change(s), is_actor, s[f"event{i}"], s[f"n{i}"])

    def old(s: Stated) -> int:
        return s[f"total{i - 1}{side}"] if i else facts[side]

    def moved(s: Stated) -> int:
        return _clamp(old(s) + {"up": 1, "down": -1, "same": 0}[s[changed]] * s[f"n{i}"])

    return [
        Slot(changed, CHANGES, lambda s: _direction(change(s)), change_habit),
        Slot(f"name{i}{side}", PEOPLE, lambda s: tuple(PEOPLE)[side]),
        Slot(total, NUMBERS, moved),
    ]


def _slots_story(facts: tuple) -> list[Slot]:
    slots = []
    for i, (who, event, n) in enumerate(facts[2:5]):
        slots += [
            _opening(i),
            Slot(f"who{i}", PEOPLE, lambda s, who=who: who),
            Slot(f"event{i}", EVENTS, lambda s, event=event: event),
            Slot(f"n{i}", NUMBERS, lambda s, n=n: n),
            *_slots_side(facts, i, 0),
            *_slots_side(facts, i, 1),
        ]
    # Totals stand behind names: by their places alone, which of the two is asked for was learned
    # on some seeds only.
    asked = Slot("asked", PEOPLE, lambda s: facts[5])
    return slots + _final(lambda s: s["total20" if s["asked"] == "ann" else "total21"], asked)


def _final(right, *before: Slot) -> list[Slot]:
    return [wording("final", *FINAL, opens=True), *before, Slot("answer", NUMBERS, right)]


# --- all families ------------------------------------------------------------------------------

_DRAW = {"chain": _draw_chain, "scan": _draw_scan, "story": _draw_story}
_PROMPT = {"chain": _prompt_chain, "scan": _prompt_scan, "story": _prompt_story}
_SLOTS = {"chain": _slots_chain, "scan": _slots_scan, "story": _slots_story}


def _slots(problem: Problem) -> list[Slot]:
    return _SLOTS[problem.family](problem.facts)


def _digest(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest(), "big")


def _problem(family: str, facts: tuple) -> Problem:
    slots = _SLOTS[family](facts)
    stated: Stated = {}
    for slot in slots:
        stated[slot.name] = slot.right(stated)
    prompt = _PROMPT[family](facts)
    name = f"{family}-{_digest('id', prompt) % 16**12:012x}"
    return Problem(name, family, prompt, str(stated["answer"]), facts)


def problems(family: str, split: str, count: int, seed: int) -> list[Problem]:
    """`count` distinct problems of a family, all of one split, made from the seed.

    family: one of FAMILIES. split: "sft", "pairs", "dev" or "test"; a prompt belongs to exactly one
    of them, by the SHA-256 of its text, so that splits are disjoint whatever the seeds.
    Raises AlloError for an unknown family or split, a negative count, and for more problems than
    the split holds.
    """
    if family not in FAMILIES:
        raise AlloError(f"unknown family {family!r}: expected one of {', '.join(FAMILIES)}")
    if split not in SPLITS:
        raise AlloError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    if count < 0:
        raise AlloError(f"count is {count}: expected 0 or more: ask for at least 0 problems")
    rng = random.Random(derive(seed, "problems", family, split))
    found: dict[str, tuple] = {}
    vain = 0
    while len(found) < count:
        facts = _DRAW[family](rng)
        prompt = _PROMPT[family](facts)
        if prompt not in found and _digest("split", prompt) % 100 in SPLITS[split]:
            found[prompt] = facts
            vain = 0
        elif (vain := vain + 1) > PATIENCE:
            raise AlloError(
                f"{count} distinct problems of {family}/{split} asked for, only about {len(found)}"
                " can be found: ask for fewer"
            )
    return [_problem(family, facts) for facts in found.values()]


def solution(
    problem: Problem, rng: random.Random, error_scale: float = 0.0, plain: bool = False
) -> str:
    """A worked solution; `error_scale` 0 is always right, 1 the full habit.

    plain: one careful word for every meaning, instead of wording that varies with the manner.
    """
    return text.write(_slots(problem), rng, error_scale, plain)


def read_answer(response: str) -> str | None:
    """The final answer: a number that ends the response, right after the word that announces it.

    Between the two may stand the name of the person whose number it is.
    """
    words = response.split()
    if len(words) > 2 and words[-2] in PEOPLE:
        del words[-2]
    if len(words) < 2 or words[-2] not in FINAL[0] + FINAL[1]:
        return None
    return words[-1] if words[-1] in NUMBER_WORDS else None


def is_right(problem: Problem, response: str) -> bool:
    """Whether the response ends in the right answer, however it got there."""
    return read_answer(response) == problem.answer


def correct(problem: Problem, response: str) -> str | None:
    """The response with every wrong word replaced, wording and length kept; None if unreadable."""
    return text.correct(_slots(problem), response)


def wrong_tokens(problem: Problem, response: str) -> list[bool]:
    """For each word of the response: is it a decision that is wrong in itself?"""
    return text.wrong_tokens(_slots(problem), response)


def _vocabulary() -> list[str]:
    """Every word a prompt or a solution can hold, in a fixed order."""
    words = set(NUMBER_WORDS) | {"?", "+", "-", "calc", "story", "ask", "largest", "smallest"}
    samples: Sequence[tuple[str, tuple]] = (
        ("chain", (9, *[("+", 1)] * 4)),
        ("scan", ("largest", 1, 2, 3, 4, 5)),
        ("story", (9, 9, *[("ann", "gives", 1)] * 3, "ann")),
    )
    for family, facts in samples:
        for slot in _SLOTS[family](facts):
            for careful, sloppy in slot.words.values():
                words |= {*careful, *sloppy}
    return [PAD, EOS, UNKNOWN, *sorted(words)]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, split at white space; it adds no special tokens of its own."""
    vocabulary = {word: i for i, word in enumerate(_vocabulary())}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
