"""Memory and time of adapters for published models of diffusers, counted from their configurations: no weights are needed.

    python benchmarks/plans.py        # some minutes; writes benchmarks/results/plans.json, whose table is in docs/diffusers.md

Each is imported from a folder that holds configurations alone, as published, with rows of the right shapes for the empty
text, and planned as `trigflow plan RUN --lora 64` does. Nothing here was run on a GPU.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch

from trigflow.lab.plan import student_of
from trigflow.lab.plan.hardware import get_gpu
from trigflow.lab.plan.memory import USABLE, memory
from trigflow.lab.plan.step import Step
from trigflow.models.foreign import import_pipeline
from trigflow.runtime.files import write_json

RANK = 64
CARDS = ("rtx4090", "h100")
UTILIZATION = 0.4
"""Share of the peak rate that training is taken to reach."""
GIB = 2**30
CLIP = (77, 768)
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip
XL: dict[str, Any] = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": (5, 10, 20),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1.5": {
        "pipeline": "StableDiffusionPipeline", "size": 512, "schedule": "DDIMScheduler", "rows": {"text": CLIP}, "vae": VAE,
        "unet": ("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}),
    },
    "Stable Diffusion XL": {
        "pipeline": "StableDiffusionXLPipeline", "size": 1024, "schedule": "DDIMScheduler", "vae": VAE,
        "rows": {"text": (77, 2048), "pooled": (1280,), "sizes": (6,)}, "unet": ("UNet2DConditionModel", XL),
    },
    "SD3 medium": {
        "pipeline": "StableDiffusion3Pipeline", "size": 1024, "rows": {"text": (333, 4096), "pooled": (2048,)},
        "vae": {**VAE, "latent_channels": 16},
        "transformer": (
            "SD3Transformer2DModel",
            {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        ),
    },
    "FLUX.1-dev": {
        "pipeline": "FluxPipeline", "size": 1024, "rows": {"text": (512, 4096), "pooled": (768,)},
        "vae": {**VAE, "latent_channels": 16}, "transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    },
}  # fmt: skip
"""What differs from the defaults of the classes, which are the published configurations of some."""
SETTINGS = [("bfloat16", False), ("bfloat16", True), ("nf4", True)]
"""Of the base: how it is kept, and whether blocks are computed again in the backward pass."""


def write_configurations(folder: Path, model: dict[str, Any]) -> None:
    """The folder of a pipeline without any weights."""
    part = "unet" if "unet" in model else "transformer"
    kind, config = model[part]
    index: dict[str, Any] = {"_class_name": model["pipeline"], part: ["diffusers", kind], "vae": ["diffusers", "AutoencoderKL"]}
    with torch.device("meta"):
        getattr(diffusers, kind)(**config).save_config(folder / part)
        diffusers.AutoencoderKL(**model["vae"]).save_config(folder / "vae")
    schedule = getattr(diffusers, model.get("schedule", "FlowMatchEulerDiscreteScheduler"))
    schedule().save_config(folder / "scheduler")
    write_json(folder / "model_index.json", {**index, "scheduler": ["diffusers", schedule.__name__]})


def import_shapes(folder: Path, out: Path, model: dict[str, Any], dtype: str) -> None:
    rows = {name: torch.zeros(shape) for name, shape in model["rows"].items()}
    room = "trigflow.models.foreign.teacher"
    with mock.patch(f"{room}.read", return_value=rows), mock.patch(f"{room}.digest_of_encoders", return_value=""):
        import_pipeline(str(folder), out, size=model["size"], dtype=dtype)  # type: ignore[arg-type]


def planned(run: Path, again: bool) -> dict[str, Any]:
    """What the step takes, as `trigflow plan` has it."""
    step = Step(student_of(run, RANK), checkpointing=again, precision="bf16")
    need, count = memory(step, "ddp", 1), step.many
    most = {card: need.largest_batch(USABLE * get_gpu(card).memory * GIB) for card in CARDS}
    assert step.teacher is not None
    return {
        "base_gib": step.teacher.size / GIB, "adapters": step.student.parameters,
        "trained_gib": (need.states - step.teacher.size) / GIB, "sample_gib": need.per_sample / GIB,
        "one_gib": need.total(1) / GIB, "largest_batch": most,
        "sample_tflops": count.total / count.batch / 1e12,
        "sample_seconds": count.total / count.batch / (UTILIZATION * get_gpu("h100").half * 1e12),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "plans.json")
    args = parser.parse_args()
    settings = {"rank": RANK, "utilization": UTILIZATION, "diffusers": diffusers.__version__}
    result: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), **settings, "models": {}}
    print("| model, pixels | base | blocks again | base, GiB | adapters | a sample, GiB ", end="")
    print("| most at a time, RTX 4090 / H100 | a sample, H100 |")
    print("| --- " * 8 + "|")
    for name in args.models:
        rows = result["models"][name] = []
        with tempfile.TemporaryDirectory() as made:
            write_configurations(Path(made) / "base", MODELS[name])
            for dtype, again in SETTINGS:
                run = Path(made) / f"{dtype}-{again}"
                import_shapes(Path(made) / "base", run, MODELS[name], dtype)
                row = planned(run, again)
                rows.append({"base": dtype, "checkpointing": again, **row})
                most = " / ".join(str(value) for value in row["largest_batch"].values())
                print(
                    f"| {name}, {MODELS[name]['size']} | {dtype} | {'yes' if again else 'no'} | {row['base_gib']:.1f} | "
                    f"{row['adapters'] / 1e6:.0f} M | {row['sample_gib']:.1f} | {most} | {row['sample_seconds']:.3f} s |",
                    flush=True,
                )
    write_json(args.json, result)


if __name__ == "__main__":
    main()
