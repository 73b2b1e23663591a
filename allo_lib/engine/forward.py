"""Log-probabilities of responses under a model, with logits only where a response token stands.

A vocabulary of 49,152 in float32 makes 0.2 MB of logits a token, and autograd keeps several copies.
In `_TargetLogps` logits live for one chunk of positions at a time: forward keeps none of them, and
backward makes them again where the loss has a gradient. Positions that a loss leaves out
(tokens that are no key tokens, weights of 0) cost nothing in backward.
"""

import contextlib
import inspect
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from allo_lib.engine.batching import Layout, Row, TreeByTree, attention_mask, collate, no_mask
from allo_lib.errors import AlloError
from allo_lib.machine import devices
from allo_lib.method.losses import IGNORED, Batch

SIDES = ("chosen", "rejected")
ROUNDINGS = 16  # of a sum in 16 bits, at most
CHUNK_BYTES = 64 * 2**20  # of float32 logits alive at once
# Config keys of models that change their logits after the head, by too little to be seen while
# those are small.
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_soft_cap",
               "output_logit_soft_cap", "lm_head_multiplier", "output_multiplier")  # fmt: skip
# Config keys of how far back attention sees, of models that do not tell it layer by layer.
_WINDOWS = ("sliding_window", "sliding_window_size", "window_size", "attention_chunk_size")
# How far log-probs of the same sequences may lie apart, relative to their size (of surer tokens to
# a nat each), by dtype; a rounding of the largest logits is allowed as well.
_SAME = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# What a model raises for arguments or parts that it does not have.
_LACKING = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, NotImplementedError)


class _Way(NamedTuple):
    """How a model is read. trees: prefixes are shared. matrix: logits are its head's matrix times
    its decoder's hidden states. With neither it is the model's own forward pass of padded rows."""

    trees: bool
    matrix: bool


# model -> (its attention, tree by tree or not) -> how it is read
_known: weakref.WeakKeyDictionary[Any, dict[Any, _Way]] = weakref.WeakKeyDictionary()


def response_logps(model: Any, batch: Batch) -> Tensor:
    """Log-prob of every response token of a batch (`batching`); float32 [B, T], 0 behind the end.

    The language-model head runs on the positions before response tokens only, and once for
    positions that several responses share; but for models whose logits are more than its product.
    """
    return _logps(model, batch, _way(model, _trees(model)).matrix)


def _logps(model: Any, batch: Batch, matrix: bool) -> Tensor:
    if matrix:
        logps = devices.inside(model, _by_matrix, model, batch)
    else:
        logits = _read(model, model, batch).logits.flatten(0, 1)[batch["before"]]  # [N, V]
        logps = -F.cross_entropy(logits.float(), batch["targets"], reduction="none")
    return torch.cat([logps, logps.new_zeros(1)])[batch["place"]]  # [N + 1] -> [B, T]


def _by_matrix(model: Any, batch: Batch) -> Tensor:
    hidden = _read(model, model.get_decoder(), batch).last_hidden_state.flatten(0, 1)
    hidden = hidden[batch["before"]]  # [R * L, H] -> [N, H]
    head = model.get_output_embeddings()
    return _TargetLogps.apply(hidden, head.weight, getattr(head, "bias", None), batch["targets"])


def layout_of(model: Any, pad_token_id: int, rows: list[Row] | None = None) -> Layout:
    """How batches of this model are laid out: as trees if it reads those as it reads plain rows.

    A short trial finds the cheapest way of reading the model that gives the log-probs of its own
    forward pass, row by row: on `rows` where given, else on a few short ones that the model writes,
    once. Sequences do not share their prefixes for attention that takes no mask for every two
    tokens, layers that are no full attention, or rows longer than a sliding window. On a CPU all
    trees share one row and attention is made tree by tree, but for recomputed activations, which
    are made again when that is over.

    Raises:
        AlloError: no way gives the model's own log-probs; it is no causal language model.
    """
    layout = _trees(model, pad_token_id)
    way = _way(model, layout, rows)
    return replace(layout, shared=way.trees, one_row=way.trees and layout.one_row)


