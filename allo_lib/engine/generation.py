"""Responses of a model: greedy ones for evaluation, sampled ones for preference pairs.

The loop is our own, on the key-value cache of `transformers`, as `generate` there goes on with
every row until the last one has ended: here a prompt is read once for all its samples, and rows
that have ended leave the batch. Every sample draws from a generator of its own, so that it does not
depend on which others share its batch.

Greedy decoding takes drafts, such as the responses of the model that a training started from. A
draft is read together with its prompt, in one pass, and kept as far as the model would have written
it itself (greedy speculative decoding, arXiv 2211.17192): the responses are those of decoding token
by token, up to the rounding of a near tie.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from allo_lib.engine.encoding import encode_prompt
from allo_lib.engine.forward import argmax_tokens, takes_drafts
from allo_lib.method.losses import Batch
from allo_lib.seeds import derive

# Rows leave the batch together, when this share of it has ended: leaving copies the cache.
_LEAVE_AT = 0.125
# Tokens that a response is reckoned with, prompt included: what a batch may hold in its cache.
_TOKENS = 512


@dataclass(frozen=True)
class Response:
    """A generated text; `ended` is False when it was cut off and so has no answer."""

    text: str
    ended: bool


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[Any],
    *,
    max_new_tokens: int,
    batch_size: int,
    samples: int = 1,
    temperature: float | None = None,
    seed: int = 0,
    drafts: list[list[int]] | None = None,
) -> list[list[Response]]:
    """`samples` responses to each prompt, greedy when `temperature` is None, else sampled.

    Prompts of similar length share a batch of at most `batch_size` responses, padded on the left;
    where prompts are long, of fewer, as memory goes by tokens. The draws of a sample follow from
    `seed`, the number of its prompt and its own number alone.

    drafts: for greedy decoding, a guess at each response as token ids, of any length; whatever they
    are, they change the cost alone. Models do without them whose cache does not keep all tokens, or
    that read more than tokens and their positions (`forward.takes_drafts`).
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
    if temperature is not None or samples > 1:
        drafts = None
    if drafts is not None and not (_keeps_all(model) and takes_drafts(model)):
        drafts = None
    model.eval()
    results: list[list[Response]] = [[] for _ in prompts]
    with torch.inference_mode():
        rows, room = max(1, batch_size // samples), batch_size * _TOKENS // samples
        widths = [len(ids) + max_new_tokens for ids in encoded]
        for chunk in _batches(order, widths, rows, room):
            batch = _left_padded([encoded[i] for i in chunk], tokenizer.pad_token_id, model.device)
            decoding = _Decoding(model, tokenizer.eos_token_id, max_new_tokens, batch, samples)
            if drafts is not None:
                decoding.read_drafts([drafts[i] for i in chunk])
            else:
                if temperature is not None:
                    decoding.temperature = temperature
                    decoding.draws = _draws(chunk, samples, max_new_tokens, seed).to(model.device)
                decoding.read_prompts()
            ids = decoding.run()
            for position, i in enumerate(chunk):
                own = ids[position * samples : (position + 1) * samples]
                results[i] = [_response(tokenizer, one) for one in own]
    return results


def _batches(order: list[int], widths: list[int], rows: int, room: int) -> list[list[int]]:
    """`order`, from narrow to wide, in batches of at most `rows` rows and `room` padded tokens.

    A row wider than `room` is a batch of its own.
    """
    batches: list[list[int]] = []
    for i in order:
        last = batches[-1] if batches else None
        if last and len(last) < rows and (len(last) + 1) * widths[i] <= room:
            last.append(i)
        else:
            batches.append([i])
    return batches


def _keeps_all(model: Any) -> bool:
    """Whether the cache of every layer keeps all tokens: rejected ones leave holes in it, and push
    others out of a sliding window."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


class _Decoding:
    """One batch. Tensors over the responses that have not left: `rows`, their numbers; `chosen`,
    the next token of each; `lengths`, tokens of its response before that; `over`, whether it has
    come to its end or its limit; `positions`, [rows, 1], of the last token read; `mask`,
    [rows, places], 1 where the cache holds a token. ids: tokens of all responses, as lists."""

    chosen: Tensor
    positions: Tensor

    def __init__(self, model: Any, end: int, limit: int, prompts: Batch, samples: int):
        self.model, self.end, self.limit, self.samples = model, end, limit, samples
        self.input_ids, self.mask = prompts["input_ids"], prompts["attention_mask"]
        self.cache = DynamicCache(config=model.config)
        self.temperature = 1.0
        self.draws: Tensor | None = None  # float32 [responses, limit]; None: greedy
        count = len(self.input_ids) * samples
        self.ids: list[list[int]] = [[] for _ in range(count)]
        self.rows = torch.arange(count, device=model.device)
        self.lengths = torch.zeros_like(self.rows)
        self.over = torch.zeros_like(self.rows, dtype=torch.bool)

    def read_prompts(self) -> None:
        """Begin with the prompts alone, each read once for all its samples."""
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        logits = self.read(self.input_ids, positions)
        self.positions = positions[:, -1:]
        if self.samples > 1:
            self.cache.batch_repeat_interleave(self.samples)
            self.mask, self.positions, logits = (
                each.repeat_interleave(self.samples, dim=0)
                for each in (self.mask, self.positions, logits)
            )
        self.chosen = self.choose(logits)

    def read_drafts(self, drafts: list[list[int]]) -> None:
        """Begin with prompts and drafts, and keep of each draft what the model agrees with."""
        drafts = [draft[: self.limit] for draft in drafts]
        width, length = self.input_ids.shape[1], max(map(len, drafts))
        guess = torch.tensor([draft + [-1] * (length - len(draft)) for draft in drafts])
        guess = guess.to(self.mask)  # int64 [rows, length], -1 behind the end of a draft
        self.mask = torch.cat([self.mask, (guess >= 0).long()], dim=1)
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        input_ids = torch.cat([self.input_ids, guess.clamp_min(0)], dim=1)
        output = self._pass(self.model.get_decoder(), input_ids, positions)
        hidden = output.last_hidden_state[:, width - 1 :]  # [rows, length + 1, H]
        head = self.model.get_output_embeddings()
        own = argmax_tokens(hidden.flatten(0, 1), head.weight, getattr(head, "bias", None))
        own = own.view(len(drafts), length + 1)  # [rows * (length + 1)] -> [rows, length + 1]
        agreed = (own[:, :-1] == guess).long().cumprod(dim=1)
        self.lengths = agreed.sum(dim=1)
        self.mask[:, width:] = agreed
        self.positions = positions[:, width - 1 : width] + self.lengths[:, None]
        self.chosen = own.gather(1, self.lengths[:, None])[:, 0]
        ends = (guess == self.end) & agreed.bool()
        self.over = ends.any(dim=1) | (self.lengths >= self.limit)
        self.ids = [
            row[:count] for row, count in zip(guess.tolist(), self.lengths.tolist(), strict=True)
        ]

    def run(self) -> list[list[int]]:
        """The tokens of every response, with its end token if it has come to it."""
        self.take()
        while not self.over.all():
            if self.over.float().mean() >= _LEAVE_AT:
                going_on = (~self.over).nonzero()[:, 0]
                self.cache.batch_select_indices(going_on)
                for name in ("mask", "positions", "rows", "chosen", "lengths", "over"):
                    setattr(self, name, getattr(self, name)[going_on])
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
            self.positions = self.positions + 1
            self.chosen = self.choose(self.read(self.chosen[:, None], self.positions))
            self.take()
        return self.ids

    def take(self) -> None:
        """Add the chosen tokens to the responses that are not over."""
        for row, token, over in zip(
            self.rows.tolist(), self.chosen.tolist(), self.over.tolist(), strict=True
        ):
            if not over:
                self.ids[row].append(token)
        self.lengths = self.lengths + (~self.over).long()
        self.over = self.over | (self.chosen == self.end) | (self.lengths >= self.limit)

    def read(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Logits behind the last of the tokens, [rows, V] in float32."""
        output = self._pass(self.model, input_ids, positions, logits_to_keep=1)
        return output.logits[:, -1].float()  # [rows, 1, V] -> [rows, V]

    def _pass(self, part: Any, input_ids: Tensor, positions: Tensor, **settings: Any) -> Any:
        """What `part` of the model gives of tokens behind those in the cache, which grows."""
        return part(
            input_ids=input_ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **settings,
        )

    def choose(self, logits: Tensor) -> Tensor:
        """The next token: the argmax, or the one where the draw falls in the cumulative odds."""
        if self.draws is None:
            return logits.argmax(dim=-1)
        odds = torch.softmax(logits / self.temperature, dim=-1).cumsum(dim=-1)  # [rows, V]
        drawn = self.draws[self.rows, self.lengths.clamp_max(self.limit - 1)]  # [rows]
        point = drawn[:, None] * odds[:, -1:]
        return torch.searchsorted(odds, point, right=True)[:, 0].clamp_max(odds.shape[1] - 1)


def _draws(prompts: list[int], samples: int, count: int, seed: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 [prompts * samples, count]; each prompt draws its own."""
    generator = torch.Generator()
    rows = [
        torch.rand(samples, count, generator=generator.manual_seed(derive(seed, "draws", i)))
        for i in prompts
    ]
    return torch.cat(rows)


def _left_padded(rows: list[list[int]], pad_token_id: int, device: Any) -> Batch:
    length = max(map(len, rows))
    padding = [length - len(row) for row in rows]
    ids = [[pad_token_id] * n + row for n, row in zip(padding, rows, strict=True)]
    mask = [[0] * n + [1] * len(row) for n, row in zip(padding, rows, strict=True)]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def _response(tokenizer: Any, ids: list[int]) -> Response:
    ended = tokenizer.eos_token_id in ids
    if ended:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return Response(tokenizer.decode(ids, skip_special_tokens=True), ended)
