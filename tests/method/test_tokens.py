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


@settings(max_examples=150, deadline=None)
@given(responses(), st.floats(0.001, 1), st.integers(0, 3), st.integers(0, 3))
def test_key_tokens_are_the_lowest_of_each_response_and_see_nothing_else(
    response, share, prompt, padding
):
    ratio, mask = torch.tensor(response[0]), torch.tensor(response[1])
    expected = slow_key_tokens(*response, share)
    outside = torch.where(mask, ratio, -1e30)  # would win every place if it were looked at
    outside[(~mask) & (torch.rand(mask.shape) < 0.5)] = NAN
    wide_ratio = torch.nn.functional.pad(outside, (prompt, padding), value=-INF)
    wide_mask = torch.nn.functional.pad(mask, (prompt, padding), value=False)
    wide = key_tokens(wide_ratio, wide_mask, share)
    assert wide.dtype == torch.bool
    assert wide[:, prompt : prompt + ratio.shape[1]].tolist() == expected
    assert not wide[~wide_mask].any()


def test_number_of_key_tokens_is_that_of_python_s_round():
    lengths = [1, 2, 3, 5, 10, 25, 50, 75, 150, 175, 190]  # halves, and shares with no exact float
    mask = torch.arange(200) < torch.tensor(lengths).unsqueeze(1)
    ratio = torch.randn(len(lengths), 200, generator=torch.Generator().manual_seed(0))
    for percent in range(1, 101):
        counts = key_tokens(ratio, mask, percent / 100).sum(dim=1).tolist()
        assert counts == [max(1, round(percent / 100 * length)) for length in lengths]


@settings(max_examples=100, deadline=None)
@given(responses(), st.floats(0, 1), st.sampled_from(RULES))
def test_unaligned_weights(response, threshold, rule):
    ratio, mask = torch.tensor(response[0]), torch.tensor(response[1])
    probs = ratio.exp().clamp(max=1)
    probs[~mask] = NAN  # never read
    weights = unaligned_weights(probs, mask, rule, threshold)
    assert weights.dtype == torch.float32
    values = (tensor.flatten().tolist() for tensor in (probs, mask, weights))
    for p, inside, weight in zip(*values, strict=True):
        below = torch.tensor(p) < threshold  # compared in the float32 of the probabilities
        expected = {"threshold": float(below), "soft": 1 - p, "released": p}[rule]
        assert weight == pytest.approx(expected if inside else 0.0, abs=1e-6)


def test_the_default_rule_is_the_threshold_of_one_half():
    probs = torch.tensor([[0.49, 0.5, 0.51, 0.0, 1.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    assert unaligned_weights(probs, mask).tolist() == [[1.0, 0.0, 0.0, 1.0, 0.0]]


ZEROS, ONES = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(("function", "arguments", "told"), [
    (unaligned_weights, (ZEROS, ONES, "hard"), "rule is 'hard', expected threshold"),
    (unaligned_weights, (ZEROS, ONES, "threshold", 1.5), "threshold is 1.5"),
    (unaligned_weights, (ZEROS, ONES, "threshold", NAN), "threshold is nan"),
    (unaligned_weights, (torch.zeros(2, 4), ONES), "shapes"),
    (unaligned_weights, (torch.zeros(3), torch.ones(3)), "shapes"),
    (unaligned_weights, (ZEROS + NAN, ONES), "NaN"),
    (unaligned_weights, (ZEROS + 1.01, ONES), r"outside \[0, 1\]"),
    (unaligned_weights, (ZEROS - 0.01, ONES), r"outside \[0, 1\]"),
    (key_tokens, (ZEROS, ONES, 0.0), "share is 0"),
    (key_tokens, (ZEROS, ONES, 1.01), "share is 1.01"),
    (key_tokens, (ZEROS, ONES, NAN), "share is nan"),
    (key_tokens, (torch.zeros(3, 2), ONES, 0.5), "shapes"),
    (key_tokens, (ZEROS + NAN, ONES, 0.5), "NaN"),
])  # fmt: skip
def test_bad_arguments_are_refused(function, arguments, told):
    with pytest.raises(AlloError, match=f"{function.__name__}.*{told}"):
        function(*arguments)
