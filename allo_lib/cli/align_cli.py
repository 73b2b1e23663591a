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
DEVICES = (1, 2, 8)  # that the plan counts for
_FILES = (".jsonl", ".json", ".csv", ".parquet")
_COLOURS = {"prompt": "\x1b[2m", "chosen": "\x1b[32m", "rejected": "\x1b[31m", "end": "\x1b[1;33m"}
_SHOWN = 40  # tokens at either end of a part of a pair that is shown


class _Parser(argparse.ArgumentParser):
    def __init__(self):
        usage = USAGE.replace("\n", "\n       ")
        super().__init__("python -m allo_lib", usage=usage, allow_abbrev=False)

    def error(self, message: str):
        raise AlloError(f"{message}; python -m allo_lib --help shows what there is")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 bad input, 130 stopped."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    commands = {"align": align, "merge": merge}
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if command not in commands:
            raise AlloError(f"expected a command, align or merge, as in: {USAGE}")
        commands[command](rest)
        return 0
    except AlloError as error:
        print(f"allo_lib: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"allo_lib: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nallo_lib: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + signal.SIGINT


def align(arguments: list[str]) -> None:
    """Align a model, or print what that takes."""
    parser = _Parser()
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
    import torch  # here, with what follows, as it takes seconds

    from allo_lib import align_setup, alignment
    from allo_lib.engine import models

    config = align_setup.checked(settings)
    stages = options.stages.split(",") if options.stages else align_setup.STAGES
    stages = align_setup.chosen_stages(stages)
    align_setup.checked_folder(options.out, options.model)
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
    parser = _Parser()
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
    name, number = path.name.removesuffix(".gz"), 0
    try:
        if Path(name).suffix not in _FILES:
            return _dataset(source)
        if name.endswith(".parquet"):
            from pyarrow import parquet

            return parquet.read_table(path).to_pylist()
        if name.endswith(".csv"):
            with open(path, newline="", encoding="utf-8-sig") as file:
                return list(csv.DictReader(file, strict=True))
        if name.endswith(".json"):
            return json.loads(text_of(path))
        rows = []
        for line in text_of(path).split("\n"):
            number += 1
            rows += [json.loads(line)] if line.strip() else []
        return rows
    except AlloError:
        raise
    except Exception as error:  # every reader has exceptions of its own for damage
        where = f", line {number}" * bool(number)
        reason = " ".join(str(error).split())[:200]
        expected = f"{', '.join(_FILES)}, a folder of datasets.save_to_disk, or a hub id"
        raise AlloError(
            f"--pairs {source}{where}: cannot be read ({reason}); expected {expected}"
        ) from error


def _dataset(source: str) -> list[dict]:
    import datasets

    name, _, split = source.partition(":")
    split = split or "train"
    if not Path(name).is_dir():
        return datasets.load_dataset(name, split=split).to_list()
    saved = datasets.load_from_disk(name)
    return (saved[split] if isinstance(saved, datasets.DatasetDict) else saved).to_list()


# --- the plan ---


def _plan(options, pairs, config, stages, dtype, device: str) -> str:
    """What an alignment will take, as text: pairs, steps, bytes on each device, hours."""
    import torch

    from allo_lib import align_setup
    from allo_lib.engine import models
    from allo_lib.method.neurons import NeuronMask
    from allo_lib.study import footprint

    model_config, tokenizer = models.described(options.model, options.revision)
    align_setup.check_config(model_config, options.model)
    parts = align_setup.parts_of(pairs, tokenizer, model_config, config, stages)
    if "importance" not in stages:  # as in `align`: those of an earlier call, or all
        saved = Path(options.out, "mask.safetensors")
        config = replace(config, share=NeuronMask.load(saved).share if saved.is_file() else 1.0)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    there = torch.cuda.mem_get_info()[1] if device == "cuda" else host
    limit = 1e9 * options.device_gb if options.device_gb else there
    shape = footprint.shape_of(model_config)
    passes = footprint.passes_of(parts, config, stages, shape)
    train, rate = parts[0], options.flops or RATES[device]
    hours = sum(one.flops for one in passes) / rate / 3600

    def needed(settings, devices: int = 1) -> dict[str, float]:
        return footprint.memory(model_config, shape, train, settings, stages, dtype, devices)

    lines = [
        f"{len(train.rows)} of {train.count} pairs are trained on",
        *align_setup.lines_about(*parts, stages),
        f"first pair (number {train.numbers[0]}) as the model reads it:",
        *shown_pair(tokenizer, train.rows[0], sys.stdout.isatty()),
        "",
        f"{'pass':<18}{'rows':>8}{'steps':>8}{'tokens':>12}{'TFLOP':>12}",
    ]
    lines += [
        f"{one.name:<18}{one.rows:>8}{one.steps or '':>8}{one.tokens:>12}{one.flops / 1e12:>12.4g}"
        for one in passes
    ]
    lines += ["", f"{shape.parameters:,} parameters, {dtype}; GB on each device, which has "
              f"{limit / 1e9:.1f}, and hours at {rate:.3g} FLOP/s each"]  # fmt: skip
    for devices in DEVICES:
        by_stage = needed(config, devices)
        sizes = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in by_stage.items())
        fits = "" if max(by_stage.values()) <= limit else " (DOES NOT FIT)"
        plural = "s" * (devices > 1)
        lines.append(f"{devices} device{plural}: {sizes}{fits}; {hours / devices:.3g} h")
    if max(needed(config).values()) > limit:
        lines.append(f"to fit on one: {_advice(needed, config, limit)}")
    return "\n".join(lines)


def _advice(needed, config, limit: float) -> str:
    """What to change so that `needed` (settings -> bytes by stage) fits into `limit` bytes."""
    leaner = {"estimator": "gradient", "rewriter_neurons": "kept",
              "accumulation": config.batch_size, "gradient_checkpointing": True}  # fmt: skip
    changes = {}
    for key, value in leaner.items():
        changes |= {key: value} if getattr(config, key) != value else {}
        if max(needed(replace(config, **changes)).values()) <= limit:
            settings = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
            return f"it fits with {settings}"
    return "more devices, a smaller max_length or share, or a smaller model"


def shown_pair(tokenizer, row: dict, colour: bool) -> list[str]:
    """A pair as the model reads it, its tokens apart by `|`, a part a line, long ones without their
    middle; whatever is no printable character is shown as a sign."""
    parts = [("prompt", row["prompt"])]
    for side in ("chosen", "rejected"):
        parts += [(side, row[side][:-1]), ("end", row[side][-1:])]
    lines = []
    for name, ids in parts:
        texts = ["".join(map(_sign, tokenizer.decode([token]))) for token in ids]
        if len(texts) > 2 * _SHOWN:
            texts[_SHOWN:-_SHOWN] = [f"... {len(texts) - 2 * _SHOWN} more ..."]
        line = f"{name:>8} {'|'.join(texts)}"
        lines.append(f"{_COLOURS[name]}{line}\x1b[0m" if colour else line)
    return lines


def _sign(character: str) -> str:
    return character if character.isprintable() else "\u21b5" if character == "\n" else "\ufffd"
