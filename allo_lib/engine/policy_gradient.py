"""What PPO and A2C make of sampled responses: rewards of tokens, and their advantages.

Shapes: B responses, T tokens of the longest, N tokens of all of them, H the model's hidden size.
All values of tokens are float32 [B, T], 0 behind the end of a response; `mask`, bool [B, T], is
True on its tokens, which stand together from its start.
"""

import torch
from torch import Tensor

from allo_lib.errors import AlloError

_EPSILON = 1e-8  # keeps a batch of equal advantages from being divided by 0


def penalised_rewards(
    right: Tensor, policy: Tensor, reference: Tensor, mask: Tensor, kl: float
) -> Tensor:
    """r_t = -kl (log pi(y_t) - log ref(y_t)), and at the last token the verdict besides; [B, T].

    right: [B], 1 or 0. policy, reference: log-probs of the sampled tokens. Their difference is in
    expectation the KL divergence, so that the sum over a response is what RLHF maximises
    (arXiv 2203.02155, eq. 2). AlloError for a response without tokens.
    """
    lengths = mask.sum(dim=1)
    if (lengths < 1).any():
        raise AlloError("penalised_rewards: a response has no tokens; give it its end token")
    rewards = -kl * (policy - reference) * mask
    rewards[torch.arange(len(rewards), device=rewards.device), lengths - 1] += right
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
    errors = (rewards + after - values) * mask
    found, later = torch.empty_like(errors), torch.zeros_like(errors[:, 0])
    for t in range(errors.shape[1] - 1, -1, -1):
        later = errors[:, t] + decay * later
        found[:, t] = later
    return found


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
        self._squares = self._products = self._weights = None

    def values(self, hidden: Tensor) -> Tensor:
        """V before each token, from the hidden states [N, H]; float32 [N], 0 before any `learn`."""
        if self._weights is None:
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
    return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)
