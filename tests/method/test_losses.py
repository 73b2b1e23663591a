"""Losses against formulas in plain Python, the authors' own, and TRL's trainers."""

import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny_llama, token_batch, word_tokenizer

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


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


def draw(*shape, seed=0, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def close(actual, expected, tolerance=1e-5):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def masks(rows=5, length=9, seed=3):
    mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[:, -1] = True
    return mask


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
def test_token_logps_is_log_softmax_in_float32_and_zero_outside_the_response(dtype):
    logits = draw(3, 7, 11).to(dtype)
    labels = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))
    labels[0, :4] = labels[1, 6] = labels[2] = -100
    out = token_logps(logits, labels)
    assert out.dtype == torch.float32 and out.shape == (3, 7)
    close(out, logps_by_hand(logits, labels))
    assert torch.equal(out == 0, (labels == -100) | (torch.arange(7) == 0))


def test_token_logps_has_no_gradient_outside_the_response():
    logits = draw(1, 4, 5).requires_grad_()
    token_logps(logits, torch.tensor([[-100, -100, 2, -100]])).sum().backward()
    assert (logits.grad.abs().sum(dim=-1) > 0).tolist() == [[False, True, False, False]]
    close(logits.grad[0, 1], torch.eye(5)[2] - logits.detach()[0, 1].softmax(-1))


def test_token_logps_sums_to_the_model_s_own_loss():
    ids, labels = token_batch()
    out = tiny_llama()(input_ids=ids, labels=labels)
    logps = token_logps(out.logits, labels)
    close(-logps.sum() / (labels[:, 1:] != -100).sum(), out.loss.item())


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long), "expected \\[B, T, V\\]"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), "expected \\[B, T, V\\]"),
        (torch.zeros(1, 2, 4), torch.tensor([[0, 4]]), "label 4"),
        (torch.zeros(1, 2, 4), torch.tensor([[0, -1]]), "label -1"),
        (torch.full((1, 2, 4), NAN), torch.tensor([[0, 1]]), "NaN"),
    ],
)
def test_token_logps_refuses(logits, labels, message):
    with pytest.raises(AlloError, match=message):
        token_logps(logits, labels)


# --- losses of whole responses: the authors' formulas in numpy and float64 ---


def authors(name, policy, reference, lengths, shift):
    """The loss of each pair; beta .1, or 2 of SimPO. shift: of BCO, a constant."""
    (chosen, rejected), (ref_chosen, ref_rejected), (long, short) = policy, reference, lengths
    margin = 0.1 * (chosen - ref_chosen) - 0.1 * (rejected - ref_rejected)
    if name == "dpo":  # eric-mitchell/direct-preference-optimization, preference_loss
        return -log_sigmoid(0.1 * ((chosen - rejected) - (ref_chosen - ref_rejected)))
    if name == "rdpo":  # arXiv 2403.19159
        return -log_sigmoid(margin + 0.01 * long - 0.01 * short)
    if name == "ipo":  # arXiv 2310.12036, eq. 17, of log-probs per token
        h = (chosen / long - rejected / short) - (ref_chosen / long - ref_rejected / short)
        return (h - 1 / (2 * 0.1)) ** 2
    if name == "simpo":  # princeton-nlp/SimPO: gamma counts in units of beta there
        return -log_sigmoid(2 * (chosen / long - rejected / short - 0.5))
    if name == "npo":  # licong-lin/negative-preference-optimization: of losses, not log-probs
        return -log_sigmoid(0.1 * (-rejected + ref_rejected)) * 2 / 0.1
    # arXiv 2404.04656: TRL's BCOTrainer at its first batch, whose mean all of its average is.
    rewards = 0.1 * (chosen - ref_chosen), 0.1 * (rejected - ref_rejected)
    return (-log_sigmoid(rewards[0] - shift) - log_sigmoid(-(rewards[1] - shift))) / 2


OURS = {
    "dpo": lambda policy, reference, lengths: dpo_loss(*policy, *reference),
    "rdpo": lambda policy, reference, lengths: rdpo_loss(*policy, *reference, *lengths),
    "ipo": lambda policy, reference, lengths: ipo_loss(*policy, *reference, *lengths),
    "bco": lambda policy, reference, lengths: bco_loss(*policy, *reference),
    "simpo": lambda policy, reference, lengths: simpo_loss(*policy, *lengths),
    "npo": lambda policy, reference, lengths: sequence_npo_loss(policy[1], reference[1]),
}


