"""What a user gives to `align`: settings, stages, pairs and a model, checked before anything runs;
and how the model is given back as it was found."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from allo_lib.data.preferences import Encoded, read_pairs
from allo_lib.engine import models
from allo_lib.engine.encoding import check_tokenizer
from allo_lib.errors import AlloError
from allo_lib.machine import devices
from allo_lib.profiles.config import (
    STRICT,
    BelowOne,
    Count,
    Flag,
    Fraction,
    Number,
    Positive,
    Rate,
    Share,
    check_settings,
)
from allo_lib.seeds import derive

STAGES = ("importance", "forgetting", "learning")
TRAINED = STAGES[1:]  # the stages whose rates are searched

# --- settings ---


@dataclass(frozen=True)
class AlignConfig:
    """Settings of `align`; learning rates are the ones to search, on data held out for it.

    With estimator "gradient" and rewriter_neurons "kept" no part needs dense optimizer state, which
    is what keeps a large model from fitting one device.
    """

    __pydantic_config__ = STRICT

    # Of all neurons, what stage "importance" keeps (paper: 10%); without it that of a saved mask
    # counts, and align.json tells it.
    share: Share = 0.1
    # Scores: "delta" (|theta' - theta| / lr of a DPO run on all neurons; official code), or
    # "gradient" (sum of |dL/dtheta| over the pairs, no update made).
    estimator: Literal["delta", "gradient"] = "delta"
    importance_rate: Rate = 1e-6  # of the warm-up; official code
    forgetting_rate: Rate = 5e-7  # official code; try larger ones, see 01_importance
    learning_rate: Rate = 5e-6  # official code
    rewriter_rate: Rate = 1e-5  # of the reward model's training
    # That it trains: all, or those kept by the mask.
    rewriter_neurons: Literal["all", "kept"] = "all"
    beta: Rate = 0.1
    key_share: Share = 0.2  # epsilon of the learning stage
    # See tokens.unaligned_weights.
    token_rule: Literal["threshold", "soft", "released"] = "threshold"
    token_threshold: Fraction = 0.5
    batch_size: Positive = 16  # pairs per step; official code: 128
    # Forward passes per step, of batch_size / accumulation pairs each; scores of estimator
    # "gradient" are sums over the passes.
    accumulation: Positive = 1
    gradient_checkpointing: Flag = False  # activations are made again in backward, not kept
    epochs: Positive = 1  # of every stage
    max_steps: Positive | None = None  # of every stage, at most
    # Share of the pairs, by prompt, that nothing is trained or chosen on: how many of them the
    # model ranks right before and after goes into align.json.
    held_out: BelowOne = 0.0
    # Candidates for the rates of forgetting and learning, a factor of 2 apart around the rates
    # given; that is kept which ranks most of another share of the pairs right. 1: no search.
    search: Positive = 1
    development: Annotated[BelowOne, Field(gt=0)] = 0.1  # that share, where there is a search
    forward_batch: Positive = 8  # rows of a forward pass without gradients
    max_length: Positive | None = None  # tokens of a row; None is the model's context
    overlong: Literal["drop", "raise"] = "drop"  # what becomes of pairs that are longer
    max_grad_norm: Rate | None = 1.0
    seed: Count = 0
    # Of training, between two checkpoints that the same call goes on from if stopped; 0: none.
    checkpoint_minutes: Number = 5.0


def checked(config) -> AlignConfig:
    """The settings; AlloError for an unknown name or a value out of range."""
    if isinstance(config, AlignConfig):
        config = asdict(config)
    if config is not None and not isinstance(config, Mapping):
        raise AlloError(
            f"align: config is a {type(config).__name__}; expected an AlignConfig or a dict"
        )
    config = check_settings(AlignConfig, dict(config or {}), "align")
    if config.batch_size % config.accumulation:
        raise AlloError(
            f"align: batch_size {config.batch_size} is no multiple of accumulation "
            f"{config.accumulation}; choose one that is"
        )
    return config


def chosen_stages(stages) -> tuple[str, ...]:
    """The stages in their order; AlloError for one that there is not."""
    if not isinstance(stages, (tuple, list)) or not stages or any(s not in STAGES for s in stages):
        raise AlloError(f"align: stages {stages!r} given; expected a tuple with some of {STAGES}")
    return tuple(stage for stage in STAGES if stage in stages)


def checked_folder(output_dir, model) -> Path:
    """The folder to write to; AlloError for anything but the path of one that is or can be, and for
    that of the model itself (or its name), which `delta` must find as it was."""
    if not isinstance(output_dir, (str, os.PathLike)) or not str(output_dir):
        raise AlloError(f"align: output_dir is {output_dir!r}; name the folder to write to")
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise AlloError(f"align: output_dir {output_dir} is a file; name a folder")
    name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
    if name and Path(output_dir).exists() and Path(output_dir).resolve() == Path(name).resolve():
        raise AlloError(f"align: output_dir {output_dir} is the model's own folder; name another")
    return Path(output_dir)


# --- pairs ---


def parts_of(pairs, tokenizer, model_config, config: AlignConfig, stages):
    """(pairs to train on, held-out ones, development ones), each `preferences.Encoded`.

    Raises:
        AlloError: what `read_pairs` raises, nothing says how many tokens a row may have, no pair
            is left to train on, or to forget of.
    """
    context = getattr(model_config, "max_position_embeddings", None)
    if context is None and config.max_length is None:
        raise AlloError(
            "align: the model's config does not say how many tokens it reads; set max_length"
        )
    train = read_pairs(tokenizer, pairs, context, config.max_length, config.overlong)
    seed = derive(config.seed, "held out")
    train, held_out = train.split(config.held_out, seed)
    searched = config.search > 1 and not set(TRAINED).isdisjoint(stages)
    train, development = train.split(config.development if searched else 0.0, seed)
    if not train.rows:
        raise AlloError(
            f"align: held_out and development leave none of the {train.count} pairs to train on; "
            "give more pairs, or smaller shares"
        )
    if "forgetting" in stages and not any(train.corrections):
        raise AlloError(
            f"align: no pair's prompt, chosen and rejected response fit into {train.longest} "
            "tokens together with either reply, as the rewriting reward model of the stage "
            "'forgetting' reads them; shorten the pairs or leave the stage out"
        )
    return train, held_out, development


def not_forgotten(train: Encoded) -> list[int]:
    """Numbers of the pairs that take no part in forgetting."""
    pairs = zip(train.numbers, train.corrections, strict=True)
    return [number for number, correction in pairs if correction is None]


def lines_about(train: Encoded, held_out: Encoded, development: Encoded, stages) -> list[str]:
    """What a user should know of the pairs."""
    overlong, unread = train.overlong, len(not_forgotten(train))
    some = ", ".join(map(str, overlong[:10])) + ", ..." * (len(overlong) > 10)
    lines = [
        (overlong,
         f"{len(overlong)} of {train.count} pairs are longer than {train.longest} tokens and "
         f"dropped: numbers {some} (align.json lists them)"),
        (held_out.rows or development.rows,
         f"{len(train.rows)} pairs to train on, {len(held_out.rows)} held out, "
         f"{len(development.rows)} to choose rates by; no prompt is in two of them"),
        (unread and "forgetting" in stages,
         f"{unread} pairs take no part in 'forgetting', as the reward model's row (prompt, both "
         "responses, and one of them again) does not fit"),
        (train.plain,
         f"{train.plain} pairs are strings, which are read as they stand, without the tokenizer's "
         "chat template; give lists of messages to align a chat model"),
        (train.merged,
         f"in {train.merged} pairs the prompt's end is read otherwise before a reply than alone "
         "(tokens merge, or the template says so); the response begins there"),
    ]  # fmt: skip
    return [f"align: {line}" for holds, line in lines if holds]


# --- the model ---


def check_model(model, tokenizer) -> None:
    """AlloError, one line that says what to do, for a model that cannot be aligned as it is, or
    not with this tokenizer."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    devices_of = {value.device for value in parameters}
    if hasattr(model, "peft_config"):
        raise _refused("carries PEFT adapters; give what model.merge_and_unload() returns")
    if hasattr(model, "config"):  # else `check_tokenizer` says what it is
        check_config(model.config, type(model).__name__)
    if len(devices_of) > 1 or torch.device("meta") in devices_of:
        raise _refused("lies on several devices, on disk or nowhere; load it without device_map")
    check_tokenizer(tokenizer, model)


