"""From text to the rows of a batch: token ids, labels, and values that go along with tokens."""

import torch
from torch import Tensor

from allo_lib.errors import AlloError
from allo_lib.losses import IGNORED


def encode_prompt(tokenizer, prompt) -> list[int]:
    """Token ids of a prompt: a string as it stands, chat messages by the tokenizer's template."""
    if isinstance(prompt, str):
        return tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def encode_response(tokenizer, response) -> list[int]:
    """Token ids of a response, ended by the end token, which is part of it.

    A response may be a string or chat messages, of which the last one is the reply.
    """
    text = response if isinstance(response, str) else response[-1]["content"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def encode_pairs(tokenizer, pairs, max_length: int) -> list[dict[str, list[int]]]:
    """`prompt`, `chosen`, `rejected` of each pair as token ids.

    Raises:
        AlloError: a pair whose chosen equals its rejected response, or one whose prompt and longer
            response do not fit into `max_length` tokens.
    """
    encoded = []
    for number, pair in enumerate(pairs):
        row = {
            "prompt": encode_prompt(tokenizer, pair["prompt"]),
            "chosen": encode_response(tokenizer, pair["chosen"]),
            "rejected": encode_response(tokenizer, pair["rejected"]),
        }
        if row["chosen"] == row["rejected"]:
            raise AlloError(f"pair {number}: chosen equals rejected; leave the pair out")
        length = len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"]))
        if length > max_length:
            raise AlloError(
                f"pair {number}: {length} tokens, but the longest row is {max_length}; "
                "shorten the prompt or leave the pair out"
            )
        encoded.append(row)
    return encoded


def collate(rows: list[dict], pad_token_id: int) -> dict[str, Tensor]:
    """Pad rows to one batch, on the right.

    Args:
        rows: each has `prompt` and `response`, lists of token ids; further keys are lists of
            floats, one per response token, laid under the tokens they belong to.

    Returns:
        `input_ids` and `labels` int64 [B, T] (labels -100 outside the response), and float32 [B, T]
        for every further key, 0 outside the response. No attention mask is needed: padding stands
        behind every response token, which a causal model does not look at.
    """
    length = max(len(row["prompt"]) + len(row["response"]) for row in rows)
    extras = [key for key in rows[0] if key not in ("prompt", "response")]
    input_ids = torch.full((len(rows), length), pad_token_id)
    batch = {"input_ids": input_ids, "labels": torch.full((len(rows), length), IGNORED)}
    batch |= {key: torch.zeros(len(rows), length) for key in extras}
    for i, row in enumerate(rows):
        start, end = len(row["prompt"]), len(row["prompt"]) + len(row["response"])
        input_ids[i, :end] = torch.tensor(row["prompt"] + row["response"])
        batch["labels"][i, start:end] = input_ids[i, start:end]
        for key in extras:
            batch[key][i, start:end] = torch.as_tensor(row[key], dtype=torch.float32)
    return batch


def pair_batch(pairs: list[dict], pad_token_id: int) -> dict[str, Tensor]:
    """Batch of 2B rows: the chosen responses of B pairs, then their rejected ones in that order.

    Each pair has `prompt`, `chosen`, `rejected`; further keys `chosen_<name>` and `rejected_<name>`
    become the further key `<name>` of the batch.
    """
    return collate([_side(p, "chosen") for p in pairs] + [_side(p, "rejected") for p in pairs],
                   pad_token_id)  # fmt: skip


def rejected_batch(pairs: list[dict], pad_token_id: int) -> dict[str, Tensor]:
    """Batch of B rows: the rejected responses alone."""
    return collate([_side(pair, "rejected") for pair in pairs], pad_token_id)


def _side(pair: dict, side: str) -> dict:
    extras = {
        key.removeprefix(f"{side}_"): value
        for key, value in pair.items()
        if key.startswith(f"{side}_")
    }
    return {"prompt": pair["prompt"], "response": pair[side]} | extras
