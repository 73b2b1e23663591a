"""The tasks of the `tiny` profile: generated problems, worked solutions and a verifier.

Three families. *chain*: a counter that stops at 0 and 19 is moved up and down four times.
*scan*: the largest or smallest of five numbers, keeping the best so far. *story*: two people give,
get, find and lose things. A worked solution can be right, or show a *habit*: errors that depend on
the context (a forgotten carry, a misleading last digit, the second person forgotten) and on the
manner of the response, which also shows in its wording. Everything is made from a seed; whether a
problem is for training or for testing is decided by a hash of its prompt alone.

A solution is a fixed sequence of *slots*, one word each. A slot has a meaning (a number, a sign, a
comparison, or nothing at all for mere wording) that follows from the problem and from what the
solution has stated so far, and several words for every meaning: careful ones and sloppy ones. So
each family's solution is a generator: it yields a slot and is sent the meaning that was stated
there. Judging every slot against what was *stated* before it, rather than against the one true
path, is what tells a wrong decision from its mere consequences.
"""

import contextlib
import hashlib
import math
import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from allo_lib.errors import AlloError
from allo_lib.seeds import derive

SPLITS = {"sft": range(0, 64), "pairs": range(64, 80), "dev": range(80, 86), "test": range(86, 100)}
TOP = 19
NUMBERS = {n: ((str(n),), (str(n),)) for n in range(TOP + 1)}
ORDINALS = ("first", "second", "third", "fourth", "fifth")
COUNTED = ("one", "two", "three", "four", "five")  # how a sloppy sentence begins
SIGNS = {"+": (("plus", "adding"), ("and", "up")), "-": (("minus", "less"), ("off", "down"))}
COMPARED = {
    "start": (("alone", "new"), ("there", "just")),
    "more": (("bigger", "larger"), ("more", "taller")),
    "less": (("smaller", "lower"), ("below", "tiny")),
}
SLOPPY_EVENTS = {"gives": "passes", "gets": "grabs", "finds": "spots", "loses": "drops"}
EVENTS = {careful: ((careful,), (sloppy,)) for careful, sloppy in SLOPPY_EVENTS.items()}
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
# Share of careful responses; odds that a sentence keeps to its response's manner, and that a word
# keeps to its sentence's. Wording that betrays care spreads the preference over many tokens.
CAREFUL_SHARE, FAITHFUL, LEANING = 0.42, 0.85, 0.82
MIXED_UP = 4  # numbers this close are taken for each other
PATIENCE = 500  # draws in vain after which a split counts as used up

Meaning = int | str
Words = Mapping[Meaning, tuple[tuple[str, ...], tuple[str, ...]]]  # careful and sloppy ones
Tendency = tuple[Meaning, tuple[float, float]]  # a wrong meaning, its (careful, sloppy) odds


@dataclass(frozen=True)
class Problem:
    """One question. facts: the numbers the prompt was made from, in the order of the prompt."""

    id: str
    family: str
    prompt: str
    answer: str
    facts: tuple


@dataclass(frozen=True)
class Slot:
    """One word of a solution.

    words: meaning -> (careful words, sloppy words).
    right: the meaning that follows from what has been stated so far.
    habit: the wrong meanings that a solver tends to.
    opens: whether a sentence begins here.
    """

    words: Words
    right: Meaning = ""
    habit: tuple[Tendency, ...] = ()
    opens: bool = False

    def find(self, word: str) -> tuple[Meaning, int, int] | None:
        """Return a word's meaning, manner (0 careful, 1 sloppy) and place among its synonyms."""
        for meaning, manners in self.words.items():
            for manner, synonyms in enumerate(manners):
                if word in synonyms:
                    return meaning, manner, synonyms.index(word)
        return None


Solution = Generator[Slot, Meaning, None]


def _wording(careful: tuple[str, ...], sloppy: tuple[str, ...], opens: bool = False) -> Slot:
    """Make a slot without a fact in it: only its wording varies."""
    return Slot({"": (careful, sloppy)}, opens=opens)


