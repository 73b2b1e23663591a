"""PPO and A2C: the policy in training answers questions, and a verifier rewards the right answers.

A *rollout* is the responses to one step's questions, sampled by the policy as it is then. A2C makes
one update of it, PPO several, whose steps its clipped ratio bounds. Reward of a response: 1 if it
has ended and is right, else 0; of a token: less a penalty for leaving the model that the training
started from. Advantages are generalised ones (`advantages`) over a linear critic.

How this differs from common practice, and so from what "Vanilla PPO" and "PPO A2C" of the paper
are likely to be (it names them and tells no settings): the critic is a ridge regression on the
policy's last hidden states, not a second language model (hence "PPO, linear critic"); there is no
reward model, no entropy bonus, and no clipping of values; the training is as short as that of the
methods on pairs: as many updates, each of as many responses, of which PPO samples only every second
one again. Responses are encoded again from their texts, as those of pairs are: ids may differ from
the sampled ones where a tokenizer has several ways to write a text.

The loop is not `trainer.train`, whose rows are there before it begins: here every step's are
sampled. An interrupted training starts over, and ends with the same bits.

Shapes: B responses, T tokens of the longest, N tokens of all of them, H the model's hidden size.
All values of tokens are float32 [B, T], 0 behind the end of a response; `mask`, bool [B, T], is
True on its tokens, which stand together from its start.
"""

import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from allo_lib.engine.batching import Row, collate
from allo_lib.engine.encoding import encode_prompt, encode_response
from allo_lib.engine.forward import before_responses, layout_of, response_logps, to_device
from allo_lib.engine.generation import Response, generate
from allo_lib.engine.trainer import Log, Numbers, Schedule
from allo_lib.errors import AlloError
from allo_lib.method import values_unread
from allo_lib.method.losses import IGNORED, Batch, objective
from allo_lib.method.masked_adamw import MaskedAdamW
from allo_lib.method.neurons import NeuronMask
from allo_lib.seeds import derive

_EPSILON = 1e-8  # keeps a batch of equal advantages from being divided by 0
_PRINT_EVERY = 15.0  # seconds between progress lines, short runs print none


@dataclass(frozen=True)
class OnPolicy:
    """Settings of PPO and A2C that no profile changes."""

    samples: int = 2  # responses a question: as many rows a step as a step on pairs has
    passes: int = 2  # updates of PPO per rollout; TRL: 4, which so few steps leave little data
    # Penalty per nat. TRL: .05, but for rewards of several units; at that the penalty of some 30
    # tokens drowned a reward of 1, and in our trials a planted reward was hardly learned.
    kl: float = 0.01
    decay: float = 0.95  # lambda of the advantages; TRL's default, as is no discount
    ridge: float = 0.1  # of the critic, see there
    memory: float = 0.9


DEFAULT = OnPolicy()


