"""What is measured of a trained model: its score for the search, test answers, held-out margins,
and replies to instructions; and the scores of such results.

Replies are greedy and made when a method is measured, as its weights do not outlive that. They are
compared with those of the SFT model, from which every method starts (`judges`).
"""

import contextlib
import random
from functools import lru_cache
from itertools import islice

import numpy as np

from allo_lib.data.benchmarks import data_hash, load_rows
from allo_lib.data.tasks import plan
from allo_lib.engine.encoding import encode_prompt
from allo_lib.engine.forward import implicit_margins
from allo_lib.engine.generation import generate
from allo_lib.errors import AlloError
from allo_lib.evaluation import outcomes
from allo_lib.evaluation.stats import Interval, mean_and_error, mean_interval
from allo_lib.seeds import derive
from allo_lib.study import manifest

REFERENCE = "sft_base"  # the row of main tables whose replies the others are compared with


def dev_score(study, name: str, model) -> float:
    """Accuracy on the development problems, or reward accuracy on the development pairs."""
    if study.task(name) is None:
        margins = _margins(study, name, model, "dev")
        return sum(margin > 0 for margin in margins) / len(margins)
    right = [right for *_, right in answers(study, name, model, "dev")]
    return sum(right) / len(right)


def dev_count(study, name: str) -> int:
    """Development problems, or pairs, behind `dev_score`."""
    if study.task(name) is None:
        return len(study.pairs(name).rows["dev"])
    return study.domain(name).dev


def answers(study, name: str, model, split: str) -> list[tuple]:
    """Greedy answers to a split: (question, whether it was answered, whether that is right) each.

    A response that does not end has no answer. AlloError without questions, of which there is no
    accuracy.
    """
    domain, task = study.domain(name), study.task(name)
    questions = task.questions(split, getattr(domain, split))
    if not questions:
        raise AlloError("no questions to answer; raise `dev` and `test` of the domain")
    sizes = {
        "max_new_tokens": domain.max_new_tokens,
        "batch_size": study.profile.compute.generation_batch,
        "drafts": study.drafts(name, split),
    }
    found = []
    responses = generate(model, study.tokenizer, [one.prompt for one in questions], **sizes)
    for question, (response,) in zip(questions, responses, strict=True):
        answered = response.ended and task.answered(question, response.text)
        found.append((question, answered, answered and task.right(question, response.text)))
    return found


def _margins(study, name: str, model, split: str) -> list[float]:
    rows = study.encoded(name, split)
    return implicit_margins(study.logps(model, rows), rows, study.profile.method.beta)


def measure(study, name: str, model) -> dict:
    """What is reported of a method: margins on the held-out pairs, test answers, and replies.

    model: None for one whose training reached NaN: it ranks no pair, answers nothing, and its
    replies are empty and do not end.
    """
    diverged = model is None
    pairs = study.pairs(name).rows["heldout"]
    measured = {
        "margins": [0.0] * len(pairs) if diverged else _margins(study, name, model, "heldout")
    }
    if study.domain(name).instructions.datasets:
        measured["instructions"] = (
            [[row["id"], dataset, "", 0] for dataset, row in _requested(study, name)]
            if diverged
            else reply(study, name, model)
        )
    if study.task(name) is not None:
        questions = study.task(name).questions("test", study.domain(name).test)
        judged = [(question, False, False) for question in questions]
        if not diverged:
            judged = answers(study, name, model, "test")
        measured["answers"] = [
            [one.id, one.dataset, int(answered), int(right)] for one, answered, right in judged
        ]
    return measured


# --- scores of results ---------------------------------------------------------------------------


def score_of(found: dict) -> tuple[float, float]:
    """Test accuracy, or held-out reward accuracy where nothing is answered; and standard error.

    The starting model gives every pair the margin 0 and is counted as guessing, 0.5. A model whose
    training diverged ranks no pair right and is counted as 0, as in `measurements.csv`.
    """
    if "answers" not in found and found["method"] == REFERENCE:
        return 0.5, 0.0
    right = [right for _, right in _outcomes(found)]
    measured = outcomes.proportion(0, found["method"], "all", "accuracy", right)
    return measured.value, measured.stderr


def unit(found: dict) -> str:
    """What `score_of` a result is."""
    return "accuracy" if "answers" in found else "held-out reward accuracy"


def reward_accuracy(found: dict) -> float:
    """Share of held-out pairs that the implicit reward ranks right; ties count half."""
    points = [0.5 if margin == 0 else float(margin > 0) for margin in found["margins"]]
    return sum(points) / len(points)


