"""Log-probabilities of responses under a model, with logits only where a response token stands."""

import contextlib
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor

from allo_lib.batches import Layout, collate, side
from allo_lib.head import target_logps
from allo_lib.losses import IGNORED
from allo_lib.prefix_tree import blocks, sees
from allo_lib.tree_attention import TreeByTree, no_mask

# Config keys of models that change their logits after the head: those take the plain way.
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")
# The attentions of transformers that take a mask for every two tokens, and how it is made.
_MASKS = {"sdpa": sees, "flex_attention": blocks}
# How far hidden states of the same sequence may lie apart, relative to the largest, by dtype.
_SAME = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# model -> (its attention, tree by tree or not) -> whether it reads trees
_shares: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def response_logps(model, batch: dict[str, Tensor]) -> Tensor:
    """Log-prob of every response token of a batch (`batches`); float32 [B, T], 0 behind the end.

    The language-model head runs on the positions before response tokens only, and once for
    positions that several responses share.
    """
    if any(getattr(model.config, key, None) for key in _AFTER_HEAD):
        logits = _read(model, model, batch).logits.flatten(0, 1)[batch["before"]]
        logps = -F.cross_entropy(logits.float(), batch["targets"], reduction="none")
    else:
        hidden = _read(model, model.get_decoder(), batch).last_hidden_state.flatten(0, 1)
        hidden = hidden[batch["before"]]
        head = model.get_output_embeddings()
        logps = target_logps(hidden, head.weight, getattr(head, "bias", None), batch["targets"])
    return torch.cat([logps, logps.new_zeros(1)])[batch["place"]]


def layout_of(model, pad_token_id: int) -> Layout:
    """How batches of this model are laid out: as trees if it reads those as it reads plain rows.

    Sequences share their prefixes where a short trial gives the same hidden states both ways. It
    does not for attention that takes no mask for every two tokens, sliding windows, or layers that
    are no attention at all: those models get one padded row a sequence. On a CPU all trees share
    one row and attention is made tree by tree, but for recomputed activations, which are made again
    when that is over.
    """
    config = model.config.get_text_config()
    attention = config._attn_implementation
    recomputes = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    one_row = model.device.type == "cpu" and attention == "sdpa" and not recomputes
    known = _shares.setdefault(model, {})
    if (attention, one_row) not in known:
        tried = Layout(pad_token_id, True, config.hidden_size, one_row)
        known[attention, one_row] = _reads_trees(model, tried)
    if known[attention, one_row]:
        return Layout(pad_token_id, True, config.hidden_size, one_row)
    return Layout(pad_token_id, False, config.hidden_size)


@torch.no_grad()
def _reads_trees(model, layout: Layout) -> bool:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    takes_masks = config._attn_implementation in _MASKS
    if not takes_masks or kinds != {"full_attention"} or config.vocab_size < 16:
        return False
    training = model.training
    rows = [
        {"prompt": [1, 2, 3], "response": [4, 5, 6, 7]},
        {"prompt": [1, 2, 3], "response": [8, 9, 10, 11, 12]},
        {"prompt": [13, 2], "response": [3, 14, 15]},
    ]
    model.eval()
    try:
        plain, tree = (
            before_responses(model, collate(rows, one))
            for one in (Layout(layout.pad_token_id), layout)
        )
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # the model's forward takes no such mask or positions
    finally:
        model.train(training)
    distance = (plain - tree).abs().max() / plain.abs().max().clamp_min(1e-12)
    return bool(distance <= _SAME.get(plain.dtype, 0.0))


def before_responses(model, batch: dict[str, Tensor]) -> Tensor:
    """Hidden states before response tokens of all sequences, one after the other."""
    batch = to_device(batch, model)
    hidden = _read(model, model.get_decoder(), batch).last_hidden_state.flatten(0, 1)
    return hidden[batch["before"][batch["place"][batch["labels"] != IGNORED]]]


def _read(model, part, batch: dict[str, Tensor]):
    """What `part` of the model (its decoder, or all of it) gives of the batch's rows."""
    reads = {key: batch[key] for key in ("input_ids", "position_ids")} | {"use_cache": False}
    attention = contextlib.nullcontext()
    if "sizes" in batch:
        attention = TreeByTree(batch["ends"], batch["sizes"])
        reads["attention_mask"] = no_mask(batch["ends"], model.dtype)
    elif "ends" in batch:
        mask_of = _MASKS[model.config.get_text_config()._attn_implementation]
        reads["attention_mask"] = mask_of(batch["ends"])
    with attention:
        return part(**reads)


def to_device(batch: dict[str, Tensor], model) -> dict[str, Tensor]:
    """The batch where the model is."""
    return {key: value.to(model.device) for key, value in batch.items()}


@torch.no_grad()
def logps_of_rows(model, rows: list[dict], pad_token_id: int, batch_size: int) -> list[list[float]]:
    """Per-token log-probs of the `response` of each row, in the order of `rows`.

    rows: `prompt` and `response` as token ids. Rows of the same prompt, and then of like length,
    share a batch.
    """
    model.eval()
    layout = layout_of(model, pad_token_id)
    longest: dict[tuple, int] = {}
    for row in rows:
        key = tuple(row["prompt"])
        longest[key] = max(longest.get(key, 0), len(row["prompt"]) + len(row["response"]))

    def length(i: int):
        key = tuple(rows[i]["prompt"])
        return longest[key], key, len(rows[i]["response"])

    order = sorted(range(len(rows)), key=length)
    result: list[list[float]] = [[] for _ in rows]
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        picked = [{key: rows[i][key] for key in ("prompt", "response")} for i in chunk]
        batch = to_device(collate(picked, layout), model)
        logps = response_logps(model, batch)
        for i, values in zip(chunk, logps, strict=True):
            result[i] = values[: len(rows[i]["response"])].tolist()
    return result


def pair_logps(model, pairs: list[dict], pad_token_id: int, batch_size: int) -> list[dict]:
    """Per-token log-probs of both responses of encoded pairs: `chosen` and `rejected` lists."""
    rows = [
        {key: value for key, value in side(pair, which).items() if key in ("prompt", "response")}
        for pair in pairs
        for which in ("chosen", "rejected")
    ]
    values = logps_of_rows(model, rows, pad_token_id, batch_size)
    return [
        {"chosen": chosen, "rejected": rejected}
        for chosen, rejected in zip(values[::2], values[1::2], strict=True)
    ]
