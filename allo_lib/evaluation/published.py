"""The paper's numbers (arXiv 2406.12606), read from `results/paper/` and turned into fractions."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from allo_lib.errors import AlloError
from allo_lib.profiles.config import INSTRUCTIONS as INSTRUCTIONS

PAPER_DIR = Path(__file__).resolve().parents[2] / "results" / "paper"

# Our names of the paper's rows, in the paper's order; the values are the labels tables show.
LABELS = {
    "sft_base": "SFT LLM",
    "sft": "+ SFT",
    "rft": "+ RFT",
    "dpo": "+ DPO",
    "rdpo": "+ R-DPO",
    "ipo": "+ IPO",
    "bco": "+ BCO",
    "simpo": "+ SimPO",
    "npo": "+ NPO",
    "ppo": "+ Vanilla PPO",
    "a2c": "+ PPO A2C",
    "allo": "+ ALLO",
}
# Arms of the empirical study and of the ablations, as figures and tables name them.
_ARMS = {
    "dpo": "DPO, all neurons",
    "dpo_long": "DPO, as long as both stages",
    "allo": "ALLO",
    "allo_no_forgetting": "learning alone",
    "allo_no_learning": "forgetting alone",
    "allo_all_tokens_forgetting": "forgetting on all tokens",
    "allo_all_tokens_learning": "learning on all tokens",
    "allo_random_tokens": "random tokens",
    "allo_oracle_tokens": "oracle tokens in both stages",
    "allo_soft": "soft token weights",
    "allo_released": "the released code's weights",
    "allo_key_reference": "key tokens from a DPO model",
    "allo_all_neurons": "all neurons",
    "allo_random_neurons": "random neurons",
    "allo_last_neurons": "last neurons",
    "allo_rows": "whole rows",
    "allo_per_tensor": "top of every tensor",
    "allo_reversed": "learning, then forgetting",
    "allo_merged": "both in one stage",
    "allo_scores_gradient": "scores: sum of |gradient|",
    "allo_scores_magnitude": "scores: magnitude",
    "allo_scores_lr_x0p3": "scores: warm-up at 0.3 of the rate",
    "allo_scores_lr_x3": "scores: warm-up at 3 times the rate",
    "allo_scores_half_epoch": "scores: half an epoch",
    "allo_rm_sixteenth": "reward model of 1/16 of the examples",
    "allo_rm_eighth": "reward model of 1/8 of the examples",
    "allo_rm_early": "reward model stopped early",
    "allo_rm_half": "reward model of half the examples",
    "allo_rm_shuffled": "shuffled reward model",
    "allo_rm_untrained": "untrained reward model",
    "allo_rm_oracle": "oracle token rewards",
    "allo_rm_inverted": "forgetting what the reward model keeps",
    "allo_all_wrong": "official: all wrong samples forgotten",
    "allo_key10": "official: 10% key tokens",
    "allo_f5_l5": "official: 5% of the neurons",
    "allo_official": "official: all three",
}
# dpo_top10, dpo_last10, dpo_random10, dpo_top2p5, dpo_top10_gradient, dpo_top10_long
_MASKED = re.compile(r"dpo_(top|last|random)(\d+)(?:p(\d+))?(?:_(\w+))?")
QUESTIONS = ("ecqa", "qasc", "openbookqa", "strategyqa")
MATHS = ("gsm8k", "math", "mawps", "tabmwp")
# Columns of the paper's tables whose data set has another name here.
_COLUMNS = {"alpaca_eval_2": "alpaca_eval"}
_NEURONS = {"dpo_top10": "top 10%", "dpo_last10": "last 10%", "dpo": "full"}


def arm_label(method: str) -> str:
    """A readable name for a method of the empirical study or an ablation."""
    base = method.removesuffix("_paper")
    name = _ARMS.get(base, LABELS.get(base, base).removeprefix("+ "))
    masked = _MASKED.fullmatch(base)
    if masked:
        order, whole, decimals, rest = masked.groups()
        share = f"{whole}.{decimals}" if decimals else whole
        name = f"DPO, {order} {share}%" + (f", {rest.replace('_', ' ')}" if rest else "")
    return name + " (one rate)" * (base != method)


Table = dict[str, dict[str, float]]


def main_results(paper_dir: str | Path | None = None) -> Table:
    """Accuracy of every method on the eight question and maths sets, and win rate on the two
    instruction sets: `table[method][dataset]`, fractions."""
    methods = {label: name for name, label in LABELS.items()}
    table = _read("main_results.csv", "method", methods, paper_dir)
    for method, row in _read("instruction_following.csv", "method", methods, paper_dir).items():
        row["instructions_avg"] = row.pop("avg")
        table.setdefault(method, {}).update(row)
    return table


def empirical_study(paper_dir: str | Path | None = None) -> Table:
    """Accuracy of DPO on the top 10%, last 10% and all neurons, on three data sets."""
    neurons = {label: name for name, label in _NEURONS.items()}
    return _read("empirical_study.csv", "neurons", neurons, paper_dir)


def difference(table: Table, first: str, second: str, datasets: Sequence[str]) -> float | None:
    """First minus second method over those of `datasets` that the table has; None without any."""
    if first not in table or second not in table:
        return None
    shared = [name for name in datasets if name in table[first] and name in table[second]]
    if not shared:
        return None
    return sum(table[first][name] - table[second][name] for name in shared) / len(shared)


def _read(name: str, key: str, rename: dict[str, str], paper_dir: str | Path | None) -> Table:
    path = Path(paper_dir or PAPER_DIR) / name
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines(), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise AlloError(f"{path} cannot be read: restore the paper's numbers from git") from None
    table = {}
    for row in rows:
        label = row.pop(key, None)
        if label not in rename:
            raise AlloError(f"{path} has the row {label!r}: expected {', '.join(rename)}"[:400])
        row.pop("note", None)
        try:
            numbers = {_COLUMNS.get(name, name): float(cell) / 100 for name, cell in row.items()}
        except (TypeError, ValueError):
            raise AlloError(
                f"{path}, row {label!r}, has a cell that is not a number: restore it from git"
            ) from None
        table[rename[label]] = numbers
    if set(table) != set(rename.values()):
        raise AlloError(f"{path} lacks rows: expected {', '.join(rename)}; restore it from git")
    return table
