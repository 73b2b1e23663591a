"""Log-probs by chunks equal log_softmax and gather, in value and in every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_lib.engine import head


def plain(hidden, weight, bias, targets):
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]


def run(function, parts, targets, gradient):
    leaves = [None if part is None else part.clone().requires_grad_() for part in parts]
    values = function(*leaves, targets)
    values.backward(gradient)
    return values.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


@settings(deadline=None)
@given(
    st.integers(0, 30), st.integers(1, 40), st.booleans(), st.integers(1, 7), st.integers(0, 999)
)
def test_equal_to_the_plain_way(count, vocabulary, has_bias, rows_a_chunk, seed):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(count, 6), torch.randn(vocabulary, 6)
    bias = torch.randn(vocabulary) if has_bias else None
    targets = torch.randint(vocabulary, (count,))
    gradient = torch.randn(count) * (torch.rand(count) < 0.6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CHUNK_BYTES", 4 * vocabulary * rows_a_chunk)
        values, ours = run(head.target_logps, (hidden, weight, bias), targets, gradient)
    expected, theirs = run(plain, (hidden, weight, bias), targets, gradient)
    assert torch.allclose(values, expected, atol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other, atol=1e-5)


def test_numerical_gradient():
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    targets = torch.tensor([1, 4, 0])
    by_hidden = torch.autograd.functional.jacobian(
        lambda h: head.target_logps(h, weight, None, targets).sum(), hidden
    )
    step = 1e-2
    for i in range(3):
        for j in range(4):
            moved = torch.zeros_like(hidden)
            moved[i, j] = step
            up = plain(hidden + moved, weight, None, targets).sum()
            down = plain(hidden - moved, weight, None, targets).sum()
            assert by_hidden[i, j] == pytest.approx(float(up - down) / (2 * step), abs=1e-3)


def test_bf16_weights_give_float32_values_and_gradients_in_their_own_dtype():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(9, 8).bfloat16(), torch.randn(50, 8).bfloat16())
    targets = torch.randint(50, (9,))
    values, (by_hidden, by_weight) = run(
        lambda h, w, t: head.target_logps(h, w, None, t), (hidden, weight), targets, torch.ones(9)
    )
    expected, (like_hidden, like_weight) = run(
        lambda h, w, t: plain(h, w, None, t), (hidden, weight), targets, torch.ones(9)
    )
    assert values.dtype == torch.float32 and torch.allclose(values, expected, atol=1e-5)
    assert by_hidden.dtype == by_weight.dtype == torch.bfloat16
    assert torch.allclose(by_hidden.float(), like_hidden.float(), atol=0.03, rtol=0.03)
    assert torch.allclose(by_weight.float(), like_weight.float(), atol=0.03, rtol=0.03)


def test_positions_without_a_gradient_make_no_logits_again(monkeypatch):
    made = []
    inner = head._logits
    monkeypatch.setattr(head, "_logits", lambda h, w, b: made.append(len(h)) or inner(h, w, b))
    hidden = torch.randn(10, 4, requires_grad=True)
    values = head.target_logps(hidden, torch.randn(7, 4), None, torch.arange(10) % 7)
    values[[2, 5]].sum().backward()
    assert made == [10, 2]
    assert hidden.grad.abs().sum(dim=1).nonzero()[:, 0].tolist() == [2, 5]


def test_no_tensor_of_tokens_times_vocabulary_outlives_a_chunk(monkeypatch):
    """Counted over everything autograd keeps for backward."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 100 * 3)
    kept, chunks = [], []
    inner = head._logits
    monkeypatch.setattr(head, "_logits", lambda *a: chunks.append(inner(*a)) or chunks[-1])
    hidden = torch.randn(20, 4, requires_grad=True)
    weight = torch.randn(100, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        head.target_logps(hidden, weight, None, torch.arange(20)).sum().backward()
    assert max(kept) <= weight.numel() and max(c.numel() for c in chunks) <= 3 * 100
