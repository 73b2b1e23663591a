"""Losses against plain-Python formulas; `test_losses_trl` sets them beside others' code."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_llama, token_batch

from allo_lib.errors import AlloError
from allo_lib.method import losses
from allo_lib.method.losses import (
    a2c_loss,
    bco_loss,
    dpo_loss,
    ipo_loss,
    npo_loss,
    ppo_loss,
    rdpo_loss,
    sequence_npo_loss,
    simpo_loss,
    supervised_loss,
    token_dpo_loss,
    token_logps,
)

NAN = float("nan")


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


def draw(*shape, seed=0, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def close(actual, expected, tolerance=1e-5):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- token_logps ---


def logps_by_hand(logits, labels):
    out = [[0.0] * labels.shape[1] for _ in range(labels.shape[0])]
    for b, row in enumerate(labels.tolist()):
        for t, label in enumerate(row):
            if t > 0 and label != -100:
                scores = logits[b, t - 1].double().tolist()
                top = max(scores)
                out[b][t] = scores[label] - top - math.log(sum(math.exp(s - top) for s in scores))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_token_logps_is_log_softmax_in_float32(dtype):
    logits = draw(3, 7, 11).to(dtype)
    labels = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))
    labels[0, :4] = -100
    labels[1, 6] = -100
    labels[2] = -100
    out = token_logps(logits, labels)
    assert out.dtype == torch.float32 and out.shape == (3, 7)
    close(out, logps_by_hand(logits, labels))


def test_token_logps_is_exactly_zero_at_the_start_and_outside_the_response():
    logits = draw(2, 5, 6)
    labels = torch.tensor([[3, -100, 2, -100, 1], [5, 4, -100, 3, -100]])
    out = token_logps(logits, labels)
    zero = (labels == -100) | (torch.arange(5) == 0)
    assert torch.equal(out == 0, zero)


def test_token_logps_has_no_gradient_outside_the_response():
    logits = draw(1, 4, 5).requires_grad_()
    token_logps(logits, torch.tensor([[-100, -100, 2, -100]])).sum().backward()
    assert (logits.grad.abs().sum(dim=-1) > 0).tolist() == [[False, True, False, False]]
    close(logits.grad[0, 1], torch.eye(5)[2] - logits.detach()[0, 1].softmax(-1))


def test_token_logps_of_single_token_rows_is_zero():
    assert token_logps(draw(2, 1, 4), torch.tensor([[1], [2]])).tolist() == [[0.0], [0.0]]


def test_token_logps_sums_to_the_model_s_own_loss():
    model = tiny_llama()
    ids, labels = token_batch()
    out = model(input_ids=ids, labels=labels)
    logps = token_logps(out.logits, labels)
    close(-logps.sum() / (labels[:, 1:] != -100).sum(), out.loss.item())


@pytest.mark.parametrize(
    ("logits", "labels", "told"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long), "expected \\[B, T, V\\]"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), "expected \\[B, T, V\\]"),
        (torch.zeros(1, 2, 4), torch.tensor([[0, 4]]), "label 4"),
        (torch.zeros(1, 2, 4), torch.tensor([[0, -1]]), "label -1"),
        (torch.full((1, 2, 4), NAN), torch.tensor([[0, 1]]), "NaN"),
    ],
)
def test_token_logps_refuses(logits, labels, told):
    with pytest.raises(AlloError, match=told):
        token_logps(logits, labels)


# --- pair losses against the formulas, loss and gradient ---


def test_dpo_loss_and_gradient():
    pc, pr, rc, rr = (draw(6, seed=s).requires_grad_() for s in range(4))
    beta = 0.3
    loss = dpo_loss(pc, pr, rc, rr, beta)
    margins = [
        a - b - (c - d) for a, b, c, d in zip(*(x.tolist() for x in (pc, rc, pr, rr)), strict=True)
    ]
    close(loss, [-log_sigmoid(beta * m) for m in margins])
    loss.sum().backward()
    close(pc.grad, [-beta * sigmoid(-beta * m) for m in margins])
    close(pr.grad, [beta * sigmoid(-beta * m) for m in margins])


def test_first_dpo_loss_of_a_model_is_ln_2():
    policy, reference = tiny_llama(), tiny_llama()
    chosen, rejected = token_batch(1), token_batch(2, length=12)

    def response_logps(model, batch):
        return token_logps(model(input_ids=batch[0]).logits, batch[1]).sum(dim=1)

    with torch.no_grad():
        ref = [response_logps(reference, batch) for batch in (chosen, rejected)]
    loss = dpo_loss(response_logps(policy, chosen), response_logps(policy, rejected), *ref)
    close(loss, [math.log(2)] * 4)
    loss.mean().backward()
    assert max(float(p.grad.abs().max()) for p in policy.parameters()) > 1e-4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-500, 500, width=32), min_size=4, max_size=4), st.floats(0.01, 2))
def test_dpo_loss_of_any_size(values, beta):
    loss = dpo_loss(*(torch.tensor([v]) for v in values), beta)
    pc, pr, rc, rr = values
    expected = -log_sigmoid(beta * ((pc - rc) - (pr - rr)))
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def masks(rows=5, length=9, seed=3):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=generator) < 0.5
    mask[:, -1] = True
    return mask


def test_token_dpo_loss_and_gradient():
    chosen, rejected = draw(5, 9).requires_grad_(), draw(5, 7, seed=1).requires_grad_()
    m_chosen, m_rejected = masks(), masks(length=7, seed=4)
    beta = 0.2
    loss = token_dpo_loss(chosen, rejected, m_chosen, m_rejected, beta)
    margins = []
    for b in range(5):
        margin = 0.0
        for t in range(9):
            margin += chosen[b, t].item() if m_chosen[b, t] else 0.0
        for t in range(7):
            margin -= rejected[b, t].item() if m_rejected[b, t] else 0.0
        margins.append(margin)
    close(loss, [-log_sigmoid(beta * m) for m in margins])
    loss.sum().backward()
    pull = torch.tensor([beta * sigmoid(-beta * m) for m in margins]).unsqueeze(1)
    close(chosen.grad, -pull * m_chosen)
    close(rejected.grad, pull * m_rejected)


def test_token_dpo_loss_with_whole_responses_is_dpo_loss():
    pc, rc = draw(5, 9, seed=1), draw(5, 9, seed=2)
    pr, rr = draw(5, 9, seed=3), draw(5, 9, seed=4)
    full = torch.ones(5, 9, dtype=torch.bool)
    whole = dpo_loss(pc.sum(1), pr.sum(1), rc.sum(1), rr.sum(1))
    close(token_dpo_loss(pc - rc, pr - rr, full, full), whole)


def test_token_dpo_loss_takes_weights_for_masks():
    ratio, weights = draw(1, 3), torch.tensor([[0.5, 0.0, 2.0]])
    loss = token_dpo_loss(ratio, torch.zeros(1, 3), weights, torch.ones(1, 3), beta=1.0)
    a, _, c = ratio[0].tolist()
    close(loss, [-log_sigmoid(0.5 * a + 2 * c)])


@pytest.mark.parametrize("binary", [True, False])
def test_npo_loss_and_gradient(binary):
    policy, ref = draw(4, 6).requires_grad_(), draw(4, 6, seed=1)
    weights = masks(4, 6).float() * (1.0 if binary else torch.rand(4, 6))
    beta = 0.4
    total, count, pull = 0.0, 0, torch.zeros(4, 6)
    for b in range(4):
        for t in range(6):
            w, delta = weights[b, t].item(), (policy[b, t] - ref[b, t]).item()
            total += w * log_sigmoid(-beta * delta)
            count += w != 0
            pull[b, t] = 2 * w * sigmoid(beta * delta)
    loss = npo_loss(policy, ref, weights, beta)
    assert loss.ndim == 0
    close(loss, -2 / beta * total / count)
    loss.backward()
    close(policy.grad, pull / count)


def test_npo_loss_before_training_is_two_ln_2_over_beta():
    logps = draw(3, 5)
    close(npo_loss(logps, logps, torch.ones(3, 5), 0.1), 2 / 0.1 * math.log(2))
    close(npo_loss(logps, logps, masks(3, 5), 0.1), 2 / 0.1 * math.log(2))  # bool weights too


def test_npo_loss_with_nothing_to_forget_is_zero():
    policy = draw(2, 4).requires_grad_()
    loss = npo_loss(policy, draw(2, 4, seed=1), torch.zeros(2, 4))
    loss.backward()
    assert loss.item() == 0 and not policy.grad.any()


def test_sequence_npo_loss():
    policy, ref = draw(5), draw(5, seed=1)
    expected = [-10 * log_sigmoid(-0.2 * delta) for delta in (policy - ref).tolist()]
    close(sequence_npo_loss(policy, ref, 0.2), expected)


LENGTHS = torch.tensor([3, 8, 5]), torch.tensor([6, 2, 5])


def test_rdpo_loss():
    pc, pr, rc, rr = (draw(3, seed=s) for s in range(4))
    beta, alpha = 0.1, 0.05
    expected = []
    for a, b, c, d, n, m in zip(*(x.tolist() for x in (pc, pr, rc, rr, *LENGTHS)), strict=True):
        expected.append(-log_sigmoid(beta * (a - c) - beta * (b - d) + alpha * n - alpha * m))
    close(rdpo_loss(pc, pr, rc, rr, *LENGTHS, beta, alpha), expected)
    close(rdpo_loss(pc, pr, rc, rr, *LENGTHS, beta, 0.0), dpo_loss(pc, pr, rc, rr, beta))


def test_rdpo_loss_is_least_at_the_policy_that_its_penalty_asks_for():
    # max E[r - alpha |y|] - beta KL gives log pi/ref = (r - alpha |y|) / beta + constant. With
    # preferences drawn as sigma(r1 - r2), the expected loss must be stationary there.
    rewards, lengths, beta, alpha = (0.7, -0.4), (9, 4), 0.1, 0.03
    optimum = [(r - alpha * n) / beta for r, n in zip(rewards, lengths, strict=True)]
    first, second = (torch.tensor([x], requires_grad=True) for x in optimum)
    zero, (n1, n2) = torch.zeros(1), (torch.tensor([n]) for n in lengths)
    preferred = sigmoid(rewards[0] - rewards[1])
    expected_loss = preferred * rdpo_loss(first, second, zero, zero, n1, n2, beta, alpha)
    expected_loss += (1 - preferred) * rdpo_loss(second, first, zero, zero, n2, n1, beta, alpha)
    expected_loss.backward()
    close(first.grad, [0.0], 1e-6)
    close(second.grad, [0.0], 1e-6)


def test_rdpo_loss_teaches_less_where_the_chosen_response_is_longer():
    def pull(longer, shorter):
        policy = torch.zeros(1, requires_grad=True)
        zero, lengths = torch.zeros(1), (torch.tensor([longer]), torch.tensor([shorter]))
        rdpo_loss(policy, zero, zero, zero, *lengths, 0.1, 0.05).sum().backward()
        return -policy.grad.item()

    assert pull(20, 5) < pull(5, 5) < pull(5, 20)


def test_ipo_loss():
    pc, pr, rc, rr = (draw(3, seed=s) for s in range(4))
    expected = []
    for a, b, c, d, n, m in zip(*(x.tolist() for x in (pc, pr, rc, rr, *LENGTHS)), strict=True):
        expected.append(((a - c) / n - (b - d) / m - 1 / 0.4) ** 2)
    close(ipo_loss(pc, pr, rc, rr, *LENGTHS, beta=0.2), expected)


@pytest.mark.parametrize("shift", [None, 0.3])
def test_bco_loss_and_gradient(shift):
    pc, pr, rc, rr = (draw(4, seed=s) for s in range(4))
    pc.requires_grad_(), pr.requires_grad_()
    beta = 0.2
    right = [beta * (a - b) for a, b in zip(pc.tolist(), rc.tolist(), strict=True)]
    wrong = [beta * (a - b) for a, b in zip(pr.tolist(), rr.tolist(), strict=True)]
    delta = (sum(right) / 4 + sum(wrong) / 4) / 2 if shift is None else shift
    loss = bco_loss(pc, pr, rc, rr, beta, shift)
    close(
        loss,
        [
            -(log_sigmoid(r - delta) + log_sigmoid(-(w - delta))) / 2
            for r, w in zip(right, wrong, strict=True)
        ],
    )
    loss.sum().backward()  # the shift is a constant to it
    close(pc.grad, [-beta / 2 * sigmoid(delta - r) for r in right])
    close(pr.grad, [beta / 2 * sigmoid(w - delta) for w in wrong])


def test_first_bco_loss_is_ln_2():
    zero = torch.zeros(3)
    close(bco_loss(zero, zero, zero, zero), [math.log(2)] * 3)


def test_bco_loss_does_not_see_what_all_rewards_share():
    """Its shift takes away what raises every response alike, as the training itself may do."""
    pc, pr, rc, rr = (draw(4, seed=s) for s in range(4))
    close(bco_loss(pc + 40, pr + 40, rc, rr), bco_loss(pc, pr, rc, rr))


def test_simpo_loss():
    pc, pr = draw(3), draw(3, seed=1)
    expected = []
    for a, b, n, m in zip(*(x.tolist() for x in (pc, pr, *LENGTHS)), strict=True):
        expected.append(-log_sigmoid(2.5 / n * a - 2.5 / m * b - 1.4))
    close(simpo_loss(pc, pr, *LENGTHS, beta=2.5, gamma=1.4), expected)


def test_ppo_loss_by_hand():
    """One token a case: advantage, ratio -> what counts of it, and whether it still pulls."""
    cases = [
        (2.0, 1.1, 2.2, True),  # within the clip
        (2.0, 1.5, 2.4, False),  # better already by more than the clip: 1.2 x 2, no pull
        (2.0, 0.5, 1.0, True),  # worse: the pull back is never clipped
        (-1.0, 0.5, -0.8, False),
        (-1.0, 1.5, -1.5, True),
    ]
    advantages = torch.tensor([[case[0] for case in cases] + [7.0]])
    logps = torch.tensor([[math.log(case[1]) - 3 for case in cases] + [0.0]], requires_grad=True)
    mask = torch.tensor([[True] * len(cases) + [False]])
    loss = ppo_loss(logps, torch.full_like(advantages, -3.0), advantages, mask, clip=0.2)
    close(loss, -sum(case[2] for case in cases) / len(cases))
    loss.backward()
    pull = [-a * ratio / len(cases) if pulls else 0.0 for a, ratio, _, pulls in cases]
    close(logps.grad, [[*pull, 0.0]])


def test_a2c_loss_and_gradient():
    logps, gains, mask = draw(3, 6).requires_grad_(), draw(3, 6, seed=1), masks(3, 6)
    loss = a2c_loss(logps, gains, mask)
    inside = [
        float(gains[b, t] * logps.detach()[b, t]) for b in range(3) for t in range(6) if mask[b, t]
    ]
    close(loss, -sum(inside) / len(inside))
    loss.backward()
    close(logps.grad, -gains * mask / len(inside))


def test_ppo_begins_with_the_gradient_of_a2c():
    before, gains, mask = draw(3, 6), draw(3, 6, seed=1), masks(3, 6)
    found = []
    for loss in (lambda x: ppo_loss(x, before, gains, mask), lambda x: a2c_loss(x, gains, mask)):
        logps = before.clone().requires_grad_()
        loss(logps).backward()
        found.append(logps.grad)
    close(*found)


def test_supervised_loss():
    logps, mask = draw(3, 6), masks(3, 6)
    inside = [float(logps[b, t]) for b in range(3) for t in range(6) if mask[b, t]]
    close(supervised_loss(logps, mask), -sum(inside) / len(inside))
    assert supervised_loss(logps, torch.zeros(3, 6)).item() == 0


# --- bad input ---

PAIR = (torch.zeros(3),) * 4
LONG = (torch.ones(3, dtype=torch.long),) * 2
CALLS = {
    dpo_loss: PAIR,
    bco_loss: PAIR,
    ipo_loss: (*PAIR, *LONG),
    rdpo_loss: (*PAIR, *LONG),
    simpo_loss: (*PAIR[:2], *LONG),
    token_dpo_loss: (torch.zeros(2, 3),) * 4,
    npo_loss: (torch.zeros(2, 3),) * 3,
    sequence_npo_loss: PAIR[:2],
    supervised_loss: (torch.zeros(2, 3),) * 2,
    ppo_loss: (torch.zeros(2, 3),) * 4,
    a2c_loss: (torch.zeros(2, 3),) * 3,
}


def test_every_public_loss_is_in_the_table_of_bad_calls():
    functions = inspect.getmembers(losses, inspect.isfunction)
    assert {name for name, _ in functions if name.endswith("_loss")} == {
        function.__name__ for function in CALLS
    }


@pytest.mark.parametrize("function", CALLS)
def test_losses_refuse_nan_shapes_and_beta(function):
    arguments = CALLS[function]
    function(*arguments)
    for place, argument in enumerate(arguments):
        before, after = arguments[:place], arguments[place + 1 :]
        with pytest.raises(AlloError, match=f"{function.__name__}: shapes"):
            function(*before, torch.ones(7, 7), *after)
        if argument.is_floating_point():
            broken = argument.clone()
            broken.view(-1)[-1] = NAN
            with pytest.raises(AlloError, match=f"{function.__name__}.*NaN"):
                function(*before, broken, *after)
        else:
            with pytest.raises(AlloError, match="no tokens"):
                function(*before, torch.tensor([1, 0, 1]), *after)
    if "beta" in inspect.signature(function).parameters:
        for beta in (0.0, -1.0, NAN):
            with pytest.raises(AlloError, match="beta is"):
                function(*arguments, beta=beta)


@pytest.mark.parametrize("clip", [0.0, -0.2, NAN])
def test_ppo_loss_refuses_a_clip_that_leaves_nothing(clip):
    with pytest.raises(AlloError, match="clip is"):
        ppo_loss(*CALLS[ppo_loss], clip=clip)


@pytest.mark.parametrize(("ratio", "kept"), [(1.15, 1.15), (1.25, 1.2), (0.9, 0.9), (0.7, 0.7)])
def test_ppo_clips_at_a_fifth_unless_told_otherwise(ratio, kept):
    # With a positive advantage only a ratio that has grown too far is cut (1707.06347, figure 1).
    before = torch.tensor([[-1.0]])
    loss = losses.ppo_loss(before + math.log(ratio), before, torch.ones(1, 1), torch.ones(1, 1))
    assert float(loss) == pytest.approx(-kept, rel=1e-5)
