"""Products of float32 matrices by oneDNN: right ones, and torch's own for all other numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_lib.machine import arithmetic

pytestmark = pytest.mark.skipif(
    arithmetic.same_on_every_x86() is None, reason="another CPU than x86, or torch without oneDNN"
)
sizes = st.sampled_from([0, 1, 2, 7, 64, 210])


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, sizes, st.sampled_from("NT"), st.sampled_from("NT"), st.integers(0, 9))
def test_float32_products_and_their_gradients_are_right(m, k, n, first, second, seed):
    """Of matrices as they are stored and transposed, also without rows or columns."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, columns, form):
        shape = (rows, columns) if form == "N" else (columns, rows)
        made = torch.randn(shape, generator=generator)
        return (made if form == "N" else made.t()).requires_grad_()

    a, b = matrix(m, k, first), matrix(k, n, second)
    weight = torch.randn(m, n, generator=generator)
    exact = [one.detach().double().requires_grad_() for one in (a, b)]
    found = (a @ b, *torch.autograd.grad((a @ b * weight).sum(), (a, b)))
    product = exact[0] @ exact[1]
    right = (product, *torch.autograd.grad((product * weight).sum(), exact))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_they_are_those_of_onednn():
    a, b = torch.randn(1304, 384), torch.randn(384, 128)
    by_onednn = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    assert torch.equal(a @ b, by_onednn)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.complex64])
def test_other_numbers_are_multiplied_as_before(dtype):
    a, b = (torch.arange(-4, 5).reshape(3, 3).to(dtype) for _ in range(2))
    expected = [[15, 6, -3], [6, 6, 6], [-3, 6, 15]]
    assert (a @ b).dtype is dtype and torch.equal(a @ b, torch.tensor(expected).to(dtype))


def test_shapes_and_dtypes_that_do_not_fit_are_torchs_own_errors():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torch.ones(2, 3) @ torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="dtype"):
        torch.ones(2, 3) @ torch.ones(3, 2, dtype=torch.float64)
