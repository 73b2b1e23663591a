r"""Read the final answer of a response strictly, and compare it with the gold one.

Kinds of answers: "choice" (one of a question's options), "yes_no", "number" (integers, decimals and
fractions, as in GSM8k, MAWPS and TabMWP) and "latex" (a formula, as in MATH). A response answers
when the text after its last `The answer is:`, up to its end, is one answer of its kind and nothing
else, blanks and a last full stop aside. Every function takes any string.

Formulas are compared as text, then as numbers, then by math-verify. It alone would not do: it takes
all small numbers for the same, no notice of the base of 43_5, and for ever for 9^{9^9}.
"""

import functools
import itertools
import logging
import math
import re
import threading
from fractions import Fraction

KINDS = ("choice", "yes_no", "number", "latex")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MARKER = "The answer is"
LONGEST = 300  # characters of a formula; the longest of MATH has 159
PATIENCE = 10  # seconds for one step of comparing two formulas


def read(kind: str, response: str, choices: list[str] | None = None) -> str | None:
    """Return the final answer of a response, or None if it has none of this kind.

    Args:
        kind: one of KINDS.
        response: any text.
        choices: the options of a choice, in the order of their letters.

    Returns:
        a letter (choice), "yes" or "no", or the text as it stands (number, latex).
    """
    _, marker, rest = response.rpartition(MARKER)
    if not marker or not rest.startswith(":"):
        return None
    text = _without_bold(rest[1:].strip())
    if kind == "choice":
        # A few questions of QASC have two options that differ in a full stop alone.
        for simplified in (_spaced, plain):
            for letter, option in zip(LETTERS, choices or (), strict=False):
                if simplified(text) == simplified(option):
                    return letter
        return None
    if kind == "yes_no":
        return plain(text) if plain(text) in ("yes", "no") else None
    is_one = number(text) is not None if kind == "number" else _is_formula(text)
    return text if is_one else None


def is_same(kind: str, answer: str, gold: str, question: str = "") -> bool:
    """Whether two answers, as `read` returns them, are the same.

    A gold number of three or more decimals is taken for a rounded one, as MAWPS has them
    (0.166667): what differs by less than one unit of its last digit, or by just one where it has
    four or more, is the same. All other numbers, also those of formulas and the eighths, sixteenths
    and so on that end by themselves (0.125), must be equal. Units and degree signs of formulas do
    not count. For a number a formula gives its value and no sum, power or equation that comes to
    it, and no formula repeats one of the question's, unless the gold one does.
    """
    if kind in ("choice", "yes_no"):
        return plain(answer) == plain(gold)
    if kind == "number":
        return bool(_same_number(answer, gold, rounded=True))
    asked = [_normal(_unwrapped(text)) for text in re.findall(r"\$([^$]+)\$", question)]
    if _normal(_unwrapped(answer)) in asked and _normal(_unwrapped(gold)) not in asked:
        return False
    return _same_formula(answer, gold)


def plain(text: str) -> str:
    """Return the text without case, a last full stop, and blanks beyond one between words."""
    return _spaced(text).removesuffix(".").rstrip()


