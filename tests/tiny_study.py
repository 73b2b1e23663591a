"""A whole study of seconds, on the profile that also tests the notebooks."""

from pathlib import Path

from allo_lib.study.study import Study

PROFILE = Path(__file__).with_name("seconds.yaml")
DOMAIN = "miniature"


def open_study(folder, seed: int = 0, **overrides) -> Study:
    """The seconds-long study in `folder`; a double underscore stands for the dot of a key."""
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return Study.open(str(PROFILE), seed, str(folder), changes)
