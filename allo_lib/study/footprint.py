"""Memory and time that a masked training takes, counted from a model's config: no weight is made.

Weights and optimizer state come from counts of parameters. Activations are what autograd keeps of a
forward pass of torch's fake tensors, which know shapes, dtypes and devices only, so that one
machine can tell what another needs. Operations are 2 for every weight and token that it is
multiplied with, backward twice as many (Kaplan et al. 2020, arXiv 2001.08361, section 2.1); the
products of attention, few at these lengths, are left out.

`of_known_models` is the table of 07_efficiency, with measurements where there is a GPU; `memory`
and `passes_of` are the plan of an `align`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, LlamaConfig

from allo_lib.align_setup import TRAINED, AlignConfig
from allo_lib.data.preferences import SIDES, Encoded
from allo_lib.engine.batching import Layout, pair_batch, shared_length
from allo_lib.engine.forward import ROUNDINGS, response_logps, rows_at_once, to_device
from allo_lib.engine.trainer import Schedule
from allo_lib.errors import AlloError
from allo_lib.method.neurons import NeuronMask
from allo_lib.study import efficiency
from allo_lib.study.timed_steps import OwnSteps

COLUMNS = (
    "model", "kept", "device", "estimated_bytes", "measured_peak_bytes", "ratio",
    "seconds_per_pair",
)  # fmt: skip
# Bytes by what they are for: of the kept entries index, master and two moments; gradients of the
# kept entries and the dense one of the largest tensor; what backward needs of the forward pass; the
# logits of one chunk of positions.
PARTS = ("weights", "state", "gradient", "activations", "logits")
# arXiv 2307.09288; vocabulary and untied head are the config's defaults
KNOWN = {
    "LLaMA 2 7B": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                              num_attention_heads=32),
    "LLaMA 2 13B": LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                               num_attention_heads=40),
}  # fmt: skip

# --- bytes of a step -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Parameters of a model, of its largest tensor, of its largest layer, and those that a token is
    multiplied with (`active`); rows of the head; tied: embeddings and head are one tensor."""

    parameters: int
    largest: int
    layer: int
    active: int
    vocabulary: int
    tied: bool


def shape_of(config) -> Shape:
    """The counts of a causal language model's config."""
    model = _model(config, torch.bfloat16, "meta")
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    layers = next((part for part in model.modules() if isinstance(part, torch.nn.ModuleList)), ())
    read = getattr(config, "num_experts_per_tok", None)  # experts are tensors of three dimensions
    active = sum(
        value.numel() * (read / value.shape[0] if read and value.ndim == 3 else 1)
        for value in model.parameters()
        if value.ndim > 1 and (value is head or value is not embeddings)
    )
    sizes = [value.numel() for value in model.parameters()]
    each = [sum(value.numel() for value in layer.parameters()) for layer in layers]
    tied = embeddings is head
    return Shape(sum(sizes), max(sizes), max(each, default=0), round(active), len(head), tied)


def footprint(config, share: float, prompt: int, response: int, pairs: int, dtype=torch.bfloat16):
    """Bytes of a masked stage's step on one device when most are in use, by `PARTS`.

    Args:
        config: of a transformers causal language model.
        share: of the neurons that are kept, scalar ones, 0 < share <= 1.
        prompt, response: tokens of a prompt, and of each of its two responses.
        pairs: in one forward pass; their reference log-probs are read from disk.
        dtype: of the weights and activations.
    """
    activations = activation_bytes(config, prompt, response, pairs, dtype)
    return _parts(shape_of(config), share, 2 * response * pairs, activations, dtype)


def _parts(shape: Shape, share: float, judged: int, activations: int, dtype) -> dict[str, int]:
    width, kept = dtype.itemsize, share * shape.parameters
    # A tensor kept whole needs no index, and in float32 its own storage is the master.
    state = 16 if share < 1 else 8 if dtype == torch.float32 else 12
    positions = min(judged, rows_at_once(shape.vocabulary))
    # As the head's product gives them, and in float32.
    logits = positions * shape.vocabulary * (4 if width == 4 else 4 + width)
    # Most is in use where backward begins, with all activations, or where it ends, with all
    # gradients of kept entries; that of the embeddings is the last.
    # The head's gradient is a sum of float32 where it has many parts.
    summed = 4 + width if width < 4 and judged > ROUNDINGS * positions else width
    begins = shape.largest * summed, activations, logits
    ends = 4 * kept + shape.largest * width
    if shape.tied:
        # The head's has waited for it, and their sum is a third before its entries are taken.
        ends += (2 * width - 4 * share) * shape.largest
    moment = max(begins, (ends, 0, 0), key=sum)
    parts = width * shape.parameters, state * kept, *moment
    return dict(zip(PARTS, map(round, parts), strict=True))


