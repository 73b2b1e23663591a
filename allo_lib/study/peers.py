"""The same DPO steps by other projects: TRL's trainer, and PEFT's adapters in it, to compare with.

Neither is needed for the study. TRL comes with the tests' requirements, PEFT with `pip install
peft`; a peer that is not installed, or not in that version, is left out of the comparison, with a
line that says so.
"""

import copy
import importlib.util
import tempfile
import time

import torch

from allo_lib.study import arithmetic

PEERS = ("trl_default", "trl_best", "peft", "peft_supertuning")
_NEEDS = {
    "trl_default": ("trl",),
    "trl_best": ("trl",),
    "peft": ("trl", "peft"),
    "peft_supertuning": ("trl", "peft", "peft.tuners.supertuning"),
}


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

    def _second_copy(self):
        """TRL's default reference, which it would load by a name that not every model has."""
        return copy.deepcopy(self.model) if self.variant == "trl_default" else None

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
                begun()
                self.start = time.perf_counter()
            elif state.global_step > warm_up:
                self.seconds = now - self.start

    return Clock()
