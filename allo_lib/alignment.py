"""ALLO on your own model and your own preference pairs, in one call.

The method is in `allo`, and the study takes it from there too; here is what a user's own model
needs besides: checks (`align_setup`), checkpoints, a search of rates, held-out pairs, and files.
"""

import contextlib
import math
import os
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from allo_lib import align_setup, allo, delta
from allo_lib.align_setup import STAGES, TRAINED, AlignConfig, entries, put
from allo_lib.data.preferences import SIDES
from allo_lib.engine import models, rewriter
from allo_lib.engine.forward import implicit_margins, layout_of, pair_logps
from allo_lib.engine.reference import rows_hash, state_hash, with_reference
from allo_lib.engine.store import Store, write_json
from allo_lib.engine.trainer import Checkpoints, Log, Schedule
from allo_lib.errors import AlloError, Diverged
from allo_lib.evaluation import stats
from allo_lib.evaluation.stats import mean_and_error, mean_interval
from allo_lib.machine import devices
from allo_lib.method.neurons import NeuronMask
from allo_lib.profiles.config import fingerprint
from allo_lib.seeds import derive
from allo_lib.study.search import search

_SEARCH_FACTOR = 2.0  # ratio of neighbouring rates, as in the study's profiles
# Share of a stage's steps in which its rate rises; official code.
_WARMUP = {"forgetting": 0.03, "learning": 0.1}


@dataclass
class AlignResult:
    """The aligned model (the one given, changed in place), its mask, and the log of each stage."""

    model: torch.nn.Module
    mask: NeuronMask | None
    logs: dict[str, Log] = field(default_factory=dict)
    output_dir: Path | None = None
    held_out: dict | None = None  # as in align.json


def align(
    model, tokenizer, pairs, *, stages=STAGES, config: AlignConfig | dict | None = None, output_dir
) -> AlignResult:
    """Align `model` in place by ALLO and save it.

    Args:
        model: a causal language model of transformers. It comes back in the mode and with the
            settings it had; where the call is stopped or fails, with its weights too, so that the
            same call again gives what an unstopped one gives.
        tokenizer: its tokenizer, with pad and end tokens.
        pairs: a datasets.Dataset (or list of dicts) with TRL's columns prompt, chosen, rejected;
            strings or chat messages, with or without a prompt of its own (`preferences`). As no
            gold solution is known, the chosen response takes its place in the rewriting reward
            model. Pairs that are too long are dropped, those for which the reward model's row is
            take no part in forgetting; both are told and listed in `align.json`.
        stages: any of "importance", "forgetting", "learning", run in this order. Without
            "importance" every neuron is trained, or those of `mask.safetensors` in `output_dir`.
        config: an AlignConfig, or a dict of its fields.
        output_dir: gets the model and tokenizer (save_pretrained), what of it changed (`delta`),
            `mask.safetensors`, `align.json` with settings, losses and what the held-out pairs say,
            and `.references`, the reference log-probs: a second call with the same weights and
            pairs reads them. While stages are trained `.checkpoints` holds what the same call, of
            the same weights, pairs and settings, goes on from if this one is stopped.

    Started by `accelerate launch`, several processes do it together (`devices`), each with the same
    arguments; the first one writes and prints. A sharded model comes back sharded, and the mask is
    that of this process's part.

    Raises:
        AlloError: unknown stage or setting, a model that cannot be aligned as it is
            (`align_setup`), no pairs, missing columns, no pair that fits the model's context, a
            pair that cannot be encoded or whose responses are equal, a tokenizer without pad or end
            token, a loss that is not finite, or stages that changed no weight.
    """
    with devices.quiet():
        return _align(model, tokenizer, pairs, stages, config, output_dir)


def _align(model, tokenizer, pairs, stages, config, output_dir) -> AlignResult:
    folder = _folder(output_dir)
    config, stages = align_setup.checked(config), align_setup.chosen_stages(stages)
    run = _Run(model, tokenizer, config, stages, folder)
    with align_setup.recomputing(model, run.config.gradient_checkpointing):
        run.read(pairs)
        run.output_dir.mkdir(parents=True, exist_ok=True)
        with align_setup.as_found(model):
            mask = run.find_neurons() if "importance" in run.stages else run.saved_mask()
            run.rank_before()
        with align_setup.restored(model, mask if run.trained else NeuronMask({}, {})) as before:
            if run.trained:
                with align_setup.as_found(model):
                    run.train(mask, before)
                    run.rank_after()
            run.save(mask, before)
    run.forget_checkpoints()
    return AlignResult(model, mask, run.logs, run.output_dir, run.record["held_out"])


