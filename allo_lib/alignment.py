"""ALLO on your own model and your own preference pairs, in one call.

The stages are those of the study, by the same functions: importance (`warmup`), token rewards
(`rewriter`, `token_rewards`), forgetting and learning (`stages`).
"""

import contextlib
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from allo_lib import delta
from allo_lib.align_setup import (
    as_found,
    check_model,
    check_trainable,
    context_of,
    entries,
    put,
    recomputing,
    several_gpus,
    undone_if_stopped,
    weights_back,
)
from allo_lib.allo import delta_of_dpo, gradient_scores, run_stage
from allo_lib.data.preferences import SIDES, Encoded, read_pairs
from allo_lib.engine import models, rewriter
from allo_lib.engine.checkpoints import Checkpoints
from allo_lib.engine.forward import implicit_margins, layout_of, pair_logps
from allo_lib.engine.reference import rows_hash, weights_hash, with_reference
from allo_lib.engine.store import Store, write_json
from allo_lib.engine.trainer import Log, Schedule
from allo_lib.errors import AlloError, Diverged
from allo_lib.evaluation.stats import mean_and_error, mean_interval
from allo_lib.machine import devices
from allo_lib.method.neurons import NeuronMask, count_ties, select_neurons
from allo_lib.method.tokens import unaligned_weights
from allo_lib.profiles.config import (
    STRICT,
    BelowOne,
    Count,
    Flag,
    Fraction,
    Number,
    Positive,
    Rate,
    Share,
    check_settings,
    fingerprint,
)
from allo_lib.report import warning_signs
from allo_lib.seeds import derive
from allo_lib.study.search import search

STAGES = ("importance", "forgetting", "learning")
TRAINED = STAGES[1:]  # the stages whose rates are searched
_SEARCH_FACTOR = 2.0  # ratio of neighbouring rates, as in the study's profiles


