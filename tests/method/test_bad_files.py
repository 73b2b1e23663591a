"""Mask, score and weight files that are damaged, forged or of another model."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import read_or_refused, refused, tree
from tiny_models import tiny_llama, weights_of

from allo_lib.machine import weights
from allo_lib.method.neurons import NeuronMask, select_neurons

WRITTEN = {"format": 1, "granularity": "scalar", "shapes": {"w": [2, 2]}}
fuzzing = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def safetensors(header, data: bytes = b"", length=None) -> bytes:
    """Write a file of the format by hand: length of the header, header, data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype="I32", shape=(2,), start=0, end=8) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def mask_bytes(indices=(0, 3), told=WRITTEN, name="w", **change) -> bytes:
    """Make a mask file; `told` is the header of this library, `change` goes over the tensor's."""
    header = {name: tensor(shape=[len(indices)], end=4 * len(indices)) | change}
    if told is not None:
        text = told if isinstance(told, str) else json.dumps(told)
        header["__metadata__"] = {"allo_neuron_mask": text}
    return safetensors(header, struct.pack(f"<{len(indices)}i", *indices))


GOOD = mask_bytes()
FOREIGN = safetensors({"w": tensor("F32")}, bytes(8))

# Bytes that no safetensors file has: refused alike wherever such a file is read.
DAMAGED = {
    "empty": b"",
    "half a header": GOOD[: len(GOOD) // 2],
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.",
    "header very deep": safetensors(b'{"w": ' + b"[" * 10_000),
    "unknown dtype": safetensors({"w": tensor("I31")}, bytes(8)),
    "shape that wraps around": safetensors({"w": tensor(shape=[2**32, 2**32])}, bytes(8)),
}


@pytest.mark.parametrize("raw", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("kind", ["mask", "scores"])
def test_a_damaged_file_is_told_and_left_alone(tmp_path, monkeypatch, kind, raw):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"{kind}.safetensors"
    path.write_bytes(raw)
    before = tree(tmp_path)
    read = NeuronMask.load if kind == "mask" else weights.read_tensors
    told = "not a readable mask file" if kind == "mask" else "not a readable safetensors file"
    with refused(f"{kind}.safetensors is {told} (", "make it anew"):
        read(path)
    assert tree(tmp_path) == before  # the pickle did not run


def told_with(**change) -> dict:
    return WRITTEN | change


HEADER = "the header of this mask file is damaged; make it anew"
INDICES = "w has unsorted or out-of-range indices; make it anew"
MASKS = {
    "weights of a model": (FOREIGN, "is no mask: it lacks the header 'allo_neuron_mask'"),
    "header empty": (mask_bytes(told=""), HEADER),
    "header a list": (mask_bytes(told=[1]), HEADER),
    "header very deep": (mask_bytes(told="[" * 100_000), HEADER),
    "no format": (mask_bytes(told={"granularity": "scalar", "shapes": {"w": [4]}}), HEADER),
    "format of later": (mask_bytes(told=told_with(format=7)), HEADER),
    "format true": (mask_bytes(told=told_with(format=True)), HEADER),
    "granularity null": (mask_bytes(told=told_with(granularity=None)), HEADER),
    "shape of truths": (mask_bytes(told=told_with(shapes={"w": [True, 4]})), HEADER),
    "shape that wraps around": (mask_bytes(told=told_with(shapes={"w": [2**40, 2**40]})), HEADER),
    "one name too many": (
        mask_bytes(told=told_with(shapes={"w": [4], "v": [4]})),
        "header and tensors name different tensors",
    ),
    "no tensors at all": (
        safetensors({"__metadata__": {"allo_neuron_mask": json.dumps(told_with(shapes={}))}}),
        "keeps nothing of any tensor; make it anew",
    ),
    "nothing kept": (mask_bytes(()), "keeps nothing of any tensor; make it anew"),
    "index past the end": (mask_bytes((0, 4)), INDICES),
    "index negative": (mask_bytes((-1, 3)), INDICES),
    "differences that wrap around": (mask_bytes((2**31 - 1, -(2**31), 3)), INDICES),
    "twice": (mask_bytes((3, 3)), INDICES),
    "floats": (mask_bytes(dtype="F32"), INDICES),
    "a matrix of indices": (mask_bytes(shape=[1, 2]), INDICES),
    "parts of rows": (
        mask_bytes((0, 3), told_with(granularity="row")),
        "w keeps parts of rows; make it anew",
    ),
    "half of the last row": (
        mask_bytes((0, 1, 2), told_with(granularity="row")),
        "w keeps parts of rows; make it anew",
    ),
    "name with a line break": (
        mask_bytes((0, 3), WRITTEN | {"shapes": {"a\nb\x1b[31m": [1]}}, name="a\nb\x1b[31m"),
        "'a\\nb\\x1b[31m'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "told"), MASKS.values(), ids=MASKS)
def test_a_bad_mask_is_told_and_left_alone(tmp_path, raw, told):
    path = tmp_path / "mask.safetensors"
    path.write_bytes(raw)
    with refused("mask.safetensors", told):
        NeuronMask.load(path)
    assert tree(tmp_path) == {path.relative_to(tmp_path): raw}


def test_the_masks_that_the_cases_depart_from_are_read(tmp_path):
    path = tmp_path / "mask.safetensors"
    path.write_bytes(GOOD)
    assert NeuronMask.load(path).kept == 2
    for rows, shape in (((2, 3), [2, 2]), ((0, 1, 2), [3]), ((), [0, 4])):
        told = told_with(granularity="row", shapes={"w": shape, "v": [1]})
        header = {"w": tensor(shape=[len(rows)], end=4 * len(rows))}
        header["v"] = tensor(shape=[1], start=4 * len(rows), end=4 * len(rows) + 4)
        header["__metadata__"] = {"allo_neuron_mask": json.dumps(told)}
        data = struct.pack(f"<{len(rows) + 1}i", *rows, 0)
        path.write_bytes(safetensors(header, data))
        assert NeuronMask.load(path).kept == len(rows) + 1


# --- masks and scores of another model -----------------------------------------------------------

UP = "model.layers.0.mlp.up_proj.weight"


def test_a_mask_of_untied_embeddings_does_not_fit_tied_ones():
    mask = select_neurons(weights_of(tiny_llama(tied=False)), 0.1)
    with refused("mask names 'lm_head.weight', which the model lacks: use its own mask"):
        mask.check(tiny_llama(tied=True))


WEIGHTS = {
    "a name missing": ({UP: None}, f"weights and model differ: '{UP}' is in only one"),
    "turned": ({UP: torch.ones(16, 24)}, "up_proj.weight have shape (16, 24), the model"),
    "last one of another shape": (
        {"lm_head.weight": torch.ones(34, 16)},
        "weights of lm_head.weight have shape (34, 16), the model has (33, 16)",
    ),
}


@pytest.mark.parametrize(("change", "told"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_of_another_model_change_nothing(change, told):
    model = tiny_llama()
    before = weights_of(model)
    other = {name: value + 1 for name, value in before.items()} | change
    with refused(told):
        weights.restore(model, {name: value for name, value in other.items() if value is not None})
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])


def test_no_file_a_folder_and_no_path_are_told(tmp_path):
    for path in (tmp_path, tmp_path / "none", tmp_path / ("x" * 300), "a\x00b", ""):
        for read in (NeuronMask.load, weights.read_tensors):
            with refused("is not a readable"):
                read(path)


# --- any bytes -----------------------------------------------------------------------------------


def loaded(path, raw):
    """Return what the two readers make of these bytes."""
    path.write_bytes(raw)
    mask = read_or_refused(lambda: NeuronMask.load(path))
    tensors = read_or_refused(lambda: weights.read_tensors(path))
    return mask, tensors


def assert_usable(mask):
    if mask is None:
        return
    assert 0 < mask.share <= 1 and mask.overlap(mask) == 1
    for name, index in mask.indices.items():
        assert int(mask.dense(name).sum()) == index.numel()


@fuzzing
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_any_changed_byte_of_a_mask_is_refused_or_still_a_mask(tmp_path, place, value):
    raw = bytearray(GOOD)
    raw[place] = value
    assert_usable(loaded(tmp_path / "any", bytes(raw))[0])


small = st.integers(-3, 6) | st.sampled_from([2**31, 2**32, 2**63, 2**64, True, None, 1.5, "1"])
sizes = st.lists(small, max_size=3)


@fuzzing
@given(
    st.lists(st.integers(-2, 6), max_size=4),
    st.fixed_dictionaries(
        {},
        optional={
            "format": small,
            "granularity": st.sampled_from(["scalar", "row", "", None, 1]),
            "shapes": sizes | st.dictionaries(st.sampled_from(["w", "v", ""]), sizes | small),
        },
    ),
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["I32", "I64", "F16", "BOOL", "F4", "x", None]),
            "shape": sizes,
            "data_offsets": sizes,
        },
    ),
)
def test_any_header_is_refused_or_a_mask(tmp_path, indices, told, change):
    raw = mask_bytes(indices, WRITTEN | told, **change)
    assert_usable(loaded(tmp_path / "any", raw)[0])
