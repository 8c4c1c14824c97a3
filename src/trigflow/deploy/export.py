"""A run folder in the form of another tool: a diffusers pipeline, a TorchScript file or an ONNX file.

The last two hold the velocity `v = sd F(x_t / sd, t, **conditions)` for any batch size, with `model.json`, which says
what goes in and at which times to call it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trigflow.conditions import in_order, null, takes
from trigflow.deploy.card import description_of
from trigflow.deploy.onnx import Named, exported, quiet, require
from trigflow.deploy.variants import require_float32
from trigflow.models.model import Model, based_on, load, source_of
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import write_folder, write_json
from trigflow.runtime.places import check_outside, check_place
from trigflow.samplers import sigma_grid

Format = Literal["diffusers", "torchscript", "onnx", "comfyui", "space"]

TOLERANCE = 1e-4
"""Largest difference allowed between the velocity of an exported file and PyTorch's, for noise of variance sd^2."""

STEPS = (1, 2, 4)
"""Numbers of steps whose times are in `model.json`."""

EMBEDDED = 1 << 30
"""Bytes of weights up to which an ONNX file holds them itself; larger ones lie beside it."""


class Velocity(Named):
    """`v = sd F(x / sd, t, **conditions)`, its inputs by position: x, t, then the conditions that the network takes, in order.

    Shapes: x `(b, *shape)`, t `(b,)`, label int64 `(b,)`, guidance `(b,)`, end `(b,)`, others `(b, ...)`; result like x.
    """

    def __init__(self, model: Model) -> None:
        fixed = getattr(model.network, "for_sampling", None)
        super().__init__(model.network if fixed is None else fixed(), ("x", "t", *in_order(takes(model.network))))
        self.sd = model.process.sigma_data

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.sd * super().forward(inputs[0] / self.sd, *inputs[1:])


def export_run(run: str | Path, out: str | Path, to: Format, whole: bool = False) -> str:
    """Write the model of a run folder in another form, all files or none.

    Args:
        run: folder of a teacher or a student.
        out: the folder to create; it must not exist, or be empty.
        to: `diffusers`: a pipeline with a model card, of a consistency student that jumps to time 0; see
            `trigflow.deploy.pipeline`. Of a student of a teacher from diffusers its adapter, or `comfyui` and `space`; see
            `trigflow.deploy.adapters`. `torchscript` or `onnx`: the velocity of any model; see `export_network`.
        whole: with `diffusers`, of adapters: the whole pipeline, with the adapters added to its weights.

    Returns:
        A line that says what was written.

    Raises:
        MissingExtraError: without the packages that the form needs.
        UserError: for a folder that is no run folder, one that exists, or a model that has no such form.
    """
    out = check_place(out, "new folder", "OUT")
    check_outside(out, source_of(run), "OUT")
    adapted = to in ("comfyui", "space") or (to == "diffusers" and based_on(run))
    if to == "diffusers" and not adapted:
        from trigflow.deploy.pipeline import TrigFlowPipeline

        pipe = TrigFlowPipeline.from_run(run)
        pipe.set_progress_bar_config(disable=True)  # type: ignore[attr-defined]
        write_folder(out, pipe.save_pretrained)
        return f"{out}: open it with TrigFlowPipeline.from_pretrained('{out}')"
    model, said = load(run, "cpu"), ""

    def fill(folder: Path) -> None:
        nonlocal said
        if adapted:
            from trigflow.deploy.adapters import export_student

            form: Any = to if to != "diffusers" else "pipeline" if whole or not model.spec.adapter.rank else "adapter"  # type: ignore[attr-defined]
            said = export_student(model, folder, form).replace(str(folder), str(out))  # written beside it first
        else:
            said = f"{out}: {export_network(model, folder, to)}"  # type: ignore[arg-type]

    write_folder(out, fill)
    return said


