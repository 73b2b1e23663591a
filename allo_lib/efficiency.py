"""What a training step costs: time, peak memory and optimizer state of each way of updating (C10).

Every block of steps runs in a process of its own, one after the other and the variants in turn, so
that neither a slow moment of the machine nor memory left over by another variant decides the
comparison, and the machine has to hold one training at a time.
"""

import csv
import math
import statistics
import sys
import time
from pathlib import Path

import torch

from allo_lib import weights
from allo_lib.batches import pair_batch
from allo_lib.config import Profile
from allo_lib.errors import AlloError
from allo_lib.forward import layout_of, response_logps, to_device
from allo_lib.importance import select_neurons
from allo_lib.objectives import objective
from allo_lib.optim import MaskedAdamW
from allo_lib.runtime import give_back_freed_memory
from allo_lib.study import Study
from allo_lib.workers import fork_server

VARIANTS = ("dense", "dense_masked", "allo_scalar", "allo_row")
COLUMNS = (
    "variant",
    "device",
    "seconds_per_pair",
    "seconds_per_pair_low",
    "seconds_per_pair_high",
    "tokens_per_second",
    "peak_bytes_above_model",
    "state_bytes_per_parameter",
)
_RATE = 1e-6  # small enough that the weights, and so the arithmetic, stay the same


class DenseMaskedAdamW:
    """What the released code does: AdamW with dense moments whose update is times a dense mask.

    Its mask is bfloat16 and its masters are float32, as there. It saves neither memory nor time;
    here it is the thing to compare with. `step` reads `parameter.grad`.
    """

    def __init__(self, model, mask, lr: float, betas=(0.9, 0.999), eps: float = 1e-8):
        self.lr, self.betas, self.eps, self.count = lr, betas, eps, 0
        self.rows = []
        for name, parameter in model.named_parameters():
            dense = mask.dense(name).to(parameter.device, torch.bfloat16)
            whole = parameter.dtype == torch.float32
            master = parameter.detach() if whole else parameter.detach().float()
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
            if master.data_ptr() != parameter.data_ptr():
                parameter.copy_(master)
            parameter.grad = None

    def state_bytes(self) -> int:
        """Mask, moments, masters where they are copies, and the dense gradient."""
        return sum(
            mask.nbytes
            + mean.nbytes
            + square.nbytes
            + (0 if master.data_ptr() == parameter.data_ptr() else master.nbytes)
            + parameter.nbytes
            for parameter, mask, master, mean, square in self.rows
        )


def measure(study: Study, name: str) -> list[dict]:
    """Rows of `tables/efficiency.csv` for one domain: DPO steps on its training pairs.

    Seconds per pair are medians over blocks of steps, with the lowest and highest block. Peak
    memory is above that of the process with the model loaded and nothing else done.

    Raises:
        AlloError: a process that ended before it had measured, for want of memory for instance.
    """
    study.scores(name), study.encoded(name, "train")  # made here, read by the workers
    runs: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    for repeat in range(study.profile.timing.repeats):
        for variant in VARIANTS if repeat % 2 == 0 else reversed(VARIANTS):
            runs[variant].append(_run(study, name, variant))
    return [_row(variant, runs[variant]) for variant in VARIANTS]


