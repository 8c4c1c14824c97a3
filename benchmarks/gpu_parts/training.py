"""Training on the device: resumed runs bit for bit, sharded weights on one rank, and the demo."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpu_parts.kernels import relative_error
from gpu_parts.networks import configs
from gpu_parts.record import Record
from trigflow.data import open_dataset
from trigflow.lab.demo import run_demo
from trigflow.lab.recipes.changes import change
from trigflow.models.model import Model, load
from trigflow.networks import ConditioningConfig, UNetConfig, build
from trigflow.objectives import flow_map_loss, objective_of
from trigflow.process import TrigFlow
from trigflow.training.config import LoopConfig, OptimizerConfig, RunConfig
from trigflow.training.trainer import Trainer

WARMUP = {"objective.tangent.warmup": 4}
KINDS: dict[str, dict[str, Any]] = {
    "teacher": {"network.dropout": 0.3, "data.flip": True, "optimizer.schedule": "cosine"},
    "teacher, bf16": {"loop.precision": "bf16", "loop.accumulate": 2, "optimizer.clip": 0.1},
    "teacher, fp16": {"loop.precision": "fp16"},
    "teacher, muon, channels last": {"optimizer.name": "muon", "loop.channels_last": True},
    "sct": {"objective.kind": "sct", **WARMUP, "network.dropout": 0.2, "optimizer.name": "radam"},
    "scd, bf16": {"objective.kind": "scd", **WARMUP, "objective.guidance_max": 2.0, "loop.precision": "bf16"},
    "scd-vsd": {"objective.kind": "scd-vsd", **WARMUP},
}
ITERATIONS, STOP = 8, 5


def resume(record: Record, tiny: bool) -> None:
    """Each kind of run three times: whole, whole again, and stopped, saved and resumed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = UNetConfig(
        width=8 if tiny else 32, mult=(1, 2), blocks=1, attention=(1,), conditioning=ConditioningConfig(width=16)
    )
    base = RunConfig(
        network=network,
        optimizer=OptimizerConfig(lr=2e-3),
        loop=LoopConfig(
            iterations=ITERATIONS, batch_size=32, log_every=2, sample_every=0, checkpoint_every=0, seed=3, device=device
        ),
    )
    dataset = open_dataset("digits")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Trainer(base, folder / "teacher", dataset=dataset, progress=False).run()
        for kind, changes in KINDS.items():
            with record.guarded(kind):
                config = change(base, changes)
                needs = config.objective.distills
                teacher = load(folder / "teacher", device) if needs else None
                if needs:
                    config = dataclasses.replace(config, teacher=str(folder / "teacher"))

                def trainer(where: str, config: RunConfig = config, teacher: Model | None = teacher, **more: Any) -> Trainer:
                    return Trainer(config, folder / where, teacher=teacher, dataset=dataset, progress=False, **more)

                safe = kind.replace(", ", "-")
                whole, again = (ended(trainer(f"{safe} {i}")) for i in range(2))
                first = trainer(f"{safe} stopped")
                for _ in range(STOP):
                    first.step()
                first.save_checkpoint()
                del first
                resumed = ended(trainer(f"{safe} stopped", resume=True))
                record.add(
                    "kinds",
                    {
                        "kind": kind,
                        "tensors": len(whole),
                        "finite": all(bool(v.isfinite().all()) for v in whole.values() if v.is_floating_point()),
                        "differ_resumed": differing(whole, resumed),
                        "differ_repeated": differing(whole, again),
                    },
                )


