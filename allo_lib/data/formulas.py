r"""Formulas in LaTeX, the answers of MATH: whether a text is one, and whether two are equal.

Equality is decided by text, then as numbers, then by math-verify (which needs sympy). Only what
cannot keep a computer algebra system busy for ever is shown to it.
"""

import functools
import logging
import re
import threading

from allo_lib.data.numerals import same_number, unwrapped
from allo_lib.errors import AlloError

LONGEST = 300  # characters of an answer; the longest of MATH has 159
PATIENCE = 10  # seconds for one step of comparing two formulas
# Simplifying a product of these can take for ever; where no clock stops it, it is not tried.
_FUNCTIONS = re.compile(r"!|\\(?:arc)?(?:sin|cos|tan|cot|sec|csc|log|ln|exp)(?![a-z])")
_BASED = re.compile(r"([0-9A-F]+)_\{?([0-9]+)\}?")  # 43_5 is 43 in base 5


def is_formula(text: str) -> bool:
    """One line that is no prose: no sentence ends in it, and few words are outside of \\text."""
    if not unwrapped(text).strip("$") or len(text) > LONGEST or "\n" in text:
        return False
    if re.search(r"[.?!]\s+[A-Z]", text):
        return False
    bare = re.sub(r"\\[a-z]+\s*\{[A-Za-z ,.]*\}|\\[A-Za-z]+", " ", text)
    return len(re.findall(r"[A-Za-z]{2,}", bare)) <= 3


@functools.lru_cache(maxsize=4096)
def same_formula(given: str, gold: str) -> bool:
    """Whether two formulas are equal, the gold one second; units and degree signs do not count.

    Raises:
        AlloError: math-verify is needed and not installed.
    """
    ours, theirs = unwrapped(given), unwrapped(gold)
    if not ours or not theirs:
        return False
    if _normal(ours) == _normal(theirs):
        return True
    based = [_BASED.fullmatch(_normal(text)) for text in (ours, theirs)]
    if all(based):
        # math-verify takes the digits alone, whatever their base.
        return based[0].groups() == based[1].groups()
    as_numbers = same_number(ours, theirs)
    if as_numbers is not None:
        return as_numbers
    if not (_is_tame(ours) and _is_tame(theirs)):
        return False
    return (_can_be_timed() or not _FUNCTIONS.search(ours)) and _verified(ours, theirs)


def _can_be_timed() -> bool:
    """Steps are timed by signals, which only the main thread gets."""
    return threading.current_thread() is threading.main_thread()


def _normal(text: str) -> str:
    """Equal for formulas that differ in blanks, size commands and text commands alone."""
    words = re.fullmatch(r"\\(?:text|mbox|textbf|mathrm)\s*\{([^{}]*)\}|[A-Za-z ]{3,}", text)
    text = text.casefold() if words else text
    text = re.sub(r"\\(?:text|mbox|textbf|mathrm)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"\\(?:left|right)(?![a-z])", "", text))
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", "", text)
    return re.sub(r"\\[!,;: ]|\s|~|\\\$", "", text)


def _is_tame(text: str) -> bool:
    """Whether a computer algebra system is safe with a formula: no giant numbers, no deep nesting.

    Sympy multiplies out what it reads, so that `9^{9^9}` or `99999!` would never end.
    """
    if len(text) > LONGEST or re.search(r"\\(?:sum|prod|int|lim|iint|oint)(?![a-z])", text):
        return False
    if re.search(r"binom|choose", text) and re.search(r"[0-9]{5}", text):
        return False
    depth = deepest = 0
    for letter in text:
        depth += (letter in "{([") - (letter in "})]")
        deepest = max(deepest, depth)
    # Of factorials only those of small numbers; `\!` is a space.
    factorials = re.findall(r"(.{0,3})(?<!\\)!", text)
    if any(not re.search(r"(?:^|[^0-9])[0-9]{1,2}$", before) for before in factorials):
        return False
    if deepest > 8 or re.search(r"[0-9]{31}|!\s*!", text):
        return False
    exponents = [_exponent(text[place + 1 :]) for place in _places(text, "^")]
    exponents += [_exponent(text[place + 2 :]) for place in _places(text, "**")]
    if any(re.search(r"\^|\*\*|!|\\binom", one) for one in exponents):
        return False
    size = 1
    for one in exponents:
        for digits in re.findall(r"[0-9]+", one):
            size *= max(1, int(digits))
    return size <= 20_000


def _places(text: str, sign: str) -> list[int]:
    return [found.start() for found in re.finditer(re.escape(sign), text)]


def _exponent(rest: str) -> str:
    """What stands raised: a group in braces or brackets, or all up to the next operator."""
    rest = rest.lstrip(" *")
    if rest[:1] not in ("{", "("):
        # Without braces LaTeX raises one sign, but plain notation a whole number.
        return re.match(r"[-+]?[A-Za-z0-9.\\]*\^?", rest)[0]
    depth = 0
    for place, letter in enumerate(rest):
        depth += (letter in "{(") - (letter in "})")
        if depth == 0:
            return rest[: place + 1]
    return rest


def _verified(given: str, gold: str) -> bool:
    """Whether math-verify finds two formulas equal."""
    parse, verify, latex = _math_verify()
    patience = PATIENCE if _can_be_timed() else None
    try:
        ours, theirs = (
            parse(f"${text}$", extraction_config=[latex], parsing_timeout=patience)
            for text in (given, gold)
        )
        if not verify(theirs, ours, timeout_seconds=patience):
            return False
        return not _differ_in_size(ours[0], theirs[0])
    except Exception:
        # What a computer algebra system cannot read is not equal to anything.
        return False


def _differ_in_size(given, gold) -> bool:
    """Whether two expressions differ by more than a rounding error of their own size.

    math-verify takes any difference of less than about 1e-15 for none, however small both are.
    """
    from sympy import Expr, Float, Rational  # slow to load; there where math-verify is

    if (
        not isinstance(given, Expr)
        or not isinstance(gold, Expr)
        or given.has(Float)
        or gold.has(Float)
    ):
        return False  # a rounded number is compared by its decimals
    names = sorted(given.free_symbols | gold.free_symbols, key=str)
    values = {name: Rational(7 + 4 * i, 5) for i, name in enumerate(names)}
    apart, size = (abs(one.doit().subs(values).evalf()) for one in (given - gold, gold))
    return size.is_number and bool(size < 1e-9 and apart > 1e-9 * size)


@functools.cache
def _math_verify():
    """math-verify's parse and verify, and its settings for one formula in LaTeX."""
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise AlloError(
            "comparing formulas needs math-verify, which is not installed; pip install math-verify"
        ) from error
    # It warns of every formula that it cannot read and of every thread without a timeout.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
    return parse, verify, LatexExtractionConfig()
