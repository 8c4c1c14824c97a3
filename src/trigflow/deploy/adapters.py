"""Students of teachers from diffusers, in the forms that its users have: an adapter, a whole pipeline, ComfyUI, a demo.

What was trained for TrigFlow draws the same with schedulers of diffusers, where the pipeline takes times of one's own: between
two steps they jump to x0 and add fresh noise, as consistency sampling does.

=====================  =========================  ==============================
the teacher predicts   scheduler                  times of a call of the pipeline
=====================  =========================  ==============================
flow                   FlowMatchLCMScheduler      `sigmas=[1.0, ...]`
epsilon, v, x0         LCMScheduler, with         `timesteps=[999, ...]`
                       `timestep_scaling` so
                       large that it has no say
=====================  =========================  ==============================
"""

import contextlib
import copy
import inspect
import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trigflow.models.foreign import Foreign, ForeignConfig, open_base
from trigflow.models.foreign.adapters import is_adapter
from trigflow.models.foreign.base import Base, class_named, loaded
from trigflow.models.foreign.family import family_named
from trigflow.models.foreign.quantized import QuantizedLinear
from trigflow.models.model import Model
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import write_json, write_tensors, write_text

Form = Literal["adapter", "pipeline", "comfyui", "space"]
WEIGHTS = "pytorch_lora_weights.safetensors"
STEPS = (1, 2, 4)


def export_student(model: Model, folder: Path, form: Form) -> str:
    """Write a student of a teacher from diffusers into a folder; returns how to open it.

    Args:
        model: drawn by consistency sampling.
        folder: there, and empty.
        form: `adapter`: weights that `load_lora_weights` reads, a scheduler, a card. `pipeline`: the whole pipeline, with
            the adapter added to its weights. `comfyui`: an adapter by the names that ComfyUI knows, and nodes. `space`: an
            adapter and a Gradio app.

    Raises:
        UserError: for a model that is no such student, or adapters where everything was trained.
    """
    network, spec = model.network, model.spec
    if not isinstance(network, Foreign) or not isinstance(spec, ForeignConfig):
        raise UserError("a network of trigflow's own; expected a student of a teacher from diffusers; use --to diffusers")
    if model.kind != "consistency" or model.sampling.jumps != "zero" or model.sampling.noise != 1:
        raise UserError(
            "a teacher, or a student of jumps other than to time 0; expected one of --objective.kind scd; distill one"
        )
    if form != "pipeline" and not spec.adapter.rank:
        raise UserError("a student without adapters, every weight of which was trained; expected --form pipeline; choose it")
    base = open_base(spec.base)
    scheduler = scheduler_of(base, spec)
    scale = float(network.none_guidance) if "guidance" in network.names else 1.0  # type: ignore[arg-type]
    kind = pipeline_class(base)
    if form in ("adapter", "space") and not hasattr(kind, "load_lora_weights"):
        raise UserError(
            f"{kind.__name__} of diffusers loads no adapters; expected one that has load_lora_weights; write the whole "
            "pipeline: --to diffusers --whole"
        )
    taken = inspect.signature(kind.__call__).parameters
    how: dict[int, dict[str, Any]] = {}
    for n in STEPS:
        how[n] = {k: v for k, v in {**times_of(model, base, n), "guidance_scale": scale}.items() if k in taken}
    height, width = model.codec.drawn_shape[-2:]
    more = {"height": height, "width": width, "use_resolution_binning": False}
    more |= {"num_frames": 1} if len(model.shape) == 4 and model.shape[1] == 1 else {}
    more = {key: value for key, value in more.items() if key in taken}
    if form == "pipeline":
        pipeline = loaded(lambda: kind.from_pretrained(base.folder, torch_dtype=torch.float32), base)
        setattr(pipeline, base.component, merged(network))
        pipeline.scheduler = scheduler
        pipeline.save_pretrained(folder)
    elif form == "comfyui":
        write_tensors(folder / WEIGHTS, comfy_names(network, base))
        nodes = folder / "trigflow_nodes"
        nodes.mkdir()
        write_text(nodes / "__init__.py", template("comfyui_nodes.txt").replace("@SIGMAS@", repr(comfy_sigmas(model))))
    else:
        save_adapter(network, base, folder)
        scheduler.save_pretrained(folder / "scheduler")
    write_json(
        folder / "trigflow.json", {"base": base.title, "predicts": spec.predicts, "calls": {str(k): v for k, v in how.items()}}
    )
    write_text(folder / "README.md", card(model, base, scheduler, {**how[2], **more}, form))
    if form == "space":
        call = {
            "base": base.name,
            "scheduler": type(scheduler).__name__,
            "call": {**how[2], **more, "output_type": "pil"},
            "steps": 2,
        }
        write_text(folder / "app.py", template("space_app.txt").replace("@SETTINGS@", json.dumps(call)))
        write_text(folder / "requirements.txt", "diffusers>=0.42\ntransformers>=4.56\npeft>=0.17\ngradio>=5\ntorch\n")
    return {
        "adapter": f"{folder}: pipe.load_lora_weights('{folder}'), as in its README.md",
        "pipeline": f"{folder}: DiffusionPipeline.from_pretrained('{folder}')",
        "comfyui": f"{folder}: {WEIGHTS} belongs into models/loras, trigflow_nodes into custom_nodes",
        "space": f"{folder}: python app.py"
        + (
            "; before it becomes a Space, put the name that the base has on the hub into app.py, in place of its folder here"
            if Path(base.name).is_dir()
            else ", or push it to a Space"
        ),
    }[form]


