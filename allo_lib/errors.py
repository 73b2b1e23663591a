"""The one exception class for mistakes that a user can make."""


class AlloError(ValueError):
    """Bad input, told in one line: what was given, what was expected, what to do."""


class Diverged(AlloError):
    """Training reached NaN or infinity: the learning rate is too large.

    `batch` is the file with the batch of that step, None where none could be kept.
    """

    batch = None
