"""PPO and A2C: rewards, advantages and critic by hand; and that they learn what is rewarded."""

import copy
import math

import numpy as np
import pytest
import torch
from tiny_study import DOMAIN

from allo_lib.engine import on_policy
from allo_lib.engine.forward import logps_of_rows
from allo_lib.engine.generation import Response
from allo_lib.engine.on_policy import (
    DEFAULT,
    Critic,
    OnPolicy,
    advantages,
    penalised_rewards,
    returns,
    run_on_policy,
    whitened,
)
from allo_lib.engine.trainer import Schedule
from allo_lib.errors import AlloError, Diverged
from allo_lib.machine import weights

MASK = torch.tensor([[True, True, True], [True, False, False]])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- rewards and advantages by hand ---


def test_the_verdict_comes_at_the_last_token_and_kl_at_every_one():
    policy = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 0.0, 0.0]])
    reference = torch.tensor([[-1.5, -2.0, -1.0], [-4.0, 0.0, 0.0]])
    found = penalised_rewards(torch.tensor([1.0, 0.0]), policy, reference, MASK, kl=0.1)
    expected = torch.tensor([[-0.05, 0.0, 0.2 + 1], [-0.3, 0.0, 0.0]])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        returns(found), torch.tensor([[1.15, 1.2, 1.2], [-0.3, 0.0, 0.0]])
    )  # fmt: skip


def test_a_response_without_tokens_is_refused():
    empty = torch.zeros(1, 2)
    with pytest.raises(AlloError, match="no tokens"):
        penalised_rewards(torch.ones(1), empty, empty, empty.bool(), 0.1)


def test_advantages_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.0, 0.0]])
    values = torch.tensor([[0.2, 0.6, 0.4], [0.1, 9.0, 9.0]])  # 9: behind the end, nobody's
    errors = [0.4, -0.2, 0.6]  # of the first: .6 - .2, .4 - .6, 1 - .4
    first = [0.4 + 0.5 * (-0.2 + 0.5 * 0.6), -0.2 + 0.5 * 0.6, 0.6]
    found = advantages(rewards, values, MASK, decay=0.5)
    torch.testing.assert_close(found, torch.tensor([first, [0.4, 0.0, 0.0]]))
    found = advantages(rewards, values, MASK, decay=0.0)
    torch.testing.assert_close(found, torch.tensor([errors, [0.4, 0.0, 0.0]]))


def test_undecayed_advantages_are_returns_less_values():
    lengths = torch.tensor([7, 4, 1])
    mask = torch.arange(7) < lengths[:, None]
    rewards, values = draw(3, 7) * mask, draw(3, 7, seed=1) * mask
    found = advantages(rewards, values, mask, decay=1.0)
    torch.testing.assert_close(found, returns(rewards) * mask - values)


def test_whitened_advantages_have_mean_0_and_deviation_1_over_tokens():
    found = whitened(draw(2, 3) * MASK, MASK)
    inside = found[MASK].numpy()
    assert inside.mean() == pytest.approx(0, abs=1e-6) and inside.std() == pytest.approx(1)
    assert not found[~MASK].any()
    same = whitened(3.0 * MASK, MASK)
    assert not same.any()  # nothing is better than anything else: nothing to learn


# --- critic ---


def test_the_critic_is_the_weighted_ridge_regression_of_all_it_saw():
    critic = Critic(ridge=0.2, memory=0.5)
    assert not critic.values(draw(4, 5)).any()
    hidden = [draw(30, 5, seed=s) for s in range(3)]
    seen = [draw(30, seed=s + 9) for s in range(3)]
    for states, outcome in zip(hidden, seen, strict=True):
        critic.learn(states, outcome)
    rows = np.concatenate(
        [0.5 ** ((2 - i) / 2) * np.c_[h.double(), np.ones(30)] for i, h in enumerate(hidden)]
    )
    target = np.concatenate([0.5 ** ((2 - i) / 2) * s.double() for i, s in enumerate(seen)])
    penalty = 0.2 * np.mean((rows**2).sum(axis=0))
    rows = np.r_[rows, math.sqrt(penalty) * np.eye(6)]
    solved, *_ = np.linalg.lstsq(rows, np.r_[target, np.zeros(6)], rcond=None)
    expected = np.c_[draw(4, 5, seed=7).double(), np.ones(4)] @ solved
    found = critic.values(draw(4, 5, seed=7))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


