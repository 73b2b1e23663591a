"""PPO and A2C: rewards, advantages and critic by hand; and that they learn what is rewarded."""

import math
from dataclasses import replace

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
    torch.testing.assert_close(returns(found), torch.tensor([[1.15, 1.2, 1.2], [-0.3, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("decay", "first"),
    [
        (0.0, [0.4, -0.2, 0.6]),  # .6 - .2, .4 - .6, 1 - .4
        (0.5, [0.4 + 0.5 * (-0.2 + 0.5 * 0.6), -0.2 + 0.5 * 0.6, 0.6]),
        (1.0, [0.8, 0.4, 0.6]),  # the return, 1, less the values
    ],
)
def test_advantages_by_hand(decay, first):
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.0, 0.0]])
    values = torch.tensor([[0.2, 0.6, 0.4], [0.1, 9.0, 9.0]])  # 9: behind the end, nobody's
    found = advantages(rewards, values, MASK, decay)
    torch.testing.assert_close(found, torch.tensor([first, [0.4, 0.0, 0.0]]))


def test_whitened_advantages_have_mean_0_and_deviation_1_over_tokens():
    found = whitened(draw(2, 3) * MASK, MASK)
    inside = found[MASK].numpy()
    assert inside.mean() == pytest.approx(0, abs=1e-6) and inside.std() == pytest.approx(1)
    assert not found[~MASK].any()
    assert not whitened(3.0 * MASK, MASK).any()  # nothing is better than anything else


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
    np.testing.assert_allclose(critic.values(draw(4, 5, seed=7)).numpy(), expected, atol=1e-6)


# --- training ---

WORD = "thus"  # about a third of the study's responses hold it


def says_word(number, response) -> float:
    return float(WORD in response.text.split())


def prompts_of(study, count: int) -> list:
    return [question.prompt for question in study.task(DOMAIN).questions("pairs", 150)[:count]]


def train(study, name, rate=3e-3, seed=5, epochs=1, count=12, **settings):
    """(log, weights) of a training on `count` questions, 6 a step, rewarded for one word."""
    model = study.load_sft(DOMAIN)
    log = run_on_policy(
        model,
        study.tokenizer,
        prompts_of(study, count),
        says_word,
        name,
        Schedule(rate, epochs, 6, seed),
        max_new_tokens=40,
        generation_batch=64,
        label="toy",
        settings=OnPolicy(**settings),
    )
    return log, weights.snapshot(model)


@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_a_rewarded_word_becomes_more_frequent(tiny_study, name):
    log, _ = train(tiny_study, name, rate=2e-3, epochs=8, count=48, kl=0.0, samples=4)
    rewards, eighth = log.metrics["reward"], len(log.loss) // 8
    before, after = (sum(part) / eighth for part in (rewards[:eighth], rewards[-eighth:]))
    assert after > before + 0.2, (before, after)


def test_a_training_ends_with_its_most_steps():
    schedule = Schedule(1e-3, 2, 6, 5, max_steps=3)
    assert [len(step) for step in on_policy._order(13, schedule)] == [6, 6, 1]
    assert len(on_policy._order(13, replace(schedule, max_steps=None))) == 6


