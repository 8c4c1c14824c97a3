"""docs/networks.md, from the results of benchmarks/networks.py."""

from __future__ import annotations

from typing import Any

HEAD = """\
# Networks of diffusers

What [the tangent engine](tangent.md) does with every denoiser of diffusers {version} as it comes. This page is written by
`python benchmarks/networks.py --page` from [networks.json](../benchmarks/results/networks.json); the script says how to measure
it anew. Configurations are those of diffusers' own tests, and some of our own for the classes that those leave out.

In {classes} classes ({configurations} configurations): tangents are exact in {exact}, traced graphs of the call in
{traced}, `enable_gradient_checkpointing()` changes nothing in {checkpointed}, outputs and gradients in bfloat16 are those
of a plain call in {bfloat16}. Compiled by inductor, {compiled} graphs are exact. The output moves with the time in {time}.

* *tangent*: relative error against central differences of fourth order, in float64 with everything that a network casts to a
  shorter type kept in float64, directions in the latents and the time at once, random weights of which none are zero. Output
  and gradients of all parameters equal those of a plain call bit for bit wherever the tangent is exact.
* *checkpointed*: output and gradients in training mode bit for bit, and the tangent, with gradient checkpointing as without;
  empty for a class that has none, or that fails with it by itself.
* *bfloat16*: output and gradients in bfloat16, bit for bit, where the kernels of PyTorch repeat their own; empty for a network
  that does not run in it.
* *traced*: relative error of output, tangent and gradients of all parameters by `trigflow.tangent.compile` with the backend
  "eager", which is the graph as it was traced, at inputs other than those it was made at, and the nodes of that graph.
  *compiled*: the same of output and tangent with the backend "inductor", for some of the classes.
* *time*: how far the output moves when the time moves by 0.2, relative to its size, at the times of the configuration. Where it
  is 0 the network takes no time, rounds it, or leaves it out of this pass: its tangent along the time is zero, without an
  error. `coverage(..., time=1)` says so of any network.

Flexible attention has no backward on the CPU in PyTorch; the parameters of classes that use it were frozen there.
HiDreamImageTransformer2DModel sends tokens to experts by the values of its activations, through NumPy: no graph stands for
that, and `trigflow.tangent.compile` runs it as it is, which it says in one line.

| class | parameters | tangent | checkpointed | bfloat16 | traced | nodes | compiled | time |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def page(results: dict[str, Any]) -> str:
    """The text of docs/networks.md: one row a class, the worst of its configurations in each column."""
    rows: dict[str, dict[str, Any]] = results["configurations"]
    by_class: dict[str, list[dict[str, Any]]] = {}
    for row in rows.values():
        by_class.setdefault(row["class"], []).append(row)
    passed = {name: f"{a} of {b}" if a < b else f"all {b}" for name, (a, b) in results["summary"].items()}
    head = HEAD.format(version=results["diffusers"], classes=len(by_class), configurations=len(rows), **passed)
    return head + "\n".join(f"| {kind} | {' | '.join(_cells(group))} |" for kind, group in sorted(by_class.items())) + "\n"


def _cells(group: list[dict[str, Any]]) -> list[str]:
    return [
        _size(max(row["parameters"] for row in group)),
        _error([row.get("tangent") for row in group]),
        _verdict([row.get("checkpointed", False) for row in group if row.get("checkpointed", False) is not None]),
        _verdict([row.get("bfloat16", False) for row in group if row.get("bfloat16", False) is not None]),
        _error([row.get("traced") for row in group if "traced" in (*row, *row["failures"])]),
        next((str(row["nodes"]) for row in group if "nodes" in row), ""),
        _error([row["compiled"] for row in group if "compiled" in row]),
        f"{min(row['time'] for row in group):.0e}" if all(row.get("time") for row in group) else "0",
    ]


def _size(parameters: int) -> str:
    return f"{parameters / 1e6:.1f}M" if parameters >= 1e6 else f"{parameters / 1e3:.0f}k"


def _error(values: list[float | None]) -> str:
    if not values:
        return ""
    known = [v for v in values if v is not None]
    return f"{max(known):.0e}" if len(known) == len(values) else "fails"


def _verdict(values: list[bool]) -> str:
    return "" if not values else "yes" if all(values) else "no"
