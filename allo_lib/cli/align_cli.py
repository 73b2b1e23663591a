"""The commands behind `python -m allo_lib`: align a model, and merge what an alignment changed."""

import argparse
import csv
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from allo_lib.cli.cli import BAD_INPUT, parse_value
from allo_lib.data.benchmarks import text_of
from allo_lib.errors import AlloError

USAGE = """\
python -m allo_lib align --model ID_OR_FOLDER --pairs FILE_OR_HUB_ID[:SPLIT] --out DIR
                         [--dry-run] [--stages A,B] [--dtype D] [--revision R] [key=value ...]
python -m allo_lib merge --base ID_OR_FOLDER --delta FILE --out DIR"""
# Operations a second of one device, for the plan: 2 cores of a CPU (results/EXPERIMENTS.md), and
# 40% of the 989 TFLOP/s that an H100 is sold with for bfloat16.
RATES = {"cpu": 2e11, "cuda": 4e14}
_FILES = (".jsonl", ".json", ".csv", ".parquet")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise AlloError(f"{message}; python -m allo_lib --help shows what there is")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 bad input, 130 stopped."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"align": align, "merge": merge}
    try:
        if arguments and arguments[0] in commands:
            commands[arguments[0]](arguments[1:])
            return 0
        if arguments[:1] in (["-h"], ["--help"]):
            print(USAGE)
            return 0
        raise AlloError(f"expected a command, align or merge, as in: {USAGE}")
    except AlloError as error:
        print(f"allo_lib: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"allo_lib: {told(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nallo_lib: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + signal.SIGINT


def align(arguments: list[str]) -> None:
    """Align a model, or print what that takes."""
    parser = _parser()
    for name in ("--model", "--pairs", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--stages", help="some of importance,forgetting,learning; default all")
    parser.add_argument("--dtype", default="auto", help="of the weights; default the fastest here")
    parser.add_argument("--revision", help="of a hub model")
    parser.add_argument("--device-gb", type=float, help="for --dry-run: memory of a device")
    parser.add_argument("--flops", type=float, help="for --dry-run: operations a second of one")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="fields of AlignConfig")
    options = parser.parse_intermixed_args(arguments)
    settings = {}
    for setting in options.settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise AlloError(f"{setting!r}: expected key=value, a setting such as batch_size=8")
        settings[key] = parse_value(key, value, option="")
    import torch

    from allo_lib import align_setup, alignment
    from allo_lib.engine import models

    config = align_setup.checked(settings)
    stages = options.stages.split(",") if options.stages else align_setup.STAGES
    stages = align_setup.chosen_stages(stages)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = models.dtype_on(device, options.dtype)
    if dtype not in models.DTYPES:
        raise AlloError(f"--dtype {dtype!r}: expected auto, {', '.join(models.DTYPES)}")
    pairs = read(options.pairs)
    if options.dry_run:
        print(_plan(options, pairs, config, stages, models.DTYPES[dtype], device))
        return
    model, tokenizer = models.pretrained(options.model, dtype, options.revision)
    alignment.align(
        model.to(device), tokenizer, pairs, stages=stages, config=config, output_dir=options.out
    )


def merge(arguments: list[str]) -> None:
    """Write the aligned model that a base and a delta give."""
    parser = _parser()
    for name in ("--base", "--delta", "--out"):
        parser.add_argument(name, required=True)
    options = parser.parse_args(arguments)
    from allo_lib import delta

    print(f"wrote {delta.merge(options.base, options.delta, options.out)}")


def read(source: str) -> list[dict]:
    """The pairs of a file (.jsonl, .json, .csv, .parquet, the first two also with .gz), of a folder
    that `datasets` saved, or of a hub data set; behind `:` its split, "train" by default.

    Raises:
        AlloError: nothing there, or nothing that can be read.
    """
    path = Path(source)
    name = path.name.removesuffix(".gz")
    try:
        if Path(name).suffix not in _FILES:
            return _dataset(source)
        if not path.is_file():
            raise AlloError(f"--pairs {source}: no such file")
        if name.endswith(".parquet"):
            from pyarrow import parquet

            return parquet.read_table(path).to_pylist()
        if name.endswith(".csv"):
            with open(path, newline="", encoding="utf-8") as file:
                return list(csv.DictReader(file, strict=True))
        text = text_of(path)
        if name.endswith(".json"):
            return json.loads(text)
        lines = enumerate(text.split("\n"), start=1)
        return [_line(source, number, line) for number, line in lines if line.strip()]
    except AlloError:
        raise
    except Exception as error:  # every reader has exceptions of its own for damage
        expected = f"{', '.join(_FILES)}, a folder of datasets.save_to_disk, or a hub id"
        raise AlloError(
            f"--pairs {source}: cannot be read ({told(error)}); expected {expected}"
        ) from error


def _line(source: str, number: int, line: str) -> dict:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise AlloError(
            f"--pairs {source}, line {number}: not JSON ({told(error)}); expected one object a line"
        ) from error


def _dataset(source: str) -> list[dict]:
    import datasets

    name, _, split = source.partition(":")
    split = split or "train"
    if not Path(name).is_dir():
        return datasets.load_dataset(name, split=split).to_list()
    found = datasets.load_from_disk(name)
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise AlloError(f"--pairs {source}: no split {split!r}; it has {', '.join(found)}")
        found = found[split]
    return found.to_list()


def _plan(options, pairs, config, stages, dtype, device: str) -> str:
    from allo_lib import align_setup
    from allo_lib.cli import plan
    from allo_lib.engine import models

    model_config, tokenizer = models.described(options.model, options.revision)
    align_setup.check_config(model_config, options.model)
    context = getattr(model_config, "max_position_embeddings", None)
    parts = align_setup.parts_of(pairs, tokenizer, context, config, stages)
    if "importance" not in stages and not Path(options.out, "mask.safetensors").is_file():
        config = replace(config, share=1.0)
    limit = 1e9 * (options.device_gb or 0)
    if not limit and device == "cuda":
        import torch

        limit = torch.cuda.mem_get_info()[1]
    limit = limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = [f"{len(parts[0].rows)} of {parts[0].count} pairs are trained on"]
    lines += align_setup.lines_about(*parts, stages)
    rate = options.flops or RATES[device]
    return "\n".join(lines) + "\n" + plan.describe(
        tokenizer, model_config, parts, config, stages, dtype, limit, rate, sys.stdout.isatty()
    )  # fmt: skip


def told(error: Exception) -> str:
    """What an exception says, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _parser() -> _Parser:
    usage = USAGE.replace("\n", "\n       ")
    return _Parser(prog="python -m allo_lib", usage=usage, allow_abbrev=False)
