"""The cost of a step: what is compared does the same arithmetic, and sizes are counted right."""

import csv
import math
import mmap

import pytest
import torch
from test_trainer import pairs
from tiny_models import tiny_llama, weights_of

from allo_lib.engine.batching import Layout, pair_batch
from allo_lib.engine.forward import response_logps
from allo_lib.errors import AlloError
from allo_lib.method.losses import objective
from allo_lib.method.masked_adamw import DenseMaskedAdamW, MaskedAdamW
from allo_lib.method.neurons import select_neurons
from allo_lib.report import notebook
from allo_lib.report.notebook import percent
from allo_lib.study import efficiency
from allo_lib.study.timed_steps import OwnSteps


def mask_of(model, share: float):
    return select_neurons({name: p.detach().abs() for name, p in model.named_parameters()}, share)


def steps(model, optimizer, count: int = 4) -> dict[str, torch.Tensor]:
    loss, rows = objective("dpo", beta=0.1), pairs(tiny_llama())
    for number in range(count):
        batch = pair_batch(rows[2 * number : 2 * number + 2], Layout(0))
        loss(response_logps(model, batch), batch)[0].backward()
        optimizer.step()
    return weights_of(model)


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_the_dense_mask_and_the_masked_optimizer_train_the_same(share):
    """Else a comparison of their costs would compare different methods."""
    ours, theirs = tiny_llama(), tiny_llama()
    settings = dict(lr=1e-3)
    masked = steps(ours, MaskedAdamW(ours, mask_of(ours, share), **settings))
    dense = steps(theirs, DenseMaskedAdamW(theirs, mask_of(theirs, share), **settings))
    for name in masked:
        assert torch.allclose(masked[name], dense[name], atol=2e-6), name
    assert any(not torch.equal(masked[n], value) for n, value in weights_of(tiny_llama()).items())


@pytest.mark.parametrize(
    "dtype, per_entry", [(torch.float32, 2 + 8 + 4), (torch.bfloat16, 2 + 8 + 4 + 2)]
)
def test_bytes_of_the_dense_mask(dtype, per_entry):
    """bf16 mask, two float32 moments, the gradient, and masters where weights are bf16."""
    model = tiny_llama(dtype=dtype)
    count = sum(parameter.numel() for parameter in model.parameters())
    optimizer = DenseMaskedAdamW(model, mask_of(model, 0.1), lr=1e-3)
    assert optimizer.state_bytes() == per_entry * count


