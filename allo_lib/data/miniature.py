"""The tasks of the `tiny` profile: generated problems, worked solutions and a verifier.

Three families. *chain*: a counter that stops at 0 and 19 is moved up and down four times.
*scan*: the largest or smallest of five numbers, keeping the best so far. *story*: two people give,
get, find and lose things. A worked solution can be right, or show a *habit*: errors that depend on
the context (a forgotten carry, a misleading last digit, the second person forgotten) and on the
manner of the response, which also shows in its wording. Everything is made from a seed; whether a
problem is for training or for testing is decided by a hash of its prompt alone.

A solution is a fixed sequence of *slots*, one word each. A slot has a meaning (a number, a sign, a
comparison, or nothing at all for mere wording) that follows from the problem and from what the
solution has stated so far, and several words for every meaning: careful ones and sloppy ones.
Judging every slot against what was *stated* before it, rather than against the one true path, is
what tells a wrong decision from its mere consequences.
"""

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from allo_lib.errors import AlloError
from allo_lib.seeds import derive

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
Stated = dict[str, Meaning]  # slot -> the meaning of its word
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

    name: str
    words: Mapping[Meaning, tuple[tuple[str, ...], tuple[str, ...]]]
    right: Callable[[Stated], Meaning]
    habit: Callable[[Stated], Sequence[Tendency]] = lambda stated: ()
    opens: bool = False

    def find(self, word: str) -> tuple[Meaning, int, int] | None:
        """Return a word's meaning, manner (0 careful, 1 sloppy) and place among its synonyms."""
        for meaning, manners in self.words.items():
            for manner, synonyms in enumerate(manners):
                if word in synonyms:
                    return meaning, manner, synonyms.index(word)
        return None


def _wording(name: str, careful: tuple[str, ...], sloppy: tuple[str, ...], opens=False) -> Slot:
    """Make a slot without a fact in it: only its wording varies."""
    return Slot(name, {"": (careful, sloppy)}, lambda stated: "", opens=opens)


def _opening(i: int) -> Slot:
    """Make the first word of sentence i."""
    return _wording(f"ordinal{i}", (ORDINALS[i],), (COUNTED[i],), opens=True)


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
    return max(0, min(TOP, value + (operand if sign == "+" else -operand)))


def _column_habit(value: int, sign: str, operand: int) -> list[Tendency]:
    """Forget to carry, or to borrow: the tens stay as they were."""
    right = _move(value, sign, operand)
    if right // 10 == value // 10:
        return []
    wrong = right - 10 if sign == "+" else right + 10
    odds = FIXATION if operand == 5 else HABIT if operand >= 3 else SLIP
    if operand == 5 and sign == "-":
        odds = BLIND
    return [(wrong, odds)] if 0 <= wrong <= TOP else []


def _sentence_chain(facts: tuple, i: int) -> list[Slot]:
    def step(s: Stated) -> tuple[int, str, int]:
        return s[f"start{i}"], s[f"sign{i}"], s[f"n{i}"]

    def start_habit(s: Stated) -> list[Tendency]:
        # Takes a large step down as not made.
        missed = i and s[f"sign{i - 1}"] == "-" and s[f"n{i - 1}"] >= 4
        return [(s[f"start{i - 1}"], SLIP)] if missed else []

    return [
        _opening(i),
        _wording(f"lead{i}", ("from", "take"), ("got", "like")),
        Slot(f"start{i}", NUMBERS, lambda s: s[f"result{i - 1}"] if i else facts[0], start_habit),
        Slot(f"sign{i}", SIGNS, lambda s: facts[i + 1][0]),
        Slot(f"n{i}", NUMBERS, lambda s: facts[i + 1][1]),
        _wording(f"link{i}", ("makes", "equals"), ("gives", "becomes")),
        Slot(f"result{i}", NUMBERS, lambda s: _move(*step(s)), lambda s: _column_habit(*step(s))),
    ]


def _slots_chain(facts: tuple) -> list[Slot]:
    sentences = [slot for i in range(4) for slot in _sentence_chain(facts, i)]
    return sentences + _final(lambda s: s["result3"])


def _draw_scan(rng: random.Random) -> tuple:
    """(goal, five different numbers)."""
    return (rng.choice(("largest", "smallest")), *rng.sample(range(TOP + 1), 5))


def _prompt_scan(facts: tuple) -> str:
    return f"{facts[0]} {' '.join(f'{o} {n}' for o, n in zip(ORDINALS, facts[1:], strict=False))} ?"


