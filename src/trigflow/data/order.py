"""Data order as a pure function of the step, so that resuming a run needs no saved state.

An endless sequence of samples is made of one permutation of the data set after another; step `k` of batch size `b` takes
samples `k b ... k b + b - 1` of it. Which samples these are depends on `(n, b, seed, k)` alone.

A stream can only be read from the beginning of each of its shards. Its permutations keep to that: they go through the shards in
a random order, and through each from its beginning to its end, in windows of samples that are shuffled with each other.

Of samples of several sizes each batch is of one; see `BucketOrder`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trigflow.runtime.errors import UserError
from trigflow.runtime.seeds import derive_seed


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The permutation of `0 ... n - 1` in which the given epoch walks the data, int64, shape `(n,)`, on the CPU."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(n, generator=generator)


def stream_order(shards: Sequence[int], window: int, seed: int, epoch: int) -> Tensor:
    """The permutation in which the given epoch walks a stream, int64, on the CPU.

    Args:
        shards: length of each shard; samples are numbered through them.
        window: samples, one after another in a shard, that are shuffled with each other.
        seed: the seed of the run.
        epoch: counted from 0.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    numbered = torch.arange(sum(shards)).split(list(shards))
    chosen = torch.randperm(len(shards), generator=generator).tolist()
    windows = [samples for shard in chosen for samples in numbered[shard].split(window)]
    return torch.cat([samples[torch.randperm(len(samples), generator=generator)] for samples in windows])


class Order:
    """Which samples each training step sees.

    Sample number `j = step * batch_size + i` of the endless sequence is entry `j mod n` of the permutation of epoch
    `j div n`. No sample is dropped: a batch may end one epoch and begin the next, or span several when `batch_size > n`.

    Args:
        n: number of samples in the data set, at least 1.
        batch_size: samples a step, at least 1.
        seed: the seed of the run.
        shards: lengths of the shards of a stream (see `stream_order`); None for data that can be read in any order.
        window: of a stream.

    Raises:
        UserError: if `n` or `batch_size` is below 1.
    """

    def __init__(self, n: int, batch_size: int, seed: int, *, shards: Sequence[int] | None = None, window: int = 1) -> None:
        if n < 1:
            raise UserError(f"a data set of {n} images; expected at least one; point to other data")
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}; expected at least 1; correct the batch size")
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.shards = shards
        self.window = window
        self._latest = {0: self._permute(0)}

    def indices(self, step: int) -> Tensor:
        """Sample indices of a step, int64, shape `(batch_size,)`; the same whatever was asked before. Raises a UserError if
        `step` is negative."""
        if step < 0:
            raise UserError(f"step {step}; expected 0 or more; count steps from 0")
        position = step * self.batch_size
        end = position + self.batch_size
        pieces = []
        while position < end:
            epoch, offset = divmod(position, self.n)
            piece = self._permutation(epoch)[offset : offset + end - position]
            pieces.append(piece)
            position += len(piece)
        return torch.cat(pieces)

    def _permutation(self, epoch: int) -> Tensor:
        """The permutation of an epoch; the two asked for last are kept, for readers that are ahead of the training."""
        if epoch not in self._latest:
            self._latest = dict([*self._latest.items()][-1:])
            self._latest[epoch] = self._permute(epoch)
        return self._latest[epoch]

    def _permute(self, epoch: int) -> Tensor:
        if self.shards is None:
            return epoch_order(self.n, self.seed, epoch)
        return stream_order(self.shards, self.window, self.seed, epoch)


class BucketOrder(Order):
    """Which samples each training step sees where a batch has to be of one group, such as images of one size.

    Of n steps each group k takes as many as it has samples, n_k, evenly spread: those of its times among all, sorted::

        (j + u_j) / n_k,  j = 0 ... n_k - 1,  u_j uniform in [0, 1)

    Its batches are those of an `Order` of its own, so that each sample comes up as often as any other. `groups` has the group
    of each sample, int64 `(n,)`; the other arguments, and what is raised, are those of `Order`.
    """

    def __init__(self, groups: Tensor, batch_size: int, seed: int) -> None:
        self.members = {int(group): (groups == group).nonzero()[:, 0] for group in groups.unique()}
        super().__init__(len(groups), batch_size, seed)
        self.orders = {k: Order(len(m), batch_size, derive_seed(seed, "bucket", k)) for k, m in self.members.items()}

    def indices(self, step: int) -> Tensor:
        if step < 0:
            return super().indices(step)  # which says so
        again, place = divmod(step, self.n)
        turns = self._permutation(again)
        members, own = self.members[int(turns[place])], self.orders[int(turns[place])]
        return members[own.indices(again * len(members) + int((turns[:place] == turns[place]).sum()))]

    def _permute(self, epoch: int) -> Tensor:
        """The group of each of the n steps of one round."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "turns", epoch))
        counts = torch.tensor([len(members) for members in self.members.values()])
        turns = torch.tensor([*self.members]).repeat_interleave(counts)
        places = torch.cat([torch.arange(count) for count in counts.tolist()])
        jitter = torch.rand(self.n, generator=generator, dtype=torch.float64)
        return turns[((places + jitter) / counts.repeat_interleave(counts)).argsort(stable=True)]
