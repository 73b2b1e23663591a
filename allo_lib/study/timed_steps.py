"""DPO steps on one batch of pairs, timed and counted: this project's, AdamW's with dense state, and
other projects'.

The floor under a step's time is its counted operations at the rate of a large matrix product.
TRL's trainer, and PEFT's adapters in it, are not needed for the study. TRL comes with the tests'
requirements, PEFT with `pip install peft`; a peer that is not installed, or not in that version, is
left out of the comparison, with a line that says so.
"""

import copy
import importlib.util
import tempfile
import time
from contextlib import AbstractContextManager

import torch
from torch.utils.flop_counter import FlopCounterMode

from allo_lib.engine.batching import pair_batch
from allo_lib.engine.forward import layout_of, response_logps, to_device
from allo_lib.method.losses import objective
from allo_lib.method.masked_adamw import DenseMaskedAdamW, MaskedAdamW

# Of the square matrices: a tenth of a second in all on a CPU; on a GPU so large that starting the
# product takes no time beside it.
_SIZES = {"cpu": 1024, "cuda": 8192}
_REPEATS = 5
_NEEDS = {
    "trl_default": ("trl",),
    "trl_best": ("trl",),
    "peft": ("trl", "peft"),
    "peft_supertuning": ("trl", "peft", "peft.tuners.supertuning"),
}
PEERS = tuple(_NEEDS)


def counter() -> AbstractContextManager:
    """Counts the floating-point operations (2 for a multiply-add) of matrix products and attention
    made within it, forward and backward: `.get_total_flops()`."""
    return FlopCounterMode(display=False)


@torch.no_grad()
def matrix_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Operations per second of a square matrix product, the best of five after a first one."""
    generator = torch.Generator(device).manual_seed(0)
    size = _SIZES[torch.device(device).type]
    left, right = (
        torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2)
    )
    best = float("inf")
    for number in range(_REPEATS + 1):
        wait_for(device)
        start = time.perf_counter()
        left @ right
        wait_for(device)
        if number:
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def wait_for(device: str) -> None:
    """Return when all work given to the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


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
        wait_for(self.model.device)
        begun()
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        wait_for(self.model.device)
        return time.perf_counter() - start

    def count(self) -> int:
        """Floating-point operations of one step, which is made."""
        with counter() as counted:
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


def missing(variant: str) -> str | None:
    """The first module that a peer needs and that is not there; None if it can be measured."""
    return next((p for p in _NEEDS[variant] if importlib.util.find_spec(p) is None), None)


def installed() -> list[str]:
    """The peers that can be measured; prints which cannot."""
    for variant in PEERS:
        if missing(variant):
            print(f"{variant} is left out: {missing(variant)} is not installed", flush=True)
    return [variant for variant in PEERS if not missing(variant)]


