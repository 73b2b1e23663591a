"""lm-evaluation-harness on the study's problems gives the study's own accuracies."""

import csv
import importlib.util
import json

import pytest
from tiny_study import DOMAIN, PROFILE

from allo_lib.cli import cli
from allo_lib.errors import AlloError
from allo_lib.study import harness


def test_a_response_as_long_as_the_limit_has_not_ended(tiny_study):
    folder = tiny_study.store.folder / harness.FOLDER / DOMAIN
    harness._write_task(tiny_study, DOMAIN, "chain", folder, 3)
    docs = [json.loads(line) for line in (folder / "chain.jsonl").read_text().splitlines()]
    assert len(docs) == 3 and set(docs[0]) == {"id", "prompt", "max_new_tokens"}
    opened = [str(folder / "profile.yaml"), 0, str(tiny_study.results_dir), DOMAIN]
    questions = {q.id: q for q in tiny_study.task(DOMAIN).questions("test", 60)}
    solution = questions[docs[0]["id"]].solution
    assert docs[0]["prompt"] == questions[docs[0]["id"]].prompt
    assert harness.judged(opened, docs[0], solution) == 1.0
    words = len(solution.split())
    assert harness.judged(opened, docs[0] | {"max_new_tokens": words}, solution) == 0.0
    assert harness.judged(opened, docs[0], "no answer") == 0.0


def test_without_lm_eval_the_command_says_what_to_install(tiny_study, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AlloError, match="pip install lm-eval"):
        harness.evaluate(tiny_study, ["dpo"])


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm-eval is not installed")
def test_its_accuracies_are_those_of_06(begun):
    methods = ["sft_base", "allo"]
    given = ["harness", str(PROFILE), "--methods", ",".join(methods), "--out", str(begun)]
    assert cli.main(given) == 0
    rows = list(csv.DictReader((begun / harness.TABLE).open(newline="")))
    assert [(row["method"], row["dataset"]) for row in rows] == [
        (method, family) for method in methods for family in ("chain", "scan", "story")
    ]
    assert all(row["accuracy_lm_eval"] == row["accuracy_study"] for row in rows)
    assert sum(int(row["problems"]) for row in rows) == 2 * 60
    assert len({row["accuracy_study"] for row in rows}) > 1


def test_bad_options_are_refused_in_one_line(capsys):
    assert cli.main(["harness", str(PROFILE), "--limit", "0"]) == cli.BAD_INPUT
    assert "expected a whole number above 0" in capsys.readouterr().err
    assert cli.main(["harness", str(PROFILE), "--methods", "nothing"]) == cli.BAD_INPUT
    assert "'nothing' is not known" in capsys.readouterr().err
