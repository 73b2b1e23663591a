"""Training and measuring the methods: every candidate of a search, and the result of a method."""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from allo_lib import allo
from allo_lib.engine import on_policy
from allo_lib.engine.encoding import encode_demonstration
from allo_lib.engine.store import MANIFEST, Artifact, NotMade, write_json
from allo_lib.engine.trainer import Diverged, Log, Schedule
from allo_lib.errors import AlloError
from allo_lib.machine import weights
from allo_lib.machine.environment import ROOT, device_name
from allo_lib.machine.runtime import torch_threads
from allo_lib.method.losses import GAMMA, ON_POLICY, ON_REJECTED, ON_SOLUTIONS
from allo_lib.method.neurons import NeuronMask
from allo_lib.profiles.methods import PAPER_PROTOCOL, Stage, knob_of, stages_of, tuned_as
from allo_lib.seeds import derive
from allo_lib.study import scoring
from allo_lib.study.manifest import commit_of
from allo_lib.study.search import Rates, Trial, best, search
from allo_lib.study.study import Study

# Methods whose weights stay in the store after their result is known, those of the first
# replicate: notebooks look into them.
KEPT = ("dpo", "dpo_long", "allo", "allo_no_learning")
WEIGHTS = "model.safetensors"
_HEAD = commit_of(ROOT)
_CODE = _HEAD["commit"] and _HEAD["commit"] + "-dirty" * bool(_HEAD["dirty"])  # that runs here
DIVERGED = -1.0  # development score of a candidate whose training reached NaN; below every real one
Stages = tuple[Stage, ...]


# --- the result of a method ----------------------------------------------------------------------


def result(study: Study, name: str, method: str) -> dict:
    """Everything measured of a method on a domain, by its name in measurements.csv.

    Keys: `method`, `rates` (one a stage), `knob` ("beta" or "gamma" -> value; empty for the
    profile's), `tried` (rates, dev score, displacement, training margin of every candidate), `loss`
    (a list per stage), `dev`, `displacement`, `answers` (id, dataset, answered, right per test
    problem; absent without questions), `margins` (of the held-out pairs), `instructions` (rows of
    `scoring.reply`; absent without instructions); `device`, `commit` of the code ("-dirty": as it
    was changed), and `sft`: the first 12 hex digits of the SHA-256 of the SFT weights that it
    started from.
    """
    inputs = _method_inputs(study, name, method)
    return _made(study, "result", inputs, partial(_make_result, study, name, method)).json()


def is_done(study: Study, name: str, method: str) -> bool:
    """Whether the store has this `result`; of a domain without an SFT model it has none."""
    with study.store.only_reading(), contextlib.suppress(NotMade):
        return study.store.has("result", _method_inputs(study, name, method))
    return False


def trained_model(study: Study, name: str, method: str):
    """The live model with the weights of a method's chosen candidate, and its artifact."""
    rates = _searched(result(study, name, method))
    artifact = _candidate(study, name, stages_of(method, study.profile), rates)
    return study.load(artifact), artifact


def log_ratios(study: Study, name: str, method: str, split: str = "train") -> list[list[float]]:
    """Delta_t of every token of the rejected responses: a method's model against the SFT model."""
    model, _ = trained_model(study, name, method)
    rows = study.encoded(name, split)
    return [
        [a - b for a, b in zip(one["rejected"], row["rejected_reference"], strict=True)]
        for one, row in zip(study.logps(model, rows), rows, strict=True)
    ]


def logps_by_stage(study: Study, name: str, method: str, split: str = "heldout") -> list:
    """Log-probs of a split's pairs (`Study.logps`) after each stage of a method, a list a stage.

    The stages are trained again at the method's best rates: the store has the last one's weights.
    """
    stages, rates = stages_of(method, study.profile), _searched(result(study, name, method))
    inputs = _stage_inputs(study, name, stages) | {"rates": list(rates), "split": split}

    def make(folder: Path) -> None:
        model, found = study.load_sft(name), []

        def look() -> None:
            found.append(study.logps(model.eval(), study.encoded(name, split)))

        _train_stages(study, name, stages, rates, folder, after_each=look)
        write_json(folder / "logps.json", found)

    return _made(study, "logps_by_stage", inputs, make).json("logps.json")


def _made(study: Study, kind: str, inputs: dict, make: Callable[[Path], None]) -> Artifact:
    """An artifact of the store, made on as many threads as the profile gives to a method."""
    threads = torch_threads(study.profile.compute.method_threads)
    return study.store.get(kind, inputs, threads(make))


