"""DPO steps on one batch of pairs, timed and counted: this project's, the released code's, TRL's.

The floor under a step's time is its counted operations at the rate of a large matrix product.
TRL's trainer, and PEFT's LoRA in it, are not needed for the study: where they are not installed
they are left out of the comparison, with a line that says so.
"""

import importlib.util
import tempfile
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from allo_lib.engine.batching import pair_batch
from allo_lib.engine.forward import layout_of, response_logps, to_device
from allo_lib.method.losses import objective
from allo_lib.method.masked_adamw import MaskedAdamW
from allo_lib.method.neurons import NeuronMask

# Of the square matrices: a tenth of a second in all on a CPU; on a GPU so large that starting the
# product takes no time beside it.
_SIZES = {"cpu": 1024, "cuda": 8192}
PEERS = {"trl_best": ("trl",), "peft": ("trl", "peft")}  # variant -> what it needs


@torch.no_grad()
def matrix_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Operations per second of a square matrix product, the best of five after a first one."""
    generator = torch.Generator(device).manual_seed(0)
    size = _SIZES[torch.device(device).type]
    left, right = (
        torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2)
    )
    seconds = []
    for _ in range(6):
        wait_for(device)
        start = time.perf_counter()
        left @ right
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def wait_for(device: str) -> None:
    """Return when all work given to the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def counter() -> FlopCounterMode:
    """A counter of floating-point operations, 2 for a multiply-add."""

    def addmm(bias, left, right, *_, **__) -> int:  # shapes: [..], [M, K], [K, N]
        return 2 * left[0] * left[1] * right[1]

    # torch 2.11's own takes no `out_dtype`, which TRL gives on a GPU.
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm: addmm})


class DenseMaskedAdamW:
    """What the released code does: AdamW with dense moments whose update is times a dense mask.

    Its mask is bfloat16 and its masters are float32, as there. It saves neither memory nor time;
    here it is the thing to compare with. `step` reads `parameter.grad`.
    """

    def __init__(self, model, mask: NeuronMask, lr: float, betas=(0.9, 0.999), eps: float = 1e-8):
        self.lr, self.betas, self.eps, self.count = lr, betas, eps, 0
        self.rows = []  # parameter, mask, master, two moments
        for name, parameter in model.named_parameters():
            dense = mask.dense(name).to(parameter.device, torch.bfloat16)
            master = parameter.detach().float()  # of a float32 parameter its own storage
            moments = torch.zeros_like(master), torch.zeros_like(master)
            self.rows.append((parameter, dense, master, *moments))

    @torch.no_grad()
    def step(self) -> None:
        """AdamW without decay (arXiv 1711.05101, algorithm 2), the update times the mask."""
        self.count += 1
        first, second = (1 - beta**self.count for beta in self.betas)
        for parameter, mask, master, mean, square in self.rows:
            gradient = parameter.grad.float()
            mean.lerp_(gradient, 1 - self.betas[0])
            square.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
            update = (mean / first) / ((square / second).sqrt_() + self.eps)
            master.sub_(update * mask, alpha=self.lr)
            if parameter.dtype != torch.float32:
                parameter.copy_(master)
            parameter.grad = None

    def state_bytes(self) -> int:
        """Mask, moments, masters where they are copies, and the dense gradient."""
        held = 0
        for parameter, mask, master, mean, square in self.rows:
            held += mask.nbytes + mean.nbytes + square.nbytes + parameter.nbytes
            held += 0 if parameter.dtype == torch.float32 else master.nbytes
        return held


class OwnSteps:
    """DPO on `rows` (encoded pairs with reference log-probs), all of them in every step.

    `dense_masked` updates as the released code does; every other variant is `MaskedAdamW`, for
    which the mask says all. After `run`, `flops` is what one step counts.
    """

    def __init__(self, model, mask, rows, variant: str, pad_token_id: int, *, beta, lr):
        self.model, self.rows, self.flops = model, rows, 0
        self.layout = layout_of(model, pad_token_id)
        self.loss = objective("dpo", beta=beta)
        kind = DenseMaskedAdamW if variant == "dense_masked" else MaskedAdamW
        self.optimizer = kind(model, mask, lr=lr)
        self.state_bytes = self.optimizer.state_bytes

    def run(self, warm_up: int, steps: int, begun=lambda: None) -> float:
        """Seconds of `steps` steps after `warm_up` others; `begun` is called between them."""
        with counter() as counted:
            self._step()
        self.flops = counted.get_total_flops()
        for _ in range(warm_up - 1):
            self._step()
        wait_for(self.model.device)
        begun()
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        wait_for(self.model.device)
        return time.perf_counter() - start

    def _step(self) -> None:
        batch = to_device(pair_batch(self.rows, self.layout), self.model)
        logps = response_logps(self.model, batch)
        self.loss(logps, batch)[0].backward()
        self.optimizer.step()


