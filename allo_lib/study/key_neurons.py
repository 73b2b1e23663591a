"""The key neurons of a study: importance scores of every entry, and the masks that keep some."""

from pathlib import Path

from allo_lib.allo import delta_of_dpo, find_neurons, gradient_scores
from allo_lib.engine.store import Artifact, write_json
from allo_lib.machine import weights
from allo_lib.method import neurons
from allo_lib.method.neurons import NeuronMask
from allo_lib.seeds import derive
from allo_lib.study import score_variants


class KeyNeurons:
    """The part of `study.Study` that makes and keeps scores and masks."""

    def scores(self, name: str, variant: str = "delta") -> Artifact:
        """Importance scores of every entry (`scores.safetensors`) and a record of the warm-up.

        Variants: "delta" (|theta' - theta| / lr after one epoch of DPO at a small rate), "gradient"
        (sum of |dL/dtheta| over batches, no update made), "magnitude" (|theta|), and those of
        `score_variants`, which change the warm-up of "delta". AlloError for any other.
        """
        score_variants.check(variant, self.domain(name).datasets)
        inputs = self.inputs(name, "rates", "batch_size", "max_length") | {
            "pairs": self.pairs(name).key,
            "variant": variant,
            "method": [self.profile.method.beta, self.profile.method.warmup_rate_factor],
        }
        make = lambda folder: self._make_scores(name, variant, folder)  # noqa: E731
        return self._kept("scores", inputs, make, name)

    def _make_scores(self, name: str, variant: str, folder: Path) -> None:
        datasets = [row["dataset"] for row in self.pairs(name).rows["mask"]]
        rows = score_variants.pairs_of(variant, self.encoded(name, "mask"), datasets)
        model, record, method = self.load_sft(name), {}, self.profile.method
        domain = self.domain(name)
        rate = domain.rates.dense * method.warmup_rate_factor
        common = {
            "beta": method.beta,
            "batch_size": domain.batch_size,
            "seed": derive(self.seed, "warm-up", name, "second" if variant == "order" else "first"),
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        if variant == "magnitude":
            scores = {n: p.detach().float().abs() for n, p in model.named_parameters()}
        elif variant == "gradient":
            scores = gradient_scores(model, rows, **common)
        else:
            scores, record = delta_of_dpo(
                model,
                rows,
                lr=score_variants.warmup_rate(variant, rate),
                epochs=score_variants.warmup_epochs(variant),
                label=f"{name}, importance ({variant})",
                clip=method.max_grad_norm,
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
