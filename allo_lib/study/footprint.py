"""Bytes that a masked training stage needs on one device, counted on a model without memory, and
measured where the device is there.

The model is made of torch's fake tensors, which know shapes, dtypes and devices only, so that one
machine can tell what another needs: weights and optimizer state from their counts, activations by
adding up what autograd keeps of a real forward pass.
"""

from dataclasses import asdict, dataclass, fields

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, LlamaConfig

from allo_lib.engine.batching import Layout, pair_batch
from allo_lib.engine.forward import CHUNK_BYTES, response_logps, to_device
from allo_lib.errors import AlloError
from allo_lib.method.neurons import NeuronMask
from allo_lib.study import efficiency
from allo_lib.study.timed_steps import OwnSteps

COLUMNS = (
    "model", "kept", "device", "estimated_bytes", "measured_peak_bytes", "ratio",
    "seconds_per_pair",
)  # fmt: skip
# hidden size, feed-forward size, layers, heads; arXiv 2307.09288
KNOWN = {"LLaMA 2 7B": (4096, 11008, 32, 32), "LLaMA 2 13B": (5120, 13824, 40, 40)}


@dataclass(frozen=True)
class Footprint:
    """Bytes by what they are for, at the moment of a step when most are in use.

    That is where backward begins, with all activations, or where it ends, with all gradients of
    kept entries.
    """

    weights: int
    state: int  # of the kept entries: index, master, two moments
    gradient: int  # what is there of the kept entries', and the dense ones of the largest parameter
    activations: int  # what backward needs of the forward pass
    logits: int  # of one chunk of positions

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.state + self.gradient + self.activations + self.logits


@dataclass(frozen=True)
class Counted:
    """What a step needs whatever is kept of the neurons: parameters, those of the largest tensor,
    bytes of activations and of a chunk of logits; tied: embeddings and head are one tensor."""

    parameters: int
    largest: int
    tied: bool
    activations: int
    logits: int
    dtype: torch.dtype

    def footprint(self, share: float) -> Footprint:
        """The bytes of a masked stage: scalar neurons, the reference read from disk.

        share: of the neurons that are kept, 0 < share <= 1.
        """
        width, kept = self.dtype.itemsize, share * self.parameters
        # A tensor kept whole needs no index, and in float32 its own storage is the master.
        state = 16 if share < 1 else 8 if self.dtype == torch.float32 else 12
        begins = self.largest * width, self.activations, self.logits
        ends = 4 * kept + self.largest * width  # the embeddings' gradient is the last
        if self.tied:
            # The head's has waited for it, and their sum is a third before its entries are taken.
            ends += (2 * width - 4 * share) * self.largest
        moment = max(begins, (ends, 0, 0), key=sum)
        return Footprint(width * self.parameters, round(state * kept), *map(round, moment))


def footprint(config, share: float, prompt: int, response: int, pairs: int, dtype=torch.bfloat16):
    """What a step of a masked stage needs, as `count` and `Counted.footprint` say."""
    return count(config, prompt, response, pairs, dtype).footprint(share)


def count(
    config,
    prompt: int,
    response: int,
    pairs: int,
    dtype: torch.dtype,
    recomputed: bool = False,
) -> Counted:
    """Count what a step needs.

    Args:
        config: of a transformers causal language model; its weights are never made.
        prompt, response: tokens of a prompt, and of each of its two responses.
        pairs: in one forward pass.
        dtype: of the weights and activations.
        recomputed: of each layer only what it is given is kept (gradient checkpointing).
    """
    batch = pair_batch(_rows(prompt, response, pairs), Layout(0, True))
    with FakeTensorMode() as mode:
        batch = {key: mode.from_tensor(value) for key, value in batch.items()}
        # All layers are alike: models of one and of two tell what any number of them holds.
        one, two = (_model(_with_layers(config, layers), dtype, "cpu") for layers in (1, 2))
        more = config.num_hidden_layers - 1
        sizes = [sum(p.numel() for p in model.parameters()) for model in (one, two)]
        kept = [saved_bytes(one, batch)]
        if recomputed:  # of one layer at a time all is there
            kept.append(kept[0] + batch["input_ids"].numel() * config.hidden_size * dtype.itemsize)
        else:
            kept.append(saved_bytes(two, batch))
    rows = min(len(batch["targets"]), max(1, CHUNK_BYTES // (4 * config.vocab_size)))
    return Counted(
        parameters=sizes[0] + more * (sizes[1] - sizes[0]),
        largest=max(p.numel() for p in one.parameters()),
        tied=one.get_input_embeddings().weight is one.get_output_embeddings().weight,
        activations=kept[0] + more * (kept[1] - kept[0]),
        # As the head's product gives them, and in float32.
        logits=rows * config.vocab_size * (4 if dtype.itemsize == 4 else 4 + dtype.itemsize),
        dtype=dtype,
    )


def random_mask(model, share: float) -> NeuronMask:
    """Scalar neurons at random: one of every 1 / share consecutive ones, uniformly drawn.

    1 / share is taken to the nearest whole number. The places are int32 and on the model's device;
    no score of every weight is made, which for 13B weights would take 52 GB.
    """
    every = round(1 / share)

    def places(parameter) -> torch.Tensor:
        options = {"dtype": torch.int32, "device": parameter.device}
        starts = torch.arange(parameter.numel() // every, **options) * every
        return starts + torch.randint(every, starts.shape, **options)

    named = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
    return NeuronMask({name: places(p) for name, p in named.items()}, shapes)


def of_known_models(shares, prompt: int, response: int, device: str = "cpu") -> list[dict]:
    """One row for each of `KNOWN` and each share, one pair at a time in bf16: `COLUMNS`, and the
    parts of the estimate.

    On a GPU random weights of that shape are trained for a few steps, each size in a process of its
    own: `measured_peak_bytes` and its ratio to the estimate. They are empty on a CPU, and with a
    printed line where the GPU has too little free memory.
    """
    rows = []
    for name, (hidden, feed_forward, layers, heads) in KNOWN.items():
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=hidden,
            intermediate_size=feed_forward,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            tie_word_embeddings=False,
        )
        for share in shares:
            found = footprint(config, share, prompt, response, pairs=1)
            row = dict.fromkeys(COLUMNS, "") | asdict(found)
            row |= {"model": name, "kept": share, "estimated_bytes": found.total}
            if device != "cpu":
                label = f"{name}, {share:.0%} kept"
                row |= _measured(label, found, config, share, prompt, response)
            rows.append(row)
    return rows


def in_gigabytes(rows: list[dict]) -> list[dict]:
    """The rows of `of_known_models` for a reader: the parts, all of them, what was measured."""

    def size(value):
        return value and round(value / 1e9, 2)

    return [
        {"model": row["model"], "kept": row["kept"]}
        | {field.name: size(row[field.name]) for field in fields(Footprint)}
        | {"all": size(row["estimated_bytes"]), "measured": size(row["measured_peak_bytes"])}
        | {key: row[key] for key in ("ratio", "seconds_per_pair", "device")}
        for row in rows
    ]


def _measured(label: str, found: Footprint, *shape) -> dict:
    """The columns of a GPU that has the memory; else the device's name alone."""
    free = torch.cuda.mem_get_info()[0]
    row = {"device": efficiency.device_name("cuda")}
    try:
        if free < found.total:
            raise AlloError(f"of its {found.total / 1e9:.1f} GB {free / 1e9:.1f} are free")
        run = efficiency.in_own_process(train, *shape, "cuda")
    except AlloError as error:
        print(f"{label}: not measured on {row['device']}: {error}", flush=True)
        return row
    return row | {
        "measured_peak_bytes": run["peak"],
        "ratio": f"{run['peak'] / found.total:.4g}",
        "seconds_per_pair": f"{run['seconds']:.4g}",
    }


def train(config, share: float, prompt: int, response: int, device: str, steps: int = 3) -> dict:
    """Bytes in use at most, and seconds, of a DPO step on one pair: random weights of `config` in
    bf16, made on the device, and a random mask."""
    torch.manual_seed(0)
    model = _model(config, torch.bfloat16, device)
    rows = [
        row | {f"{side}_reference": [0.0] * response for side in ("chosen", "rejected")}
        for row in _rows(prompt, response, 1)
    ]
    own = OwnSteps(model, random_mask(model, share), rows, "allo_scalar", 0, beta=0.1, lr=1e-6)
    seconds = own.run(2, steps, lambda: efficiency.reset_peak(device))
    return {"peak": efficiency.peak(device), "seconds": seconds / steps}


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


def _rows(prompt: int, response: int, pairs: int) -> list[dict]:
    """Pairs of these lengths that share nothing but their prompts."""
    return [
        {
            "prompt": [3 + pair] + [1] * (prompt - 1),
            "chosen": [1] * response,
            "rejected": [2] * response,
        }
        for pair in range(pairs)
    ]
