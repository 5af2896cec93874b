"""Samplers and the training loader: which sample comes when, the same on any run, after any interruption.

The order of an epoch is a function of (seed, epoch); what is done to a sample, of (seed, epoch, index, repeat), which
the sampler hands to the data set as its key. So nothing needs replaying: the training loader's state is two counts.

The samplers are :class:`~torch.utils.data.DistributedSampler` subclasses and know their rank: a trainer leaves them
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from zoo.data.shapes import hash64
from zoo.errors import ZooError

Key = tuple[int, int, int]
"""(index in the split, epoch, which repetition of the sample)."""


class EpochSampler(DistributedSampler):
    """A seeded permutation for each epoch, dealt to the ranks in turn; the tail that does not go round is dropped.

    Args:
        length: samples in the split.
        seed: of the run.
        repeats: repeated augmentation (Hoffer et al. 2020, as DeiT uses it): each sample stands `repeats` times in a
            row, so that neighbouring ranks augment the same one; the epoch keeps its length, and sees fewer different
            samples.
        rank, world: this process and how many there are.
    """

    def __init__(self, length: int, seed: int = 0, repeats: int = 1, rank: int = 0, world: int = 1) -> None:
        everything: Any = range(length)
        super().__init__(everything, num_replicas=world, rank=rank, seed=seed, drop_last=True)
        if repeats < 1:
            raise ZooError(f"repeats must be at least 1, got {repeats}")
        self.length, self.repeats = length, repeats
        self.num_samples = length // world
        self.first = 0  # how many of this rank's samples the next iteration leaves out

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[Key]:
        epoch = self.epoch
        generator = torch.Generator().manual_seed(int(hash64(self.seed, epoch)[0]))
        index, repeat = self.order(generator)
        for at in range(self.rank, self.num_samples * self.num_replicas, self.num_replicas)[self.first :]:
            yield int(index[at]), epoch, int(repeat[at])

    def order(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The epoch's samples over all ranks, (length,) int64, and for each which repetition it is, (length,) int64."""
        at = torch.arange(self.length)
        index = torch.randperm(self.length, generator=generator)[at // self.repeats]
        return index, at % self.repeats


class GroupedSampler(EpochSampler):
    """An epoch whose global batches hold samples of one group, and in which rare samples come more often.

    Groups are for pictures of a like shape, so that little is padded (aspect-ratio grouping): in each step all ranks
    get samples of one group. What is left of the groups at the end of an epoch makes mixed batches. The repeat factors
    are LVIS's (Gupta et al. 2019, appendix B.2): a sample of factor 2.3 comes two or three times, 2.3 on average. Where
    that paper rounds each sample for itself, the rounding here is systematic, so that all epochs are equally long.

    Args:
        batch_size: of one rank.
        groups: the group of each sample.
        repeat_factors: how often each sample comes in an epoch, at least 1; None: once.
        seed, rank, world: as in :class:`EpochSampler`.
    """

    def __init__(
        self,
        batch_size: int,
        groups: Sequence[int] | Tensor,
        repeat_factors: Tensor | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.groups = torch.as_tensor(groups, dtype=torch.long)
        factors = torch.ones(len(self.groups)) if repeat_factors is None else repeat_factors
        if factors.shape != self.groups.shape or (len(factors) and float(factors.min()) < 1):
            raise ZooError("repeat factors: one for each sample is needed, none below 1")
        self.factors = factors.double()
        self.global_batch = batch_size * world
        super().__init__(int(self.factors.sum() + 1e-9), seed, 1, rank, world)

    def order(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As in :class:`EpochSampler`."""
        n = len(self.groups)
        shuffled = torch.randperm(n, generator=generator)
        count = self.factors.floor().long()
        part = (self.factors - count)[shuffled].cumsum(0)
        # The k-th extra place goes to the sample in which the running sum of the fractions passes k - u.
        extra = (part + torch.rand(1, generator=generator, dtype=torch.float64)).floor().long()
        count[shuffled] += extra.diff(prepend=extra.new_zeros(1))
        index = torch.arange(n).repeat_interleave(count)
        repeat = torch.arange(len(index)) - (count.cumsum(0) - count).repeat_interleave(count)
        mixed = torch.randperm(len(index), generator=generator)[: self.length]
        mixed = mixed[self._by_group(self.groups[index[mixed]])]
        return index[mixed], repeat[mixed]

    def _by_group(self, group: Tensor) -> Tensor:
        """The order in which full global batches of one group come out of a stream; what is left over comes last."""
        ready = torch.full_like(group, len(group))  # the place at which a sample's batch is full
        for one in group.unique():
            places = (group == one).nonzero()[:, 0]
            full = places[: len(places) // self.global_batch * self.global_batch].view(-1, self.global_batch)
            ready[full] = full[:, -1:].expand_as(full)
        return ready.argsort(stable=True)


class ExactSampler(DistributedSampler):
    """Every sample once, in order, dealt to the ranks in turn without padding; ranks may differ by one sample."""

    def __init__(self, length: int, rank: int = 0, world: int = 1) -> None:
        everything: Any = range(length)
        super().__init__(everything, num_replicas=world, rank=rank, shuffle=False)
        self.length = length
        self.num_samples = len(range(rank, length, world))

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.length, self.num_replicas))


class EvalLoader(DataLoader):
    """A loader over an :class:`ExactSampler`. In a process that has no samples while others have, it counts one batch
    and gives none: a trainer that knew would leave out the loop at whose end the others wait for it."""

    def __len__(self) -> int:
        idle = isinstance(self.sampler, ExactSampler) and 0 < self.sampler.length < self.sampler.num_replicas
        return max(1, super().__len__()) if idle else super().__len__()


class TrainLoader(DataLoader):
    """A :class:`~torch.utils.data.DataLoader` that knows how far it came; Lightning keeps that in the checkpoint.

    It begins to load when the first batch is asked for, by which time the trainer has set the epoch. After
    :meth:`load_state_dict` the iteration of the epoch named there goes on behind the batches already handed out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._position = (0, 0)  # epoch, batches handed out
        self._resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch = getattr(self.sampler, "epoch", 0)
        done = self._resume[1] if self._resume is not None and self._resume[0] == epoch else 0
        self._resume, self._position = None, (epoch, done)
        if isinstance(self.sampler, EpochSampler):
            self.sampler.first = done * (self.batch_size or 1)
        for batch in super().__iter__():
            self._position = (epoch, self._position[1] + 1)
            yield batch

    def _layout(self) -> dict[str, int]:
        sampler = self.sampler
        layout = {"batch_size": self.batch_size or 1}
        if isinstance(sampler, EpochSampler):
            layout |= {"samples": sampler.length, "processes": sampler.num_replicas, "repeats": sampler.repeats}
            layout["seed"] = sampler.seed
        return layout

    def state_dict(self) -> dict[str, Any]:
        """{"epoch", "batches" handed out in it, "of" how many, and what the counts mean: batch size, samples,
        processes…}."""
        epoch, batches = self._resume or self._position
        return {"epoch": epoch, "batches": batches, "of": len(self), **self._layout()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            ZooError: the state lies inside an epoch and its counts mean something else here.
        """
        epoch, batches = int(state["epoch"]), int(state["batches"])
        changed = [f"{k} was {state.get(k)} and is {v}" for k, v in self._layout().items() if state.get(k) != v]
        if changed and 0 < batches < int(state["of"]):
            raise ZooError(
                f"the checkpoint stopped inside epoch {epoch} and cannot go on there: {', '.join(changed)};"
                " resume with the same settings or from a checkpoint at the end of an epoch"
            )
        self._resume = None if changed else (epoch, batches)