def _trees(model: Any, pad_token_id: int = 0) -> Layout:
    """The layout of a model that reads trees."""
    config = model.config.get_text_config()
    recomputes = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    on_cpu, by_sdpa = model.device.type == "cpu", config._attn_implementation == "sdpa"
    window = 0
    if not getattr(config, "layer_types", None):  # else it says so layer by layer
        found = (getattr(config, key, None) for key in _WINDOWS)
        window = min((one for one in found if type(one) is int and one > 0), default=0)
    return Layout(pad_token_id, True, on_cpu and by_sdpa and not recomputes, window)


def _way(model: Any, layout: Layout, rows: list[Row] | None = None) -> _Way:
    """The way that was found for the model, or is found now."""
    known = _known.setdefault(model, {})
    key = model.config.get_text_config()._attn_implementation, layout.one_row
    if rows is not None or key not in known:
        way = _trial(model, layout, rows)
        if not way.matrix and known.get(key) != way:
            name = type(model).__name__
            print(f"{name}: its own logits are used, which are no product of its head", flush=True)
        known[key] = way
    return known[key]


@torch.no_grad()
def _trial(model: Any, layout: Layout, rows: list[Row] | None) -> _Way:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    shares = config._attn_implementation == "sdpa" and kinds == {"full_attention"}
    alters = _alters(config)
    modes = [(part, part.training) for part in model.modules()]
    why = "what it gives of a row depends on what stands behind or beside it"
    cause: Exception | None = None
    model.eval()
    try:
        rows = rows or _written(model)
        own, largest = zip(*(_own(model, row) for row in rows), strict=True)
        expected = torch.cat(own)
        counted = type(expected) is not Tensor or expected.is_meta  # shapes without values
        if counted or not torch.isfinite(expected).all():  # the training tells of that
            return _Way(False, True)
        size = max(expected.norm(), len(expected) ** 0.5)
        rounding = torch.finfo(model.dtype).eps * torch.cat(largest).norm()
        allowed = max(_SAME.get(model.dtype, 0.0) * size, rounding)
        for trees in (True, False) if shares else (False,):
            batch = to_device(collate(rows, replace(layout, shared=trees)), model)
            for matrix in (False,) if alters else (True, False):
                with contextlib.suppress(*_LACKING):
                    logps = _logps(model, batch, matrix)
                    found = torch.cat([one[: len(e)] for one, e in zip(logps, own, strict=True)])
                    # A mean, as in 16 bits a mixture of experts may send a token elsewhere for a
                    # rounding error.
                    if (found - expected).norm() <= allowed:
                        return _Way(trees, matrix)
    except _LACKING as error:
        why, cause = "its forward pass fails: " + " ".join(str(error).split())[:200], error
    finally:
        for part, mode in modes:
            part.training = mode
    raise AlloError(
        f"{type(model).__name__} cannot be read as a causal language model: {why}; give one of "
        "transformers' ...ForCausalLM that reads from left to right"
    ) from cause


def _written(model: Any) -> list[Row]:
    """Three short rows as the model itself goes on, drawn at temperature 1; two share a prompt.

    Of text that a model would never write its log-probs in 16 bits are moved a tenth by rounding.
    """
    generator = torch.Generator().manual_seed(0)
    ids = [[1], [1], [1]]  # an id that every vocabulary has
    for length in range(1, 8):
        logits = model(input_ids=torch.tensor(ids, device=model.device), use_cache=False).logits
        drawn = [0, 0, 0]
        if type(logits) is Tensor and not logits.is_meta:  # else shapes without values
            last = logits[:, -1].float().cpu()
            last -= torch.empty_like(last).exponential_(generator=generator).log()
            if length == 3:  # where the two responses begin
                last[1, last[0].argmax()] = -torch.inf
            drawn = last.argmax(-1).tolist()
        if length < 3:
            drawn[1] = drawn[0]
        ids = [[*row, new] for row, new in zip(ids, drawn, strict=True)]
    one, other, third = ids
    return [
        {"prompt": one[:3], "response": one[3:]},
        {"prompt": other[:3], "response": other[3:7]},
        {"prompt": third[:2], "response": third[2:5]},
    ]