@pytest.mark.parametrize("name", OURS)
def test_loss_and_gradient_are_those_of_the_authors_formula(name):
    rng = np.random.default_rng(0)
    lengths = [rng.integers(1, 40, 64) for _ in range(2)]
    policy, reference = ([-n * rng.uniform(0.05, 2, 64) for n in lengths] for _ in range(2))
    shift = np.concatenate([0.1 * (policy[side] - reference[side]) for side in (0, 1)]).mean()
    leaves = [torch.tensor(side, dtype=torch.float32, requires_grad=True) for side in policy]
    fixed = [[torch.tensor(x, dtype=torch.float32) for x in part] for part in (reference, lengths)]
    loss = OURS[name](leaves, *fixed)
    close(loss, authors(name, policy, reference, lengths, shift))
    loss.sum().backward()
    for side in (0, 1):
        ends = []
        for step in (1e-4, -1e-4):
            moved = [policy[i] + step * (i == side) for i in (0, 1)]
            ends.append(authors(name, moved, reference, lengths, shift))
        slope = (ends[0] - ends[1]) / 2e-4
        gradient = leaves[side].grad
        close(torch.zeros(64) if gradient is None else gradient, slope)


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


def test_bco_loss_does_not_see_what_all_rewards_share():
    """Its shift takes away what raises every response alike, as the training itself may do."""
    pc, pr, rc, rr = (draw(4, seed=s) for s in range(4))
    close(bco_loss(pc + 40, pr + 40, rc, rr), bco_loss(pc, pr, rc, rr))


# --- losses of tokens ---


def test_token_dpo_loss_and_gradient():
    chosen, rejected = draw(5, 9).requires_grad_(), draw(5, 7, seed=1).requires_grad_()
    m_chosen, m_rejected = masks() * 0.5, masks(length=7, seed=4)  # weights or bool
    loss = token_dpo_loss(chosen, rejected, m_chosen, m_rejected, 0.2)
    margins = [
        sum(chosen[b, t].item() * m_chosen[b, t].item() for t in range(9))
        - sum(rejected[b, t].item() for t in range(7) if m_rejected[b, t])
        for b in range(5)
    ]
    close(loss, [-log_sigmoid(0.2 * m) for m in margins])
    loss.sum().backward()
    pull = torch.tensor([0.2 * sigmoid(-0.2 * m) for m in margins]).unsqueeze(1)
    close(chosen.grad, -pull * m_chosen)
    close(rejected.grad, pull * m_rejected)


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


def test_npo_loss_before_training_is_two_ln_2_over_beta_and_with_nothing_to_forget_zero():
    policy = draw(3, 5).requires_grad_()
    close(npo_loss(policy, policy.detach(), masks(3, 5), 0.1), 2 / 0.1 * math.log(2))
    loss = npo_loss(policy, draw(3, 5, seed=1), torch.zeros(3, 5))
    loss.backward()
    assert loss.item() == 0 and not policy.grad.any()


def test_ppo_loss_by_hand():
    """One token a case: advantage, ratio -> what counts of it, and whether it still pulls."""
    cases = [
        (2.0, 1.1, 2.2, True),  # within the clip, a fifth
        (2.0, 1.5, 2.4, False),  # better already by more than the clip: 1.2 x 2, no pull
        (2.0, 0.5, 1.0, True),  # worse: the pull back is never clipped
        (-1.0, 0.5, -0.8, False),
        (-1.0, 1.5, -1.5, True),
    ]
    advantages = torch.tensor([[case[0] for case in cases] + [7.0]])
    logps = torch.tensor([[math.log(case[1]) - 3 for case in cases] + [0.0]], requires_grad=True)
    mask = torch.tensor([[True] * len(cases) + [False]])
    loss = ppo_loss(logps, torch.full_like(advantages, -3.0), advantages, mask)
    close(loss, -sum(case[2] for case in cases) / len(cases))
    loss.backward()
    pull = [-a * ratio / len(cases) if pulls else 0.0 for a, ratio, _, pulls in cases]
    close(logps.grad, [[*pull, 0.0]])


def test_a2c_loss_by_hand_and_ppo_begins_with_its_gradient():
    before, gains, mask = draw(3, 6), draw(3, 6, seed=1), masks(3, 6)
    logps, others = before.clone().requires_grad_(), before.clone().requires_grad_()
    loss, count = a2c_loss(logps, gains, mask), int(mask.sum())
    close(loss, -sum((gains * before)[mask].tolist()) / count)
    loss.backward()
    close(logps.grad, -gains * mask / count)
    ppo_loss(others, before, gains, mask).backward()
    close(others.grad, logps.grad)


def test_supervised_loss():
    logps, mask = draw(3, 6), masks(3, 6)
    close(supervised_loss(logps, mask), -sum(logps[mask].tolist()) / int(mask.sum()))
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
def test_losses_refuse_nan_shapes_and_settings_that_are_not_positive(function):
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
    for setting in {"beta", "clip"} & set(inspect.signature(function).parameters):
        for value in (0.0, -1.0, NAN):
            with pytest.raises(AlloError, match=f"{setting} is"):
                function(*arguments, **{setting: value})