def _opening(i: int) -> Slot:
    """Make the first word of sentence i."""
    return _wording((ORDINALS[i],), (COUNTED[i],), opens=True)


def _move(value: int, sign: str, operand: int) -> int:
    return max(0, min(TOP, value + (operand if sign == "+" else -operand)))


def _draw_chain(rng: random.Random) -> tuple[str, tuple]:
    """The prompt; (start, (sign, operand) x 4) whose true path never meets a stop."""
    while True:
        value = rng.randint(0, TOP)
        facts, values = [value], [value]
        for _ in range(4):
            sign, operand = rng.choice("+-"), rng.randint(1, 5)
            values.append(values[-1] + (operand if sign == "+" else -operand))
            facts.append((sign, operand))
        if min(values) >= 0 and max(values) <= TOP:
            steps = " ".join(f"{o} {s} {n}" for o, (s, n) in zip(ORDINALS, facts[1:], strict=False))
            return f"calc {facts[0]} {steps} ?", tuple(facts)


def _solve_chain(facts: tuple) -> Solution:
    value, habit = facts[0], ()
    for i, step in enumerate(facts[1:]):
        yield _opening(i)
        yield _wording(("from", "take"), ("got", "like"))
        start = yield Slot(NUMBERS, value, habit)
        sign = yield Slot(SIGNS, step[0])
        n = yield Slot(NUMBERS, step[1])
        yield _wording(("makes", "equals"), ("gives", "becomes"))
        value = yield Slot(NUMBERS, _move(start, sign, n), _column_habit(start, sign, n))
        # The next sentence takes a large step down as not made.
        habit = ((start, SLIP),) if sign == "-" and n >= 4 else ()
    yield _wording(*FINAL, opens=True)
    yield Slot(NUMBERS, value)


def _column_habit(value: int, sign: str, operand: int) -> tuple[Tendency, ...]:
    """Forget to carry, or to borrow: the tens stay as they were."""
    right = _move(value, sign, operand)
    wrong = right - 10 if sign == "+" else right + 10
    if right // 10 == value // 10 or not 0 <= wrong <= TOP:
        return ()
    if operand == 5:
        return ((wrong, FIXATION if sign == "+" else BLIND),)
    return ((wrong, HABIT if operand >= 3 else SLIP),)


def _draw_scan(rng: random.Random) -> tuple[str, tuple]:
    """The prompt; (goal, five different numbers)."""
    goal, numbers = rng.choice(("largest", "smallest")), rng.sample(range(TOP + 1), 5)
    steps = " ".join(f"{o} {n}" for o, n in zip(ORDINALS, numbers, strict=True))
    return f"{goal} {steps} ?", (goal, *numbers)


def _solve_scan(facts: tuple) -> Solution:
    keeps, best = "more" if facts[0] == "largest" else "less", None
    for i, number in enumerate(facts[1:]):
        yield _opening(i)
        n = yield Slot(NUMBERS, number)
        yield _wording(("is", "reads"), ("looks", "seems"))
        compared = yield _comparison(n, best)
        yield _wording(("hence", "thus"), ("ok", "then"))
        right, other = (n, best) if best is None or compared == keeps else (best, n)
        mixed_up = best is not None and abs(n - best) <= MIXED_UP
        best = yield Slot(NUMBERS, right, ((other, SLIP),) if mixed_up else ())
    yield _wording(*FINAL, opens=True)
    yield Slot(NUMBERS, best)


def _comparison(n: int, best: int | None) -> Slot:
    """Compare a number with the best before it; the last digits may mislead."""
    if best is None:
        return Slot(COMPARED, "start")
    right, wrong = ("more", "less") if n > best else ("less", "more")
    if n // 10 == best // 10 or (n > best) == (n % 10 > best % 10):
        return Slot(COMPARED, right)
    apart = abs(n % 10 - best % 10)
    odds = BLIND if apart >= 7 else FIXATION if apart >= 5 else HABIT
    return Slot(COMPARED, right, ((wrong, odds),))


