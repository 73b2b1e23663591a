"""The final answer of a response: reading it strictly, and comparing it with the gold one.

Kinds of answers: "choice" (one of a question's options), "yes_no", "number" (integers, decimals
and fractions, as in GSM8k, MAWPS and TabMWP; `numerals`) and "latex" (a formula, as in MATH;
`formulas`). A response answers when the text after its last `The answer is:`, up to its end, is one
answer of its kind and nothing else, blanks and a last full stop aside. Every function takes any
string.
"""

import re

from allo_lib.data.formulas import is_formula, same_formula
from allo_lib.data.numerals import number, plain_type, same_number
from allo_lib.errors import AlloError

KINDS = ("choice", "yes_no", "number", "latex")
STYLES = ("text", "letter")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MARKER = "The answer is"


def final_text(response: str) -> str | None:
    """What follows the last `The answer is:`, without blanks and `**` around it; None without."""
    _, marker, given = response.rpartition(MARKER)
    if not marker or not given.startswith(":"):
        return None
    return plain_type(given[1:].strip())


def read(kind: str, response: str, choices=None, style: str = "text") -> str | None:
    """The final answer of a response, or None if it has none of this kind.

    Args:
        kind: one of KINDS.
        choices: option texts in letter order, of a choice.
        style: of a choice: "text" takes an option's text, "letter" `(B) text` or its letter.

    Returns:
        a letter (choice), "yes" or "no", or the text as it was given (number, latex).

    Raises:
        AlloError: unknown kind or style, or a choice without options.
    """
    if kind not in KINDS:
        raise AlloError(f"kind of answer {kind!r}: expected one of {', '.join(KINDS)}")
    given = final_text(response)
    if kind == "choice":
        return _letter(given, choices, style)
    if given is None:
        return None
    if kind == "yes_no":
        return plain(given) if plain(given) in ("yes", "no") else None
    if kind == "number":
        return given if number(given) is not None else None
    return given if is_formula(given) else None


def option(choices, index: int, style: str = "text") -> str:
    """How an option is written in a response."""
    if style not in STYLES:
        raise AlloError(f"style {style!r}: expected 'text' or 'letter'")
    return choices[index] if style == "text" else f"({LETTERS[index]}) {choices[index]}"


def _letter(given, choices, style) -> str | None:
    if not choices:
        raise AlloError("a choice without options; expected the texts of multiple choice")
    names = [option(choices, index, style) for index in range(len(choices))]
    if given is None:
        return None
    # A few questions of QASC have two options that differ in a full stop alone.
    for simplified in (_spaced, plain):
        for letter, name in zip(LETTERS, names, strict=False):
            if simplified(given) == simplified(name):
                return letter
    alone = plain(given).upper()
    return alone if style == "letter" and alone in set(LETTERS[: len(names)]) else None


def plain(text: str) -> str:
    """The text without case, a last full stop, and blanks more than one between words."""
    return _spaced(text).removesuffix(".").rstrip()


def _spaced(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().casefold()


def is_same(kind: str, given: str, gold: str) -> bool:
    """Whether two answers, as `read` returns them, are the same.

    Numbers are compared exactly unless the gold one is rounded (`numerals.same_number`); formulas
    as text, then as numbers, then by math-verify.

    Raises:
        AlloError: unknown kind; formulas, where math-verify is not installed.
    """
    if kind not in KINDS:
        raise AlloError(f"kind of answer {kind!r}: expected one of {', '.join(KINDS)}")
    if kind in ("choice", "yes_no"):
        return plain(given) == plain(gold)
    if kind == "number":
        return bool(same_number(given, gold))
    return same_formula(given, gold)
