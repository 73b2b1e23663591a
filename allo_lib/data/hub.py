"""Rows of the hub's copies of the data sets, made into the rows of a data folder (`realdata`)."""

import logging
import re

from allo_lib.data.answers import LETTERS
from allo_lib.data.benchmarks import BENCHMARKS, Benchmark
from allo_lib.errors import AlloError


def load(name: str, split: str) -> list[dict]:
    """All rows of "train" or "test", unchecked; a warning where the hub's copy is not pinned.

    Raises:
        AlloError: no such data set or split on the hub, no way to it, or columns of another form.
    """
    if name not in BENCHMARKS:
        raise AlloError(f"data set {name!r} is not there: {both_ways(name)}")
    benchmark = BENCHMARKS[name]
    its_split = {"train": benchmark.train, "test": benchmark.test}.get(split)
    if its_split is None:
        raise AlloError(f"data set {name!r} has no split {split!r} on the hub; {both_ways(name)}")
    if benchmark.revision is None:
        logging.getLogger(__name__).warning(
            "%s of %s is read without a pinned revision: its rows may change, and only the data's "
            "hash in manifest.json would tell", name, benchmark.hub,
        )  # fmt: skip
    table = _table(name, benchmark, its_split)
    try:
        rows = [ROW_OF[name](entry, f"{name}-{split}-{i}") for i, entry in enumerate(table)]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise AlloError(
            f"data set {name!r} of the hub has columns of another form "
            f"({' '.join(repr(error).split())[:60]}); {both_ways(name)}"
        ) from error
    rows = [row for row in rows if row is not None]
    if not rows:
        raise AlloError(f"data set {name!r} of the hub has no usable row; {both_ways(name)}")
    return rows


def both_ways(name: str) -> str:
    """What to do about a data set that is not there, as the end of a message."""
    hub = BENCHMARKS[name].hub if name in BENCHMARKS else f"it has {', '.join(BENCHMARKS)} here"
    return (
        "there are two ways: a data folder named with --data DIR or the environment variable "
        f"ALLO_DATA, or, with neither, the hub through `datasets` ({hub})"
    )


def _table(name: str, benchmark: Benchmark, split: str):
    import datasets

    path, settings = benchmark.hub, {"split": split}
    if benchmark.file:
        # The repository also holds a script, which `datasets` refuses; the file alone is JSON.
        at = f"@{benchmark.revision}" if benchmark.revision else ""
        path, settings["data_files"] = "json", f"hf://datasets/{benchmark.hub}{at}/{benchmark.file}"
    else:
        given = dict(name=benchmark.config, data_dir=benchmark.folder, revision=benchmark.revision)
        settings |= {key: value for key, value in given.items() if value is not None}
    try:
        return datasets.load_dataset(path, **settings)
    except Exception as error:
        # Every layer below (http, cache, parquet) has exceptions of its own.
        reason = " ".join(str(error).split())[:200]
        raise AlloError(
            f"data set {name!r} cannot be read from the hub ({reason}); {both_ways(name)}"
        ) from error


# --- one row each; None where it cannot be used -------------------------------------------------


def ecqa_row(entry, row_id) -> dict | None:
    """ECQA: q_text, q_op1 to q_op5, q_ans (an option's text), taskA_pos (statements for it)."""
    choices = [entry[f"q_op{i}"] for i in range(1, 6)]
    if choices.count(entry["q_ans"]) != 1:
        return None
    answer = LETTERS[choices.index(entry["q_ans"])]
    return _choice(row_id, entry["q_text"], choices, answer, entry["taskA_pos"])


def qasc_row(entry, row_id) -> dict | None:
    """QASC: question, choices (text, label), answerKey, fact1, fact2, combinedfact."""
    facts = [entry[key] for key in ("fact1", "fact2", "combinedfact")]
    return _labelled(row_id, entry["question"], entry, "\n".join(filter(None, facts)))


def openbookqa_row(entry, row_id) -> dict | None:
    """OpenBookQA: question_stem, choices (text, label), answerKey; no explanation."""
    return _labelled(row_id, entry["question_stem"], entry, None)


def strategyqa_row(entry, row_id) -> dict:
    """StrategyQA: question, answer (true or false), facts (a text or a list)."""
    facts = entry["facts"]
    facts = facts if isinstance(facts, str) else "\n".join(facts or [])
    if not isinstance(entry["answer"], bool):
        raise TypeError(f"answer is {entry['answer']!r}")
    return _free(row_id, entry["question"], _statements(facts), "yes" if entry["answer"] else "no")