# --- training ---

WORD = "thus"  # about a third of the study's responses hold it


def train(study, name, rate=3e-3, seed=5, epochs=1, count=12, reward=None, **settings):
    """(log, weights) of a training on `count` questions, 6 a step, rewarded for one word."""
    questions = study.task(DOMAIN).questions("pairs", 150)[:count]
    model = study.load_sft(DOMAIN)
    log = run_on_policy(
        model,
        study.tokenizer,
        [question.prompt for question in questions],
        reward or (lambda number, response: float(WORD in response.text.split())),
        name,
        Schedule(rate, epochs, 6, seed),
        max_new_tokens=40,
        generation_batch=64,
        label="toy",
        settings=OnPolicy(**settings),
    )
    return log, weights.snapshot(model)


@pytest.fixture
def theta(tiny_study):
    return weights.read_tensors(tiny_study.sft(DOMAIN).file("model.safetensors"))


@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_a_rewarded_word_becomes_more_frequent(tiny_study, name):
    log, _ = train(tiny_study, name, rate=2e-3, epochs=8, count=48, kl=0.0, samples=4)
    rewards, eighth = log.metrics["reward"], len(log.loss) // 8
    before, after = (sum(part) / eighth for part in (rewards[:eighth], rewards[-eighth:]))
    assert after > before + 0.2, (before, after)


@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_same_seed_same_bits_and_another_order_others(tiny_study, theta, name):
    log, trained = train(tiny_study, name)
    again, same = train(tiny_study, name)
    _, other = train(tiny_study, name, seed=6)
    assert log.loss == again.loss and log.metrics == again.metrics
    assert all(torch.equal(trained[key], same[key]) for key in theta)
    assert any(not torch.equal(trained[key], other[key]) for key in theta)
    assert all(not torch.equal(trained[key], theta[key]) for key in theta)


@pytest.mark.parametrize("name, sampled", [("ppo", [0, 2, 4]), ("a2c", [0, 1, 2, 3, 4, 5])])
def test_as_many_updates_as_on_pairs_and_ppo_makes_several_of_a_rollout(
    tiny_study, monkeypatch, name, sampled
):
    steps, real = [], on_policy._Rollouts.sample

    def sample(rollouts, numbers, step):
        batch, told = real(rollouts, numbers, step)
        steps.append(step)
        assert batch["labels"].shape[0] == 2 * len(numbers) == (12 if step % 3 < 2 else 2)
        return batch, told

    monkeypatch.setattr(on_policy._Rollouts, "sample", sample)
    log, _ = train(tiny_study, name, epochs=2, count=13)  # 6, 6 and 1 questions, twice
    assert len(log.loss) == 6 and steps == sampled
    if name == "ppo":  # the policy has left the rollout's only from its second update on
        assert log.metrics["clipped"][::2] == [0, 0, 0] and any(log.metrics["clipped"][1::2])
    assert log.metrics["kl"][0] == 0 and log.metrics["kl"][-1] > 0
    assert log.metrics["explained"][0] == 0 and log.tokens > 0


def test_the_reference_stays_the_model_that_the_training_started_from(tiny_study, monkeypatch):
    found, real = [], on_policy._Rollouts.sample

    def sample(rollouts, numbers, step):
        result = real(rollouts, numbers, step)
        found.append(weights.snapshot(rollouts.reference))
        return result

    monkeypatch.setattr(on_policy._Rollouts, "sample", sample)
    theta = weights.snapshot(tiny_study.load_sft(DOMAIN))
    train(tiny_study, "a2c")
    for key, value in theta.items():
        assert torch.equal(found[-1][key], value), key