def _method_inputs(study: Study, name: str, method: str) -> dict:
    settings, domain = study.profile.to_dict(), study.domain(name)
    inputs = _stage_inputs(study, name, stages_of(method, study.profile)) | {
        "search": {key: settings["search"][key] for key in ("candidates", "factor")},
        "rates": settings["domains"][name]["rates"],
        "test": [domain.dev, domain.test],
        "paper_protocol": method.endswith(PAPER_PROTOCOL),
    }
    if domain.tuned:
        inputs["tuned"] = _tuned_rates(study, name, _at_rates_of(method))
    if study.profile.search.per_run and (domain.tuned or study.replicate):
        inputs["per_run"] = True  # the first run searches anyhow, where nothing was tuned
    return inputs | scoring.instruction_inputs(study, name)


def _stage_inputs(study: Study, name: str, stages: Stages) -> dict:
    """What the training of a candidate depends on, besides its rates."""
    method = study.profile.to_dict()["method"]
    used = ("beta", "forgetting_warmup", "learning_warmup", "weight_decay", "max_grad_norm",
            "token_threshold", "warmup_rate_factor")  # fmt: skip
    # The record of a candidate holds its score on the development split.
    fields = ("batch_size", "epochs", "max_length", "max_new_tokens", "sft", "rewriter", "dev")
    inputs = study.inputs(name, *fields) | {
        "stages": [stage.settings() for stage in stages],
        "pairs": study.pairs(name).key,
        "method": {key: method[key] for key in used},
        "warmup_rate": study.domain(name).rates.dense,
    }
    if any(stage.objective in ON_POLICY for stage in stages):
        inputs["on_policy"] = asdict(on_policy.DEFAULT)
    if study.replicate and stages:
        inputs["replicate"] = [study.pair_set, study.order]
    return inputs


def _make_result(study: Study, name: str, method: str, folder: Path) -> None:
    stages, fixed = stages_of(method, study.profile), _fixed_rates(study, name, method)
    candidates, records = {}, {}

    def evaluate(rates: Rates) -> float:
        candidates[rates] = _candidate(study, name, stages, rates)
        records[rates] = candidates[rates].json()
        return records[rates]["dev"]

    if fixed is not None:
        tried = [Trial(fixed, evaluate(fixed))]
    else:
        settings, tuned = study.profile.search, _tuned_rates(study, name, method) or ()
        start = tuned or initial_rates(study, name, stages)
        knob = len(start) > len(stages)
        tried = search(start, settings.candidates, settings.factor, evaluate, knob)
    chosen, model = best(tried), None
    if chosen.score != DIVERGED:
        # Asked for again: a method of the same stages may have run beside this one and dropped it.
        best_one = _candidate(study, name, stages, chosen.rates)
        model = study.load(best_one)
        records[chosen.rates] = best_one.json()  # lost weights may just have been trained again
    elif fixed is None:
        raise AlloError(
            f"{name}, {method}: every learning rate of the search diverged; lower `rates`"
        )
    rates, knob = _rates_and_knob(stages, chosen.rates)
    kept = ("dev", "displacement", "train_margin")
    record = {
        **records[chosen.rates],
        **({"dev": 0.0, "loss": []} if model is None else {}),
        "device": device_name(study.device),
        "commit": _CODE,
        "sft": study.sft(name).json(MANIFEST)["files"][WEIGHTS][:12],
        "method": method,
        "rates": list(rates),
        "knob": knob,
        "tried": [
            {"rates": list(one.rates)} | {key: records[one.rates][key] for key in kept}
            for one in tried
        ],
        **scoring.measure(study, name, model),
    }
    write_json(folder / "record.json", record)
    stays = method.removesuffix(PAPER_PROTOCOL) in KEPT and not study.replicate
    for rates, artifact in candidates.items():
        if stages and not (stays and rates == chosen.rates):
            study.store.drop(artifact)


# --- rates ---------------------------------------------------------------------------------------


def initial_rates(study: Study, name: str, stages: Stages, knob: bool = False) -> Rates:
    """Where a search begins: the profile's rates and, with `knob`, its beta or SimPO's gamma."""
    rates = tuple(stage.initial_rate(study.domain(name).rates) for stage in stages)
    values = {"beta": study.profile.method.beta, "gamma": GAMMA}
    return (*rates, values[knob_of(stages)]) if knob and knob_of(stages) else rates


