"""What notebooks look at: where key neurons sit, how sharp token rewards are, what DPO weighs."""

import contextlib
import math
import re
from collections import defaultdict

import numpy as np
from scipy.stats import mannwhitneyu

from allo_lib.data import miniature
from allo_lib.engine.store import NotMade
from allo_lib.errors import AlloError
from allo_lib.evaluation import outcomes
from allo_lib.evaluation.stats import concentration
from allo_lib.method.neurons import NeuronMask
from allo_lib.profiles.methods import ROWS, share_name, stages_of
from allo_lib.study import arms
from allo_lib.study.study import Study
from allo_lib.study.timed_steps import OwnSteps

_LAYER = re.compile(r"\.layers\.(\d+)\.(.+?)\.weight$")
# The share of the lowest tokens whose part of the negative log-ratio tells how concentrated it is.
LOWEST = 0.1


def where_kept(mask: NeuronMask) -> tuple[np.ndarray, list[str], list[str]]:
    """Share of kept entries by layer (rows) and module (columns); NaN where there is no tensor.

    Tensors outside the layers (embeddings, last norm) form the row "model", before layer 0.
    """
    kept, total = defaultdict(int), defaultdict(int)
    for name, shape in mask.shapes.items():
        place = _place(name)
        kept[place] += mask.indices[name].numel()
        total[place] += math.prod(shape)
    # Tensors come in the order of their names, in which layer 10 stands before layer 2.
    layers = sorted({layer for layer, _ in total}, key=lambda one: (one != "model", _number(one)))
    modules = list(dict.fromkeys(module for _, module in total))
    matrix = np.full((len(layers), len(modules)), np.nan)
    for (layer, module), count in total.items():
        matrix[layers.index(layer), modules.index(module)] = kept[layer, module] / count
    return matrix, layers, modules


def _place(name: str) -> tuple[str, str]:
    found = _LAYER.search(name)
    if found is None:
        return "model", name.removesuffix(".weight").split(".")[-1]
    return f"layer {found[1]}", found[2].split(".")[-1]


def _number(layer: str) -> int:
    return int(layer.rpartition(" ")[2]) if layer != "model" else 0


def overlaps(masks: dict[str, NeuronMask]) -> list[list[float]]:
    """Intersection over union of every two masks, in their order."""
    return [[a.overlap(b) for b in masks.values()] for a in masks.values()]


def log_ratios(study: Study, name: str, method: str, split: str = "train") -> list[list[float]]:
    """Delta_t of every token of the rejected responses: a method's model against the SFT model."""
    model, _ = arms.trained_model(study, name, method)
    rows = study.encoded(name, split)
    policy = study.logps(model, rows)
    return [
        [a - b for a, b in zip(p["rejected"], row["rejected_reference"], strict=True)]
        for p, row in zip(policy, rows, strict=True)
    ]


def concentration_of(ratios: list[list[float]]) -> dict[str, float]:
    """Share of the negative log-ratio in the lowest tenth of the tokens, in two ways.

    "pooled": the lowest tenth of all tokens together; "per_response": of each response's tokens
    (at least one), the mean over responses weighted by their negative log-ratio.
    """
    shares, held = concentration([value for row in ratios for value in row])
    lowest = total = 0.0
    for row in ratios:
        negative = sorted(min(value, 0.0) for value in row)
        lowest += sum(negative[: max(1, round(LOWEST * len(row)))])
        total += sum(negative)
    return {"pooled": float(np.interp(LOWEST, shares, held)), "per_response": lowest / total}


def separation(study: Study, name: str, quality: str, split: str = "heldout") -> dict[str, float]:
    """How well 1 - p_t of a reward model finds the wrong decisions that the generator knows.

    `auc`: probability that a wrong decision gets a lower p_t than another token; `selected`: share
    of tokens with p_t < 0.5; `found`: share of the wrong decisions among those selected.
    """
    values = [p for row in study.keep_probabilities(name, split, quality) for p in row]
    wrong = np.array([w for row in study.oracle_tokens(name, split) for w in row], dtype=bool)
    values = np.array(values)
    auc = mannwhitneyu(-values[wrong], -values[~wrong]).statistic / (wrong.sum() * (~wrong).sum())
    threshold = study.profile.method.token_threshold
    selected = values < threshold
    return {
        "reward model": quality,
        "auc": float(auc),
        "selected": float(selected.mean()),
        "found": float(selected[wrong].mean()),
    }


def selected_share(study: Study, name: str, quality: str, split: str = "train") -> float:
    """Share of rejected tokens below the threshold: those that forgetting works on."""
    values = [p for row in study.keep_probabilities(name, split, quality) for p in row]
    threshold = study.profile.method.token_threshold
    return sum(value < threshold for value in values) / len(values)


def tokens_of(study: Study, ids: list[int]) -> list[str]:
    """The text of each token, as the tokenizer decodes it by itself."""
    return [study.tokenizer.decode([i]) for i in ids]


def step_cost(study: Study, name: str, method: str) -> int:
    """Floating-point operations of one step of a method of one DPO stage, on the first batch."""
    (stage,) = stages_of(method, study.profile)
    rows = study.encoded(name, "train")[: study.domain(name).batch_size]
    mask = arms.mask_of(study, name, stage)
    steps = OwnSteps(
        study.load_sft(name).train(), mask, rows, method, study.tokenizer.pad_token_id,
        beta=study.profile.method.beta, lr=0.0,
    )  # fmt: skip
    try:
        return steps.count()
    finally:
        steps.close()