def scheduler_of(base: Base, spec: ForeignConfig) -> Any:
    """The scheduler of diffusers that draws students of this teacher; see the module."""
    import diffusers

    stock: Any = diffusers
    config = base.config("scheduler", "scheduler_config.json")
    if spec.predicts == "flow":
        return stock.FlowMatchLCMScheduler(num_train_timesteps=config.get("num_train_timesteps", 1000))
    kept = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps", "rescale_betas_zero_snr")
    known = {key: config[key] for key in (*kept, "prediction_type") if config.get(key) is not None}
    steps = config.get("num_train_timesteps", 1000)  # so that it warns of none that is chosen
    alphas = base.alphas_cumprod().double()
    how = {"original_inference_steps": steps, "clip_sample": False, "set_alpha_to_one": True, "timestep_scaling": 1e6}
    with contextlib.suppress(NotImplementedError):
        made = stock.LCMScheduler(**known, **how)
        if torch.allclose(made.alphas_cumprod.double(), alphas, rtol=0, atol=1e-6):
            return made
    betas = 1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])  # of a schedule that it has no name for
    own = {"trained_betas": betas.tolist(), "num_train_timesteps": steps, "prediction_type": known.get("prediction_type")}
    return stock.LCMScheduler(**{key: value for key, value in own.items() if value is not None}, **how)


def times_of(model: Model, base: Base, steps: int) -> dict[str, list[float]]:
    """Arguments of a call of the pipeline that draw in so many steps: the times of the student, the first of which is pure
    noise, as the pipeline begins; of a denoiser or pipeline of discrete times the nearest of these."""
    times = (math.pi / 2, *model.schedule(steps)[1:])
    if model.spec.predicts == "flow":  # type: ignore[attr-defined]
        sigmas, family = [math.sin(t) / (math.cos(t) + math.sin(t)) for t in times], family_named(model.spec.family)  # type: ignore[attr-defined]
        return {"timesteps": [round(family.time_scale * s) for s in sigmas]} if family.whole_times else {"sigmas": sigmas}
    angles = torch.acos(base.alphas_cumprod().double().sqrt())
    return {"timesteps": [int((angles - t).abs().argmin()) for t in times]}


def pipeline_class(base: Base) -> Any:
    """The class of a pipeline in diffusers."""
    return class_named(str(base.index["_class_name"]), base)


def merged(network: Foreign) -> nn.Module:
    """A copy of the denoiser, in float32, in which adapters are added to the weights that they change."""
    model = copy.deepcopy(network.model)
    for path, layer in [*model.named_modules()]:
        if isinstance(layer, QuantizedLinear):
            model.set_submodule(path, layer.plain())
    model.float()  # in half precision, what adapters add would be lost in rounding
    for path, layer in [*model.named_modules()]:
        if hasattr(layer, "merge") and hasattr(layer, "get_base_layer"):
            layer.merge()
            model.set_submodule(path, layer.get_base_layer())
    return model


