"""Operations are counted as the textbook counts them, and rows save what they must."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from allo_lib.method.row_linear import RowLinear
from allo_lib.study import timed_steps


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(2, 8), st.integers(2, 8), st.data())
def test_a_layer_costs_three_products_and_fewer_when_rows_are_kept(batch, inputs, outputs, data):
    kept = data.draw(st.integers(1, outputs))
    layer = nn.Linear(inputs, outputs, bias=False)
    x = torch.randn(batch, inputs, requires_grad=True)
    with timed_steps.counter() as dense:
        layer(x).sum().backward()
    # y = x W', dx = dy W, dW = dy' x: each 2 * batch * inputs * outputs.
    assert dense.get_total_flops() == 3 * 2 * batch * inputs * outputs
    rows = torch.arange(kept)
    masters = nn.Parameter(layer.weight.detach()[rows].flatten())
    layer.weight.requires_grad_(False)
    layer.forward = row_forward(layer, rows, masters)
    with timed_steps.counter() as sparse:
        layer(x).sum().backward()
    taken.detach()
    assert sparse.get_total_flops() == 2 * batch * inputs * (2 * outputs + kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_is_that_of_a_product_and_leaves_random_numbers_alone(dtype):
    state = torch.random.get_rng_state()
    rate = timed_steps.matrix_rate(dtype)
    assert 1e8 < rate < 1e15
    assert torch.equal(state, torch.random.get_rng_state())
