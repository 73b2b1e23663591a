"""Losses against formulas in plain Python, the authors' own, and TRL's trainer; objectives hand the
right part of a batch to the right loss."""

import inspect
import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_llama, words

from allo_lib.engine.batching import Layout, collate, pair_batch, rejected_batch
from allo_lib.errors import AlloError
from allo_lib.method import losses
from allo_lib.method.losses import (
    ON_POLICY,
    a2c_loss,
    bco_loss,
    dpo_loss,
    ipo_loss,
    npo_loss,
    objective,
    ppo_loss,
    rdpo_loss,
    sequence_npo_loss,
    simpo_loss,
    supervised_loss,
    token_dpo_loss,
    token_logps,
)  # fmt: skip

NAN, BETA = float("nan"), 0.1
SIDES = ("chosen", "rejected")


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def close(actual, expected, tolerance=1e-5):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def masks(rows=5, length=9, seed=3):
    mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[:, -1] = True
    return mask


# --- token_logps ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_token_logps_is_log_softmax_in_float32_and_zero_outside_the_response(dtype):
    logits = draw(3, 7, 11).to(dtype)
    labels = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))
    labels[0, :4] = labels[1, 6] = labels[2] = -100
    out = token_logps(logits, labels)
    assert out.dtype == torch.float32 and out.shape == (3, 7)
    for b in range(3):
        for t in range(7):
            expected, label = 0.0, labels[b, t].item()
            if t > 0 and label != -100:
                scores = logits[b, t - 1].double().tolist()
                expected = scores[label] - math.log(sum(map(math.exp, scores)))
            assert out[b, t].item() == pytest.approx(expected, abs=1e-5)


def test_token_logps_of_a_large_vocabulary_count_its_many_unlikely_words():
    count, low = 50_000, -17.0  # each too small to change a running sum that begins with 1
    logits = torch.full((1, 2, count), low)
    logits[..., 0] = 0
    found = token_logps(logits, torch.tensor([[-100, 0]]))[0, 1].item()
    assert found == pytest.approx(-math.log1p((count - 1) * math.exp(low)), abs=5e-4)


@pytest.mark.parametrize(("logits", "labels", "message"), [
    (torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long), r"expected \[B, T, V\]"),
    (torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), r"expected \[B, T, V\]"),
    (torch.zeros(1, 2, 4), torch.tensor([[0, 4]]), "label 4"),
    (torch.zeros(1, 2, 4), torch.tensor([[0, -1]]), "label -1"),
    (torch.full((1, 2, 4), NAN), torch.tensor([[0, 1]]), "NaN"),
])  # fmt: skip
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


def ours(name, policy, reference, lengths):
    ratios = [None if p is None else p - r for p, r in zip(policy, reference, strict=True)]
    return {
        "dpo": lambda: dpo_loss(*policy, *reference),
        "rdpo": lambda: rdpo_loss(*ratios, *lengths),
        "ipo": lambda: ipo_loss(*ratios, *lengths),
        "bco": lambda: bco_loss(*ratios),
        "simpo": lambda: simpo_loss(*policy, *lengths),
        "npo": lambda: sequence_npo_loss(ratios[1]),
    }[name]()


OF_RESPONSES = ("dpo", "rdpo", "ipo", "bco", "simpo", "npo")


@pytest.mark.parametrize("name", OF_RESPONSES)
def test_loss_and_gradient_are_those_of_the_authors_formula(name):
    rng = np.random.default_rng(0)
    lengths = [rng.integers(1, 40, 64) for _ in range(2)]
    policy, reference = ([-n * rng.uniform(0.05, 2, 64) for n in lengths] for _ in range(2))
    shift = np.concatenate([0.1 * (policy[side] - reference[side]) for side in (0, 1)]).mean()
    leaves = [torch.tensor(side, dtype=torch.float32, requires_grad=True) for side in policy]
    fixed = [[torch.tensor(x, dtype=torch.float32) for x in part] for part in (reference, lengths)]
    loss = ours(name, leaves, *fixed)
    close(loss, authors(name, policy, reference, lengths, shift))
    loss.sum().backward()
    for side in (0, 1):
        ends = []
        for step in (1e-4, -1e-4):
            moved = [policy[i] + step * (i == side) for i in (0, 1)]
            ends.append(authors(name, moved, reference, lengths, shift))
        slope, gradient = (ends[0] - ends[1]) / 2e-4, leaves[side].grad
        close(torch.zeros(64) if gradient is None else gradient, slope)