def adapter_state(network: Foreign) -> dict[str, Tensor]:
    """Weights of the adapters by the names that peft saves them under, without those of what is around the denoiser."""
    found = {}
    for name, value in network.model.state_dict().items():
        if is_adapter(name):
            plain = name.replace(".default.weight", ".weight").replace(".default", "")
            found[plain.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = value.detach().cpu().contiguous()
    return found


def save_adapter(network: Foreign, base: Base, folder: Path) -> None:
    """Write the adapters as `load_lora_weights` of the pipeline reads them."""
    state, kind = adapter_state(network), pipeline_class(base)
    config: Any = network.model.peft_config["default"]  # type: ignore[index]
    known = inspect.signature(kind.save_lora_weights).parameters
    layers: dict[str, Any] = {f"{base.component}_lora_layers": state}
    if (name := f"{base.component}_lora_adapter_metadata") in known:
        layers[name] = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    kind.save_lora_weights(folder, **layers, safe_serialization=True)


def comfy_names(network: Foreign, base: Base) -> dict[str, Tensor]:
    """The adapters by names that ComfyUI's loader knows: `transformer.` and peft's names, or kohya's of a U-Net; with alpha."""
    spec, named = network.config.adapter, dict[str, Tensor]()
    for name, value in adapter_state(network).items():
        path, _, role = name.partition(".lora_")
        alpha = torch.tensor(float(spec.rank if spec.alpha is None else spec.alpha), dtype=torch.float32)
        if base.component == "unet":
            path = "lora_unet_" + path.replace(".", "_")
            role = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}.get(role, "dora_scale")
        else:
            path, role = f"transformer.{path}", f"lora_{role}" if role[0] in "AB" else "dora_scale"
        named |= {f"{path}.{role}": value.clone(), f"{path}.alpha": alpha.clone()}
    return named


def comfy_sigmas(model: Model) -> dict[int, list[float]]:
    """Noise levels as ComfyUI counts them, by steps: of a flow the share of noise, otherwise that of noise to signal."""
    flow = model.spec.predicts == "flow"  # type: ignore[attr-defined]
    levels = {}
    for steps in STEPS:
        times = model.schedule(steps)
        levels[steps] = [math.sin(t) / (math.cos(t) + math.sin(t)) if flow else math.tan(t) for t in times]
    return levels


def template(name: str) -> str:
    """A text that comes with the package."""
    return (Path(__file__).parents[1] / "templates" / name).read_text(encoding="utf-8")


def card(model: Model, base: Base, scheduler: Any, how: dict[str, Any], form: Form) -> str:
    """README.md of what was written; `how` are arguments of a call in two steps."""
    kind = pipeline_class(base)
    exact, taken = {"sigmas", "timesteps"} & how.keys(), inspect.signature(kind.__call__).parameters
    asked = {"prompt": '"a lighthouse at dawn"', "class_labels": "[0]"}
    told = {**{key: value for key, value in asked.items() if key in taken}, **how, "num_inference_steps": 2}
    call = ", ".join(f"{key}={value}" for key, value in told.items())
    opened = (
        f'pipe = {kind.__name__}.from_pretrained("FOLDER")'
        if form == "pipeline"
        else f'pipe = {kind.__name__}.from_pretrained("{base.title}")\npipe.load_lora_weights("FOLDER")\n'
        f'pipe.scheduler = {type(scheduler).__name__}.from_pretrained("FOLDER/scheduler")'
    )
    said = (
        "At these times trigflow's sampler draws the same; other numbers of steps are in `trigflow.json`."
        if exact
        else f"`{kind.__name__}` takes no times of one's own, so these are not the times that the student was made for; "
        "`trigflow sample` draws with those."
    )
    text = template("adapter_card.txt")
    values = {
        "BASE": base.title, "CLASS": kind.__name__, "SCHEDULER": type(scheduler).__name__, "OPEN": opened,
        "CALL": call, "SAID": said, "OUT": {2: "audios", 4: "frames"}.get(len(model.shape), "images"),
        "OBJECTIVE": str(model.origin.get("objective", "scd")), "RANK": str(model.spec.adapter.rank or "full"),  # type: ignore[attr-defined]
    }  # fmt: skip
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text
