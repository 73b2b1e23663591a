"""ALLO on your own model and your own preference pairs, in one call.

The method is in `allo`, and the study takes it from there too; here is what a user's own model
needs besides: checks (`align_setup`), checkpoints, a search of rates, held-out pairs, and files.
"""

import contextlib
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from allo_lib import align_setup, allo, delta
from allo_lib.align_setup import STAGES, TRAINED, AlignConfig, as_found, entries, put, restored
from allo_lib.engine import rewriter
from allo_lib.engine.forward import implicit_margins, layout_of, pair_logps
from allo_lib.engine.reference import rows_hash, state_hash, with_reference
from allo_lib.engine.store import Store, write_json
from allo_lib.engine.trainer import Checkpoints, Log, Schedule
from allo_lib.errors import AlloError, Diverged
from allo_lib.evaluation import stats
from allo_lib.machine import devices
from allo_lib.machine.arithmetic import same_on_every_x86
from allo_lib.method.neurons import NeuronMask
from allo_lib.profiles.config import fingerprint
from allo_lib.seeds import derive
from allo_lib.study.search import search

_SEARCH_FACTOR = 2.0  # ratio of neighbouring rates, as in the study's profiles
# Share of a stage's steps in which its rate rises; official code.
_WARMUP = {"importance": 0.1, "sft": 0.1, "forgetting": 0.03, "learning": 0.1}


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
            take no part in forgetting; both are printed and listed in `align.json`.
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
    that of this process's part. On an x86 CPU torch makes float32 products by oneDNN from then on
    (`machine.arithmetic`).

    Raises:
        AlloError: unknown stage or setting, a model that cannot be aligned as it is
            (`align_setup`), no pairs, missing columns, no pair that fits the model's context, a
            pair that cannot be encoded or whose responses are equal, a tokenizer without pad or end
            token, a loss that is not finite, or stages that changed no weight.
    """
    with devices.quiet():
        folder, config = align_setup.checked_folder(output_dir, model), align_setup.checked(config)
        stages = align_setup.chosen_stages(stages)
        align_setup.check_model(model, tokenizer)
        if model.device.type == "cpu":
            same_on_every_x86()
        with align_setup.recomputing(model, config.gradient_checkpointing):
            run = _Run(model, tokenizer, pairs, stages, config, folder)
            with as_found(model):
                mask = run.find_neurons() if "importance" in stages else run.saved_mask()
                run.record["share"] = run.share_of(mask)
                run.read_unseen()
            with restored(model, mask if run.trained else NeuronMask({}, {})) as before:
                if run.trained:
                    with as_found(model):
                        run.train(mask, before)
                        run.rank_held_out()
                run.save(mask, before)
        run.forget_checkpoints()
        return AlignResult(model, mask, run.logs, folder, run.record["held_out"])


class _Run:
    """What the stages of one call share: model, pairs, settings, and the record of the call."""

    def __init__(self, model, tokenizer, pairs, stages, config: AlignConfig, output_dir: Path):
        """Check and print all that can be known before anything is trained."""
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.trained = [stage for stage in TRAINED if stage in stages]
        self.output_dir, self.pad = output_dir, tokenizer.pad_token_id
        self.logs: dict[str, Log] = {}
        self.masters: dict = {}  # float32 values of kept entries, handed from stage to stage
        self._weights: list[list[float]] | None = None  # of the tokens that are forgotten
        align_setup.check_trainable(model, stages, config)
        devices.start(model)
        parts = align_setup.parts_of(pairs, tokenizer, model.config, config, stages)
        self.pairs, held_out, development = parts
        self.held_out, self.development = held_out.rows, development.rows
        self._asked = held_out.asked  # of each held-out pair
        for line in [*align_setup.other_gpus(model), *align_setup.lines_about(*parts, stages)]:
            print(line, flush=True)
        settings = asdict(config)
        self.record = {
            "config": settings,
            "share": None,  # of the neurons that are trained
            "held_out": None,
            "left_out": {
                "overlong": self.pairs.overlong,
                "not_forgotten": align_setup.not_forgotten(self.pairs),
                "held_out": held_out.numbers,
                "development": development.numbers,
            },
        }
        self._find_way_to_read()
        same = settings | {"checkpoint_minutes": None, "stages": stages}
        begins = [state_hash(model), rows_hash(self.pairs.rows), same]
        devices.agree(begins, "pairs or settings")
        self._begun = output_dir / ".checkpoints" / fingerprint(begins)[:24]
        if set(self._begun.parent.glob("*")) - {self._begun}:
            print(
                f"align: {self._begun.parent} has what a stopped call with other pairs, settings "
                "or weights left; this one does not go on from it (a chat template that writes the "
                "date reads the same pairs otherwise on another day)",
                flush=True,
            )
        output_dir.mkdir(parents=True, exist_ok=True)

    def _find_way_to_read(self) -> None:
        """Find how the model is read so that the longest pair has its own log-probs."""
        by_length = sorted(self.pairs.rows, key=lambda row: sum(map(len, row.values())))
        shortest, longest = by_length[0], by_length[-1]
        sides = (longest, "chosen"), (longest, "rejected"), (shortest, "chosen")
        rows = [{"prompt": pair["prompt"], "response": pair[side]} for pair, side in sides]
        layout_of(self.model, self.pad, rows)

    def find_neurons(self) -> NeuronMask:
        """The method's first step: scores, and the mask that they give."""
        mask, ties = allo.find_neurons(self._scores(), self.config.share)
        whole = mask.joined() if devices.is_sharded(next(self.model.parameters())) else mask
        if devices.rank() == 0:
            _warn(stats.arbitrary_mask(**ties, kept=whole.kept, total=whole.total))
            whole.save(self.output_dir / "mask.safetensors")
        return mask

    def _scores(self) -> dict[str, torch.Tensor]:
        rows = self._with_reference(self.pairs.rows)
        settings = self._stage("importance", self.config.importance_rate, None, "importance")
        if self.config.estimator == "gradient":
            self.logs["importance"] = Log()
            used = {key: settings[key] for key in ("schedule", "beta", "pad_token_id")}
            return allo.gradient_scores(self.model, rows, **used)
        with restored(self.model, always=True):
            scores, record = allo.delta_of_dpo(self.model, rows, **settings)
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

    def share_of(self, mask) -> float:
        """The share of all neurons that is trained; of several processes' parts together."""
        if mask is None:
            return 1.0
        sharded = devices.is_sharded(next(self.model.parameters()))
        kept = devices.total(torch.tensor(mask.kept)) if sharded else mask.kept
        return int(kept) / mask.total

    def train(self, mask, before: dict) -> None:
        """Forgetting and learning, from the weights `before`, at the best rates.

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
        """Try rates and leave the model that ranks most development pairs right; of equal ones
        that of the smallest rates."""
        names = [f"{stage}_rate" for stage in self.trained]
        best: tuple | None = None  # (accuracy, negative rates), entries, logs

        def attempt(rates: tuple[float, ...]) -> float:
            nonlocal best
            put(self.model, mask, before)
            about = ", ".join(f"{n} {rate:g}" for n, rate in zip(names, rates, strict=True))
            try:
                self._train_at(rates, mask, f"{about}/")
            except Diverged as error:
                print(f"align: {about}: {error}", flush=True)
                return -1.0
            margins = self._margins(self.development)
            accuracy = sum(margin > 0 for margin in margins) / len(margins)
            print(f"align: {about}: {accuracy:.1%} of {len(margins)} development pairs", flush=True)
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
            settings = self._stage(name, rate, mask, f"{place}{name}") | {"masters": self.masters}
            if name == "forgetting":
                fitting = zip(rows, self.pairs.corrections, strict=True)
                rows = [row for row, correction in fitting if correction]
                self.logs[name] = allo.forget(self.model, rows, self._weights, **settings)
            else:
                key_share = self.config.key_share
                self.logs[name] = allo.learn(self.model, rows, key_share=key_share, **settings)

    def _token_weights(self, mask) -> list[list[float]]:
        """The method's second step: train the rewriter from the model's weights, read its
        probabilities, and put the weights back."""
        config = self.config
        learnt, read = zip(*filter(None, self.pairs.corrections), strict=True)
        trained = mask if config.rewriter_neurons == "kept" else None
        settings = self._stage("sft", config.rewriter_rate, trained, "rewriter")
        with restored(self.model, trained, always=True):
            self.logs["rewriter"] = allo.run_stage(self.model, list(learnt), "sft", **settings)
            values = rewriter.probabilities(self.model, list(read), self.pad, config.forward_batch)
        weights = allo.token_weights(values, config.token_rule, config.token_threshold)
        _warn(stats.no_choice_of_tokens(weights))
        return weights

    def _stage(self, name: str, rate: float, mask, place: str) -> dict:
        """The arguments of `allo.run_stage` but model and rows; place: of the checkpoints."""
        config = self.config
        schedule = Schedule(
            rate, config.epochs, config.batch_size, derive(config.seed, name), _WARMUP[name],
            config.accumulation, config.max_steps,
        )  # fmt: skip
        return {
            "schedule": schedule,
            "pad_token_id": self.pad,
            "mask": mask,
            "beta": config.beta,
            "max_grad_norm": config.max_grad_norm,
            "label": name,
            # Where a stage of this very call goes on from.
            "checkpoints": Checkpoints(self._begun / place, config.checkpoint_minutes),
        }

    def forget_checkpoints(self) -> None:
        """All stages are saved: nothing will go on from them."""
        shutil.rmtree(self._begun, ignore_errors=True)
        with contextlib.suppress(OSError):  # another call's may be there
            self._begun.parent.rmdir()

    def _with_reference(self, rows: list[dict]) -> list[dict]:
        """Pairs with the log-probs of the model as it stands: each stage's own reference."""
        return rows and with_reference(
            self.model,
            rows,
            pad_token_id=self.pad,
            batch_size=self.config.forward_batch,
            store=Store(self.output_dir / ".references"),
        )

    def read_unseen(self) -> None:
        """The log-probs of the pairs that are not trained on, under the model before training."""
        self.held_out = self._with_reference(self.held_out)
        self.development = self._with_reference(self.development)

    def _margins(self, rows: list[dict]) -> list[float]:
        """Of each pair the implicit reward of DPO, beta log pi / pi_before, chosen - rejected."""
        now = pair_logps(self.model, rows, self.pad, self.config.forward_batch)
        return implicit_margins(now, rows, self.config.beta)

    def rank_held_out(self) -> None:
        """The share of held-out pairs with a positive margin, into the record and printed, with a
        95% interval (`stats.share_interval`, by prompt).

        Before, all margins are 0, and a pair of margin 0 counts half.
        """
        if not self.held_out:
            return
        margins = self._margins(self.held_out)
        right = [(margin > 0) + (margin == 0) / 2 for margin in margins]
        n, share = len(right), sum(right) / len(right)
        change = share - 0.5
        low, high = (end - 0.5 for end in stats.share_interval(right, self._asked))
        self.record["held_out"] = {
            "pairs": n,
            "reward_margin": sum(margins) / n,
            "reward_accuracy": {
                "before": 0.5, "after": share, "change": change, "low": low, "high": high,
            },
        }  # fmt: skip
        print(
            f"align: reward_accuracy on {n} held-out pairs: 50.0% before, {share:.1%} after; "
            f"change {change:+.1%}, 95% interval {low:+.1%} to {high:+.1%}",
            flush=True,
        )

    def save(self, mask, before: dict) -> None:
        """The folder of the aligned model, and what of it differs from the values `before`."""
        self._write_model(self.output_dir)
        path = self.output_dir / delta.NAME
        if self.trained:
            self._write_delta(path, mask, before)
        if devices.rank() > 0:
            return
        self.tokenizer.save_pretrained(self.output_dir)
        size = sum(file.stat().st_size for file in self.output_dir.glob("model*.safetensors"))
        about = f"align: {self.output_dir} holds the model ({size / 1e6:.1f} MB)"
        if self.trained:
            its = path.stat().st_size
            about += f" and {delta.NAME} ({its / 1e6:.1f} MB, {its / size:.0%} of it)"
        else:
            path.unlink(missing_ok=True)
        self.record["loss"] = {stage: log.loss for stage, log in self.logs.items()}
        write_json(self.output_dir / "align.json", self.record)
        print(about, flush=True)

    def _write_model(self, folder) -> None:
        weights = devices.whole_weights(self.model)  # all processes give their parts
        if devices.rank() == 0:
            self.model.save_pretrained(folder, state_dict=weights)

    def _write_delta(self, path: Path, mask, before: dict) -> None:
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


def _warn(sign: str | None) -> None:
    if sign:
        print(f"warning: {sign}", file=sys.stderr, flush=True)
