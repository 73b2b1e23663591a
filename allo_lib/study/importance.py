"""The key neurons and the key tokens of a study: what the importance of both is, made and kept.

Score variants say which pairs the scores of the neurons come from, and how. "delta" is the warm-up
as it is (|theta' - theta| / lr after one epoch of DPO at a small rate), "order" the same in another
order of the data; "half_a" and "half_b" see the first and the second half of the pairs. The other
estimators: "gradient" (sum of |dL/dtheta| over batches, no update made) and "magnitude" (|theta|).
"""

from functools import lru_cache, partial
from math import prod
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import mannwhitneyu

from allo_lib.allo import delta_of_dpo, find_neurons, gradient_scores, token_weights
from allo_lib.engine import rewriter
from allo_lib.engine.store import Artifact, write_json
from allo_lib.engine.trainer import Schedule
from allo_lib.errors import AlloError
from allo_lib.evaluation.claims import REWARD_MODELS
from allo_lib.machine import weights
from allo_lib.method.neurons import NeuronMask
from allo_lib.profiles.methods import Stage
from allo_lib.seeds import derive
from allo_lib.study import scoring

VARIANTS = ("delta", "order", "half_a", "half_b", "gradient", "magnitude")


class Importance:
    """The part of `study.Study` that makes and keeps scores, masks, and weights of tokens."""

    # --- neurons -----------------------------------------------------------------------------

    def scores(self, name: str, variant: str = "delta") -> Artifact:
        """Importance scores of every entry (`scores.safetensors`) and a record of the warm-up.

        AlloError for a variant that is not known.
        """
        if variant not in VARIANTS:
            raise AlloError(
                f"importance scores {variant!r} are not known; expected one of "
                f"{', '.join(VARIANTS)}"
            )
        inputs = self.inputs(name, "rates", "batch_size", "max_length") | {
            "pairs": self.pairs(name).key,
            "variant": variant,
            "method": [self.profile.method.beta, self.profile.method.warmup_rate_factor],
        }
        return self._kept("scores", inputs, partial(self._make_scores, name, variant), name)

    def _make_scores(self, name: str, variant: str, folder: Path) -> None:
        rows = self.encoded(name, "mask")
        half = len(rows) // 2
        rows = {"half_a": rows[:half], "half_b": rows[half:]}.get(variant, rows)
        model, record, method = self.load_sft(name), {}, self.profile.method
        domain = self.domain(name)
        rate = domain.rates.dense * method.warmup_rate_factor
        order = derive(self.seed, "warm-up", name, "second" if variant == "order" else "first")
        schedule = Schedule(rate, 1, domain.batch_size, order)
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

    def mask(self, name: str, *which, **changes) -> NeuronMask:
        """The kept neurons of a domain, by the arguments of `kept_neurons`."""
        return NeuronMask.load(self.kept_neurons(name, *which, **changes).file("mask.safetensors"))

    def kept_neurons(
        self,
        name: str,
        order: str = "top",
        share: float = 0.1,
        variant: str = "delta",
        granularity: str = "scalar",
        scope: str = "global",
    ) -> Artifact:
        """`mask.safetensors` (`neurons.select_neurons` on a score variant) and a record of ties."""
        which = {"order": order, "share": share, "granularity": granularity}
        inputs = which | {"scores": self.scores(name, variant).key, "seed": self.seed}
        if scope != "global":  # it came later: masks made before are known without it
            inputs["scope"] = scope

        def make(folder: Path) -> None:
            scores = weights.read_tensors(self.scores(name, variant).file("scores.safetensors"))
            seed = derive(self.seed, "mask", name)
            mask, record = find_neurons(scores, **which, scope=scope, seed=seed)
            mask.save(folder / "mask.safetensors")
            write_json(folder / "record.json", record | {"kept": mask.kept, "total": mask.total})

        return self.store.get("mask", inputs, make)

    # --- tokens ------------------------------------------------------------------------------

    def reward_model(self, name: str, quality: str = "trained") -> Artifact:
        """Weights of the rewriting reward model; "untrained" is the SFT model itself."""
        if quality == "untrained":
            return self.sft(name)
        inputs = self.inputs(name, "rewriter", "max_length") | {
            "pairs": self.pairs(name).key,
            "quality": quality,
        }
        make = partial(self._make_reward_model, name, quality)
        return self._kept("reward_model", inputs, make, name)

    def _make_reward_model(self, name: str, quality: str, folder: Path) -> None:
        settings, label = self.domain(name).rewriter, f"{name}, reward model ({quality})"
        examples = self.pairs(name).corrections("mask")[: settings.examples]
        rows = rewriter.training_rows(
            self.tokenizer, examples, quality, derive(self.seed, label), self.plain
        )
        self.load_sft(name)
        begun = self.checkpoints(folder, "rewriter")
        log = self._supervise(rows, settings, label, self.context, begun)
        weights.save(self.model, folder / "model.safetensors")
        write_json(folder / "record.json", {"loss": log.loss, "examples": len(rows)})

    @lru_cache
    def keep_probabilities(
        self, name: str, split: str, quality: str = "trained"
    ) -> list[list[float]]:
        """p_t in [0, 1] of each token of each rejected response of a split."""
        inputs = {"reward_model": self.reward_model(name, quality).key, "split": split}
        inputs |= {"pairs": self.pairs(name).key, "quality": quality}

        def make(folder: Path) -> None:
            model = self.load(self.reward_model(name, quality))
            examples = self.pairs(name).corrections(split)
            batch = self.profile.compute.forward_batch
            values = rewriter.keep_probabilities(model, self.tokenizer, examples, batch, self.plain)
            write_json(folder / "probabilities.json", values)

        return self._kept("keep_probabilities", inputs, make).json("probabilities.json")

    def forgetting_weights(self, name: str, stage: Stage) -> list[list[float]]:
        """w_t of the rejected responses that a stage forgets, by its token rule."""
        split = self.wrong if stage.pairs == "wrong" else self.train
        if stage.tokens == "all":
            return [[1.0] * len(row["rejected"]) for row in self.encoded(name, split)]
        if stage.tokens == "oracle":
            return self.oracle_tokens(name, split)
        values = self.keep_probabilities(name, split, stage.reward_model)
        chosen = token_weights(values, stage.rule, self.profile.method.token_threshold)
        if stage.tokens == "kept":
            return [[1.0 - weight for weight in row] for row in chosen]
        if stage.tokens == "random":
            return [self._shuffled(w, "forgetting", i) for i, w in enumerate(chosen)]
        return chosen

    def oracle_tokens(self, name: str, split: str) -> list[list[float]]:
        """1 where a rejected response takes a wrong decision, by the generator; 0 at its end."""
        task = self.task(name)
        if not hasattr(task, "wrong_tokens"):
            raise AlloError(f"{name}: only the generator of the miniature knows wrong tokens")
        questions = self.pair_questions(name)
        return [
            [float(x) for x in task.wrong_tokens(questions[row["id"]], row["rejected"])] + [0.0]
            for row in self.pairs(name).rows[split]
        ]

    def random_keys(self, name: str, share: float) -> list[list[float]]:
        """As many key tokens per rejected response as the method takes, at random places."""
        lengths = [len(row["rejected"]) for row in self.encoded(name, self.train)]
        counts = [max(1, round(share * length)) for length in lengths]
        return [
            self._shuffled([1.0] * count + [0.0] * (length - count), "learning", i)
            for i, (count, length) in enumerate(zip(counts, lengths, strict=True))
        ]

    def _shuffled(self, values: list[float], purpose: str, number: int) -> list[float]:
        run = [self.replicate] if self.replicate else []
        seed = derive(self.seed, "random tokens", purpose, number, *run)
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
        return torch.tensor(values)[order].tolist()


