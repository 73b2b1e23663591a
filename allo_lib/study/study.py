"""One study: a profile, a seed, and everything that its methods share, made once and kept.

SFT model, preference pairs, reference log-probs, and what says which neurons and tokens matter
(`importance`) are artifacts of the store; `training` trains the methods on them.
"""

import contextlib
import copy
import os
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from allo_lib.allo import run_stage
from allo_lib.data import miniature
from allo_lib.data.benchmarks import data_hash, load_rows
from allo_lib.data.pairs import Pairs, make_pairs, train_split
from allo_lib.data.tasks import Miniature, RealQuestions
from allo_lib.engine import models, reference
from allo_lib.engine.encoding import encode_demonstration, encode_pairs, encode_response
from allo_lib.engine.forward import pair_logps
from allo_lib.engine.generation import generate
from allo_lib.engine.store import Artifact, Store, partial_of, write_json
from allo_lib.engine.trainer import Checkpoints, Schedule
from allo_lib.errors import AlloError
from allo_lib.machine import runtime, weights
from allo_lib.machine.environment import device_name
from allo_lib.machine.runtime import make_deterministic
from allo_lib.profiles.config import Domain, Profile
from allo_lib.profiles.profile_files import load_profile
from allo_lib.seeds import derive
from allo_lib.study import manifest, scoring
from allo_lib.study.importance import Importance

# Raised when the meaning of a stage changes, so that artifacts of the old meaning are not used.
VERSION = 4


