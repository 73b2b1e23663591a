"""Token weights and key tokens against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_lib.errors import AlloError
from allo_lib.method.tokens import RULES, key_tokens, unaligned_weights

NAN, INF = float("nan"), float("inf")


def slow_key_tokens(ratio, mask, share):
    chosen = [[False] * len(row) for row in mask]
    for b, row in enumerate(mask):
        inside = [t for t, is_response in enumerate(row) if is_response]
        if inside:
            count = max(1, round(share * len(inside)))
            for t in sorted(inside, key=lambda t: (ratio[b][t], t))[:count]:
                chosen[b][t] = True
    return chosen


@st.composite
def responses(draw):
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    value = st.sampled_from([0.0, -0.0, -1.0, 1.0, INF, -INF]) | st.floats(-9, 9, width=32)
    table = st.lists(value, min_size=length, max_size=length)
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    return (
        draw(st.lists(table, min_size=rows, max_size=rows)),
        draw(st.lists(flags, min_size=rows, max_size=rows)),
    )


@settings(max_examples=200, deadline=None)
@given(responses(), st.floats(0.001, 1))
def test_key_tokens_are_the_lowest_of_each_response(response, share):
    ratio, mask = response
    keys = key_tokens(torch.tensor(ratio), torch.tensor(mask), share)
    assert keys.dtype == torch.bool and keys.tolist() == slow_key_tokens(ratio, mask, share)


@settings(max_examples=60, deadline=None)
@given(responses(), st.floats(0.001, 1), st.integers(0, 5), st.integers(0, 5))
def test_key_tokens_do_not_see_prompt_or_padding(response, share, prompt, padding):
    ratio, mask = torch.tensor(response[0]), torch.tensor(response[1])
    bare = key_tokens(ratio, mask, share)
    outside = torch.where(mask, ratio, -1e30)  # would win every place if it were looked at
    outside[(~mask) & (torch.rand(mask.shape) < 0.5)] = NAN
    wide_ratio = torch.nn.functional.pad(outside, (prompt, padding), value=-INF)
    wide_mask = torch.nn.functional.pad(mask, (prompt, padding), value=False)
    wide = key_tokens(wide_ratio, wide_mask, share)
    assert torch.equal(wide[:, prompt : prompt + ratio.shape[1]], bare)
    assert not wide[~wide_mask].any()


def test_number_of_key_tokens_is_that_of_python_s_round():
    lengths = [1, 2, 3, 5, 10, 25, 50, 75, 150, 175, 190]  # halves, and shares with no exact float
    mask = torch.arange(200) < torch.tensor(lengths).unsqueeze(1)
    ratio = torch.randn(len(lengths), 200, generator=torch.Generator().manual_seed(0))
    for percent in range(1, 101):
        share = percent / 100
        counts = key_tokens(ratio, mask, share).sum(dim=1).tolist()
        assert counts == [max(1, round(share * length)) for length in lengths]


def test_key_tokens_take_other_dtypes_and_carry_no_gradient():
    ratio = torch.tensor([[3.0, -2.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    keys = key_tokens(ratio, torch.tensor([[1, 1, 1]]), 0.3)
    assert keys.tolist() == [[False, True, False]] and not keys.requires_grad


@settings(max_examples=100, deadline=None)
@given(responses(), st.floats(0, 1), st.sampled_from(RULES))
def test_unaligned_weights(response, threshold, rule):
    ratio, mask = torch.tensor(response[0]), torch.tensor(response[1])
    probs = ratio.exp().clamp(max=1)
    probs[~mask] = NAN  # never read
    weights = unaligned_weights(probs, mask, rule, threshold)
    assert weights.dtype == torch.float32
    for b in range(len(mask)):
        for t in range(mask.shape[1]):
            p = probs[b, t].item()
            below = torch.tensor(p) < threshold  # compared in the float32 of the probabilities
            expected = {"threshold": float(below), "soft": 1 - p, "released": p}[rule]
            expected = expected if mask[b, t] else 0.0
            assert weights[b, t].item() == pytest.approx(expected, abs=1e-6)


def test_the_default_rule_is_the_threshold_of_one_half():
    probs = torch.tensor([[0.49, 0.5, 0.51, 0.0, 1.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    assert unaligned_weights(probs, mask).tolist() == [[1.0, 0.0, 0.0, 1.0, 0.0]]


ONES = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((torch.zeros(2, 3), ONES, "hard"), "rule is 'hard', expected threshold"),
        ((torch.zeros(2, 3), ONES, "threshold", 1.5), "threshold is 1.5"),
        ((torch.zeros(2, 3), ONES, "threshold", NAN), "threshold is nan"),
        ((torch.zeros(2, 4), ONES), "shapes"),
        ((torch.zeros(3), torch.ones(3)), "shapes"),
        ((torch.full((2, 3), NAN), ONES), "NaN"),
        ((torch.full((2, 3), 1.01), ONES), r"outside \[0, 1\]"),
        ((torch.full((2, 3), -0.01), ONES), r"outside \[0, 1\]"),
    ],
)
def test_unaligned_weights_refuse(arguments, told):
    with pytest.raises(AlloError, match=f"unaligned_weights.*{told}"):
        unaligned_weights(*arguments)


@pytest.mark.parametrize(
    ("ratio", "mask", "share", "told"),
    [
        (torch.zeros(2, 3), ONES, 0.0, "share is 0"),
        (torch.zeros(2, 3), ONES, 1.01, "share is 1.01"),
        (torch.zeros(2, 3), ONES, -0.2, "share is -0.2"),
        (torch.zeros(2, 3), ONES, NAN, "share is nan"),
        (torch.zeros(3, 2), ONES, 0.5, "shapes"),
        (torch.zeros(3), torch.ones(3), 0.5, "shapes"),
        (torch.full((2, 3), NAN), ONES, 0.5, "NaN"),
    ],
)
def test_key_tokens_refuse(ratio, mask, share, told):
    with pytest.raises(AlloError, match=f"key_tokens.*{told}"):
        key_tokens(ratio, mask, share)