def _sentence_scan(facts: tuple, i: int) -> list[Slot]:
    here, before = f"n{i}", f"best{i - 1}"
    keeps = "more" if facts[0] == "largest" else "less"

    def compare(s: Stated) -> str:
        return "start" if i == 0 else ("more" if s[here] > s[before] else "less")

    def compare_habit(s: Stated) -> list[Tendency]:
        if i == 0:
            return []
        a, b = s[here], s[before]
        misleads = a // 10 != b // 10 and (a > b) != (a % 10 > b % 10)
        apart = abs(a % 10 - b % 10)
        odds = BLIND if apart >= 7 else FIXATION if apart >= 5 else HABIT
        return [("less" if compare(s) == "more" else "more", odds)] if misleads else []

    def best(s: Stated) -> int:
        return s[here] if i == 0 or s[f"compared{i}"] == keeps else s[before]

    def best_habit(s: Stated) -> list[Tendency]:
        if i == 0 or abs(s[here] - s[before]) > MIXED_UP:
            return []
        return [(s[before] if best(s) == s[here] else s[here], SLIP)]

    return [
        _opening(i),
        Slot(here, NUMBERS, lambda s: facts[i + 1]),
        _wording(f"lead{i}", ("is", "reads"), ("looks", "seems")),
        Slot(f"compared{i}", COMPARED, compare, compare_habit),
        _wording(f"link{i}", ("hence", "thus"), ("ok", "then")),
        Slot(f"best{i}", NUMBERS, best, best_habit),
    ]


def _slots_scan(facts: tuple) -> list[Slot]:
    sentences = [slot for i in range(5) for slot in _sentence_scan(facts, i)]
    return sentences + _final(lambda s: s["best4"])


def _change(who: str, event: str, n: int) -> tuple[int, int]:
    """Return what an event does to ann's and to bob's things."""
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


def _change_of(facts: tuple, i: int, side: int) -> list[Slot]:
    """State what event i does to one person (0 ann, 1 bob): the direction, then the new total."""

    def event(s: Stated) -> tuple[str, str, int]:
        return s[f"who{i}"], s[f"event{i}"], s[f"n{i}"]

    def direction(s: Stated) -> str:
        change = _change(*event(s))[side]
        return "up" if change > 0 else "down" if change < 0 else "same"

    def habit(s: Stated) -> list[Tendency]:
        # Adds what was lost, overlooks what was found, forgets the one who did not act.
        who, what, n = event(s)
        often = FIXATION if n == 4 else HABIT if n == 3 else SLIP
        if (who == "ann") == (side == 0):
            overlooked = [("same", SLIP)] if n >= 3 else []
            return {"loses": [("up", often)], "finds": overlooked}.get(what, [])
        if direction(s) == "same":
            return []
        return [("same", BLIND if what == "gives" and n == 4 else often)]

    def moved(s: Stated) -> int:
        old = s[f"total{i - 1}{side}"] if i else facts[side]
        return _move(old, "+", {"up": 1, "down": -1, "same": 0}[s[f"change{i}{side}"]] * s[f"n{i}"])

    return [
        Slot(f"change{i}{side}", CHANGES, direction, habit),
        Slot(f"name{i}{side}", PEOPLE, lambda s: tuple(PEOPLE)[side]),
        Slot(f"total{i}{side}", NUMBERS, moved),
    ]


def _slots_story(facts: tuple) -> list[Slot]:
    slots = []
    for i, (who, event, n) in enumerate(facts[2:5]):
        slots += [
            _opening(i),
            Slot(f"who{i}", PEOPLE, lambda s, who=who: who),
            Slot(f"event{i}", EVENTS, lambda s, event=event: event),
            Slot(f"n{i}", NUMBERS, lambda s, n=n: n),
            *_change_of(facts, i, 0),
            *_change_of(facts, i, 1),
        ]
    # Totals stand behind names: by their places alone, which of the two is asked for was learned
    # on some seeds only.
    asked = Slot("asked", PEOPLE, lambda s: facts[5])
    return slots + _final(lambda s: s["total20" if s["asked"] == "ann" else "total21"], asked)


def _final(right, *before: Slot) -> list[Slot]:
    return [_wording("final", *FINAL, opens=True), *before, Slot("answer", NUMBERS, right)]