# --- TRL's own trainers ---


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    """A function (loss_type, beta, smoothing) -> (trainer, batch) around TRL's own DPOTrainer."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    tokenizer = word_tokenizer()
    rows = [
        {"prompt": "w1 w2 w3", "chosen": " w4 w5", "rejected": " w6 w7 w8 w9"},
        {"prompt": "w9", "chosen": " w4 w5 w8 w2 w2", "rejected": " w6"},
        {"prompt": "w20 w21", "chosen": " w22 w23", "rejected": " w24 w25"},
    ]
    folder = tmp_path_factory.mktemp("trl")

    def make(loss_type, beta, smoothing=0.0):
        arguments = DPOConfig(
            output_dir=str(folder),
            loss_type=[loss_type],
            beta=beta,
            label_smoothing=smoothing,
            per_device_train_batch_size=len(rows),
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            model=tiny_llama(0),
            ref_model=tiny_llama(1),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        return trainer, next(iter(trainer.get_train_dataloader()))

    return make


def robust(pc, pr, rc, rr, beta, smoothing):
    """Robust DPO (arXiv 2403.00409): swapping the pair flips the label."""
    kept, flipped = dpo_loss(pc, pr, rc, rr, beta), dpo_loss(pr, pc, rr, rc, beta)
    return ((1 - smoothing) * kept - smoothing * flipped) / (1 - 2 * smoothing)


TRL = {
    "sigmoid": lambda logps, lengths, beta, _: dpo_loss(*logps, beta),
    "ipo": lambda logps, lengths, beta, _: ipo_loss(*logps, *lengths, beta),
    # Without the shift, which TRL's BCO on pairs leaves out, and the sum of both sides.
    "bco_pair": lambda logps, lengths, beta, _: 2 * bco_loss(*logps, beta, shift=0.0),
    "robust": lambda logps, lengths, beta, smoothing: robust(*logps, beta, smoothing),
}


@pytest.mark.parametrize("loss_type", TRL)
def test_same_loss_and_gradient_as_trl_dpo_trainer(trl_trainer, loss_type):
    beta, smoothing = (0.7, 0.2) if loss_type == "robust" else (0.3, 0.0)
    trainer, batch = trl_trainer(loss_type, beta, smoothing)
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    theirs.backward()

    policy, reference = tiny_llama(0), tiny_llama(1)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    chosen, rejected = token_logps(policy(**inputs).logits, labels).sum(dim=1).chunk(2)
    with torch.no_grad():
        ref = token_logps(reference(**inputs).logits, labels).sum(dim=1).chunk(2)
    lengths = batch["completion_mask"].sum(dim=1).chunk(2)
    ours = TRL[loss_type]((chosen, rejected, *ref), lengths, beta, smoothing).mean()
    ours.backward()

    untrained = {"ipo": (0.5 / beta) ** 2, "bco_pair": 2 * math.log(2)}
    assert abs(theirs.item() - untrained.get(loss_type, math.log(2))) > 0.01
    close(ours, theirs.item())
    expected = {name: p.grad for name, p in trainer.model.named_parameters()}
    for name, parameter in policy.named_parameters():
        close(parameter.grad, expected[name])


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_same_loss_and_gradient_as_trl_simpo():
    from trl.experimental.cpo import CPOTrainer

    settings_ = SimpleNamespace(
        alpha=0.0,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        loss_type="simpo",
        simpo_gamma=1.3,
        beta=2.2,
        label_smoothing=0.0,
    )
    logits = draw(2, 4, 8, VOCABULARY)
    labels = torch.randint(0, VOCABULARY, (2, 4, 8), generator=torch.Generator().manual_seed(5))
    for row in range(4):
        labels[0, row, : row + 1] = -100
        labels[1, row, 8 - row :] = -100
    theirs_in, ours_in = (logits.clone().requires_grad_() for _ in range(2))
    averaged = [CPOTrainer.get_batch_logps(theirs_in[i], labels[i], True) for i in range(2)]
    theirs, _, _ = CPOTrainer.cpo_loss(settings_, *averaged)
    logps = [token_logps(ours_in[i], labels[i]) for i in range(2)]
    lengths = [(labels[i][:, 1:] != -100).sum(dim=1) for i in range(2)]
    ours = simpo_loss(*(x.sum(dim=1) for x in logps), *lengths, beta=2.2, gamma=1.3)
    close(ours, theirs.detach())
    theirs.sum().backward()
    ours.sum().backward()
    close(ours_in.grad, theirs_in.grad)
