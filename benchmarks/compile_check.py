"""Do compiled tangents equal those of the engine? All networks of the package, and four of diffusers, eager against compiled.

    make compile-check                                         # on a CPU about ten minutes, less with a warm cache
    python benchmarks/compile_check.py --only unet dit --ratio
    python benchmarks/compile_check.py --backend aot_eager     # the graphs, without what inductor makes of them

For each network: output, tangent and gradients of all parameters of the loss of a consistency step, compiled, against those
of the engine, in float32; and the losses and updates of ten training steps with Adam from the same weights. Errors are
relative, of norms; a network is equal where none exceeds 1e-3. Nothing is drawn at random. With `--ratio` the consistency
step is timed against the compiled plain step of the same network, in turns, forward and backward without an optimizer; the
U-Net has 0.83M parameters and a batch of 64 images of 28x28, and the others are too small for their times to mean much.

With inductor, a second compilation of each is to find the code of the first in the cache folder (trigflow's own), as a later
process does.

The last line says how many are equal; exit code 1 where one is not, or where one ran without being compiled.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_parts.networks import configs
from tangent_parts.networks import unet
from torch import Tensor, nn
from torch._dynamo.utils import counters

from trigflow.data.cache import cache_folder
from trigflow.networks import build
from trigflow.runtime.files import ensure_folder, write_json
from trigflow.runtime.heap import freed_memory_kept
from trigflow.runtime.machine import machine
from trigflow.tangent import Compiled, jvp

MOST = 1e-3
"""Relative error up to which two results are equal: ten steps of Adam, in float32, on sums in another order."""
STEPS = 10
B = 2


@dataclasses.dataclass
class Subject:
    """A network, and how it is called."""

    name: str
    net: nn.Module
    shape: tuple[int, ...]
    told: dict[str, Any] = dataclasses.field(default_factory=dict)
    call: Callable[..., Any] | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t, **self.told) if self.call is None else self.call(self.net, x, t, **self.told)


def package(device: str) -> Iterator[Subject]:
    """The networks of the package; the U-Net at a size at which a time means something."""
    yield Subject("unet", unet(1, 32, 1)(), (64, 1, 28, 28))
    for kind, config in configs(8).items():
        if kind != "unet":
            shape = (B, 7) if kind == "mlp" else (B, 3, 8, 8)
            told = {"label": torch.tensor([0, 5], device=device), "guidance": torch.tensor([1.0, 1.6], device=device)}
            yield Subject(kind, build(dataclasses.replace(config, **SMALLER.get(kind, {}))), shape, told)


SMALLER: dict[str, dict[str, Any]] = {"edm2": {"width": 16}, "dit": {"width": 32, "depth": 1}}


def of_diffusers(device: str) -> Iterator[Subject]:
    """Four kinds of denoisers: convolutions, cross-attention, joint attention, linear attention."""
    import diffusers

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device)

    def latents_first(net: nn.Module, x: Tensor, t: Tensor, **told: Any) -> Any:
        return net(x, timestep=t, return_dict=False, **told)[0]

    levels = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    tokens = {"in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
    names = {
        "UNet2DModel": (
            {**levels, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 8,
             "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
            {},
        ),
        "UNet2DConditionModel": (
            {**levels, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 2,
             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 12},
            {"encoder_hidden_states": draw(B, 5, 12)},
        ),
        "SD3Transformer2DModel": (
            {**tokens, "out_channels": 4, "joint_attention_dim": 12, "caption_projection_dim": 16,
             "pooled_projection_dim": 10, "pos_embed_max_size": 8, "qk_norm": "rms_norm"},
            {"encoder_hidden_states": draw(B, 5, 12), "pooled_projections": draw(B, 10)},
        ),
        "SanaTransformer2DModel": (
            {**tokens, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8,
             "cross_attention_dim": 16, "caption_channels": 12, "patch_size": 1},
            {"encoder_hidden_states": draw(B, 5, 12)},
        ),
    }  # fmt: skip
    for name, (settings, told) in names.items():
        yield Subject(name, getattr(diffusers, name)(**settings), (B, 4, 8, 8), told, latents_first)


def relative_error(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """The largest of the errors of tensors, each against its own norm and a thousandth of the largest norm."""
    kept = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    if any(a is None for a, _ in kept):
        return float("inf")
    floor = 1e-3 * max(b.norm().item() for _, b in kept) + 1e-12
    return max((a - b).norm().item() / max(b.norm().item(), floor) for a, b in kept if a is not None)


class Check:
    """One network, eager and compiled."""

    def __init__(self, subject: Subject, device: str, backend: str) -> None:
        torch.manual_seed(0)
        self.subject, self.said = subject, []
        subject.net.to(device).train()
        with torch.no_grad():
            for weight in subject.net.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.02)
        x, dx = torch.randn(subject.shape, device=device), torch.randn(subject.shape, device=device)
        t = torch.linspace(0.2, 1.4, len(x), device=device)
        self.primals, self.tangents = (x, t), (dx, torch.ones_like(t))
        self.target = torch.randn(subject.shape, device=device)
        settings: Any = {"backend": backend, "cache": cache_folder() / "compiled", "tell": self.said.append}
        self.eager, self.settings = self.consistency, settings
        self.compiled = Compiled(self.consistency, name=subject.name, **settings)
        self.compiled_plain = Compiled(self.plain, name=f"{subject.name}, plain", **settings)

    def plain(self, primals: Any, target: Tensor) -> Tensor:
        """The loss of a diffusion step."""
        return (self.subject(*primals) - target).square().mean()

    def consistency(self, primals: Any, tangents: Any) -> dict[str, Tensor]:
        """The loss of a consistency step, whose target is moved along the normalized tangent."""
        out, tangent = jvp(self.subject, primals, tangents)
        norm = tangent.flatten(1).norm(dim=1).reshape(-1, *[1] * (out.ndim - 1))
        target = out.detach() - tangent / (norm + 0.1)
        return {"loss": (out - target).square().mean(), "output": out.detach(), "tangent": tangent}

    def results(self, step: Callable[..., dict[str, Tensor]]) -> dict[str, list[Tensor | None]]:
        parameters = list(self.subject.net.parameters())
        found = step(self.primals, self.tangents)
        gradients = torch.autograd.grad(found["loss"], parameters, allow_unused=True)
        return {"output": [found["output"]], "tangent": [found["tangent"]], "gradients": list(gradients)}

    def training(self, step: Callable[..., dict[str, Tensor]]) -> dict[str, list[Tensor | None]]:
        """Ten steps from the weights as they are, which come back afterwards."""
        net = self.subject.net
        before = copy.deepcopy(net.state_dict())
        # An eps of the size of gradients: Adam makes a whole step of a gradient that is nothing but rounding.
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, eps=1e-3)
        losses = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = step(self.primals, self.tangents)["loss"]
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        moved = [p.detach() - before[name] for name, p in net.named_parameters()]
        net.load_state_dict(before)
        return {"ten losses": [torch.stack(losses)], "ten updates": [torch.cat([m.flatten() for m in moved])]}

    def errors(self) -> dict[str, float]:
        """Relative errors by name."""
        errors = {}
        for compare in (self.results, self.training):
            found, expected = compare(self.compiled), compare(self.eager)
            errors |= {name: relative_error(found[name], expected[name]) for name in expected}
        return errors

    def found_again(self) -> bool:
        """Whether compiling once more finds all of its code."""
        torch._dynamo.reset()
        counters.clear()
        Compiled(self.consistency, **self.settings)(self.primals, self.tangents)
        found = counters["aot_autograd"]
        return found["autograd_cache_hit"] == 1 and found["autograd_cache_miss"] == 0

    def ratio(self, rounds: int) -> dict[str, float]:
        """Medians over paired rounds: seconds of each step, compiled and eager, and what one costs over another."""
        calls = {
            "plain": lambda: self.compiled_plain(self.primals, self.target),
            "consistency": lambda: self.compiled(self.primals, self.tangents)["loss"],
            "eager plain": lambda: self.plain(self.primals, self.target),
            "eager consistency": lambda: self.eager(self.primals, self.tangents)["loss"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for k in range(rounds + 2):
            for name, call in calls.items():
                self.subject.net.zero_grad(set_to_none=True)
                began = time.perf_counter()
                call().backward()
                if self.target.is_cuda:
                    torch.cuda.synchronize()
                if k >= 2:
                    seconds[name].append(time.perf_counter() - began)
        found = {name: median(values) for name, values in seconds.items()}
        for name, over in (
            ("consistency", "plain"),
            ("eager consistency", "eager plain"),
            ("consistency", "eager consistency"),
        ):
            pairs = zip(seconds[name], seconds[over], strict=True)
            found[f"{name} over {over}"] = median(a / b for a, b in pairs)
        return found


def main() -> int:
    """Run the checks; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of networks")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--ratio", action="store_true", help="time the steps too")
    parser.add_argument("--rounds", type=int, default=15, help="of the timing")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: dict[str, Any] = {}
    for subject in (*package(device), *of_diffusers(device)):
        if options.only and subject.name not in options.only:
            continue
        began = time.perf_counter()
        check = Check(subject, device, options.backend)
        with freed_memory_kept():
            errors = check.errors()
            seconds = time.perf_counter() - began
            row = {"errors": errors, "seconds": seconds, "equal": max(errors.values()) <= MOST and not check.said}
            if options.backend == "inductor":
                row["found again"] = check.found_again()
                row["equal"] = row["equal"] and row["found again"]
            if options.ratio:
                row["times"] = check.ratio(options.rounds)
        row["said"] = check.said
        rows[subject.name] = row
        worst = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        over = f"  over the compiled plain step {row['times']['consistency over plain']:.2f}" if options.ratio else ""
        print(f"{subject.name:22s} {'equal' if row['equal'] else 'NOT EQUAL'}  {worst}  ({seconds:.0f} s){over}", flush=True)
        if not row.get("found again", True):
            print("    compiled again, its code was not found in the cache folder")
        for text in check.said:
            print(f"    {text}")
        if options.json:
            ensure_folder(options.json.parent)
            written = {"machine": machine(), "command": " ".join(sys.argv), "backend": options.backend, "device": device}
            write_json(options.json, {**written, "networks": rows})
    equal = sum(row["equal"] for row in rows.values())
    ratios = [f"{name} {row['times']['consistency over plain']:.2f}" for name, row in rows.items() if "times" in row]
    print(f"compiled {equal} of {len(rows)} equal" + (f", consistency over plain step: {', '.join(ratios)}" if ratios else ""))
    return 0 if equal == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
