"""What a training step costs: time, peak memory and optimizer state of each way of updating (C10).

All take the same batch of pairs (`workload`). Every block of steps runs in a process of its own,
one after the other and the variants in turn, so that neither a slow moment of the machine nor
memory left over by another variant decides the comparison, and the machine has to hold one training
at a time.
"""

import contextlib
import math
import resource
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from allo_lib.data.benchmarks import load_rows
from allo_lib.data.pairs import preference_pairs
from allo_lib.engine import reference
from allo_lib.engine.encoding import encode_pairs
from allo_lib.engine.store import write_json
from allo_lib.errors import AlloError
from allo_lib.evaluation import outcomes
from allo_lib.machine.runtime import fork_server, give_back_freed_memory, leave_with_parent
from allo_lib.profiles.config import Profile
from allo_lib.study.study import Study
from allo_lib.study.timed_steps import PEERS, OwnSteps, TrlSteps, installed, matrix_rate

VARIANTS = ("dense", "dense_masked", "allo_scalar", "allo_row")
COLUMNS = (
    "variant", "device", "seconds_per_pair", "seconds_per_pair_low", "seconds_per_pair_high",
    "seconds_per_pair_each", "tokens_per_second", "peak_bytes_above_model",
    "state_bytes_per_parameter", "flops_per_pair", "floor_seconds_per_pair",
)  # fmt: skip
PAIR = ("prompt", "chosen", "rejected")  # TRL's columns
_RATE = 1e-6  # small enough that the weights, and so the arithmetic, stay the same


def measure(study: Study) -> list[dict]:
    """Rows of `tables/efficiency.csv`: DPO steps on one batch of pairs (`workload`).

    This project's ways come after those of the peers that are installed, if the profile's `timing`
    wants any. Seconds per pair are medians over processes, with the lowest, the highest and each.
    Tokens per second count each token of a pair once, whatever a variant repeats or pads. Peak
    memory is above that of the process with the model loaded and nothing else done, and that of the
    timed steps alone. The floor is the time that the counted operations of a step take at the rate
    of a large matrix product on the same device.

    Raises:
        AlloError: a variant that failed, for want of memory for instance.
    """
    variants = [*(installed() if study.profile.timing.peers else []), *VARIANTS]
    for variant in variants:
        _mask(study, variant)  # made here, read by the workers
    workload(study)
    runs: dict[str, list[dict]] = {variant: [] for variant in variants}
    settings = (study.profile, study.seed, str(study.results_dir), study.data_dir)
    for repeat in range(study.profile.timing.repeats):
        for variant in variants[:: -1 if repeat % 2 else 1]:
            run = in_own_process(_worker, *settings, variant)
            runs[variant].append(run)
            seconds = run["seconds"] / run["pairs"]
            print(f"{variant}, repeat {repeat + 1}: {seconds:.4g} s a pair", flush=True)
    return [_row(variant, runs[variant]) for variant in variants]


