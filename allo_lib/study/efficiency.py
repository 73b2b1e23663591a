"""What a training step costs: time, peak memory and optimizer state of each way of updating (C10).

Every block of steps runs in a process of its own, one after the other and the variants in turn, so
that neither a slow moment of the machine nor memory left over by another variant decides the
comparison, and the machine has to hold one training at a time.
"""

import csv
import math
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from allo_lib.errors import AlloError
from allo_lib.machine.runtime import fork_server, give_back_freed_memory, leave_with_parent
from allo_lib.profiles.config import Profile
from allo_lib.study import arithmetic, peers
from allo_lib.study.study import Study
from allo_lib.study.timed_steps import OwnSteps
from allo_lib.study.workload import domain_of, workload

VARIANTS = ("dense", "dense_masked", "allo_scalar", "allo_row")
COLUMNS = (
    "variant",
    "device",
    "seconds_per_pair",
    "seconds_per_pair_low",
    "seconds_per_pair_high",
    "seconds_per_pair_each",
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

    Seconds per pair are medians over processes, with the lowest, the highest and each. Tokens per
    second count each token of a pair once, whatever a variant repeats or pads. Peak memory is above
    that of the process with the model loaded and nothing else done, and that of the timed steps
    alone.
    The floor is the time that the counted operations of a step take at the rate of a large matrix
    product on the same device.

    A peer that fails is left out, with a line that says why.

    Raises:
        AlloError: a variant of this project that failed, for want of memory for instance.
    """
    order = variants(study)
    for variant in order:
        _mask(study, variant)  # made here, read by the workers
    workload(study)
    runs: dict[str, list[dict]] = {variant: [] for variant in order}
    settings = (study.profile, study.seed, str(study.results_dir), study.data_dir)
    for repeat in range(study.profile.timing.repeats):
        for variant in list(runs)[:: -1 if repeat % 2 else 1]:
            try:
                run = in_own_process(_worker, *settings, variant)
            except AlloError as error:
                if variant not in peers.PEERS:
                    raise
                del runs[variant]
                print(f"{variant} is left out: {error}", flush=True)
                continue
            runs[variant].append(run)
            print(
                f"{variant}, repeat {repeat + 1}: {run['seconds'] / run['pairs']:.4g} s a pair, "
                f"{run['trained']} values trained",
                flush=True,
            )
    return [_row(variant, runs[variant]) for variant in runs]


def write(rows: list[dict], path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Write these columns of the rows as CSV, by default those that claims and report read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def in_own_process(work: Callable, *arguments):
    """What `work(*arguments)` returns, called in a process of its own that ends with it.

    Raises:
        AlloError: what it raised, or that the process ended before it returned.
    """
    context = fork_server()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, work, *arguments), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process ends a wait for it
    try:
        found = ours.recv()
    except EOFError:
        raise AlloError(
            "a process that measures the cost of a step ended before its time; free memory or see "
            "what it printed, and run again"
        ) from None
    finally:
        process.terminate()
        process.join()
    if isinstance(found, AlloError):
        raise found
    return found


def _send(pipe, work: Callable, *arguments) -> None:
    leave_with_parent()
    try:
        found = work(*arguments)
    except AlloError as error:
        found = error
    except Exception as error:
        traceback.print_exc()
        words = str(error).strip().splitlines() or [""]
        found = AlloError(f"{type(error).__name__}: {words[0][:300]}")
    pipe.send(found)


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
        "seconds_per_pair_each": " ".join(f"{seconds:.6g}" for seconds in per_pair),
        "tokens_per_second": f"{last['tokens_per_step'] / pairs_a_step / median:.6g}",
        "peak_bytes_above_model": round(statistics.median(run["peak"] for run in runs)),
        "state_bytes_per_parameter": f"{last['state']:.4g}",
        "flops_per_pair": f"{flops:.6g}",
        "floor_seconds_per_pair": f"{flops / rate:.6g}",
    }


def _worker(profile: Profile, seed: int, results_dir: str, data_dir, variant: str) -> dict:
    """Load, warm up, run one block of steps; its time and the sizes."""
    study = Study(profile, seed, results_dir, data_dir)
    if variant in peers.PEERS:  # their users are not held to the deterministic kernels of a study
        torch.use_deterministic_algorithms(False)
    timing, name = profile.timing, domain_of(study)
    model, load = study.load_sft(name).train(), workload(study)
    parameters = sum(p.numel() for p in model.parameters())  # an adapter will add its own
    mask = _mask(study, variant)
    give_back_freed_memory()  # else heap that the set-up left free would hide what the steps take
    base = reset_peak(study.device)
    steps = _steps(study, model, load, mask, variant)
    seconds = steps.run(timing.warm_up, timing.steps, lambda: reset_peak(study.device))
    return {
        "peak": max(0, peak(study.device) - base),  # before the products below need their own
        "seconds": seconds,
        "steps": timing.steps,
        "pairs": timing.steps * len(load.rows),
        "tokens_per_step": load.tokens,
        "trained": steps.trained(),
        "state": steps.state_bytes() / parameters,
        "flops_per_step": steps.flops,
        "rate": arithmetic.matrix_rate(model.dtype, study.device),
        "device": device_name(study.device),
    }


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


def reset_peak(device: str) -> int:
    """Start a new peak; returns the bytes in use now."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _status("VmHWM")  # the peak so far then counts as the idle process
    return _status("VmRSS")


def peak(device: str) -> int:
    """The most bytes in use since `reset_peak`: of tensors on a GPU, of the process on a CPU."""
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


def device_name(device: str) -> str:
    """As `tables/efficiency.csv` names it."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    return f"cpu ({torch.get_num_threads()} threads)"


def ratio(rows: list[dict], first: str, second: str, column: str) -> float:
    """A column of one variant over another's; NaN where the second is 0 or one is not there."""
    by_name = {row["variant"]: float(row[column]) for row in rows}
    if first not in by_name or not by_name.get(second):
        return math.nan
    return by_name[first] / by_name[second]
