"""Steps in proportion to the weights (You, Gitman, Ginsburg 2017, arXiv:1708.03888): LARS, as SimCLR, BYOL, MoCo v3 and
MAE's linear probe use it, and LARC, as NVIDIA's apex defines it and the linear probes of SimSiam use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zoo.errors import ZooError


class LARS(Optimizer):
    """SGD with momentum whose step on a matrix is scaled by trust * |p| / |g|.

    For a parameter of two or more dimensions: g <- g + weight_decay * p; q = trust_coefficient * |p| / |g| (1 where
    either norm is 0); g <- q * g. For every parameter: mu <- momentum * mu + g; p <- p - lr * mu. So biases and
    normalisation scales get neither decay nor trust ratio, and the learning rate stays outside of the momentum buffer.

    Norms are taken in float32 at least, whatever the parameter's dtype; no step waits for the device.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not 0 <= momentum < 1 or trust_coefficient <= 0:
            raise ZooError(
                "LARS wants lr >= 0, weight_decay >= 0, 0 <= momentum < 1 and trust_coefficient > 0; got "
                f"lr={lr}, weight_decay={weight_decay}, momentum={momentum}, trust_coefficient={trust_coefficient}"
            )
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; `closure` (optional) recomputes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    update = update * _trust_ratio(p, update, group["trust_coefficient"])
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                state["mu"].mul_(group["momentum"]).add_(update)
                p.add_(state["mu"], alpha=-group["lr"])
        return loss


def _trust_ratio(p: Tensor, update: Tensor, trust: float) -> Tensor:
    """trust * |p| / |update| as a scalar tensor of p's dtype, 1 where either norm is zero."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    weight, gradient = (torch.linalg.vector_norm(x, dtype=dtype) for x in (p, update))
    ratio = trust * weight / gradient
    return torch.where((weight > 0) & (gradient > 0), ratio, torch.ones_like(ratio)).to(p.dtype)


class LARC(Optimizer):
    """SGD with momentum on gradients that are scaled by trust * |p| / (|g| + weight_decay * |p| + eps), q.

    For every parameter, biases too: g <- q * (g + weight_decay * p) where neither norm is 0, else g as it is and
    without decay; then mu <- momentum * mu + g; p <- p - lr * mu. So a bias that starts at 0 takes its first step
    unscaled. The norms are those of the weights and of the plain gradient, in float32 at least; no step waits for the
    device.

    Args:
        clip: q is min(q / lr, 1), so that lr * q is never larger than lr (apex's default; no linear probe uses it).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        clip: bool = False,
        eps: float = 1e-8,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not 0 <= momentum < 1 or trust_coefficient <= 0:
            raise ZooError(
                "LARC wants lr >= 0, weight_decay >= 0, 0 <= momentum < 1 and trust_coefficient > 0; got "
                f"lr={lr}, weight_decay={weight_decay}, momentum={momentum}, trust_coefficient={trust_coefficient}"
            )
        facts = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "clip": clip, "eps": eps}
        super().__init__(params, {**facts, "trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; `closure` (optional) recomputes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                dtype = torch.promote_types(p.dtype, torch.float32)
                weight, gradient = (torch.linalg.vector_norm(x, dtype=dtype) for x in (p, p.grad))
                decay = group["weight_decay"]
                ratio = group["trust_coefficient"] * weight / (gradient + decay * weight + group["eps"])
                if group["clip"] and group["lr"] > 0:
                    ratio = (ratio / group["lr"]).clamp(max=1)
                scaled = p.grad.add(p, alpha=decay) * ratio.to(p.dtype)
                update = torch.where((weight > 0) & (gradient > 0), scaled, p.grad)
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                state["mu"].mul_(group["momentum"]).add_(update)
                p.add_(state["mu"], alpha=-group["lr"])
        return loss
