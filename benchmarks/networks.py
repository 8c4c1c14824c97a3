"""Which denoisers that others wrote does `trigflow.tangent` take? All of diffusers, in the configurations of its own tests.

    git clone https://github.com/huggingface/diffusers && git -C diffusers checkout 58eb52c
    python benchmarks/networks.py --diffusers diffusers                 # hours on two cores; goes on where it was
    python benchmarks/networks.py --diffusers diffusers --only Flux     # classes with that in their name
    python benchmarks/networks.py --diffusers diffusers --columns traced  # these columns again, and no others
    python benchmarks/networks.py --page                                # write docs/networks.md again, from the file
    python benchmarks/networks.py --check                               # only compare it with what would be written

The tests of diffusers import accelerate, parameterized and requests_mock.

Every class of `tests/models/unets` and `tests/models/transformers` of the checkout that says how to build a network
(`get_init_dict`) and what to call it with (`get_dummy_inputs`) is one configuration. Weights are random, none are zero;
directions are in the latents and the time at once. For each:

    tangent        relative error against central differences, in float64
    output         equal to that of a plain call, bit for bit
    gradients      of all parameters, bit for bit
    checkpointed   the same three with `enable_gradient_checkpointing()`, against the training mode without it; none where
                   a plain call fails
    bfloat16       output and gradients in bfloat16, bit for bit; none where a plain call fails
    traced         relative error of output, tangent and gradients of `trigflow.tangent.compile` with the backend "eager": the
                   graph as it was traced, at inputs that it was not made at
    compiled       the same of output and tangent with the backend "inductor", for some classes (`--compiled`)
    time           how far the output moves when the time moves by 0.2 of a unit, relative to the output

In float64 everything that a network casts to a shorter type is kept in float64, so that differences have all their digits.

Writes benchmarks/results/networks.json after each configuration, and docs/networks.md at the end.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from network_parts.cases import cases, resizes_without_torchvision
from network_parts.page import page
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from trigflow.runtime.files import ensure_folder, read_json, write_json, write_text
from trigflow.runtime.machine import machine
from trigflow.tangent import Compiled, compile, jvp

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "networks.md"
RESULTS = ROOT / "benchmarks" / "results" / "networks.json"
LATENTS = (
    "sample",
    "hidden_states",
    "x",
    "noisy_latents",
    "latents",
    "decoder_input_tokens",
    "bb_ca",
    "vision_tokens",
    "latent_image_embeds",
)
TIMES = (
    "timestep",
    "timesteps",
    "time",
    "t",
    "sigma",
    "timestep_ratio",
    "timestep_img",
    "r",
    "decoder_noise_time",
    "bb_ca_time",
    "vision_timesteps",
)
EXACT = 1e-6
COMPILED = (
    "DiTTransformer2DModel PixArtTransformer2DModel FluxTransformer2DModel LTXVideoTransformer3DModel UNet1DModel "
    "AllegroTransformer3DModel ErnieImageTransformer2DModel GlmImageTransformer2DModel HunyuanDiT2DModel "
    "LatteTransformer3DModel CogView3PlusTransformer2DModel CogVideoXTransformer3DModel ChromaTransformer2DModel "
    "BriaTransformer2DModel Flux2Transformer2DModel SanaTransformer2DModel"
).split()
SHORT = {torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64}
SHORT |= {torch.complex64: torch.complex128}
CASTS = {Tensor.float: Tensor.double, Tensor.half: Tensor.double, Tensor.bfloat16: Tensor.double, Tensor.cfloat: Tensor.cdouble}


class InDouble(TorchFunctionMode):
    """Casts to short types give double precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [SHORT.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        kwargs = {k: SHORT.get(a, a) if isinstance(a, torch.dtype) else a for k, a in (kwargs or {}).items()}
        return CASTS.get(func, func)(*args, **kwargs)


# Networks ------------------------------------------------------------------------------------------------------------


def configurations(checkout: Path) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Name of the class, name of the configuration, and its builder of `(network, inputs)`."""
    sys.path.insert(0, str(checkout))
    seen: set[Any] = set()
    for folder in ("unets", "transformers"):
        for file in sorted((checkout / "tests" / "models" / folder).glob("test_models_*.py")):
            try:
                module = importlib.import_module(f"tests.models.{folder}.{file.stem}")
            except Exception as reason:
                print(f"{file.name}: {reason}")
                continue
            finally:
                torch.use_deterministic_algorithms(False)
            for name, kind in list(vars(module).items()):
                if not isinstance(kind, type) or kind.__module__ != module.__name__ or not hasattr(kind, "get_init_dict"):
                    continue
                case = kind()
                try:  # base classes, and tests of quantization with inputs for the weights that they load
                    network = case.model_class.__name__
                    key = network, repr(case.get_init_dict()), repr(_shapes(case.get_dummy_inputs()))
                except (AttributeError, NotImplementedError):
                    continue
                if key not in seen:
                    seen.add(key)
                    yield network, name, case


def _shapes(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf, value)


class Case:
    """A network with its inputs, as a function of those that move.

    Attributes:
        fn: from the moving tensors to the outputs, a list of tensors.
        inputs: the moving tensors, latents first.
        times: how many of them, at the end, are the time.
    """

    def __init__(self, test: Any, dtype: torch.dtype, checkpointing: bool = False, training: bool = False) -> None:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        settings, given = test.get_init_dict(), test.get_dummy_inputs()
        self.net = test.model_class(**settings)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.net.parameters():
                p.add_(torch.randn(p.shape, generator=g) * (0.2 if p.ndim < 2 else max(p[0].numel(), 1) ** -0.5))
        takes = inspect.signature(self.net.forward).parameters
        self.options = {"return_dict": False} if "return_dict" in takes else {}
        self.net.to(dtype).train(training).requires_grad_(not getattr(test, "frozen", False))
        if checkpointing:
            # In backward, where the regions run again, no mode is active.
            self.net.enable_gradient_checkpointing(
                partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), InDouble()))
            )
        given = pytree.tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, given)
        main = next((n for n in (getattr(test, "main_input_name", None), *LATENTS) if n in given), None)
        clock = next((n for n in TIMES if given.get(n) is not None), None)
        if main is None:
            raise KeyError(f"no latents among {sorted(given)}")
        if clock is not None and not isinstance(given[clock], Tensor):
            given[clock] = torch.tensor([given[clock]])
        if clock is not None and not given[clock].is_floating_point() and self._takes_floats(test):
            given[clock] = given[clock].to(dtype)
        self.given, self.names = given, [n for n in (main, clock) if n is not None]
        leaves, self.tree = pytree.tree_flatten([given[n] for n in self.names])
        self.places = [i for i, v in enumerate(leaves) if isinstance(v, Tensor) and v.is_floating_point()]
        self.leaves, self.inputs = leaves, tuple(leaves[i].clone() for i in self.places)
        self.times = int(clock is not None and isinstance(given[clock], Tensor) and given[clock].is_floating_point())

    def _takes_floats(self, test: Any) -> bool:
        return not any(isinstance(m, nn.Embedding) and "time" in n for n, m in self.net.named_modules())

    def fn(self, *moving: Any) -> list[Any]:
        leaves = list(self.leaves)
        for i, value in zip(self.places, moving, strict=True):
            leaves[i] = value
        values = pytree.tree_unflatten(leaves, self.tree)
        torch.manual_seed(2)
        out = self.net(**{**self.given, **dict(zip(self.names, values, strict=True))}, **self.options)
        return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]

    def directions(self) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(3)
        return tuple(torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in self.inputs)

    def gradients(self, out: list[Tensor]) -> list[Tensor | None]:
        g = torch.Generator().manual_seed(4)
        if not any(y.requires_grad for y in out):
            return []
        total = sum((y * torch.randn(y.shape, generator=g).to(y.dtype)).sum() for y in out if y.requires_grad)
        return list(torch.autograd.grad(total, [p for p in self.net.parameters() if p.requires_grad], allow_unused=True))


# Comparisons ----------------------------------------------------------------------------------------------------------


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Relative, over all outputs together."""
    gap = sum(float((a - b).double().abs().square().sum()) for a, b in zip(found, expected, strict=True)) ** 0.5
    size = sum(float(b.double().abs().square().sum()) for b in expected) ** 0.5
    return gap / size if size > 0 else gap


def same(a: list[Any], b: list[Any]) -> bool:
    return all(x is y is None or (x is not None and y is not None and torch.equal(x, y)) for x, y in zip(a, b, strict=True))


def difference(case: Case, directions: tuple[Tensor, ...], h: float) -> list[Tensor]:
    """Central difference of fourth order."""

    def at(scale: float) -> list[Tensor]:
        return case.fn(*(x + scale * h * dx for x, dx in zip(case.inputs, directions, strict=True)))

    with torch.no_grad():
        return [(8 * (b - c) - (a - d)) / (12 * h) for a, b, c, d in zip(at(2), at(1), at(-1), at(-2), strict=True)]


def step(case: Case) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Output, tangent and gradients by the engine."""
    out, tangent = jvp(case.fn, case.inputs, case.directions())
    return [y.detach() for y in out], tangent, case.gradients(out)


def plain(case: Case) -> tuple[list[Tensor], list[Tensor | None]]:
    out = case.fn(*case.inputs)
    return [y.detach() for y in out], case.gradients(out)


def eager(test: Any) -> dict[str, Any]:
    with InDouble():
        case = Case(test, torch.float64)
        out, tangent, gradients = step(case)
        expected, right = plain(case)
        errors: list[float] = []
        for h in (1e-4, 1e-3, 1e-5, 1e-6, 1e-7):  # a difference is as sharp as its best step
            errors.append(error(tangent, difference(case, case.directions(), h)))
            if errors[-1] < 1e-8:
                break
        moved = case.fn(
            *case.inputs[: len(case.inputs) - case.times], *(t + 0.2 for t in case.inputs[-case.times :] if case.times)
        )
    return {
        "tangent": min(errors),
        "output": same(out, expected),
        "gradients": same(gradients, right),
        "time": error([y.detach() for y in moved], expected) if case.times else 0.0,
        "parameters": sum(p.numel() for p in case.net.parameters()),
    }


def checkpointed(test: Any) -> dict[str, Any]:
    with InDouble():
        case = Case(test, torch.float64, training=True)
        if not getattr(case.net, "_supports_gradient_checkpointing", False):
            return {"checkpointed": None}
        out, tangent, gradients = step(case)
        try:
            plain(Case(test, torch.float64, training=True, checkpointing=True))
        except RuntimeError:  # checkpoints its blocks with other arguments than it calls them with
            return {"checkpointed": None}
        again = step(Case(test, torch.float64, training=True, checkpointing=True))
        expected, right = plain(Case(test, torch.float64, training=True))
    equal = same(again[0], out) and same(again[2], gradients) and same(out, expected) and same(gradients, right)
    return {"checkpointed": equal and error(again[1], tangent) < EXACT}


def bfloat16(test: Any) -> dict[str, Any]:
    case = Case(test, torch.bfloat16)
    try:
        expected, right = plain(case)
    except RuntimeError:  # casts to other types that no weight has
        return {"bfloat16": None}
    others = [right, *(plain(case)[1] for _ in range(3))]
    out, tangent, gradients = step(case)
    finite = all(bool(t.isfinite().all()) for t in tangent)
    # Some kernels of PyTorch do not repeat their own sums.
    found = all(
        any(same([g], [b[i]]) for b in others) or not all(same([right[i]], [b[i]]) for b in others)
        for i, g in enumerate(gradients)
    )
    return {"bfloat16": same(out, expected) and found and finite}


def step_of(case: Case, backend: str) -> tuple[Compiled, Callable[..., Any]]:
    """The call of `jvp` as a graph, and as it is; no graph is an error."""

    def fn(*moving: Any) -> list[Any]:
        with InDouble():
            return case.fn(*moving)

    def tell(text: str) -> None:
        raise RuntimeError(text)

    return compile(fn, backend=backend, tell=tell), lambda *given: jvp(fn, *given)


def in_graph(case: Case, backend: str) -> tuple[float, float, int]:
    """Relative error of the graph at other inputs than those it was made at; the seconds that it took, and its nodes."""
    graph, engine = step_of(case, backend)
    began = time.perf_counter()
    graph(case.inputs, case.directions())
    seconds = round(time.perf_counter() - began, 1)
    moved = tuple(x + 0.01 * dx for x, dx in zip(case.inputs, case.directions(), strict=True))
    turned = tuple(2 * dx for dx in case.directions())
    results: list[Any] = []
    for step in (graph, engine):
        out, tangent = step(moved, turned)
        results.append(([*(y.detach() for y in out), *tangent], case.gradients(out)))
    (values, gradients), (expected, right) = results
    assert [g is None for g in gradients] == [g is None for g in right]
    known = [[g for g in side if g is not None] for side in (gradients, right)]
    ((run,),) = graph.kinds.values()
    return max(error(values, expected), error(*known)), seconds, len(run[0].graph.graph.nodes) if run else 0


def traced(test: Any, compile: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with InDouble():
        case = Case(test, torch.float64)
    found["traced"], found["trace_seconds"], found["nodes"] = in_graph(case, "eager")
    if compile:
        case.net.requires_grad_(False)
        with torch.no_grad():
            found["compiled"], found["compile_seconds"], _ = in_graph(case, "inductor")
        torch._dynamo.reset()
    return found


# All of them ----------------------------------------------------------------------------------------------------------


COLUMNS: dict[str, Callable[..., dict[str, Any]]] = {
    "tangent": eager,
    "checkpointed": checkpointed,
    "bfloat16": bfloat16,
    "traced": traced,
}
IN_GRAPHS = ("traced", "nodes", "trace_seconds", "compiled", "compile_seconds")


def measure(test: Any, columns: dict[str, Callable[[Any], dict[str, Any]]]) -> dict[str, Any]:
    """Some columns of one configuration; `failures` has the message of each that raised."""
    found: dict[str, Any] = {"failures": {}}
    for name, column in columns.items():
        try:
            found |= column(test)
        except Exception as reason:
            found["failures"][name] = f"{type(reason).__name__}: {reason}"[:500]
    return found


def exact(row: dict[str, Any]) -> bool:
    """Whether the tangent is that of the differences, and output and gradients those of a plain call."""
    return row.get("tangent", 1.0) < EXACT and bool(row.get("output") and row.get("gradients"))


def runs(test: Any) -> None:
    """Raise unless the network runs; freeze its parameters where PyTorch has no backward on this device."""
    case = Case(test, torch.float32)
    try:
        case.fn(*case.inputs)
    except NotImplementedError as reason:
        if "backward on CPU" not in str(reason):
            raise
        test.frozen = True


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    """By column, how many classes pass in every configuration, of how many that have it."""
    tests: dict[str, Callable[[dict[str, Any]], bool | None]] = {
        "exact": exact,
        "checkpointed": lambda r: r.get("checkpointed", False),
        "bfloat16": lambda r: r.get("bfloat16", False),
        "traced": lambda r: r.get("traced", 1.0) < EXACT if "traced" in (*r, *r["failures"]) else None,
        "compiled": lambda r: r["compiled"] < EXACT if "compiled" in r else None,
        "time": lambda r: r.get("time", 0.0) > 0,
    }
    found = {}
    for name, test in tests.items():
        by_class: dict[str, list[bool]] = {}
        for row in rows.values():
            verdict = test(row)
            if verdict is not None:
                by_class.setdefault(row["class"], []).append(bool(verdict))
        found[name] = [sum(all(v) for v in by_class.values()), len(by_class)]
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--diffusers", type=Path, help="a checkout of the repository of diffusers")
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of classes")
    parser.add_argument("--compiled", nargs="*", default=COMPILED, help="classes to compile with inductor")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="write docs/networks.md and measure nothing")
    parser.add_argument("--check", action="store_true", help="compare docs/networks.md and measure nothing")
    parser.add_argument("--columns", nargs="*", choices=COLUMNS, help="measure these alone, those that the file has too")
    parser.add_argument("--again", action="store_true", help="measure what the file already has")
    args = parser.parse_args(arguments)
    if args.page or args.check:
        text = page(read_json(args.json, "results"))
        if args.page:
            write_text(PAGE, text)
        sys.exit(int(PAGE.read_text() != text))
    if args.diffusers is None:
        parser.error("--diffusers is needed")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    resizes_without_torchvision()
    rows: dict[str, Any] = read_json(args.json, "results")["configurations"] if args.json.exists() else {}
    for network, name, test in (*configurations(args.diffusers), *cases()):
        key = f"{network}.{name}"
        if args.only and not any(part in network for part in args.only):
            continue
        others = [row for k, row in rows.items() if row["class"] == network and k != key]
        compile = network in args.compiled and not any("compiled" in row for row in others)
        if key in rows and args.columns:
            columns = {name: COLUMNS[name] for name in args.columns if name != "traced"}
            if "traced" in args.columns and not any("traced" in row for row in others):
                columns["traced"] = partial(traced, compile=compile)
                rows[key] = {k: v for k, v in rows[key].items() if k not in IN_GRAPHS}
            runs(test)
            failures = {k: v for k, v in rows[key]["failures"].items() if k not in columns}
            found = measure(test, columns)
            rows[key] |= {**found, "failures": failures | found["failures"]}
        elif key in rows and not args.again:
            if not compile or "compiled" in rows[key]:
                continue
            rows[key] |= measure(test, {"traced": partial(traced, compile=True)})
        else:
            try:
                runs(test)
            except Exception as reason:
                print(f"{key}: not a network that runs as it is: {reason}"[:200])
                continue
            columns = {name: column for name, column in COLUMNS.items() if name != "traced"}
            if compile or not any("traced" in row for row in others):
                columns["traced"] = partial(traced, compile=compile)
            rows[key] = {"class": network, **measure(test, columns)}
        print(key, json.dumps(rows[key]), flush=True)
        ensure_folder(args.json.parent)
        about = {"machine": machine(), "diffusers": diffusers.__version__, "summary": summary(rows)}
        write_json(args.json, {**about, "configurations": rows})
    print(summary(rows))
    if args.json == RESULTS:
        write_text(PAGE, page(read_json(RESULTS, "results")))


if __name__ == "__main__":
    main()