def _spaced(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().casefold()


def _unwrapped(text: str) -> str:
    r"""Strip a last full stop and `**...**`, `$...$`, `\(...\)`, `\[...\]` or `\boxed{...}`."""
    text = _without_bold(text.strip().removesuffix(".").rstrip())
    for start, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if len(text) > len(start + end) and text.startswith(start) and text.endswith(end):
            inner = text[len(start) : -len(end)]
            # "\$3 or 5$" or "$x$ and $y$" is not one formula between two signs.
            if start not in inner and not inner.endswith("\\"):
                text = inner.strip()
                break
    if text.startswith(r"\boxed{") and group(text[6:]) == text[6:]:
        text = text[7:-1].strip()
    return text.removesuffix(".").rstrip()


def _without_bold(text: str) -> str:
    """Strip Markdown's `**` around all, or what is left of it where more stood inside."""
    bare = text.removeprefix("**").removesuffix("**")
    return text if bare == text or "**" in bare else bare.strip().removesuffix(".").rstrip()


def group(text: str) -> str | None:
    """Return the `{...}` or `(...)` that a text begins with; None if it does not, or never ends."""
    closing = {"{": "}", "(": ")"}.get(text[:1])
    depth = 0
    for place, letter in enumerate(text if closing else ""):
        depth += (letter == text[0]) - (letter == closing)
        if depth == 0:
            return text[: place + 1]
    return None


# --- numbers -------------------------------------------------------------------------------------

# Words that change a number, or join it to something, and so are no unit behind it.
_NOT_UNITS = {
    "a", "and", "are", "but", "divided", "doubled", "dozen", "half", "halve", "halved", "hundred",
    "hundredth", "if", "is", "less", "million", "billion", "bn", "minus", "more", "of", "or",
    "over", "plus", "pi", "point", "quarter", "squared", "subtract", "tenth", "than", "third",
    "thousand", "thousandth", "times", "to", "trillion", "tripled", "was", "without",
}  # fmt: skip
_OFTEN_UNITS = {"points", "quarters"}  # of which a single one changes the number
_SHORT = {*"ghlmsCFJLNVW"}  # units of one letter; another one is a variable, or a factor
# What may be squared or cubed behind a number; of other letters a power is a formula.
_MEASURES = "mm|cm|dm|m|km|in|ft|yd|mi|units?|inches|feet|meters|centimeters|miles|yards"
_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_DIGITS = rf"(?:{_PLAIN})(?:[eE][-+]?[0-9]{{1,2}}(?![0-9]))?"
_NUMBER = re.compile(
    r"(?:[A-Za-z]\s*=\s*)?(?P<sign>[-+]?)\s*[$€£¥]?\s*(?P<inner>-?)"
    r"(?:(?P<whole>[0-9]+) +(?=[0-9]+/))?"
    rf"(?P<top>{_DIGITS})(?:\s*/\s*(?P<bottom>{_DIGITS}))?"
    rf"(?:\s*[%°¢€£¥]| *(?:{_MEASURES}) ?\^ ?(?:[23]|\{{[23]\}})"
    r"|(?P<unit>(?: +[A-Za-z][A-Za-z./²³-]*){1,3}))?"
)
_TEXT = r"\\(?:text|mbox|textbf|mathrm)\s*\{([^{}]*)\}"
_DEGREES = r"\^\s*(?:\\circ|\{\s*\\circ\s*\})"
# LaTeX's and typographers' ways of writing a number, and the plain ones.
_PLAINER = (
    (r"\\\$", "$"), (r"\\%", "%"), (r"\\!", ""), ("\u2212", "-"),
    (_TEXT, r" \1"), (_DEGREES, "°"),
    (r"\\[dt]?frac\s*\{([0-9]+)\}\s*\{([0-9]+)\}", r" \1/\2"),
    (r"\\[dt]?frac\s*([0-9])([0-9])", r" \1/\2"), (r" +", " "),
)  # fmt: skip


def number(text: str) -> Fraction | None:
    r"""Return the number that a text is, exactly; None if it is anything else.

    Takes `1,234`, `-3.50`, `1e3`, `3/10`, `1 1/2`, `\frac{3}{10}`, a sign of money or `x =` before
    it, and behind it a percent sign (`50%` is 50, as the data sets ask for per cent), a unit of at
    most three words, or a measure squared or cubed (`m^2`).
    """
    text = _unwrapped(text)
    if len(text) > 80:
        return None
    for pattern, replacement in _PLAINER:
        text = re.sub(pattern, replacement, text)
    match = _NUMBER.fullmatch(text.strip().removeprefix("+ "))
    if not match or (match["sign"] and match["inner"]):
        return None
    words = {word.strip(".") for word in (match["unit"] or "").split()}
    if any(len(word) == 1 and word not in _SHORT for word in words):
        return None
    words = {word.lower() for word in words} - _OFTEN_UNITS
    if any(word in _NOT_UNITS or word.removesuffix("s") in _NOT_UNITS for word in words):
        return None
    if match["unit"] and (match["bottom"] or match["top"]).endswith(
        "."
    ):  # a sentence ends, another begins
        return None
    value = Fraction(match["top"].replace(",", ""))
    if match["bottom"]:
        bottom = Fraction(match["bottom"].replace(",", ""))
        if not bottom:
            return None
        value = value / bottom + int(match["whole"] or 0)
    return -value if "-" in (match["sign"], match["inner"]) else value


def _same_number(answer: str, gold: str, rounded: bool = False) -> bool | None:
    """Compare two numbers as `is_same` says; None if one of them is no number.

    rounded: a gold one may be, by its decimals.
    """
    ours, theirs = number(answer), number(gold)
    if ours is None or theirs is None:
        return None
    names = [re.match(r"([A-Za-z])\s*=", _unwrapped(text)) for text in (answer, gold)]
    if all(names) and names[0][1] != names[1][1]:
        return False
    decimals = len(re.split(r"[^0-9]", gold.partition(".")[2])[0]) if "/" not in gold else 0
    apart, unit = abs(ours - theirs), Fraction(1, 10**decimals)
    if not rounded or (theirs * 2**decimals).denominator == 1:
        return apart == 0
    return apart == 0 or (decimals >= 3 and apart < unit) or (decimals >= 4 and apart == unit)


# --- formulas ------------------------------------------------------------------------------------

_BASED = re.compile(r"([0-9A-F]+)_\{?([0-9]+)\}?")  # 43_5 is 43 in base 5
_ENDLESS = re.compile(r"\\(?:sum|prod|int|lim|iint|oint)(?![a-z])|[0-9]{31}|!\s*!")


def _is_formula(text: str) -> bool:
    r"""One line that is no prose: no sentence ends in it, and few words are outside of \text."""
    if not _unwrapped(text).strip("$") or len(text) > LONGEST or "\n" in text:
        return False
    bare = re.sub(r"\\[a-z]+\s*\{[A-Za-z ,.]*\}|\\[A-Za-z]+", " ", text)
    return not re.search(r"[.?!]\s+[A-Z]", text) and len(re.findall(r"[A-Za-z]{2,}", bare)) <= 3


# What an answer may be called: x, \theta, a_1, f(2), \angle ABC; in `_normal` form.
_NAMED = re.compile(r"(?:^|(?<=,))(?:\\[a-z]+)?[A-Za-z]*'?(?:_(?:\w|\{[^{}]*\}))?(?:\([^=()]*\))?=")
# Of a formula in the same form, without what is left out of it, that is more than one number.
_NO_LETTERS = rf"\\[dt]?frac|\\%|{_TEXT}"
_WORKED_OUT = re.compile(r"[A-Za-z\\*^!]|[0-9.})][-+(]")


@functools.lru_cache(maxsize=4096)
def _same_formula(answer: str, gold: str) -> bool:
    ours, theirs = _unwrapped(answer), _unwrapped(gold)
    if not ours or not theirs:
        return False
    if _normal(ours) == _normal(theirs):
        return True
    if re.fullmatch(_TEXT, theirs) and _normal(ours).casefold() == _normal(theirs).casefold():
        return True
    based = [_BASED.fullmatch(_normal(text)) for text in (ours, theirs)]
    if all(based):
        # math-verify takes the digits alone, whatever their base.
        return based[0].groups() == based[1].groups()
    if based[0] and based[0][2] != "10":  # the gold one is in base 10
        return False
    if all(re.fullmatch("[A-Za-z]{3,}", _normal(text)) for text in (ours, theirs)):
        return False  # words, which math-verify takes for products of their letters
    value = ours
    if "=" not in theirs:
        if "=" in _NAMED.sub("", _normal(ours)):
            return False
        value = ours if ours.count("=") > 1 else ours.partition("=")[2] or ours
    as_numbers = _same_number(value, theirs)
    if as_numbers is not None:
        return as_numbers
    if number(theirs) is not None and _WORKED_OUT.search(_normal(re.sub(_NO_LETTERS, "", value))):
        return False
    return _is_tame(ours) and _is_tame(theirs) and _verified(ours, theirs)


def _normal(text: str) -> str:
    """Equal for formulas that differ in blanks, size commands and text commands alone."""
    if re.fullmatch(rf"{_TEXT}|[A-Za-z ]{{3,}}", text):
        text = text.casefold()
    text = re.sub(r"\\[dt]frac", r"\\frac", re.sub(_TEXT, r"\1", text))
    text = re.sub(rf"\\(?:left|right)(?![a-z])|{_DEGREES}|°", "", text)
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi", text)
    return re.sub(r"\\[!,;: ]|\s|~|\\\$", "", text)


def _is_tame(text: str) -> bool:
    """Whether a computer algebra system is safe with a formula: no giant numbers, no deep nesting.

    Sympy multiplies out what it reads, so that `9^{9^9}` or `99999!` would never end.
    """
    depths = itertools.accumulate((sign in "{([") - (sign in "})]") for sign in text)
    if len(text) > LONGEST or max(depths, default=0) > 8 or _ENDLESS.search(text):
        return False
    if re.search(r"binom|choose", text) and re.search(r"[0-9]{5}", text):
        return False
    # Of factorials only those of small numbers; `\!` is a space.
    if re.search(r"(?<!\\)!", re.sub(r"(?<![0-9])[0-9]{1,2}!", "", text)):
        return False
    exponents = [_exponent(text[sign.end() :]) for sign in re.finditer(r"\^|\*\*", text)]
    if any(re.search(r"\^|\*\*|!|\\binom", one) for one in exponents):
        return False
    digits = [int(n) for one in exponents for n in re.findall("[0-9]+", one)]
    return math.prod(max(1, one) for one in digits) <= 20_000


def _exponent(rest: str) -> str:
    """Return what stands raised: a group in braces or brackets, or all up to the next operator."""
    rest = rest.lstrip(" *")
    if rest[:1] in ("{", "("):
        return group(rest) or rest
    # Without braces LaTeX raises one sign, but plain notation a whole number.
    return re.match(r"[-+]?[A-Za-z0-9.\\]*\^?", rest)[0]


def _verified(answer: str, gold: str) -> bool:
    """Whether math-verify finds two formulas equal."""
    from math_verify import LatexExtractionConfig, parse, verify  # slow to load, like sympy

    # They warn of every formula that they cannot read and of every thread without a timeout.
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # They keep time by signals, which only the main thread gets.
    timed = threading.current_thread() is threading.main_thread()
    patience, latex = PATIENCE if timed else None, [LatexExtractionConfig()]
    try:
        ours, theirs = (
            parse(f"${text}$", extraction_config=latex, parsing_timeout=patience)
            for text in (answer, gold)
        )
        same = verify(theirs, ours, timeout_seconds=patience)
        return same and not _differ_in_size(ours[0], theirs[0])
    except Exception:
        # What a computer algebra system cannot read is not equal to anything.
        return False


def _differ_in_size(ours, theirs) -> bool:
    """Whether two expressions differ by more than a rounding error of their own size.

    math-verify takes any difference of less than about 1e-15 for none, however small both are.
    """
    from sympy import Expr, Float, Rational

    # A rounded number is compared by its decimals.
    if any(not isinstance(one, Expr) or one.has(Float) for one in (ours, theirs)):
        return False
    names = sorted(ours.free_symbols | theirs.free_symbols, key=str)
    values = {name: Rational(7 + 4 * i, 5) for i, name in enumerate(names)}
    apart, size = (abs(one.doit().subs(values).evalf()) for one in (ours - theirs, theirs))
    return size.is_number and bool(size < 1e-9 and apart > 1e-9 * size)