@dataclass(frozen=True)
class AlignConfig:
    """Settings of `align`; learning rates are the ones to search, on data held out for it.

    With estimator "gradient" and rewriter_neurons "kept" no part needs dense optimizer state, which
    is what keeps a large model from fitting one device.
    """

    __pydantic_config__ = STRICT

    share: Share = 0.1  # of all neurons that are kept; paper: 10%
    # Scores: "delta" (|theta' - theta| / lr of a DPO run on all neurons; official code), or
    # "gradient" (sum of |dL/dtheta| over the pairs, no update made).
    estimator: Literal["delta", "gradient"] = "delta"
    importance_rate: Rate = 1e-6  # of the warm-up; official code
    forgetting_rate: Rate = 5e-7  # official code; try larger ones, see 01_importance
    learning_rate: Rate = 5e-6  # official code
    rewriter_rate: Rate = 1e-5  # of the reward model's training
    # That it trains: all, or those kept by the mask.
    rewriter_neurons: Literal["all", "kept"] = "all"
    beta: Rate = 0.1
    key_share: Share = 0.2  # epsilon of the learning stage
    # See tokens.unaligned_weights.
    token_rule: Literal["threshold", "soft", "released"] = "threshold"
    token_threshold: Fraction = 0.5
    batch_size: Positive = 16  # pairs per step; official code: 128
    accumulation: Positive = 1  # forward passes per step, of batch_size / accumulation pairs each
    gradient_checkpointing: Flag = False  # activations are made again in backward, not kept
    epochs: Positive = 1  # of every stage
    max_steps: Positive | None = None  # of every stage, at most
    # Share of the pairs, by prompt, that nothing is trained or chosen on: how many of them the
    # model ranks right before and after goes into align.json.
    held_out: BelowOne = 0.0
    # Candidates for the rates of forgetting and learning, a factor of 2 apart around the rates
    # given; that is kept which ranks most of another share of the pairs right. 1: no search.
    search: Positive = 1
    development: Annotated[BelowOne, Field(gt=0)] = 0.1  # that share, where there is a search
    forward_batch: Positive = 8  # rows of a forward pass without gradients
    max_length: Positive | None = None  # tokens of a row; None is the model's context
    overlong: Literal["drop", "raise"] = "drop"  # what becomes of pairs that are longer
    max_grad_norm: Rate | None = 1.0
    seed: Count = 0
    # Of training, between two checkpoints that the same call goes on from if stopped; 0: none.
    checkpoint_minutes: Number = 5.0


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
            (`given_model`), no pairs, missing columns, no pair that fits the model's context, a
            pair that cannot be encoded or whose responses are equal, a tokenizer without pad or end
            token, a loss that is not finite, or stages that changed no weight.
    """
    with devices.quiet():
        return _align(model, tokenizer, pairs, stages, config, output_dir)


def _align(model, tokenizer, pairs, stages, config, output_dir) -> AlignResult:
    folder = _folder(output_dir)
    run = _Run(model, tokenizer, checked(config), chosen_stages(stages), folder)
    trains = set(TRAINED) & set(run.stages)
    with recomputing(model, run.config.gradient_checkpointing):
        run.read(pairs)
        run.output_dir.mkdir(parents=True, exist_ok=True)
        with as_found(model):
            mask = run.importance() if "importance" in run.stages else run.saved_mask()
            run.rank_before()
        with undone_if_stopped(model, mask if trains else NeuronMask({}, {})) as before:
            if trains:
                with as_found(model):
                    run.train(mask, before)
                    run.rank_after()
            run.save(mask, before)
    run.forget_checkpoints()
    return AlignResult(model, mask, run.logs, run.output_dir, run.record["held_out"])


class _Run:
    """What the stages of one call share."""

    def __init__(self, model, tokenizer, config: AlignConfig, stages, output_dir: Path):
        check_model(model)
        models.check_tokenizer(tokenizer, model)
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.stages, self.output_dir = stages, output_dir
        self.logs: dict[str, Log] = {}
        self.masters: dict = {}  # float32 values of kept entries, handed from stage to stage
        self.record: dict = {"config": asdict(config), "held_out": None}  # for align.json
        self._weights: list[list[float]] | None = None  # of the tokens that are forgotten

    def read(self, pairs) -> None:
        """All that can be known before anything is trained: what fits, and what is told of it."""
        every = "importance" in self.stages and self.config.estimator == "delta"
        check_trainable(self.model, every, self.config.max_length)
        devices.start(self.model)
        parts = parts_of(pairs, self.tokenizer, context_of(self.model), self.config, self.stages)
        self.given, self.held_out, self.development = parts
        gpus = several_gpus(self.model.device.type, torch.cuda.device_count())
        for line in filter(None, [gpus, *lines_about(*parts, self.stages)]):
            print(line, flush=True)
        self.record["left_out"] = {
            "overlong": self.given.overlong,
            "not_forgotten": not_forgotten(self.given),
            "held_out": self.held_out.numbers,
            "development": self.development.numbers,
        }
        self._try_longest()
        settings = self.record["config"] | {"checkpoint_minutes": None, "stages": self.stages}
        begins = [weights_hash(self.model), rows_hash(self.given.rows), settings]
        devices.agree(begins, "pairs or settings")
        self._begun = self.output_dir / ".checkpoints" / fingerprint(begins)[:24]

    def _try_longest(self) -> None:
        """Find how the model is read so that the longest pair has its own log-probs."""
        by_length = sorted(self.given.rows, key=lambda row: sum(map(len, row.values())))
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

    def importance(self) -> NeuronMask:
        scores = self._scores()
        mask = select_neurons(scores, self.config.share)
        ties = count_ties(scores, mask)
        whole = mask.joined() if devices.is_sharded(next(self.model.parameters())) else mask
        if devices.rank() == 0:
            _warn(warning_signs.arbitrary_mask(**ties, kept=whole.kept, total=whole.total))
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
        rows = self._with_reference(self.given.rows)
        if config.estimator == "gradient":
            self.logs["importance"] = Log()
            common["batch_size"] //= config.accumulation  # each pass counts as a batch
            return gradient_scores(self.model, rows, steps=config.max_steps, **common)
        with weights_back(self.model):
            scores, record = delta_of_dpo(
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
        path = self.output_dir / "mask.safetensors"
        if not path.is_file():
            return None
        mask = NeuronMask.load(path)
        mask.check(self.model)
        return mask.part_of(self.model)

    def train(self, mask, before: dict) -> None:
        """Forgetting and learning, from the weights `before`, at the rates given or the best found.

        Raises:
            AlloError: no weight has another value afterwards.
        """
        config, stages = self.config, [stage for stage in TRAINED if stage in self.stages]
        best: tuple | None = None  # (accuracy, negative rates), entries, logs

        def attempt(rates: tuple[float, ...]) -> float:
            nonlocal best
            put(self.model, mask, before)
            self.masters = {}
            told = ", ".join(f"{s}_rate {rate:g}" for s, rate in zip(stages, rates, strict=True))
            try:
                for stage, rate in zip(stages, rates, strict=True):
                    self._stage(stage, rate, mask, f"{told}/{stage}")
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

        given = tuple(getattr(config, f"{stage}_rate") for stage in stages)
        if config.search == 1:
            for stage, rate in zip(stages, given, strict=True):
                self._stage(stage, rate, mask, stage)
        else:
            tried = search(given, config.search, _SEARCH_FACTOR, attempt)
            if best is None:
                raise AlloError("align: every candidate diverged; lower the rates")
            put(self.model, mask, best[1])
            self.logs = best[2]
            named = [f"{stage}_rate" for stage in stages]
            self.record["search"] = [
                dict(zip(named, one.rates, strict=True)) | {"accuracy": one.score} for one in tried
            ]
        after = entries(self.model, mask)
        changed = any(not torch.equal(values, before[name]) for name, values in after.items())
        if not devices.total(torch.tensor(int(changed)), devices.LARGEST):
            raise AlloError(
                f"align: the stages changed no weight (in {self.model.dtype}); raise "
                "forgetting_rate and learning_rate, or load the model in a finer dtype"
            )

    def _stage(self, name: str, rate: float, mask, place: str) -> None:
        """Forgetting or learning from the weights as they are, which are its reference too."""
        rows, warmup = self._with_reference(self.given.rows), 0.1
        if name == "forgetting":
            if self._weights is None:
                self._weights = self._token_weights(mask)
            pairs, warmup = zip(rows, self.given.corrections, strict=True), 0.03
            rows = [row for row, correction in pairs if correction]
            for row, values in zip(rows, self._weights, strict=True):
                row["rejected_weights"] = values
        self.logs[name] = self._train(rows, name, rate, mask, warmup, place, self.masters)

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
        path, trained = self.output_dir / delta.NAME, set(TRAINED) & set(self.stages)
        self._write_model(self.output_dir)
        if trained:
            self._save_delta(path, mask, before)
        if devices.rank() > 0:
            return
        self.tokenizer.save_pretrained(self.output_dir)
        if not trained:
            path.unlink(missing_ok=True)
        size = sum(file.stat().st_size for file in self.output_dir.glob("model*.safetensors"))
        told = f"align: {self.output_dir} holds the model ({size / 1e6:.1f} MB)"
        if trained:
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

    def _train(self, rows, name: str, rate: float, mask, warmup: float, place: str, masters=None):
        """Train one stage; it starts from `masters` where given and leaves its own there."""
        config = self.config
        schedule = Schedule(
            rate, config.epochs, config.batch_size, derive(config.seed, name), warmup,
            config.accumulation, config.max_steps,
        )  # fmt: skip
        return run_stage(
            self.model,
            rows,
            name,
            schedule,
            pad_token_id=self.tokenizer.pad_token_id,
            mask=mask,
            beta=config.beta,
            key_share=config.key_share,
            max_grad_norm=config.max_grad_norm,
            label=name,
            masters=masters,
            checkpoints=self.checkpoints(place),
        )

    def _with_reference(self, rows: list[dict]) -> list[dict]:
        """Pairs with the log-probs of the model as it stands: each stage's own reference."""
        return rows and with_reference(
            self.model,
            rows,
            pad_token_id=self.tokenizer.pad_token_id,
            batch_size=self.config.forward_batch,
            store=Store(self.output_dir / ".references"),
        )

    def _token_weights(self, mask) -> list[list[float]]:
        """Train the rewriter from the model's weights, read its probabilities, put them back."""
        learnt, read = zip(*filter(None, self.given.corrections), strict=True)
        trained = mask if self.config.rewriter_neurons == "kept" else None
        rate, config = self.config.rewriter_rate, self.config
        with weights_back(self.model):
            self.logs["rewriter"] = self._train(list(learnt), "sft", rate, trained, 0.1, "rewriter")
            values = rewriter.probabilities(
                self.model, list(read), self.tokenizer.pad_token_id, config.forward_batch
            )
        chosen = [self._weights_of(row) for row in values]
        _warn(warning_signs.no_choice_of_tokens(chosen))
        return chosen

    def _weights_of(self, probabilities: list[float]) -> list[float]:
        inside = torch.ones(1, len(probabilities), dtype=torch.bool)
        rule, threshold = self.config.token_rule, self.config.token_threshold
        return unaligned_weights(torch.tensor([probabilities]), inside, rule, threshold)[0].tolist()


