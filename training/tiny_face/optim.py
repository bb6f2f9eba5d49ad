"""One optimizer for both networks: Muon for what multiplies, Adam for the rest, at one rate of learning."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

Tensor = torch.Tensor
# Of the quintic iteration that takes singular values towards 1; Keller Jordan's Muon.
_A, _B, _C = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, scaled to the size of Adam's steps, for tensors of two dimensions or more (convolutions
    as matrices); Adam for vectors. Few steps on two cores go further so than with Adam alone."""

    def __init__(self, parameters: Iterable[Tensor], *, momentum: float = 0.95, betas=(0.9, 0.99), decay: float = 0.0):
        super().__init__(list(parameters), {"lr": 1e-3, "momentum": momentum, "betas": betas, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                update = self._matrix if _is_matrix(parameter) else self._vector
                parameter.mul_(1 - group["lr"] * group["decay"])
                parameter.sub_(update(parameter.grad, state, group), alpha=group["lr"])

    def _matrix(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        mean = state.setdefault("mean", torch.zeros_like(grad))
        mean.lerp_(grad, 1 - group["momentum"])
        ahead = grad.lerp(mean, group["momentum"]).flatten(1)
        return orthogonal(ahead).mul_(0.2 * math.sqrt(max(ahead.shape))).view_as(grad)

    def _vector(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        first, second = group["betas"]
        mean, square = (state.setdefault(name, torch.zeros_like(grad)) for name in ("mean", "square"))
        state["count"] = count = state.get("count", 0) + 1
        mean.lerp_(grad, 1 - first)
        square.lerp_(grad.square(), 1 - second)
        return (mean / (1 - first**count)) / ((square / (1 - second**count)).sqrt() + 1e-8)


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """The nearest matrix whose singular values are all about 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x.T if tall else x).contiguous()


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim > 1 and min(parameter.shape[0], parameter[0].numel()) > 1


def rate(step: int, steps: int, peak: float, *, warm: int = 20, floor: float = 0.05) -> float:
    """Up over ``warm`` steps, level, and down to ``floor`` of the peak over the last two fifths."""
    rest = (steps - step) / (0.4 * steps)
    return peak * min((step + 1) / warm, 1.0) * (floor + (1 - floor) * min(max(rest, 0.0), 1.0))