def activation_bytes(
    config, prompt: int, response: int, pairs: int, dtype, recomputed: bool = False
) -> int:
    """What autograd keeps of a forward pass over pairs, as `footprint` takes them.

    recomputed: of each layer only what it is given is kept (gradient checkpointing).
    """
    batch = pair_batch(_rows(prompt, response, pairs), Layout(0, True))
    with FakeTensorMode() as mode:
        batch = {key: mode.from_tensor(value) for key, value in batch.items()}
        # All layers are alike: models of one and of two tell what any number of them holds.
        first = saved_bytes(_model(_with_layers(config, 1), dtype, "cpu"), batch)
        if recomputed:  # of one layer at a time all is there
            each = batch["input_ids"].numel() * config.hidden_size * dtype.itemsize
        else:
            each = saved_bytes(_model(_with_layers(config, 2), dtype, "cpu"), batch) - first
    return first + (config.num_hidden_layers - 1) * each


def saved_bytes(model, batch) -> int:
    """Bytes of the storages that autograd keeps for backward of `response_logps`, each once; the
    model's own parameters and buffers are not counted."""
    own = {_storage(t) for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in own:
            # Held, so that no later tensor can get the same place while it is counted.
            kept[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = response_logps(model, to_device(batch, model))
    del logps
    return sum(storage.nbytes() for storage in kept.values())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _with_layers(config, layers: int):
    settings, depth = config.to_dict(), config.num_hidden_layers
    settings |= {
        k: v[:layers] for k, v in settings.items() if isinstance(v, list) and len(v) == depth
    }
    return type(config).from_dict(settings | {"num_hidden_layers": layers})


def _model(config, dtype, device: str):
    """Random weights that take `dtype` from the start: no copy of them in float32 is made."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.train()


def _rows(prompt: int, response: int, pairs: int) -> list[dict]:
    """Pairs of these lengths that share nothing but their prompts."""
    responses = {"chosen": [1] * response, "rejected": [2] * response}
    return [{"prompt": [3 + pair] + [1] * (prompt - 1)} | responses for pair in range(pairs)]


# --- known models --------------------------------------------------------------------------------


def of_known_models(shares, prompt: int, response: int, device: str = "cpu") -> list[dict]:
    """One row for each of `KNOWN` and each share, one pair at a time in bf16: `COLUMNS`, and the
    parts of the estimate.

    On a GPU random weights of that shape are trained for a few steps, each size in a process of its
    own: `measured_peak_bytes` and its ratio to the estimate. They are empty on a CPU, and with a
    printed line where the GPU has too little free memory.
    """
    rows = []
    for name, config in KNOWN.items():
        for share in shares:
            parts = footprint(config, share, prompt, response, pairs=1)
            row = dict.fromkeys(COLUMNS, "") | parts
            row |= {"model": name, "kept": share, "estimated_bytes": sum(parts.values())}
            if device != "cpu":
                row |= _measured(row, config, share, prompt, response)
            rows.append(row)
    return rows


def in_gigabytes(rows: list[dict]) -> list[dict]:
    """The rows of `of_known_models` for a reader: the parts, all of them, what was measured."""
    sizes = {part: part for part in PARTS}
    sizes |= {"all": "estimated_bytes", "measured": "measured_peak_bytes"}
    return [
        {key: row[key] for key in ("model", "kept")}
        | {name: row[key] and round(row[key] / 1e9, 2) for name, key in sizes.items()}
        | {key: row[key] for key in ("ratio", "seconds_per_pair", "device")}
        for row in rows
    ]


def _measured(row: dict, *shape) -> dict:
    """The columns of a GPU that has the memory; else the device's name alone."""
    free, needed = torch.cuda.mem_get_info()[0], row["estimated_bytes"]
    columns = {"device": efficiency.device_name("cuda")}
    try:
        if free < needed:
            raise AlloError(f"of its {needed / 1e9:.1f} GB {free / 1e9:.1f} are free")
        run = efficiency.in_own_process(train, *shape, "cuda")
    except AlloError as error:
        label = f"{row['model']}, {row['kept']:.0%} kept"
        print(f"{label}: not measured on {columns['device']}: {error}", flush=True)
        return columns
    return columns | {
        "measured_peak_bytes": run["peak"],
        "ratio": f"{run['peak'] / needed:.4g}",
        "seconds_per_pair": f"{run['seconds']:.4g}",
    }


def train(config, share: float, prompt: int, response: int, device: str, steps: int = 3) -> dict:
    """Bytes in use at most, and seconds, of a DPO step on one pair: random weights of `config` in
    bf16, made on the device, of which every (1 / share)-th is kept."""
    torch.manual_seed(0)
    model = _model(config, torch.bfloat16, device)
    rows = [
        row | {f"{side}_reference": [0.0] * response for side in SIDES}
        for row in _rows(prompt, response, 1)
    ]
    mask = spread_mask(model, share)
    own = OwnSteps(model, mask, rows, "allo_scalar", 0, beta=0.1, lr=1e-6)
    seconds = own.run(2, steps, lambda: efficiency.reset_peak(device))
    return {"peak": efficiency.peak(device), "seconds": seconds / steps}


def spread_mask(model, share: float) -> NeuronMask:
    """One scalar neuron of every 1 / share, rounded: no score of every weight is made, which for
    13B weights would take 52 GB."""
    named, every = dict(model.named_parameters()), round(1 / share)
    places = {
        name: torch.arange(0, value.numel(), every, dtype=torch.int32, device=value.device)
        for name, value in named.items()
    }
    return NeuronMask(places, {name: tuple(value.shape) for name, value in named.items()})


# --- what an `align` takes -----------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """Readings of rows. tokens: read, all epochs together; steps: of the optimizer, 0 for a pass
    without gradients."""

    name: str
    rows: int
    steps: int
    tokens: int
    flops: float


def passes_of(parts: Sequence[Encoded], config: AlignConfig, stages, shape: Shape) -> list[Pass]:
    """All passes of `align`, in order; parts: pairs to train on, held-out and development ones."""
    pairs, held_out, development = ([_pair_length(row) for row in part.rows] for part in parts)
    both = zip(parts[0].rows, parts[0].corrections, strict=True)
    fitting = [(row["prompt"] + row["rejected"], *rows) for row, rows in both if rows]
    rejected = [len(row) for row, _, _ in fitting]
    learnt, read = ([sum(map(len, rows[i].values())) for rows in fitting] for i in (1, 2))
    epochs, tried, trained = config.epochs, config.search, set(TRAINED) & set(stages)
    forgets, unseen = "forgetting" in stages, held_out + development
    # name, tokens of each row, epochs (0: without gradients), how often, whether it is made
    table = (
        ("reference", pairs + unseen, 0, 1, True),
        ("importance", pairs, epochs if config.estimator == "delta" else 1, 1,
         "importance" in stages),
        ("reward model", learnt, epochs, 1, forgets),
        ("token rewards", read, 0, 1, forgets),
        ("forgetting", rejected, epochs, tried, forgets),
        ("its reference", pairs, 0, tried, forgets and "learning" in stages),
        ("learning", pairs, epochs, tried, "learning" in stages),
        ("ranking", held_out + tried * development, 0, 1, bool(unseen and trained)),
    )  # fmt: skip
    backward = 4 if config.gradient_checkpointing else 3  # times the forward pass, with it
    passes = []
    for name, rows, epochs, times, made in table:
        if not made:
            continue
        schedule = Schedule(0.0, epochs, config.batch_size, 0, max_steps=config.max_steps)
        steps = schedule.steps(len(rows)) if epochs else 0
        readings = min(epochs, steps * config.batch_size / len(rows)) if epochs else 1
        tokens = round(readings * sum(rows) * times)
        flops = 2 * shape.active * tokens * (backward if epochs else 1)
        label = name if times == 1 else f"{name} x {times}"
        passes.append(Pass(label, len(rows), steps * times, tokens, flops))
    return passes


def _pair_length(row: dict) -> int:
    """Tokens read of a pair, what its replies share counted once."""
    chosen, rejected = row["chosen"], row["rejected"]
    return len(row["prompt"] + chosen + rejected) - shared_length(chosen, rejected)


def memory(
    model_config, shape: Shape, used: Encoded, config: AlignConfig, stages, dtype, devices: int
) -> dict[str, float]:
    """Bytes on each of `devices`, by stage, when most are in use, with all pairs of a pass as long
    as the longest; several devices hold a part each of weights, gradients and optimizer state
    (FSDP2), their own pairs' activations, and one layer whole."""
    prompt = max(len(row["prompt"]) for row in used.rows)
    response = max(len(row[side]) for row in used.rows for side in SIDES)
    pairs = -(-config.batch_size // (config.accumulation * devices))
    sizes = prompt, response, pairs
    recomputed = config.gradient_checkpointing
    try:
        held = activation_bytes(model_config, *sizes, dtype, recomputed)
    except (AlloError, RuntimeError):
        # Products with experts have shapes without values in bfloat16 alone.
        held = activation_bytes(model_config, *sizes, torch.bfloat16, recomputed)
        held = held * dtype.itemsize // 2

    def on_each(share: float, scores: int = 0, **other: int) -> float:
        parts = _parts(shape, share, 2 * response * pairs, held, dtype) | other
        sharded = parts["weights"] + parts["state"] + parts["gradient"] + scores
        gathered = 2 * shape.layer * dtype.itemsize if devices > 1 else 0  # and its gradients
        return sharded / devices + parts["activations"] + parts["logits"] + gathered

    needed = {}
    if "importance" in stages and config.estimator == "delta":
        needed["importance"] = on_each(1.0, scores=4 * shape.parameters)  # float32
    elif "importance" in stages:
        needed["importance"] = on_each(config.share, state=0)
    if "forgetting" in stages:
        needed["reward model"] = on_each(1.0 if config.rewriter_neurons == "all" else config.share)
    if set(TRAINED) & set(stages):
        needed["other stages"] = on_each(config.share)
    return needed