def gsm8k_row(entry, row_id) -> dict:
    """GSM8k: question, answer (a solution with calculator marks `<<...>>`, then `#### N`)."""
    solution, mark, answer = entry["answer"].rpartition("####")
    if not mark:
        raise ValueError("no #### in the answer")
    solution = re.sub(r"<<[^<>]*>>", "", solution).strip()
    return _free(row_id, entry["question"], solution, answer.strip().replace(",", ""))


def math_row(entry, row_id) -> dict | None:
    r"""MATH: problem, solution (with the answer in its last `\boxed{}`)."""
    answer = last_boxed(entry["solution"])
    return _free(row_id, entry["problem"], entry["solution"], answer) if answer else None


def mawps_row(entry, row_id) -> dict:
    """MAWPS: question, equation, result (a number, thousands told by `_`)."""
    answer = entry["result"].replace("_", "")
    return _free(row_id, entry["question"], entry["equation"] or None, answer)


def tabmwp_row(entry, row_id) -> dict:
    """TabMWP: table_title, table, question, unit, choices or null, answer, solution."""
    title = f" {entry['table_title']}" if entry["table_title"] else ""
    unit = f" (Unit: {entry['unit']})" if entry["unit"] else ""
    stem = f"Table:{title}\n{entry['table']}\n\nQuestion: {entry['question']}{unit}"
    if not entry["choices"]:
        return _free(row_id, stem, entry["solution"], entry["answer"])
    choices = list(entry["choices"])
    return _choice(row_id, stem, choices, LETTERS[choices.index(entry["answer"])],
                   entry["solution"], lines=False)  # fmt: skip


def alpaca_row(entry, row_id) -> dict:
    """AlpacaEval: instruction, output, generator, dataset (which of its five sources)."""
    outputs = {entry["generator"]: entry["output"]}
    return {
        "id": row_id,
        "question": entry["instruction"],
        "subset": entry["dataset"],
        "outputs": outputs,
    }


def arena_row(entry, row_id) -> dict:
    """Arena-Hard: question_id, cluster, turns (a list of one content)."""
    question = entry["turns"][0]["content"]
    return {
        "id": entry["question_id"],
        "question": question,
        "cluster": entry["cluster"],
        "outputs": {},
    }


def hh_row(entry, row_id=None) -> dict | None:
    """Two whole conversations (chosen, rejected) as a preference row.

    None when they differ before the last reply, or when the last replies are empty or equal.
    """
    turn = "\n\nAssistant:"
    halves = [entry[key].rpartition(turn) for key in ("chosen", "rejected")]
    (before, _, chosen), (other, _, rejected) = halves
    chosen, rejected = chosen.strip(), rejected.strip()
    if not before or before != other or not chosen or not rejected or chosen == rejected:
        return None
    return {"prompt": before + turn, "chosen": chosen, "rejected": rejected}


ROW_OF = {
    "ecqa": ecqa_row,
    "qasc": qasc_row,
    "openbookqa": openbookqa_row,
    "strategyqa": strategyqa_row,
    "gsm8k": gsm8k_row,
    "math": math_row,
    "mawps": mawps_row,
    "tabmwp": tabmwp_row,
    "alpaca_eval": alpaca_row,
    "arena_hard": arena_row,
    "hh_helpful": hh_row,
}


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{}` of a LaTeX text, braces in it counted; else None."""
    _, found, rest = text.rpartition(r"\boxed{")
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[:place].strip() or None if found else None
    return None


def _labelled(row_id, question, entry, solution) -> dict | None:
    texts, labels = list(entry["choices"]["text"]), list(entry["choices"]["label"])
    if entry["answerKey"] not in labels:
        return None  # the test questions of QASC have no label
    answer = LETTERS[labels.index(entry["answerKey"])]
    return _choice(row_id, question, texts, answer, solution)


def _choice(row_id, question, choices, answer, solution, lines=True) -> dict:
    options = [f"({letter}) {text}" for letter, text in zip(LETTERS, choices, strict=False)]
    return {
        "id": row_id,
        "question": "\n".join([question, *options]),
        "solution": _statements(solution) if lines else solution,
        "answer": answer,
        "choices": choices,
    }


def _free(row_id, question, solution, answer) -> dict:
    return {
        "id": row_id,
        "question": question,
        "solution": solution,
        "answer": answer,
        "choices": None,
    }


def _statements(text) -> str | None:
    lines = [line.strip() for line in (text or "").split("\n")]
    return "\n".join(filter(None, lines)) or None