class Study(Importance):
    """Settings and shared artifacts of one seed. Open it with `Study.open`.

    `replicate` numbers its runs on one SFT model (`at`): `pair_set` says which of the profile's
    pair sets it is trained on and `order` in which order; `train` and `wrong` name the splits of
    its training pairs and of all wrong samples of its share of the questions.
    """

    def __init__(self, profile: Profile, seed: int, results_dir: Path, data_dir: str | None = None):
        self.profile, self.seed = profile, seed
        self._set_replicate(0)
        self._replicates = {0: self}
        self.results_dir, self.data_dir = Path(results_dir), data_dir
        self.store = Store(self.results_dir / manifest.STORE)
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
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise AlloError(f"seed is {seed!r}, expected a whole number from 0")
        loaded = load_profile(profile, overrides)
        root = Path(__file__).resolve().parents[2]
        folder = Path(results_dir) if results_dir else root / "results" / loaded.name
        manifest.check_folder(folder, loaded)
        if loaded.compute.workers > 1:
            runtime.start_early()
        return cls(loaded, seed, folder, os.environ.get("ALLO_DATA"))

    def at(self, replicate: int) -> "Study":
        """This study at another of its replicates: other training pairs, or in another order.

        Everything else, the live model among it, is the first one's own.
        """
        if replicate not in self._replicates:
            other = self._replicates[replicate] = copy.copy(self._replicates[0])
            other._set_replicate(replicate)
        return self._replicates[replicate]

    def _set_replicate(self, replicate: int) -> None:
        self.replicate = replicate
        self.pair_set, self.order = divmod(replicate, self.profile.replicates.orders)
        self.train = train_split(self.pair_set)
        self.wrong = self.train.replace("train", "wrong")  # all wrong samples of its questions

    @property
    def replicates(self) -> range:
        """Numbers of the runs of every method on this study's SFT model."""
        settings = self.profile.replicates
        return range(settings.pair_sets * settings.orders)

    def replicates_of(self, method: str) -> range:
        """Those that a method is run on: all, or the first alone."""
        return range(1) if method in self.profile.replicates.once else self.replicates

    @property
    def dtype(self) -> str:
        """Dtype of the weights on this machine."""
        return models.dtype_on(self.device, self.profile.model.dtype)

    # --- models ------------------------------------------------------------------------------

    @cached_property
    def _loaded(self) -> tuple:
        """The live model, its tokenizer, which weights it began with, and these on the CPU."""
        if self.replicate:
            return self.at(0)._loaded
        name = self.profile.model.name
        if name == "micro":
            model, tokenizer = self._new_model()
            note = {"name": name, "source": "trained from scratch in 00_setup"}
        else:
            model, tokenizer, note = models.load(name, dtype=self.dtype, device=self.device)
        for known in manifest.noted(self.results_dir)["weights"]:
            for key in ("sha256", "dtype"):
                was, now = known.get(key), note.get(key)
                if known.get("name") == name and was and now and was != now:
                    raise AlloError(
                        f"{self.results_dir} holds results of {name} with {key} {was}, this run's "
                        f"is {now}; name another results folder"
                    )
        manifest.leave(self.store, manifest.WEIGHTS, note)
        return model, tokenizer, note, weights.snapshot(model, "cpu")

    def _new_model(self):
        """The miniature's model, untrained, and its tokenizer."""
        settings, tokenizer = self.profile.model, miniature.tokenizer()
        sizes = ("width", "layers", "heads", "feed_forward", "context", "initializer_range")
        model = models.micro_llama(
            len(tokenizer),
            architecture=settings.architectures[self.seed % len(settings.architectures)],
            **{size: getattr(settings, size) for size in sizes},
            seed=derive(self.seed, "weights"),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return model.to(self.device, models.DTYPES[self.dtype]), tokenizer

    @property
    def model(self):
        """The one live model; its weights are those last loaded into it."""
        return self._loaded[0]

    @property
    def tokenizer(self):
        """The model's tokenizer."""
        return self._loaded[1]

    @property
    def weights_note(self) -> dict:
        """Which weights the study started from."""
        return self._loaded[2]

    def _kept(self, kind: str, inputs: dict, make, name: str = "") -> Artifact:
        """An artifact whose making uses the live model, which has its weights back afterwards.

        Artifacts are made when they are first asked for, and that may be in the middle of a
        training or an evaluation. name: the domain of weights of which the manifest has to tell
        when they were lost and made again with other bits.
        """
        threads = torch.get_num_threads()

        def make_and_restore(folder: Path) -> None:
            live = weights.snapshot(self.model)
            # What was lost may be made again where torch has another number, which changes bits.
            same = torch.get_num_threads() == threads
            try:
                with contextlib.nullcontext() if same else runtime.torch_threads(threads):
                    make(folder)
            finally:
                weights.restore(self.model, live)

        def changed() -> None:
            if name:
                note = f"{manifest.AGAIN}seed{self.seed}.{name}.{kind}"
                manifest.leave(self.store, note, device_name(self.device))

        return self.store.get(kind, inputs, make_and_restore, changed)

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
        if domain.kind == "miniature":
            return Miniature(domain, self.seed)
        return RealQuestions(domain, self.seed, self.data_dir)

    @property
    def plain(self) -> bool:
        """Whether texts are the miniature's words, for which no headings exist."""
        return self.profile.model.name == "micro"

    def inputs(self, name: str, *fields: str) -> dict:
        """What every artifact of a domain depends on, and the named fields of its settings."""
        settings, domain = self.profile.to_dict(), self.domain(name)
        dealt = {}
        if domain.kind == "questions":  # of a file each split gets so many, and so those ones
            dealt = {"dealt": [domain.sft.examples, domain.pairs.questions, domain.dev]}
        # Later versions of what is done with loaded models and with their answers.
        read = {} if self.plain else {"version": 2}
        return {
            "version": VERSION,
            "seed": self.seed,
            "model": settings["model"] | {"dtype": self.dtype} | read,
            "datasets": settings["domains"][name]["datasets"],
            "kind": settings["domains"][name]["kind"],
            "data": self._data_hash(name),
            "threads": [self.profile.compute.threads, self.profile.compute.method_threads],
            "device": self.device,
            "max_grad_norm": self.profile.method.max_grad_norm,
            **dealt,
            **{field: settings["domains"][name][field] for field in fields},
        }

    @lru_cache
    def _data_hash(self, name: str) -> str:
        domain = self.domain(name)
        if domain.kind == "miniature":
            return "generated"
        parts = {(d, s): load_rows(d, s, self.data_dir) for d in domain.datasets
                 for s in ("train", "test")}  # fmt: skip
        manifest.leave_data(self.store, self.results_dir, name, {
            f"{dataset}/{split}": {"rows": len(rows), "sha256": data_hash(rows)}
            for (dataset, split), rows in parts.items()
        })  # fmt: skip
        return data_hash([row for rows in parts.values() for row in rows])

    # --- supervised start --------------------------------------------------------------------

    def sft(self, name: str) -> Artifact:
        """Weights of the SFT model: the starting point theta of everything else."""
        inputs = self.inputs(name, "pretrain", "sft", "explain", "max_length")
        return self._kept("sft", inputs, lambda folder: self._make_sft(name, folder), name)

    def load_sft(self, name: str):
        """The live model with the SFT weights, in eval mode."""
        return self.load(self.sft(name))

    def load(self, artifact: Artifact):
        """The live model with the weights of an artifact, in eval mode."""
        weights.restore(self.model, weights.read_tensors(artifact.file("model.safetensors")))
        return self.model.eval()

    def _make_sft(self, name: str, folder: Path) -> None:
        domain, record = self.domain(name), {}
        weights.restore(self.model, self._loaded[3])
        for phase in ("pretrain", "sft"):
            settings = getattr(domain, phase)
            if not settings.examples:
                continue
            task = self.task(name)
            questions = task.questions("sft", settings.examples, settings.mix)
            texts = [(one.prompt, task.demonstration(one, settings)) for one in questions]
            rows = [encode_demonstration(self.tokenizer, *text) for text in texts]
            label, begun = f"{name}, {phase}", self.checkpoints(folder, phase)
            log = self._supervise(rows, settings, label, domain.max_length, begun)
            long = sum(sum(map(len, row.values())) > domain.max_length for row in rows)
            record[phase] = {"loss": log.loss, "seconds": log.seconds, "left_out": long}
        weights.save(self.model, folder / "model.safetensors")
        write_json(folder / "record.json", record)

    def checkpoints(self, folder: Path, stage: str) -> Checkpoints:
        """Where one training stage of the artifact that is made in `folder` goes on from."""
        return Checkpoints(partial_of(folder) / stage, self.profile.compute.checkpoint_minutes)

    def _supervise(self, rows, settings, label: str, max_length: int, checkpoints: Checkpoints):
        rows = [r for r in rows if len(r["prompt"]) + len(r["response"]) <= max_length]
        rate, seed = settings.learning_rate, derive(self.seed, label)
        return run_stage(
            self.model,
            rows,
            "sft",
            Schedule(rate, settings.epochs, settings.batch_size, seed),
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
            inputs["one_per"] = "conversation of both files"
            if not getattr(self.tokenizer, "chat_template", None):
                inputs["one_per"] += ", told by its first turn"
        if self.profile.replicates.pair_sets > 1:
            inputs["pair_sets"] = self.profile.replicates.pair_sets
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
        inputs = {"pairs": pairs.key, "split": split, "sft": self.sft(name).key}

        def make(folder: Path) -> None:
            reference.write(self.logps(self.load_sft(name), rows), folder / "logps.safetensors")

        artifact = self._kept("reference", inputs, make)
        return reference.attach(rows, artifact.file("logps.safetensors"))

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
        domain = self.domain(name)

        def make(folder: Path) -> None:
            questions = self.task(name).questions(split, getattr(domain, split))
            groups = generate(
                self.load_sft(name),
                self.tokenizer,
                [question.prompt for question in questions],
                max_new_tokens=domain.max_new_tokens,
                batch_size=self.profile.compute.generation_batch,
            )
            ids = [(encode_response(self.tokenizer, one.text), one.ended) for (one,) in groups]
            # A response that was cut off has no end token to begin from.
            drafts = [row if ended else row[:-1] for row, ended in ids]
            write_json(folder / "drafts.json", drafts)

        return self._kept("drafts", inputs, make).json("drafts.json")

    @lru_cache
    def replies(self, name: str) -> list[list]:
        """The SFT model's replies to a domain's instructions (rows of `scoring.reply`)."""
        inputs = self.inputs(name) | {"sft": self.sft(name).key}
        inputs |= scoring.instruction_inputs(self, name)

        def make(folder: Path) -> None:
            replies = scoring.reply(self, name, self.load_sft(name))
            write_json(folder / "replies.json", replies)

        return self._kept("replies", inputs, make).json("replies.json")

    @property
    def context(self) -> int:
        """Most tokens that a row may have under the model."""
        return self.model.config.max_position_embeddings
