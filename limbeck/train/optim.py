"""Optimisers as settings: which rule, which rates, which parameters are spared from weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim import Optimizer as TorchOptimizer

from limbeck.errors import UserError


@dataclass(frozen=True)
class Optimizer:
    """Which rule updates a part.

    Args:
        name: the rule.
        lr: base learning rate; the trainer's schedule multiplies it.
        weight_decay: L2 for sgd, adam and lars, decoupled for adamw.
        decay_norm_and_bias: apply weight decay to biases and normalisation scales too (every parameter of less than
            two dimensions); LARS also adapts them then. Parameters that a method marks by `spared = True` are never
            decayed nor adapted.
        momentum: for sgd and lars; `nesterov` for sgd.
        betas: for adam and adamw.
        trust: LARS's trust coefficient (eeta).
    """

    name: Literal["sgd", "adam", "adamw", "lars"] = "sgd"
    lr: float = 0.1
    weight_decay: float = 0.0
    decay_norm_and_bias: bool = True
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    trust: float = 1e-3

    def build(self, parameters: Iterable[nn.Parameter]) -> TorchOptimizer:
        """The optimiser of these parameters."""
        parameters = list(parameters)
        if not parameters:
            raise UserError("there is nothing to train: no parameter of this part requires a gradient")
        spared = [p for p in parameters if getattr(p, "spared", False) or not (self.decay_norm_and_bias or p.ndim >= 2)]
        ids = {id(p) for p in spared}
        decayed = [p for p in parameters if id(p) not in ids]
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": self.weight_decay}] if decayed else []
        if spared:
            groups.append({"params": spared, "weight_decay": 0.0, "adapt": False})
        foreach = True  # one kernel for all tensors: a quarter of the time of the loop on a CPU
        match self.name:
            case "sgd":
                nesterov = self.nesterov and self.momentum > 0
                return SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=nesterov, foreach=foreach)
            case "adam":
                return Adam(groups, lr=self.lr, betas=self.betas, foreach=foreach)
            case "adamw":
                return AdamW(groups, lr=self.lr, betas=self.betas, foreach=foreach)
            case "lars":
                return LARS(groups, lr=self.lr, momentum=self.momentum, trust=self.trust)


class LARS(TorchOptimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) with classic momentum, as SimCLR uses it.

    g <- g + wd w;  r = trust ||w|| / ||g|| (1 where either norm is 0);  v <- m v + lr r g;  w <- w - v.
    Groups with `adapt=False` take r = 1. The rate sits inside the buffer, so a change of it acts on new gradients only.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 1e-3):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for weight in (p for p in group["params"] if p.grad is not None):
                gradient = weight.grad.add(weight, alpha=group["weight_decay"])
                step = gradient * group["lr"]
                if group["adapt"]:
                    step = step * _trust_ratio(weight, gradient, group["trust"])
                buffer = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                weight.sub_(buffer.mul_(group["momentum"]).add_(step))
        return loss


def _trust_ratio(weight: Tensor, gradient: Tensor, trust: float) -> Tensor:
    weight_norm, gradient_norm = weight.norm(), gradient.norm()
    ratio = trust * weight_norm / gradient_norm
    return torch.where((weight_norm > 0) & (gradient_norm > 0), ratio, torch.ones_like(ratio))