def write(rows: list[dict], path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Write these columns of the rows as CSV, by default those that claims and report read."""
    outcomes.write_csv(path, columns, [[row.get(name) for name in columns] for row in rows])


def in_own_process(work: Callable, *arguments):
    """What `work(*arguments)` returns, called in a process of its own that ends with it.

    Raises:
        AlloError: the process ended before it returned, or there was too little memory.
    """
    settings = {"mp_context": fork_server(), "initializer": leave_with_parent}
    try:
        with ProcessPoolExecutor(1, **settings) as pool:
            return pool.submit(work, *arguments).result()
    except RuntimeError as error:  # torch's and that of a broken pool are of this kind
        first = str(error).strip().partition("\n")[0][:300]
        raise AlloError(f"{type(error).__name__}: {first}; free memory and run again") from error


def _row(variant: str, runs: list[dict]) -> dict:
    per_pair, last = [run["seconds"] / run["pairs"] for run in runs], runs[-1]
    pairs_a_step = last["pairs"] / last["steps"]
    flops = last["flops_per_step"] / pairs_a_step
    values = (
        variant,
        last["device"],
        f"{median(per_pair):.6g}",
        f"{min(per_pair):.6g}",
        f"{max(per_pair):.6g}",
        " ".join(f"{seconds:.6g}" for seconds in per_pair),
        f"{last['tokens_per_step'] / pairs_a_step / median(per_pair):.6g}",
        round(median(run["peak"] for run in runs)),
        f"{last['state']:.4g}",
        f"{flops:.6g}",
        f"{flops / median(run['rate'] for run in runs):.6g}",
    )
    return dict(zip(COLUMNS, values, strict=True))


def _worker(profile: Profile, seed: int, results_dir: str, data_dir, variant: str) -> dict:
    """Load, warm up, run one block of steps; its time and the sizes."""
    study = Study(profile, seed, results_dir, data_dir)
    timing, load = profile.timing, workload(study)
    model = study.load_sft(domain_of(study)).train()
    parameters = sum(p.numel() for p in model.parameters())  # an adapter will add its own
    mask = _mask(study, variant)
    give_back_freed_memory()  # else heap that the set-up left free would hide what the steps take
    base = reset_peak(study.device)
    settings = {"beta": profile.method.beta, "lr": _RATE}
    if variant in PEERS:
        # Their users are not held to the deterministic kernels of a study.
        torch.use_deterministic_algorithms(False)
        settings["share"] = profile.method.share
        steps = TrlSteps(model, study.tokenizer, load.texts, variant, **settings)
    else:
        pad = study.tokenizer.pad_token_id
        steps = OwnSteps(model, mask, load.rows, variant, pad, **settings)
    seconds = steps.run(timing.warm_up, timing.steps, lambda: reset_peak(study.device))
    return {
        "peak": max(0, peak(study.device) - base),  # before the products below need their own
        "seconds": seconds,
        "steps": timing.steps,
        "pairs": timing.steps * len(load.rows),
        "tokens_per_step": load.tokens,
        "state": steps.state_bytes() / parameters,
        "flops_per_step": steps.flops,
        "rate": matrix_rate(model.dtype, study.device),
        "device": device_name(study.device),
    }


def _mask(study: Study, variant: str):
    """The variant's mask, read from the store; None where every entry is trained."""
    if variant == "dense" or variant in PEERS:
        return None
    granularity = "row" if variant == "allo_row" else "scalar"
    share = study.profile.method.share
    return study.mask(domain_of(study), share=share, granularity=granularity)


def reset_peak(device: str) -> int:
    """Start a new peak; returns the bytes in use now."""
    if device == "cpu":
        with contextlib.suppress(OSError):  # not Linux: the peak so far counts as the idle process
            Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()
    return peak(device)


def peak(device: str) -> int:
    """The most bytes in use since `reset_peak`: of tensors on a GPU, of the process on a CPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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


# --- the pairs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """One batch of pairs.

    texts: TRL's columns prompt, chosen, rejected, for trainers that encode by themselves. rows: the
    same as token ids with the log-probs of the model they start from (`encoding`, `reference`).
    """

    texts: list[dict]
    rows: list[dict]

    @property
    def tokens(self) -> int:
        """Tokens of the prompts and of both responses, each once: the same for every variant,
        whatever it repeats or pads."""
        return sum(len(row[key]) for row in self.rows for key in PAIR)


def domain_of(study) -> str:
    """The domain whose pairs are measured."""
    return study.profile.timing.domain or next(iter(study.profile.domains))


def workload(study) -> Workload:
    """The batch that the profile's `timing` asks for; made at the first call, read afterwards.

    Of the pairs whose prompt and responses come nearest to the tokens in `timing`, or, where these
    are 0, of the first training pairs.
    """
    name, timing = domain_of(study), study.profile.timing
    count = timing.pairs or study.domain(name).batch_size
    wanted = [timing.prompt, timing.responses, count]

    def distance(text: dict) -> int:
        (row,) = encode_pairs(study.tokenizer, [text], study.context)
        responses = len(row["chosen"]) + len(row["rejected"])
        return abs(len(row["prompt"]) - timing.prompt) + abs(responses - timing.responses)

    def make(folder: Path) -> None:
        texts = study.pairs(name).rows["train"]
        if timing.prompt or timing.responses:
            texts = sorted(_candidates(study, name), key=distance)  # of equal ones the first
        texts = [{key: pair[key] for key in PAIR} for pair in texts[:count]]
        rows = encode_pairs(study.tokenizer, texts, study.context)
        write_json(folder / "pairs.json", texts)
        reference.write(study.logps(study.load_sft(name), rows), folder / "logps.safetensors")
        lengths = {key: sum(len(row[key]) for row in rows) / len(rows) for key in PAIR}
        write_json(folder / "record.json", {"pairs": len(rows), "mean_tokens": lengths})

    inputs = {"pairs": study.pairs(name).key, "timing": wanted}
    artifact = study.store.get("timed_pairs", inputs, make)
    texts = artifact.json("pairs.json")
    rows = encode_pairs(study.tokenizer, texts, study.context)
    return Workload(texts, reference.attach(rows, artifact.file("logps.safetensors")))


def _candidates(study, name: str) -> list[dict]:
    """Human pairs of any length that the model can read; sampled ones are what they are."""
    domain = study.domain(name)
    if domain.kind != "preferences":
        return study.pairs(name).rows["train"]
    return [
        pair
        for dataset in domain.datasets
        for pair in preference_pairs(
            load_rows(dataset, "train", study.data_dir), study.tokenizer, study.context
        )
    ]
