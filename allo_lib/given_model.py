"""The model that a user gives: what can be aligned, and how it is given back as it was found."""

import contextlib
import os

import torch

from allo_lib import devices, models, weights
from allo_lib.errors import AlloError


def check_model(model) -> None:
    """AlloError, one line that says what to do, for a model that cannot be aligned as it is."""
    config = getattr(model, "config", None)
    inner = getattr(model, "module", None)
    if isinstance(inner, torch.nn.Module) and hasattr(inner, "config"):
        _refuse(f"is wrapped in {type(model).__name__}", "give the model itself, model.module")
    if hasattr(model, "peft_config"):
        _refuse("carries PEFT adapters", "give what model.merge_and_unload() returns")
    quantized = getattr(model, "hf_quantizer", None) or getattr(model, "is_quantized", False)
    if quantized or getattr(config, "quantization_config", None):
        _refuse("is quantised", "load its weights in float32 or bfloat16, or call dequantize()")
    parameters = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    if any(value.is_meta for value in parameters):
        _refuse("lies partly on disk or nowhere", "load it without device_map and offloading")
    if len({value.device for value in parameters}) > 1:
        _refuse("is spread over several devices", "load it on one, without device_map")
    if config is None:
        return  # `models.check_tokenizer` says what it is
    text = getattr(config, "get_text_config", lambda: config)()
    if text is not config:
        _refuse(
            f"reads more than text ({type(model).__name__})",
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

    Yields a function that tells whether any of them has another value by now.
    """
    before = {name: values.cpu().clone() for name, values in _kept(model, mask) if values.numel()}

    def changed() -> bool:
        found = any(
            not torch.equal(values.cpu(), before[name])
            for name, values in _kept(model, mask)
            if name in before
        )
        return bool(devices.total(torch.tensor(int(found)), devices.LARGEST))

    try:
        yield changed
    except BaseException:
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name in before:
                    own, old = devices.local(value), before[name].to(value.device)
                    if mask is None:
                        own.copy_(old.view_as(own))
                    else:
                        own.view(-1)[_places(mask, name, value)] = old
        raise


def _kept(model, mask):
    for name, value in model.named_parameters():
        flat = devices.local(value).flatten()
        if mask is None:
            yield name, flat
        elif name in mask.indices:
            yield name, flat[_places(mask, name, value)]


def _places(mask, name: str, value) -> torch.Tensor:
    return devices.held(mask.indices[name], value).to(value.device)
