"""What an `align` will take, told before the model is loaded: the pairs, the steps, the bytes on
each device and the time.

Parameters are counted on the meta device from the model's config. Bytes are those of `footprint`,
with all pairs of a pass as long as the longest; on several devices each holds its part of weights,
gradients and optimizer state (FSDP2), its pairs' activations, and one layer whole. Time is counted
operations over a rate that is stated: 2 for every weight of a matrix product and token it is
applied to, 4 for every two tokens of a row and unit of width in attention; backward takes twice as
many, activations that are made again once more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM

from allo_lib.alignment import TRAINED, AlignConfig
from allo_lib.data.preferences import SIDES, Encoded
from allo_lib.engine.batching import shared_length
from allo_lib.engine.trainer import Schedule
from allo_lib.errors import AlloError
from allo_lib.study.footprint import Counted, Footprint, count

DEVICES = (1, 2, 8)
_COLOURS = {"prompt": "\x1b[2m", "chosen": "\x1b[32m", "rejected": "\x1b[31m", "end": "\x1b[1;33m"}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Stage:
    """One pass over rows. tokens: read, all epochs together; steps: of the optimizer, 0 for a pass
    without gradients."""

    name: str
    rows: int
    steps: int
    tokens: int
    flops: float


@dataclass(frozen=True)
class Shape:
    """Counts of a model: its parameters, those of its largest layer, those whose product with a
    token every token takes (`body`), or only one before a judged token (`head`), and the width of
    attention summed over layers."""

    parameters: int
    layer: int
    body: int
    head: int
    attention: int


def shape_of(config) -> Shape:
    """The counts of a causal language model's config; no weight is made."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise AlloError(f"the model is no causal language model ({reason}); give one") from error
    head = model.get_output_embeddings().weight
    embeddings = model.get_input_embeddings().weight
    experts = [getattr(config, key, None) for key in _EXPERTS]
    of_all = next(filter(None, experts), 1)
    active = (getattr(config, "num_experts_per_tok", None) or of_all) / of_all
    body = 0.0
    for name, value in model.named_parameters():
        if value.ndim > 1 and value is not head and value is not embeddings:
            body += value.numel() * (active if ".experts." in name else 1)
    layers = next((part for part in model.modules() if isinstance(part, torch.nn.ModuleList)), ())
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        sum(p.numel() for p in model.parameters()),
        max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0),
        round(body),
        head.numel(),
        config.num_attention_heads * width * config.num_hidden_layers,
    )


def stages_of(parts: Sequence[Encoded], config: AlignConfig, stages, shape: Shape) -> list[Stage]:
    """All passes of `align`, in order; parts: pairs to train on, held-out and development ones."""
    given, held_out, development = parts
    pairs = [_pair(row) for row in given.rows]
    fitting = [row for row, one in zip(given.rows, given.corrections, strict=True) if one]
    corrections = [rows for rows in given.corrections if rows]
    back = 4 if config.gradient_checkpointing else 3
    found: list[Stage] = []

    def add(name: str, sizes, epochs: int = 0, times: int = 1) -> None:
        """A training of `epochs`, or for 0 one forward pass."""
        schedule = Schedule(0.0, epochs or 1, config.batch_size, 0, max_steps=config.max_steps)
        steps = schedule.steps(len(sizes))
        part = min(epochs, steps * config.batch_size / len(sizes)) if epochs else 1
        tokens = sum(tokens for tokens, _ in sizes)
        flops = sum(
            2 * tokens * shape.body + 2 * judged * shape.head + 4 * tokens**2 * shape.attention
            for tokens, judged in sizes
        )
        found.append(
            Stage(
                name if times == 1 else f"{name} x {times}",
                len(sizes),
                steps * times if epochs else 0,
                round(part * tokens * times),
                part * flops * times * (back if epochs else 1),
            )
        )

    others = [_pair(row) for row in (*held_out.rows, *development.rows)]
    add("reference", pairs + others)
    if "importance" in stages:
        add("importance", pairs, config.epochs if config.estimator == "delta" else 1)
    if "forgetting" in stages:
        add("reward model", [_row(learnt) for learnt, _ in corrections], config.epochs)
        add("token rewards", [_row(read) for _, read in corrections])
        rejected = [_row({"prompt": r["prompt"], "response": r["rejected"]}) for r in fitting]
        add("forgetting", rejected, config.epochs, config.search)
    if "learning" in stages:
        if "forgetting" in stages:
            add("its reference", pairs, times=config.search)
        add("learning", pairs, config.epochs, config.search)
    if others and not set(TRAINED).isdisjoint(stages):
        sizes = [_pair(row) for row in held_out.rows]
        add("ranking", sizes + config.search * [_pair(row) for row in development.rows])
    return found


def _pair(row: dict) -> tuple[int, int]:
    """(tokens read, tokens judged) of a pair, what its replies share counted once."""
    judged = len(row["chosen"]) + len(row["rejected"])
    judged -= shared_length(row["chosen"], row["rejected"])
    return len(row["prompt"]) + judged, judged


def _row(row: dict) -> tuple[int, int]:
    return len(row["prompt"]) + len(row["response"]), len(row["response"])


