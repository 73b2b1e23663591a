"""ALLO on your own model and your own preference pairs, in one call.

The stages are those of the study, by the same functions: importance (`warmup`), token rewards
(`rewriter`, `token_rewards`), forgetting and learning (`stages`).
"""

import contextlib
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType

import torch

from allo_lib import models, rewriter, warning_signs, weights
from allo_lib.checkpoints import Checkpoints
from allo_lib.config import fingerprint
from allo_lib.encoding import encode_pairs, special_tokens_in
from allo_lib.errors import AlloError
from allo_lib.importance import NeuronMask, count_ties, select_neurons
from allo_lib.reference import rows_hash, weights_hash, with_reference
from allo_lib.rewriter import Correction
from allo_lib.seeds import derive
from allo_lib.stages import run_stage
from allo_lib.store import Store, write_json
from allo_lib.token_rewards import RULES, unaligned_weights
from allo_lib.training import Log, Schedule
from allo_lib.warmup import delta_of_dpo, gradient_scores

STAGES = ("importance", "forgetting", "learning")
# Values of settings that are words, the default first.
CHOICES = {
    "estimator": ("delta", "gradient"),
    "rewriter_neurons": ("all", "kept"),
    "token_rule": RULES,
}
COLUMNS = ("prompt", "chosen", "rejected")

# What numbers among the settings may be; NaN is above and below nothing.
_NUMBER = (int, float)
_RATE = (_NUMBER, "a finite number above 0", lambda value: 0 < value < math.inf)
_SHARE = (_NUMBER, "a number above 0 and at most 1", lambda value: 0 < value <= 1)
_COUNT = (int, "a whole number of at least 1", lambda value: value >= 1)
_LIMITS = {
    "share": _SHARE,
    "importance_rate": _RATE,
    "forgetting_rate": _RATE,
    "learning_rate": _RATE,
    "rewriter_rate": _RATE,
    "beta": _RATE,
    "key_share": _SHARE,
    "token_threshold": (_NUMBER, "a number from 0 to 1", lambda value: 0 <= value <= 1),
    "batch_size": _COUNT,
    "epochs": _COUNT,
    "forward_batch": _COUNT,
    "max_length": _COUNT,
    "max_grad_norm": _RATE,
    "seed": (int, "a whole number of at least 0", lambda value: value >= 0),
    "checkpoint_minutes": (_NUMBER, "a number of at least 0", lambda value: value >= 0),
}
_MAY_BE_NONE = ("max_length", "max_grad_norm")
_EXPECTED = (
    "expected one split of a datasets.Dataset, or a list of dicts, with the columns "
    + ", ".join(COLUMNS)
)


@dataclass(frozen=True)
class AlignConfig:
    """Settings of `align`; learning rates are the ones to search, on data held out for it.

    With estimator "gradient" and rewriter_neurons "kept" no part needs dense optimizer state, which
    is what keeps a large model from fitting one device.
    """

    share: float = 0.1  # of all neurons that are kept; paper: 10%
    # Scores: "delta" (|theta' - theta| / lr of a DPO run on all neurons; official code), or
    # "gradient" (sum of |dL/dtheta| over the pairs, no update made).
    estimator: str = "delta"
    importance_rate: float = 1e-6  # of the warm-up; official code
    forgetting_rate: float = 5e-7  # official code; try larger ones, see 01_importance
    learning_rate: float = 5e-6  # official code
    rewriter_rate: float = 1e-5  # of the reward model's training
    rewriter_neurons: str = "all"  # that it trains: "all", or those "kept" by the mask
    beta: float = 0.1
    key_share: float = 0.2  # epsilon of the learning stage
    token_rule: str = "threshold"  # see token_rewards.unaligned_weights
    token_threshold: float = 0.5
    batch_size: int = 16  # pairs per step; official code: 128
    epochs: int = 1  # of every stage
    forward_batch: int = 8  # rows of a forward pass without gradients
    max_length: int | None = None  # tokens of a row; None is the model's context
    max_grad_norm: float = 1.0
    seed: int = 0
    # Of training, between two checkpoints that the same call goes on from if stopped; 0: none.
    checkpoint_minutes: float = 5.0


