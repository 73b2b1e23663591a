"""Decoding on a GPU by `transformers`: a static key-value cache, and a step compiled once.

A small model on a GPU waits for its kernels to be launched, not for arithmetic; compiled, all
kernels of a token are launched together. That takes shapes that do not change: every batch has as
many rows as the others, prompts are padded to few widths, and rows that have ended stay until the
last one has.
"""

import contextlib
from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from allo_lib.seeds import derive

_WIDTH = 64  # prompts are padded to multiples of this many tokens


def decode(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    pad: int,
    end: int,
    max_new_tokens: int,
    rows: int,
    samples: int = 1,
    temperature: float | None = None,
    seed: int = 0,
) -> list[list[list[int]]]:
    """`samples` responses to each prompt as token ids, up to and with the end token if it came.

    prompts: token ids. pad, end: ids of these tokens. rows: prompts of a batch. temperature: None
    for greedy decoding. Draws follow from `seed` and the number of the batch, so that another
    `rows` draws other samples; the state of torch's own generators is left as it was.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    config = _config(pad, end, max_new_tokens, samples, temperature)
    results: list[list[list[int]]] = [[] for _ in prompts]
    for number, start in enumerate(range(0, len(order), rows)):
        chunk = order[start : start + rows]
        filled = chunk + chunk[-1:] * (rows - len(chunk))  # repeated, for the shape's sake
        ids, mask = _padded([prompts[i] for i in filled], pad, model.device)
        with _seeded(model.device, derive(seed, "draws", number)):
            written = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        own = [_until(row, end) for row in written[:, ids.shape[1] :].tolist()]
        for position, i in enumerate(chunk):
            results[i] = own[position * samples : (position + 1) * samples]
    return results


def _config(pad, end, max_new_tokens, samples, temperature) -> GenerationConfig:
    # Whatever a model's own settings add to plain sampling is switched off by name.
    sampled = {} if temperature is None else {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature is not None,
        num_return_sequences=samples,
        num_beams=1,
        repetition_penalty=1.0,
        cache_implementation="static",
        pad_token_id=pad,
        eos_token_id=end,
        **sampled,
    )


def _padded(prompts: list[Sequence[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, int64 [rows, width], padded on the left."""
    width = -(-max(map(len, prompts)) // _WIDTH) * _WIDTH
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int):
    """A block whose draws follow from `seed` alone."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids
