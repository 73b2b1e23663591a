"""What a study notes for the manifest: data, devices, weights."""

import contextlib
import json

import pytest
from refusals import refused
from tiny_models import tiny_llama
from tiny_study import DOMAIN, open_study

from allo_lib.engine.store import Store
from allo_lib.evaluation import claims
from allo_lib.report import report
from allo_lib.study import manifest, study


def test_a_note_is_whole_and_is_read_back(tmp_path):
    manifest.leave(Store(tmp_path), "data-toy", {"toy/train": {"rows": 3}})
    (tmp_path / manifest.FOLDER / "data-broken.json").write_text("{")
    assert manifest.collect(tmp_path, manifest.DATA) == {"toy": {"toy/train": {"rows": 3}}}
    assert {p.name for p in (tmp_path / manifest.FOLDER).iterdir()} == {
        "data-toy.json", "data-broken.json"}  # fmt: skip


def test_data_of_another_content_are_not_joined_to_results(tmp_path):
    store = Store(tmp_path / manifest.STORE)
    first, other = ({"ecqa/test": {"rows": 3, "sha256": sha}} for sha in ("a" * 64, "b" * 64))
    manifest.leave_data(store, tmp_path, "questions", first)
    manifest.leave_data(store, tmp_path, "questions", first)
    with store.only_reading():
        manifest.leave_data(store, tmp_path, "maths", other)  # nothing is noted
    with refused("holds results of other data: ecqa/test had SHA-256 aaaaaaaaaaaa, and has bbbb"):
        manifest.leave_data(store, tmp_path, "questions", other)
    assert manifest.noted(tmp_path)["data"] == {"questions": first}


