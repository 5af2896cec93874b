"""timm's protocol of a classifier: features, head, intermediates, checkpointing, and what its tools ask for."""

# The annotations are evaluated here: TorchScript and torch.fx read those of networks.
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from zoo.errors import ZooError
from zoo.nn.recompute import recompute


def intermediate_indices(indices: int | Sequence[int] | None, count: int, what: str = "intermediates") -> list[int]:
    """Which of `count` intermediates are meant, counted from the front: the last n for a number, all for None.

    Raises:
        ZooError: none, or one that is not there; `what` they are called.
    """
    if indices is None or isinstance(indices, int):
        indices = range(count - (count if indices is None else indices), count)
    if not indices or not all(-count <= i < count for i in indices):
        raise ZooError(f"there are {what} 0 to {count - 1}, not {list(indices)}")
    return sorted({i % count for i in indices})


class StagedClassifier(nn.Module):
    """A convolutional classifier: a stem, stages of units, what ends them, and a linear classifier of pooled features.

    A network builds its parts, `stages` (each an nn.Sequential), `feature_info` (of the stem and of each stage),
    `num_features`, `grad_checkpointing` and `drop_rate`, calls :meth:`reset_classifier`, and says what its stem
    (:meth:`_stem`) and its end (:meth:`_end`) compute.
    """

    if TYPE_CHECKING:  # TorchScript would take them for its own types
        stages: nn.ModuleList
        feature_info: list[dict[str, int | str]]
        num_features: int
        grad_checkpointing: bool
        drop_rate: float

    def _stem(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the stem's intermediate is made of (:meth:`_stem_feature`), and what the first stage takes."""
        raise NotImplementedError

    def _stem_feature(self, inner: Tensor) -> Tensor:
        return inner

    def _end(self, x: Tensor) -> Tensor:
        """The last stage's output as the classifier takes it."""
        return x

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one for `num_classes` classes (0: none), and the pooling if given."""
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise ZooError(f"global_pool must be 'avg' or '', not {global_pool!r}")
            self.global_pool = global_pool
        if num_classes and not self.global_pool:
            raise ZooError(f"a classifier of {num_classes} classes wants global_pool 'avg'")
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(self.fc, nn.Linear):
            nn.init.zeros_(self.fc.bias)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.unused
    def _recomputed(self, stage: nn.Module, x: Tensor) -> Tensor:
        for unit in stage.children():
            x = recompute(unit, x)
        return x

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to features (B, num_features, h, w) behind the end."""
        _, x = self._stem(images)
        for stage in self.stages:
            if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
                x = self._recomputed(stage, x)
            else:
                x = stage(x)
        return self._end(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, D, h, w) to logits (B, num_classes), or to pooled features (B, D) with `pre_logits`."""
        if self.global_pool:
            x = x.mean(dim=(2, 3))
        if self.drop_rate > 0.0:
            x = dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(images))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of the stem (0) and of the stages (1, 2, ...), as timm names them, before any further activation.

        Args:
            x: images (B, C, H, W).
            indices: which; the last n for a number, all for None.
            norm: the last stage's behind the end.
            stop_early: compute no more than is asked for.
            output_fmt: "NCHW", the only one there is.
            intermediates_only: do not return the final features before them.
        """
        if output_fmt != "NCHW":
            raise ZooError(f"output_fmt must be 'NCHW', not {output_fmt!r}")
        wanted = intermediate_indices(indices, len(self.stages) + 1)
        inner, x = self._stem(x)
        found = [self._stem_feature(inner)] if 0 in wanted else []
        for s, stage in enumerate(self.stages, 1):
            if stop_early and s > max(wanted):
                return found if intermediates_only else (x, found)
            x = self._recomputed(stage, x) if self.grad_checkpointing and self.training else stage(x)
            if s in wanted:
                found.append(self._end(x) if norm and s == len(self.stages) else x)
        return found if intermediates_only else (self._end(x), found)

    def _prune_end(self) -> None:
        """Leave the end out."""

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the intermediates `indices` do not need; returns them counted from the front."""
        wanted = intermediate_indices(indices, len(self.stages) + 1)
        self.stages = self.stages[: max(wanted)]
        if prune_norm:
            self._prune_end()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted
