"""The key tokens of a study: its rewriting reward models, and the weights they give to tokens."""

from functools import lru_cache
from pathlib import Path

import torch

from allo_lib.allo import token_weights
from allo_lib.engine import rewriter
from allo_lib.engine.store import Artifact, write_json
from allo_lib.errors import AlloError
from allo_lib.machine import weights
from allo_lib.method import tokens
from allo_lib.profiles.methods import Stage
from allo_lib.seeds import derive


class KeyTokenWeights:
    """The part of `study.Study` that makes and keeps reward models and token weights."""

    def reward_model(self, name: str, quality: str = "trained") -> Artifact:
        """Weights of the rewriting reward model; "untrained" is the SFT model itself."""
        if quality == "untrained":
            return self.sft(name)
        inputs = self.inputs(name, "rewriter", "max_length") | {
            "pairs": self.pairs(name).key,
            "quality": quality,
        }
        make = lambda folder: self._make_reward_model(name, quality, folder)  # noqa: E731
        return self._kept("reward_model", inputs, make, name)

    def _make_reward_model(self, name: str, quality: str, folder: Path) -> None:
        domain, pairs = self.domain(name), self.pairs(name)
        examples = pairs.corrections("mask")[: domain.rewriter.examples]
        label = f"{name}, reward model ({quality})"
        rows = rewriter.training_rows(
            self.tokenizer, examples, quality, derive(self.seed, label), self.plain
        )
        self.load_sft(name)
        begun = self.checkpoints(folder, "rewriter")
        log = self._supervise(rows, domain.rewriter, label, self.context, begun)
        weights.save(self.model, folder / "model.safetensors")
        record = {"loss": log.loss, "examples": len(rows), "tokens": log.tokens}
        write_json(folder / "record.json", record)

    @lru_cache
    def keep_probabilities(self, name: str, split: str, quality: str = "trained"):
        """p_t of each token of each rejected response of a split; list of lists in [0, 1]."""
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
        rows = self.encoded(name, split)
        if stage.tokens == "all":
            return [[1.0] * len(row["rejected"]) for row in rows]
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
        task, questions = self.task(name), self.pair_questions(name)
        if not hasattr(task, "wrong_tokens"):
            raise AlloError(f"{name}: only the generator of the miniature knows wrong tokens")
        return [
            [float(x) for x in task.wrong_tokens(questions[row["id"]], row["rejected"])] + [0.0]
            for row in self.pairs(name).rows[split]
        ]

    def _shuffled(self, values: list[float], purpose: str, number: int) -> list[float]:
        run = [self.replicate] if self.replicate else []
        seed = derive(self.seed, "random tokens", purpose, number, *run)
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
        return torch.tensor(values)[order].tolist()

    def random_keys(self, name: str, share: float) -> list[list[float]]:
        """As many key tokens per rejected response as the method takes, at random places."""
        counts = [
            (max(1, round(share * len(r["rejected"]))), r) for r in self.encoded(name, self.train)
        ]
        ones = [[1.0] * n + [0.0] * (len(row["rejected"]) - n) for n, row in counts]
        return [self._shuffled(values, "learning", i) for i, values in enumerate(ones)]
