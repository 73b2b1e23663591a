"""The same DPO steps by other projects: TRL's trainer, and PEFT's adapters in it, to compare with.

Neither is needed for the study. TRL comes with the tests' requirements, PEFT with `pip install
peft`; a peer that is not installed is left out of the comparison, with a line that says so.
"""

import copy
import importlib.util
import tempfile
import time

import torch

from allo_lib import arithmetic

PEERS = ("trl_default", "trl_best", "peft")
_NEEDS = {"trl_default": ("trl",), "trl_best": ("trl",), "peft": ("trl", "peft")}


def missing(variant: str) -> str | None:
    """The package that a peer needs and that is not installed; None if it can be measured."""
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
    checkpointing). trl_best: reference log-probs computed before training, no checkpointing. peft:
    as trl_best, with a LoRA adapter of about `share` of the model's parameters, for which the model
    without its adapter is the reference. Padding-free batches need an attention kernel that only
    GPUs have, and are used there.
    """

    def __init__(self, model, tokenizer, texts, variant: str, *, beta, share, lr):
        self.model, self.tokenizer, self.variant = model, tokenizer, variant
        self.texts = [_all_messages(pair) for pair in texts]
        self.beta, self.share, self.lr = beta, share, lr
        self.flops, self.trainer = 0, None

    def run(self, warm_up: int, steps: int) -> float:
        """Seconds of `steps` optimizer steps after `warm_up` others, all on all pairs."""
        from datasets import Dataset
        from trl import DPOTrainer

        with tempfile.TemporaryDirectory() as folder:
            clock = _clock(warm_up, self.model.device)
            self.trainer = DPOTrainer(
                model=self.model,
                ref_model=self._second_copy(),
                args=self._arguments(folder, warm_up + steps),
                train_dataset=Dataset.from_list(self.texts),
                processing_class=self.tokenizer,
                peft_config=self._adapter(),
                callbacks=[clock],
            )
            self.trainer.train()
        self.flops = clock.flops
        return clock.seconds

    def _arguments(self, folder: str, steps: int):
        from trl import DPOConfig

        cpu = self.model.device.type == "cpu"
        best = {} if self.variant == "trl_default" else {"gradient_checkpointing": False}
        if self.variant == "trl_best":
            best |= {"precompute_ref_log_probs": True, "padding_free": not cpu}
        return DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=len(self.texts),
            max_steps=steps,
            learning_rate=self.lr,
            beta=self.beta,
            use_cpu=cpu,
            bf16=self.model.dtype == torch.bfloat16,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **best,
        )

    def _second_copy(self):
        """TRL's default reference, which it would load by a name that not every model has."""
        return copy.deepcopy(self.model) if self.variant == "trl_default" else None

    def _adapter(self):
        if self.variant != "peft":
            return None
        from peft import LoraConfig

        return LoraConfig(r=self.rank(), target_modules="all-linear", task_type="CAUSAL_LM")

    def rank(self) -> int:
        """The LoRA rank whose adapters have about the kept share of the model's parameters."""
        head = self.model.get_output_embeddings()
        linears = [
            m for m in self.model.modules() if isinstance(m, torch.nn.Linear) and m is not head
        ]
        per_rank = sum(m.in_features + m.out_features for m in linears)
        total = sum(parameter.numel() for parameter in self.model.parameters())
        return max(1, round(self.share * total / per_rank))

    def state_bytes(self) -> int:
        """Moments, and the gradient of what is trained, in the dtype that the trainer gave them."""
        optimizer = self.trainer.optimizer
        held = 0
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                moments = optimizer.state.get(parameter, {}).values()
                held += sum(t.nbytes for t in moments if torch.is_tensor(t) and t.ndim)
                held += parameter.nbytes  # its gradient
        return held


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


def _clock(warm_up: int, device):
    """A callback that times the steps after `warm_up` of them, and counts the first."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        seconds, flops = 0.0, 0

        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 0:
                self.counted = arithmetic.counter()
                self.counted.__enter__()

        def on_step_end(self, args, state, control, **_):
            arithmetic.wait_for(device)
            now = time.perf_counter()
            if state.global_step == 1:
                self.counted.__exit__(None, None, None)
                self.flops = self.counted.get_total_flops()
                now = time.perf_counter()
            if state.global_step == warm_up:
                self.start = now
            elif state.global_step > warm_up:
                self.seconds = now - self.start

    return Clock()