def test_rdpo_loss_is_least_at_the_policy_that_its_penalty_asks_for():
    # max E[r - alpha |y|] - beta KL gives log pi/ref = (r - alpha |y|) / beta + constant. With
    # preferences drawn as sigma(r1 - r2), the expected loss must be stationary there.
    rewards, lengths, beta, alpha = (0.7, -0.4), (9, 4), 0.1, 0.03
    optimum = [(r - alpha * n) / beta for r, n in zip(rewards, lengths, strict=True)]
    first, second = (torch.tensor([x], requires_grad=True) for x in optimum)
    n1, n2 = (torch.tensor([n]) for n in lengths)
    preferred = sigmoid(rewards[0] - rewards[1])
    expected_loss = preferred * rdpo_loss(first, second, n1, n2, beta, alpha)
    expected_loss += (1 - preferred) * rdpo_loss(second, first, n2, n1, beta, alpha)
    expected_loss.backward()
    close(first.grad, [0.0], 1e-6)
    close(second.grad, [0.0], 1e-6)


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


def test_npo_loss_and_gradient():
    policy, ref = draw(4, 6).requires_grad_(), draw(4, 6, seed=1)
    weights, beta = masks(4, 6).float() * torch.rand(4, 6), 0.4
    total, count, pull = 0.0, 0, torch.zeros(4, 6)
    for b in range(4):
        for t in range(6):
            w, delta = weights[b, t].item(), (policy[b, t] - ref[b, t]).item()
            total += w * log_sigmoid(-beta * delta)
            count += w != 0
            pull[b, t] = 2 * w * sigmoid(beta * delta)
    loss = npo_loss(policy, ref, weights, beta)
    close(loss, -2 / beta * total / count)
    loss.backward()
    close(policy.grad, pull / count)
    one = torch.zeros(4, 6)  # a single token
    one[2, 3] = 1.0
    expected = -2 / beta * log_sigmoid(-beta * (policy[2, 3] - ref[2, 3]).item())
    close(npo_loss(policy, ref, one, beta), expected)
    policy.grad = None
    loss = npo_loss(policy, ref, torch.zeros(4, 6))  # nothing to forget
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


# --- bad input ---

PAIR = (torch.zeros(3),) * 2
LENGTHS = (torch.ones(3, dtype=torch.long),) * 2
TOKENS = (torch.zeros(2, 3),) * 4
CALLS = {
    dpo_loss: PAIR * 2, bco_loss: PAIR, ipo_loss: (*PAIR, *LENGTHS), rdpo_loss: (*PAIR, *LENGTHS),
    simpo_loss: (*PAIR, *LENGTHS), sequence_npo_loss: PAIR[:1], token_dpo_loss: TOKENS,
    npo_loss: TOKENS[:3], supervised_loss: TOKENS[:2], ppo_loss: TOKENS, a2c_loss: TOKENS[:3],
}  # fmt: skip


def test_losses_refuse_nan_shapes_and_settings_that_are_not_positive():
    functions = inspect.getmembers(losses, inspect.isfunction)
    assert {one for name, one in functions if name.endswith("_loss")} == set(CALLS)
    for function, arguments in CALLS.items():
        function(*arguments)
        for place, argument in enumerate(arguments):
            bad = {"shapes": torch.ones(7, 7)} if len(arguments) > 1 else {}
            if argument.is_floating_point():
                bad["NaN"] = torch.full_like(argument, NAN)
            else:
                bad["no tokens"] = torch.tensor([1, 0, 1])
            for told, value in bad.items():
                with pytest.raises(AlloError, match=f"{function.__name__}: .*{told}"):
                    function(*arguments[:place], value, *arguments[place + 1 :])
        for value in (0.0, -1.0, NAN):
            if "beta" in inspect.signature(function).parameters:
                with pytest.raises(AlloError, match="beta is"):
                    function(*arguments, beta=value)


