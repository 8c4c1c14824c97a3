"""A real small run of adapters: a pipeline of stock diffusers trained on emoji, distilled as a LoRA and as a whole.

    python benchmarks/lora.py                    # about three hours on two cores; what is finished in --out is not made again
    python benchmarks/lora.py --quick --out /tmp/lora --json /tmp/lora.json     # to see that it runs; its figures mean nothing

1.  An autoencoder, a CLIP text encoder and a U-Net, classes of diffusers and transformers of a few million parameters, are
    trained on the emoji with their captions, in the way of Stable Diffusion 2 (DDPM, v): a StableDiffusionPipeline.
2.  `trigflow import`, `encode` and `distill` make two students of it for guidance 2: adapters, which go on from their average
    with a learning rate that falls to zero, and a whole U-Net. `trigflow evaluate --find-times` finds the times of two steps.
3.  `trigflow export` writes the adapters; stock diffusers opens them with `load_lora_weights` and draws in two steps.

Writes benchmarks/results/lora.json: Frechet distances to the held-out emoji for their captions, in the features of the emoji
classifier, of teacher, adapters and whole student; and the largest difference between the latents that stock diffusers draws
with the exported adapters and ours from the same noise.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from digits import judged
from PIL import Image
from torch import Tensor, nn

from trigflow import load
from trigflow.cli import main as trigflow
from trigflow.data import open_dataset
from trigflow.evaluation.evaluate_model import evaluate_model
from trigflow.runtime.files import read_json, write_json
from trigflow.runtime.machine import machine

GUIDANCE = 2.0
BATCH = 64
LENGTH = 32
"""Tokens of a caption."""
PLACES = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
    "time_emb_proj",
    "ff.net.0.proj",
    "ff.net.2",
)
"""Where adapters go: with so small a network, to its convolutions, too."""
RANK = 8
WARMUP = 100
"""Iterations of the tangent warmup."""
MIB = 2**20


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The pipeline --------------------------------------------------------------------------------------------------------


def tokenizer(texts: list[str]) -> Any:
    """Pairs of bytes of these texts, joined by how often they are met."""
    made = tokenizers.ByteLevelBPETokenizer(lowercase=True)
    made.train_from_iterator(texts, vocab_size=2000, special_tokens=["<end>", "<start>"], show_progress=False)
    start, end = ((name, made.token_to_id(name)) for name in ("<start>", "<end>"))
    inner = made._tokenizer
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<start> $A <end>", special_tokens=[start, end])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<start>", eos_token="<end>", pad_token="<end>", model_max_length=LENGTH
    )


def untrained(texts: list[str]) -> Any:
    torch.manual_seed(0)
    words = tokenizer(texts)
    clip = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=48, mid_block_add_attention=False,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=12, in_channels=4, out_channels=4, block_out_channels=(64, 128), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=32, norm_num_groups=16,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=transformers.CLIPTextModel(clip), tokenizer=words, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


class Descent:
    """Adam with a rate that rises, and falls to zero at the end; and a moving average of what is trained."""

    def __init__(self, modules: list[nn.Module], iterations: int, rate: float) -> None:
        self.parameters = [p for module in modules for p in module.parameters()]
        self.kept = [p.detach().clone() for p in self.parameters]
        self.adam = torch.optim.AdamW(self.parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adam, lambda i: min(1.0, (i + 1) / 100, 3 * (1 - i / iterations))
        )
        self.done = 0

    def step(self, loss: Tensor) -> None:
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.schedule.step()
        self.done += 1
        torch._foreach_lerp_(self.kept, [p.detach() for p in self.parameters], max(0.002, 1 / self.done))

    @torch.no_grad()
    def finish(self) -> None:
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            parameter.copy_(kept)


def pixels_of(data: Any, indices: Tensor, random: torch.Generator) -> Tensor:
    """Pictures in [-1, 1], as they vary in training."""
    return torch.as_tensor(data.batch(indices, generator=random)[0]).float() / 127.5 - 1


def train_autoencoder(vae: Any, data: Any, iterations: int) -> None:
    random, descent = seeded(1), Descent([vae], iterations, 1e-3)
    for i in range(iterations):
        pixels = pixels_of(data, torch.randint(len(data), (BATCH // 2,), generator=random), random)
        found = vae.encode(pixels).latent_dist
        drawn = vae.decode(found.mean + found.std * torch.randn(found.mean.shape, generator=random)).sample
        loss = (
            (drawn - pixels).abs().mean() + 0.5 * F.mse_loss(drawn, pixels) + 1e-3 * found.kl().mean() / found.mean[0].numel()
        )
        descent.step(loss)
        if i % 50 == 0 or i == iterations - 1:
            print(f"autoencoder {i}: {loss:.4f}", flush=True)
    descent.finish()


@torch.no_grad()
def scale_latents(vae: Any, data: Any, copies: int) -> Tensor:
    """Means of the latents of the pictures, as they vary in training, `(n, copies, 4, 12, 12)`; their deviation goes into the
    configuration of the autoencoder."""
    random, rows = seeded(2), []
    for _ in range(copies):
        parts = torch.arange(len(data)).split(BATCH)
        rows.append(torch.cat([vae.encode(pixels_of(data, part, random)).latent_dist.mean for part in parts]))
    latents = torch.stack(rows, 1)
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return latents * vae.config.scaling_factor


def train_denoiser(pipe: Any, data: Any, latents: Tensor, iterations: int) -> None:
    """v of DDPM at times drawn evenly; one caption in ten is left out."""
    random, descent = seeded(3), Descent([pipe.unet, pipe.text_encoder], iterations, 1e-3)
    alpha = pipe.scheduler.alphas_cumprod.sqrt()
    sigma = (1 - pipe.scheduler.alphas_cumprod).sqrt()
    began = time.perf_counter()
    for i in range(iterations):
        chosen = torch.randint(len(data), (BATCH,), generator=random)
        copy = torch.randint(latents.shape[1], (BATCH,), generator=random)
        x0 = latents[chosen, copy]
        dropped = torch.rand(BATCH, generator=random) < 0.1
        picks = torch.rand(BATCH, generator=random).tolist()
        texts = [
            "" if none else texts[int(pick * len(texts))]
            for none, pick, texts in zip(dropped, picks, (data.captions.texts[k] for k in chosen.tolist()), strict=True)
        ]
        ids = pipe.tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
        time_step = torch.randint(1000, (BATCH,), generator=random)
        a, s = (table[time_step][:, None, None, None] for table in (alpha, sigma))
        noise = torch.randn(x0.shape, generator=random)
        found = pipe.unet(a * x0 + s * noise, time_step, encoder_hidden_states=pipe.text_encoder(ids)[0]).sample
        loss = F.mse_loss(found, a * noise - s * x0)
        descent.step(loss)
        if i % 50 == 0 or i == iterations - 1:
            print(f"denoiser {i}: {loss:.4f}, {(time.perf_counter() - began) / (i + 1):.2f} s each", flush=True)
    descent.finish()


def make_base(folder: Path, iterations: dict[str, int]) -> None:
    data: Any = open_dataset("emoji")
    pipe = untrained([text for texts in data.captions.texts for text in texts])
    train_autoencoder(pipe.vae, data, iterations["autoencoder"])
    latents = scale_latents(pipe.vae.eval(), data, 8)
    pipe.unet.train(), pipe.text_encoder.train()
    train_denoiser(pipe, data, latents, iterations["denoiser"])
    pipe.save_pretrained(folder)


def write_pictures(folder: Path) -> None:
    """The emoji as a folder with captions, as users have one."""
    data: Any = open_dataset("emoji")
    folder.mkdir(parents=True)
    lines = []
    for i, texts in enumerate(data.captions.texts):
        Image.fromarray(data.stored(torch.tensor([i]))[0].permute(1, 2, 0).numpy()).save(folder / f"{i:04}.png")
        lines.append(json.dumps({"file_name": f"{i:04}.png", "captions": list(texts)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


# The five commands ---------------------------------------------------------------------------------------------------


def run(*words: object) -> None:
    print("trigflow", shlex.join(map(str, words)), flush=True)
    trigflow([*map(str, words)])


def trained(run: Path) -> tuple[int, float]:
    """Iterations of a finished run, and the seconds that they took, by its metrics; 0 of a run that has not been finished."""
    if not (run / "network.safetensors").exists():
        return 0, 0.0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ends = [0, *(row["iteration"] for row in rows)]
    seconds = sum((b - a) * BATCH / row["images_per_second"] for a, b, row in zip(ends, ends[1:], rows, strict=False))
    return read_json(run / "config.json", "config")["loop"]["iterations"], seconds


def make_students(out: Path, iterations: dict[str, int]) -> None:
    """Those that are not there, or have had fewer iterations."""
    if not (out / "teacher").exists():
        run("import", out / "base", "--out", out / "teacher", "--size", 48)
    run("encode", out / "pictures", "--with", out / "teacher", "--out", out / "cache", "--quiet")
    common = [
        "--objective.guidance", GUIDANCE, "--loop.batch-size", BATCH, "--loop.sample-every", 0, "--loop.log-every", 25,
        "--loop.checkpoint-every", 200, "--quiet",
    ]  # fmt: skip
    adapters = ["--lora", RANK, "--lora-targets", *PLACES, "--optimizer.lr", 1e-3]
    falling = ["--from", out / "lora-first", "--optimizer.schedule", "cosine", "--objective.tangent.warmup", 1]
    kinds = {
        "lora-first": [*adapters, "--objective.tangent.warmup", WARMUP],
        "lora": [*adapters, *falling],
        "full": ["--full", "--optimizer.lr", 3e-4, "--objective.tangent.warmup", WARMUP],
    }
    for name, how in kinds.items():
        if trained(out / name)[0] < iterations[name]:
            how += ["--iterations", iterations[name], *(["--resume"] if (out / name).exists() else [])]
            run("distill", out / "teacher", "--data", out / "cache", *how, *common, "--out", out / name)


def find_times(out: Path) -> None:
    """Of two steps, where that has not been done: on data of training, and on noise that is not measured."""
    for name in ("lora", "full"):
        if not read_json(out / name / "model.json", "model")["times"]:
            run(
                "evaluate", out / name, "--steps", 2, "--find-times", "--num", 590, "--seed", 100, "--data", "emoji",
                "--features", "emoji", "--quiet",
            )  # fmt: skip


def opened_by_diffusers(out: Path, prompts: list[str]) -> dict[str, float]:
    """The exported adapters in stock diffusers: MiB of their file, and the largest difference of its latents to ours, as a
    share of the largest latent."""
    if not (out / "adapter").exists():
        run("export", out / "lora", out / "adapter", "--to", "diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(out / "base", safety_checker=None)
    pipe.load_lora_weights(str(out / "adapter"))
    pipe.scheduler = diffusers.LCMScheduler.from_pretrained(out / "adapter" / "scheduler")
    pipe.set_progress_bar_config(disable=True)
    how = read_json(out / "adapter" / "trigflow.json", "card")["calls"]["2"]
    model: Any = load(out / "lora", "cpu")
    noise = [model.noise(0, k, 0, len(prompts)) / model.process.sigma_data for k in range(2)]
    times = [float(torch.acos(pipe.scheduler.alphas_cumprod[i].double().sqrt())) for i in how["timesteps"]]
    ours = model.sample(len(prompts), times=times, prompt=prompts, decode=False)
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.codec.raw_mean, model.codec.raw_std))
    ours = (ours - mean) / std
    with mock.patch("diffusers.schedulers.scheduling_lcm.randn_tensor", side_effect=[noise[1]]), torch.no_grad():
        theirs = pipe(prompts, height=48, width=48, latents=noise[0], num_inference_steps=2, output_type="latent", **how).images
    size = (out / "adapter" / "pytorch_lora_weights.safetensors").stat().st_size / MIB
    return {"adapter_mib": size, "difference": float((ours - theirs).abs().max() / ours.abs().max())}


def measure(out: Path, args: argparse.Namespace) -> dict[str, Any]:
    plans = {
        "teacher": ("teacher", {"steps": args.teacher_steps, "guidance": GUIDANCE}),
        "lora_2": ("lora", {"steps": 2}), "full_2": ("full", {"steps": 2}),
        "lora_1": ("lora", {"steps": 1}), "full_1": ("full", {"steps": 1}),
    }  # fmt: skip
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in plans}
    for seed in args.seeds:
        for name, (folder, how) in plans.items():
            model = load(out / folder, "cpu")
            found = evaluate_model(model, num=args.num, data="emoji-held-out", features="emoji", seed=seed, **how)  # type: ignore[arg-type]
            rows[name].append({key: found[key] for key in ("fd", "fd_real", "precision", "recall")})
            print(seed, name, {key: round(value, 3) for key, value in rows[name][-1].items()}, flush=True)
    means = {name: {key: sum(r[key] for r in found) / len(found) for key in found[0]} for name, found in rows.items()}
    return {"means": means, "runs": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lora"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num", type=int, default=590, help="pictures a distance")
    parser.add_argument("--teacher-steps", type=int, default=18, help="of Heun's solver, two evaluations each")
    parser.add_argument(
        "--iterations", type=int, nargs=5, default=[600, 2200, 1880, 2000, 800],
        metavar=("AUTOENCODER", "DENOISER", "ADAPTERS", "FALLING", "FULL"),
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a few iterations of each")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "lora.json")
    args = parser.parse_args()
    if args.quick:
        args.iterations, args.seeds, args.num, args.teacher_steps = [3] * 5, [0], 40, 2
    names = ("autoencoder", "denoiser", "lora-first", "lora", "full")
    out, iterations = args.out, dict(zip(names, args.iterations, strict=True))
    began = time.perf_counter()
    if not (out / "base" / "model_index.json").exists():
        make_base(out / "base", iterations)
        write_json(out / "base.json", {"seconds": time.perf_counter() - began, "iterations": iterations})
    if not (out / "pictures").exists():
        write_pictures(out / "pictures")
    make_students(out, iterations)
    find_times(out)
    opened = opened_by_diffusers(out, ["green heart", "red apple", "a cat", "rocket"])
    found = measure(out, args)
    fd = {name: row["fd"] for name, row in found["means"].items()}
    sizes = {name: sum(p.numel() for p in load(out / name, "cpu").network.parameters()) for name in ("teacher", "lora")}
    base = read_json(out / "base.json", "base")
    done = {name: base["iterations"][name] for name in ("autoencoder", "denoiser")}
    done |= {name: trained(out / name)[0] for name in names[2:]}
    seconds = {"base": base["seconds"], **{name: trained(out / name)[1] for name in names[2:]}}
    bars = [
        ("fd, adapters in two steps / teacher", fd["lora_2"] / fd["teacher"], "<=", 1.25),
        ("MiB of the adapters", opened["adapter_mib"], "<=", 2.0),
        ("difference of stock diffusers", opened["difference"], "<=", 1e-4),
    ]
    result = {
        "machine": machine(), "command": shlex.join(["python", *sys.argv]), "guidance": GUIDANCE, "rank": RANK,
        "places": PLACES, "iterations": done, "seconds": seconds, "teacher_steps": args.teacher_steps, "num": args.num,
        "seeds": args.seeds, "parameters": {"teacher": sizes["teacher"], "adapters": sizes["lora"] - sizes["teacher"]},
        "full_2 / teacher": fd["full_2"] / fd["teacher"],
        "times": {name: load(out / name, "cpu").times[2] for name in ("lora", "full")}, **opened, **found, "bars": judged(bars),
    }  # fmt: skip
    write_json(args.json, result)
    for bar in result["bars"]:
        print(f"{'met' if bar['met'] else 'NOT MET':8} {bar['what']}: {bar['measured']:.3g}, bar {bar['bar']}")
    if not all(bar["met"] for bar in result["bars"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
