"""The model that a user gives: what can be aligned, and how it is given back as it was found."""

import contextlib
import os

import torch

from allo_lib.engine import models
from allo_lib.errors import AlloError
from allo_lib.machine import devices, weights

_NONE = torch.empty(0)
_QUANTISED = "is quantised", "load its weights in float32 or bfloat16, or call dequantize()"


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
def weights_back(model):
    """Gives the model its weights back at the end of its block, however that ends."""
    start = weights.snapshot(model, "cpu")
    try:
        yield
    finally:
        weights.restore(model, start)


@contextlib.contextmanager
def undone_if_stopped(model, mask=None):
    """Gives the entries of `mask` (None: all) their values back where its block does not end.

    Yields these values (`entries`).
    """
    before = entries(model, mask)
    try:
        yield before
    except BaseException:
        put(model, mask, before)
        raise


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
    if not wanted or getattr(model, "is_gradient_checkpointing", False):
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
