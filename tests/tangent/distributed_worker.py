"""One of two processes of test_distributed.py: `python distributed_worker.py RANK FOLDER`.

Each process takes half of a batch through `jvp` of a wrapped network and compares with the whole batch in one process.
The relative errors are written to FOLDER/errors.json by process 0.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from trigflow.tangent import TangentError, jvp

WORLD = 2


@dataclasses.dataclass
class Out:
    """An output of a class that PyTorch knows nothing of."""

    sample: Any
    extra: dict[str, Any]


class Block(nn.Module):
    def __init__(self, inner: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.shift = nn.Linear(4, 8)
        self.inner = inner

    def body(self, x: Tensor, e: Tensor) -> Tensor:
        return x + self.conv(torch.nn.functional.silu(self.norm(x) + self.shift(e)[:, :, None, None]))

    def forward(self, x: Tensor, *, e: Tensor) -> Tensor:
        if self.inner:
            return checkpoint(self.body, x, e, use_reentrant=False)
        return self.body(x, e)


class Net(nn.Module):
    """A few blocks; `regions` says where activations are checkpointed, `spare` adds a layer that is not used."""

    def __init__(self, regions: str = "none", spare: bool = False, nested: type | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
        self.blocks = nn.ModuleList(Block(regions == "inside") for _ in range(3))
        self.regions, self.nested = regions, nested
        if spare:
            self.spare = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Any:
        assert isinstance(x, Tensor)
        e = torch.stack([t.cos(), t.sin(), t, t * t], dim=-1)
        h = self.first(x)
        for block in self.blocks:
            h = checkpoint(block, h, e=e, use_reentrant=False) if self.regions == "around" else block(h, e=e)
        y = self.last(h)
        return self.nested(sample=y, extra={"mean": h.mean((1, 2, 3))}) if self.nested is not None else y


def built(**settings: Any) -> Net:
    torch.manual_seed(0)
    return Net(**settings).double()


def sharded(net: Net, **settings: Any) -> Net:
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in net.blocks:
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(net, mesh=mesh, **settings)


def parallel(net: Net, **settings: Any) -> nn.Module:
    return DistributedDataParallel(net, **settings)


CASES: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], dict[str, Any]]] = {
    "ddp": (parallel, {}, {}),
    "ddp, unused parameters": (parallel, {"spare": True}, {"find_unused_parameters": True}),
    "ddp, static graph": (parallel, {}, {"static_graph": True}),
    "ddp, checkpointed": (parallel, {"regions": "around"}, {"static_graph": True}),
    "ddp, nested output": (parallel, {"nested": Out}, {"find_unused_parameters": True}),
    "fsdp": (sharded, {}, {}),
    "fsdp, checkpoints in the blocks": (sharded, {"regions": "inside"}, {}),
    "fsdp, checkpoints around the blocks": (sharded, {"regions": "around"}, {}),
    "fsdp, nested output": (sharded, {"nested": dict}, {}),
    "fsdp, not resharded": (sharded, {}, {"reshard_after_forward": False}),
}


def step(net: nn.Module, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Output, tangent and gradients of one training step; the tangent takes part in the loss as a constant."""

    def fn(x: Tensor, t: Tensor) -> Any:
        out = net(x, t)
        if isinstance(out, Out):
            out = vars(out)
        return (out["sample"], out["extra"]["mean"]) if isinstance(out, dict) else out

    out, tangent = jvp(fn, (x, t), (dx, dt))
    out, tangent = joined(out), joined(tangent)
    (out + 0.1 * tangent).square().mean().backward()
    grads = {}
    for name, p in net.named_parameters():
        grad = p.grad
        if grad is not None and hasattr(grad, "full_tensor"):
            grad = grad.full_tensor()
        grads[name.removeprefix("module.")] = grad
    return out.detach(), tangent, grads


def joined(value: Any) -> Tensor:
    """One row of numbers a sample."""
    parts = value if isinstance(value, tuple) else (value,)
    return torch.cat([p.reshape(len(p), -1) for p in parts], dim=1)


def gap(value: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(value - expected) / torch.linalg.vector_norm(expected))


def compare(name: str, rank: int) -> dict[str, Any]:
    wrap, network, settings = CASES[name]
    g = torch.Generator().manual_seed(1)
    whole = [torch.randn(s, generator=g, dtype=torch.float64) for s in ((4, 3, 6, 6), (4,), (4, 3, 6, 6), (4,))]
    half = [v[2 * rank : 2 * rank + 2] for v in whole]
    out, tangent, expected = step(built(**network), *whole)
    net = wrap(built(**network), **settings)
    errors: dict[str, Any] = {"out": 0.0, "tangent": 0.0, "gradient": 0.0, "missing": [], "parameters": 0}
    for _ in range(2):  # static graphs and first forwards take other ways than the second
        net.zero_grad()
        o, t, grads = step(net, *half)
        errors["out"] = max(errors["out"], gap(o, out[2 * rank : 2 * rank + 2]))
        errors["tangent"] = max(errors["tangent"], gap(t, tangent[2 * rank : 2 * rank + 2]))
        for key, grad in expected.items():
            if grad is None:
                continue
            if grads[key] is None:
                errors["missing"].append(key)
            else:
                errors["gradient"] = max(errors["gradient"], gap(grads[key], grad))
        errors["parameters"] = sum(grad is not None for grad in expected.values())
    return errors


def half_precision(rank: int) -> dict[str, Any]:
    """Sharded with bfloat16 parameters: inputs are cast with their tangents, gradients come in float32."""
    g = torch.Generator().manual_seed(1)
    values = [torch.randn(s, generator=g) for s in ((4, 3, 6, 6), (4,), (4, 3, 6, 6), (4,))]
    out, tangent, expected = step(built().float(), *values)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    o, t, grads = step(sharded(built().float(), mp_policy=policy), *values)
    return {
        "dtypes": [str(o.dtype), str(t.dtype)],
        "out": gap(o.float(), out),
        "tangent": gap(t.float(), tangent),
        "gradient": max(gap(grads[k], expected[k]) for k in expected),
    }


def refused() -> str:
    """What a custom function inside a sharded module says."""

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    class Through(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Bad.apply(super().forward(x))

    net = fully_shard(Through(3, 3), mesh=init_device_mesh("cpu", (WORLD,)))
    try:
        jvp(net, (torch.ones(2, 3),), (torch.ones(2, 3),))
    except TangentError as reason:
        return str(reason)
    return "nothing was refused"


def main() -> None:
    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    from torch.distributed.fsdp import FSDPModule

    before = {**vars(FSDPModule)}, {**vars(DistributedDataParallel)}
    report: dict[str, Any] = {name: compare(name, rank) for name in CASES}
    report["bfloat16"] = half_precision(rank)
    report["refused"] = refused()
    report["left behind"] = before != ({**vars(FSDPModule)}, {**vars(DistributedDataParallel)})
    with open(f"{folder}/errors{rank}.json", "w") as file:
        json.dump(report, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
