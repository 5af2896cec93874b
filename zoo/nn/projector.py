"""The heads of siamese networks: small MLPs with BatchNorm that project features or predict one view from another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from zoo.errors import ZooError

OutputNorm = Literal["none", "plain", "affine"]


def mlp_head(
    widths: Sequence[int],
    norm: bool | Sequence[bool] = True,
    output_norm: OutputNorm = "none",
    bias: bool | None = None,
    output_bias: bool | None = None,
) -> nn.Sequential:
    """Linear layers (N, widths[0]) -> (N, widths[-1]); each but the last is followed by BatchNorm, if any, and ReLU.

    The layers are numbered as they stand: Linear 0, BatchNorm 1, ReLU 2, Linear 3, ...

    - SimSiam (arXiv 2011.10566, section 3): projector
      ``mlp_head([D, D, D, d], output_norm="plain", output_bias=True)``, whose last bias is frozen;
      predictor ``mlp_head([d, d // 4, d], output_bias=True)``.
    - MoCo v3 (arXiv 2104.02057): ViT's projector ``mlp_head([D, 4096, 4096, 256], output_norm="plain")`` and predictor
      ``mlp_head([256, 4096, 256], output_norm="plain")``; those of ResNet-50 have two layers each, and the predictor no
      last BatchNorm.
    - Asym-Siam (arXiv 2204.00613): ``mlp_head([D, D, D, 128], norm=[True, False], bias=True)``.

    Args:
        widths: of the features, of the hidden layers and of the output.
        norm: whether BatchNorm follows the hidden layers: all of them, or each.
        output_norm: BatchNorm on the output: without ("plain") or with ("affine") scale and shift of its own.
        bias: of the hidden layers; None: where no BatchNorm follows.
        output_bias: of the last layer; None: as `bias`.

    Raises:
        ZooError: fewer than two widths, or not one `norm` for each hidden layer.
    """
    hidden = len(widths) - 2
    norms = [norm] * hidden if isinstance(norm, bool) else list(norm)
    if hidden < 0 or len(norms) != hidden or min(widths) < 1:
        raise ZooError(
            f"a head wants two or more positive widths, and one norm for each hidden layer; got {list(widths)}"
            f" and {norms}"
        )
    layers: list[nn.Module] = []
    for width, following, normed in zip(widths[:-2], widths[1:-1], norms, strict=True):
        layers.append(nn.Linear(width, following, bias=not normed if bias is None else bias))
        layers += [nn.BatchNorm1d(following)] if normed else []
        layers.append(nn.ReLU(inplace=True))
    last = (
        output_bias if output_bias is not None else bias if bias is not None else output_norm == "none" and not hidden
    )
    layers.append(nn.Linear(widths[-2], widths[-1], bias=last))
    if output_norm != "none":
        layers.append(nn.BatchNorm1d(widths[-1], affine=output_norm == "affine"))
    return nn.Sequential(*layers)
