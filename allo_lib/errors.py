"""The one exception class for mistakes that a user can make."""

import reprlib


class AlloError(ValueError):
    """Bad input, told in one line: what was given, what was expected, what to do."""


class Diverged(AlloError):
    """Training reached NaN or infinity: the learning rate is too large."""


def short(value) -> str:
    """`repr`, cut: a list that repeats itself by YAML's aliases can be longer than the memory."""
    cut = reprlib.Repr()
    cut.maxlevel, cut.maxlist, cut.maxdict, cut.maxstring, cut.maxlong = 2, 4, 4, 60, 40
    try:
        return cut.repr(value)
    except ValueError:  # a number of more digits than Python writes out
        return "a number of thousands of digits"