@dataclass
class AlignResult:
    """The aligned model (the one given, changed in place), its mask, and the log of each stage."""

    model: torch.nn.Module
    mask: NeuronMask | None
    logs: dict[str, Log] = field(default_factory=dict)
    output_dir: Path | None = None


def align(
    model, tokenizer, pairs, *, stages=STAGES, config: AlignConfig | dict | None = None, output_dir
) -> AlignResult:
    """Align `model` in place by ALLO and save it.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, with pad and end tokens.
        pairs: a datasets.Dataset (or list of dicts) with TRL's columns prompt, chosen, rejected;
            strings or chat messages. As no gold solution is known, the chosen response takes its
            place in the rewriting reward model.
        stages: any of "importance", "forgetting", "learning", run in this order. Without
            "importance" every neuron is trained, or those of `mask.safetensors` in `output_dir`.
        config: an AlignConfig, or a dict of its fields.
        output_dir: gets the model and tokenizer (save_pretrained), `mask.safetensors`,
            `align.json` with settings and losses, and `.references`, the reference log-probs: a
            second call with the same weights and pairs reads them. While stages are trained
            `.checkpoints` holds what the same call, of the same weights, pairs and settings, goes
            on from if this one is stopped.

    Raises:
        AlloError: unknown stage or setting, no pairs, missing columns, a pair that does not fit the
            model's context or whose responses are equal, a tokenizer without pad or end token, or a
            loss that is not finite.
    """
    folder = _folder(output_dir)
    run = _Run(model, tokenizer, _settings(config), _chosen_stages(stages), folder)
    run.read(pairs)
    run.output_dir.mkdir(parents=True, exist_ok=True)
    mask = run.importance() if "importance" in run.stages else run.saved_mask()
    if "forgetting" in run.stages:
        run.forgetting(mask)
    if "learning" in run.stages:
        run.learning(mask)
    run.save()
    run.forget_checkpoints()
    return AlignResult(model, mask, run.logs, run.output_dir)


