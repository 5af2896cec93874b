"""Muon and NAdam with the moments of optax, as pMF trains with them (Lu et al. 2026, arXiv 2601.22158, section 6).

Muon is Jordan's (2024, kellerjordan.github.io/posts/muon): momentum whose matrices are made about orthogonal. Neither
of PyTorch's optimisers of these names gives the digits of optax: torch.optim.Muon does not correct the bias of its
momentum and iterates in bfloat16, torch.optim.NAdam has a schedule of momenta.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zoo.errors import ZooError

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)


def orthogonalise(matrix: Tensor, steps: int = 5, coefficients: Sequence[float] = NEWTON_SCHULZ) -> Tensor:
    """A matrix (M, N) with its singular values moved to about 1, by Newton and Schulz's iteration
    x <- a x + (b (x x') + c (x x')^2) x of the matrix over its Frobenius norm."""
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (torch.linalg.vector_norm(x) + 1e-8)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + torch.addmm(square, square, square, beta=b, alpha=c) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class NAdam(Optimizer):
    """Adam with Nesterov's momentum and decoupled weight decay (optax's adamw with nesterov).

    With the moments m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g^2 after n updates, a step is lr times
    (b1 m / (1 - b1^(n+1)) + (1 - b1) g / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + eps), and lr times the decayed weight.

    Moments are float32 at least, whatever the parameter's dtype, and a resumed run takes them up so.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas, eps: of the moments.
        weight_decay: decoupled.

    Raises:
        ZooError: a value out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **defaults: Any,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ZooError(
                f"{type(self).__name__} wants lr, eps and weight_decay of 0 or more and betas in [0, 1); got"
                f" lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={tuple(betas)}"
            )
        facts = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**facts, **defaults})

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
                state = self.state[p]
                gradient = p.grad.to(torch.promote_types(p.dtype, torch.float32))
                state["step"] = state.get("step", 0) + 1
                update = self._update(group, state, gradient)
                if group["weight_decay"]:
                    update = update + group["weight_decay"] * p
                p.add_(update.to(p.dtype), alpha=-group["lr"])
        return loss

    def _update(self, group: dict[str, Any], state: dict[str, Any], gradient: Tensor) -> Tensor:
        (b1, b2), n = group["betas"], state["step"]
        ahead = _nesterov(state, gradient, b1)
        if "square" not in state:
            state["square"] = torch.zeros_like(gradient)
        state["square"].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        return ahead / ((state["square"] / (1 - b2**n)).sqrt_() + group["eps"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch, but moments keep the dtype that they were saved in."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for p, number in zip(parameters, numbers, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(p.device, copy=True)


class Muon(NAdam):
    """Muon for matrices, :class:`NAdam` at the same learning rate for everything else (optax.contrib.muon).

    The step of a matrix is the orthogonalised Nesterov momentum b m / (1 - b^(n+1)) + (1 - b) g / (1 - b^n), times
    sqrt(max(1, outputs / inputs)).

    Args:
        params: parameters, or groups of them. A group's `orthogonal` says whether its parameters of two dimensions are
            matrices; tables of embeddings are none.
        lr, betas, eps, weight_decay: as in :class:`NAdam`; betas and eps are of what is no matrix.
        momentum: b, of the matrices.
        steps: iterations of :func:`orthogonalise`.
        orthogonal: of groups that do not say it.

    Raises:
        ZooError: a value out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        steps: int = 5,
        orthogonal: bool = True,
    ) -> None:
        if not 0 <= momentum < 1 or steps < 1:
            raise ZooError(f"Muon wants 0 <= momentum < 1 and steps >= 1; got momentum={momentum}, steps={steps}")
        own = {"momentum": momentum, "steps": steps, "orthogonal": orthogonal}
        super().__init__(params, lr, betas, eps, weight_decay, **own)

    def _update(self, group: dict[str, Any], state: dict[str, Any], gradient: Tensor) -> Tensor:
        if gradient.ndim != 2 or not group["orthogonal"]:
            return super()._update(group, state, gradient)
        ahead = _nesterov(state, gradient, group["momentum"])
        outputs, inputs = gradient.shape
        return orthogonalise(ahead, group["steps"]) * max(1.0, outputs / inputs) ** 0.5


def _nesterov(state: dict[str, Any], gradient: Tensor, beta: float) -> Tensor:
    """Takes a gradient into the momentum of `state`; the momentum one step ahead, without bias."""
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(gradient)
    state["momentum"].mul_(beta).add_(gradient, alpha=1 - beta)
    n = state["step"]
    return state["momentum"] * (beta / (1 - beta ** (n + 1))) + gradient * ((1 - beta) / (1 - beta**n))