def run_on_policy(
    model: Any,
    tokenizer: Any,
    prompts: list[Any],
    reward: Callable[[int, Response], float],
    name: str,
    schedule: Schedule,
    *,
    max_new_tokens: int,
    generation_batch: int,
    mask: NeuronMask | None = None,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    label: str = "training",
    settings: OnPolicy = DEFAULT,
) -> Log:
    """Train `model` in place by "ppo" or "a2c" and return the log.

    Args:
        prompts: the questions, as `encoding.encode_prompt` takes them. An epoch has the steps of as
            many pairs; a rollout is that of the questions of its first step.
        reward: (number of the prompt, response) -> its reward, 0 to 1.
        mask: the neurons that are trained; None for all.
        generation_batch: responses that are decoded together.

    The log's metrics, per step: `reward` and `kl` of the rollout (means a response; nats a token),
    `explained` (share of the returns' variance that the critic foresaw), `clipped` (PPO's share of
    tokens whose ratio is beyond the clip), `grad_norm`.

    Raises:
        AlloError: no prompts.
        Diverged: log-probs, loss or gradient are NaN or infinite, before they change anything.
    """
    if not prompts:
        raise AlloError(f"{label}: no questions to train on; give at least one")
    started = printed = time.perf_counter()
    decoding = {"max_new_tokens": max_new_tokens, "batch_size": generation_batch}
    # Before the optimizer, whose hooks the copy of the starting model must not have.
    rollouts = _Rollouts(model, tokenizer, prompts, reward, schedule.seed, settings, decoding)
    optimizer = MaskedAdamW(
        model, mask, lr=schedule.learning_rate, weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
    )  # fmt: skip
    steps, log = _order(len(prompts), schedule), Log()
    scheduler = schedule.rates(optimizer, len(steps))
    loss_of = objective(name, beta=1.0)  # of methods on pairs
    passes = settings.passes if name == "ppo" else 1
    with contextlib.closing(optimizer), Numbers(optimizer, log, label) as numbers:
        for step, chosen in enumerate(steps):
            if step % passes == 0:
                batch, rollout = rollouts.sample(chosen, step)
            model.train()
            logps = response_logps(model, batch)
            with values_unread():
                loss, metrics = loss_of(logps, batch)
            numbers.forward(logps, loss, rollout | metrics)
            loss.backward()
            optimizer.step()
            scheduler.step()
            numbers.step(step)
            if log.loss and time.perf_counter() - printed >= _PRINT_EVERY:
                printed, right = time.perf_counter(), log.metrics["reward"][-1]
                print(f"{label}: step {step + 1} of {len(steps)}, reward {right:.3f}", flush=True)
    model.eval()
    log.seconds = round(time.perf_counter() - started, 3)
    return log


def _order(count: int, schedule: Schedule) -> list[list[int]]:
    """Numbers of the questions of every step; each epoch in an order of its own."""
    steps = []
    for epoch in range(schedule.epochs):
        generator = torch.Generator().manual_seed(derive(schedule.seed, "epoch", epoch))
        order = torch.randperm(count, generator=generator)
        steps += [part.tolist() for part in order.split(schedule.batch_size)]
    return steps[: schedule.max_steps]


@dataclass
class _Rollouts:
    """Makes rollouts of a policy; keeps the model it started from, and the critic."""

    model: Any
    tokenizer: Any
    prompts: list[Any]
    reward: Callable[[int, Response], float]
    seed: int
    settings: OnPolicy
    decoding: dict[str, Any]  # of `generate`: max_new_tokens, batch_size

    def __post_init__(self) -> None:
        self.encoded = [encode_prompt(self.tokenizer, prompt) for prompt in self.prompts]
        self.layout = layout_of(self.model, self.tokenizer.pad_token_id)
        self.reference = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.critic = Critic(self.settings.ridge, self.settings.memory)

    @torch.no_grad()
    def sample(self, numbers: list[int], step: int) -> tuple[Batch, dict[str, Tensor]]:
        """The batch of the responses to these questions, and what there is to log of it."""
        rows, verdicts = self.responses(numbers, step)
        batch = to_device(collate(rows, self.layout), self.model)
        mask = batch["labels"] != IGNORED
        right = torch.tensor(verdicts, device=mask.device)  # [B]
        policy = response_logps(self.model, batch)  # [B, T]
        reference = response_logps(self.reference, batch)
        rewards = penalised_rewards(right, policy, reference, mask, self.settings.kl)
        seen = returns(rewards)[mask]  # [B, T] -> [N]
        hidden = before_responses(self.model, batch)  # [N, H]
        values = torch.zeros_like(rewards)
        values[mask] = self.critic.values(hidden)
        raw = advantages(rewards, values, mask, self.settings.decay)
        batch |= {"before_update": policy, "advantages": whitened(raw, mask)}
        spread = seen.var(correction=0).double()
        explained = 1 - (seen - values[mask]).var(correction=0).double() / spread
        rollout = {
            "reward": right.mean(),
            "kl": (policy - reference)[mask].mean(),
            "explained": torch.where(spread > 1e-6, explained, 0.0),
        }
        self.critic.learn(hidden, seen)  # last: a baseline must not know the outcome
        return batch, rollout

    def responses(self, numbers: list[int], step: int) -> tuple[list[Row], list[float]]:
        """Rows of the responses sampled to these questions, and the reward of each."""
        groups = generate(
            self.model,
            self.tokenizer,
            [self.prompts[n] for n in numbers],
            **self.decoding,
            samples=self.settings.samples,
            temperature=1.0,  # the policy itself: advantages are of its own samples
            seed=derive(self.seed, "rollout", step),
        )
        rows, right = [], []
        for number, group in zip(numbers, groups, strict=True):
            for response in group:
                ids = encode_response(self.tokenizer, response.text)
                if not response.ended:
                    ids = ids[:-1] or ids  # cut off: no end token, unless nothing else is there
                rows.append({"prompt": self.encoded[number], "response": ids})
                right.append(float(self.reward(number, response)))
        return rows, right


def penalised_rewards(
    right: Tensor, policy: Tensor, reference: Tensor, mask: Tensor, kl: float
) -> Tensor:
    """r_t = -kl (log pi(y_t) - log ref(y_t)), and at the last token the verdict besides; [B, T].

    right: [B], 1 or 0. policy, reference: log-probs of the sampled tokens. Their difference is in
    expectation the KL divergence, so that the sum over a response is what RLHF maximises
    (arXiv 2203.02155, eq. 2).
    """
    rewards = -kl * (policy - reference) * mask
    rewards[torch.arange(len(rewards), device=rewards.device), mask.sum(dim=1) - 1] += right
    return rewards


def returns(rewards: Tensor) -> Tensor:
    """The sum of rewards from each token on, undiscounted; [B, T]."""
    return rewards.flip(1).cumsum(dim=1).flip(1)


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, decay: float) -> Tensor:
    """Generalised advantage estimation, arXiv 1506.02438, eq. 16 with gamma = 1; [B, T].

    A_t = sum_l decay^l d_{t+l}, d_t = r_t + V_{t+1} - V_t, V = 0 behind the end
    values: V_t, the expected return before token t. decay: lambda in [0, 1]; 1 is `returns` less V,
    0 is d_t alone.
    """
    values = values * mask
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    result = (rewards + after - values) * mask  # d_t
    for t in range(result.shape[1] - 2, -1, -1):
        result[:, t] += decay * result[:, t + 1]
    return result


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """The values of tokens with mean 0 and standard deviation 1 over all tokens; [B, T]."""
    own = values[mask]
    spread = own.std(correction=0)
    return (values - own.mean()) / (spread + _EPSILON) * mask


class Critic:
    """V(s) = w . [h, 1]: expected return as a linear function of the policy's last hidden state.

    w is the ridge regression of all returns seen so far on the hidden states they were seen at,
    older batches counting less, as the policy that made them is gone. It is solved for in closed
    form, in float64 on the CPU: no learning rate to choose, no gradient into the policy.

    ridge: penalty in units of the mean square of a feature. memory: weight of the batches before,
    per batch.
    """

    def __init__(self, ridge: float, memory: float):
        self.ridge, self.memory = ridge, memory
        self._squares: Tensor | None = None  # [H + 1, H + 1]
        self._products = self._weights = torch.empty(0)  # [H + 1]

    def values(self, hidden: Tensor) -> Tensor:
        """V before each token, from the hidden states [N, H]; float32 [N], 0 before any `learn`."""
        if self._squares is None:
            return torch.zeros(len(hidden), device=hidden.device)
        return (_features(hidden) @ self._weights).float().to(hidden.device)

    def learn(self, hidden: Tensor, seen: Tensor) -> None:
        """Take in what came of the states [N, H]: `seen`, [N], the returns from there."""
        features = _features(hidden)
        squares, products = features.T @ features, features.T @ seen.double().cpu()
        if self._squares is not None:
            squares += self.memory * self._squares
            products += self.memory * self._products
        self._squares, self._products = squares, products
        penalty = self.ridge * squares.diagonal().mean()
        eye = torch.eye(len(squares), dtype=squares.dtype)
        self._weights = torch.linalg.solve(squares + penalty * eye, products)


def _features(hidden: Tensor) -> Tensor:
    hidden = hidden.detach().double().cpu()
    return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)  # [N, H + 1]
