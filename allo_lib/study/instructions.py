"""Instructions that the methods of a domain reply to: which ones, the replies, and their files.

Replies are greedy and made when a method is measured, as its weights do not outlive that. They are
compared with those of the SFT model, from which every method starts (`win_rates`).
"""

import contextlib
import logging
import random
from functools import lru_cache
from pathlib import Path

from allo_lib.data.benchmarks import data_hash, load_rows
from allo_lib.data.tasks import counts_of_test
from allo_lib.engine import provenance
from allo_lib.engine.encoding import encode_prompt, encode_response
from allo_lib.engine.generation import generate
from allo_lib.errors import AlloError
from allo_lib.seeds import derive
from allo_lib.study import judges

REFERENCE = "sft_base"  # the row of main tables whose replies the others are compared with


@lru_cache
def inputs(study, name: str) -> dict:
    """What the replies of a domain depend on besides the model's weights; {} where none are asked.

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
        AlloError: more are asked for than can be read.
    """
    loaded, asked = _loaded(study, name), study.domain(name).instructions
    counts = counts_of_test(asked.count, {dataset: len(rows) for dataset, rows in loaded.items()})
    found = {}
    for dataset, rows in loaded.items():
        rows = list({row["question"]: row for row in reversed(rows)}.values())
        rows.sort(key=lambda row: row["id"])
        random.Random(derive(0, "instructions", dataset)).shuffle(rows)
        found[dataset], skipped = [], 0
        for row in rows:
            if len(found[dataset]) == counts[dataset]:
                break
            if _tokens(study.tokenizer, row["question"]) + asked.max_new_tokens <= study.context:
                found[dataset].append(row)
            else:
                skipped += 1
        if len(found[dataset]) < counts[dataset]:
            raise AlloError(
                f"{name}: {counts[dataset]} instructions of {dataset} are asked for, but the model "
                f"can read {len(found[dataset])} with {asked.max_new_tokens} tokens after them; "
                "lower instructions.count or instructions.max_new_tokens"
            )
        if skipped:
            logging.getLogger(__name__).warning(
                "%d instruction(s) skipped: too long for the model, or not to be encoded", skipped
            )
    return found


@lru_cache
def _loaded(study, name: str) -> dict[str, list[dict]]:
    """All instructions of the domain's data sets; the manifest is told which they were."""
    datasets = study.domain(name).instructions.datasets
    loaded = {dataset: load_rows(dataset, "test", study.data_dir) for dataset in datasets}
    for dataset, rows in loaded.items():
        if "outputs" not in rows[0]:
            raise AlloError(f"{dataset} holds no instructions; expected {{id, question, outputs}}")
    told = {
        f"{dataset}/test": {"rows": len(rows), "sha256": data_hash(rows)}
        for dataset, rows in loaded.items()
    }
    provenance.leave(study.store.folder, f"{provenance.DATA}{name}.instructions", told)
    return loaded


def _tokens(tokenizer, question: str) -> float:
    with contextlib.suppress(AlloError):
        return len(encode_prompt(tokenizer, prompt_of(tokenizer, question)))
    return float("inf")


def prompt_of(tokenizer, question: str):
    """What the model is asked: a chat message, or a turn in the form of the preference pairs."""
    if getattr(tokenizer, "chat_template", None):
        return [{"role": "user", "content": question}]
    return f"\n\nHuman: {question}\n\nAssistant:"


def reply(study, name: str, model, drafts: list[list] | None = None) -> list[list]:
    """Greedy replies of a model to the instructions of a domain, ready for JSON.

    drafts: rows of another model, from which decoding begins; they change the cost alone.

    Returns:
        Rows [id, data set, text, 1 if it ended or 0 if it was cut off].
    """
    asked = [(dataset, row) for dataset, rows in chosen(study, name).items() for row in rows]
    prompts = [prompt_of(study.tokenizer, row["question"]) for _, row in asked]
    guesses = drafts and [_draft(study.tokenizer, text, ended) for _, _, text, ended in drafts]
    limit, given = study.domain(name).instructions.max_new_tokens, {}
    for places in _batches(study, name, prompts, limit):
        groups = generate(
            model,
            study.tokenizer,
            [prompts[i] for i in places],
            max_new_tokens=limit,
            batch_size=len(places),
            drafts=guesses and [guesses[i] for i in places],
        )
        given |= {i: one for i, (one,) in zip(places, groups, strict=True)}
    return [
        [row["id"], dataset, given[i].text, int(given[i].ended)]
        for i, (dataset, row) in enumerate(asked)
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


def of_method(study, name: str, model) -> dict:
    """The replies of a trained model as its result keeps them; {} where none are asked."""
    if not study.domain(name).instructions.datasets:
        return {}
    # Long replies soon leave the draft: it pays where a token costs as much as a batch of them, on
    # a CPU, and on a GPU compiled steps are faster.
    drafts = study.replies(name) if study.device == "cpu" else None
    return {"instructions": reply(study, name, model, drafts)}


def of_silence(study, name: str) -> dict:
    """The same of a model that says nothing: empty replies, which do not end."""
    found = chosen(study, name) if study.domain(name).instructions.datasets else {}
    rows = [[row["id"], dataset, "", 0] for dataset, rows in found.items() for row in rows]
    return {"instructions": rows} if found else {}


def replies(study, name: str, results: dict[str, dict]) -> dict[str, dict[str, list[list]]]:
    """data set -> method -> its rows of `reply`, REFERENCE first; results: see `arms.result`."""
    by_method = {REFERENCE: study.replies(name)}
    by_method |= {
        method: found["instructions"] for method, found in results.items() if method != REFERENCE
    }
    return {
        dataset: {m: [row for row in rows if row[1] == dataset] for m, rows in by_method.items()}
        for dataset in study.domain(name).instructions.datasets
    }


def texts(study, name: str, results: dict[str, dict]) -> dict[str, dict[str, list[str]]]:
    """data set -> method -> texts in the order of `chosen`, REFERENCE first, without blank ends."""
    return {
        dataset: {method: [row[2].strip() for row in rows] for method, rows in of_methods.items()}
        for dataset, of_methods in replies(study, name, results).items()
    }


def folder(study, name: str) -> Path:
    """Where a domain's replies are written, and the benchmarks' verdicts on them looked for."""
    return study.results_dir / "instructions" / f"seed{study.seed}" / name


def write_outputs(study, name: str, results: dict[str, dict]) -> list[Path]:
    """Write all replies in the formats of AlpacaEval and Arena-Hard; the files, none if none asked.

    Each data set has a folder in `folder`, see `judges.write_outputs`.
    """
    if not study.domain(name).instructions.datasets:
        return []
    place, asked = folder(study, name), chosen(study, name)
    return [
        path
        for dataset, by_method in texts(study, name, results).items()
        for path in judges.write_outputs(dataset, place / dataset, asked[dataset], by_method)
    ]