def _change(who: str, event: str, n: int) -> tuple[int, int]:
    """Return what an event does to ann's and to bob's things."""
    mine, other = {"gives": (-n, n), "gets": (n, -n), "finds": (n, 0), "loses": (-n, 0)}[event]
    return (mine, other) if who == "ann" else (other, mine)


def _draw_story(rng: random.Random) -> tuple[str, tuple]:
    """The prompt; (ann, bob, (who, event, n) x 3, asked), nobody ever below 0 or above 19."""
    while True:
        ann, bob = rng.randint(0, TOP), rng.randint(0, TOP)
        facts, seen, prompt = [ann, bob], [ann, bob], f"story ann {ann} bob {bob}"
        for ordinal in ORDINALS[:3]:
            step = rng.choice(tuple(PEOPLE)), rng.choice(tuple(EVENTS)), rng.randint(1, 4)
            change = _change(*step)
            ann, bob = ann + change[0], bob + change[1]
            seen += [ann, bob]
            facts.append(step)
            prompt += " ".join(("", ordinal, *map(str, step)))
        if min(seen) >= 0 and max(seen) <= TOP:
            asked = rng.choice(tuple(PEOPLE))
            return f"{prompt} ask {asked} ?", (*facts, asked)


def _solve_story(facts: tuple) -> Solution:
    totals = dict(zip(PEOPLE, facts, strict=False))
    for i, event in enumerate(facts[2:5]):
        yield _opening(i)
        who = yield Slot(PEOPLE, event[0])
        what = yield Slot(EVENTS, event[1])
        n = yield Slot(NUMBERS, event[2])
        for name, change in zip(PEOPLE, _change(who, what, n), strict=True):
            # First the direction, then the new total.
            right = "up" if change > 0 else "down" if change < 0 else "same"
            moved = yield Slot(CHANGES, right, _change_habit(right, who == name, what, n))
            yield Slot(PEOPLE, name)
            step = {"up": n, "down": -n, "same": 0}[moved]
            totals[name] = yield Slot(NUMBERS, _move(totals[name], "+", step))
    yield _wording(*FINAL, opens=True)
    # Totals stand behind names: by their places alone, which of the two is asked for was learned
    # on some seeds only.
    asked = yield Slot(PEOPLE, facts[5])
    yield Slot(NUMBERS, totals[asked])


def _change_habit(right: str, acts: bool, what: str, n: int) -> tuple[Tendency, ...]:
    """Add what was lost, overlook what was found, forget the one who did not act."""
    often = FIXATION if n == 4 else HABIT if n == 3 else SLIP
    if acts and what == "loses":
        return (("up", often),)
    if acts:
        return (("same", SLIP),) if what == "finds" and n >= 3 else ()
    if right == "same":
        return ()
    return (("same", BLIND if what == "gives" and n == 4 else often),)


_DRAW = {"chain": _draw_chain, "scan": _draw_scan, "story": _draw_story}
_SOLVE = {"chain": _solve_chain, "scan": _solve_scan, "story": _solve_story}
FAMILIES = tuple(_DRAW)


def _solve(problem: Problem) -> Solution:
    return _SOLVE[problem.family](problem.facts)


def _write(solution: Solution, say: Callable[[Slot], tuple[Meaning, str | None]]) -> list:
    """Write a whole solution; `say` gives the meaning stated in a slot, and its word."""
    words, meaning = [], None
    with contextlib.suppress(StopIteration):
        while True:
            meaning, word = say(solution.send(meaning))
            words.append(word)
    return words


def _right(slot: Slot) -> tuple[Meaning, str]:
    return slot.right, str(slot.right)


def _digest(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest(), "big")


