"""Losses against plain-Python formulas, and against TRL's own trainers in loss and gradient."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny_llama, token_batch

from allo_lib import losses
from allo_lib.errors import AlloError
from allo_lib.losses import (
    dpo_loss,
    ipo_loss,
    npo_loss,
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


def test_simpo_loss():
    pc, pr = draw(3), draw(3, seed=1)
    expected = []
    for a, b, n, m in zip(*(x.tolist() for x in (pc, pr, *LENGTHS)), strict=True):
        expected.append(-log_sigmoid(2.5 / n * a - 2.5 / m * b - 1.4))
    close(simpo_loss(pc, pr, *LENGTHS, beta=2.5, gamma=1.4), expected)


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
    ipo_loss: (*PAIR, *LONG),
    rdpo_loss: (*PAIR, *LONG),
    simpo_loss: (*PAIR[:2], *LONG),
    token_dpo_loss: (torch.zeros(2, 3),) * 4,
    npo_loss: (torch.zeros(2, 3),) * 3,
    sequence_npo_loss: PAIR[:2],
    supervised_loss: (torch.zeros(2, 3),) * 2,
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


# --- TRL ---


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    """A function (loss_type, beta, smoothing) -> (trainer, batch) around TRL's own DPOTrainer."""
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)
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


OURS = {
    "sigmoid": lambda logps, lengths, beta, _: dpo_loss(*logps, beta),
    "ipo": lambda logps, lengths, beta, _: ipo_loss(*logps, *lengths, beta),
    "robust": lambda logps, lengths, beta, smoothing: robust(*logps, beta, smoothing),
}


@pytest.mark.parametrize("loss_type", OURS)
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
    ours = OURS[loss_type]((chosen, rejected, *ref), lengths, beta, smoothing).mean()
    ours.backward()

    assert abs(theirs.item() - (math.log(2) if loss_type != "ipo" else (0.5 / beta) ** 2)) > 0.01
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