# family -> how its facts are drawn, its prompt and its solutions written
_FAMILIES = {
    "chain": (_draw_chain, _prompt_chain, _slots_chain),
    "scan": (_draw_scan, _prompt_scan, _slots_scan),
    "story": (_draw_story, _prompt_story, _slots_story),
}
FAMILIES = tuple(_FAMILIES)


def _slots(problem: Problem) -> list[Slot]:
    return _FAMILIES[problem.family][2](problem.facts)


def _digest(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest(), "big")


def problems(family: str, split: str, count: int, seed: int) -> list[Problem]:
    """Make `count` distinct problems of a family, all of one split ("sft", "pairs", "dev", "test").

    A prompt belongs to exactly one split, by the SHA-256 of its text, so that splits are disjoint
    whatever the seeds.

    Raises:
        AlloError: unknown family or split, a negative count, or more than the split holds.
    """
    for what, name, known in (("family", family, FAMILIES), ("split", split, SPLITS)):
        if name not in known:
            raise AlloError(f"unknown {what} {name!r}: expected one of {', '.join(known)}")
    if count < 0:
        raise AlloError(f"count is {count}: expected 0 or more")
    draw, prompt_of, slots_of = _FAMILIES[family]
    rng = random.Random(derive(seed, "problems", family, split))
    drawn, misses = {}, 0
    while len(drawn) < count:
        facts = draw(rng)
        prompt = prompt_of(facts)
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
        stated: Stated = {}
        for slot in slots_of(facts):
            stated[slot.name] = slot.right(stated)
        name = f"{family}-{_digest('id', prompt) % 16**12:012x}"
        made.append(Problem(name, family, prompt, str(stated["answer"]), facts))
    return made


def solution(
    problem: Problem, rng: random.Random, error_scale: float = 0.0, plain: bool = False
) -> str:
    """Write a worked solution in a careful or a sloppy manner: in its words and in its errors.

    error_scale: multiplies the odds of every error; 0 is always right, 1 the full habit.
    plain: the first careful word for every meaning, whatever the manner.
    """
    careful_response = careful = rng.random() < CAREFUL_SHARE
    stated, out = {}, []
    for slot in _slots(problem):
        if slot.opens:
            careful = (rng.random() < FAITHFUL) == careful_response
        meaning = slot.right(stated)
        for wrong, odds in slot.habit(stated):
            if error_scale and rng.random() < error_scale * odds[0 if careful else 1]:
                meaning = wrong
                break
        stated[slot.name] = meaning
        words = slot.words[meaning][0 if (rng.random() < LEANING) == careful else 1]
        out.append(slot.words[meaning][0][0] if plain else rng.choice(words))
    return " ".join(out)


def read_answer(response: str) -> str | None:
    """Return the final answer: a number that ends the response, after the word that announces it.

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
    """Return the right solution in the response's own wording; None for one of another form."""
    words, slots = response.split(), _slots(problem)
    if len(words) != len(slots):
        return None
    stated, out = {}, []
    for slot, word in zip(slots, words, strict=True):
        found, right = slot.find(word), slot.right(stated)
        if found is None:
            return None
        meaning, manner, place = found
        synonyms = slot.words[right][manner]
        out.append(word if meaning == right else synonyms[place % len(synonyms)])
        stated[slot.name] = right
    return " ".join(out)


def wrong_tokens(problem: Problem, response: str) -> list[bool]:
    """For each word: is it a decision that does not follow from what the response stated before?

    A response that leaves the form is judged up to and including the first word out of place.
    """
    words, slots = response.split(), _slots(problem)
    flags = [False] * len(words)
    stated: Stated = {}
    for place, (slot, word) in enumerate(zip(slots, words, strict=False)):
        found = slot.find(word)
        flags[place] = found is None or found[0] != slot.right(stated)
        if found is None:
            return flags
        stated[slot.name] = found[0]
    if len(words) > len(slots):
        flags[len(slots)] = True
    return flags


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for every word of prompts and solutions; it adds no special tokens of its own."""
    words = set(NUMBER_WORDS) | {"?", "+", "-", "calc", "story", "ask", "largest", "smallest"}
    for draw, _, slots_of in _FAMILIES.values():
        for slot in slots_of(draw(random.Random(0))):
            for careful, sloppy in slot.words.values():
                words |= {*careful, *sloppy}
    vocabulary = {word: i for i, word in enumerate([PAD, EOS, UNKNOWN, *sorted(words)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=CONTEXT, padding_side="right",
        clean_up_tokenization_spaces=False, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN,
    )  # fmt: skip
