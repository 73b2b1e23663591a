"""Why a cell of the main tables is empty, as far as the measurements themselves can tell."""

from allo_lib.comparisons import WIN, Domain, StudyResults
from allo_lib.judge_names import NOBODY, was_judged
from allo_lib.measurements import AVERAGE, REWARD

# Methods that preference pairs of people leave no room for.
_PAIRS = {
    "sft_base": "the starting model is the reference itself and gives every pair the margin 0",
    "rft": "nothing is sampled where people gave the pairs, so it would be SFT",
    "ppo": "needs a verifier of answers as its reward, and pairs of people have none",
    "a2c": "needs a verifier of answers as its reward, and pairs of people have none",
}


def reason(results: StudyResults, method: str, dataset: str, domain: Domain) -> str:
    """Why `method` has no score on a data set of the domain (or on `average`), in words."""
    if domain.prefix == REWARD and method in _PAIRS:
        return _PAIRS[method]
    if domain.prefix == WIN and not was_judged(results.index, domain):
        replied = {key[1] for key in results.index if key[2] in domain.datasets}
        return NOBODY if method in replied else _without_scores(results, method)
    here = results.datasets_of(method, domain)
    if not here:
        return _without_scores(results, method)
    if dataset == AVERAGE and here == list(domain.datasets):
        return "no seed has it on all data sets"
    return f"run on {', '.join(here)} only"


def _without_scores(results: StudyResults, method: str) -> str:
    elsewhere = method in results.methods
    return "run on other domains only" if elsewhere else "not among the methods of this run"


class Reasons:
    """The reasons of one table, each with a letter that its empty cells show."""

    def __init__(self):
        self.letters: dict[str, str] = {}

    def of(self, results: StudyResults, method: str, dataset: str, domain: Domain) -> str:
        """The reason of one cell; it has a letter from now on."""
        told = reason(results, method, dataset, domain)
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