def problems(family: str, split: str, count: int, seed: int) -> list[Problem]:
    """Make `count` distinct problems of a family, all of one split ("sft", "pairs", "dev", "test").

    A prompt belongs to exactly one split, by the SHA-256 of its text, so that splits are disjoint
    whatever the seeds.

    Raises:
        AlloError: no such family, or more than the split holds.
    """
    if family not in FAMILIES:
        raise AlloError(f"unknown family {family!r}: expected one of {', '.join(FAMILIES)}")
    rng = random.Random(derive(seed, "problems", family, split))
    drawn, misses = {}, 0
    while len(drawn) < count:
        prompt, facts = _DRAW[family](rng)
        if prompt not in drawn and _digest("split", prompt) % 100 in SPLITS[split]:
            drawn[prompt] = facts
            misses = 0
        elif (misses := misses + 1) > PATIENCE:
            raise AlloError(
                f"{count} distinct problems of {family}/{split} requested, only about {len(drawn)} "
                "exist: ask for fewer"
            )
    made = []
    for prompt, facts in drawn.items():
        *_, answer = _write(_SOLVE[family](facts), _right)
        name = f"{family}-{_digest('id', prompt) % 16**12:012x}"
        made.append(Problem(name, family, prompt, answer, facts))
    return made


def solution(
    problem: Problem, rng: random.Random, error_scale: float = 0.0, plain: bool = False
) -> str:
    """Write a worked solution in a careful or a sloppy manner: in its words and in its errors.

    error_scale: multiplies the odds of every error; 0 is always right, 1 the full habit.
    plain: the first careful word for every meaning, whatever the manner.
    """
    careful_response = careful = rng.random() < CAREFUL_SHARE

    def say(slot: Slot) -> tuple[Meaning, str]:
        nonlocal careful
        if slot.opens:
            careful = (rng.random() < FAITHFUL) == careful_response
        meaning = slot.right
        for wrong, odds in slot.habit:
            if error_scale and rng.random() < error_scale * odds[0 if careful else 1]:
                meaning = wrong
                break
        words = slot.words[meaning][0 if (rng.random() < LEANING) == careful else 1]
        return meaning, slot.words[meaning][0][0] if plain else rng.choice(words)

    return " ".join(_write(_solve(problem), say))


def read_answer(response: str) -> str | None:
    """Return the final answer: a number that ends the response, after the word that announces it.

    Between the two may stand the name of the person whose number it is.
    """
    words = response.split()
    if len(words) > 2 and words[-2] in PEOPLE:
        del words[-2]
    if len(words) < 2 or words[-2] not in FINAL[0] + FINAL[1]:
        return None
    return words[-1] if words[-1] in map(str, NUMBERS) else None


def correct(problem: Problem, response: str) -> str | None:
    """Return the right solution in the response's own wording; None for one of another form."""
    words = response.split()
    unread = iter(words)

    def say(slot: Slot) -> tuple[Meaning, str | None]:
        word = next(unread, "")
        found = slot.find(word)
        if found is None:
            return slot.right, None
        meaning, manner, place = found
        synonyms = slot.words[slot.right][manner]
        return slot.right, word if meaning == slot.right else synonyms[place % len(synonyms)]

    corrected = _write(_solve(problem), say)
    return None if None in corrected or len(corrected) != len(words) else " ".join(corrected)


def wrong_tokens(problem: Problem, response: str) -> list[bool]:
    """For each word: is it a decision that does not follow from what the response stated before?

    A response that leaves the form is judged up to and including the first word out of place.
    """
    words, slots, meaning = response.split(), _solve(problem), None
    flags = [False] * len(words)
    for place, word in enumerate(words):
        try:
            slot = slots.send(meaning)
        except StopIteration:  # one word more than a solution has
            flags[place] = True
            break
        found = slot.find(word)
        flags[place] = found is None or found[0] != slot.right
        if found is None:
            break
        meaning = found[0]
    return flags


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for every word of prompts and solutions; it adds no special tokens of its own."""
    words = {"?", "+", "-", "calc", "story", "ask", "largest", "smallest", *map(str, NUMBERS)}

    def say(slot: Slot) -> tuple[Meaning, str]:
        words.update(word for manners in slot.words.values() for some in manners for word in some)
        return _right(slot)

    for family in FAMILIES:
        _, facts = _DRAW[family](random.Random(0))
        _write(_SOLVE[family](facts), say)
    vocabulary = {word: i for i, word in enumerate([PAD, EOS, UNKNOWN, *sorted(words)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=CONTEXT, padding_side="right",
        clean_up_tokenization_spaces=False, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN,
    )  # fmt: skip
