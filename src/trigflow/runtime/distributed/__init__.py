"""Training, sampling and measuring with several processes, through `torch.distributed`."""

from trigflow.runtime.distributed.processes import (
    average,
    gather,
    gather_figures,
    gather_rows,
    is_first,
    launched,
    on_first,
    process_group,
    rank,
    share_of,
    world_size,
)

__all__ = [
    "average", "gather", "gather_figures", "gather_rows", "is_first", "launched", "on_first", "process_group", "rank",
    "share_of", "world_size",
]  # fmt: skip
