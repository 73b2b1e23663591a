"""Numbers as people and models write them, read exactly and compared."""

import re
from fractions import Fraction

# Words that change a number, or join it to something, and so are no unit behind it.
_NOT_UNITS = frozenset(
    "a and are dozen half hundred is less million billion minus more of or over per_cent plus pi "
    "squared than thousand times to trillion was x".split()
)
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


def number(text: str) -> Fraction | None:
    r"""The number that a text is, exactly; None if it is anything else.

    Takes `1,234`, `-3.50`, `1e3`, `3/10`, `1 1/2`, `\frac{3}{10}`, a sign of money or `x =` before
    it, and behind it a percent sign (`50%` is 50, as the data sets ask for per cent), a unit of at
    most three words, or a measure squared or cubed (`m^2`).
    """
    text = unwrapped(text)
    if len(text) > 80:
        return None
    found = _NUMBER.fullmatch(_ascii_number(text))
    if not found or (found["sign"] and found["inner"]):
        return None
    words = {word.strip(".").lower() for word in (found["unit"] or "").split()}
    if words & _NOT_UNITS:
        return None
    value = Fraction(found["top"].replace(",", ""))
    if found["bottom"]:
        bottom = Fraction(found["bottom"].replace(",", ""))
        if not bottom:
            return None
        value = value / bottom + int(found["whole"] or 0)
    return -value if "-" in (found["sign"], found["inner"]) else value


def _ascii_number(text: str) -> str:
    """LaTeX's and typographers' ways of writing a number as the plain ones."""
    for written, meant in ((r"\$", "$"), (r"\%", "%"), (r"\!", ""), ("\u2212", "-")):
        text = text.replace(written, meant)
    text = re.sub(r"\\(?:text|mbox|textbf|mathrm)\s*\{\s*([^{}]*)\}", r" \1", text)
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", "°", text)
    text = re.sub(r"\\[dt]?frac\s*\{([0-9]+)\}\s*\{([0-9]+)\}", r" \1/\2", text)
    text = re.sub(r"\\[dt]?frac\s*([0-9])([0-9])", r" \1/\2", text)
    return re.sub(r" +", " ", text).strip().removeprefix("+ ")


def same_number(given: str, gold: str) -> bool | None:
    """Whether two numbers are the same; None if one of them is no number.

    A gold number of three or more decimals is taken for a rounded one, as MAWPS has them
    (0.166667): what differs by less than one unit of its last digit, or by just one where it has
    four or more, is the same. All others must be equal.
    """
    ours, theirs = number(given), number(gold)
    if ours is None or theirs is None:
        return None
    names = [re.match(r"([A-Za-z])\s*=", unwrapped(text)) for text in (given, gold)]
    if all(names) and names[0][1] != names[1][1]:
        return False
    decimals = len(re.split(r"[^0-9]", gold.partition(".")[2])[0]) if "/" not in gold else 0
    apart, unit = abs(ours - theirs), Fraction(1, 10**decimals)
    return apart == 0 or (decimals >= 3 and apart < unit) or (decimals >= 4 and apart == unit)


def unwrapped(text: str) -> str:
    r"""Without a last full stop and `**...**`, `$...$`, `\(...\)`, `\[...\]` or `\boxed{...}`
    around all."""
    text = plain_type(text.strip().removesuffix(".").rstrip())
    for start, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if len(text) > len(start + end) and text.startswith(start) and text.endswith(end):
            inner = text[len(start) : -len(end)]
            # "\$3 or 5$" or "$x$ and $y$" is not one formula between two signs.
            if start not in inner and not inner.endswith("\\"):
                text = inner.strip()
                break
    if text.startswith(r"\boxed{") and _closes_last(text):
        text = text[len(r"\boxed{") : -1].strip()
    return text.removesuffix(".").rstrip()


def plain_type(text: str) -> str:
    """Without Markdown's `**` around all, or what is left of it where more stood inside."""
    bare = text.removeprefix("**").removesuffix("**")
    return text if bare == text or "**" in bare else bare.strip().removesuffix(".").rstrip()


def _closes_last(text: str) -> bool:
    """Whether the first brace of a text is closed by its last character."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if letter == "}" and depth == 0:
            return place == len(text) - 1
    return False
