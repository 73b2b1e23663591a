"""Scores and masks against sorting in plain Python; files that are damaged or of another model."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama, weights_of

from allo_lib.machine import weights
from allo_lib.method.neurons import (
    NeuronMask,
    chance_overlap,
    count_ties,
    delta_scores,
    select_neurons,
)

NAN, INF = float("nan"), float("inf")
# Few distinct values: nearly every threshold falls into a tie.
TIED = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 3.5, INF, -INF])
ANY = st.floats(allow_nan=False, width=32)
SHAPES = [(7,), (3, 4), (2, 3, 2), (), (1, 5)]
UP = "model.layers.0.mlp.up_proj.weight"


@st.composite
def score_dicts(draw, values=TIED | ANY):
    scores = {}
    for number, shape in enumerate(draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))):
        size = math.prod(shape)
        flat = draw(st.lists(values, min_size=size, max_size=size))
        scores[f"layer{number}"] = torch.tensor(flat, dtype=torch.float32).reshape(shape)
    return scores


def slow_choice(scores, share, order="top", scope="global"):
    """Sorted by score, then by place: the documented rule, in plain Python."""
    if scope == "tensor":
        return {n: slow_choice({n: score}, share, order)[n] for n, score in scores.items()}
    entries = [
        (value, name, place)
        for name, score in scores.items()
        for place, value in enumerate(score.flatten().tolist())
    ]
    sign = -1 if order == "top" else 1
    ranked = sorted(range(len(entries)), key=lambda i: sign * entries[i][0])  # sorted is stable
    chosen = {name: [] for name in scores}
    for i in sorted(ranked[: max(1, round(share * len(entries)))]):
        chosen[entries[i][1]].append(entries[i][2])
    return chosen


def lists(mask):
    return {name: index.tolist() for name, index in mask.indices.items()}


def random_scores():
    generator = torch.Generator().manual_seed(0)
    sizes = ((40, 30), (200,), (8, 5, 5))
    return {f"w{i}": torch.randn(size, generator=generator) for i, size in enumerate(sizes)}


# --- selection ---

ORDERS, SCOPES = st.sampled_from(["top", "bottom"]), st.sampled_from(["global", "tensor"])
DTYPES = [torch.float32, torch.bfloat16]


@settings(max_examples=100, deadline=None)
@given(score_dicts(), st.floats(0.001, 1) | st.just(1), ORDERS, SCOPES, st.sampled_from(DTYPES))
def test_selection_is_that_of_a_stable_sort(scores, share, order, scope, dtype):
    scores = {n: score.to(dtype) if i % 2 else score for i, (n, score) in enumerate(scores.items())}
    copies = {name: score.clone() for name, score in scores.items()}
    mask = select_neurons(scores, share, order=order, scope=scope)
    assert lists(mask) == slow_choice(scores, share, order, scope)
    assert all(torch.equal(scores[name], copies[name]) for name in scores)
    total = sum(score.numel() for score in scores.values())
    assert mask.share == mask.kept / total and mask.total == total
    assert {index.dtype for index in mask.indices.values()} == {torch.int64}


@settings(max_examples=40, deadline=None)
@given(score_dicts(st.sampled_from([0.0, 1.0, -1.0, 2.0])), st.floats(0.001, 1), ORDERS, SCOPES)
def test_rows_are_ranked_by_their_mean(scores, share, order, scope):
    means = {
        name: score.reshape(score.shape[0] if score.ndim > 1 else 1, -1).mean(dim=1)
        for name, score in scores.items()
    }
    mask = select_neurons(scores, share, order=order, scope=scope, granularity="row")
    rows = slow_choice(means, share, order, scope)
    assert mask.granularity == "row"
    for name in scores:
        dense = mask.dense(name).reshape(len(means[name]), -1)
        assert dense.all(dim=1).nonzero().flatten().tolist() == rows[name]
        assert torch.equal(dense.all(dim=1), dense.any(dim=1))


def test_random_masks_are_reproducible_uniform_and_overlap_by_chance():
    scores = {"a": torch.zeros(4000), "b": torch.zeros(100, 60)}
    masks = [select_neurons(scores, 0.2, order="random", seed=seed) for seed in range(12)]
    assert lists(masks[5]) == lists(select_neurons(scores, 0.2, order="random", seed=5))
    assert masks[5].kept == 2000
    overlaps = [a.overlap(b) for i, a in enumerate(masks) for b in masks[:i]]
    # Of n entries, s^2 n are in both and (2 s - s^2) n in either.
    assert chance_overlap(0.2) == pytest.approx(0.2**2 / (2 * 0.2 - 0.2**2))
    assert sum(overlaps) / len(overlaps) == pytest.approx(chance_overlap(0.2), abs=0.003)
    kept_in_a = sum(mask.indices["a"].numel() for mask in masks) / len(masks)
    assert kept_in_a == pytest.approx(0.2 * 4000, abs=30)  # 5 standard errors


@settings(max_examples=40, deadline=None)
@given(score_dicts(st.sampled_from([0.0, -0.0, 1.0, 2.0])), st.floats(0.01, 1))
def test_count_ties(scores, share):
    mask = select_neurons(scores, share)
    flat = {name: score.flatten().tolist() for name, score in scores.items()}
    kept = [flat[name][i] for name, index in mask.indices.items() for i in index.tolist()]
    every = [value for values in flat.values() for value in values]
    assert count_ties(scores, mask) == {
        "zeros": every.count(0.0),
        "tied": every.count(min(kept)),
        "tied_kept": kept.count(min(kept)),
    }


W = {"w": torch.rand(4)}


@pytest.mark.parametrize(("scores", "change", "told"), [
    *((W, {"share": share}, f"share is {share!r}, expected 0 < share <= 1")
      for share in (0, -0.1, 1.0001, NAN, INF, True, None, "0.1")),
    *((W, {word: "most"}, f"{word} is 'most', expected")
      for word in ("order", "scope", "granularity")),
    ({}, {}, "no scores"),
    ({"w": torch.zeros(0)}, {}, "no scores"),
    (W | {"bad": torch.tensor([[1.0, NAN]])}, {}, "scores of bad hold NaN"),
    (W | {"bad": torch.tensor([[1.0, NAN]])}, {"granularity": "row"}, "scores of bad hold NaN"),
])  # fmt: skip
def test_what_cannot_be_ranked_is_refused(scores, change, told):
    with refused("select_neurons", told):
        select_neurons(scores, **{"share": 0.5} | change)


# --- masks ---


@settings(max_examples=40, deadline=None)
@given(score_dicts(), st.floats(0.01, 1), st.floats(0.01, 1))
def test_overlap_is_intersection_over_union(scores, share, other_share):
    one = select_neurons(scores, share)
    two = select_neurons(scores, other_share, order="random")
    sets = [{(n, i) for n, index in m.indices.items() for i in index.tolist()} for m in (one, two)]
    expected = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    assert one.overlap(two) == two.overlap(one) == pytest.approx(expected)
    for other in ({"w": torch.rand(5)}, {"v": torch.rand(4)}, {"w": torch.rand(2, 2)}):
        with refused("different models"):
            select_neurons(W, 0.5).overlap(select_neurons(other, 0.5))


def test_check_accepts_a_model_s_own_mask_and_names_the_first_mismatch():
    model = tiny_llama()
    scores = weights_of(model)
    mask = select_neurons(scores, 0.1)
    mask.check(model)
    for other, told in (
        ({"odd.weight": torch.rand(3)} | scores, "'odd.weight', which the model lacks"),
        (scores | {UP: scores[UP].T.contiguous()}, "up_proj.weight: mask expects shape (16, 24)"),
    ):
        with refused(told):
            select_neurons(other, 0.1).check(model)
    with refused("up_proj.weight: mask indices are unsorted or reach past the tensor"):
        NeuronMask({UP: torch.tensor([0, 16 * 24])}, {UP: (24, 16)}).check(model)
    with refused("mask names 'lm_head.weight', which the model lacks: use its own mask"):
        mask.check(tiny_llama(tied=True))
    model.lm_head.weight.requires_grad_(False)
    with refused("lm_head.weight: ", "frozen"):
        mask.check(model)
    nothing_of_it = scores | {"lm_head.weight": torch.full((33, 16), -9.0)}
    select_neurons(nothing_of_it, 0.1).check(model)


def test_dense_of_an_unknown_tensor_is_refused():
    with refused("'nope'", "expected one of w"):
        select_neurons(W, 0.5).dense("nope")


# --- files ---


@pytest.mark.parametrize("granularity", ["scalar", "row"])
def test_save_and_load_give_the_mask_back(tmp_path, granularity):
    scores = random_scores() | {"scalar": torch.tensor(-9.0), "low": torch.full((3, 3), -8.0)}
    mask = select_neurons(scores, 0.1, granularity=granularity)
    mask.save(tmp_path / "mask.safetensors")
    back = NeuronMask.load(str(tmp_path / "mask.safetensors"))
    assert lists(back) == lists(mask) and list(back.indices) == list(mask.indices)
    assert back.shapes == mask.shapes and back.granularity == granularity
    assert all(index.dtype == torch.int64 for index in back.indices.values())
    assert {t.dtype for t in load_file(tmp_path / "mask.safetensors").values()} == {torch.int32}
    back.save(tmp_path / "again.safetensors")
    saved = [(tmp_path / f"{n}.safetensors").read_bytes() for n in ("mask", "again")]
    assert saved[0] == saved[1]


TWO = torch.tensor([0, 3])


@pytest.mark.parametrize(("index", "change"), [
    (TWO, {"format": 7}),
    (TWO, {"granularity": "columns"}),
    *((TWO, {"shapes": shapes}) for shapes in (
        [1], {"w": 4}, {"w": ["4"]}, {"w": [-4]}, {"w": [True, 4]}, {"v": [4]},
        {"w": [4], "v": [4]},
    )),
    *((torch.tensor(places), {}) for places in (
        [0, 4], [-1, 3], [3, 0], [1, 1], [2**31 - 1, -(2**31), 3], [[0, 3]], 3, [0.0, 3.0],
    )),
    (TWO[:0], {}),
    (TWO, {"whole": ""}),
    (TWO, {"whole": "[" * 100_000}),
])  # fmt: skip
def test_a_file_that_is_no_mask_is_refused_and_left_alone(tmp_path, index, change):
    path = tmp_path / "mask.safetensors"
    header = {"format": 1, "granularity": "scalar", "shapes": {"w": [4]}}
    save_file({"w": TWO}, path, metadata={"allo_neuron_mask": json.dumps(header)})
    assert NeuronMask.load(path).kept == 2  # the file that the cases depart from
    text = change.get("whole", json.dumps(header | change))
    save_file({"w": index}, path, metadata={"allo_neuron_mask": text})
    before = path.read_bytes()
    with refused("mask.safetensors is not a readable mask file (", "make it again"):
        NeuronMask.load(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("read", [NeuronMask.load, weights.read_tensors])
def test_damaged_and_missing_files_are_refused(tmp_path, read):
    path = tmp_path / "some.safetensors"
    select_neurons({"w": torch.rand(40)}, 0.5).save(path)
    content = path.read_bytes()
    for raw in (b"", content[:8], content[:60], content[:-1], b"\x80\x04cos\nsystem\n."):
        path.write_bytes(raw)
        with refused("some.safetensors is not a readable", "make it"):
            read(path)
    for path in (tmp_path, tmp_path / "none", "a\x00b", ""):
        with refused("is not a readable"):
            read(path)
    save_file({"w": torch.rand(4)}, tmp_path / "weights")  # of a model
    with refused("not a readable mask file"):
        NeuronMask.load(tmp_path / "weights")


@pytest.mark.parametrize(("change", "told"), [
    ({UP: None}, f"weights and model differ: '{UP}' is in only one"),
    ({UP: torch.ones(16, 24)}, "up_proj.weight have shape (16, 24), the model"),
    ({"lm_head.weight": torch.ones(34, 16)}, "lm_head.weight have shape (34, 16), the model has"),
])  # fmt: skip
def test_weights_of_another_model_change_nothing(change, told):
    model = tiny_llama()
    before = weights_of(model)
    other = {name: value + 1 for name, value in before.items()} | change
    with refused(told):
        weights.restore(model, {name: value for name, value in other.items() if value is not None})
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])


# --- delta scores ---


def test_delta_scores_are_moves_over_the_rate_in_float32():
    before = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "v": torch.tensor([256.0]).bfloat16()}
    after = {"w": torch.tensor([[1.5, 2.0], [2.0, 4.25]]), "v": torch.tensor([-1.0]).bfloat16()}
    scores = delta_scores(before, after, lr=0.5)
    assert scores["w"].tolist() == [[1.0, 0.0], [2.0, 0.5]]
    assert scores["v"].tolist() == [514.0] and scores["v"].dtype == torch.float32  # 512 in bf16
    assert delta_scores(before, after)["v"].tolist() == [257.0]
    assert before["w"].tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(("before", "after", "lr", "told"), [
    ({"w": [1.0]}, {"w": [1.0]}, 0.0, "lr is 0"),
    ({"w": [1.0]}, {"w": [1.0]}, NAN, "lr is nan"),
    ({"w": [1.0]}, {"w": [1.0, 2.0]}, 1.0, "w is (1,) and (2,); expected equal"),
    ({"w": [1.0]}, {"w": [1.0], "v": [1.0]}, 1.0, "v is missing and (1,); expected equal"),
    ({"w": [1.0]}, {"w": [NAN]}, 1.0, "w holds NaN"),
    ({"w": [INF]}, {"w": [INF]}, 1.0, "w holds NaN or infinity"),
])  # fmt: skip
def test_delta_scores_refuse(before, after, lr, told):
    one, two = ({name: torch.tensor(v) for name, v in d.items()} for d in (before, after))
    with refused("delta_scores", told):
        delta_scores(one, two, lr)