def installed() -> list[str]:
    """The peers that can be measured; prints which cannot."""
    found = [v for v, needs in PEERS.items() if all(map(importlib.util.find_spec, needs))]
    for variant in PEERS:
        if variant not in found:
            needs = " and ".join(PEERS[variant])
            print(f"{variant} is left out: it needs {needs} to be installed", flush=True)
    return found


class TrlSteps:
    """DPO by TRL's DPOTrainer (arXiv 2305.18290, TRL 1.x) on the model and pairs of the others.

    trl_best: every weight, the reference's log-probs computed before training, no gradient
    checkpointing. peft: the same of a LoRA adapter of about `share` of the model's parameters, its
    reference the model without it.

    Padding-free batches are not among its best: TRL 1.16 does not make them and warns. Nor is
    autocast where all weights are bfloat16: it has nothing to cast and costs a tenth of a small
    model's step; LoRA's weights, which PEFT makes float32, need it.
    """

    def __init__(self, model, tokenizer, texts, variant: str, *, beta, share, lr):
        self.model, self.tokenizer, self.variant = model, tokenizer, variant
        self.texts = [_all_messages(pair) for pair in texts]
        self.beta, self.share, self.lr = beta, share, lr
        self.flops, self.trainer = 0, None

    def run(self, warm_up: int, steps: int, begun=lambda: None) -> float:
        """Seconds of `steps` optimizer steps after `warm_up` others, all on all pairs; `begun` is
        called between them."""
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        with tempfile.TemporaryDirectory() as folder:
            clock = _clock(warm_up, self.model.device, begun)
            config = DPOConfig(
                output_dir=folder, max_steps=warm_up + steps, learning_rate=self.lr, beta=self.beta,
                per_device_train_batch_size=len(self.texts), precompute_ref_log_probs=True,
                use_cpu=self.model.device.type == "cpu", gradient_checkpointing=False,
                bf16=self.model.dtype == torch.bfloat16 and self.variant == "peft",
                report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            self.trainer = DPOTrainer(
                model=self.model,
                args=config,
                train_dataset=Dataset.from_list(self.texts),
                processing_class=self.tokenizer,
                peft_config=self.adapter() if self.variant == "peft" else None,
                callbacks=[clock],
            )
            self.trainer.train()
        self.flops = clock.counted.get_total_flops()
        return clock.seconds

    def adapter(self):
        """LoRA on every linear layer but the head, of the rank whose adapters come nearest to the
        kept share of the model's parameters."""
        from peft import LoraConfig

        head = self.model.get_output_embeddings()
        kept = self.share * sum(parameter.numel() for parameter in self.model.parameters())
        per_rank = sum(
            m.in_features + m.out_features
            for m in self.model.modules()
            if isinstance(m, torch.nn.Linear) and m is not head
        )
        rank = max(1, round(kept / per_rank))
        return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")

    def state_bytes(self) -> int:
        """Moments, and the gradient of what is trained, in the dtype that the trainer gave them; of
        an adapter also its values, which are held beside the model."""
        optimizer, held = self.trainer.optimizer, 0
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            moments = optimizer.state.get(parameter, {}).values()
            held += sum(t.nbytes for t in moments if torch.is_tensor(t) and t.ndim)
            held += parameter.nbytes * (2 if self.variant == "peft" else 1)
        return held


def _all_messages(pair: dict) -> dict:
    """The pair with replies as messages where the prompt is messages: TRL takes no mixture."""
    if isinstance(pair["prompt"], str):
        return pair
    replies = {key: pair[key] for key in ("chosen", "rejected") if isinstance(pair[key], str)}
    return pair | {k: [{"role": "assistant", "content": text}] for k, text in replies.items()}


def _clock(warm_up: int, device, begun):
    """A callback that times the steps after `warm_up` of them, and counts the first one's
    operations; its class is made here, as transformers' trainer is slow to import."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        seconds, start, counted = 0.0, 0.0, counter()

        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 0:
                self.counted.__enter__()

        def on_step_end(self, args, state, control, **_):
            wait_for(device)
            self.seconds = time.perf_counter() - self.start
            if state.global_step == 1:
                self.counted.__exit__(None, None, None)
            if state.global_step == warm_up:
                begun()
                self.start = time.perf_counter()

    return Clock()
