"""From text to token ids: prompts, responses, and pairs of them."""

from allo_lib.errors import AlloError


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