def check_config(config, name: str) -> None:
    """The same of what the config of a model of class `name` tells."""
    losses = ("router_aux_loss_coef", "aux_loss_coef", "router_z_loss_coef")
    if getattr(config, "quantization_config", None):
        raise _refused(
            "is quantised; load its weights in float32 or bfloat16, or call dequantize()"
        )
    if getattr(config, "get_text_config", lambda: config)() is not config:
        raise _refused(
            f"reads more than text ({name}); give its language model alone, a ...ForCausalLM whose "
            "config is the text config"
        )
    if getattr(config, "output_router_logits", False) and any(
        getattr(config, key, None) for key in losses
    ):
        raise _refused(
            "adds a router loss to its own (output_router_logits), which ALLO's losses leave out; "
            "set model.config.output_router_logits = False"
        )


def _refused(why: str) -> AlloError:
    return AlloError(f"align: the model {why}")


def check_trainable(model, stages, config: AlignConfig) -> None:
    """AlloError unless some parameter is trainable (all of them, for scores by a DPO run), and all
    are finite."""
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    if len(frozen) == len(list(model.parameters())):
        raise AlloError(
            "align: every parameter of the model is frozen; expected some to train: call "
            "model.requires_grad_(True)"
        )
    if frozen and "importance" in stages and config.estimator == "delta":
        raise AlloError(
            f"align: {frozen[0]} is frozen, but the scores of estimator 'delta' are of a run that "
            "trains every parameter: unfreeze it, or choose estimator 'gradient'"
        )
    models.check_finite(model)