def export_network(model: Model, folder: Path, to: Literal["torchscript", "onnx"]) -> str:
    """Write `network.pt` or `network.onnx` and `model.json` into a folder, and compare the file with PyTorch.

    Returns:
        What the file takes, and how far it was from PyTorch.

    Raises:
        MissingExtraError: without onnx, onnxscript and onnxruntime, for ONNX.
        UserError: if the file does not give what PyTorch gives, to `TOLERANCE`; for weights that are not float32.
    """
    require_float32(model)
    velocity = Velocity(model).eval()
    path = folder / ("network.pt" if to == "torchscript" else "network.onnx")
    run = (_torchscript if to == "torchscript" else _onnx)(velocity, _inputs(model, velocity, 2), path)
    with torch.no_grad():
        given = _inputs(model, velocity, 3)
        difference = float((run(given) - velocity(*given)).abs().max())
    if not difference <= TOLERANCE:
        path.unlink(missing_ok=True)
        raise UserError(
            f"the exported network differs from PyTorch by {difference:.2g}; expected at most {TOLERANCE:g}; use another "
            f"version of {'torch' if to == 'torchscript' else 'onnxscript and onnxruntime'}, or another --to"
        )
    write_json(folder / "model.json", {"file": path.name, "inputs": list(velocity.names), **_description(model)})
    return f"{path.name} takes {', '.join(velocity.names)}; within {difference:.1e} of PyTorch"


def _torchscript(velocity: Velocity, given: tuple[Tensor, ...], path: Path) -> Callable[[tuple[Tensor, ...]], Tensor]:
    with quiet(), torch.no_grad():
        traced = torch.jit.trace(velocity, given, check_trace=False)  # it is compared at another batch size
        path.write_bytes(traced.save_to_buffer())  # on a full disk, `save` ends the process
        read = torch.jit.load(str(path))
    return lambda inputs: read(*inputs)


def _onnx(velocity: Velocity, given: tuple[Tensor, ...], path: Path) -> Callable[[tuple[Tensor, ...]], Tensor]:
    require("export to ONNX")
    import onnxruntime  # type: ignore[import-untyped]

    program = exported(velocity, dict(zip(velocity.names, given, strict=True)), "velocity")
    size = sum(tensor.numel() * tensor.element_size() for tensor in velocity.state_dict().values())
    with quiet():
        program.save(str(path), external_data=size > EMBEDDED)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(inputs: tuple[Tensor, ...]) -> Tensor:
        fed = {name: value.numpy() for name, value in zip(velocity.names, inputs, strict=True)}
        return torch.from_numpy(session.run(["velocity"], fed)[0])

    return run


def _inputs(model: Model, velocity: Velocity, b: int) -> tuple[Tensor, ...]:
    """Inputs for a batch of b, spread over the times."""
    t = torch.linspace(model.process.t_max, 0.1, b, dtype=torch.float32)
    values = {
        "x": model.process.sigma_data
        * torch.randn(b, *model.shape, generator=torch.Generator().manual_seed(b), dtype=torch.float32),
        "t": t,
        **model.conditioner.conditions(None, b),
        "guidance": torch.linspace(1, model.sampling.guidance_max, b, dtype=torch.float32),
        "end": t / 2,
    }
    return tuple(values[name] for name in velocity.names)


def _description(model: Model) -> dict[str, Any]:
    """What a program without trigflow has to know; the times are those of `trigflow sample`."""
    process, sampling = model.process, model.sampling
    times: dict[int, tuple[float, ...]]
    if model.kind == "diffusion":
        times = {steps: tuple(sigma_grid(process, steps)[:-1].tolist()) for steps in (model.default_steps(), 64)}
    else:
        steps = (sampling.segments,) if sampling.jumps == "segments" else (*STEPS, *model.times)
        times = {n: model.schedule(n) for n in steps}
    return {
        **description_of(model),
        "sampler": "renoise" if model.kind == "consistency" and sampling.jumps == "zero" else "jump",
        "sigma_data": process.sigma_data,
        "null": {name: row.tolist() for name, row in null(model.network).items()},
        "guidance": [1.0, sampling.guidance_max] if "guidance" in model.takes else None,
        "times": {str(steps): list(values) for steps, values in sorted(times.items())},
    }
