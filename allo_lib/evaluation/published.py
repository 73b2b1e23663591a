"""The paper's numbers (arXiv 2406.12606), of `results/paper/`, and the names of all methods."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pandas as pd

from allo_lib.evaluation.outcomes import AVERAGE
from allo_lib.profiles.config import INSTRUCTIONS as INSTRUCTIONS

PAPER_DIR = Path(__file__).resolve().parents[2] / "results" / "paper"
QUESTIONS = ("ecqa", "qasc", "openbookqa", "strategyqa")
MATHS = ("gsm8k", "math", "mawps", "tabmwp")

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
# Methods of the empirical study and of the ablations, as figures and tables name them.
NAMES = {
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
    "allo_all_neurons": "all neurons",
    "allo_random_neurons": "random neurons",
    "allo_last_neurons": "last neurons",
    "allo_rows": "whole rows",
    "allo_per_tensor": "top of every tensor",
    "allo_reversed": "learning, then forgetting",
    "allo_scores_gradient": "scores: sum of |gradient|",
    "allo_scores_magnitude": "scores: magnitude",
    "allo_rm_early": "reward model of 1/4 of the examples",
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

# The paper's averages, which stand beside data sets that it does not have.
AVERAGES = {
    "qa_avg": "paper, 4 question sets",
    "math_avg": "paper, 4 maths sets",
    "instructions_avg": "paper, 2 instruction sets",
}
_AVERAGED = dict(zip(map(frozenset, (QUESTIONS, MATHS, INSTRUCTIONS)), AVERAGES, strict=True))

Table = dict[str, dict[str, float]]


def method_label(method: str) -> str:
    """A readable name for a method of the empirical study or an ablation."""
    base = method.removesuffix("_paper")
    name = NAMES.get(base, LABELS.get(base, base).removeprefix("+ "))
    if masked := _MASKED.fullmatch(base):
        order, whole, decimals, rest = masked.groups()
        share = f"{whole}.{decimals}" if decimals else whole
        name = f"DPO, {order} {share}%" + (f", {rest.replace('_', ' ')}" if rest else "")
    return name + " (one rate)" * (base != method)


@cache
def main_results() -> Table:
    """Accuracy of every method on the eight question and maths sets and its averages, win rate on
    the two instruction sets and its average: `table[method][dataset]`, fractions."""
    methods = {label: name for name, label in LABELS.items()}
    columns = {"alpaca_eval_2": "alpaca_eval", "avg": "instructions_avg"}
    answered = _read("main_results.csv", methods)
    followed = _read("instruction_following.csv", methods).rename(columns=columns)
    return answered.join(followed).to_dict("index")


@cache
def empirical_study() -> Table:
    """Accuracy of DPO on the top 10%, last 10% and all neurons, on three data sets."""
    names = {"top 10%": "dpo_top10", "last 10%": "dpo_last10", "full": "dpo"}
    return _read("empirical_study.csv", names).drop(columns="note").to_dict("index")


def beside(datasets: Sequence[str]) -> dict[str, dict[str, float]]:
    """The numbers that stand beside data sets: column -> method -> fraction.

    Those of the same sets, and their mean (as printed, where the paper prints it); where the paper
    has none of them, its averages.
    """
    paper = main_results()
    own = [name for name in datasets if name in paper["dpo"]]
    found = {name: {m: row[name] for m, row in paper.items()} for name in own or AVERAGES}
    if own == list(datasets) and len(own) > 1:
        printed = _AVERAGED.get(frozenset(own))
        found[AVERAGE] = {
            method: row[printed] if printed else sum(row[name] for name in own) / len(own)
            for method, row in paper.items()
        }
    return found


def _read(name: str, rows: dict[str, str]) -> pd.DataFrame:
    """A table of the paper, a row a method under our name, per cent as fractions."""
    found = pd.read_csv(PAPER_DIR / name, index_col=0)
    numbers = found.select_dtypes("number")
    return found.assign(**numbers / 100).rename(index=rows)
