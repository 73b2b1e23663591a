"""Where the time goes on a GPU: 20 training steps and one decoding batch under torch's profiler.

    python tests/gpu_trace.py --out DIR [--profile smollm2]

DIR gets `training.trace.json.gz` and `decoding.trace.json.gz`, for chrome://tracing or Perfetto,
and `operations.txt`: numbers as one line of JSON, then the operations that took most of the time.
The model, its batch sizes and lengths are the profile's.
"""

import argparse
import gzip
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from allo_lib.allo import run_stage
from allo_lib.engine import generation
from allo_lib.engine.trainer import Schedule
from allo_lib.machine.environment import device_name
from allo_lib.method.neurons import select_neurons
from allo_lib.profiles.profile_files import load_profile
from allo_lib.study import timed_steps
from allo_lib.study.study import Study

STEPS, WARM_UP = 20, 2
LIMIT = 15_000_000  # bytes of a trace; of a longer one the beginning is kept


def train(study: Study, model):
    """(a function that makes so many DPO steps on scalar neurons, pairs of a step)."""
    timing, domain = study.profile.timing, next(iter(study.profile.domains.values()))
    prompt, response = timing.prompt or 12, (timing.responses or 24) // 2
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(20, model.config.vocab_size, (length,), generator=generator).tolist()

    rows = [
        {"prompt": draw(prompt), "chosen": draw(response), "rejected": draw(response),
         "chosen_reference": [-9.0] * response, "rejected_reference": [-9.0] * response}
        for _ in range((STEPS + WARM_UP) * domain.batch_size)
    ]  # fmt: skip
    scores = {name: p.detach().float().abs() for name, p in model.named_parameters()}
    mask, pad = select_neurons(scores, study.profile.method.share), study.tokenizer.pad_token_id

    def steps(count: int) -> None:
        schedule = Schedule(1e-6, 1, domain.batch_size, 0)
        own = rows[: count * domain.batch_size]
        run_stage(model, own, "dpo", schedule, pad_token_id=pad, mask=mask)

    return steps, domain.batch_size


def decode(study: Study, model):
    """A function that samples one full batch of responses and returns them."""
    batch, samples = study.profile.compute.generation_batch, 8
    longest = max(domain.max_new_tokens for domain in study.profile.domains.values())
    prompts = [f"calc start {i % 20} plus {i // 20} ?" for i in range(batch // samples)]
    return lambda: generation.generate(
        model, study.tokenizer, prompts, max_new_tokens=longest, batch_size=batch, samples=samples,
        temperature=1.0,
    )  # fmt: skip


def timed(work, device):
    """(seconds, result) of `work`."""
    timed_steps.wait_for(device)
    start = time.perf_counter()
    result = work()
    timed_steps.wait_for(device)
    return time.perf_counter() - start, result


def profiled(work, device: str, path: Path) -> tuple[dict, str]:
    """Numbers and table of `work`, whose trace goes to `path`."""
    gpu = [ProfilerActivity.CUDA] if device == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as profiler:
        timed(work, device)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(folder, "trace.json").read_text())
    events = sorted(trace["traceEvents"], key=lambda event: event.get("ts", 0))
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    busy, end = 0.0, 0.0
    for event in kernels:
        start, last = event["ts"], event["ts"] + event["dur"]
        busy, end = busy + max(0.0, last - max(start, end)), max(end, last)
    numbers = {"kernels": len(kernels)}
    if kernels:
        numbers["idle_share"] = round(1 - busy / (end - kernels[0]["ts"]), 4)
    while True:
        packed = gzip.compress(json.dumps(trace | {"traceEvents": events}).encode(), 4)
        if len(packed) <= LIMIT:
            break
        events = events[: len(events) // 2]
    put(path, packed)
    order = f"self_{device}_time_total"
    return numbers, profiler.key_averages().table(sort_by=order, row_limit=40)


def put(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--profile", default="smollm2")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        study = Study(load_profile(options.profile), 0, folder)
        model, device = study.model.eval(), study.device
    generate = decode(study, model)
    first, _ = timed(generate, device)  # compiles
    seconds, groups = timed(generate, device)
    texts = [response.text for group in groups for response in group]
    tokens = sum(map(len, study.tokenizer(texts)["input_ids"]))
    steps, pairs = train(study, model)
    steps(WARM_UP)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    few, many = (timed(lambda n=n: steps(n), device)[0] for n in (WARM_UP, WARM_UP + STEPS))
    rate = STEPS / max(1e-9, many - few)
    told = {
        "device": device_name(device),
        "decoding": {"first_seconds": round(first, 2), "seconds": round(seconds, 2),
                     "tokens_per_second": round(tokens / seconds)},
        "training": {"steps_per_second": round(rate, 3),
                     "pairs_per_second": round(rate * pairs, 2)},
    }  # fmt: skip
    if device == "cuda":
        told["training"]["peak_bytes"] = torch.cuda.max_memory_allocated()
    tables = []
    for name, work in (("training", lambda: steps(STEPS)), ("decoding", generate)):
        numbers, table = profiled(work, device, options.out / f"{name}.trace.json.gz")
        told[name] |= numbers
        tables.append(f"{name}\n{table}")
        # Early: what follows may be cut off.
        put(options.out / "operations.txt", "\n".join([json.dumps(told), *tables]).encode())
    print(json.dumps(told))


if __name__ == "__main__":
    main()
