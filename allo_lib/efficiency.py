"""What a training step costs: time, peak memory and optimizer state of each way of updating (C10).

Every block of steps runs in a process of its own, one after the other and the variants in turn, so
that neither a slow moment of the machine nor memory left over by another variant decides the
comparison, and the machine has to hold one training at a time.
"""

import csv
import math
import statistics
import sys
from pathlib import Path

import torch

from allo_lib import arithmetic, peers
from allo_lib.config import Profile
from allo_lib.errors import AlloError
from allo_lib.runtime import give_back_freed_memory
from allo_lib.study import Study
from allo_lib.timed_steps import OwnSteps
from allo_lib.workers import fork_server, leave_with_parent
from allo_lib.workload import domain_of, workload

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
    "flops_per_pair",
    "floor_seconds_per_pair",
)
_RATE = 1e-6  # small enough that the weights, and so the arithmetic, stay the same


def variants(study: Study) -> list[str]:
    """What is measured: this project's ways, after the other projects' if the profile wants them
    and they are installed."""
    return [*(peers.installed() if study.profile.timing.peers else []), *VARIANTS]


def measure(study: Study) -> list[dict]:
    """Rows of `tables/efficiency.csv`: DPO steps on one batch of pairs (`workload`).

    Seconds per pair are medians over processes, with the lowest and highest. Tokens per second
    count each token of a pair once, whatever a variant repeats or pads. Peak memory is above that
    of the process with the model loaded and nothing else done. The floor is the time that the
    counted operations of a step take at the rate of a large matrix product on the same device.

    Raises:
        AlloError: a process that ended before it had measured, for want of memory for instance.
    """
    order = variants(study)
    for variant in order:
        _mask(study, variant)  # made here, read by the workers
    workload(study)
    runs: dict[str, list[dict]] = {variant: [] for variant in order}
    for repeat in range(study.profile.timing.repeats):
        for variant in order if repeat % 2 == 0 else reversed(order):
            runs[variant].append(_run(study, variant))
            seconds = runs[variant][-1]["seconds"] / runs[variant][-1]["pairs"]
            print(f"{variant}, repeat {repeat + 1}: {seconds:.4g} s a pair", flush=True)
    return [_row(variant, runs[variant]) for variant in order]


def write(rows: list[dict], path: Path) -> None:
    """Write the rows as CSV with the columns that claims and report read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _run(study: Study, variant: str) -> dict:
    """What one process measured of a variant."""
    context = fork_server()
    ours, theirs = context.Pipe(duplex=False)
    settings = (study.profile, study.seed, str(study.results_dir), study.data_dir)
    process = context.Process(target=_worker, args=(theirs, *settings, variant), daemon=True)
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
    pairs_a_step = last["pairs"] / last["steps"]
    flops = last["flops_per_step"] / pairs_a_step
    rate = statistics.median(run["rate"] for run in runs)
    return {
        "variant": variant,
        "device": last["device"],
        "seconds_per_pair": f"{median:.6g}",
        "seconds_per_pair_low": f"{min(per_pair):.6g}",
        "seconds_per_pair_high": f"{max(per_pair):.6g}",
        "tokens_per_second": f"{last['tokens_per_step'] / pairs_a_step / median:.6g}",
        "peak_bytes_above_model": round(statistics.median(run["peak"] for run in runs)),
        "state_bytes_per_parameter": f"{last['state']:.4g}",
        "flops_per_pair": f"{flops:.6g}",
        "floor_seconds_per_pair": f"{flops / rate:.6g}",
    }


def _worker(pipe, profile: Profile, seed: int, results_dir: str, data_dir, variant: str) -> None:
    """Load, warm up, run one block of steps, and send its time and the sizes."""
    leave_with_parent()
    study = Study(profile, seed, results_dir, data_dir)
    timing, name = profile.timing, domain_of(study)
    model, load = study.load_sft(name).train(), workload(study)
    mask = _mask(study, variant)
    give_back_freed_memory()  # else heap that the set-up left free would hide what the steps take
    base = _reset_peak(study.device)
    steps = _steps(study, model, load, mask, variant)
    seconds = steps.run(timing.warm_up, timing.steps)
    peak = max(0, _peak(study.device) - base)
    pipe.send(
        {
            "seconds": seconds,
            "steps": timing.steps,
            "pairs": timing.steps * len(load.rows),
            "tokens_per_step": load.tokens,
            "peak": peak,
            "state": steps.state_bytes() / sum(p.numel() for p in model.parameters()),
            "flops_per_step": steps.flops,
            "rate": arithmetic.matrix_rate(model.dtype, study.device),
            "device": _device_name(study.device),
        }
    )


def _steps(study: Study, model, load, mask, variant: str):
    method = study.profile.method
    if variant in peers.PEERS:
        return peers.TrlSteps(
            model, study.tokenizer, load.texts, variant, beta=method.beta, share=method.share,
            lr=_RATE,
        )  # fmt: skip
    pad = study.tokenizer.pad_token_id
    return OwnSteps(model, mask, load.rows, variant, pad, beta=method.beta, lr=_RATE)


def _mask(study: Study, variant: str):
    """The variant's mask, read from the store; None where every entry is trained."""
    if variant == "dense" or variant in peers.PEERS:
        return None
    granularity = "row" if variant == "allo_row" else "scalar"
    share = study.profile.method.share
    return study.mask(domain_of(study), share=share, granularity=granularity)


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
    if device == "cpu":
        return _status("VmHWM")
    return torch.cuda.max_memory_allocated()


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
    """A column of one variant over another's; NaN where the second is 0 or one is not there."""
    by_name = {row["variant"]: float(row[column]) for row in rows}
    if first not in by_name or not by_name.get(second):
        return math.nan
    return by_name[first] / by_name[second]