class _Run:
    """What the stages of one call share."""

    def __init__(self, model, tokenizer, config: AlignConfig, stages, output_dir: Path):
        align_setup.check_model(model)
        models.check_tokenizer(tokenizer, model)
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.stages, self.output_dir = stages, output_dir
        self.trained = [stage for stage in TRAINED if stage in stages]
        self.logs: dict[str, Log] = {}
        self.masters: dict = {}  # float32 values of kept entries, handed from stage to stage
        self.record: dict = {"config": asdict(config), "held_out": None}  # for align.json
        self._weights: list[list[float]] | None = None  # of the tokens that are forgotten

    def read(self, pairs) -> None:
        """All that can be known before anything is trained: what fits, and what is told of it."""
        every = "importance" in self.stages and self.config.estimator == "delta"
        align_setup.check_trainable(self.model, every, self.config.max_length)
        devices.start(self.model)
        context = align_setup.context_of(self.model)
        parts = align_setup.parts_of(pairs, self.tokenizer, context, self.config, self.stages)
        self.pairs, self.held_out, self.development = parts
        gpus = align_setup.several_gpus(self.model.device.type, torch.cuda.device_count())
        for line in filter(None, [gpus, *align_setup.lines_about(*parts, self.stages)]):
            print(line, flush=True)
        self.record["left_out"] = {
            "overlong": self.pairs.overlong,
            "not_forgotten": align_setup.not_forgotten(self.pairs),
            "held_out": self.held_out.numbers,
            "development": self.development.numbers,
        }
        self._try_longest()
        settings = self.record["config"] | {"checkpoint_minutes": None, "stages": self.stages}
        begins = [state_hash(self.model), rows_hash(self.pairs.rows), settings]
        devices.agree(begins, "pairs or settings")
        self._begun = self.output_dir / ".checkpoints" / fingerprint(begins)[:24]

    def _try_longest(self) -> None:
        """Find how the model is read so that the longest pair has its own log-probs."""
        by_length = sorted(self.pairs.rows, key=lambda row: sum(map(len, row.values())))
        shortest, pair = by_length[0], by_length[-1]
        rows = [{"prompt": pair["prompt"], "response": pair[side]} for side in SIDES]
        rows.append({"prompt": shortest["prompt"], "response": shortest["chosen"]})
        layout_of(self.model, self.tokenizer.pad_token_id, rows)

    def checkpoints(self, stage: str) -> Checkpoints:
        """Where a stage of this very call goes on from."""
        return Checkpoints(self._begun / stage, self.config.checkpoint_minutes)

    def forget_checkpoints(self) -> None:
        """All stages are saved: nothing will go on from them."""
        shutil.rmtree(self._begun, ignore_errors=True)
        with contextlib.suppress(OSError):  # another call's may be there
            self._begun.parent.rmdir()

    def find_neurons(self) -> NeuronMask:
        """The method's first step: scores by the estimator asked for, and the mask they give."""
        mask, ties = allo.find_neurons(self._scores(), self.config.share)
        whole = mask.joined() if devices.is_sharded(next(self.model.parameters())) else mask
        if devices.rank() == 0:
            _warn(stats.arbitrary_mask(**ties, kept=whole.kept, total=whole.total))
            whole.save(self.output_dir / "mask.safetensors")
        return mask

    def _scores(self) -> dict[str, torch.Tensor]:
        config = self.config
        common = {
            "beta": config.beta,
            "batch_size": config.batch_size,
            "seed": derive(config.seed, "importance"),
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        rows = self._with_reference(self.pairs.rows)
        if config.estimator == "gradient":
            self.logs["importance"] = Log()
            common["batch_size"] //= config.accumulation  # each pass counts as a batch
            return allo.gradient_scores(self.model, rows, steps=config.max_steps, **common)
        with align_setup.restored(self.model, always=True):
            scores, record = allo.delta_of_dpo(
                self.model,
                rows,
                lr=config.importance_rate,
                epochs=config.epochs,
                accumulation=config.accumulation,
                max_steps=config.max_steps,
                label="importance",
                clip=config.max_grad_norm,
                checkpoints=self.checkpoints("importance"),
                **common,
            )
        self.logs["importance"] = Log(loss=record["loss"])
        return scores

    def saved_mask(self) -> NeuronMask | None:
        """The neurons that an earlier call kept, None where there was none."""
        path = self.output_dir / "mask.safetensors"
        if not path.is_file():
            return None
        mask = NeuronMask.load(path)
        mask.check(self.model)
        return mask.part_of(self.model)

    def train(self, mask, before: dict) -> None:
        """Forgetting and learning, from the weights `before`, at the rates given or the best found.

        Raises:
            AlloError: every candidate of the search diverged, or no weight has another value
                afterwards.
        """
        rates = tuple(getattr(self.config, f"{stage}_rate") for stage in self.trained)
        if self.config.search > 1:
            self._search(rates, mask, before)
        else:
            self._train_at(rates, mask)
        after = entries(self.model, mask)
        changed = any(not torch.equal(values, before[name]) for name, values in after.items())
        if not devices.total(torch.tensor(int(changed)), devices.LARGEST):
            raise AlloError(
                f"align: the stages changed no weight (in {self.model.dtype}); raise "
                "forgetting_rate and learning_rate, or load the model in a finer dtype"
            )

    def _search(self, rates: tuple[float, ...], mask, before: dict) -> None:
        """Try rates around those given and leave the model that ranks most development pairs
        right; of equal ones that of the smallest rates."""
        names = [f"{stage}_rate" for stage in self.trained]
        best: tuple | None = None  # (accuracy, negative rates), entries, logs

        def attempt(rates: tuple[float, ...]) -> float:
            nonlocal best
            put(self.model, mask, before)
            told = ", ".join(f"{n} {rate:g}" for n, rate in zip(names, rates, strict=True))
            try:
                self._train_at(rates, mask, f"{told}/")
            except Diverged as error:
                print(f"align: {told}: {error}", flush=True)
                return -1.0
            margins, _, _ = self._ranked(self.development_before)
            accuracy = sum(margin > 0 for margin in margins) / len(margins)
            print(f"align: {told}: {accuracy:.1%} of {len(margins)} development pairs", flush=True)
            ranks = accuracy, tuple(-rate for rate in rates)
            if best is None or ranks > best[0]:
                best = ranks, entries(self.model, mask), dict(self.logs)
            return accuracy

        tried = search(rates, self.config.search, _SEARCH_FACTOR, attempt)
        if best is None:
            raise AlloError("align: every candidate diverged; lower the rates")
        put(self.model, mask, best[1])
        self.logs = best[2]
        self.record["search"] = [
            dict(zip(names, one.rates, strict=True)) | {"accuracy": one.score} for one in tried
        ]

    def _train_at(self, rates: tuple[float, ...], mask, place: str = "") -> None:
        """Forgetting, then learning; each from the weights as they are, its reference too."""
        self.masters = {}
        for name, rate in zip(self.trained, rates, strict=True):
            rows = self._with_reference(self.pairs.rows)
            if name == "forgetting" and self._weights is None:
                self._weights = self._token_weights(mask)
            schedule = self._schedule(name, rate, _WARMUP[name])
            settings = self._settings(name, mask, f"{place}{name}") | {"masters": self.masters}
            if name == "forgetting":
                fitting = zip(rows, self.pairs.corrections, strict=True)
                rows = [row for row, correction in fitting if correction]
                log = allo.forget(self.model, rows, self._weights, schedule, **settings)
            else:
                settings["key_share"] = self.config.key_share
                log = allo.learn(self.model, rows, schedule, **settings)
            self.logs[name] = log

    def _token_weights(self, mask) -> list[list[float]]:
        """The method's second step: train the rewriter from the model's weights, read its
        probabilities, and put the weights back."""
        learnt, read = zip(*filter(None, self.pairs.corrections), strict=True)
        config, pad = self.config, self.tokenizer.pad_token_id
        trained = mask if config.rewriter_neurons == "kept" else None
        schedule = self._schedule("sft", config.rewriter_rate, 0.1)
        settings = self._settings("sft", trained, "rewriter")
        with align_setup.restored(self.model, always=True):
            self.logs["rewriter"] = allo.run_stage(
                self.model, list(learnt), "sft", schedule, **settings
            )
            values = rewriter.probabilities(self.model, list(read), pad, config.forward_batch)
        chosen = allo.token_weights(values, config.token_rule, config.token_threshold)
        _warn(stats.no_choice_of_tokens(chosen))
        return chosen

    def _schedule(self, name: str, rate: float, warmup: float) -> Schedule:
        config = self.config
        return Schedule(
            rate, config.epochs, config.batch_size, derive(config.seed, name), warmup,
            config.accumulation, config.max_steps,
        )  # fmt: skip

    def _settings(self, name: str, mask, place: str) -> dict:
        """Those of `allo.run_stage` that all stages have."""
        return {
            "pad_token_id": self.tokenizer.pad_token_id,
            "mask": mask,
            "beta": self.config.beta,
            "max_grad_norm": self.config.max_grad_norm,
            "label": name,
            "checkpoints": self.checkpoints(place),
        }

    def _with_reference(self, rows: list[dict]) -> list[dict]:
        """Pairs with the log-probs of the model as it stands: each stage's own reference."""
        return rows and with_reference(
            self.model,
            rows,
            pad_token_id=self.tokenizer.pad_token_id,
            batch_size=self.config.forward_batch,
            store=Store(self.output_dir / ".references"),
        )

    def rank_before(self) -> None:
        """The log-probs of the pairs that are not trained on, under the model as it is given."""
        self.held_out_before = self._with_reference(self.held_out.rows)
        self.development_before = self._with_reference(self.development.rows)

    def rank_after(self) -> None:
        """How many held-out pairs are ranked right before and after, into the record.

        `reward_accuracy`: the implicit reward of DPO, log pi / pi_before, is larger for the chosen
        reply; before, all rewards are 0 and every pair counts half. `chosen_likelier`: the chosen
        reply is the likelier one. Of one model, with normal 95% intervals over pairs (`stats`).
        """
        if not self.held_out.rows:
            return
        margins, before, after = self._ranked(self.held_out_before)
        n = len(margins)
        right = sum(margin > 0 for margin in margins) + sum(margin == 0 for margin in margins) / 2
        rough = (right + 2) / (n + 4)  # with two pairs more on each side: never without error
        reward = mean_interval(
            {0: right / n - 0.5}, {0: math.sqrt(rough * (1 - rough) / (n + 4))}, n
        )
        changes = [float(a > 0) - float(b > 0) for b, a in zip(before, after, strict=True)]
        change, error = mean_and_error([np.array(changes)], (1.0, -1.0))
        likelier = mean_interval({0: change}, {0: error}, n)
        start = sum(b > 0 for b in before) / n
        self.record["held_out"] = {
            "pairs": n,
            "reward_margin": sum(margins) / n,
            "reward_accuracy": _change(0.5, reward),
            "chosen_likelier": _change(start, likelier),
        }
        for key in ("reward_accuracy", "chosen_likelier"):
            one = self.record["held_out"][key]
            print(
                f"align: {key} on {n} held-out pairs: {one['before']:.1%} before, "
                f"{one['after']:.1%} after; change {100 * one['change']:+.1f} points, 95% interval "
                f"{100 * one['low']:+.1f} to {100 * one['high']:+.1f}",
                flush=True,
            )

    def _ranked(self, before: list[dict]) -> tuple[list[float], list[float], list[float]]:
        """Of each pair, chosen minus rejected: the reward, and the log-prob before and now."""
        old = [{side: row[f"{side}_reference"] for side in SIDES} for row in before]
        pad, rows = self.tokenizer.pad_token_id, self.config.forward_batch
        new = pair_logps(self.model, before, pad, rows)
        gaps = ([sum(one["chosen"]) - sum(one["rejected"]) for one in each] for each in (old, new))
        return implicit_margins(new, old, self.config.beta), *gaps

    def save(self, mask, before: dict) -> None:
        """The folder of the aligned model, and what of it differs from the values `before`."""
        path = self.output_dir / delta.NAME
        self._write_model(self.output_dir)
        if self.trained:
            self._save_delta(path, mask, before)
        if devices.rank() > 0:
            return
        self.tokenizer.save_pretrained(self.output_dir)
        if not self.trained:
            path.unlink(missing_ok=True)
        size = sum(file.stat().st_size for file in self.output_dir.glob("model*.safetensors"))
        told = f"align: {self.output_dir} holds the model ({size / 1e6:.1f} MB)"
        if self.trained:
            its = path.stat().st_size
            told += f" and {delta.NAME} ({its / 1e6:.1f} MB, {its / size:.0%} of it)"
        self.record["loss"] = {stage: log.loss for stage, log in self.logs.items()}
        write_json(self.output_dir / "align.json", self.record)
        print(told, flush=True)

    def _write_model(self, folder) -> None:
        weights = devices.whole_weights(self.model)  # all processes give their parts
        if devices.rank() == 0:
            self.model.save_pretrained(folder, state_dict=weights)

    def _save_delta(self, path: Path, mask, before: dict) -> None:
        # The base is saved once more beside the result, as only transformers knows how.
        about = {
            "base": str(self.model.name_or_path or ""),
            "revision": getattr(self.model.config, "_commit_hash", None),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }
        after = entries(self.model, mask)
        with tempfile.TemporaryDirectory(dir=self.output_dir, prefix=".base-") as folder:
            put(self.model, mask, before)
            self._write_model(folder)
            put(self.model, mask, after)
            if devices.rank() == 0:
                delta.write(Path(folder), self.output_dir, path, about)


def _change(before: float, interval) -> dict[str, float]:
    """What an interval of a change says, beside where it started."""
    after = before + interval.effect
    return {"before": before, "after": after, "change": interval.effect,
            "low": interval.low, "high": interval.high}  # fmt: skip


def _warn(found: str | None) -> None:
    if found:
        print(f"warning: {found}", file=sys.stderr, flush=True)


def _folder(output_dir) -> Path:
    if not isinstance(output_dir, (str, os.PathLike)) or not str(output_dir):
        raise AlloError(f"align: output_dir is {output_dir!r}; name the folder to write to")
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise AlloError(f"align: output_dir {output_dir} is a file; name a folder")
    return Path(output_dir)