def write(rows: list[dict], path: Path) -> None:
    """Write the rows as CSV with the columns that claims and report read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _run(study: Study, name: str, variant: str) -> dict:
    """What one process measured of a variant."""
    context = fork_server()
    ours, theirs = context.Pipe(duplex=False)
    settings = (study.profile, study.seed, str(study.results_dir), study.data_dir)
    process = context.Process(target=_worker, args=(theirs, *settings, name, variant), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process ends a wait for it
    try:
        return ours.recv()
    except EOFError:
        raise AlloError(
            "a process that measures the cost of a step ended before its time; free memory or see "
            "what it printed, and run again"
        ) from None
    finally:
        process.terminate()
        process.join()


def _row(variant: str, runs: list[dict]) -> dict:
    per_pair = [run["seconds"] / run["pairs"] for run in runs]
    median, last = statistics.median(per_pair), runs[-1]
    return {
        "variant": variant,
        "device": last["device"],
        "seconds_per_pair": f"{median:.6g}",
        "seconds_per_pair_low": f"{min(per_pair):.6g}",
        "seconds_per_pair_high": f"{max(per_pair):.6g}",
        "tokens_per_second": f"{last['tokens'] / last['pairs'] / median:.6g}",
        "peak_bytes_above_model": round(statistics.median(run["peak"] for run in runs)),
        "state_bytes_per_parameter": f"{last['state']:.4g}",
    }


def _worker(pipe, profile: Profile, seed: int, results_dir: str, data_dir, name, variant) -> None:
    """Load, warm up, run one block of steps, and send its time and the sizes."""
    study = Study(profile, seed, results_dir, data_dir)
    model = study.load_sft(name).train()
    rows = study.encoded(name, "train")
    mask = _mask(study, name, variant)
    give_back_freed_memory()  # else heap that the set-up left free would hide what the steps take
    base = _reset_peak(study.device)
    step = _Stepper(study, name, model, mask, variant, rows)
    for _ in range(study.profile.timing.warm_up):
        step()
    _wait_for(study.device)
    start = time.perf_counter()
    counts = [step() for _ in range(study.profile.timing.steps)]
    _wait_for(study.device)
    seconds = time.perf_counter() - start
    pairs, tokens = (sum(count) for count in zip(*counts, strict=True))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    pipe.send(
        {
            "seconds": seconds,
            "pairs": pairs,
            "tokens": tokens,
            "peak": max(0, _peak(study.device) - base),
            "state": step.optimizer.state_bytes() / parameters,
            "device": _device_name(study.device),
        }
    )


def _wait_for(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _mask(study: Study, name: str, variant: str):
    """The variant's mask; made for `dense` too, so that all processes have the same past."""
    scores = weights.read_tensors(study.scores(name).file("scores.safetensors"))
    granularity = "row" if variant == "allo_row" else "scalar"
    mask = select_neurons(scores, study.profile.method.share, granularity=granularity)
    return None if variant == "dense" else mask


class _Stepper:
    """One DPO step a call, the same batches in the same order for every variant."""

    def __init__(self, study: Study, name: str, model, mask, variant: str, rows: list[dict]):
        self.model, self.rows, self.place = model, rows, 0
        self.batch_size = min(study.domain(name).batch_size, len(rows))
        self.layout = layout_of(model, study.tokenizer.pad_token_id)
        self.loss = objective("dpo", beta=study.profile.method.beta)
        kind = DenseMaskedAdamW if variant == "dense_masked" else MaskedAdamW
        self.optimizer = kind(model, mask, lr=_RATE)

    def __call__(self) -> tuple[int, int]:
        chunk = [self.rows[(self.place + i) % len(self.rows)] for i in range(self.batch_size)]
        self.place = (self.place + self.batch_size) % (len(self.rows) // self.batch_size
                                                       * self.batch_size)  # fmt: skip
        batch = to_device(pair_batch(chunk, self.layout), self.model)
        logps = response_logps(self.model, batch)
        self.loss(logps, batch)[0].backward()
        self.optimizer.step()
        return len(chunk), int((batch["input_ids"] != self.layout.pad_token_id).sum())


def _reset_peak(device: str) -> int:
    """Start a new peak; returns the bytes in use now."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _status("VmHWM")  # the peak so far then counts as the idle process
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device != "cpu" else _status("VmHWM")


def _status(key: str) -> int:
    """A size from Linux's /proc/self/status in bytes; elsewhere the peak of the process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    return f"cpu ({torch.get_num_threads()} threads)"


def ratio(rows: list[dict], first: str, second: str, column: str) -> float:
    """A column of one variant over another's; NaN where the second is 0."""
    by_name = {row["variant"]: float(row[column]) for row in rows}
    return by_name[first] / by_name[second] if by_name[second] else math.nan