def memory(
    model_config, shape: Shape, given: Encoded, config: AlignConfig, stages, dtype, devices: int
) -> dict[str, float]:
    """Bytes on each of `devices`, by stage, when most are in use."""
    # Each part apart, so that no batch is larger.
    longest = {key: max(len(row[key]) for row in given.rows) for key in ("prompt", *SIDES)}
    response = max(longest[side] for side in SIDES)
    pairs = -(-config.batch_size // (config.accumulation * devices))
    sizes = longest["prompt"], response, pairs
    counted = _counted(model_config, sizes, dtype, config.gradient_checkpointing)

    def on_each(one: Footprint, more: float = 0) -> float:
        """What is sharded, what is not, and a layer's weights and gradients in one piece."""
        gathered = 2 * shape.layer * dtype.itemsize if devices > 1 else 0
        sharded = one.weights + one.state + one.gradient + more
        return sharded / devices + one.activations + one.logits + gathered

    dense, kept = counted.footprint(1.0), counted.footprint(config.share)
    scores = 4 * shape.parameters  # float32
    found = {}
    if "importance" in stages and config.estimator == "delta":
        found["importance"] = on_each(dense, scores)
    elif "importance" in stages:
        found["importance"] = on_each(replace(kept, state=0))
    if "forgetting" in stages:
        found["reward model"] = on_each(dense if config.rewriter_neurons == "all" else kept)
    if not set(TRAINED).isdisjoint(stages):
        found["other stages"] = on_each(kept)
    return found


def _counted(model_config, sizes, dtype, recomputed: bool) -> Counted:
    try:
        return count(model_config, *sizes, dtype, recomputed)
    except (AlloError, RuntimeError):
        # Products with experts have shapes without values in bfloat16 alone.
        try:
            found = count(model_config, *sizes, torch.bfloat16, recomputed)
        except (AlloError, RuntimeError) as error:
            raise AlloError(
                "the bytes of this model cannot be counted without its weights; leave out --dry-run"
            ) from error
        activations = found.activations * dtype.itemsize // 2
        return replace(found, activations=activations, dtype=dtype)


def advice(peak, config: AlignConfig, limit: float) -> str:
    """What to change so that `peak` (settings -> bytes on one device) fits into `limit` bytes."""
    leaner = {"estimator": "gradient", "rewriter_neurons": "kept",
              "accumulation": config.batch_size, "gradient_checkpointing": True}  # fmt: skip
    changes: dict = {}
    for key, value in leaner.items():
        changes |= {key: value} if getattr(config, key) != value else {}
        if peak(replace(config, **changes)) <= limit:
            told = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
            return f"it fits with {told}"
    return "more devices, a smaller max_length or share, or a smaller model"


def shown_pair(tokenizer, row: dict, colour: bool) -> list[str]:
    """A pair as the model reads it, its tokens apart by `|`, a part a line; whatever is no
    printable character is shown as a sign."""
    end = {side: row[side][-1:] for side in SIDES}
    parts = [("prompt", row["prompt"])]
    for side in SIDES:
        parts += [(side, row[side][:-1]), ("end", end[side])]
    lines = []
    for name, ids in parts:
        texts = ("".join(_sign(c) for c in tokenizer.decode([token])) for token in ids)
        line = f"{name:>8} {'|'.join(texts)}"
        lines.append(f"{_COLOURS[name]}{line}\x1b[0m" if colour else line)
    return lines


def _sign(character: str) -> str:
    return character if character.isprintable() else "\u21b5" if character == "\n" else "\ufffd"


def describe(tokenizer, model_config, parts, config: AlignConfig, stages, dtype, limit: float,
             rate: float, colour: bool = False) -> str:  # fmt: skip
    """The plan as text. limit: bytes of a device; rate: its operations a second."""
    shape = shape_of(model_config)
    passes = stages_of(parts, config, stages, shape)
    lines = [f"first pair (number {parts[0].numbers[0]}) as the model reads it:"]
    lines += shown_pair(tokenizer, parts[0].rows[0], colour)
    lines += ["", f"{'pass':<18}{'rows':>8}{'steps':>8}{'tokens':>12}{'TFLOP':>12}"]
    for one in passes:
        steps, operations = one.steps or "", f"{one.flops / 1e12:.4g}"
        lines.append(f"{one.name:<18}{one.rows:>8}{steps:>8}{one.tokens:>12}{operations:>12}")
    flops = sum(one.flops for one in passes)

    def peak(settings: AlignConfig, devices: int = 1) -> dict[str, float]:
        return memory(model_config, shape, parts[0], settings, stages, dtype, devices)

    lines += ["", f"{shape.parameters:,} parameters, {dtype}; GB on each device, which has "
              f"{limit / 1e9:.1f}, and hours at {rate:.3g} FLOP/s each"]  # fmt: skip
    for devices in DEVICES:
        by_stage = peak(config, devices)
        told = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in by_stage.items())
        fits = "" if max(by_stage.values()) <= limit else " (DOES NOT FIT)"
        time = flops / rate / devices / 3600
        lines.append(f"{devices} device{'s' * (devices > 1)}: {told}{fits}; {time:.3g} h")
    if max(peak(config).values()) > limit:
        told = advice(lambda settings: max(peak(settings).values()), config, limit)
        lines.append(f"to fit on one: {told}")
    return "\n".join(lines)
