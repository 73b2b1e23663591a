"""This project's DPO steps, and AdamW's with dense state, on one batch of pairs: timed, counted."""

import time

from allo_lib.engine.batching import pair_batch
from allo_lib.engine.forward import layout_of, response_logps, to_device
from allo_lib.method.losses import objective
from allo_lib.method.masked_adamw import DenseMaskedAdamW, MaskedAdamW
from allo_lib.study import arithmetic


class OwnSteps:
    """DPO on `rows` (encoded pairs with reference log-probs), all of them in every step.

    `dense_masked` updates as the released code does; every other variant is `MaskedAdamW`, for
    which the mask says all. After `run`, `flops` is what one step counts.
    """

    def __init__(self, model, mask, rows, variant: str, pad_token_id: int, *, beta, lr):
        self.model, self.rows = model, rows
        self.layout = layout_of(model, pad_token_id)
        self.loss = objective("dpo", beta=beta)
        kind = DenseMaskedAdamW if variant == "dense_masked" else MaskedAdamW
        self.optimizer = kind(model, mask, lr=lr)
        self.kept = mask.kept if mask else sum(p.numel() for p in model.parameters())
        self.flops = 0

    def run(self, warm_up: int, steps: int, begun=lambda: None) -> float:
        """Seconds of `steps` steps after `warm_up` others; `begun` is called between them."""
        self.count()
        for _ in range(warm_up - 1):
            self._step()
        arithmetic.wait_for(self.model.device)
        begun()
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        arithmetic.wait_for(self.model.device)
        return time.perf_counter() - start

    def count(self) -> int:
        """Floating-point operations of one step, which is made."""
        with arithmetic.counter() as counted:
            self._step()
        self.flops = counted.get_total_flops()
        return self.flops

    def close(self) -> None:
        """Give the model back as it was, but for the steps made."""
        if isinstance(self.optimizer, MaskedAdamW):
            self.optimizer.close()

    def trained(self) -> int:
        """How many values the optimizer updates."""
        return self.kept

    def state_bytes(self) -> int:
        """Bytes of optimizer state, packed or dense gradient included."""
        return self.optimizer.state_bytes()

    def _step(self) -> None:
        batch = to_device(pair_batch(self.rows, self.layout), self.model)
        logps = response_logps(self.model, batch)
        self.loss(logps, batch)[0].backward()
        self.optimizer.step()