def parts_of(pairs, tokenizer, context: int | None, config: AlignConfig, stages):
    """(pairs to train on, held-out ones, development ones), each `preferences.Encoded`.

    Raises:
        AlloError: what `read_pairs` raises, no pair left to train on, or to forget of.
    """
    given = read_pairs(tokenizer, pairs, context, config.max_length, config.overlong)
    seed = derive(config.seed, "held out")
    given, held_out = given.split(config.held_out, seed)
    searched = config.search > 1 and not set(TRAINED).isdisjoint(stages)
    given, development = given.split(config.development if searched else 0.0, seed)
    if not given.rows:
        raise AlloError(
            f"align: held_out and development leave none of the {given.count} pairs to train on; "
            "give more pairs, or smaller shares"
        )
    if "forgetting" in stages and not any(given.corrections):
        raise AlloError(
            f"align: no pair's prompt, chosen and rejected response fit into {given.longest} "
            "tokens together with either reply, as the rewriting reward model of the stage "
            "'forgetting' reads them; shorten the pairs or leave the stage out"
        )
    return given, held_out, development


def not_forgotten(given: Encoded) -> list[int]:
    """Numbers of the pairs that take no part in forgetting."""
    pairs = zip(given.numbers, given.corrections, strict=True)
    return [number for number, correction in pairs if correction is None]


