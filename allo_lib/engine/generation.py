"""Responses of a model: greedy ones for evaluation, sampled ones for preference pairs.

The loop is our own, on the key-value cache of `transformers`, as `generate` there goes on with
every row until the last one has ended: here a prompt is read once for all its samples, and rows
that have ended leave the batch. Every sample draws from a generator of its own, so that it does not
depend on which others share its batch.

A small model on a GPU waits for its kernels to be launched, not for arithmetic. There the steps
after the first are recorded as a CUDA graph and replayed (`_replay`), on a cache with a place for
every token to come; rows that have ended stay until most have.

Greedy decoding takes drafts, such as the responses of the model that a training started from. A
draft is read together with its prompt, in one pass, and kept as far as the model would have written
it itself (greedy speculative decoding, arXiv 2211.17192): the responses are those of decoding token
by token, up to the rounding of a near tie.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from allo_lib.engine.encoding import encode_prompt
from allo_lib.engine.forward import argmax_tokens
from allo_lib.errors import AlloError
from allo_lib.machine.runtime import plain_writes
from allo_lib.method.losses import Batch
from allo_lib.seeds import derive

# Rows leave the batch together, when this share of it has ended: leaving copies the cache.
_LEAVE_AT = 0.125
# Tokens that a response is reckoned with, prompt included: what a batch may hold in its cache.
_TOKENS = 512
# Replayed steps between two looks at which rows have ended; up to as many are in vain at the end.
_LOOK_AFTER = 8
# A replayed batch of more rows than this begins again with those left when a quarter is: a new
# recording and a copied cache cost about as much as a dozen steps.
_SMALL = 32


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
    are, they change the cost alone. Models with sliding windows do without them.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
    rows = max(1, batch_size // samples)
    if temperature is not None or samples > 1 or not _sees_all(model):
        drafts = None
    model.eval()
    results: list[list[Response]] = [[] for _ in prompts]
    with torch.inference_mode():
        room = batch_size * _TOKENS // samples
        widths = [len(ids) + max_new_tokens for ids in encoded]
        for chunk in _batches(order, widths, rows, room):
            batch = _left_padded([encoded[i] for i in chunk], tokenizer.pad_token_id, model.device)
            decoding = _Decoding(model, tokenizer.eos_token_id, max_new_tokens)
            if drafts is not None:
                decoding.read_drafts(batch, [drafts[i] for i in chunk])
            elif temperature is None:
                decoding.read_prompts(batch, samples)
            else:
                draws = _draws(chunk, samples, max_new_tokens, seed)
                decoding.read_prompts(batch, samples, temperature, draws)
            ids = _replay(decoding) if _replays_steps(model) else decoding.run()
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


def _sees_all(model: Any) -> bool:
    """Whether every layer attends to all tokens before; rejected ones leave holes in the cache."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ("full_attention",)
    return set(kinds) == {"full_attention"}


def _replays_steps(model: Any) -> bool:
    """Whether steps can be recorded: on a GPU, by an attention that reads a mask of every two."""
    attention = model.config.get_text_config()._attn_implementation
    on_gpu = model.device.type == "cuda"
    return on_gpu and attention == "sdpa" and _sees_all(model)


