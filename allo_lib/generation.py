"""Responses of a model: greedy ones for evaluation, sampled ones for preference pairs.

The loop is our own, on the key-value cache of `transformers`, as `generate` there goes on with
every row until the last one has ended: here a prompt is read once for all its samples, and rows
that have ended leave the batch. Every sample draws from a generator of its own, so that it does not
depend on which others share its batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from allo_lib.encoding import encode_prompt
from allo_lib.seeds import derive

# Rows leave the batch together, when this share of it has ended: leaving copies the cache.
_LEAVE_AT = 0.125


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

    Prompts of like length share a batch of at most `batch_size` responses, padded on the left. The
    draws of a sample follow from `seed`, the number of its prompt and its own number alone.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
    rows = max(1, batch_size // samples)
    model.eval()
    results: list[list[Response]] = [[] for _ in prompts]
    with torch.inference_mode():
        for start in range(0, len(order), rows):
            chunk = order[start : start + rows]
            batch = _left_padded([encoded[i] for i in chunk], tokenizer.pad_token_id, model.device)
            draws = None if temperature is None else _draws(chunk, samples, max_new_tokens, seed)
            decoding = _Decoding(model, batch, samples, tokenizer.eos_token_id, temperature, draws)
            ids = decoding.run(max_new_tokens)
            for position, i in enumerate(chunk):
                own = ids[position * samples : (position + 1) * samples]
                results[i] = [_response(tokenizer, one) for one in own]
    return results


class _Decoding:
    """One batch: `rows` are the responses that have not ended, by their number in the batch."""

    def __init__(self, model, batch, samples: int, end: int, temperature, draws: Tensor | None):
        self.model, self.end, self.temperature = model, end, temperature
        count = len(batch["input_ids"]) * samples
        self.ids: list[list[int]] = [[] for _ in range(count)]
        self.rows = torch.arange(count, device=model.device)
        self.draws = None if draws is None else draws.to(model.device)
        self.mask = batch["attention_mask"]
        self.cache = DynamicCache(config=model.config)
        self.positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        self.logits = self._read(batch["input_ids"])
        if samples > 1:
            self.cache.batch_repeat_interleave(samples)
            self.mask = self.mask.repeat_interleave(samples, dim=0)
            self.positions = self.positions.repeat_interleave(samples, dim=0)
            self.logits = self.logits.repeat_interleave(samples, dim=0)

    def run(self, max_new_tokens: int) -> list[list[int]]:
        """The tokens of every response, with its end token if it has come to it."""
        ended = torch.zeros(len(self.rows), dtype=torch.bool, device=self.rows.device)
        for number in range(max_new_tokens):
            chosen = self._choose(number)
            for row, token, done in zip(
                self.rows.tolist(), chosen.tolist(), ended.tolist(), strict=True
            ):
                if not done:
                    self.ids[row].append(token)
            ended |= chosen == self.end
            if ended.all() or number + 1 == max_new_tokens:
                break
            if ended.float().mean() >= _LEAVE_AT:
                stay = (~ended).nonzero()[:, 0]
                self._keep(stay)
                chosen, ended = chosen[stay], ended[stay]
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
            self.positions = self.positions[:, -1:] + 1
            self.logits = self._read(chosen[:, None])
        return self.ids

    def _read(self, input_ids: Tensor) -> Tensor:
        output = self.model(
            input_ids=input_ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.rows = self.rows[rows]

    def _choose(self, number: int) -> Tensor:
        """The next token: the likeliest, or the one where the draw falls in the cumulated odds."""
        if self.draws is None:
            return self.logits.argmax(dim=-1)
        odds = torch.softmax(self.logits / self.temperature, dim=-1).cumsum(dim=-1)
        point = self.draws[self.rows, number, None] * odds[:, -1:]
        return torch.searchsorted(odds, point, right=True)[:, 0].clamp_max(odds.shape[1] - 1)


def _draws(prompts: list[int], samples: int, count: int, seed: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 [prompts * samples, count]; each prompt draws its own."""
    generator = torch.Generator()
    rows = [
        torch.rand(samples, count, generator=generator.manual_seed(derive(seed, "draws", i)))
        for i in prompts
    ]
    return torch.cat(rows)


def _left_padded(rows: list[list[int]], pad_token_id: int, device) -> dict[str, Tensor]:
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