@pytest.mark.parametrize("name, sampled", [("ppo", [0, 2, 4]), ("a2c", [0, 1, 2, 3, 4, 5])])
def test_the_same_seed_gives_the_same_bits_and_ppo_makes_several_updates_of_a_rollout(
    tiny_study, theta, monkeypatch, name, sampled
):
    steps, references, real = [], [], on_policy._Rollouts.sample

    def sample(rollouts, numbers, step):
        batch, told = real(rollouts, numbers, step)
        steps.append(step)
        references.append(weights.snapshot(rollouts.reference))
        assert batch["labels"].shape[0] == 2 * len(numbers) == (12 if step % 3 < 2 else 2)
        return batch, told

    settings = dict(epochs=2, count=13)  # 6, 6 and 1 questions, twice
    again, same = train(tiny_study, name, **settings)
    _, other = train(tiny_study, name, seed=6, **settings)
    monkeypatch.setattr(on_policy._Rollouts, "sample", sample)
    log, trained = train(tiny_study, name, **settings)
    assert log.loss == again.loss and log.metrics == again.metrics
    for key, value in theta.items():
        assert torch.equal(trained[key], same[key])
        assert not torch.equal(trained[key], value)
        assert torch.equal(references[-1][key], value)  # the model that the training started from
    assert any(not torch.equal(trained[key], other[key]) for key in theta)
    assert len(log.loss) == 6 and steps == sampled
    if name == "ppo":  # the policy has left the rollout's only from its second update on
        assert log.metrics["clipped"][::2] == [0, 0, 0] and any(log.metrics["clipped"][1::2])
    assert log.metrics["kl"][0] == 0 and log.metrics["kl"][-1] > 0
    assert log.metrics["explained"][0] == 0


def rollouts_of(study, prompts, reward, settings=DEFAULT, seed=0):
    decoding = {"max_new_tokens": 40, "batch_size": 8}
    model = study.load_sft(DOMAIN)
    return on_policy._Rollouts(model, study.tokenizer, prompts, reward, seed, settings, decoding)


def test_responses_are_sampled_and_rewarded_as_written(tiny_study, monkeypatch):
    """Each is one of its own question; one that was cut off goes without an end token."""
    seen, end = [], tiny_study.tokenizer.eos_token_id
    given = [[Response("thus 4", True), Response("so so", False)], [Response("", False)] * 2]
    monkeypatch.setattr(on_policy, "generate", lambda *_, **__: given)
    rollouts = rollouts_of(
        tiny_study, ["calc 1", "calc 2", "calc 3"], lambda *both: seen.append(both) or 0.5
    )
    rows, right = rollouts.responses([2, 0], step=0)
    assert seen == [(2, given[0][0]), (2, given[0][1]), (0, given[1][0]), (0, given[1][1])]
    assert right == [0.5] * 4
    assert [row["prompt"] for row in rows] == [rollouts.encoded[n] for n in (2, 2, 0, 0)]
    ids = [row["response"] for row in rows]
    assert ids[0][-1] == end and len(ids[0]) == 3
    assert end not in ids[1] and len(ids[1]) == 2
    assert ids[2] == [end]  # a row needs a token


def test_the_critic_judges_a_rollout_before_it_learns_its_outcome(tiny_study):
    """The first advantages are whitened returns, and hold the log-probs of the sampling policy."""
    rollouts = rollouts_of(
        tiny_study, prompts_of(tiny_study, 1), lambda number, one: float(len(one.text) % 2),
        OnPolicy(samples=6, decay=1.0), seed=3,
    )  # fmt: skip
    rows, right = rollouts.responses([0], step=0)
    batch, told = rollouts.sample([0], step=0)
    mask = batch["labels"] != -100
    raw = torch.tensor(right).repeat_interleave(mask.sum(dim=1))
    expected = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(batch["advantages"][mask], expected)
    assert told["reward"] == pytest.approx(sum(right) / 6)
    logps = logps_of_rows(rollouts.model, rows, tiny_study.tokenizer.pad_token_id, 8)
    for own, values in zip(batch["before_update"], logps, strict=True):
        torch.testing.assert_close(own[: len(values)], torch.tensor(values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_training_that_diverges_is_told_and_ends(tiny_study, name):
    with pytest.raises(Diverged, match="toy: the .* became .* at step .*lower the learning rate"):
        train(tiny_study, name, rate=1e30, epochs=3)
    assert all(parameter.requires_grad for parameter in tiny_study.model.parameters())
    with pytest.raises(AlloError, match="toy: no questions"):
        train(tiny_study, name, count=0)
