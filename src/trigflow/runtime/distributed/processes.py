"""The processes of a run: one for each GPU or CPU socket, started together by torchrun.

Everything else asks here which process it is in, and whether there are others. In a single process nothing is set up.
"""

import contextlib
import dataclasses
import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trigflow.runtime.errors import UserError, first_line

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process through its environment."""


def launched() -> int:
    """Number of processes that were started together with this one, as the environment says; 1 where it says nothing. Raises a
    UserError for an environment that is half there, or holds no numbers."""
    present = [name for name in VARIABLES if name in os.environ]
    if not {"RANK", "WORLD_SIZE"} & set(present):
        return 1
    absent = [name for name in VARIABLES if name not in os.environ]
    if absent and os.environ.get("WORLD_SIZE") != "1":
        raise UserError(
            f"the environment has {', '.join(present)} but not {', '.join(absent)}; expected all that torchrun sets, or "
            "none; start with torchrun --nproc-per-node N -m trigflow ..., or unset them"
        )
    try:
        processes, *ranks = (int(os.environ.get(name, 0)) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    except ValueError:
        processes, ranks = 0, []
    if processes < 1 or not all(0 <= rank < processes for rank in ranks):
        found = ", ".join(f"{name}={os.environ.get(name)}" for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
        raise UserError(f"the environment has {found}; expected ranks below the number of processes; start with torchrun")
    return processes


@contextlib.contextmanager
def process_group(device: str = "auto", timeout: float = 600.0) -> Iterator[None]:
    """Join the processes that torchrun started, for as long as the block lasts; does nothing in a single process.

    Each process takes the GPU of its LOCAL_RANK, which from then on is the one called `cuda`. GPUs talk through NCCL, and
    what lies in main memory goes through gloo.

    Args:
        device: `auto`, `cuda` or `cpu`, as in `loop.device`.
        timeout: seconds that a process waits for the others before it gives up.

    Raises:
        UserError: for an environment that is half there; fewer GPUs than processes on this machine; a GPU by its number,
            which all processes would share; when the others cannot be reached or one of them has gone.
    """
    if launched() == 1:
        yield
        return
    backend = "gloo"
    if device != "cpu" and (device != "auto" or torch.cuda.is_available()):
        _take_gpu(device)
        backend = "cpu:gloo,cuda:nccl"
    try:
        _join(backend, timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes cannot be joined ({first_line(error)[:200]}); expected {launched()} processes that reach "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}; check the host, the port and the firewall"
        ) from None
    well = False
    try:
        yield
        well = True
    except RuntimeError as error:
        if _is_of_collective(error):
            raise UserError(
                f"another process of this run has gone or does not answer ({first_line(error)[:200]}); expected {launched()} "
                "processes to the end; look for the first error above, and go on with --resume"
            ) from error
        raise
    finally:
        if well or backend == "gloo":  # NCCL would wait for the others; the end of the process closes its connections
            with contextlib.suppress(RuntimeError):  # where others have gone, the end of this one says so already
                dist.destroy_process_group()


def _join(backend: str, timeout: timedelta) -> None:
    """`init_process_group`, where processes that torchrun has started again do not find what those before them have left.

    With its default rendezvous (`static`), torchrun keeps one store for all attempts: there the new processes would read the
    addresses of the old ones, and wait for these. On several machines the number of an attempt is not the same everywhere;
    they need `--rdzv-backend c10d`, which has a store for each attempt.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group(backend, timeout=timeout)
        return
    from torch.distributed.rendezvous import rendezvous

    store, rank, processes = next(rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=timeout)


def _take_gpu(device: str) -> None:
    local = int(os.environ["LOCAL_RANK"])
    if device not in ("auto", "cuda"):
        raise UserError(
            f"device '{device}' for {launched()} processes; expected auto, cuda or cpu, as each process takes a GPU of its "
            "own; change --loop.device"
        )
    if local >= torch.cuda.device_count():
        raise UserError(
            f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}; expected one for each "
            "process; lower --nproc-per-node, or set --loop.device cpu"
        )
    torch.cuda.set_device(local)


def _is_of_collective(error: RuntimeError) -> bool:
    """Whether processes were talking where this was raised, so that another one has gone; gloo has no class for that.

    Told by the innermost Python code but the call of an operator: that of `torch.distributed` or of DDP, or of a backward pass
    in which all gradients are there. `torch.distributed.tensor` computes, and has others talk.
    """
    if type(error) is not RuntimeError:
        return isinstance(error, dist.DistError)
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    innermost = next((name for name in reversed(frames) if name != "torch._ops"), "")
    if innermost == "torch.autograd.graph":
        return averaging.under_way
    talks = innermost.startswith(("torch.distributed.", "torch.nn.parallel.distributed"))
    return talks and not innermost.startswith("torch.distributed.tensor.")


class Averaging:
    """Whether a backward pass has computed all gradients, so that what is left of it is to average them over the processes.

    That is done by code of DDP in C++, which waits for all processes when the rest of the graph is done.
    """

    under_way = False

    def begin(self, results: Any = ()) -> None:
        """Nothing is averaged until the backward pass from one of these, a tensor or tuple or dataclass of tensors, is done."""
        self.under_way = False
        if isinstance(results, Tensor):
            if results.requires_grad:
                results.register_hook(self._differentiated)
        elif dataclasses.is_dataclass(results) or isinstance(results, tuple):
            for part in results if isinstance(results, tuple) else vars(results).values():
                self.begin(part)

    def _differentiated(self, gradient: Tensor) -> None:
        """Called as the backward pass begins: what is queued first is called first, and DDP queues its own later."""
        torch.autograd.Variable._execution_engine.queue_callback(self._done)  # type: ignore[attr-defined]

    def _done(self) -> None:
        self.under_way = True


averaging = Averaging()


# Which process this is ---------------------------------------------------------------------------------------------------


def world_size() -> int:
    """Number of processes of this run; 1 where no process group was set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes files and draws bars."""
    return rank() == 0


# What processes tell each other ------------------------------------------------------------------------------------------


def on_first(function: Callable[[], T]) -> T:
    """`function()` as the first process sees it: the others wait, and get its result or raise its UserError."""
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]  # type: ignore[no-any-return]


def gather(value: T) -> list[T]:
    """What each process gives, in the order of the processes; every one of them gets the whole list."""
    values: list[Any] = [value]
    if world_size() > 1:
        values *= world_size()
        dist.all_gather_object(values, value)
    return values


def average(values: dict[str, float]) -> dict[str, float]:
    """The mean of each value over the processes, the same in all of them. One that is not finite anywhere is so everywhere."""
    if world_size() == 1:
        return values
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, (total / world_size()).tolist(), strict=True))


def gather_rows(rows: Tensor) -> Tensor | None:
    """The rows of all processes below each other, in the order of the processes; None in all but the first.

    Args:
        rows: `(n, ...)` on the CPU; n may differ between processes.
    """
    if world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)]))
    most = max(int(count) for count in counts)
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts] if is_first() else None
    dist.gather(padded, parts)
    return None if parts is None else torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


def gather_figures(figures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Figures per sample, `(b,)` each, of all processes joined; in all but the first process those of its own."""
    if world_size() == 1 or not figures:
        return figures
    table = gather_rows(torch.stack([value.double() for value in figures.values()], dim=1))
    return figures if table is None else dict(zip(figures, table.unbind(1), strict=True))


def share_of(count: int) -> range:
    """Which of `count` things this process does: consecutive ones, as even as can be."""
    n, r = world_size(), rank()
    return range(count * r // n, count * (r + 1) // n)
