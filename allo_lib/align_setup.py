"""What a user gives to `align`: settings, stages, pairs and a model, checked before anything runs;
and how the model is given back as it was found."""

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from types import NoneType
from typing import Annotated, Literal

import torch
from pydantic import Field

from allo_lib.data.preferences import Encoded, read_pairs
from allo_lib.engine import models
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
_NONE = torch.empty(0)
_QUANTISED = "is quantised", "load its weights in float32 or bfloat16, or call dequantize()"


# --- settings ---


@dataclass(frozen=True)
class AlignConfig:
    """Settings of `align`; learning rates are the ones to search, on data held out for it.

    With estimator "gradient" and rewriter_neurons "kept" no part needs dense optimizer state, which
    is what keeps a large model from fitting one device.
    """

    __pydantic_config__ = STRICT

    share: Share = 0.1  # of all neurons that are kept; paper: 10%
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
    accumulation: Positive = 1  # forward passes per step, of batch_size / accumulation pairs each
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
    if not isinstance(config, (AlignConfig, Mapping, NoneType)):
        raise AlloError(
            f"align: config is a {type(config).__name__}; expected an AlignConfig or a dict"
        )
    given = asdict(config) if isinstance(config, AlignConfig) else dict(config or {})
    config = check_settings(AlignConfig, given, "align")
    if config.batch_size % config.accumulation:
        raise AlloError(
            f"align: batch_size {config.batch_size} is no multiple of accumulation "
            f"{config.accumulation}; choose one that is"
        )
    return config


def chosen_stages(stages) -> tuple[str, ...]:
    """The stages in their order; AlloError for one that there is not."""
    given = [stages] if isinstance(stages, str) or not isinstance(stages, Iterable) else [*stages]
    unknown = [stage for stage in given if stage not in STAGES]
    if unknown or not given or isinstance(stages, str):
        raise AlloError(f"align: stages {stages!r} given; expected a tuple with some of {STAGES}")
    return tuple(stage for stage in STAGES if stage in given)


# --- pairs ---


def parts_of(pairs, tokenizer, context: int | None, config: AlignConfig, stages):
    """(pairs to train on, held-out ones, development ones), each `preferences.Encoded`.

    Raises:
        AlloError: what `read_pairs` raises, no pair left to train on, or to forget of.
    """
    given = read_pairs(tokenizer, pairs, context, config.max_length, config.overlong)
    seed = derive(config.seed, "held out")
    given, held_out = given.split(config.held_out, seed)
    searched = config.search > 1 and not set(TRAINED).isdisjoint(stages)
    given, development = given.split(config.development if searched else 0.0, seed)
    if not given.rows:
        raise AlloError(
            f"align: held_out and development leave none of the {given.count} pairs to train on; "
            "give more pairs, or smaller shares"
        )
    if "forgetting" in stages and not any(given.corrections):
        raise AlloError(
            f"align: no pair's prompt, chosen and rejected response fit into {given.longest} "
            "tokens together with either reply, as the rewriting reward model of the stage "
            "'forgetting' reads them; shorten the pairs or leave the stage out"
        )
    return given, held_out, development


def not_forgotten(given: Encoded) -> list[int]:
    """Numbers of the pairs that take no part in forgetting."""
    pairs = zip(given.numbers, given.corrections, strict=True)
    return [number for number, correction in pairs if correction is None]


def lines_about(given: Encoded, held_out: Encoded, development: Encoded, stages) -> list[str]:
    """What a user should know of the pairs."""
    overlong, unread = given.overlong, not_forgotten(given)
    told = []
    if overlong:
        some = ", ".join(map(str, overlong[:10])) + ", ..." * (len(overlong) > 10)
        told.append(
            f"align: {len(overlong)} of {given.count} pairs are longer than {given.longest} tokens "
            f"and dropped: numbers {some} (align.json lists them)"
        )
    if held_out.rows or development.rows:
        told.append(
            f"align: {len(given.rows)} pairs to train on, {len(held_out.rows)} held out, "
            f"{len(development.rows)} to choose rates by; no prompt is in two of them"
        )
    if unread and "forgetting" in stages:
        told.append(
            f"align: {len(unread)} pairs take no part in 'forgetting', as the reward model's row "
            "(prompt, both responses, and one of them again) does not fit"
        )
    if given.merged:
        told.append(
            f"align: in {given.merged} pairs the prompt's end is read otherwise before a reply "
            "than alone (tokens merge, or the template says so); the response begins there"
        )
    return told


# --- the model ---


def check_model(model) -> None:
    """AlloError, one line that says what to do, for a model that cannot be aligned as it is."""
    config = getattr(model, "config", None)
    inner = getattr(model, "module", None)
    if isinstance(inner, torch.nn.Module) and hasattr(inner, "config"):
        _refuse(f"is wrapped in {type(model).__name__}", "give the model itself, model.module")
    if hasattr(model, "peft_config"):
        _refuse("carries PEFT adapters", "give what model.merge_and_unload() returns")
    if getattr(model, "hf_quantizer", None) or getattr(model, "is_quantized", False):
        _refuse(*_QUANTISED)
    if config is not None:  # else `models.check_tokenizer` says what it is
        check_config(config, type(model).__name__)
    parameters = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    if any(value.is_meta for value in parameters):
        _refuse("lies partly on disk or nowhere", "load it without device_map and offloading")
    if len({value.device for value in parameters}) > 1:
        _refuse("is spread over several devices", "load it on one, without device_map")


