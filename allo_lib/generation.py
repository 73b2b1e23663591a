"""Responses of a model: greedy ones for evaluation, sampled ones for preference pairs."""

from dataclasses import dataclass

import torch

from allo_lib.encoding import encode_prompt


@dataclass(frozen=True)
class Response:
    """A generated text; `ended` is False when it was cut off and so has no answer."""

    text: str
    ended: bool


def generate(
    model,
    tokenizer,
    prompts: list,
    *,
    max_new_tokens: int,
    batch_size: int,
    samples: int = 1,
    temperature: float | None = None,
    seed: int = 0,
) -> list[list[Response]]:
    """`samples` responses to each prompt, greedy when `temperature` is None, else sampled.

    Prompts of like length share a batch, padded on the left. Sampling draws from a generator seeded
    with `seed`; the global one is left as it was.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
    rows = max(1, batch_size // samples)
    model.eval()
    results: list[list[Response]] = [[] for _ in prompts]
    settings = {"max_new_tokens": max_new_tokens, "num_return_sequences": samples}
    settings |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if temperature is None:
        settings |= {"do_sample": False}
    else:
        settings |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for start in range(0, len(order), rows):
            chunk = order[start : start + rows]
            batch = _left_padded([encoded[i] for i in chunk], tokenizer.pad_token_id, model.device)
            output = model.generate(**batch, **settings)
            tails = output[:, batch["input_ids"].shape[1] :].tolist()
            for position, i in enumerate(chunk):
                own = tails[position * samples : (position + 1) * samples]
                results[i] = [_response(tokenizer, ids) for ids in own]
    return results


def _left_padded(rows: list[list[int]], pad_token_id: int, device) -> dict[str, torch.Tensor]:
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad_token_id)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = torch.tensor(row)
        mask[i, length - len(row) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _response(tokenizer, ids: list[int]) -> Response:
    ended = tokenizer.eos_token_id in ids
    if ended:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return Response(tokenizer.decode(ids, skip_special_tokens=True), ended)
