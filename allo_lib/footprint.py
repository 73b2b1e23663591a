"""Bytes that a masked training stage needs on one device, counted on a model without memory.

The model is built on torch's meta device, which knows shapes and dtypes only, so that one machine
can tell what another needs: weights and optimizer state from their counts, activations by adding up
what autograd keeps of a real forward pass.
"""

from dataclasses import asdict, dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, LlamaConfig

from allo_lib.batches import Layout, pair_batch
from allo_lib.forward import response_logps, to_device
from allo_lib.head import CHUNK_BYTES

STATE_BYTES = 20  # of a kept entry: index, master, gradient and two moments, 4 bytes each
_CHUNKS = 3  # float32 logits, their softmax, and its copy in the dtype of the weights, at most

# hidden size, feed-forward size, layers, heads; arXiv 2307.09288
KNOWN = {"LLaMA 2 7B": (4096, 11008, 32, 32), "LLaMA 2 13B": (5120, 13824, 40, 40)}


@dataclass(frozen=True)
class Footprint:
    """Bytes by what they are for, at the moment of a step when most are in use."""

    weights: int
    state: int
    gradient: int  # the largest parameter's dense gradient and, in float32, its kept entries
    activations: int  # what backward needs of the forward pass
    logits: int  # of one chunk of positions

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.state + self.gradient + self.activations + self.logits


def footprint(
    config, share: float, prompt: int, response: int, pairs: int, dtype=torch.bfloat16
) -> Footprint:
    """What a step of a masked stage needs: scalar neurons, the reference read from disk.

    Args:
        config: of a transformers causal language model; its weights are never made.
        share: of the neurons that are kept, 0 < share <= 1.
        prompt, response: tokens of a prompt, and of each of its two responses.
        pairs: in one forward pass.
        dtype: of the weights and activations.
    """
    # All layers are alike: models of one and of two tell what any number of them holds.
    one, two = (_meta_model(config, layers, dtype) for layers in (1, 2))
    batch = pair_batch(_rows(prompt, response, pairs), Layout(0, True, config.hidden_size))

    def of_all_layers(measure) -> int:
        first = measure(one)
        return first + (config.num_hidden_layers - 1) * (measure(two) - first)

    count = of_all_layers(lambda model: sum(p.numel() for p in model.parameters()))
    largest = max(p.numel() for p in one.parameters())
    width = torch.empty((), dtype=dtype).element_size()
    return Footprint(
        weights=width * count,
        state=round(STATE_BYTES * share * count),
        gradient=round(largest * (width + 4 * share)),
        activations=of_all_layers(lambda model: saved_bytes(model, batch)),
        logits=_CHUNKS * CHUNK_BYTES,
    )


def of_known_models(shares, prompt: int, response: int) -> list[dict]:
    """One row for each of `KNOWN` and each share, one pair at a time in bf16: GB by purpose."""
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
            parts = {key: round(value / 1e9, 2) for key, value in asdict(found).items()}
            rows.append(
                {"model": name, "kept": share} | parts | {"all": round(found.total / 1e9, 2)}
            )
    return rows


def _meta_model(config, layers: int, dtype):
    config = type(config).from_dict(config.to_dict() | {"num_hidden_layers": layers})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )  # fmt: skip
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
    """Pairs of the asked lengths that share nothing but their prompts."""
    return [
        {
            "prompt": [3 + pair] + [1] * (prompt - 1),
            "chosen": [1] * response,
            "rejected": [2] * response,
        }
        for pair in range(pairs)
    ]