def test_a_ratio_of_columns_and_the_file(tmp_path):
    row = dict.fromkeys(efficiency.COLUMNS, 2)
    rows = [row | {"variant": "dense", "seconds_per_pair": "0.5"}, row | {"variant": "allo_row"}]
    assert efficiency.ratio(rows, "allo_row", "dense", "seconds_per_pair") == 4
    rows[0]["seconds_per_pair"] = 0
    assert math.isnan(efficiency.ratio(rows, "allo_row", "dense", "seconds_per_pair"))
    efficiency.write(rows, tmp_path / "tables" / "efficiency.csv")
    with open(tmp_path / "tables" / "efficiency.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [r["variant"] for r in read] == ["dense", "allo_row"]
    assert tuple(read[0]) == efficiency.COLUMNS


def _dies(*arguments):
    raise SystemExit(3)


@pytest.mark.slow
def test_a_process_that_ends_early_is_told_and_not_waited_for(tiny_study, monkeypatch):
    monkeypatch.setattr(efficiency, "_worker", _dies)
    monkeypatch.setattr(efficiency, "VARIANTS", ("dense",))
    with pytest.raises(AlloError, match="ended before its time"):
        efficiency.measure(tiny_study)


MEASURED = {
    "seconds": 2.0, "steps": 1, "pairs": 2, "tokens_per_step": 8, "peak": 3, "trained": 4,
    "state": 5.0, "flops_per_step": 6, "rate": 7.0, "device": "a device",
}  # fmt: skip


def _works_but_in_peers(*arguments):
    if arguments[-1] == "trl_default":
        raise RuntimeError("no kernel for this\nand much more")
    if arguments[-1] == "trl_best":
        raise SystemExit(3)
    return MEASURED


@pytest.mark.slow
def test_a_peer_that_fails_is_told_and_left_out(tiny_study, monkeypatch, capsys):
    monkeypatch.setattr(efficiency, "_worker", _works_but_in_peers)
    asked = ["trl_default", "trl_best", "peft", "dense"]
    monkeypatch.setattr(efficiency, "variants", lambda study: asked)
    assert [row["variant"] for row in efficiency.measure(tiny_study)] == ["peft", "dense"]
    told = capsys.readouterr().out
    assert "trl_default is left out: RuntimeError: no kernel for this\n" in told
    assert "trl_best is left out: a process that measures" in told
    assert "dense, repeat 1: 1 s a pair, 4 values trained" in told


def _fails(*arguments):
    raise RuntimeError("no kernel for this")


@pytest.mark.slow
def test_a_variant_of_our_own_that_fails_ends_the_comparison(tiny_study, monkeypatch):
    monkeypatch.setattr(efficiency, "_worker", _fails)
    with pytest.raises(AlloError, match="RuntimeError: no kernel for this"):
        efficiency.measure(tiny_study)


def test_a_peak_is_of_what_comes_after_its_reset():
    """Memory that was taken and given back before does not count."""
    block, page = 64 * 2**20, 4096

    def touch(size: int) -> mmap.mmap:
        memory = mmap.mmap(-1, size)
        memory[::page] = b"x" * (size // page)
        return memory

    base = efficiency.reset_peak("cpu")
    touch(4 * block).close()
    assert efficiency.peak("cpu") - base > 3 * block
    efficiency.reset_peak("cpu")
    touch(block).close()
    assert 0.9 * block < efficiency.peak("cpu") - base < 3 * block


def test_the_peak_of_a_gpu_is_that_of_its_tensors(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 9)
    assert (efficiency.reset_peak("cuda"), efficiency.peak("cuda"), calls) == (5, 9, ["reset"])


@pytest.mark.parametrize("variant", ["dense", "dense_masked", "allo_scalar"])
def test_the_clock_and_the_peak_begin_after_the_warm_up(variant):
    model = tiny_llama()
    rows = pairs(model)[:2]
    own = OwnSteps(model, mask_of(model, 0.1), rows, variant, 0, beta=0.1, lr=1e-3)
    made, step = [], own.optimizer.step
    own.optimizer.step = lambda: made.append("step") or step()
    assert own.run(2, 3, lambda: made.append("begun")) > 0
    assert made == ["step"] * 2 + ["begun"] + ["step"] * 3


@pytest.mark.slow
def test_every_variant_is_measured(tiny_study):
    rows = efficiency.measure(tiny_study)
    assert [row["variant"] for row in rows] == list(efficiency.VARIANTS)
    state = {row["variant"]: float(row["state_bytes_per_parameter"]) for row in rows}
    assert state["allo_scalar"] == pytest.approx(2.0, rel=0.02)  # 20 bytes for a tenth
    assert state["allo_scalar"] < state["dense"] < state["dense_masked"]
    for row in rows:
        low, middle, high = (float(row[f"seconds_per_pair{end}"]) for end in ("_low", "", "_high"))
        each = [float(text) for text in row["seconds_per_pair_each"].split()]
        assert (min(each), max(each)) == (low, high)
        assert len(each) == tiny_study.profile.timing.repeats
        assert 0 < low <= middle <= high and float(row["tokens_per_second"]) > 0
        assert row["peak_bytes_above_model"] >= 0


def test_notebooks_show_text_as_text(monkeypatch):
    shown = []
    monkeypatch.setattr(notebook, "display", shown.append)
    notebook.table([{"prompt": "<script>alert(1)</script>", "share": 0.123456}], "A caption.")
    assert "&lt;script&gt;" in shown[0].data and "<script>" not in shown[0].data
    assert "0.1235" in shown[0].data and shown[1].data == "*A caption.*"
    assert percent(0.4567) == "45.7%" and percent(0.1, 0) == "10%"
