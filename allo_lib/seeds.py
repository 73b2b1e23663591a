"""Independent seeds for everything random, derived from the one seed that a user names."""

import hashlib


def derive(seed: int, *purpose: object) -> int:
    """A seed in [0, 2^31) for `purpose`: the same for equal arguments, unrelated for others."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
