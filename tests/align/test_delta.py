"""The delta beside an aligned model: only what changed, and the same bytes when it is applied."""

import json

import pytest
import torch
from refusals import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_bad_models import PAIRS, QUICK
from tiny_models import ROUTED, made, tiny_llama, words
from transformers import AutoModelForCausalLM

from allo_lib import align, delta, load_aligned, merge


@torch.no_grad()
def every_tenth(model):
    for value in model.parameters():
        value.view(-1)[::10] += 0.25


def write(folder, model, change=every_tenth):
    """Folders of the model before and after `change`, and the delta between them."""
    base, result = folder / "base", folder / "result"
    model.save_pretrained(base)
    words().save_pretrained(base)
    change(model)
    model.save_pretrained(result)
    about = {"base": str(base), "revision": None, "dtype": str(model.dtype).removeprefix("torch.")}
    delta.write(base, result, folder / delta.NAME, about)
    return base, result, folder / delta.NAME


@pytest.mark.parametrize("make", [
    lambda: tiny_llama(tied=True, dtype=torch.float16), tiny_llama,
    lambda: made("mixtral", **ROUTED).bfloat16(),
])  # fmt: skip
def test_applied_to_its_base_it_gives_the_same_bytes(make, tmp_path):
    base, result, path = write(tmp_path, make())
    # Of experts, too, tensors have the names of their checkpoint.
    names = {key.rpartition(".")[0] for key in load_file(path)}
    assert names == set(load_file(base / "model.safetensors"))
    merge(str(base), path, tmp_path / "merged")
    merged, expected = (f / "model.safetensors" for f in (tmp_path / "merged", result))
    assert merged.read_bytes() == expected.read_bytes()
    expected = AutoModelForCausalLM.from_pretrained(result, dtype="auto").state_dict()
    for given in (str(base), AutoModelForCausalLM.from_pretrained(base, dtype="auto")):
        found = load_aligned(given, path).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_it_holds_where_bytes_differ_and_nothing_else(tmp_path):
    """Also a sign of zero, a NaN that stays and one that comes."""
    model = tiny_llama()
    name = "model.layers.0.mlp.up_proj.weight"
    flat = model.get_parameter(name).data.view(-1)
    flat[[3, 9]] = torch.tensor([0.0, torch.nan])

    def change(_):
        flat[[3, 50, 7]] = torch.tensor([-0.0, torch.nan, 8.0])

    _, _, path = write(tmp_path, model, change)
    with safe_open(path, framework="pt") as file:
        assert list(file.metadata()) == ["allo_delta"]
    found = load_file(path)
    assert found.keys() == {f"{name}.indices", f"{name}.values"}
    assert found[f"{name}.indices"].dtype == torch.int32
    assert found[f"{name}.indices"].tolist() == [3, 7, 50]
    values = found[f"{name}.values"]
    assert values[1] == 8 and torch.signbit(values[0]) and torch.isnan(values[2])


def test_what_align_writes(tmp_path, capsys):
    tiny_llama(tied=True, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    words().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    config = QUICK | {"estimator": "gradient", "rewriter_neurons": "kept", "learning_rate": 1e-2}
    out = tmp_path / "out"
    result = align(model, words(), PAIRS, config=config, output_dir=out)
    size = (out / delta.NAME).stat().st_size
    assert f"and allo_delta.safetensors ({size / 1e6:.1f} MB, " in capsys.readouterr().out
    assert not [path for path in out.iterdir() if path.name.startswith(".base")]
    found = {k.removesuffix(".indices"): v for k, v in load_file(out / delta.NAME).items()}
    for name, kept in result.mask.indices.items():
        assert set(found.get(name, kept[:0]).tolist()) <= set(kept.tolist())
    with safe_open(out / delta.NAME, framework="pt") as file:
        header = json.loads(file.metadata()["allo_delta"])
    assert header["base"] == str(tmp_path / "base") and header["dtype"] == "bfloat16"
    merge(str(tmp_path / "base"), out / delta.NAME, tmp_path / "merged")
    merged = tmp_path / "merged" / "model.safetensors"
    assert merged.read_bytes() == (out / "model.safetensors").read_bytes()


def test_another_base_is_refused(tmp_path):
    base, result, path = write(tmp_path, tiny_llama())
    words().save_pretrained(result)
    with refused(f"was made from '{base}' (revision None, sha256 "):
        merge(str(result), path, tmp_path / "merged")
    with refused("has other weights"):
        load_aligned(tiny_llama(seed=1), path)
    with refused("result is there already"):
        merge(str(base), path, result)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "base", "result"]


@pytest.mark.parametrize("damage", ["cut", "header", "order", "range", "value", "missing"])
def test_a_damaged_delta_is_refused(damage, tmp_path):
    base, _, path = write(tmp_path, tiny_llama())
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    first = sorted(tensors)[0].rpartition(".")[0]
    index, values = (tensors[f"{first}.{part}"].clone() for part in ("indices", "values"))
    if damage == "order":
        index = index.flip(0)
    if damage == "range":
        index[-1] = 1 << 30
    if damage == "value":
        values[0] += 1
    tensors |= {f"{first}.indices": index, f"{first}.values": values}
    if damage == "missing":
        del tensors[f"{first}.values"]
    if damage == "header":
        metadata = {"allo_delta": '{"format": 1}'}
    save_file(tensors, path, metadata=metadata)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    with refused(f"{path} is no sound delta"):
        merge(str(base), path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
