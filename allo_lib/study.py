"""One study: a profile, a seed, and everything that its methods share, made once and kept.

SFT model, preference pairs, reference log-probs, importance scores, masks and token weights are
artifacts of the store; `arms` trains the methods on them.
"""

import os
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from allo_lib import (
    importance,
    instructions,
    models,
    notes,
    reference,
    rewriter,
    score_variants,
    token_rewards,
    weights,
    workers,
)
from allo_lib.checkpoints import Checkpoints
from allo_lib.config import Domain, Profile
from allo_lib.encoding import encode_pairs, encode_prompt, encode_response
from allo_lib.errors import AlloError
from allo_lib.forward import pair_logps
from allo_lib.generation import generate
from allo_lib.importance import NeuronMask
from allo_lib.methods import Stage
from allo_lib.pairs import Pairs, make_pairs
from allo_lib.profile_files import load_profile
from allo_lib.runtime import make_deterministic
from allo_lib.seeds import derive
from allo_lib.stages import run_stage
from allo_lib.store import Artifact, Store, partial_of, write_json
from allo_lib.tasks import open_task
from allo_lib.training import Schedule
from allo_lib.warmup import delta_of_dpo, gradient_scores, warmup_seed

STORE = ".store"
# Raised when the meaning of a stage changes, so that artifacts of the old meaning are not used.
VERSION = 3


