"""Focal losses on independent sigmoids (Lin et al., ICCV 2017): elementwise, of logits x and binary targets y.

With x_t = x where y = 1 and -x elsewhere, p_t = sigmoid(x_t), and alpha_t = alpha where y = 1 and 1 - alpha elsewhere
(1 where alpha is None). All are computed in at least float32: near p = 0 the gradient is steep where gamma < 1.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus

from zoo.ops.boxes import at_least_float32


def focal_term(x: Tensor, gamma: float) -> Tensor:
    """sigmoid(x)^gamma log(1 + e^x): the loss at logits x (...) where x_t = -x (equation 4)."""
    x = at_least_float32(x)
    loss = softplus(x)
    return loss if gamma == 0 else x.sigmoid().pow(gamma) * loss


def focal_star_term(x: Tensor, gamma: float, beta: float = 0.0) -> Tensor:
    """-log(sigmoid(beta - gamma x)) / gamma: the loss FL* at logits x (...) where x_t = -x (appendix A)."""
    return softplus(gamma * at_least_float32(x) - beta) / gamma


def class_weights(alpha: float | None) -> tuple[float, float]:
    """alpha_t of the positives and of the negatives; 1 for both where alpha is None."""
    return (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)


def _weighted(loss: Tensor, targets: Tensor, alpha: float | None) -> Tensor:
    positive, negative = class_weights(alpha)
    return loss if alpha is None else loss * (positive * targets + negative * (1 - targets))


def focal_loss(logits: Tensor, targets: Tensor, alpha: float | None = 0.25, gamma: float = 2.0) -> Tensor:
    """FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t) (equation 5), as the arguments (...); gamma 0 is cross entropy.

    Args:
        logits: x.
        targets: y, 0 or 1.
        alpha: weight of the positives; None for no weights.
        gamma: focusing parameter.
    """
    targets = targets.to(at_least_float32(logits).dtype)
    return _weighted(focal_term(logits * (1 - 2 * targets), gamma), targets, alpha)


def focal_loss_star(
    logits: Tensor, targets: Tensor, alpha: float | None = None, gamma: float = 2.0, beta: float = 0.0
) -> Tensor:
    """FL*(x_t) = -alpha_t log(sigmoid(gamma x_t + beta)) / gamma (appendix A), as the arguments (...).

    Args:
        logits: x.
        targets: y, 0 or 1.
        alpha: weight of the positives; None for no weights.
        gamma: steepness, more than 0.
        beta: shift.
    """
    targets = targets.to(at_least_float32(logits).dtype)
    return _weighted(focal_star_term(logits * (1 - 2 * targets), gamma, beta), targets, alpha)