# --- TRL's own trainer ---


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_same_loss_and_gradient_as_trl_dpo_trainer(tmp_path, loss_type):
    import datasets
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": "w1 w2 w3", "chosen": " w4 w5", "rejected": " w6 w7 w8 w9"},
        {"prompt": "w9", "chosen": " w4 w5 w8 w2 w2", "rejected": " w6"},
        {"prompt": "w20 w21", "chosen": " w22 w23", "rejected": " w24 w25"},
    ]
    arguments = DPOConfig(
        output_dir=str(tmp_path), loss_type=[loss_type], beta=0.3, report_to=[], use_cpu=True,
        per_device_train_batch_size=len(rows), bf16=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=tiny_llama(0), ref_model=tiny_llama(1), args=arguments,
        train_dataset=datasets.Dataset.from_list(rows), processing_class=words(),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    theirs.backward()

    policy, reference = tiny_llama(0), tiny_llama(1)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    own = token_logps(policy(**inputs).logits, labels).sum(dim=1).chunk(2)
    with torch.no_grad():
        ref = token_logps(reference(**inputs).logits, labels).sum(dim=1).chunk(2)
    if loss_type == "ipo":
        lengths = batch["completion_mask"].sum(dim=1).chunk(2)
        loss = ipo_loss(own[0] - ref[0], own[1] - ref[1], *lengths, 0.3).mean()
    else:
        loss = dpo_loss(*own, *ref, 0.3).mean()
    loss.backward()
    untrained = (0.5 / 0.3) ** 2 if loss_type == "ipo" else math.log(2)
    assert abs(theirs.item() - untrained) > 0.01
    close(loss, theirs.item())
    expected = {name: p.grad for name, p in trainer.model.named_parameters()}
    for name, parameter in policy.named_parameters():
        close(parameter.grad, expected[name])


# --- objectives: from a batch to its loss ---


def pairs(**extras) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for i in range(3):
        row = {"prompt": [5] * (1 + i), "chosen": [6] * (2 + i), "rejected": [7] * (4 - i)}
        for side in SIDES:
            row[f"{side}_reference"] = (-torch.rand(len(row[side]), generator=generator)).tolist()
        result.append(row | {key: value(row) for key, value in extras.items()})
    return result


def with_weights() -> list[dict]:
    """Pairs whose rejected tokens are weighed, as forgetting does."""
    return pairs(
        rejected_weights=lambda row: [0.5 * (t % 2) for t in range(len(row["rejected"]))],
        chosen_weights=lambda row: [0.0] * len(row["chosen"]),
    )


def policy_of(batch, seed: int = 1):
    """Random log-probs where a response token stands, and 0 elsewhere, as the forward gives."""
    noise = -3 * torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(seed))
    return (noise * (batch["labels"] != -100)).requires_grad_()


def loss_and_gradient(name, logps, batch, **settings):
    loss, metrics = objective(name, beta=BETA, **settings)(logps, batch)
    (gradient,) = torch.autograd.grad(loss, logps)
    # What stands outside the response is a constant 0 of the forward pass.
    return loss.detach(), gradient * (batch["labels"] != -100), metrics


