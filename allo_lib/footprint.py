"""Bytes that a masked training stage needs on one device, counted on a model without memory.

The model is built on torch's meta device, which knows shapes and dtypes only, so that one machine
can tell what another needs: weights and optimizer state from their counts, activations by adding up
what autograd keeps of a real forward pass.
"""

from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from allo_lib.batches import Layout, pair_batch
from allo_lib.forward import response_logps, to_device
from allo_lib.head import CHUNK_BYTES

STATE_BYTES = 20  # of a kept entry: index, master, gradient and two moments, 4 bytes each
_CHUNKS = 3  # float32 logits, their softmax, and its copy in the dtype of the weights, at most


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
    # What the layers keep is the same for each: two small models tell it for any number of them.
    layers = config.num_hidden_layers
    one, two = (_activations(config, count, prompt, response, pairs, dtype) for count in (1, 2))
    sizes = [p.numel() for p in _meta_model(config, layers, dtype).parameters()]
    width = torch.empty((), dtype=dtype).element_size()
    return Footprint(
        weights=width * sum(sizes),
        state=round(STATE_BYTES * share * sum(sizes)),
        gradient=round(max(sizes) * (width + 4 * share)),
        activations=one + (layers - 1) * (two - one),
        logits=_CHUNKS * CHUNK_BYTES,
    )


def _meta_model(config, layers: int, dtype):
    config = type(config).from_dict(config.to_dict() | {"num_hidden_layers": layers})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        ).train()


def _activations(config, layers: int, prompt: int, response: int, pairs: int, dtype) -> int:
    """Bytes of all tensors that backward keeps of one forward pass, weights apart."""
    model = _meta_model(config, layers, dtype)
    return saved_bytes(model, pair_batch(_rows(prompt, response, pairs), _layout(config)))


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


def _layout(config) -> Layout:
    return Layout(0, shared=True, width=config.hidden_size)


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
