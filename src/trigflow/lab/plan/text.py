"""A plan as text."""

from __future__ import annotations

from trigflow.lab.plan.run_plan import RunPlan

NAMES = {"student": "student", "teacher": "teacher", "fake_score": "fake score network"}
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer moments",
    "averages": "EMA copies",
    "teacher": "teacher",
    "fake_score": "fake score network",
    "gathered": "gathered blocks",
    "activations": "activations",
    "total": "total",
}


def describe(plan: RunPlan) -> str:
    """A page of text: what is trained, operations, memory, hours."""
    c, h, w = plan.sample
    work, hours = plan.tflops_per_iteration, plan.hours
    lines = [
        f"{plan.recipe}: {plan.kind}, {plan.network} on samples of {c} x {h} x {w}, {plan.precision}",
        f"batch {plan.batch:,}, {plan.iterations:,} iterations",
        "",
        "parameters",
        *(_row(NAMES[name], f"{number / 1e6:,.2f} M") for name, number in plan.parameters.items()),
        "",
        "operations (a multiply-add is two)",
        _row("one evaluation, one sample", f"{plan.forward_gflops:,.1f} GFLOP"),
        _row("a step, one sample", f"{plan.sample_gflops['total']:,.1f} GFLOP"),
        _row("  of which the teacher", f"{plan.sample_gflops['teacher']:,.1f} GFLOP"),
        _row("an iteration", f"{work['engine']:,.1f} TFLOP"),
        _row("  with a jvp of its own", f"{work['separate_jvp']:,.1f} TFLOP"),
        "",
        f"memory of a GPU in GiB, {plan.batch_gpu} samples at a time"
        + (", blocks computed again in the backward pass" if plan.checkpointing else ""),
        f"  {'':28}{'ddp':>10}{'fsdp2':>10}",
        *(
            f"  {title:28}{plan.memory_gib['ddp'][name]:10.2f}{plan.memory_gib['fsdp2'][name]:10.2f}"
            for name, title in PARTS.items()
            if plan.memory_gib["ddp"][name] or plan.memory_gib["fsdp2"][name]
        ),
        f"  {'most samples at a time':28}{plan.largest_batch_gpu['ddp']:10}{plan.largest_batch_gpu['fsdp2']:10}",
        f"  of {plan.memory_gib['available']:.1f} GiB to plan with",
        "",
        f"{plan.gpus} x {plan.gpu}, {plan.parallel}: {plan.accumulate} x {plan.batch_gpu} samples each an iteration",
        _row(f"hours at {plan.utilization:.0%} of {plan.peak_tflops:g} TFLOP/s", f"{hours['engine']:,.1f}"),
        _row("  with a jvp of its own", f"{hours['separate_jvp']:,.1f}"),
    ]
    return "\n".join(lines)


def _row(name: str, value: str) -> str:
    return f"  {name:38}{value:>16}"