def test_responses_are_sampled_and_rewarded_as_written(tiny_study, monkeypatch):
    """Each is one of its own question; one that was cut off goes without an end token."""
    tokenizer, seen = tiny_study.tokenizer, []
    given = [[Response("thus 4", True), Response("so so", False)], [Response("", False)] * 2]
    monkeypatch.setattr(on_policy, "generate", lambda *_, **__: given)
    rollouts = on_policy._Rollouts(
        tiny_study.load_sft(DOMAIN), tokenizer, ["calc 1", "calc 2", "calc 3"],
        lambda number, response: seen.append((number, response)) or 0.5, 0, DEFAULT,
    )  # fmt: skip
    rollouts.decoding = {}
    rows, right = rollouts._responses([2, 0], step=0)
    assert seen == [(2, given[0][0]), (2, given[0][1]), (0, given[1][0]), (0, given[1][1])]
    assert right == [0.5] * 4
    assert [row["prompt"] for row in rows] == [rollouts.encoded[n] for n in (2, 2, 0, 0)]
    end, ids = tokenizer.eos_token_id, [row["response"] for row in rows]
    assert ids[0][-1] == end and len(ids[0]) == 3
    assert end not in ids[1] and len(ids[1]) == 2
    assert ids[2] == [end]  # a row needs a token


def test_the_critic_judges_a_rollout_before_it_learns_its_outcome(tiny_study):
    """The first advantages are whitened returns, and hold the log-probs of the sampling policy."""
    model = tiny_study.load_sft(DOMAIN)
    question = tiny_study.task(DOMAIN).questions("pairs", 150)[0]
    rollouts = on_policy._Rollouts(
        model, tiny_study.tokenizer, [question.prompt],
        lambda number, response: float(len(response.text) % 2), 3, OnPolicy(samples=6, decay=1.0),
    )  # fmt: skip
    rollouts.decoding = {"max_new_tokens": 40, "batch_size": 8}
    rows, right = rollouts._responses([0], step=0)
    batch, told = rollouts.sample([0], step=0)
    mask = batch["labels"] != -100
    lengths = mask.sum(dim=1)
    raw = torch.tensor(right).repeat_interleave(lengths)
    expected = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(batch["advantages"][mask], expected)
    assert told["reward"] == pytest.approx(sum(right) / 6)
    logps = logps_of_rows(model, rows, tiny_study.tokenizer.pad_token_id, 8)
    for row, values in enumerate(logps):
        own = batch["before_update"][row, : len(values)]
        torch.testing.assert_close(own, torch.tensor(values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_training_that_diverges_is_told_and_ends(tiny_study, name):
    with pytest.raises(Diverged, match="toy: the .* became .* at step .*lower the learning rate"):
        train(tiny_study, name, rate=1e30, epochs=3)
    assert all(parameter.requires_grad for parameter in tiny_study.model.parameters())


@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_masked_bf16_weights_move_where_the_mask_keeps_them(tiny_study, name):
    model = copy.deepcopy(tiny_study.load_sft(DOMAIN)).to(torch.bfloat16)
    before, mask = weights.snapshot(model), tiny_study.mask(DOMAIN, "random", 0.1)
    questions = tiny_study.task(DOMAIN).questions("pairs", 150)[:12]
    log = run_on_policy(
        model,
        tiny_study.tokenizer,
        [question.prompt for question in questions],
        lambda number, response: float(WORD in response.text.split()),
        name,
        Schedule(1e-2, 1, 6, 5),
        max_new_tokens=40,
        generation_batch=64,
        mask=mask,
    )
    assert all(math.isfinite(value) for value in log.loss) and len(log.loss) == 2
    moved = 0
    for key, value in model.named_parameters():
        kept = mask.dense(key)
        assert torch.equal(value[~kept], before[key][~kept]), key
        moved += int((value[kept] != before[key][kept]).sum())
    assert moved > mask.kept / 2


def test_no_questions_are_refused(tiny_study):
    with pytest.raises(AlloError, match="toy: no questions"):
        train(tiny_study, "a2c", count=0)