def test_hidden_files_are_no_results(tmp_path):
    for name in ("claims.csv", ".DS_Store", "notebooks/.ipynb_checkpoints/06-checkpoint.ipynb",
                 "figures/.claims.png.3.tmp", "figures/claims.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert manifest.file_names(tmp_path) == ["claims.csv", "figures/claims.png"]


def test_cells_are_those_of_devices_and_of_sft_models_where_these_differ():
    results = {"dpo": {"device": "CPU"}, "allo": {"device": "GPU"}, "sft": {}}
    assert manifest.cells_of([results]) == {"CPU": ["dpo"], "GPU": ["allo"], "not told": ["sft"]}
    later = {"dpo": {"device": "GPU"}}  # a further replicate of one of them
    both = {"CPU": ["dpo"], "GPU": ["allo", "dpo"], "not told": ["sft"]}
    assert manifest.cells_of([results, later]) == both
    results = {m: {"device": "GPU", "sft": m[0]} for m in ("dpo", "npo")}
    cells = manifest.cells_of([results])
    assert cells == {"GPU, SFT model d": ["dpo"], "GPU, SFT model n": ["npo"]}
    line = manifest.several_devices({"seed0": {place: {"toy": m} for place, m in cells.items()}})
    assert "GPU, SFT model n: seed0, toy: npo" in line


def test_a_domain_measured_elsewhere_replaces_only_itself():
    known = {"seed0": {"CPU": {"a": ["dpo"], "b": ["dpo"]}, "old": {"b": ["allo"]}}}
    notes = {"seed0.b": {"GPU": ["dpo", "allo"]}, "seed1.a": {"CPU": ["dpo"]}}
    assert manifest.with_cells(known, notes) == {
        "seed0": {"CPU": {"a": ["dpo"]}, "GPU": {"b": ["dpo", "allo"]}},
        "seed1": {"CPU": {"a": ["dpo"]}},
    }


def test_cells_of_earlier_runs_stay_in_the_manifest_and_are_marked_in_the_report(tmp_path):
    known = {"seed0": {"GPU <1>": {"toy": ["dpo", "allo"]}}}
    earlier = {"profile": "x", "profile_hash": "", "seeds": [], "files": {}, "cells": known}
    (tmp_path / manifest.NAME).write_text(json.dumps(earlier))
    manifest.leave(Store(tmp_path / manifest.STORE), "cells-seed1.toy", {"CPU": ["dpo"]})
    cells = manifest.noted(tmp_path)["cells"]
    assert cells == known | {"seed1": {"CPU": {"toy": ["dpo"]}}}
    # Only several devices are worth a line.
    unknown = {"seed1": {"CPU": {"toy": ["dpo"]}, manifest.UNKNOWN: {"toy": ["sft"]}}}
    assert manifest.several_devices(unknown) == ""
    claims.write(tmp_path / "claims.csv", [])
    page = report.build(tmp_path).read_text()
    assert "GPU &lt;1&gt;: seed0, toy: dpo, allo" in page and "<1>" not in page


def test_what_a_stopped_run_made_counts_to_the_cost_of_the_one_that_went_on(tmp_path):
    made = {"result": 300.4, "candidate": 200.0, "sft": 60.0}  # a candidate is within its result
    for kind, seconds in made.items():
        path = tmp_path / manifest.STORE / kind / "key" / "manifest.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"kind": kind, "seconds": seconds}))
    (path.parent.parent / "broken").mkdir()
    (path.parent.parent / "broken" / "manifest.json").write_text("{")
    assert manifest.process_seconds(tmp_path) == 360
    known = {"profile": "x", "profile_hash": "", "seeds": [], "files": {}, "cores": 2}
    known["runs"] = {"seed0": {"seconds": {"00_setup": 60.0}}}
    for before, after, minutes in ((9, 360, 3), (9000, 9000, 75)):
        manifest.write_json(tmp_path / manifest.NAME, known | {"process_seconds": before})
        assert (found := manifest.process_seconds(tmp_path)) == after
        manifest.write_json(tmp_path / manifest.NAME, known | {"process_seconds": found})
        assert f"{minutes} minutes on 2 cores" in report._provenance(tmp_path, {})


def test_a_study_notes_its_weights(tmp_path):
    open_study(tmp_path).sft(DOMAIN)
    assert manifest.noted(tmp_path)["weights"][0]["name"] == "micro"
    assert manifest.noted(tmp_path)["data"] == {}  # generated problems come from no file


@pytest.mark.parametrize(("change", "words"), [
    ({"sha256": "b"}, "holds results of org/x with sha256 a, this run's is b; name another"),
    ({"dtype": "bfloat16"}, "holds results of org/x with dtype float32, this run's is bfloat16"),
    ({"revision": "of a new README"}, None),
])  # fmt: skip
def test_other_weights_of_a_name_or_another_dtype_are_not_mixed(
    tmp_path, monkeypatch, change, words
):
    note = {"name": "org/x", "sha256": "a", "dtype": "float32", "revision": "1"}
    for told, refuses in ((note, None), (note | change, words)):
        loaded = tiny_llama(), None, told
        monkeypatch.setattr(study.models, "load", lambda *_, loaded=loaded, **__: loaded)
        opened = open_study(tmp_path, model__name="org/x")
        with refused(refuses) if refuses else contextlib.nullcontext():
            assert opened.model is loaded[0]


def test_notes_of_a_piece_join_those_of_earlier_ones(tmp_path):
    earlier = {"profile": "x", "profile_hash": "", "seeds": [], "files": {}}
    earlier |= {"weights": [{"name": "a"}], "data": {"maths": 1}, "trained_at": {"seed0.maths": []}}
    (tmp_path / manifest.NAME).write_text(json.dumps(earlier))
    store = Store(tmp_path / manifest.STORE)
    for note, value in (("weights", {"name": "b"}), ("data-questions", 2),
                        ("commits-seed0.questions", ["c0ffee"])):  # fmt: skip
        manifest.leave(store, note, value)
    noted = manifest.noted(tmp_path)
    assert noted["weights"] == [{"name": "a"}, {"name": "b"}]
    assert noted["data"] == {"maths": 1, "questions": 2}
    assert noted["trained_at"] == {"seed0.maths": [], "seed0.questions": ["c0ffee"]}


def test_an_unfinished_run_has_its_folder_for_itself(tmp_path):
    profile = open_study(tmp_path / "a").profile
    manifest.own(tmp_path, profile)
    manifest.check_folder(tmp_path, profile)
    with refused("holds results of profile hash", "choose another --out"):
        open_study(tmp_path, search__candidates=7)
