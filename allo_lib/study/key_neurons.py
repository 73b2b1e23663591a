"""The key neurons of a study: importance scores, masks, and how far masks agree.

Score variants say which pairs the scores come from, and how. "delta" is the warm-up as it is
(|theta' - theta| / lr after one epoch of DPO at a small rate), "order" the same in another order of
the data; "half_a", "half_b" see the first and the second half of the pairs, "third_a" to "third_c"
every third one, which is as many as each of three data sets has, and "family:NAME" the pairs of one
data set. "lr_x0.3" and "lr_x3" change the warm-up's learning rate, "half_epoch" and "two_epochs"
its length. The other estimators: "gradient" (sum of |dL/dtheta| over batches, no update made) and
"magnitude" (|theta|).

Overlaps of two masks stand beside two chances: of masks that are drawn at random from all neurons,
and of masks that are random within each tensor but keep as much of it as they do. What lies between
the two is agreement on tensors, what lies above both is agreement on neurons.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from allo_lib.allo import delta_of_dpo, find_neurons, gradient_scores
from allo_lib.engine.store import Artifact, NotMade, write_json
from allo_lib.engine.trainer import Schedule
from allo_lib.errors import AlloError
from allo_lib.evaluation.stats import LEVEL
from allo_lib.machine import weights
from allo_lib.method import neurons
from allo_lib.method.neurons import NeuronMask
from allo_lib.seeds import derive

FAMILY = "family:"
_RATES = {"lr_x0.3": 0.3, "lr_x3": 3.0}
_EPOCHS = {"half_epoch": 0.5, "two_epochs": 2}
_THIRDS = ("third_a", "third_b", "third_c")
_PLAIN = ("delta", "order", "half_a", "half_b", "gradient", "magnitude")
VARIANTS = (*_PLAIN, *_THIRDS, *_RATES, *_EPOCHS)
RESAMPLES = 2000


def check_variant(variant: str, datasets: Sequence[str]) -> None:
    """AlloError unless `variant` is known; `datasets` are those that can be a family."""
    known = (*VARIANTS, *(FAMILY + dataset for dataset in datasets))
    if variant not in known:
        raise AlloError(
            f"importance scores {variant!r} are not known; expected one of {', '.join(known)}"
        )


def pairs_of(variant: str, rows: list, datasets: Sequence[str]) -> list:
    """The rows that a variant sees; `datasets` holds the data set of each row."""
    half = len(rows) // 2
    if variant in _THIRDS:
        return rows[_THIRDS.index(variant) :: len(_THIRDS)]
    if variant.startswith(FAMILY):
        family = variant.removeprefix(FAMILY)
        return [row for row, dataset in zip(rows, datasets, strict=True) if dataset == family]
    return {"half_a": rows[:half], "half_b": rows[half:]}.get(variant, rows)


class KeyNeurons:
    """The part of `study.Study` that makes and keeps scores and masks."""

    def scores(self, name: str, variant: str = "delta") -> Artifact:
        """Importance scores of every entry (`scores.safetensors`) and a record of the warm-up.

        AlloError for a variant that is not known.
        """
        check_variant(variant, self.domain(name).datasets)
        inputs = self.inputs(name, "rates", "batch_size", "max_length") | {
            "pairs": self.pairs(name).key,
            "variant": variant,
            "method": [self.profile.method.beta, self.profile.method.warmup_rate_factor],
        }
        make = lambda folder: self._make_scores(name, variant, folder)  # noqa: E731
        return self._kept("scores", inputs, make, name)

    def _make_scores(self, name: str, variant: str, folder: Path) -> None:
        datasets = [row["dataset"] for row in self.pairs(name).rows["mask"]]
        rows = pairs_of(variant, self.encoded(name, "mask"), datasets)
        model, record, method = self.load_sft(name), {}, self.profile.method
        domain = self.domain(name)
        rate = domain.rates.dense * method.warmup_rate_factor
        order = derive(self.seed, "warm-up", name, "second" if variant == "order" else "first")
        lr, epochs = rate * _RATES.get(variant, 1), _EPOCHS.get(variant, 1)
        schedule = Schedule(lr, epochs, domain.batch_size, order)
        common = {"beta": method.beta, "pad_token_id": self.tokenizer.pad_token_id}
        if variant == "magnitude":
            scores = {n: p.detach().float().abs() for n, p in model.named_parameters()}
        elif variant == "gradient":
            scores = gradient_scores(model, rows, schedule, **common)
        else:
            scores, record = delta_of_dpo(
                model,
                rows,
                schedule,
                label=f"{name}, importance ({variant})",
                max_grad_norm=method.max_grad_norm,
                checkpoints=self.checkpoints(folder, "warm-up"),
                **common,
            )
        weights.save_tensors(scores, folder / "scores.safetensors")
        write_json(folder / "record.json", record | {"pairs": len(rows)})

    def mask(
        self,
        name: str,
        order: str = "top",
        share: float = 0.1,
        variant: str = "delta",
        granularity: str = "scalar",
        scope: str = "global",
    ) -> NeuronMask:
        """The kept neurons of a domain (`neurons.select_neurons`)."""
        kept = self.kept_neurons(name, order, share, variant, granularity, scope)
        return NeuronMask.load(kept.file("mask.safetensors"))

    def kept_neurons(
        self, name: str, order, share, variant, granularity="scalar", scope="global"
    ) -> Artifact:
        """The artifact of `mask`: `mask.safetensors`, and a record of ties."""
        inputs = {
            "order": order,
            "share": share,
            "scores": self.scores(name, variant).key,
            "seed": self.seed,
            "granularity": granularity,
        }
        if scope != "global":  # it came later: masks made before are known without it
            inputs["scope"] = scope

        def make(folder: Path) -> None:
            self._make_mask(name, order, share, variant, granularity, scope, folder)

        return self.store.get("mask", inputs, make)

    def _make_mask(self, name, order, share, variant, granularity, scope, folder: Path) -> None:
        scores = weights.read_tensors(self.scores(name, variant).file("scores.safetensors"))
        mask, record = find_neurons(
            scores,
            share,
            order=order,
            granularity=granularity,
            scope=scope,
            seed=derive(self.seed, "mask", name),
        )
        mask.save(folder / "mask.safetensors")
        write_json(folder / "record.json", record | {"kept": mask.kept, "total": mask.total})


# --- overlaps ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap:
    """Intersection over union of two masks, all values in [0, 1].

    low, high: 95% by the bootstrap over tensors: how even the agreement is over the model, not what
    other data would give. chance: of random masks of these sizes; within: of masks that are random
    within each tensor and as large there as these.
    """

    label: str
    first: str
    second: str
    value: float
    low: float
    high: float
    chance: float
    within: float


def overlap(label: str, first: str, second: str, one: NeuronMask, other: NeuronMask) -> Overlap:
    """The overlap of two masks of one model, with its interval and both chances."""
    value = one.overlap(other)
    both, union = _by_tensor(one, other)
    draws = np.random.default_rng(0).integers(0, len(both), (RESAMPLES, len(both)))
    unions = union[draws].sum(1)
    ratios = both[draws].sum(1)[unions > 0] / unions[unions > 0]
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    kept = one.kept * other.kept / one.total
    chance = kept / (one.kept + other.kept - kept)
    return Overlap(label, first, second, value, float(low), float(high), chance,
                   chance_within(one, other))  # fmt: skip


def chance_within(one: NeuronMask, other: NeuronMask) -> float:
    """Expected overlap of masks that keep as much of every tensor as these, at random places."""
    common = sum(
        one.indices[name].numel() * other.indices[name].numel() / torch.Size(shape).numel()
        for name, shape in one.shapes.items()
    )
    return common / (one.kept + other.kept - common)


def _by_tensor(one: NeuronMask, other: NeuronMask) -> tuple[np.ndarray, np.ndarray]:
    """Intersection and union of each tensor."""
    both, sizes = [], []
    for name, index in one.indices.items():
        theirs = other.indices[name]
        both.append(int(torch.isin(index, theirs, assume_unique=True).sum()))
        sizes.append(index.numel() + theirs.numel())
    return np.array(both), np.array(sizes) - np.array(both)


def comparisons(study, name: str) -> list[tuple[str, str, str]]:
    """(label, variant, variant) of every two score variants that are compared on a domain."""
    present = {row["dataset"] for row in study.pairs(name).rows["mask"]}
    families = [family for family in study.domain(name).datasets if family in present]
    thirds = combinations(("third_a", "third_b", "third_c"), 2)
    return [
        ("order of the data", "delta", "order"),
        ("halves of the pairs", "half_a", "half_b"),
        *(("thirds of the pairs", *two) for two in thirds),
        *((f"tasks: {a} and {b}", FAMILY + a, FAMILY + b) for a, b in combinations(families, 2)),
        ("warm-up at 0.3 of the rate", "delta", "lr_x0.3"),
        ("warm-up at 3 times the rate", "delta", "lr_x3"),
        ("warm-up of half an epoch", "delta", "half_epoch"),
        ("warm-up of two epochs", "delta", "two_epochs"),
        ("sum of |gradient|", "delta", "gradient"),
        ("magnitude of the weights", "delta", "magnitude"),
    ]


def compare(study, name: str) -> list[Overlap]:
    """Overlaps of all compared score variants, and with the seeds before this one.

    Masks keep the profile's share. Other seeds count if their scores are in the store: each has
    its own model, trained from its own weights.
    """
    share, masks = study.profile.method.share, {}

    def mask(variant: str) -> NeuronMask:
        if variant not in masks:
            masks[variant] = study.mask(name, "top", share, variant)
        return masks[variant]

    rows = [overlap(label, a, b, mask(a), mask(b)) for label, a, b in comparisons(study, name)]
    for seed, scores in scores_of_earlier_seeds(study, name).items():
        other = neurons.select_neurons(scores, share)
        rows.append(overlap(f"seed {seed}", "delta", "delta", mask("delta"), other))
    return rows


def scores_of_earlier_seeds(study, name: str) -> dict[int, dict[str, torch.Tensor]]:
    """Scores of lower seeds that the store has; nothing is made.

    Lower ones only, so that what a seed shows does not depend on the seeds that came after it.
    """
    found = {}
    for seed in range(study.seed):
        other = type(study)(study.profile, seed, study.results_dir, study.data_dir)
        with other.store.only_reading(), contextlib.suppress(NotMade):
            found[seed] = weights.read_tensors(other.scores(name).file("scores.safetensors"))
    return found
