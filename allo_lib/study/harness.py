"""lm-evaluation-harness on a study's models: the field's tool, the study's problems and prompts.

    ./run_all.sh harness PROFILE [--methods sft_base,dpo,allo]

The models of the first seed and replicate are written as ordinary folders, every data set as a task
of the harness (a YAML file, its problems as JSON lines, and the function that judges a response,
which is the study's own verifier), and `lm_eval` is run on them. `tables/harness.csv` has the
harness's accuracies beside the study's.
"""

import csv
import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

from allo_lib.engine.encoding import encode_text
from allo_lib.errors import AlloError
from allo_lib.study import arms
from allo_lib.study.study import Study

FOLDER = "harness"  # in the store: models, tasks and what lm_eval writes
TABLE = "tables/harness.csv"
COLUMNS = ("method", "dataset", "problems", "accuracy_lm_eval", "accuracy_study")
# What lm_eval imports to judge a response.
_JUDGE = """\
from allo_lib.study import harness


def judge(doc, results):
    return {{"acc": harness.judged({opened!r}, doc, results[0])}}
"""
_TASK = """\
task: allo_{dataset}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: ""
target_delimiter: ""
process_results: !function judge_{dataset}.judge
generation_kwargs: {{do_sample: false, max_gen_toks: {tokens}, until: []}}
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


def evaluate(study, methods: list[str], limit: int | None = None) -> Path:
    """Run the harness on the answered domains of a study; returns the table that it wrote.

    methods: names of rows whose weights the store keeps (`arms.KEPT`), and `sft_base`.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise AlloError("lm_eval is not installed; pip install lm-eval, then run this again")
    rows = []
    for name, domain in study.profile.domains.items():
        if study.task(name) is None:
            continue
        folder = study.store.folder / FOLDER / name
        tasks = [_write_task(study, name, dataset, folder, limit) for dataset in domain.datasets]
        for method in methods:
            results = _run(study, _save_model(study, name, method, folder), folder, tasks)
            rows += [_row(study, name, method, dataset, results) for dataset in domain.datasets]
    path = study.results_dir / TABLE
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    return path


def judged(opened: list, doc: dict, response: str) -> float:
    """1 for a right response that ended by itself; what lm_eval calls, in a process of its own.

    It hands on no end token: a response as long as the limit has not ended.
    """
    task, questions, encode = _problems(json.dumps(opened))
    ended = len(encode(response)) < doc["max_new_tokens"]
    return float(ended and task.right(questions[doc["id"]], response))


@cache
def _problems(opened: str):
    profile, seed, results_dir, name = json.loads(opened)
    study = Study.open(profile, seed, results_dir)
    questions = study.task(name).questions("test", study.domain(name).test)
    by_id = {question.id: question for question in questions}
    return study.task(name), by_id, lambda text: encode_text(study.tokenizer, text)


def _write_task(study, name: str, dataset: str, folder: Path, limit: int | None) -> str:
    domain = study.domain(name)
    problems = study.task(name).questions("test", domain.test)
    rows = [question for question in problems if question.dataset == dataset][:limit]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{dataset}.jsonl"
    docs = ({"id": q.id, "prompt": q.prompt, "max_new_tokens": domain.max_new_tokens} for q in rows)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in docs), encoding="utf-8")
    profile = folder / "profile.yaml"
    profile.write_text(json.dumps(study.profile.to_dict()), encoding="utf-8")  # JSON is YAML
    opened = [str(profile), study.seed, str(study.results_dir), name]
    (folder / f"judge_{dataset}.py").write_text(_JUDGE.format(opened=opened), encoding="utf-8")
    fields = {"dataset": dataset, "file": json.dumps(str(file)), "tokens": domain.max_new_tokens}
    (folder / f"allo_{dataset}.yaml").write_text(_TASK.format(**fields), encoding="utf-8")
    return f"allo_{dataset}"


def _save_model(study, name: str, method: str, folder: Path) -> Path:
    model, _ = arms.trained_model(study, name, method)
    model.save_pretrained(folder / method)
    study.tokenizer.save_pretrained(folder / method)
    return folder / method


def _run(study, model: Path, folder: Path, tasks: list[str]) -> dict:
    """Run lm_eval on one model; its results by task."""
    batch = study.profile.compute.generation_batch
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf",
               "--model_args", f"pretrained={model},dtype={study.dtype}",
               "--device", study.device, "--batch_size", str(batch), "--include_path", str(folder),
               "--tasks", ",".join(tasks), "--output_path", str(model / "lm_eval")]  # fmt: skip
    print(" ".join(command), flush=True)
    if subprocess.run(command).returncode:
        raise AlloError(f"lm_eval failed on {model.name}; what it printed stands above")
    newest = max((model / "lm_eval").rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text(encoding="utf-8"))


def _row(study, name: str, method: str, dataset: str, results: dict) -> tuple:
    count = results["n-samples"][f"allo_{dataset}"]["effective"]
    answers = arms.result(study, name, method)["answers"]
    right = [right for _, place, _, right in answers if place == dataset][:count]
    harness = results["results"][f"allo_{dataset}"]["acc,none"]
    return method, dataset, count, f"{harness:.6f}", f"{sum(right) / count:.6f}"
