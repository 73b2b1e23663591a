"""Why a cell of the main tables is empty, as far as the measurements themselves can tell."""

from allo_lib.comparisons import NOBODY, WIN, Domain, Index, was_judged
from allo_lib.measurements import AVERAGE, REWARD

# Methods that preference pairs of people leave no room for.
_PAIRS = {
    "sft_base": "the starting model is the reference itself and gives every pair the margin 0",
    "rft": "nothing is sampled where people gave the pairs, so it would be SFT",
    "ppo": "needs a verifier of answers as its reward, and pairs of people have none",
    "a2c": "needs a verifier of answers as its reward, and pairs of people have none",
}


def reason(index: Index, method: str, dataset: str, domain: Domain) -> str:
    """Why `method` has no score on a data set of the domain (or on `average`), in words."""
    if domain.prefix == REWARD and method in _PAIRS:
        return _PAIRS[method]
    if domain.prefix == WIN and not was_judged(index, domain):
        return NOBODY if _replied(index, method, domain) else _without_scores(index, method)
    keys = [key for key in index if key[1] == method and key[3] == domain.metric]
    here = [name for name in domain.datasets if any(key[2] == name for key in keys)]
    if dataset == AVERAGE and here and here != list(domain.datasets):
        return f"run on {', '.join(here)} only"
    if dataset == AVERAGE and here:
        return "no seed has it on all data sets"
    if here:
        return f"run on {', '.join(here)} only"
    return _without_scores(index, method)


def _replied(index: Index, method: str, domain: Domain) -> bool:
    return any(key[1] == method and key[2] in domain.datasets for key in index)


def _without_scores(index: Index, method: str) -> str:
    elsewhere = any(key[1] == method for key in index)
    return "run on other domains only" if elsewhere else "not among the methods of this run"


class Reasons:
    """The reasons of one table, each with a letter that its empty cells show."""

    def __init__(self):
        self.letters: dict[str, str] = {}

    def of(self, index: Index, method: str, dataset: str, domain: Domain) -> str:
        """The reason of one cell; it has a letter from now on."""
        told = reason(index, method, dataset, domain)
        self.letters.setdefault(told, chr(ord("a") + len(self.letters)))
        return told

    def mark(self, told: str) -> str:
        """What the cell shows: `(a)`, or nothing without a reason."""
        return f"({self.letters[told]})" if told else ""

    def text(self) -> str:
        """A sentence for the caption; empty where no cell is."""
        if not self.letters:
            return ""
        listed = "; ".join(f"({letter}) {told}" for told, letter in self.letters.items())
        return f" Cells without a number were not run: {listed}."
