"""Muon in float32: momentum whose matrices are orthogonalised before they are applied (Jordan et al., 2024).

torch.optim.Muon computes in bfloat16, which a CPU without such instructions does a hundred times slower than float32. Matrices
of one shape are stacked, so that a step is a few batched products.
"""

from collections import defaultdict

import torch


COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from the publication of the method


class Muon(torch.optim.Optimizer):
    """For the weight matrices between the first and the last layer.

    Args:
        params: matrices.
        lr: learning rate; the root mean square of an update is 0.5 lr.
        momentum: of the Nesterov average.
        weight_decay: decoupled, times lr.
        steps: of the iteration that orthogonalises.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.3, steps: int = 4):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for weights in by_shape.values():
                self._update(weights, group)

    def _update(self, weights: list[torch.Tensor], group: dict):
        updates = []
        for weight in weights:
            average = self.state[weight].setdefault("average", torch.zeros_like(weight))
            average.lerp_(weight.grad, 1 - group["momentum"])
            updates.append(torch.lerp(weight.grad, average, group["momentum"]))
        for weight, update in zip(weights, orthogonalised(torch.stack(updates), group["steps"]), strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update, alpha=-0.5 * group["lr"] * max(weight.shape) ** 0.5)


def orthogonalised(matrices: torch.Tensor, steps: int) -> torch.Tensor:
    """[count, rows, columns] with all singular values brought near 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