@pytest.mark.parametrize("name", OF_RESPONSES)
def test_losses_of_responses_get_sums_references_and_lengths_of_both_sides(name):
    rows = pairs()
    batch = (rejected_batch if name == "npo" else pair_batch)(rows, Layout(0))
    logps = policy_of(batch).detach()
    loss, metrics = objective(name, beta=BETA)(logps, batch)
    sums = torch.tensor([sum(row) for row in logps.tolist()])
    reference = [torch.tensor([sum(r[f"{s}_reference"]) for r in rows]) for s in SIDES]
    lengths = [torch.tensor([float(len(r[side])) for r in rows]) for side in SIDES]
    policy = [None, sums] if name == "npo" else sums.chunk(2)
    close(loss, ours(name, policy, reference, lengths).mean())
    if name != "npo":
        chosen, rejected = (p - r for p, r in zip(policy, reference, strict=True))
        margins = [BETA * float(margin) for margin in chosen - rejected]
        assert metrics["reward_margin"] == pytest.approx(sum(margins) / 3, abs=1e-6)
        assert metrics["reward_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 3)
        assert objective(name, beta=BETA)(batch["reference"], batch)[1]["reward_accuracy"] == 0


def test_learning_takes_the_lowest_ratios_of_the_rejected_response_only():
    batch = pair_batch(pairs(), Layout(0))
    logps = policy_of(batch)
    loss, gradient, metrics = loss_and_gradient("learning", logps, batch, key_share=0.3)
    ratio = logps.detach() - batch["reference"]
    inside = batch["labels"] != -100
    expected = []
    for i in range(3):
        own = ratio[i + 3][inside[i + 3]].tolist()
        lowest = sorted(own)[: max(1, round(0.3 * len(own)))]
        expected.append(math.log1p(math.exp(-BETA * (sum(ratio[i].tolist()) - sum(lowest)))))
    assert float(loss) == pytest.approx(sum(expected) / 3, abs=1e-6)
    assert ((gradient != 0) == inside)[:3].all()  # all chosen tokens are learned
    assert (gradient != 0)[3:].sum(dim=1).tolist() == [1, 1, 1]
    # Of every token it is DPO, whose metrics it has in any case.
    whole, dpo = (loss_and_gradient(name, logps, batch) for name in ("learning", "dpo"))
    close(whole[0], dpo[0])
    close(whole[1], dpo[1])
    for key, value in dpo[2].items():
        close(metrics[key], value)


def test_fixed_key_tokens_take_the_place_of_the_policy_s():
    extras = {
        "rejected_key": lambda row: [0.0] * (len(row["rejected"]) - 1) + [1.0],
        "chosen_key": lambda row: [0.0] * len(row["chosen"]),
    }
    batch = pair_batch(pairs(**extras), Layout(0))
    _, gradient, _ = loss_and_gradient("learning", policy_of(batch), batch, key_share=1.0)
    assert torch.equal((gradient != 0)[3:], batch["key"][3:].bool())
    assert torch.equal((gradient != 0)[:3], (batch["labels"] != -100)[:3])


def test_forgetting_lowers_weighted_tokens_only():
    batch = rejected_batch(with_weights(), Layout(0))
    logps = policy_of(batch)
    loss, gradient, metrics = loss_and_gradient("forgetting", logps, batch)
    weighed = batch["weights"] != 0
    ratio = (logps.detach() - batch["reference"])[weighed].tolist()
    close(loss, -(2 / BETA) * sum(0.5 * log_sigmoid(-BETA * one) for one in ratio) / len(ratio))
    assert torch.equal(gradient > 0, weighed) and metrics == {}


@pytest.mark.parametrize("name", ["sft", *ON_POLICY])
def test_objectives_of_responses_leave_padding_out(name):
    batch = collate([{"prompt": p["prompt"], "response": p["chosen"]} for p in pairs()], Layout(0))
    inside = batch["labels"] != -100
    assert not inside.all()
    batch["before_update"] = policy_of(batch).detach()
    batch["advantages"] = policy_of(batch, seed=2).detach() + 1.5 * inside
    logps = (batch["before_update"] + 0.3 * policy_of(batch, seed=3)).detach()
    loss, metrics = objective(name, beta=BETA)(logps, batch)
    changed = batch | {"advantages": batch["advantages"] + 9 * ~inside}
    assert torch.equal(objective(name, beta=BETA)(logps, changed)[0], loss)
    if name == "sft":  # cross-entropy per token
        assert float(loss) == pytest.approx(-float(logps.sum()) / int(inside.sum()))
    ratio = (logps - batch["before_update"]).exp()[inside].tolist()
    beyond = sum(not 0.8 <= one <= 1.2 for one in ratio) / len(ratio)
    assert 0 < beyond < 1
    assert metrics == ({"clipped": pytest.approx(beyond)} if name == "ppo" else {})


def test_unknown_objectives_are_refused():
    with pytest.raises(ValueError, match="'orpo'"):
        objective("orpo", beta=BETA)