def ended(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, averages and moments after the last iteration."""
    while trainer.iteration < trainer.config.loop.iterations:
        trainer.step()
    state = {f"{name}.{key}": value for name, module in trainer.modules.items() for key, value in module.state_dict().items()}
    state |= {f"ema.{key}": value for key, value in trainer.ema.network.state_dict().items()}
    for name, optimizer in trainer.optimizers.items():
        for index, moments in optimizer.state_dict()["state"].items():
            state |= {f"{name}.{index}.{key}": torch.as_tensor(value) for key, value in moments.items()}
    return {name: value.detach().clone() for name, value in state.items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> int:
    """Entries that are not equal bit for bit."""
    return sum(name not in a or name not in b or not torch.equal(a[name], b[name]) for name in {**a, **b})


def sharding(record: Record, tiny: bool) -> None:
    """FSDP2 on one rank: loss and gradients of an sCT step equal those of the network without it."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from trigflow.training.config import ParallelConfig
    from trigflow.training.parallel import Parallel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
        try:
            for dtype in ("fp32", "bf16"):
                for kind in ("unet", "ddpmpp", "edm2", "dit"):
                    with record.guarded(f"{kind}, {dtype}"):
                        parallel = Parallel(ParallelConfig(mode="fsdp", dtype=dtype), torch.device(device))
                        parallel.sharded, parallel.mesh = True, init_device_mesh(device, (1,))
                        record.add("cases", {"network": kind, "dtype": dtype, **sharded(kind, parallel, dtype, device)})
            with record.guarded("wrapped by DistributedDataParallel"):
                record.put("ddp", replicated(device))
        finally:
            dist.destroy_process_group()


def network_of(kind: str) -> nn.Module:
    """A small one of each kind, every weight moved."""
    torch.manual_seed(0)
    net = build(configs(16)[kind])
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return net


def step(net: nn.Module, device: str, half: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one sCT step, whole."""
    generator = torch.Generator().manual_seed(1)
    x0, noise = (0.5 * torch.randn(4, 3, 16, 16, generator=generator).to(device) for _ in range(2))
    t = torch.linspace(0.3, 1.4, 4, device=device)
    conditions = {"label": torch.tensor([0, 5, 1, 2], device=device), "guidance": torch.linspace(1, 2, 4, device=device)}
    with torch.autocast(device, torch.bfloat16, enabled=half):
        loss = flow_map_loss(net, TrigFlow(), x0, noise, t, conditions=conditions, config=objective_of("sct")).value
    loss.backward()
    found = {}
    for name, parameter in net.named_parameters():
        gradient: Any = parameter.grad
        if gradient is not None:
            found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return loss.detach(), found


def sharded(kind: str, parallel: Any, dtype: str, device: str) -> dict[str, Any]:
    """Relative errors against the network without sharding."""
    half = dtype == "bf16"
    loss, gradients = step(network_of(kind).to(device), device, half)
    net = parallel.place(network_of(kind), trained=True)
    parts = sum(hasattr(p, "full_tensor") for p in net.parameters())
    second, sharded_gradients = step(net, device, half)
    return {
        "sharded_parameters": parts,
        "loss": relative_error(second, loss),
        "gradients": max(relative_error(sharded_gradients[name], g) for name, g in gradients.items()),
        "same_names": set(gradients) == set(sharded_gradients),
    }


def replicated(device: str) -> dict[str, float]:
    """The same under DistributedDataParallel."""
    from torch.nn.parallel import DistributedDataParallel

    loss, gradients = step(network_of("unet").to(device), device, False)
    wrapped = DistributedDataParallel(network_of("unet").to(device))
    second, found = step(wrapped, device, False)
    return {
        "loss": relative_error(second, loss),
        "gradients": max(relative_error(found[f"module.{name}"], g) for name, g in gradients.items()),
    }


def demo(record: Record, tiny: bool, seed: int = 0) -> None:
    """Teacher and student of the digits demo, its figures as the demo reports them."""
    with record.guarded(f"seed {seed}"), tempfile.TemporaryDirectory() as folder:
        report = run_demo(Path(folder) / "demo", recipe="digits", seed=seed, quick=tiny, progress=False)
        record.put("figures", report.figures)


def summary_of_resume(part: dict[str, Any]) -> str:
    """One line."""
    kinds = part.get("kinds", [])
    same = sum(k["differ_resumed"] == 0 for k in kinds)
    failures = "  ".join(f"{f['what']}: {f['error']}" for f in part.get("failures", []))
    return f"resume: {same} of {len(KINDS)} kinds equal bit for bit  {failures}"


def summary_of_sharding(part: dict[str, Any]) -> str:
    """One line."""
    worst = max((c["gradients"] for c in part.get("cases", [])), default=float("nan"))
    failures = "  ".join(f"{f['what']}: {f['error']}" for f in part.get("failures", []))
    return f"FSDP2 on one rank: {len(part.get('cases', []))} of 8, worst gradient {worst:.1e}  {failures}"


def summary_of_demo(part: dict[str, Any]) -> str:
    """One line."""
    figures = part.get("figures")
    if not figures:
        return f"demo: not finished {part.get('failures', '')}"
    fd, seconds = figures["fd"], figures["seconds"]
    return (
        f"demo, seed {figures['seed']}: distance {fd['teacher']:.2f} teacher, {fd['student_2']:.2f} two steps, "
        f"{fd['student_1']:.2f} one; {seconds['train']:.0f} s and {seconds['distill']:.0f} s"
    )
