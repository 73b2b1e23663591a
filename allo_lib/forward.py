"""Log-probabilities of responses under a model, with logits only where a response token stands."""

import torch
import torch.nn.functional as F
from torch import Tensor

from allo_lib.encoding import collate
from allo_lib.losses import IGNORED, token_logps

# Config keys of models that change their logits after the head: those take the plain way.
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def response_logps(model, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Log-prob of every response token, as `losses.token_logps` gives; float32 [B, T].

    input_ids, labels: int64 [B, T], padded on the right. The language-model head runs on the
    positions before response tokens only.
    """
    if any(getattr(model.config, key, None) for key in _AFTER_HEAD):
        return token_logps(model(input_ids=input_ids, use_cache=False).logits, labels)
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    inside = labels[:, 1:] != IGNORED
    logits = model.get_output_embeddings()(hidden[:, :-1][inside]).float()
    logps = -F.cross_entropy(logits, labels[:, 1:][inside], reduction="none")
    empty = torch.zeros(inside.shape, dtype=torch.float32, device=logps.device)
    return F.pad(empty.masked_scatter(inside, logps), (1, 0))


@torch.no_grad()
def logps_of_rows(model, rows: list[dict], pad_token_id: int, batch_size: int) -> list[list[float]]:
    """Per-token log-probs of the `response` of each row, in the order of `rows`.

    rows: `prompt` and `response` as token ids. Rows of like length share a batch.
    """
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt"] + rows[i]["response"]))
    result: list[list[float]] = [[] for _ in rows]
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        picked = [{key: rows[i][key] for key in ("prompt", "response")} for i in chunk]
        batch = {k: v.to(model.device) for k, v in collate(picked, pad_token_id).items()}
        logps = response_logps(model, batch["input_ids"], batch["labels"])
        for i, values, labels in zip(chunk, logps, batch["labels"], strict=True):
            result[i] = values[labels != IGNORED].tolist()
    return result