def is_searched(study: Study, name: str) -> bool:
    """Whether rates are searched on this study's own model, be it around those of a tuning."""
    return study.profile.search.per_run or not study.domain(name).tuned


def run_before(study: Study, name: str, method: str) -> tuple[Study, str, str] | None:
    """The run whose rates this one takes: the first replicate's, or another method's; None where
    its own are searched, or tuned on other models."""
    if not is_searched(study, name):
        return None
    if study.replicate and not study.profile.search.per_run:
        return study.at(0), name, method
    source = _at_rates_of(method)
    return None if source == method else (study, name, source)


def _at_rates_of(method: str) -> str:
    """Itself; by the paper's protocol every mask is trained at the one rate that DPO likes best."""
    return "dpo" if method.endswith(PAPER_PROTOCOL) else method


def _fixed_rates(study: Study, name: str, method: str) -> Rates | None:
    """Tuned rates or those of `run_before`; None for a method whose rates are to be searched."""
    if before := run_before(study, name, method):
        return _searched(result(*before))
    if is_searched(study, name):
        return None
    return _tuned_rates(study, name, _at_rates_of(method))


def _tuned_rates(study: Study, name: str, method: str) -> Rates | None:
    """The tuned rates of a method; None where nothing is trained, or nothing was tuned.

    After the rate of a single stage may stand what else was searched (`methods.knob_of`).
    """
    tuned, stages = study.domain(name).tuned, stages_of(method, study.profile)
    if not (stages and tuned):
        return None
    rates = tuned.get(method) or tuned.get(tuned_as(method), ())
    if len(rates) not in {len(stages), len(stages) + (knob_of(stages) is not None)}:
        raise AlloError(
            f"{name}, {method}: `tuned` has {len(rates)} rates for its {len(stages)} stages; tune "
            "it (./run_all.sh tune), or leave the method out"
        )
    return rates


def _rates_and_knob(stages: Stages, searched: Rates) -> tuple[Rates, dict[str, float]]:
    """The rates of the stages, and what else was searched, by name."""
    rates, beyond = searched[: len(stages)], searched[len(stages) :]
    return rates, {knob_of(stages): value for value in beyond}


def _searched(found: dict) -> Rates:
    """What was searched of a result: its rates and its knob."""
    return (*found["rates"], *found["knob"].values())


# --- candidates ----------------------------------------------------------------------------------


def score_at(study: Study, name: str, method: str, rates: Rates) -> float:
    """The development score of a method at these rates; the store keeps it, but no weights."""
    artifact = _candidate(study, name, stages_of(method, study.profile), rates)
    (artifact.path / WEIGHTS).unlink(missing_ok=True)
    return artifact.json()["dev"]


def _candidate(study: Study, name: str, stages: Stages, rates: Rates) -> Artifact:
    """Weights and dev score of the stages trained at these rates, one per stage.

    For a single stage a further number is its knob (`methods.knob_of`).
    """
    inputs = _stage_inputs(study, name, stages) | {"rates": list(rates)}
    make = partial(_make_candidate, study, name, stages, rates)
    return _made(study, "candidate", inputs, make)


