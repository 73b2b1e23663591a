"""Signs that a stage has nothing to work with, each a line with its number, or None.

They are those that the method's authors list: poor scores, tokens that say nothing, stages out of
tune with each other. Warnings only: whether a result stands is for its interval to say.
"""

# Two estimates of the key neurons agree on so little more than chance that they are hardly the same
# quantity: intersection over union below this many times that of random masks.
NEAR_CHANCE = 1.5
MOSTLY_TIES = 0.5  # of the kept entries, that tie with entries left out
NO_CHOICE = 0.02  # share of tokens, or of all but these, that is as good as none or all of them
FAR_BELOW = 0.05  # accuracy that a stage lost, if it is twice its standard error too


def weak_overlap(what: str, overlap: float, chance: float) -> str | None:
    """Masks that should agree: `overlap` and that of two random ones, both in [0, 1]."""
    if overlap >= NEAR_CHANCE * chance:
        return None
    return (
        f"{what}: masks overlap {overlap:.3f}, hardly more than the {chance:.3f} of random ones; "
        "the scores are mostly noise, give them more pairs"
    )


def arbitrary_mask(zeros: int, tied: int, tied_kept: int, kept: int, total: int) -> str | None:
    """`neurons.count_ties` of a mask that keeps `kept` of `total` entries."""
    if zeros > total - kept:
        return (
            f"{zeros} of {total} scores are exactly 0, so that the mask of {kept} keeps some of "
            "them; take the scores in float32, at a larger rate"
        )
    if tied > tied_kept > MOSTLY_TIES * kept:
        return (
            f"{tied_kept} of {kept} kept entries tie with entries left out; the order of the "
            "tensors chose among them"
        )
    return None


def no_choice_of_tokens(weights: list[list[float]]) -> str | None:
    """Token weights of forgetting, a list for each response: are none or all of them chosen?"""
    values = [value for row in weights for value in row]
    share = sum(value != 0 for value in values) / max(1, len(values))
    if NO_CHOICE <= share <= 1 - NO_CHOICE:
        return None
    few = share < NO_CHOICE
    return (
        f"the token rule selects {100 * share:.1f}% of {len(values)} rejected tokens: forgetting "
        + (
            "has next to nothing to work on; train the reward model longer, or raise its threshold"
            if few
            else "does not choose; train the reward model longer, or lower its threshold"
        )
    )


def far_below(what: str, score: float, start: float, noise: float) -> str | None:
    """A stage's score against the one it started from, both in [0, 1]; `noise` is the standard
    error of their difference."""
    lost = start - score
    if lost <= max(FAR_BELOW, 2 * noise):
        return None
    return (
        f"{what} scores {100 * score:.1f}%, the model before it {100 * start:.1f}% (standard error "
        f"of the difference {100 * noise:.1f} points): it does harm, lower its learning rate"
    )
