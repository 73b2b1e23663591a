"""How a worked solution of the miniature is written, read, judged and corrected.

A solution is a fixed sequence of *slots*, one word each. A slot has a meaning (a number, a sign, a
comparison, or nothing at all for mere wording) that follows from the problem and from what the
solution has stated so far, and several words for every meaning: careful ones and sloppy ones.
Judging every slot against what was *stated* before it, rather than against the one true path, is
what tells a wrong decision from its mere consequences.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Meaning = int | str
Stated = dict[str, Meaning]
Tendency = tuple[Meaning, tuple[float, float]]

# Share of careful responses; odds that a sentence keeps to its response's manner, and that a word
# keeps to its sentence's. Wording that betrays care spreads the preference over many tokens.
CAREFUL_SHARE = 0.42
FAITHFUL = 0.85
LEANING = 0.82


def no_habit(stated: Stated) -> Sequence[Tendency]:
    """The habit of a slot in which nobody errs."""
    return ()


@dataclass(frozen=True)
class Slot:
    """One word of a solution.

    words: meaning -> (careful words, sloppy words).
    right: the meaning that follows from what has been stated so far.
    habit: the wrong meanings a solver tends to, each with its (careful, sloppy) odds.
    opens: whether a sentence begins here.
    """

    name: str
    words: Mapping[Meaning, tuple[tuple[str, ...], tuple[str, ...]]]
    right: Callable[[Stated], Meaning]
    habit: Callable[[Stated], Sequence[Tendency]] = no_habit
    opens: bool = False

    def read(self, word: str) -> Meaning | None:
        """The meaning of `word` in this slot, or None where the word does not belong here."""
        for meaning, (careful, sloppy) in self.words.items():
            if word in careful or word in sloppy:
                return meaning
        return None

    def restate(self, word: str, meaning: Meaning) -> str:
        """The word for `meaning` that stands where `word` stands among its own synonyms."""
        for careful, sloppy in self.words.values():
            for side, group in enumerate((careful, sloppy)):
                if word in group:
                    group_of_meaning = self.words[meaning][side]
                    return group_of_meaning[group.index(word) % len(group_of_meaning)]
        raise KeyError(word)


def wording(
    name: str, careful: tuple[str, ...], sloppy: tuple[str, ...], opens: bool = False
) -> Slot:
    """A slot without a fact in it: only its wording varies."""
    return Slot(name, {"": (careful, sloppy)}, lambda stated: "", opens=opens)


def write(
    slots: Sequence[Slot], rng: random.Random, error_scale: float, plain: bool = False
) -> str:
    """A solution in a careful or a sloppy manner, which shows in its words and in its errors.

    error_scale: multiplies the odds of every error; 0 gives a solution without any. plain: the
    first careful word for every meaning, whatever the manner.
    """
    careful_response = careful = rng.random() < CAREFUL_SHARE
    stated: Stated = {}
    out = []
    for slot in slots:
        if slot.opens:
            careful = (rng.random() < FAITHFUL) == careful_response
        meaning = slot.right(stated)
        for wrong, odds in slot.habit(stated):
            if error_scale and rng.random() < error_scale * odds[0 if careful else 1]:
                meaning = wrong
                break
        stated[slot.name] = meaning
        leans_careful = (rng.random() < LEANING) == careful
        words = slot.words[meaning][0 if leans_careful else 1]
        out.append(slot.words[meaning][0][0] if plain else rng.choice(words))
    return " ".join(out)


def correct(slots: Sequence[Slot], response: str) -> str | None:
    """The right solution in the response's own wording; None for a response of another form."""
    words = response.split()
    if len(words) != len(slots):
        return None
    stated: Stated = {}
    out = []
    for slot, word in zip(slots, words, strict=True):
        said, right = slot.read(word), slot.right(stated)
        if said is None:
            return None
        out.append(word if said == right else slot.restate(word, right))
        stated[slot.name] = right
    return " ".join(out)


def wrong_tokens(slots: Sequence[Slot], response: str) -> list[bool]:
    """For each word: is it a decision that does not follow from what the response stated before?

    A response that leaves the form is judged up to and including the first word out of place.
    """
    words = response.split()
    flags = [False] * len(words)
    stated: Stated = {}
    for place, (slot, word) in enumerate(zip(slots, words, strict=False)):
        said = slot.read(word)
        flags[place] = said is None or said != slot.right(stated)
        if said is None:
            break
        stated[slot.name] = said
    else:
        if len(words) > len(slots):
            flags[len(slots)] = True
    return flags
