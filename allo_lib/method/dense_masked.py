"""The released code's optimizer, to compare with: dense moments, and a dense mask on the update."""

import torch


class DenseMaskedAdamW:
    """What the released code does: AdamW with dense moments whose update is times a dense mask.

    Its mask is bfloat16 and its masters are float32, as there. It saves neither memory nor time;
    here it is the thing to compare with. `step` reads `parameter.grad`.
    """

    def __init__(self, model, mask, lr: float, betas=(0.9, 0.999), eps: float = 1e-8):
        self.lr, self.betas, self.eps, self.count = lr, betas, eps, 0
        self.rows = []
        for name, parameter in model.named_parameters():
            dense = mask.dense(name).to(parameter.device, torch.bfloat16)
            whole = parameter.dtype == torch.float32
            master = parameter.detach() if whole else parameter.detach().float()
            moments = torch.zeros_like(master), torch.zeros_like(master)
            self.rows.append((parameter, dense, master, *moments))

    @torch.no_grad()
    def step(self) -> None:
        """AdamW without decay (arXiv 1711.05101, algorithm 2), the update times the mask."""
        self.count += 1
        first, second = (1 - beta**self.count for beta in self.betas)
        for parameter, mask, master, mean, square in self.rows:
            gradient = parameter.grad.float()
            mean.lerp_(gradient, 1 - self.betas[0])
            square.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
            update = (mean / first) / ((square / second).sqrt_() + self.eps)
            master.sub_(update * mask, alpha=self.lr)
            if master.data_ptr() != parameter.data_ptr():
                parameter.copy_(master)
            parameter.grad = None

    def state_bytes(self) -> int:
        """Mask, moments, masters where they are copies, and the dense gradient."""
        return sum(
            mask.nbytes
            + mean.nbytes
            + square.nbytes
            + (0 if master.data_ptr() == parameter.data_ptr() else master.nbytes)
            + parameter.nbytes
            for parameter, mask, master, mean, square in self.rows
        )