def quality_and_cost(study: Study, name: str, found: dict) -> dict[str, list[tuple]]:
    """For scalar neurons and for whole rows: (operations of a step relative to DPO on all neurons,
    score, standard error, share) of every share in `found`, method -> result."""
    kinds = {"scalar": "", "whole rows": ROWS}
    shares = {label: shares_run(study, found, rows=bool(kinds[label])) for label in kinds}
    dense = step_cost(study, name, "dpo") if any(shares.values()) else math.nan
    series = {}
    for label, suffix in kinds.items():
        for share in shares[label]:
            method = share_name(share) + suffix
            point = (step_cost(study, name, method) / dense, *score_of(found[method]), share)
            series.setdefault(label, []).append(point)
    return series


def shares_run(study: Study, methods, rows: bool = False) -> list[float]:
    """Shares of neurons that were trained by DPO, scalar ones or whole rows, in ascending order."""
    suffix = ROWS if rows else ""
    return [
        s
        for s in sorted(study.profile.method.shares)
        if s < 1 and share_name(s) + suffix in methods
    ]


def accuracy_of(found: dict) -> outcomes.Measurement:
    """Greedy test accuracy of a result over all data sets together, with its standard error."""
    rights = [row[3] for row in found["answers"]]
    return outcomes.proportion(0, found["method"], "all", "accuracy", rights)


def score_of(found: dict) -> tuple[float, float]:
    """Test accuracy, or held-out reward accuracy where nothing is answered; and standard error.

    The starting model gives every pair the margin 0 and is counted as guessing, 0.5. A model whose
    training diverged ranks no pair right and is counted as 0, as in `measurements.csv`.
    """
    if "answers" in found:
        measured = accuracy_of(found)
        return measured.value, measured.stderr
    if found["method"] == "sft_base":
        return 0.5, 0.0
    right = [margin > 0 for margin in found["margins"]]
    measured = outcomes.proportion(0, found["method"], "all", "reward_accuracy", right)
    return measured.value, measured.stderr


def by_dataset(study: Study, name: str, methods: list[str]) -> list[dict]:
    """Test accuracy of methods on each data set of a domain."""
    rows = []
    for method in methods:
        answers = arms.result(study, name, method)["answers"]
        row: dict = {"method": method}
        for dataset in study.domain(name).datasets:
            rights = [answer[3] for answer in answers if answer[1] == dataset]
            row[dataset] = sum(rights) / len(rights)
        rows.append(row)
    return rows


def reward_accuracy(found: dict) -> float:
    """Share of held-out pairs that the implicit reward ranks right; ties count half."""
    points = [0.5 if margin == 0 else float(margin > 0) for margin in found["margins"]]
    return sum(points) / len(points)


def distinct_questions(study: Study, name: str) -> dict[str, int]:
    """Number of distinct training and test prompts by data set; AlloError if any is in both."""
    task, domain = study.task(name), study.domain(name)
    counts: dict[str, int] = {}
    train: set[str] = set()
    largest = max(domain.pretrain.examples, domain.sft.examples)
    groups = [("sft", largest), ("pairs", domain.pairs.questions), ("dev", domain.dev)]
    for split, count in groups:
        train |= {question.prompt for question in task.questions(split, count)}
    test = task.questions("test", domain.test)
    for question in test:
        if question.prompt in train:
            raise AlloError(
                f"{question.id} is both a training and a test question; report this bug"
            )
    for dataset in domain.datasets:
        counts[dataset] = len({q.prompt for q in test if q.dataset == dataset})
    return {"training": len(train), **{f"test, {key}": value for key, value in counts.items()}}


def requirements(study: Study, name: str) -> list[dict]:
    """What a miniature has to fulfil to decide the claims, what was measured, whether it holds.

    DPO is the one with as many updates as every compared method (`dpo_long`); its log-ratios are
    those of held-out pairs, as on training pairs a model may have learned single tokens by heart.
    """
    sft, dpo = (arms.result(study, name, method) for method in ("sft_base", "dpo_long"))
    lowest = concentration_of(log_ratios(study, name, "dpo_long", "heldout"))["pooled"]
    families = [
        len(miniature.problems(family, "test", 2000, study.seed))
        for family in study.domain(name).datasets
    ]
    share = f"lowest {100 * LOWEST:g}% of held-out rejected tokens"
    checks = (
        ("distinct test questions to draw from, every family", min(families), 2000, None),
        ("accuracy of the SFT model", score_of(sft)[0], 0.45, 0.65),
        ("accuracy after DPO", score_of(dpo)[0], 0.70, 0.92),
        ("held-out reward accuracy after DPO", reward_accuracy(dpo), 0.70, None),
        (f"negative log-ratio in the {share}", lowest, None, 0.70),
        ("held-out problems", len(sft["answers"]), 2000, None),
    )
    return [
        {
            "requirement": text,
            "at least": "" if low is None else low,
            "at most": "" if high is None else high,
            "measured": value,
            "holds": (low is None or value >= low) and (high is None or value <= high),
        }
        for text, value, low, high in checks
    ]