def check_config(config, name: str) -> None:
    """The same of what the config of a model of class `name` tells."""
    if getattr(config, "quantization_config", None):
        _refuse(*_QUANTISED)
    text = getattr(config, "get_text_config", lambda: config)()
    if text is not config:
        _refuse(
            f"reads more than text ({name})",
            "give its language model alone, a ...ForCausalLM whose config is the text config",
        )
    if getattr(config, "is_encoder_decoder", False):
        _refuse("is an encoder with a decoder", "give a causal language model")
    coefficients = ("router_aux_loss_coef", "aux_loss_coef", "router_z_loss_coef")
    if getattr(config, "output_router_logits", False) and any(
        getattr(config, key, None) for key in coefficients
    ):
        _refuse(
            "adds a router loss to its own (output_router_logits), which ALLO's losses leave out",
            "set model.config.output_router_logits = False",
        )


def _refuse(what: str, instead: str) -> None:
    raise AlloError(f"align: the model {what}; {instead}")


def check_trainable(model, every: bool, max_length: int | None) -> None:
    """AlloError unless some parameter (`every`: all of them) is trainable, all are finite, and it
    is known how many tokens a row may have."""
    if not any(value.requires_grad for value in model.parameters()):
        raise AlloError(
            "align: every parameter of the model is frozen; expected some to train: call "
            "model.requires_grad_(True)"
        )
    models.check_finite(model)
    if context_of(model) is None and max_length is None:
        raise AlloError(
            "align: the model's config does not say how many tokens it reads; set "
            "model.config.max_position_embeddings"
        )
    for name, value in model.named_parameters():
        if every and not value.requires_grad:
            raise AlloError(
                f"align: {name} is frozen, but the scores of estimator 'delta' are of a run that "
                "trains every parameter: unfreeze it, or choose estimator 'gradient'"
            )


def context_of(model) -> int | None:
    """Tokens that the model reads at most, as its config says; None where it does not."""
    return getattr(model.config, "max_position_embeddings", None)


def several_gpus(device_type: str, count: int, environment=os.environ) -> str | None:
    """What to say where a call on a GPU sees others that it will not use; else None."""
    if device_type != "cuda" or count < 2 or "LOCAL_RANK" in environment:
        return None
    return (
        f"align: uses one of {count} visible GPUs; start it by `accelerate launch` to use all, or "
        "set CUDA_VISIBLE_DEVICES to the one to use"
    )


@contextlib.contextmanager
def as_found(model):
    """Within it no part drops out anything; afterwards modes and settings are as they were.

    DPO compares the policy with its reference: both must be the same function, so that the first
    loss is ln 2 (as TRL disables dropout). Parts read their rates from their own attributes or from
    their config. Kept besides: train or eval mode, `requires_grad`, and `use_cache`, which
    transformers' Trainer switches off.
    """
    modes = {part: part.training for part in model.modules()}
    trained = {value: value.requires_grad for value in model.parameters()}
    configs = {id(one): one for part in modes if (one := getattr(part, "config", None)) is not None}
    kept = [(model.config, "use_cache", getattr(model.config, "use_cache", None))]
    for owner in (*modes, *configs.values()):
        for key, value in list(vars(owner).items()):
            is_rate = "drop" in key or "jitter" in key or key == "p"  # that of nn.Dropout
            if is_rate and isinstance(value, float) and value > 0:
                kept.append((owner, key, value))
    try:
        for owner, key, _ in kept[1:]:
            setattr(owner, key, 0.0)
        yield
    finally:
        for owner, key, value in kept:
            if value is not None:
                setattr(owner, key, value)
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
    found = {}
    for name, value in model.named_parameters():
        flat = devices.local(value).flatten()
        if mask is not None:
            if not mask.indices.get(name, _NONE).numel():
                continue
            flat = flat[_places(mask, name, value)]
        found[name] = flat.to("cpu", copy=True)
    return found


@torch.no_grad()
def put(model, mask, values: dict[str, torch.Tensor]) -> None:
    """Write what `entries` of the same mask gave into the model."""
    for name, value in model.named_parameters():
        own = devices.local(value)
        if name in values and mask is None:
            own.copy_(values[name].view_as(own))
        elif name in values:
            own.view(-1)[_places(mask, name, value)] = values[name].to(own.device)


def _places(mask, name: str, value) -> torch.Tensor:
    return devices.held(mask.indices[name], value).to(value.device)


@contextlib.contextmanager
def recomputing(model, wanted: bool):
    """Within it backward makes activations again instead of keeping them, if that is `wanted`."""
    if not wanted or any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        yield
        return
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except (ValueError, AttributeError, NotImplementedError):
        _refuse("cannot make activations again", "leave gradient_checkpointing out")
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