def _make_candidate(study: Study, name: str, stages: Stages, rates: Rates, folder: Path) -> None:
    model = study.load_sft(name)
    start = weights.snapshot(model)
    try:
        logs = _train_stages(study, name, stages, rates, folder)
    except Diverged as error:
        # A rate that is too large is a result of the search, not a reason to stop the study.
        print(error, flush=True)
        diverged = {"dev": DIVERGED, "displacement": None, "train_margin": None}
        write_json(folder / "record.json", diverged)
        return
    margins = logs[-1].metrics.get("reward_margin", []) if logs else []
    last = margins[-max(1, len(margins) // 4) :]
    record = {
        "stages": [stage.settings() for stage in stages],
        "loss": [log.loss for log in logs],
        "watch": [log.metrics for log in logs],
        "train_margin": sum(last) / len(last) if last else None,  # of the last quarter
        "displacement": weights.displacement(model, start),
        "dev": scoring.dev_score(study, name, model),
    }
    weights.save(model, folder / WEIGHTS)
    write_json(folder / "record.json", record)


def _train_stages(
    study: Study, name: str, stages: Stages, rates: Rates, folder: Path, after_each=lambda: None
) -> list[Log]:
    """Train the live model through all stages; float32 masters pass from each to the next."""
    masters, logs = {}, []
    rates, knob = _rates_and_knob(stages, rates)
    for number, rate in enumerate(rates):
        logs.append(_train_stage(study, name, stages, number, rate, knob, masters, folder))
        after_each()
    return logs


def _train_stage(study, name, stages, number: int, rate, knob, masters: dict, folder: Path) -> Log:
    """Train the live model, as it stands, through one stage."""
    stage, domain, method = stages[number], study.domain(name), study.profile.method
    schedule = Schedule(
        rate,
        domain.epochs * stage.epochs,
        domain.batch_size,
        derive(study.seed, "order", name, number, *([study.order] if study.order else [])),
        method.forgetting_warmup if stage.objective in ON_REJECTED else method.learning_warmup,
    )
    common = {
        "mask": mask_of(study, name, stage),
        "weight_decay": method.weight_decay,
        "max_grad_norm": method.max_grad_norm,
        "label": f"{name}, {stage.objective} at {rate:g}",
    }
    if stage.objective in ON_POLICY:
        return _train_on_policy(study, name, stage.objective, schedule, **common)
    settings = common | {
        "beta": method.beta,
        "pad_token_id": study.tokenizer.pad_token_id,
        "key_share": stage.key_share,
        "masters": masters,
        "checkpoints": study.checkpoints(folder, f"stage-{number}"),
    } | knob  # fmt: skip
    if stage.objective in ON_SOLUTIONS:
        rows = _solution_rows(study, name, stage.objective)
    else:
        rows = _pairs(study, name, stage, first=number == 0)
    if stage.objective == "forgetting":
        token_weights = study.forgetting_weights(name, stage)
        return allo.forget(study.model, rows, token_weights, schedule, **settings)
    if stage.objective == "learning":
        keys = None  # from the policy at every step; the others are chosen once, before training
        if stage.key == "oracle":
            keys = study.oracle_tokens(name, study.train)
        elif stage.key == "random":
            keys = study.random_keys(name, stage.key_share)
        return allo.learn(study.model, rows, schedule, keys, **settings)
    return allo.run_stage(study.model, rows, stage.objective, schedule, **settings)


def _train_on_policy(
    study: Study, name: str, objective: str, schedule: Schedule, **settings
) -> Log:
    """The same for stages that sample their responses: to the questions of the training pairs."""
    task, known = study.task(name), study.pair_questions(name)
    questions = [known[row["id"]] for row in study.pairs(name).rows[study.train]]

    def reward(number: int, response) -> float:
        return float(response.ended and task.right(questions[number], response.text))

    return on_policy.run_on_policy(
        study.model,
        study.tokenizer,
        [question.prompt for question in questions],
        reward,
        objective,
        schedule,
        max_new_tokens=study.domain(name).max_new_tokens,
        generation_batch=study.profile.compute.generation_batch,
        **settings,
    )


# --- what a stage trains, and on what ------------------------------------------------------------


def mask_of(study: Study, name: str, stage: Stage) -> NeuronMask | None:
    """The neurons that a stage trains; None for all of them."""
    if stage.neurons == "all":
        return None
    return study.mask(
        name, stage.neurons, stage.share, stage.estimator, stage.granularity, stage.scope
    )


def _pairs(study: Study, name: str, stage: Stage, first: bool) -> list[dict]:
    """Pairs that a stage trains on; their reference is the model that the stage starts from."""
    splits = {"train": [study.train], "all": [study.train, "mask"], "wrong": [study.wrong]}
    rows = [dict(row) for split in splits[stage.pairs] for row in study.encoded(name, split)]
    if not first:
        for row, values in zip(rows, study.logps(study.model, rows), strict=True):
            row |= {f"{side}_reference": values[side] for side in ("chosen", "rejected")}
    return rows


def _solution_rows(study: Study, name: str, objective: str) -> list[dict]:
    """RFT: the right sampled responses of the training pairs. SFT: as many gold solutions that fit.

    Pairs fit as they are; gold solutions are of any length, and a few long ones among short ones
    cost a step several times its memory.
    """
    pairs, domain = study.pairs(name).rows[study.train], study.domain(name)
    if objective == "rft" or study.task(name) is None:
        texts = [(row["prompt"], row["chosen"]) for row in pairs]
    else:
        questions = study.task(name).questions("sft", domain.sft.examples, domain.sft.mix)
        texts = [(question.prompt, question.solution) for question in questions]
    rows = (encode_demonstration(study.tokenizer, prompt, text) for prompt, text in texts)
    fit = (r for r in rows if len(r["prompt"]) + len(r["response"]) <= domain.max_length)
    return list(itertools.islice(fit, len(pairs)))