class _Run:
    """What the stages of one call share."""

    def __init__(self, model, tokenizer, config: AlignConfig, stages, output_dir: Path):
        models.check_tokenizer(tokenizer, model)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.stages, self.output_dir = stages, output_dir
        self.logs: dict[str, Log] = {}
        self.masters: dict = {}  # float32 values of kept entries, handed from stage to stage

    def read(self, pairs) -> None:
        _check_model(self.model)
        if "importance" in self.stages and self.config.estimator == "delta":
            _check_unfrozen(self.model)
        rows = _rows(pairs)
        for number, row in enumerate(rows):
            _check_pair(self.tokenizer, row, f"align: pair {number}")
        context = self.model.config.max_position_embeddings
        longest = min(self.config.max_length or context, context)
        self.texts, self.rows = rows, encode_pairs(self.tokenizer, rows, longest)
        settings = asdict(self.config) | {"checkpoint_minutes": None, "stages": self.stages}
        begins = [weights_hash(self.model), rows_hash(self.rows), settings]
        self._begun = self.output_dir / ".checkpoints" / fingerprint(begins)[:24]

    def checkpoints(self, stage: str) -> Checkpoints:
        """Where a stage of this very call goes on from."""
        return Checkpoints(self._begun / stage, self.config.checkpoint_minutes)

    def forget_checkpoints(self) -> None:
        """All stages are saved: nothing will go on from them."""
        shutil.rmtree(self._begun, ignore_errors=True)
        with contextlib.suppress(OSError):  # another call's may be there
            self._begun.parent.rmdir()

    def importance(self) -> NeuronMask:
        scores = self._scores()
        mask = select_neurons(scores, self.config.share)
        ties = count_ties(scores, mask)
        _warn(warning_signs.arbitrary_mask(**ties, kept=mask.kept, total=mask.total))
        mask.save(self.output_dir / "mask.safetensors")
        return mask

    def _scores(self) -> dict[str, torch.Tensor]:
        config = self.config
        common = {
            "beta": config.beta,
            "batch_size": config.batch_size,
            "seed": derive(config.seed, "importance"),
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        rows = self._with_reference()
        if config.estimator == "gradient":
            self.logs["importance"] = Log()
            return gradient_scores(self.model, rows, **common)
        start = weights.snapshot(self.model, "cpu")
        scores, record = delta_of_dpo(
            self.model,
            rows,
            lr=config.importance_rate,
            epochs=config.epochs,
            label="importance",
            clip=config.max_grad_norm,
            checkpoints=self.checkpoints("importance"),
            **common,
        )
        weights.restore(self.model, start)
        self.logs["importance"] = Log(loss=record["loss"])
        return scores

    def saved_mask(self) -> NeuronMask | None:
        path = self.output_dir / "mask.safetensors"
        if not path.is_file():
            return None
        mask = NeuronMask.load(path)
        mask.check(self.model)
        return mask

    def forgetting(self, mask) -> None:
        rows = self._with_reference()
        for row, values in zip(rows, self._token_weights(mask), strict=True):
            row["rejected_weights"] = values
        rate = self.config.forgetting_rate
        self.logs["forgetting"] = self._train(rows, "forgetting", rate, mask, 0.03, self.masters)

    def learning(self, mask) -> None:
        rate = self.config.learning_rate
        rows = self._with_reference()
        self.logs["learning"] = self._train(rows, "learning", rate, mask, 0.1, self.masters)

    def save(self) -> None:
        self.model.save_pretrained(self.output_dir)
        self.tokenizer.save_pretrained(self.output_dir)
        losses = {stage: log.loss for stage, log in self.logs.items()}
        write_json(self.output_dir / "align.json", {"config": asdict(self.config), "loss": losses})

    def _train(self, rows, name: str, rate: float, mask, warmup: float, masters=None) -> Log:
        """Train one stage; it starts from `masters` where given and leaves its own there."""
        config = self.config
        seed = derive(config.seed, name)
        return run_stage(
            self.model,
            rows,
            name,
            Schedule(rate, config.epochs, config.batch_size, seed, warmup),
            pad_token_id=self.tokenizer.pad_token_id,
            mask=mask,
            beta=config.beta,
            key_share=config.key_share,
            max_grad_norm=config.max_grad_norm,
            label=name,
            masters=masters,
            checkpoints=self.checkpoints(name),
        )

    def _with_reference(self) -> list[dict]:
        """The pairs with the log-probs of the model as it stands: each stage's own reference."""
        return with_reference(
            self.model,
            self.rows,
            pad_token_id=self.tokenizer.pad_token_id,
            batch_size=self.config.forward_batch,
            store=Store(self.output_dir / ".references"),
        )

    def _token_weights(self, mask) -> list[list[float]]:
        """Train the rewriter from the model's weights, read its probabilities, put them back."""
        start, tokenizer = weights.snapshot(self.model, "cpu"), self.tokenizer
        examples = [
            Correction(
                row["prompt"], *(_reply(row[side]) for side in ("chosen", "rejected", "chosen"))
            )
            for row in self.texts
        ]
        rows = rewriter.training_rows(tokenizer, examples, "trained", self.config.seed, plain=False)
        context = self.model.config.max_position_embeddings
        rows = [row for row in rows if len(row["prompt"]) + len(row["response"]) <= context]
        trained = mask if self.config.rewriter_neurons == "kept" else None
        self.logs["rewriter"] = self._train(rows, "sft", self.config.rewriter_rate, trained, 0.1)
        values = rewriter.keep_probabilities(
            self.model, tokenizer, examples, self.config.forward_batch, plain=False
        )
        weights.restore(self.model, start)
        chosen = [self._weights_of(row) for row in values]
        _warn(warning_signs.no_choice_of_tokens(chosen))
        return chosen

    def _weights_of(self, probabilities: list[float]) -> list[float]:
        inside = torch.ones(1, len(probabilities), dtype=torch.bool)
        rule, threshold = self.config.token_rule, self.config.token_threshold
        return unaligned_weights(torch.tensor([probabilities]), inside, rule, threshold)[0].tolist()


def _warn(found: str | None) -> None:
    if found:
        print(f"warning: {found}", file=sys.stderr, flush=True)


def _reply(response) -> str:
    return response if isinstance(response, str) else response[-1]["content"]


def _check_model(model) -> None:
    if not any(value.requires_grad for value in model.parameters()):
        raise AlloError(
            "align: every parameter of the model is frozen; expected some to train: call "
            "model.requires_grad_(True)"
        )
    models.check_finite(model)
    if getattr(model.config, "max_position_embeddings", None) is None:
        raise AlloError(
            "align: the model's config does not say how many tokens it reads; set "
            "model.config.max_position_embeddings"
        )


def _check_unfrozen(model) -> None:
    for name, value in model.named_parameters():
        if not value.requires_grad:
            raise AlloError(
                f"align: {name} is frozen, but the scores of estimator 'delta' are of a run that "
                "trains every parameter: unfreeze it, or choose estimator 'gradient'"
            )


def _rows(pairs) -> list[dict]:
    """The pairs as dicts with the three columns; AlloError for anything else."""
    if not isinstance(pairs, Iterable):
        raise AlloError(f"align: pairs is a {type(pairs).__name__}; {_EXPECTED}")
    rows = list(pairs)
    if not rows:
        raise AlloError("align: no pairs were given; expected at least one")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            kind = type(row).__name__
            raise AlloError(f"align: pair {number} is a {kind}, not a dict; {_EXPECTED}")
        missing = [name for name in COLUMNS if name not in row]
        if missing:
            raise AlloError(
                f"align: pairs lack the column {missing[0]!r} (pair {number}); expected "
                f"{', '.join(COLUMNS)}"
            )
    return [dict(row) for row in rows]


def _check_pair(tokenizer, row: dict, place: str) -> None:
    """What the encoding of a pair would pass over, though it hardly is what its author meant."""
    for key in COLUMNS:
        if isinstance(row[key], str):
            found = special_tokens_in(tokenizer, row[key])
            if found:
                raise AlloError(
                    f"{place}: the {key} string contains the special token {found[0]!r}; give chat "
                    "messages, whose template writes such tokens and whose content is read as "
                    "plain text, or take it out"
                )
        elif key != "prompt" and isinstance(row[key], (list, tuple)) and len(row[key]) > 1:
            _check_repeats(row["prompt"], row[key][:-1], f"{place}: {key}")


def _check_repeats(prompt, before, place: str) -> None:
    """The last message is the reply; what stands before it may only be the prompt once more."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if [_turn(message) for message in before] != [_turn(message) for message in asked or []]:
        raise AlloError(
            f"{place} has {len(before)} messages before the reply that are not the prompt; put "
            "them into the prompt"
        )


def _turn(message):
    if not isinstance(message, dict):
        return message
    return message.get("role"), message.get("content")


def _settings(config) -> AlignConfig:
    if not isinstance(config, AlignConfig):
        if not isinstance(config, (Mapping, NoneType)):
            raise AlloError(
                f"align: config is a {type(config).__name__}; expected an AlignConfig or a dict"
            )
        known = AlignConfig.__dataclass_fields__
        unknown = sorted(str(key) for key in set(config or {}) - set(known))
        if unknown:
            raise AlloError(f"align: unknown setting {unknown[0]!r}; expected {', '.join(known)}")
        config = AlignConfig(**(config or {}))
    for key, allowed in CHOICES.items():
        if getattr(config, key) not in allowed:
            raise AlloError(
                f"align: {key} is {getattr(config, key)!r}; expected one of {', '.join(allowed)}"
            )
    for key, (kind, expected, fits) in _LIMITS.items():
        value = getattr(config, key)
        if value is None and key in _MAY_BE_NONE:
            continue
        if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
            raise AlloError(f"align: {key} is {value!r}; expected {expected}")
    return config


def _folder(output_dir) -> Path:
    if not isinstance(output_dir, (str, os.PathLike)) or not str(output_dir):
        raise AlloError(f"align: output_dir is {output_dir!r}; name the folder to write to")
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise AlloError(f"align: output_dir {output_dir} is a file; name a folder")
    return Path(output_dir)


def _chosen_stages(stages) -> tuple[str, ...]:
    given = [stages] if isinstance(stages, str) or not isinstance(stages, Iterable) else [*stages]
    unknown = [stage for stage in given if stage not in STAGES]
    if unknown or not given or isinstance(stages, str):
        raise AlloError(f"align: stages {stages!r} given; expected a tuple with some of {STAGES}")
    return tuple(stage for stage in STAGES if stage in given)
