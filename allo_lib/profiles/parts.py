"""A part of a study: some of its domains, run apart, with the settings and the hash of the whole.

So a study can be made in pieces that add up: on several machines, or in several short sessions.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from allo_lib.errors import AlloError
from allo_lib.profiles.config import Profile

# Among the overrides that notebooks get; no setting, as it changes no result.
KEY = "only_domains"


@dataclass(frozen=True)
class Part(Profile):
    """A profile with some of its domains only; `to_dict` and `hash` are those of the whole."""

    whole: Profile | None = None

    def to_dict(self) -> dict:
        """The settings of the whole profile."""
        return self.whole.to_dict()


def part_of(profile: Profile, domains: str | Sequence[str]) -> Profile:
    """The profile with `domains` only, in its own order; itself when these are all of it.

    Raises:
        AlloError: no domain, one that the profile does not have, or one named twice.
    """
    asked = [domains] if isinstance(domains, str) else list(domains)
    known = list(profile.domains)
    names = {str(name) for name in asked}
    if not asked or len(names) < len(asked) or not names <= set(known):
        given = ", ".join(map(str, asked)) or "none"
        raise AlloError(
            f"domains {given[:80]!r}: expected one or more of {', '.join(known)}, each once"
        )
    if set(asked) == set(known):
        return profile
    values = {field.name: getattr(profile, field.name) for field in dataclasses.fields(Profile)}
    values["domains"] = {name: one for name, one in profile.domains.items() if name in asked}
    return Part(**values, whole=profile)