def other_gpus(model) -> list[str]:
    """A line about the GPUs that a call without a launcher sees and will not use, if there are."""
    count = torch.cuda.device_count()
    if model.device.type != "cuda" or count < 2 or "LOCAL_RANK" in os.environ:
        return []
    return [
        f"align: uses one of {count} visible GPUs; start it by `accelerate launch` to use all, or "
        "set CUDA_VISIBLE_DEVICES to the one to use"
    ]


# --- the model as it was found ---


@contextlib.contextmanager
def as_found(model):
    """Within it no part drops out anything; afterwards modes and settings are as they were.

    DPO compares the policy with its reference: both must be the same function, so that the first
    loss is ln 2 (as TRL disables dropout). Parts read their rates from their own attributes or from
    their config. Nor is any row of the embedding left without its gradient, as torch leaves that of
    `padding_idx`, which is the end token's where a model pads with it. Kept besides: train or eval
    mode, `requires_grad`, and `use_cache`, which transformers' Trainer switches off.
    """
    modes = {part: part.training for part in model.modules()}
    trained = {value: value.requires_grad for value in model.parameters()}
    use_cache = getattr(model.config, "use_cache", None)
    configs = {id(one): one for part in modes if (one := getattr(part, "config", None)) is not None}
    rates = [
        (owner, key, value)
        for owner in (*modes, *configs.values())
        for key, value in vars(owner).items()
        if "drop" in key or "jitter" in key or key == "p"  # that of nn.Dropout
        if isinstance(value, float) and value > 0
    ]
    read = model.get_input_embeddings()
    padding = getattr(read, "padding_idx", None)
    try:
        for owner, key, _ in rates:
            setattr(owner, key, 0.0)
        read.padding_idx = None
        yield
    finally:
        for owner, key, value in rates:
            setattr(owner, key, value)
        read.padding_idx = padding
        if use_cache is not None:
            model.config.use_cache = use_cache
        for part, mode in modes.items():
            part.training = mode
        for value, mode in trained.items():
            value.requires_grad_(mode)


@contextlib.contextmanager
def restored(model, mask=None, *, always: bool = False):
    """Gives the entries of `mask` (None: all) their values back where its block does not end, or
    `always`. Yields these values (`entries`)."""
    before, ended = entries(model, mask), False
    try:
        yield before
        ended = True
    finally:
        if always or not ended:
            put(model, mask, before)


def entries(model, mask=None) -> dict[str, torch.Tensor]:
    """name -> copy, flat and on the CPU, of the entries of `mask` (None: all) in that parameter."""
    return {name: own[at].to("cpu", copy=True) for name, own, at in _places(model, mask)}


@torch.no_grad()
def put(model, mask, values: dict[str, torch.Tensor]) -> None:
    """Write what `entries` of the same mask gave into the model."""
    for name, own, at in _places(model, mask):
        own[at] = values[name].to(own.device)


def _places(model, mask):
    """Of each parameter its name, this process's part of it, flat, and the places of the mask."""
    for name, value in model.named_parameters():
        own = devices.local(value).view(-1)
        if mask is None:
            yield name, own, slice(None)
        elif name in mask.indices and mask.indices[name].numel():
            yield name, own, devices.held(mask.indices[name], value).to(own.device)


@contextlib.contextmanager
def recomputing(model, wanted: bool):
    """Within it backward makes activations again instead of keeping them, if that is `wanted`."""
    if not wanted or any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        yield
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