class TrlSteps:
    """DPO by TRL's DPOTrainer (arXiv 2305.18290, TRL 1.x) on the model and pairs of the others.

    trl_default: its own defaults (a second copy of the model for the reference, gradient
    checkpointing). All others: reference log-probs computed before training, no checkpointing.
    trl_best: every weight. peft: a LoRA adapter of about `share` of the model's parameters.
    peft_supertuning: PEFT's Super-Tuning (arXiv 2607.09287), which trains the largest entries of
    each linear layer's weight, as many in all as `share` of the model's parameters, and adds them
    to a dense copy of that weight in every forward pass. The reference of both is the model without
    its adapter.

    Padding-free batches are not among its best: TRL 1.16 does not make them and warns. Nor is
    autocast where all weights are bfloat16: it has nothing to cast and costs a tenth of a small
    model's step; LoRA's weights, which PEFT makes float32, need it.
    """

    def __init__(self, model, tokenizer, texts, variant: str, *, beta, share, lr):
        self.model, self.tokenizer, self.variant = model, tokenizer, variant
        self.texts = [_all_messages(pair) for pair in texts]
        self.beta, self.lr = beta, lr
        head = model.get_output_embeddings()  # TRL's own head, to which no adapter may belong
        self.linears = [
            m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head
        ]
        self.wanted = share * sum(parameter.numel() for parameter in model.parameters())
        self.flops, self.trainer = 0, None

    def run(self, warm_up: int, steps: int, begun=lambda: None) -> float:
        """Seconds of `steps` optimizer steps after `warm_up` others, all on all pairs; `begun` is
        called between them."""
        from datasets import Dataset
        from trl import DPOTrainer

        with tempfile.TemporaryDirectory() as folder:
            clock = _clock(warm_up, self.model.device, begun)
            self.trainer = DPOTrainer(
                model=self.model,
                # TRL's default is a second copy, which it would load by a name not every model has.
                ref_model=copy.deepcopy(self.model) if self.variant == "trl_default" else None,
                args=self._arguments(folder, warm_up + steps),
                train_dataset=Dataset.from_list(self.texts),
                processing_class=self.tokenizer,
                peft_config=self._adapter(),
                callbacks=[clock],
            )
            self.trainer.train()
        self.flops = clock.counted.get_total_flops()
        return clock.seconds

    def _arguments(self, folder: str, steps: int):
        from trl import DPOConfig

        default = self.variant == "trl_default"
        return DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=len(self.texts),
            max_steps=steps,
            learning_rate=self.lr,
            beta=self.beta,
            use_cpu=self.model.device.type == "cpu",
            bf16=self.model.dtype == torch.bfloat16 and self.variant in ("trl_default", "peft"),
            gradient_checkpointing=default,
            precompute_ref_log_probs=not default,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )

    def _adapter(self):
        if not self.variant.startswith("peft"):
            return None
        import peft

        everywhere = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        if self.variant == "peft":
            return peft.LoraConfig(r=self.rank(), **everywhere)
        sparsity = 1 - self.wanted / sum(m.weight.numel() for m in self.linears)
        return peft.SupertuningConfig(sparsity=sparsity, **everywhere)

    def rank(self) -> int:
        """The LoRA rank whose adapters have about the kept share of the model's parameters."""
        per_rank = sum(m.in_features + m.out_features for m in self.linears)
        return max(1, round(self.wanted / per_rank))

    def _trained(self) -> list:
        return [p for group in self.trainer.optimizer.param_groups for p in group["params"]]

    def trained(self) -> int:
        """How many values the optimizer updates."""
        return sum(parameter.numel() for parameter in self._trained())

    def state_bytes(self) -> int:
        """Moments, and the gradient of what is trained, in the dtype that the trainer gave them; of
        an adapter also its values and indices, which are held beside the model."""
        held = 0
        for parameter in self._trained():
            moments = self.trainer.optimizer.state.get(parameter, {}).values()
            held += sum(t.nbytes for t in moments if torch.is_tensor(t) and t.ndim)
            held += parameter.nbytes * (2 if self.variant.startswith("peft") else 1)
        buffers = self.model.named_buffers()
        return held + sum(b.nbytes for name, b in buffers if "supertuning_indices" in name)


def _all_messages(pair: dict) -> dict:
    """The pair with replies as messages where the prompt is messages: TRL takes no mixture."""
    if isinstance(pair["prompt"], str):
        return pair
    replies = {
        key: [{"role": "assistant", "content": pair[key]}]
        for key in ("chosen", "rejected")
        if isinstance(pair[key], str)
    }
    return pair | replies


def _clock(warm_up: int, device, begun):
    """A callback that times the steps after `warm_up` of them, and counts the first one's
    operations; its class is made here, as transformers' trainer is slow to import."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        seconds, counted = 0.0, counter()

        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 0:
                self.counted.__enter__()

        def on_step_end(self, args, state, control, **_):
            wait_for(device)
            now = time.perf_counter()
            if state.global_step == 1:
                self.counted.__exit__(None, None, None)
            if state.global_step == warm_up:
                begun()
                self.start = time.perf_counter()
            elif state.global_step > warm_up:
                self.seconds = now - self.start

    return Clock()
