"""What is measured of a trained model: its score for the search, test answers, held-out margins,
and replies to instructions.

Replies are greedy and made when a method is measured, as its weights do not outlive that. They are
compared with those of the SFT model, from which every method starts (`judges`).
"""

import contextlib
import logging
import random
from functools import lru_cache

from allo_lib.data.benchmarks import data_hash, load_rows
from allo_lib.data.tasks import counts_of_test
from allo_lib.engine import provenance
from allo_lib.engine.encoding import encode_prompt, encode_response
from allo_lib.engine.forward import implicit_margins
from allo_lib.engine.generation import Answers, answer, generate
from allo_lib.errors import AlloError
from allo_lib.seeds import derive

REFERENCE = "sft_base"  # the row of main tables whose replies the others are compared with


def dev_score(study, name: str, model) -> float:
    """Accuracy on the development problems, or reward accuracy on the development pairs."""
    if study.task(name) is None:
        margins = _margins(study, name, model, "dev")
        return sum(margin > 0 for margin in margins) / len(margins)
    return answers(study, name, model, "dev").accuracy


def dev_count(study, name: str) -> int:
    """Development problems, or pairs, behind `dev_score`."""
    if study.task(name) is None:
        return len(study.pairs(name).rows["dev"])
    return study.domain(name).dev


def answers(study, name: str, model, split: str) -> Answers:
    """Greedy answers to the problems of a split."""
    domain = study.domain(name)
    return answer(
        model,
        study.tokenizer,
        study.task(name),
        study.task(name).questions(split, getattr(domain, split)),
        max_new_tokens=domain.max_new_tokens,
        batch_size=study.profile.compute.generation_batch,
        drafts=study.drafts(name, split),
    )


def _margins(study, name: str, model, split: str) -> list[float]:
    rows = study.encoded(name, split)
    reference = [
        {side: row[f"{side}_reference"] for side in ("chosen", "rejected")} for row in rows
    ]
    return implicit_margins(study.logps(model, rows), reference, study.profile.method.beta)


def measure(study, name: str, model) -> dict:
    """What is reported of a method: margins on the held-out pairs, test answers, and replies."""
    measured = {"margins": _margins(study, name, model, "heldout")}
    if study.domain(name).instructions.datasets:
        # Long replies soon leave the draft: it pays where a token costs as much as a batch of them,
        # on a CPU, and on a GPU compiled steps are faster.
        drafts = study.replies(name) if study.device == "cpu" else None
        measured["instructions"] = reply(study, name, model, drafts)
    if study.task(name) is not None:
        test = answers(study, name, model, "test")
        rows = zip(_test_questions(study, name), test.answered, test.right, strict=True)
        measured["answers"] = [[q.id, q.dataset, int(read), int(right)] for q, read, right in rows]
    return measured


def measure_diverged(study, name: str) -> dict:
    """The same of a model whose training reached NaN: it answers nothing, ranks no pair, and its
    replies are empty and do not end."""
    measured = {"margins": [0.0] * len(study.encoded(name, "heldout"))}
    if study.domain(name).instructions.datasets:
        measured["instructions"] = [
            [row["id"], dataset, "", 0]
            for dataset, rows in chosen(study, name).items()
            for row in rows
        ]
    if study.task(name) is not None:
        measured["answers"] = [[q.id, q.dataset, 0, 0] for q in _test_questions(study, name)]
    return measured


def _test_questions(study, name: str) -> list:
    return study.task(name).questions("test", study.domain(name).test)


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
    counts = counts_of_test(
        settings.count, {dataset: len(rows) for dataset, rows in loaded.items()}
    )
    found = {}
    for dataset, rows in loaded.items():
        rows = list({row["question"]: row for row in reversed(rows)}.values())
        rows.sort(key=lambda row: row["id"])
        random.Random(derive(0, "instructions", dataset)).shuffle(rows)
        found[dataset], skipped = [], 0
        for row in rows:
            if len(found[dataset]) == counts[dataset]:
                break
            if _tokens(study.tokenizer, row["question"]) + settings.max_new_tokens <= study.context:
                found[dataset].append(row)
            else:
                skipped += 1
        if len(found[dataset]) < counts[dataset]:
            raise AlloError(
                f"{name}: {counts[dataset]} instructions of {dataset} are asked for, but the model "
                f"can read {len(found[dataset])} with {settings.max_new_tokens} tokens after them; "
                "lower instructions.count or instructions.max_new_tokens"
            )
        if skipped:
            logging.getLogger(__name__).warning(
                "%d instruction(s) skipped: too long for the model, or not to be encoded", skipped
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
    provenance.leave(study.store.folder, f"{provenance.DATA}{name}.instructions", summary)
    return loaded


def _tokens(tokenizer, question: str) -> float:
    with contextlib.suppress(AlloError):
        return len(encode_prompt(tokenizer, prompt_of(tokenizer, question)))
    return float("inf")


def prompt_of(tokenizer, question: str):
    """An instruction as a chat message, or as a turn in the form of the preference pairs."""
    if getattr(tokenizer, "chat_template", None):
        return [{"role": "user", "content": question}]
    return f"\n\nHuman: {question}\n\nAssistant:"


def reply(study, name: str, model, drafts: list[list] | None = None) -> list[list]:
    """Greedy replies of a model to the instructions of a domain, ready for JSON.

    drafts: rows of another model, from which decoding begins; they change the cost alone.

    Returns:
        Rows [id, data set, text, 1 if it ended or 0 if it was cut off].
    """
    requested = [(dataset, row) for dataset, rows in chosen(study, name).items() for row in rows]
    prompts = [prompt_of(study.tokenizer, row["question"]) for _, row in requested]
    guesses = drafts and [_draft(study.tokenizer, text, ended) for _, _, text, ended in drafts]
    limit, responses = study.domain(name).instructions.max_new_tokens, {}
    for places in _batches(study, name, prompts, limit):
        groups = generate(
            model,
            study.tokenizer,
            [prompts[i] for i in places],
            max_new_tokens=limit,
            batch_size=len(places),
            drafts=guesses and [guesses[i] for i in places],
        )
        responses |= {i: one for i, (one,) in zip(places, groups, strict=True)}
    return [
        [row["id"], dataset, responses[i].text, int(responses[i].ended)]
        for i, (dataset, row) in enumerate(requested)
    ]


def _batches(study, name: str, prompts: list, limit: int) -> list[list[int]]:
    """Places of prompts by length, as many in a batch as fit the memory of the domain's own rows.

    Some instructions are a hundred times longer than others.
    """
    room = study.profile.compute.generation_batch * study.domain(name).max_length
    lengths = [len(encode_prompt(study.tokenizer, prompt)) + limit for prompt in prompts]
    batches: list[list[int]] = []
    for place in sorted(range(len(prompts)), key=lambda i: (lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * lengths[place] > room:
            batches.append([])
        batches[-1].append(place)
    return batches


def _draft(tokenizer, text: str, ended: int) -> list[int]:
    with contextlib.suppress(AlloError):  # a text that cannot be read back is no draft
        ids = encode_response(tokenizer, text)
        return ids if ended else ids[:-1]  # what was cut off has no end
    return []