def lines_about(given: Encoded, held_out: Encoded, development: Encoded, stages) -> list[str]:
    """What a user should know of the pairs."""
    overlong, unread = given.overlong, not_forgotten(given)
    told = []
    if overlong:
        some = ", ".join(map(str, overlong[:10])) + ", ..." * (len(overlong) > 10)
        told.append(
            f"align: {len(overlong)} of {given.count} pairs are longer than {given.longest} tokens "
            f"and dropped: numbers {some} (align.json lists them)"
        )
    if held_out.rows or development.rows:
        told.append(
            f"align: {len(given.rows)} pairs to train on, {len(held_out.rows)} held out, "
            f"{len(development.rows)} to choose rates by; no prompt is in two of them"
        )
    if unread and "forgetting" in stages:
        told.append(
            f"align: {len(unread)} pairs take no part in 'forgetting', as the reward model's row "
            "(prompt, both responses, and one of them again) does not fit"
        )
    if given.merged:
        told.append(
            f"align: in {given.merged} pairs the prompt's end is read otherwise before a reply "
            "than alone (tokens merge, or the template says so); the response begins there"
        )
    return told


def _change(before: float, interval) -> dict[str, float]:
    """What an interval of a change says, beside where it started."""
    after = before + interval.effect
    return {"before": before, "after": after, "change": interval.effect,
            "low": interval.low, "high": interval.high}  # fmt: skip


def _warn(found: str | None) -> None:
    if found:
        print(f"warning: {found}", file=sys.stderr, flush=True)


def checked(config) -> AlignConfig:
    """The settings; AlloError for an unknown name or a value out of range."""
    if not isinstance(config, (AlignConfig, Mapping, NoneType)):
        raise AlloError(
            f"align: config is a {type(config).__name__}; expected an AlignConfig or a dict"
        )
    given = asdict(config) if isinstance(config, AlignConfig) else dict(config or {})
    config = check_settings(AlignConfig, given, "align")
    if config.batch_size % config.accumulation:
        raise AlloError(
            f"align: batch_size {config.batch_size} is no multiple of accumulation "
            f"{config.accumulation}; choose one that is"
        )
    return config


def _folder(output_dir) -> Path:
    if not isinstance(output_dir, (str, os.PathLike)) or not str(output_dir):
        raise AlloError(f"align: output_dir is {output_dir!r}; name the folder to write to")
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise AlloError(f"align: output_dir {output_dir} is a file; name a folder")
    return Path(output_dir)


def chosen_stages(stages) -> tuple[str, ...]:
    """The stages in their order; AlloError for one that there is not."""
    given = [stages] if isinstance(stages, str) or not isinstance(stages, Iterable) else [*stages]
    unknown = [stage for stage in given if stage not in STAGES]
    if unknown or not given or isinstance(stages, str):
        raise AlloError(f"align: stages {stages!r} given; expected a tuple with some of {STAGES}")
    return tuple(stage for stage in STAGES if stage in given)