def difference(found: dict, baseline: dict) -> Interval:
    """Paired difference of two results on one seed's problems (or held-out pairs)."""
    groups: dict[str, list[int]] = {}
    for (place, ours), (_, theirs) in zip(_outcomes(found), _outcomes(baseline), strict=True):
        groups.setdefault(place, []).append(ours - theirs)
    effect, error = mean_and_error([np.array(group) for group in groups.values()], (1.0, -1.0))
    n = sum(map(len, groups.values()))
    return mean_interval({0: effect}, {0: error}, n).within(-1.0, 1.0)


def _outcomes(found: dict) -> list[tuple[str, bool]]:
    """(data set, right) of every problem, else of every held-out pair."""
    if "answers" in found:
        return [(dataset, bool(right)) for _, dataset, _, right in found["answers"]]
    return [("pairs", margin > 0) for margin in found["margins"]]


# --- replies to instructions ---------------------------------------------------------------------


@lru_cache
def instruction_inputs(study, name: str) -> dict:
    """What the replies of a domain depend on besides the model's weights; {} without instructions.

    Without instructions a result is known by the same key as before there were any.
    """
    if not study.domain(name).instructions.datasets:
        return {}
    data = {dataset: data_hash(rows) for dataset, rows in _loaded(study, name).items()}
    settings = study.profile.to_dict()["domains"][name]["instructions"]
    return {"instructions": settings | {"data": data}}


@lru_cache
def chosen(study, name: str) -> dict[str, list[dict]]:
    """The instructions of each data set: rows of `benchmarks.load_rows`, the same for every seed.

    They come in an order that no seed changes. What the model cannot read with a reply after it, or
    its tokenizer cannot encode, is skipped, and so is an instruction that was there before
    (AlpacaEval knows outputs by their instructions).

    Raises:
        AlloError: more are requested than the model can read.
    """
    loaded, settings = _loaded(study, name), study.domain(name).instructions
    sizes = {dataset: len(rows) for dataset, rows in loaded.items()}
    room, found = study.context - settings.max_new_tokens, {}
    for dataset, count in plan({"test": settings.count}, sizes, "test")["test"].items():
        rows = {row["question"]: row for row in reversed(loaded[dataset])}
        rows = sorted(rows.values(), key=lambda row: row["id"])
        random.Random(derive(0, "instructions", dataset)).shuffle(rows)
        fitting = (row for row in rows if _tokens(study.tokenizer, row["question"]) <= room)
        found[dataset] = list(islice(fitting, count))
        if len(found[dataset]) < count:
            raise AlloError(
                f"{name}: {count} instructions of {dataset} are asked for, but the model can read "
                f"{len(found[dataset])} with {settings.max_new_tokens} tokens after them; lower "
                "instructions.count or instructions.max_new_tokens"
            )
    return found


@lru_cache
def _loaded(study, name: str) -> dict[str, list[dict]]:
    """All instructions of the domain's data sets; the manifest names them."""
    datasets = study.domain(name).instructions.datasets
    loaded = {dataset: load_rows(dataset, "test", study.data_dir) for dataset in datasets}
    for dataset, rows in loaded.items():
        if "outputs" not in rows[0]:
            raise AlloError(f"{dataset} holds no instructions; expected {{id, question, outputs}}")
    summary = {
        f"{dataset}/test": {"rows": len(rows), "sha256": data_hash(rows)}
        for dataset, rows in loaded.items()
    }
    manifest.leave_data(study.store, study.results_dir, f"{name}.instructions", summary)
    return loaded


def _tokens(tokenizer, question: str) -> float:
    with contextlib.suppress(AlloError):
        return len(encode_prompt(tokenizer, prompt_of(tokenizer, question)))
    return float("inf")


def _requested(study, name: str) -> list[tuple[str, dict]]:
    return [(dataset, row) for dataset, rows in chosen(study, name).items() for row in rows]


def prompt_of(tokenizer, question: str):
    """An instruction as a chat message, or as a turn in the form of the preference pairs."""
    if getattr(tokenizer, "chat_template", None):
        return [{"role": "user", "content": question}]
    return f"\n\nHuman: {question}\n\nAssistant:"


def reply(study, name: str, model) -> list[list]:
    """Greedy replies of a model to the instructions of a domain, ready for JSON.

    Returns:
        Rows [id, data set, text, 1 if it ended or 0 if it was cut off].
    """
    requested = _requested(study, name)
    responses = generate(
        model,
        study.tokenizer,
        [prompt_of(study.tokenizer, row["question"]) for _, row in requested],
        max_new_tokens=study.domain(name).instructions.max_new_tokens,
        batch_size=study.profile.compute.generation_batch,
    )
    return [
        [row["id"], dataset, one.text, int(one.ended)]
        for (dataset, row), (one,) in zip(requested, responses, strict=True)
    ]
