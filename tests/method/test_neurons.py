"""Scores and masks against sorting in plain Python."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama, weights_of

from allo_lib.errors import AlloError
from allo_lib.method import neurons
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


@st.composite
def score_dicts(draw, values=TIED | ANY):
    scores = {}
    for number, shape in enumerate(draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))):
        size = math.prod(shape)
        flat = draw(st.lists(values, min_size=size, max_size=size))
        scores[f"layer{number}"] = torch.tensor(flat, dtype=torch.float32).reshape(shape)
    return scores


def slow_choice(scores, share, order="top"):
    """Sorted by score, then by place: the documented rule, in plain Python."""
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


def random_scores(seed=0, sizes=((40, 30), (200,), (8, 5, 5))):
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(size, generator=generator) for i, size in enumerate(sizes)}


# --- selection ---


@settings(max_examples=100, deadline=None)
@given(score_dicts(), st.floats(0.001, 1), st.sampled_from(["top", "bottom"]))
def test_selection_is_that_of_a_stable_sort(scores, share, order):
    assert lists(select_neurons(scores, share, order=order)) == slow_choice(scores, share, order)


@settings(max_examples=40, deadline=None)
@given(score_dicts(), st.floats(0.001, 1), st.sampled_from(["top", "bottom"]))
def test_scope_tensor_selects_within_each_tensor(scores, share, order):
    mask = select_neurons(scores, share, order=order, scope="tensor")
    for name, score in scores.items():
        assert mask.indices[name].tolist() == slow_choice({name: score}, share, order)[name]


@settings(max_examples=40, deadline=None)
@given(
    score_dicts(st.sampled_from([0.0, 1.0, -1.0, 2.0])),
    st.floats(0.001, 1),
    st.sampled_from(["top", "bottom"]),
    st.sampled_from(["global", "tensor"]),
)
def test_rows_are_ranked_by_their_mean(scores, share, order, scope):
    means = {
        name: score.reshape(score.shape[0] if score.ndim > 1 else 1, -1).mean(dim=1)
        for name, score in scores.items()
    }
    mask = select_neurons(scores, share, order=order, scope=scope, granularity="row")
    if scope == "global":
        rows = slow_choice(means, share, order)
    else:
        rows = {name: slow_choice({name: mean}, share, order)[name] for name, mean in means.items()}
    assert mask.granularity == "row"
    for name, score in scores.items():
        dense = mask.dense(name).reshape(len(means[name]), -1)
        assert dense.shape[1] * dense.shape[0] == score.numel()
        assert dense.all(dim=1).nonzero().flatten().tolist() == rows[name]
        assert torch.equal(dense.all(dim=1), dense.any(dim=1))


@pytest.mark.parametrize("share", [k / 1000 for k in range(1, 1001, 37)] + [0.1, 0.25, 0.5, 1, 1.0])
@pytest.mark.parametrize("order", ["top", "bottom", "random"])
def test_counts_are_exact_even_when_nearly_all_scores_tie(share, order):
    scores = {
        "zeros": torch.zeros(50, 13),
        "few": torch.randint(0, 3, (301,), generator=torch.Generator().manual_seed(0)).float(),
        "same": torch.full((7, 9), 2.0),
    }
    total = 50 * 13 + 301 + 63
    mask = select_neurons(scores, share, order=order)
    assert mask.total == total
    assert mask.kept == max(1, round(share * total))
    assert mask.share == mask.kept / total
    for name, index in mask.indices.items():
        assert index.dtype == torch.int64 and bool((index.diff() > 0).all())
        assert int(mask.dense(name).sum()) == len(index)
        assert mask.dense(name).shape == scores[name].shape


def test_large_tensors_are_handled_in_chunks_without_a_seam(monkeypatch):
    monkeypatch.setattr(neurons, "_CHUNK", 7)
    scores = random_scores(sizes=((4, 9), (7,), (15,)))
    for share in (0.02, 0.1, 0.5):
        assert lists(select_neurons(scores, share)) == slow_choice(scores, share)


def test_scores_of_other_dtypes_are_compared_as_float32():
    scores = {name: score.bfloat16() for name, score in random_scores().items()}
    as_float = {name: score.float() for name, score in scores.items()}
    assert lists(select_neurons(scores, 0.1)) == lists(select_neurons(as_float, 0.1))


def test_selection_leaves_the_scores_alone():
    scores = random_scores()
    copies = {name: score.clone() for name, score in scores.items()}
    for granularity in ("scalar", "row"):
        for order in ("top", "bottom", "random"):
            select_neurons(scores, 0.3, order=order, granularity=granularity)
    assert all(torch.equal(scores[name], copies[name]) for name in scores)


# --- random masks ---


def test_random_masks_are_reproducible_and_differ_by_seed():
    scores = random_scores()
    first, again = (select_neurons(scores, 0.1, order="random", seed=5) for _ in range(2))
    other = select_neurons(scores, 0.1, order="random", seed=6)
    assert lists(first) == lists(again) != lists(other)


def test_random_masks_are_uniform_and_overlap_by_chance():
    scores = {"a": torch.zeros(4000), "b": torch.zeros(100, 60)}
    masks = [select_neurons(scores, 0.2, order="random", seed=seed) for seed in range(12)]
    overlaps = [a.overlap(b) for i, a in enumerate(masks) for b in masks[:i]]
    assert sum(overlaps) / len(overlaps) == pytest.approx(chance_overlap(0.2), abs=0.003)
    kept_in_a = sum(mask.indices["a"].numel() for mask in masks) / len(masks)
    assert kept_in_a == pytest.approx(0.2 * 4000, abs=30)  # 5 standard errors


def test_chance_overlap():
    # Of n entries, s^2 n are in both and (2 s - s^2) n in either.
    for share in (0.05, 0.1, 0.5, 1.0):
        assert chance_overlap(share) == pytest.approx(share**2 / (2 * share - share**2))
    assert chance_overlap(0.1) == pytest.approx(0.0526, abs=1e-4)


# --- masks ---


@settings(max_examples=40, deadline=None)
@given(score_dicts(), st.floats(0.01, 1), st.floats(0.01, 1))
def test_overlap_is_intersection_over_union(scores, share, other_share):
    one = select_neurons(scores, share)
    two = select_neurons(scores, other_share, order="random")
    sets = [{(n, i) for n, index in m.indices.items() for i in index.tolist()} for m in (one, two)]
    expected = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    assert one.overlap(two) == two.overlap(one) == pytest.approx(expected)
    assert one.overlap(one) == 1


def test_overlap_of_different_models_is_refused():
    one = select_neurons({"w": torch.rand(4)}, 0.5)
    for other in ({"w": torch.rand(5)}, {"v": torch.rand(4)}, {"w": torch.rand(2, 2)}):
        with pytest.raises(AlloError, match="different models"):
            one.overlap(select_neurons(other, 0.5))


def test_dense_of_an_unknown_tensor_is_refused():
    with pytest.raises(AlloError, match="'nope'.*expected one of w"):
        select_neurons({"w": torch.rand(4)}, 0.5).dense("nope")


@pytest.mark.parametrize("granularity", ["scalar", "row"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_save_and_load_give_the_mask_back(tmp_path, granularity, scope):
    scores = random_scores() | {"scalar": torch.tensor(-9.0), "low": torch.full((3, 3), -8.0)}
    mask = select_neurons(scores, 0.1, granularity=granularity, scope=scope)
    mask.save(tmp_path / "mask.safetensors")
    back = NeuronMask.load(str(tmp_path / "mask.safetensors"))
    assert lists(back) == lists(mask) and list(back.indices) == list(mask.indices)
    assert back.shapes == mask.shapes and back.granularity == granularity
    assert all(index.dtype == torch.int64 for index in back.indices.values())
    assert back.overlap(mask) == 1
    assert {t.dtype for t in load_file(tmp_path / "mask.safetensors").values()} == {torch.int32}
    back.save(tmp_path / "again.safetensors")
    saved = [(tmp_path / f"{n}.safetensors").read_bytes() for n in ("mask", "again")]
    assert saved[0] == saved[1]


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "mask.safetensors"
    select_neurons({"w": torch.rand(40)}, 0.5).save(path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(AlloError, match="mask"):
            NeuronMask.load(path)


def craft(path, tensors, **header):
    full = {"format": 1, "granularity": "scalar", "shapes": {"w": [4]}} | header
    text = json.dumps({key: value for key, value in full.items() if value is not None})
    save_file(tensors, str(path), metadata={"allo_neuron_mask": text})


@pytest.mark.parametrize(
    ("tensors", "header"),
    [
        ({"w": torch.tensor([0, 3])}, {"format": None}),
        ({"w": torch.tensor([0, 3])}, {"format": 2}),
        ({"w": torch.tensor([0, 3])}, {"shapes": None}),
        ({"w": torch.tensor([0, 3])}, {"shapes": {"w": [-4]}}),
        ({"w": torch.tensor([0, 3])}, {"shapes": [1]}),
        ({"w": torch.tensor([0, 3])}, {"shapes": {"w": 4}}),
        ({"w": torch.tensor([0, 3])}, {"shapes": {"w": ["4"]}}),
        ({"w": torch.tensor([0, 3])}, {"shapes": {"v": [4]}}),
        ({"w": torch.tensor([0, 3])}, {"granularity": "columns"}),
        ({"w": torch.tensor([0, 4])}, {}),
        ({"w": torch.tensor([-1, 3])}, {}),
        ({"w": torch.tensor([3, 0])}, {}),
        ({"w": torch.tensor([1, 1])}, {}),
        ({"w": torch.tensor([[0, 3]])}, {}),
        ({"w": torch.tensor(3)}, {}),
        ({"w": torch.tensor([0.0, 3.0])}, {}),
    ],
)
def test_wrong_files_are_refused(tmp_path, tensors, header):
    path = tmp_path / "mask.safetensors"
    craft(path, {"w": torch.tensor([0, 3])})
    assert NeuronMask.load(path).kept == 2  # the pattern that the cases depart from
    craft(path, tensors, **header)
    with pytest.raises(AlloError, match="mask.safetensors"):
        NeuronMask.load(path)


def test_check_accepts_a_model_s_own_mask_and_names_the_first_mismatch():
    model = tiny_llama()
    scores = weights_of(model)
    mask = select_neurons(scores, 0.1)
    mask.check(model)
    name = "model.layers.0.mlp.up_proj.weight"
    odd = {"odd.weight": torch.rand(3)} | scores
    with pytest.raises(AlloError, match="'odd.weight', which the model lacks"):
        select_neurons(odd, 0.1).check(model)
    turned = scores | {name: scores[name].T.contiguous()}
    with pytest.raises(AlloError, match=r"up_proj.weight: mask expects shape \(16, 24\)"):
        select_neurons(turned, 0.1).check(model)
    past = NeuronMask({name: torch.tensor([0, 16 * 24])}, {name: (24, 16)})
    with pytest.raises(AlloError, match="up_proj.weight: mask indices reach 384"):
        past.check(model)
    model.get_parameter(name).requires_grad_(False)
    with pytest.raises(AlloError, match="up_proj.weight.*frozen"):
        mask.check(model)


def test_check_lets_frozen_parameters_be_when_nothing_of_them_is_kept():
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    scores = weights_of(model) | {"lm_head.weight": torch.full((33, 16), -9.0)}
    select_neurons(scores, 0.1).check(model)


# --- delta scores ---


def test_delta_scores():
    before = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "v": torch.tensor([0.5])}
    after = {"w": torch.tensor([[1.5, 2.0], [2.0, 4.25]]), "v": torch.tensor([-0.5])}
    copies = [{n: t.clone() for n, t in d.items()} for d in (before, after)]
    scores = delta_scores(before, after, lr=0.5)
    assert scores["w"].tolist() == [[1.0, 0.0], [2.0, 0.5]] and scores["v"].tolist() == [2.0]
    assert delta_scores(before, after)["v"].tolist() == [1.0]
    for now, copy in zip((before, after), copies, strict=True):
        assert all(torch.equal(now[n], copy[n]) for n in now)


def test_delta_scores_of_bf16_weights_are_taken_in_float32():
    before, after = torch.tensor([256.0]).bfloat16(), torch.tensor([-1.0]).bfloat16()
    scores = delta_scores({"w": before}, {"w": after})
    assert scores["w"].dtype == torch.float32 and scores["w"].item() == 257.0  # 256 in bf16


@pytest.mark.parametrize(
    ("before", "after", "lr", "told"),
    [
        ([1.0], [1.0], 0.0, "lr is 0"),
        ([1.0], [1.0], -1.0, "lr is -1"),
        ([1.0], [1.0], NAN, "lr is nan"),
        ([1.0], [1.0, 2.0], 1.0, r"w has shape \(1,\) before"),
        ([1.0], [NAN], 1.0, "w holds NaN"),
        ([INF], [1.0], 1.0, "w holds NaN or infinity"),
        ([INF], [INF], 1.0, "w holds NaN or infinity"),
    ],
)
def test_delta_scores_refuse(before, after, lr, told):
    with pytest.raises(AlloError, match=told):
        delta_scores({"w": torch.tensor(before)}, {"w": torch.tensor(after)}, lr)


def test_delta_scores_refuse_other_names():
    one, two = {"w": torch.ones(1)}, {"w": torch.ones(1), "v": torch.ones(1)}
    for before, after in ((one, two), (two, one)):
        with pytest.raises(AlloError, match="'v' is in only one"):
            delta_scores(before, after)


# --- ties, bad input ---


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


@pytest.mark.parametrize("share", [0, 0.0, -0.1, 1.0001, 10, NAN, INF, True, None, "0.1"])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(AlloError, match="share is .* expected 0 < share <= 1"):
        select_neurons({"w": torch.rand(4)}, share)


@pytest.mark.parametrize("word", ["order", "scope", "granularity"])
def test_unknown_words_are_refused(word):
    with pytest.raises(AlloError, match=f"{word} is 'largest', expected "):
        select_neurons({"w": torch.rand(4)}, 0.5, **{word: "largest"})


@pytest.mark.parametrize("scores", [{}, {"w": torch.zeros(0)}])
def test_missing_scores_are_refused(scores):
    with pytest.raises(AlloError, match="no scores"):
        select_neurons(scores, 0.5)


@pytest.mark.parametrize("order", ["top", "bottom"])
@pytest.mark.parametrize("granularity", ["scalar", "row"])
def test_nan_scores_are_refused(order, granularity):
    scores = {"fine": torch.rand(4), "bad": torch.tensor([[1.0, NAN]])}
    with pytest.raises(AlloError, match="scores of bad hold NaN"):
        select_neurons(scores, 0.5, order=order, granularity=granularity)
