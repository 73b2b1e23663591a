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

from allo_lib import devices, models, rewriter, warning_signs
from allo_lib.checkpoints import Checkpoints
from allo_lib.config import fingerprint
from allo_lib.encoding import encode_text
from allo_lib.errors import AlloError
from allo_lib.forward import layout_of
from allo_lib.given_model import (
    as_found,
    check_model,
    check_trainable,
    context_of,
    several_gpus,
    undone_if_stopped,
    weights_back,
)
from allo_lib.importance import NeuronMask, count_ties, select_neurons
from allo_lib.preferences import SIDES, encode_preference, read_rows
from allo_lib.reference import rows_hash, weights_hash, with_reference
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
    "overlong": ("drop", "raise"),
}

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
    overlong: str = "drop"  # what becomes of pairs that are longer: "drop" or "raise"
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
        model: a causal language model of transformers. It comes back in the mode and with the
            settings it had; where the call is stopped or fails, with its weights too, so that the
            same call again gives what an unstopped one gives.
        tokenizer: its tokenizer, with pad and end tokens.
        pairs: a datasets.Dataset (or list of dicts) with TRL's columns prompt, chosen, rejected;
            strings or chat messages, with or without a prompt of its own (`preferences`). As no
            gold solution is known, the chosen response takes its place in the rewriting reward
            model. Pairs that are too long are dropped, those for which the reward model's row is
            take no part in forgetting; both are told and listed in `align.json`.
        stages: any of "importance", "forgetting", "learning", run in this order. Without
            "importance" every neuron is trained, or those of `mask.safetensors` in `output_dir`.
        config: an AlignConfig, or a dict of its fields.
        output_dir: gets the model and tokenizer (save_pretrained), `mask.safetensors`,
            `align.json` with settings and losses, and `.references`, the reference log-probs: a
            second call with the same weights and pairs reads them. While stages are trained
            `.checkpoints` holds what the same call, of the same weights, pairs and settings, goes
            on from if this one is stopped.

    Started by `accelerate launch`, several processes do it together (`devices`), each with the same
    arguments; the first one writes and prints. A sharded model comes back sharded, and the mask is
    that of this process's part.

    Raises:
        AlloError: unknown stage or setting, a model that cannot be aligned as it is
            (`given_model`), no pairs, missing columns, no pair that fits the model's context, a
            pair that cannot be encoded or whose responses are equal, a tokenizer without pad or end
            token, a loss that is not finite, or stages that changed no weight.
    """
    with devices.quiet():
        return _align(model, tokenizer, pairs, stages, config, output_dir)


def _align(model, tokenizer, pairs, stages, config, output_dir) -> AlignResult:
    folder = _folder(output_dir)
    run = _Run(model, tokenizer, _settings(config), _chosen_stages(stages), folder)
    run.read(pairs)
    run.output_dir.mkdir(parents=True, exist_ok=True)
    with as_found(model):
        mask = run.importance() if "importance" in run.stages else run.saved_mask()
    trains = "forgetting" in run.stages or "learning" in run.stages
    with undone_if_stopped(model, mask if trains else NeuronMask({}, {})) as changed:
        with as_found(model):
            if "forgetting" in run.stages:
                run.forgetting(mask)
            if "learning" in run.stages:
                run.learning(mask)
        if trains and not changed():
            raise AlloError(
                f"align: the stages changed no weight (in {model.dtype}); raise forgetting_rate "
                "and learning_rate, or load the model in a finer dtype"
            )
        run.save()
    run.forget_checkpoints()
    return AlignResult(model, mask, run.logs, run.output_dir)


class _Run:
    """What the stages of one call share."""

    def __init__(self, model, tokenizer, config: AlignConfig, stages, output_dir: Path):
        check_model(model)
        models.check_tokenizer(tokenizer, model)
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.stages, self.output_dir = stages, output_dir
        self.logs: dict[str, Log] = {}
        self.masters: dict = {}  # float32 values of kept entries, handed from stage to stage
        self.rows: list[dict] = []  # the pairs as token ids
        # Of each pair the rows of the reward model, to train it and to read it; None if too long.
        self.corrections: list[tuple[dict, dict] | None] = []
        self.left_out: dict[str, list[int]] = {"overlong": [], "not_forgotten": []}

    def read(self, pairs) -> None:
        """All that can be known before anything is trained: what fits, and what is told of it."""
        every = "importance" in self.stages and self.config.estimator == "delta"
        check_trainable(self.model, every, self.config.max_length)
        devices.start(self.model)
        lengths = (context_of(self.model), self.config.max_length)
        longest = min(length for length in lengths if length)
        given = read_rows(pairs)
        merged, too_long = 0, []
        for number, row in enumerate(given):
            place = f"align: pair {number}"
            pair = encode_preference(self.tokenizer, row, place)
            length = len(pair.ids["prompt"]) + max(len(pair.ids[side]) for side in SIDES)
            if length > longest:
                told = f"{place}: {length} tokens, but the longest row is {longest}; shorten the "
                too_long.append(AlloError(f"{told}prompt or leave the pair out"))
                self.left_out["overlong"].append(number)
                continue
            merged += pair.merged
            self.rows.append(pair.ids)
            self.corrections.append(self._correction(pair, context_of(self.model) or longest))
            if self.corrections[-1] is None:
                self.left_out["not_forgotten"].append(number)
        if too_long and (self.config.overlong == "raise" or not self.rows):
            raise too_long[0]
        self._tell(len(given), longest, merged)
        self._try_longest()
        settings = asdict(self.config) | {"checkpoint_minutes": None, "stages": self.stages}
        begins = [weights_hash(self.model), rows_hash(self.rows), settings]
        devices.agree(begins, "pairs or settings")
        self._begun = self.output_dir / ".checkpoints" / fingerprint(begins)[:24]

    def _correction(self, pair, longest: int) -> tuple[dict, dict] | None:
        """The rows by which the reward model learns of this pair and is asked about it."""
        heading = rewriter.heading(pair.texts["chosen"], pair.texts["rejected"])
        asked = pair.ids["prompt"] + encode_text(self.tokenizer, heading)
        if len(asked) + max(len(pair.ids[side]) for side in SIDES) > longest:
            return None
        learnt, read = ({"prompt": asked, "response": pair.ids[side]} for side in SIDES)
        return learnt, read

    def _tell(self, given: int, longest: int, merged: int) -> None:
        if "forgetting" in self.stages and not any(self.corrections):
            raise AlloError(
                f"align: no pair's prompt, chosen and rejected response fit into {longest} tokens "
                "together with either reply, as the rewriting reward model of the stage "
                "'forgetting' reads them; shorten the pairs or leave the stage out"
            )
        overlong, unread = (self.left_out[key] for key in ("overlong", "not_forgotten"))
        told = [several_gpus(self.model.device.type, torch.cuda.device_count())]
        if overlong:
            told.append(
                f"align: {len(overlong)} of {given} pairs are longer than {longest} tokens and "
                "dropped (align.json lists them)"
            )
        if unread and "forgetting" in self.stages:
            told.append(
                f"align: {len(unread)} pairs take no part in 'forgetting', as the reward model's "
                "row (prompt, both responses, and one of them again) does not fit"
            )
        if merged:
            told.append(
                f"align: in {merged} pairs the prompt's end is read otherwise before a reply than "
                "alone (tokens merge, or the template says so); the response begins there"
            )
        for line in filter(None, told):
            print(line, flush=True)

    def _try_longest(self) -> None:
        """Find how the model is read so that the longest pair has its own log-probs."""
        by_length = sorted(self.rows, key=lambda row: sum(map(len, row.values())))
        shortest, pair = by_length[0], by_length[-1]
        rows = [{"prompt": pair["prompt"], "response": pair[side]} for side in SIDES]
        rows.append({"prompt": shortest["prompt"], "response": shortest["chosen"]})
        layout_of(self.model, self.tokenizer.pad_token_id, rows)

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
        whole = mask.joined() if devices.is_sharded(next(self.model.parameters())) else mask
        if devices.rank() == 0:
            _warn(warning_signs.arbitrary_mask(**ties, kept=whole.kept, total=whole.total))
            whole.save(self.output_dir / "mask.safetensors")
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
        with weights_back(self.model):
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
        self.logs["importance"] = Log(loss=record["loss"])
        return scores

    def saved_mask(self) -> NeuronMask | None:
        path = self.output_dir / "mask.safetensors"
        if not path.is_file():
            return None
        mask = NeuronMask.load(path)
        mask.check(self.model)
        return mask.part_of(self.model)

    def forgetting(self, mask) -> None:
        pairs = zip(self._with_reference(), self.corrections, strict=True)
        rows = [row for row, correction in pairs if correction]
        for row, values in zip(rows, self._token_weights(mask), strict=True):
            row["rejected_weights"] = values
        rate = self.config.forgetting_rate
        self.logs["forgetting"] = self._train(rows, "forgetting", rate, mask, 0.03, self.masters)

    def learning(self, mask) -> None:
        rate = self.config.learning_rate
        rows = self._with_reference()
        self.logs["learning"] = self._train(rows, "learning", rate, mask, 0.1, self.masters)

    def save(self) -> None:
        weights = devices.whole_weights(self.model)
        if devices.rank() > 0:
            return
        self.model.save_pretrained(self.output_dir, state_dict=weights)
        self.tokenizer.save_pretrained(self.output_dir)
        losses = {stage: log.loss for stage, log in self.logs.items()}
        record = {"config": asdict(self.config), "left_out": self.left_out, "loss": losses}
        write_json(self.output_dir / "align.json", record)

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
        learnt, read = zip(*filter(None, self.corrections), strict=True)
        trained = mask if self.config.rewriter_neurons == "kept" else None
        rate, config = self.config.rewriter_rate, self.config
        with weights_back(self.model):
            self.logs["rewriter"] = self._train(list(learnt), "sft", rate, trained, 0.1)
            values = rewriter.probabilities(
                self.model, list(read), self.tokenizer.pad_token_id, config.forward_batch
            )
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
