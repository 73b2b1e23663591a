"""The one exception class for mistakes that a user can make."""


class AlloError(ValueError):
    """Bad input, told in one line: what was given, what was expected, what to do."""