# --- masks: where they lie, and how far two agree ------------------------------------------------


def where_kept(mask: NeuronMask) -> tuple[np.ndarray, list[str], list[str]]:
    """Share of kept entries by layer (rows) and module (columns); NaN where there is no tensor.

    Tensors outside the layers (embeddings, last norm) form the row "model", before layer 0.
    """
    rows = []
    for name, shape in mask.shapes.items():
        before, _, inside = name.partition(".layers.")
        number, *path = (inside or before).removesuffix(".weight").split(".")
        layer = int(number) if inside else -1
        rows.append((layer, (path or [number])[-1], mask.indices[name].numel(), prod(shape)))
    table = pd.DataFrame(rows, columns=["layer", "module", "kept", "total"])
    modules = list(dict.fromkeys(table["module"]))
    sums = table.groupby(["layer", "module"])[["kept", "total"]].sum()
    shares = (sums["kept"] / sums["total"]).unstack().reindex(columns=modules)
    layers = ["model" if layer < 0 else f"layer {layer}" for layer in shares.index]
    return shares.to_numpy(), layers, modules


def chance_within(one: NeuronMask, other: NeuronMask) -> float:
    """Expected overlap of masks that keep as much of every tensor as these, at random places."""
    common = sum(
        one.indices[name].numel() * other.indices[name].numel() / prod(shape)
        for name, shape in one.shapes.items()
    )
    return common / (one.kept + other.kept - common)


# --- tokens --------------------------------------------------------------------------------------


def separation(study, name: str, quality: str, split: str = "heldout") -> dict[str, float]:
    """How well 1 - p_t of a reward model finds the wrong decisions that the generator knows.

    `auc`: probability that a wrong decision gets a lower p_t than another token; `selected`: share
    of tokens with p_t < 0.5; `found`: share of the wrong decisions among those selected.
    """
    rows = study.keep_probabilities(name, split, quality), study.oracle_tokens(name, split)
    values, wrong = (np.concatenate([np.array(row) for row in of_all]) for of_all in rows)
    wrong = wrong.astype(bool)
    auc = mannwhitneyu(-values[wrong], -values[~wrong]).statistic / (wrong.sum() * (~wrong).sum())
    selected = values < study.profile.method.token_threshold
    return {
        "reward model": quality,
        "auc": float(auc),
        "selected": float(selected.mean()),
        "found": float(selected[wrong].mean()),
    }


def reward_points(study, name: str, found: dict[str, dict]) -> list[tuple]:
    """(label, area under the ROC curve, score, standard error) of those of REWARD_MODELS.

    Empty where no generator knows the wrong tokens. The oracle's area is 1 by construction.
    """
    if not hasattr(study.task(name), "wrong_tokens"):
        return []
    points = []
    for row, (quality, label) in REWARD_MODELS.items():
        if row in found:
            oracle = quality == "oracle"
            area = 1.0 if oracle else separation(study, name, quality)["auc"]
            points.append((label, area, *scoring.score_of(found[row])))
    return points