class Study:
    """Settings and shared artifacts of one seed. Open it with `Study.open`."""

    def __init__(self, profile: Profile, seed: int, results_dir: Path, data_dir: str | None = None):
        self.profile, self.seed = profile, seed
        self.results_dir, self.data_dir = Path(results_dir), data_dir
        self.store = Store(self.results_dir / STORE)
        self.device = "cuda" if profile.size == "gpu" else "cpu"
        make_deterministic(self.device)
        if profile.compute.threads:
            torch.set_num_threads(profile.compute.threads)

    @classmethod
    def open(cls, profile: str, seed: int = 0, results_dir: str = "", overrides=None) -> "Study":
        """The study of a profile (name or YAML path); results go to `results/<profile>` by default.

        Raises:
            AlloError: unknown profile or key, a bad value, or a results folder that another
                profile filled.
        """
        from allo_lib.results import check_folder

        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise AlloError(f"seed is {seed!r}, expected a whole number from 0")
        loaded = load_profile(profile, overrides)
        root = Path(__file__).resolve().parent.parent
        folder = Path(results_dir) if results_dir else root / "results" / loaded.name
        check_folder(folder, loaded)
        if loaded.compute.workers > 1:
            workers.start_early()
        return cls(loaded, seed, folder, os.environ.get("ALLO_DATA"))

    @property
    def dtype(self) -> str:
        """Dtype of the weights on this machine."""
        return models.dtype_on(self.device, self.profile.model.dtype)

    # --- models ------------------------------------------------------------------------------

    @cached_property
    def _loaded(self):
        settings = self.profile.model
        if settings.name != "micro":
            model, tokenizer, note = models.load(
                settings.name, dtype=self.dtype, device=self.device
            )
            self._note_weights(note)
            return model, tokenizer, note
        from allo_lib import miniature

        tokenizer = miniature.tokenizer()
        model = models.micro_llama(
            len(tokenizer),
            width=settings.width,
            layers=settings.layers,
            heads=settings.heads,
            feed_forward=settings.feed_forward,
            context=settings.context,
            initializer_range=settings.initializer_range,
            seed=derive(self.seed, "weights"),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        note = {"name": "micro", "source": "trained from scratch in 00_setup"}
        self._note_weights(note)
        return model.to(self.device, models.DTYPES[self.dtype]), tokenizer, note

    def _note_weights(self, note: dict) -> None:
        """Leave for the manifest which weights the study started from."""
        notes.leave(self.store.folder, notes.WEIGHTS, note)

    @property
    def model(self):
        """The one live model; its weights are those last loaded into it."""
        self._initial  # noqa: B018  (taken before anything else is loaded into the model)
        return self._loaded[0]

    @property
    def tokenizer(self):
        """The model's tokenizer."""
        return self._loaded[1]

    @property
    def weights_note(self) -> dict:
        """Which weights the study started from."""
        return self._loaded[2]

    @cached_property
    def _initial(self) -> dict[str, torch.Tensor]:
        """The weights as they were loaded, on the CPU."""
        return weights.snapshot(self._loaded[0], "cpu")

    def _kept(self, kind: str, inputs: dict, make) -> Artifact:
        """An artifact whose making uses the live model, which has its weights back afterwards.

        Artifacts are made when they are first asked for, and that may be in the middle of a
        training or an evaluation.
        """

        def make_and_restore(folder: Path) -> None:
            live = weights.snapshot(self.model)
            try:
                make(folder)
            finally:
                weights.restore(self.model, live)

        return self.store.get(kind, inputs, make_and_restore)

    def domain(self, name: str) -> Domain:
        """Settings of a domain; AlloError for an unknown name."""
        if name not in self.profile.domains:
            known = ", ".join(self.profile.domains)
            raise AlloError(f"domain {name!r} is not in {self.profile.name}; expected {known}")
        return self.profile.domains[name]

    @lru_cache
    def task(self, name: str):
        """Questions of a domain; None where pairs are given and nothing is answered."""
        domain = self.domain(name)
        if domain.kind == "preferences":
            return None
        return open_task(domain, self.seed, self.data_dir)

    @property
    def plain(self) -> bool:
        """Whether texts are the miniature's words, for which no headings exist."""
        return self.profile.model.name == "micro"

    def inputs(self, name: str, *fields: str) -> dict:
        """What every artifact of a domain depends on, and the named fields of its settings."""
        settings = self.profile.to_dict()
        return {
            "version": VERSION,
            "seed": self.seed,
            "model": settings["model"] | {"dtype": self.dtype},
            "datasets": settings["domains"][name]["datasets"],
            "kind": settings["domains"][name]["kind"],
            "data": self._data_hash(name),
            "threads": [self.profile.compute.threads, self.profile.compute.method_threads],
            "device": self.device,
            "max_grad_norm": self.profile.method.max_grad_norm,
        } | {field: settings["domains"][name][field] for field in fields}

    @lru_cache
    def _data_hash(self, name: str) -> str:
        domain = self.domain(name)
        if domain.kind == "miniature":
            return "generated"
        from allo_lib import realdata

        parts = {(d, s): realdata.load_rows(d, s, self.data_dir) for d in domain.datasets
                 for s in ("train", "test")}  # fmt: skip
        notes.leave(self.store.folder, f"{notes.DATA}{name}", {
            f"{dataset}/{split}": {"rows": len(rows), "sha256": realdata.data_hash(rows)}
            for (dataset, split), rows in parts.items()
        })  # fmt: skip
        return realdata.data_hash([row for rows in parts.values() for row in rows])

    # --- supervised start --------------------------------------------------------------------

    def sft(self, name: str) -> Artifact:
        """Weights of the SFT model: the starting point theta of everything else."""
        inputs = self.inputs(name, "pretrain", "sft", "explain", "max_length")
        return self._kept("sft", inputs, lambda folder: self._make_sft(name, folder))

    def load_sft(self, name: str):
        """The live model with the SFT weights, in eval mode."""
        return self.load(self.sft(name))

    def load(self, artifact: Artifact):
        """The live model with the weights of an artifact, in eval mode."""
        weights.restore(self.model, weights.read_tensors(artifact.file("model.safetensors")))
        return self.model.eval()

    def _make_sft(self, name: str, folder: Path) -> None:
        domain, record = self.domain(name), {}
        weights.restore(self.model, self._initial)
        for phase in ("pretrain", "sft"):
            settings = getattr(domain, phase)
            if not settings.examples:
                continue
            rows = self._demonstrations(name, settings)
            label, begun = f"{name}, {phase}", self.checkpoints(folder, phase)
            log = self._supervise(rows, settings, label, domain.max_length, begun)
            record[phase] = {"loss": log.loss, "seconds": log.seconds, "tokens": log.tokens,
                             "watch": log.metrics}  # fmt: skip
        weights.save(self.model, folder / "model.safetensors")
        write_json(folder / "record.json", record)

    def _demonstrations(self, name: str, settings) -> list[dict]:
        task = self.task(name)
        return [
            {
                "prompt": encode_prompt(self.tokenizer, question.prompt),
                "response": encode_response(self.tokenizer, task.demonstration(question, settings)),
            }
            for question in task.questions("sft", settings.examples, settings.mix)
        ]

    def checkpoints(self, folder: Path, stage: str) -> Checkpoints:
        """Where one training stage of the artifact that is made in `folder` goes on from."""
        return Checkpoints(partial_of(folder) / stage, self.profile.compute.checkpoint_minutes)

    def _supervise(self, rows, settings, label: str, max_length: int, checkpoints: Checkpoints):
        rows = [r for r in rows if len(r["prompt"]) + len(r["response"]) <= max_length]
        schedule = Schedule(
            settings.learning_rate, settings.epochs, settings.batch_size, derive(self.seed, label)
        )
        return run_stage(
            self.model,
            rows,
            "sft",
            schedule,
            pad_token_id=self.tokenizer.pad_token_id,
            betas=(0.9, settings.beta2),
            max_grad_norm=self.profile.method.max_grad_norm,
            label=label,
            checkpoints=checkpoints,
        )

    # --- pairs -------------------------------------------------------------------------------

    @lru_cache
    def pairs(self, name: str) -> Pairs:
        """The preference pairs of a domain by split, with what is known of where they came from."""
        fields = ("pairs", "max_new_tokens", "max_length", "explain")
        inputs = self.inputs(name, *fields) | {"sft": self.sft(name).key}
        if self.domain(name).kind == "preferences":
            inputs["one_per"] = "conversation"
        make = lambda folder: make_pairs(self, name).save(folder)  # noqa: E731
        return Pairs.load(self._kept("pairs", inputs, make))

    @lru_cache
    def pair_questions(self, name: str) -> dict:
        """id -> Question of the questions that pairs were sampled for."""
        questions = self.task(name).questions("pairs", self.domain(name).pairs.questions)
        return {question.id: question for question in questions}

    @lru_cache
    def encoded(self, name: str, split: str) -> list[dict]:
        """Pairs as token ids with the SFT model's log-probs: the reference, computed once.

        Keys: `prompt`, `chosen`, `rejected`, `chosen_reference`, `rejected_reference`.
        """
        pairs = self.pairs(name)
        rows = encode_pairs(self.tokenizer, pairs.rows[split], self.domain(name).max_length)
        artifact = self._kept(
            "reference",
            {"pairs": pairs.key, "split": split, "sft": self.sft(name).key},
            lambda folder: self._make_reference(name, rows, folder),
        )
        return reference.attach(rows, artifact.file("logps.safetensors"))

    def _make_reference(self, name: str, rows: list[dict], folder: Path) -> None:
        reference.write(self.logps(self.load_sft(name), rows), folder / "logps.safetensors")

    def logps(self, model, rows: list[dict]) -> list[dict]:
        """Per-token log-probs of encoded pairs under a model."""
        batch = self.profile.compute.forward_batch
        return pair_logps(model, rows, self.tokenizer.pad_token_id, batch)

    @lru_cache
    def drafts(self, name: str, split: str) -> list[list[int]]:
        """The SFT model's greedy responses to the problems of a split, as token ids.

        Trained models mostly write the same, so that their evaluation begins from these.
        """
        inputs = self.inputs(name, "max_new_tokens", "explain", split)
        inputs |= {"sft": self.sft(name).key, "split": split}
        make = lambda folder: self._make_drafts(name, split, folder)  # noqa: E731
        return self._kept("drafts", inputs, make).json("drafts.json")

    def _make_drafts(self, name: str, split: str, folder: Path) -> None:
        domain = self.domain(name)
        questions = self.task(name).questions(split, getattr(domain, split))
        groups = generate(
            self.load_sft(name),
            self.tokenizer,
            [question.prompt for question in questions],
            max_new_tokens=domain.max_new_tokens,
            batch_size=self.profile.compute.generation_batch,
        )
        # A response that was cut off has no end token to begin from.
        ids = [encode_response(self.tokenizer, one.text) for (one,) in groups]
        write_json(
            folder / "drafts.json",
            [row if one.ended else row[:-1] for row, (one,) in zip(ids, groups, strict=True)],
        )

    @lru_cache
    def replies(self, name: str) -> list[list]:
        """The SFT model's replies to a domain's instructions (rows of `instructions.reply`)."""
        inputs = self.inputs(name) | {"sft": self.sft(name).key} | instructions.inputs(self, name)

        def make(folder: Path) -> None:
            given = instructions.reply(self, name, self.load_sft(name))
            write_json(folder / "replies.json", given)

        return self._kept("replies", inputs, make).json("replies.json")

    # --- importance --------------------------------------------------------------------------

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
        return self._kept("scores", inputs, make)

    def _make_scores(self, name: str, variant: str, folder: Path) -> None:
        datasets = [row["dataset"] for row in self.pairs(name).rows["mask"]]
        rows = score_variants.pairs_of(variant, self.encoded(name, "mask"), datasets)
        model, record, method = self.load_sft(name), {}, self.profile.method
        domain = self.domain(name)
        rate = domain.rates.dense * method.warmup_rate_factor
        common = {
            "beta": method.beta,
            "batch_size": domain.batch_size,
            "seed": warmup_seed(self.seed, name, variant),
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
        """The kept neurons of a domain (`importance.select_neurons`); written as safetensors."""
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

        return NeuronMask.load(self.store.get("mask", inputs, make).file("mask.safetensors"))

    def _make_mask(self, name, order, share, variant, granularity, scope, folder: Path) -> None:
        scores = weights.read_tensors(self.scores(name, variant).file("scores.safetensors"))
        mask = importance.select_neurons(
            scores,
            share,
            order=order,
            granularity=granularity,
            scope=scope,
            seed=derive(self.seed, "mask", name),
        )
        mask.save(folder / "mask.safetensors")
        # One threshold, at which scores can tie, is there only where all entries are ranked.
        ranked = granularity == "scalar" and scope == "global"
        record = importance.count_ties(scores, mask) if ranked else {}
        write_json(folder / "record.json", record | {"kept": mask.kept, "total": mask.total})

    # --- token rewards -----------------------------------------------------------------------

    def reward_model(self, name: str, quality: str = "trained") -> Artifact:
        """Weights of the rewriting reward model; "untrained" is the SFT model itself."""
        if quality == "untrained":
            return self.sft(name)
        inputs = self.inputs(name, "rewriter", "max_length") | {
            "pairs": self.pairs(name).key,
            "quality": quality,
        }
        make = lambda folder: self._make_reward_model(name, quality, folder)  # noqa: E731
        return self._kept("reward_model", inputs, make)

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

    @property
    def context(self) -> int:
        """Most tokens that a row may have under the model."""
        return self.model.config.max_position_embeddings

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
        """w_t of the rejected responses of the training pairs, by the stage's token rule."""
        rows = self.encoded(name, "train")
        if stage.tokens == "all":
            return [[1.0] * len(row["rejected"]) for row in rows]
        if stage.tokens == "oracle":
            return self.oracle_tokens(name, "train")
        chosen = [
            token_rewards.unaligned_weights(
                torch.tensor([values]),
                torch.ones(1, len(values), dtype=torch.bool),
                stage.rule,
                self.profile.method.token_threshold,
            )[0].tolist()
            for values in self.keep_probabilities(name, "train", stage.reward_model)
        ]
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
        seed = derive(self.seed, "random tokens", purpose, number)
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
        return torch.tensor(values)[order].tolist()

    def random_keys(self, name: str, share: float) -> list[list[float]]:
        """As many key tokens per rejected response as the method takes, at random places."""
        counts = [
            (max(1, round(share * len(r["rejected"]))), r) for r in self.encoded(name, "train")
        ]
        ones = [[1.0] * n + [0.0] * (len(row["rejected"]) - n) for n, row in counts]
        return [self._shuffled(values, "learning", i) for i, values in enumerate(ones)]