class _Decoding:
    """One batch. Lists and tensors over `rows`, the responses that have not left, by number.

    chosen: the next token of each. lengths: tokens of its response before that. over: whether the
    response has come to its end or its limit. positions: [rows, 1], of the last token read. mask:
    [rows, places], 1 where the cache holds a token; ids: tokens of all responses.
    """

    chosen: Tensor
    positions: Tensor
    mask: Tensor

    def __init__(self, model: Any, end: int, limit: int):
        self.model, self.end, self.limit = model, end, limit
        self.cache = DynamicCache(config=model.config)
        self.temperature = 1.0
        self.draws: Tensor | None = None  # float32 [all rows, limit]; None: greedy

    def read_prompts(
        self,
        batch: Batch,
        samples: int,
        temperature: float = 1.0,
        draws: Tensor | None = None,
    ) -> None:
        """Begin with the prompts alone, each read once for all its samples."""
        self._begin(batch, samples)
        self.temperature = temperature
        self.draws = None if draws is None else draws.to(self.model.device)
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        logits = self.read(batch["input_ids"], positions)
        self.positions = positions[:, -1:]
        if samples > 1:
            self.cache.batch_repeat_interleave(samples)
            self.mask = self.mask.repeat_interleave(samples, dim=0)
            self.positions = self.positions.repeat_interleave(samples, dim=0)
            logits = logits.repeat_interleave(samples, dim=0)
        self.chosen = self.choose(logits)

    def read_drafts(self, batch: Batch, drafts: list[list[int]]) -> None:
        """Begin with prompts and drafts, and keep of each draft what the model agrees with."""
        self._begin(batch, 1)
        drafts = [draft[: self.limit] for draft in drafts]
        width, length = batch["input_ids"].shape[1], max(map(len, drafts))
        guess = torch.full((len(drafts), length), -1)
        for i, draft in enumerate(drafts):
            guess[i, : len(draft)] = torch.tensor(draft, dtype=torch.int64)
        guess = guess.to(self.model.device)
        self.mask = torch.cat([self.mask, (guess >= 0).long()], dim=1)
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        output = self.model.get_decoder()(
            input_ids=torch.cat([batch["input_ids"], guess.clamp_min(0)], dim=1),
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
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
        for ids, row, count in zip(self.ids, guess.tolist(), self.lengths.tolist(), strict=True):
            ids.extend(row[:count])

    def run(self) -> list[list[int]]:
        """The tokens of every response, with its end token if it has come to it."""
        self.take()
        while not self.over.all():
            if self.over.float().mean() >= _LEAVE_AT:
                self.keep((~self.over).nonzero()[:, 0])
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
            self.positions = self.positions + 1
            self.chosen = self.choose(self.read(self.chosen[:, None], self.positions))
            self.take()
        return self.ids

    def _begin(self, batch: Batch, samples: int) -> None:
        count, device = len(batch["input_ids"]) * samples, self.model.device
        self.ids: list[list[int]] = [[] for _ in range(count)]
        self.rows = torch.arange(count, device=device)
        self.lengths = torch.zeros(count, dtype=torch.int64, device=device)
        self.over = torch.zeros(count, dtype=torch.bool, device=device)
        self.mask = batch["attention_mask"]

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
        output = self.model(
            input_ids=input_ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()  # [rows, 1, V] -> [rows, V]

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        for name in ("mask", "positions", "rows", "chosen", "lengths", "over"):
            setattr(self, name, getattr(self, name)[rows])

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
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad_token_id)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = torch.tensor(row)
        mask[i, length - len(row) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _response(tokenizer: Any, ids: list[int]) -> Response:
    ended = tokenizer.eos_token_id in ids
    if ended:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return Response(tokenizer.decode(ids, skip_special_tokens=True), ended)


def _replay(decoding: _Decoding) -> list[list[int]]:
    """`_Decoding.run` by steps that are recorded once.

    A recording takes tensors that stay where they are: the cache is as long from the start as it
    will be at the end, and rows that have ended stay until most have, when the others go on as a
    smaller batch. No step is compiled, which would take longer than a small study decodes.
    """
    decoding.take()
    if bool(decoding.over.all()):
        return decoding.ids
    most = decoding.limit - int(decoding.lengths.min()) + 2 * _LOOK_AFTER
    place = torch.tensor([decoding.mask.shape[1]], device=decoding.mask.device)
    layers = decoding.cache.layers
    decoding.cache.layers = [_Places(layer, most, place) for layer in layers]
    decoding.mask = F.pad(decoding.mask, (0, most)).bool()[:, None, None]  # [rows, 1, 1, places]
    with plain_writes():
        while not bool(decoding.over.all()):
            decoding.keep((~decoding.over).nonzero()[:, 0])
            _go_on(decoding, place, most)
    return decoding.ids


def _go_on(decoding: _Decoding, place: Tensor, most: int) -> None:
    """Go on with rows that are all under way until most of them have ended, of few rows all."""
    rows, device = len(decoding.rows), place.device
    left = rows // 4 if rows > _SMALL else 0
    written = torch.full((rows, most), -1, device=device)
    number = torch.zeros(1, dtype=torch.int64, device=device)  # of the next column of `written`
    step = _recorded(lambda: _step(decoding, place, written, number), device)
    while rows - int(decoding.over.sum()) > left:
        for _ in range(_LOOK_AFTER):
            step()
    for row, tokens in zip(decoding.rows.tolist(), written.tolist(), strict=True):
        decoding.ids[row].extend(token for token in tokens if token >= 0)


def _step(decoding: _Decoding, place: Tensor, written: Tensor, number: Tensor) -> None:
    """Read the chosen tokens and choose the next ones; every tensor is changed in its place."""
    decoding.mask.index_fill_(3, place, True)
    decoding.positions.add_((~decoding.over).long()[:, None])  # an ended row stays in its context
    chosen = decoding.choose(decoding.read(decoding.chosen[:, None], decoding.positions))
    decoding.chosen.copy_(chosen)
    written.index_copy_(1, number, torch.where(decoding.over, -1, chosen)[:, None])
    decoding.lengths.add_((~decoding.over).long())
    decoding.over.logical_or_((chosen == decoding.end) | (decoding.lengths >= decoding.limit))
    place.add_(1)
    number.add_(1)


def _recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What makes the same step again, its kernels launched together. One step is made here, as
    whatever a kernel sets up at its first call cannot be recorded."""
    if device.type != "cuda":
        return step
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        step()
    torch.cuda.current_stream(device).wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class _Places(DynamicLayer):
    """A layer's keys and values, [rows, heads, places, head size], with `more` places behind those
    that are taken; the next token's go to `place`, int64 [1], which all layers share."""

    def __init__(self, layer: DynamicLayer, more: int, place: Tensor):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys = F.pad(layer.keys, (0, 0, 0, more))
        self.values = F.pad(layer.values, (0, 0, 0, more))
        self.place = place

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Put the states of one token into their place; returns all, the mask says which count."""
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values


@dataclass(frozen=True)
class Answers:
    """Greedy responses to questions, in their order: texts, whether read, whether right."""

    texts: list[str]
    answered: list[bool]
    right: list[bool]

    @property
    def accuracy(self) -> float:
        """Share of right answers; a response without an answer is wrong."""
        return sum(self.right) / len(self.right)


def answer(
    model: Any,
    tokenizer: Any,
    task: Any,
    questions: list[Any],
    *,
    max_new_tokens: int,
    batch_size: int,
    drafts: list[list[int]] | None = None,
) -> Answers:
    """Greedy decoding of every question, judged by the task; an unended response has no answer.

    drafts: guesses at the responses, see `generate`.

    Raises:
        AlloError: no questions, of which there is no accuracy.
    """
    if not questions:
        raise AlloError("no questions to answer; raise `dev` and `test` of the domain")
    responses = generate(
        model,
        tokenizer,
        [question.prompt for question in questions],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        drafts=drafts,
    )
    texts = [group[0].text for group in responses]
    answered = [
        group[0].ended and task.answered(question, group[0].text)
        for question, group in zip(questions, responses, strict=True)
    ]
    right = [
        read and task.right(question, text)
        for question, text, read in zip(questions, texts, answered, strict=True)
    ]
    return Answers(texts, answered, right)