def _alters(config: Any) -> bool:
    return any(getattr(config, key, None) for key in _AFTER_HEAD)


def takes_drafts(model: Any) -> bool:
    """Whether a token's hidden state follows from the tokens before it that a mask shows and from
    its position alone, and the largest logit is that of the head's product with it."""
    layout, told = _trees(model), inspect.signature(model.forward).parameters
    decides = _alters(model.config.get_text_config()) or _way(model, layout).matrix
    return not layout.window and "position_ids" in told and decides


def _own(model: Any, row: Row) -> tuple[Tensor, Tensor]:
    """Of one response by the model's plain forward pass of that row alone: its log-probs, and of
    each position the log of the sum that makes them, about its largest logit."""
    ids = torch.tensor([[*row["prompt"], *row["response"]]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(row["prompt"]) - 1 : -1]
    logps = -F.cross_entropy(logits.float(), ids[0, len(row["prompt"]) :], reduction="none")
    return logps, logits.float().logsumexp(-1)


def before_responses(model: Any, batch: Batch) -> Tensor:
    """Hidden states before the response tokens of all sequences, in order: [all tokens, H]."""
    batch = to_device(batch, model)
    hidden = _read(model, model.get_decoder(), batch).last_hidden_state.flatten(0, 1)
    return hidden[batch["before"][batch["place"][batch["labels"] != IGNORED]]]


def _read(model: Any, part: Any, batch: Batch) -> Any:
    """What `part` of the model (its decoder, or all of it) gives of the batch's rows."""
    reads = {"input_ids": batch["input_ids"], "use_cache": False}
    if "ends" not in batch:  # padding stands behind what is read, and goes unseen
        return part(**reads)
    reads["position_ids"] = batch["position_ids"]
    if "sizes" in batch:
        reads["attention_mask"] = no_mask(batch["ends"], model.dtype)
        with TreeByTree(batch["ends"], batch["sizes"]):
            return part(**reads)
    seen = attention_mask(batch["ends"])
    # To be added, as attention would make it so in every layer.
    mask = torch.zeros_like(seen, dtype=model.dtype).masked_fill_(~seen, -torch.inf)
    return part(**reads, attention_mask=mask)


def to_device(batch: Batch, model: Any) -> Batch:
    """The batch where the model is."""
    return {key: value.to(model.device) for key, value in batch.items()}


@torch.no_grad()
def logps_of_rows(
    model: Any, rows: list[Row], pad_token_id: int, batch_size: int
) -> list[list[float]]:
    """Per-token log-probs of the `response` of each row, in the order of `rows`.

    rows: `prompt` and `response` as token ids. Rows of the same prompt, and then of similar length,
    share a batch. Several processes share the batches, and all get the log-probs of all rows.
    """
    model.eval()
    layout = layout_of(model, pad_token_id)
    prompts = [tuple(row["prompt"]) for row in rows]
    lengths = [len(row["response"]) for row in rows]
    longest: dict[tuple[int, ...], int] = {}  # tokens of a prompt and its longest response
    for prompt, length in zip(prompts, lengths, strict=True):
        longest[prompt] = max(longest.get(prompt, 0), len(prompt) + length)
    order = sorted(range(len(rows)), key=lambda i: (longest[prompts[i]], prompts[i], lengths[i]))
    result: list[list[float]] = [[] for _ in rows]
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for chunk in devices.turns(chunks):
        logps = response_logps(model, to_device(collate([rows[i] for i in chunk], layout), model))
        for i, values in zip(chunk, logps, strict=True):
            result[i] = values[: lengths[i]].tolist()
    return devices.merged(result)


def pair_logps(
    model: Any, pairs: list[Row], pad_token_id: int, batch_size: int
) -> list[dict[str, list[float]]]:
    """Per-token log-probs of both responses of encoded pairs: `chosen` and `rejected` lists."""
    rows = [{"prompt": pair["prompt"], "response": pair[s]} for pair in pairs for s in SIDES]
    values = iter(logps_of_rows(model, rows, pad_token_id, batch_size))
    return [{"chosen": next(values), "rejected": next(values)} for _ in pairs]


@torch.no_grad()
def argmax_tokens(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """argmax over the vocabulary of hidden @ weight.T + bias: int64 [N], the first of equal ones.

    hidden [N, H], weight [V, H], bias [V] or None. What some models do after the head (scaling by a
    positive number, capping) keeps the order of logits, and so this.
    """
    best = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    for part in _chunks(len(hidden), weight):
        best[part] = _logits(hidden[part], weight, bias).argmax(dim=-1)
    return best


class _TargetLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[targets], float32 [N].

    Shapes: hidden [N, H], the last hidden states, in the dtype of the weights; weight [V, H] and
    bias [V] (or None) of the head; targets int64 [N], ids below V. The product is made in the dtype
    of the weights, everything after it in float32. Gradients go to hidden, weight and bias, equal
    to those of `log_softmax` and `gather` up to rounding.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for part in _chunks(len(targets), weight):
            logits = _logits(hidden[part], weight, bias)  # [chunk, V]
            torch.log_softmax(logits, dim=-1, out=logits)
            logps[part] = logits.gather(1, targets[part, None])[:, 0]
        ctx.save_for_backward(hidden, weight, bias, targets)
        return logps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        to_hidden = torch.zeros_like(hidden) if needs_hidden else None
        to_weight: Tensor | None = None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        # A sum of many chunks would be rounded to 16 bits as often.
        few = len(gradient) <= ROUNDINGS * rows_at_once(len(weight))
        # To count those that are used, a host would have to wait for its GPU.
        everywhere = torch.arange(len(gradient), device=gradient.device)
        used = everywhere if gradient.is_cuda else gradient.nonzero()[:, 0]
        for part in _chunks(len(used), weight):
            rows = used[part]
            by_logits, weights = _logits(hidden[rows], weight, bias), gradient[rows, None]
            # d/dlogits of sum_i g_i log softmax(logits[i])[y_i] = g (1[y] - softmax)
            torch.softmax(by_logits, dim=-1, out=by_logits)
            by_logits.mul_(-weights).scatter_add_(1, targets[rows, None], weights)
            if to_bias is not None:
                to_bias += by_logits.sum(dim=0)
            by_logits = by_logits.to(weight.dtype)
            if to_hidden is not None:
                to_hidden[rows] = by_logits @ weight
            if to_weight is not None and few:
                to_weight.addmm_(by_logits.T, hidden[rows])
            elif needs_weight:
                product = by_logits.T @ hidden[rows]
                if to_weight is None:
                    to_weight = product if few else product.float()
                else:
                    to_weight.add_(product)
        if needs_weight and to_weight is None:
            to_weight = torch.zeros_like(weight)
        if to_weight is not None:
            to_weight = to_weight.to(weight.dtype)
        return to_hidden, to_weight, None if to_bias is None else to_bias.to(bias.dtype), None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias).float()


def rows_at_once(vocabulary: int) -> int:
    """Positions whose logits are alive together."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def _chunks(count: int, weight: Tensor) -> Iterator[slice]:
    rows = rows_at_once(len(weight))
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def implicit_margins(
    policy: list[dict[str, Any]], rows: list[dict[str, Any]], beta: float
) -> list[float]:
    """DPO's implicit reward of chosen minus rejected, per pair: beta (Delta+ - Delta-).

    policy: `pair_logps` of the pairs; rows: these, with the log-probs of their references.
    """
    margins = []
    for now, row in zip(policy, rows, strict=True):
        chosen, rejected = (sum(now[side]) - sum(row[f"{side}_reference"]) for side in SIDES)
        margins.append(beta * (chosen - rejected))
    return margins
