"""Work shared by the processes of `torch.distributed`, or done by one alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from trigflow.runtime.distributed import gather, rank, world_size
from trigflow.runtime.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that share a computation; without arguments, this one alone.

    The methods are collective: every process of the group calls them, in the same order. What one process raises is raised in
    all of them, so that none is left waiting for another that has given up.

    Attributes:
        rank: of this process, from 0.
        count: of all.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def present(cls) -> Processes:
        """Those of an initialized `torch.distributed`, else this one alone."""
        return cls(rank(), world_size())

    def together(self, compute: Callable[[], T]) -> list[T]:
        """What `compute` gives in each process, in the order of the ranks; every process gets all of it.

        The values travel between processes as pickles.

        Raises:
            UserError: the one that another process has raised.
            RuntimeError: for any other error of another process; its own error is raised as it is.
        """
        if self.count == 1:
            return [compute()]
        value, error = None, None
        try:
            value = compute()
        except Exception as raised:
            error = raised
        said = None if error is None else UserError(str(error)) if isinstance(error, UserError) else repr(error)
        outcomes = gather((value, said))
        if error is not None:
            raise error
        for number, (_, failure) in enumerate(outcomes):
            if failure is not None:
                raise failure if isinstance(failure, UserError) else RuntimeError(f"process {number} failed: {failure}")
        return [value for value, _ in outcomes]  # type: ignore[misc]

    def agree(self, compute: Callable[[], T]) -> T:
        """What `compute` gives in this process, once it has succeeded in all. Raises as `together`."""
        kept: list[T] = []
        self.together(lambda: kept.append(compute()))
        return kept[0]

    def one_first(self, compute: Callable[[], T]) -> T:
        """As `agree`, but process 0 goes first: it may download a file that the others then find. Raises as `together`."""
        kept: list[T] = []
        for turn in (self.rank == 0, self.rank != 0):
            self.together(lambda turn=turn: kept.append(compute()) if turn else None)  # type: ignore[misc]
        return kept[0]


ALONE = Processes()
