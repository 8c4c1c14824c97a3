"""What README.md and docs/ say can be typed: Python runs, command lines are understood, links lead somewhere.

The blocks of a page run in order in one namespace, in a folder of their own. What they take for granted (photos, finished runs,
a network) is prepared by the function of that page in `PAGES`. It also puts small local things in the place of long trainings
and of what is fetched from elsewhere, and afterwards looks at what the blocks have left behind.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import io
import json
import math
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor, nn

import trigflow
from models.snapshots import EDM2_TINY, edm2_config, edm2_snapshot, random_tensors, write
from studies.__main__ import Study
from training.tiny import all_digits, tiny_config
from trigflow import plugins
from trigflow.cli import main
from trigflow.cli.entry import _parse
from trigflow.codecs import CODECS, Pixels
from trigflow.conditions import Conditioner, Text
from trigflow.data.sources.opening import REGISTERED
from trigflow.evaluation import ReferenceStatistics, extract, gaussian_statistics, write_reference
from trigflow.lab.recipes import RECIPES, Recipe, shrink
from trigflow.models.model import Model
from trigflow.networks import NETWORKS, ConditioningConfig, TextConfig, UNetConfig, build
from trigflow.objectives import OBJECTIVES
from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.samplers import Sampling
from trigflow.tangent.dual import HANDLERS
from trigflow.tangent.table import NAMES
from trigflow.training.config import LoopConfig, RunConfig

ROOT = Path(__file__).parents[1]
WRITTEN = Path(__file__).parent / "fixtures" / "format1"
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

Names = dict[str, Any]
Patch = pytest.MonkeyPatch
Page = Callable[[Patch], Generator[Names, Names, None]]
"""Gives the names that the blocks of a page assume, is sent those they have made, and asserts what they should be."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: Patch) -> None:
    """The tests run in an empty folder."""
    monkeypatch.chdir(tmp_path)


# Python


class Block(NamedTuple):
    """A fenced block: its language, the number of its first line, and its text."""

    language: str
    line: int
    text: str


def blocks_of(text: str) -> list[Block]:
    lines, found = text.splitlines(), list[Block]()
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        found.append(Block(lines[start][3:].strip(), start + 2, "\n".join(lines[start + 1 : end])))
    return found


def with_python() -> list[Path]:
    return [path for path in TEXTS if any(block.language == "python" for block in blocks_of(path.read_text("utf-8")))]


def run_blocks(path: Path, names: Names) -> None:
    """Run the blocks of a page; a traceback shows the lines of the page. A block that is an entry of a table, `"name": value,`,
    goes into the dict `entries`."""
    names["__name__"] = "docs"
    for block in blocks_of(path.read_text("utf-8")):
        if block.language == "python":
            text = f"entries.update({{{block.text}}})" if block.text.startswith('"') else block.text
            exec(compile("\n" * (block.line - 1) + text, str(path), "exec"), names)


def copied(run: str, to: str) -> None:
    """A folder or file of the fixtures under the name it has on the page."""
    source = WRITTEN / run
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, to)


class Flow(nn.Module):
    """A flow model of digits: `u(x, s)`."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(66, 16), nn.Linear(16, 64)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        time = torch.stack([torch.cos(s), torch.sin(s)], dim=1)
        return self.out(torch.tanh(self.inp(torch.cat([x.flatten(1), time], dim=1)))).reshape(x.shape)


class FewPixels(nn.Module):
    """Features that cost nothing, on any device."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, 18:26].float() / 255

    def to(self, *_: Any, **__: Any) -> FewPixels:
        return self


class SmallNet(nn.Module):
    """Something to differentiate: attention, convolution and time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.time = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(1, 8)
        self.out = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.sinc(self.conv(x)) + self.time(t[:, None])[:, :, None, None]
        tokens = h.flatten(2).transpose(1, 2)[:, None]
        mixed = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].transpose(1, 2)
        return self.out(h + mixed.reshape(h.shape))


def directions() -> Names:
    """x, t, dx and dt of a batch of three."""
    torch.manual_seed(0)
    return {"x": torch.randn(3, 1, 8, 8), "t": torch.rand(3), "dx": torch.randn(3, 1, 8, 8), "dt": torch.ones(3)}


def readme(patch: Patch) -> Generator[Names, Names, None]:
    copied("scd", "runs/demo")
    small = Recipe(*(shrink(getattr(RECIPES["digits"], role)) for role in ("teacher", "student")))
    patch.setitem(RECIPES, "digits", small)
    names = yield {"network": SmallNet(), **directions()}
    assert Path("digits.png").is_file()
    assert names["images"].shape == (100, 1, 8, 8)
    assert names["student"].kind == "consistency"
    assert (Path("runs/teacher/model.json").is_file(), Path("runs/student/model.json").is_file()) == (True, True)
    assert_derivative(names, names["network"])


def assert_derivative(names: Names, net: nn.Module, tolerance: float = 1e-4) -> None:
    """`tangent` is what torch gives."""
    inputs, along = (names["x"], names["t"]), (names["dx"], names["dt"])
    out, tangent = torch.func.jvp(lambda x, t: net(x, t), inputs, along)
    torch.testing.assert_close(names["out"], out)
    torch.testing.assert_close(names["tangent"], tangent, rtol=tolerance, atol=tolerance)
    assert names["out"].requires_grad
    assert not names["tangent"].requires_grad


def data(patch: Patch) -> Generator[Names, Names, None]:
    copied("photos", "photos")
    Path("photos/cats/5.png").write_bytes(b"no image")
    shutil.make_archive("photos", "zip", "photos")
    names = yield {"indices": torch.tensor([0, 3]), "step": 7}
    assert (len(names["dataset"]), names["dataset"].class_names) == (10, ("cats", "dogs"))
    assert len(names["dataset"].skipped) == 1
    assert names["codec_from_state"](names["codec"].state()) == names["codec"]
    assert len(names["report"].problems) == 1
    assert names["images"].shape == (128, 3, 64, 64)
    assert names["step"] == 999


def editing(patch: Patch) -> Generator[Names, Names, None]:
    copied("scd", "runs/demo")
    names = yield {}
    assert names["images"].shape == names["filled"].shape == names["large"].shape == (16, 1, 8, 8)
    assert torch.equal(names["wider"][..., 2:6], names["small"].expand(16, 1, 8, 4))
    assert torch.equal(names["row"][[0, -1]], torch.cat([names["model"].sample(1, labels=label) for label in (3, 8)]))
    assert names["way"].shape == (3, 1, 8, 8)


def export(patch: Patch) -> Generator[Names, Names, None]:
    from diffusers.utils import dynamic_modules_utils

    from trigflow.deploy.pipeline import TrigFlowPipeline

    patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(Path("modules").absolute()))
    patch.setattr(sys, "path", list(sys.path))  # diffusers adds that folder
    copied("scd", "runs/demo")
    main(["export", "runs/demo", "digits", "--to", "diffusers"])
    main(["export", "runs/demo", "digits-onnx", "--to", "onnx"])
    uploaded: list[str] = []
    patch.setattr(TrigFlowPipeline, "push_to_hub", lambda self, repo: uploaded.append(repo))
    names = yield {}
    assert uploaded == ["user/digits"]
    assert names["v"].shape == names["x"].shape
    assert (names["images"].dtype, names["images"].shape) == (np.uint8, (2, 1, 8, 8))
    assert names["images"].std() > 30


def guidance(patch: Patch) -> Generator[Names, Names, None]:
    copied("teacher", "runs/teacher")
    model = trigflow.load("runs/teacher", "cpu")
    noise = model.process.sample_noise(torch.zeros(2, 1, 8, 8))
    names = yield {"network": model.network, "other": model.network, "process": model.process, "noise": noise}
    assert names["x0"].isfinite().all()
    assert names["images"].shape == (64, 1, 8, 8)


def inference(patch: Patch) -> Generator[Names, Names, None]:
    copied("scd", "runs/demo")
    names = yield {}
    assert torch.as_tensor(names["images"]).shape == (16, 1, 8, 8)


def latents(patch: Patch) -> Generator[Names, Names, None]:
    copied("latent", "runs/student")
    copied("vae", "vae")
    names = yield {}
    assert names["latents"].shape == (16, 4, 8, 8)
    assert names["images"].shape == (16, 3, 16, 16)


def metrics(patch: Patch) -> Generator[Names, Names, None]:
    pixels = all_digits().values
    evaluation = importlib.import_module("trigflow.evaluation")
    shipped = evaluation.feature_extractor
    patch.setattr(evaluation, "feature_extractor", lambda name: shipped(name) if name == "digits" else FewPixels())
    statistics = gaussian_statistics(extract(FewPixels(), pixels))
    write_reference(Path("photos.npz"), ReferenceStatistics(statistics))

    def images(start: int, stop: int) -> Tensor:
        return pixels[torch.arange(start, stop) % len(pixels)]

    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
    names = yield {"real_images": pixels[:200], "fake_images": pixels[200:400], "backbone": backbone, "images": images}
    assert math.isfinite(names["scores"].fd)
    assert 0 <= names["distance"] < 0.01  # the same images, some once more often than others


def scale(patch: Patch) -> Generator[Names, Names, None]:
    yield {"config": tiny_config()}
    assert Path("runs/teacher/network.safetensors").is_file()


def serve(patch: Patch) -> Generator[Names, Names, None]:
    copied("scd", "runs/demo")
    names = yield {}
    with TestClient(names["site"]) as client:
        answer = client.post("/digits/v1/images", json={"count": 2, "labels": [3, 7], "format": "npy"})
        assert client.get("/digits/").status_code == 200
    assert np.load(io.BytesIO(answer.content)).shape == (2, 1, 8, 8)


def studies(patch: Patch) -> Generator[Names, Names, None]:
    """A study in miniature, whose cells run in this process."""
    from studies import cell, pool, runner

    class Ended:
        returncode, stdin = 0, io.BytesIO()
        poll = wait = staticmethod(lambda: 0)

    def spawn(folder: Path, threads: int) -> Ended:
        cell.main([str(folder)])
        return Ended()

    patch.setattr(pool, "spawn", spawn)
    patch.setattr(runner, "Settings", functools.partial(runner.Settings, smoke=True, quiet=True))
    names = yield {}
    assert names["judge"](names["results"])
    found = json.loads(Path("runs/lab/ema-digits-smoke/results.json").read_text("utf-8"))
    assert {one["status"] for one in found["cells"]} == {"done"}


def tangent(patch: Patch) -> Generator[Names, Names, None]:
    from trigflow.tangent import coverage, jvp
    from trigflow.tangent.dual import no_grad, pair
    from trigflow.tangent.rules.elementwise import unary
    from trigflow.tangent.table import register

    rules = {"no_grad": no_grad, "pair": pair, "register": register, "coverage": coverage}
    before = dict(HANDLERS), dict(NAMES)
    net = SmallNet()
    try:
        names = yield {"net": net, "torch": torch, "math": math, "entries": {}, **rules, **directions()}
        assert_derivative(names, net, 2e-2)  # of the last block, a finite difference
        for name, derivative in names["entries"].items():
            register(unary(derivative), name)
        x, dx = torch.rand(3, 4) + 0.5, torch.randn(3, 4)
        for function in (torch.sinc, lambda x: torch.cumprod(x, 1)):
            expected = torch.func.jvp(function, (x,), (dx,))
            torch.testing.assert_close(jvp(function, (x,), (dx,)), expected)
            assert not coverage(function, x).fallbacks
    finally:
        for table, entries in zip((HANDLERS, NAMES), before, strict=True):
            table.clear()
            table.update(entries)


def teachers(patch: Patch) -> Generator[Names, Names, None]:
    import diffusers

    from trigflow.models.bridges import FlowBridge
    from trigflow.objectives import objective_of
    from trigflow.training.config import OptimizerConfig
    from trigflow.training.trainer import Trainer

    weights = {name: tensor.half() for name, tensor in random_tensors(edm2_config(EDM2_TINY)).items()}
    write(Path("edm2-img64-s-1073741-0.075.pkl"), edm2_snapshot(weights, EDM2_TINY))

    def small_dit(repo: str, *, subfolder: str) -> nn.Module:
        return diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=32,
            patch_size=8, num_embeds_ada_norm=1000,
        )  # fmt: skip

    patch.setattr(diffusers.DiTTransformer2DModel, "from_pretrained", small_dit)
    patch.setattr(diffusers.DDPMScheduler, "from_pretrained", lambda repo, *, subfolder: diffusers.DDPMScheduler())
    loop = LoopConfig(iterations=3, batch_size=4, sample_every=0, checkpoint_every=0, device="cpu")
    names = yield {
        "FlowBridge": FlowBridge, "MyFlowNetwork": Flow, "OptimizerConfig": OptimizerConfig, "Trainer": Trainer,
        "RunConfig": functools.partial(RunConfig, loop=loop), "copy": copy, "data": all_digits(),
        "model_of": trigflow.model_of, "my_flow_network": Flow(), "objective_of": objective_of, "trigflow": trigflow,
    }  # fmt: skip
    assert trigflow.load("runs/edm2-s", "cpu").shape == (3, 16, 16)
    assert names["latents"].shape == (4, 4, 32, 32)
    assert names["latents"].isfinite().all()
    assert names["images"].shape == (100, 1, 8, 8)


def words(patch: Patch) -> Generator[Names, Names, None]:
    texts = TextConfig(length=16, width=8, depth=1, heads=2)
    told = ConditioningConfig(width=8, takes=("guidance",), text=texts)
    spec = UNetConfig(channels=1, patch=2, width=8, mult=(1,), blocks=1, attention=(0,), conditioning=told)
    sampling = Sampling(kind="flow_map", guidance_max=4.0)
    told_by = Conditioner({"text": Text(16)})
    Model(build(spec), spec, TrigFlow(), Pixels.symmetric((1, 8, 8)), sampling, told_by).save("runs/emoji-student")
    names = yield {"trigflow": trigflow}
    assert names["images"].shape == (4, 1, 8, 8)


def pipelines(patch: Patch) -> Generator[Names, Names, None]:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(4, 4, 1)

        def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:
            return (self.layer(hidden_states) * (timestep / 1000)[:, None, None, None],)

    names = yield {"denoiser": Denoiser()}
    assert names["teacher"].sample(2, steps=2, decode=False).shape == (2, 4, 16, 16)


PAGES: dict[str, Page] = {
    "README.md": readme,
    "docs/data.md": data,
    "docs/diffusers.md": pipelines,
    "docs/editing.md": editing,
    "docs/export.md": export,
    "docs/guidance.md": guidance,
    "docs/inference.md": inference,
    "docs/latents.md": latents,
    "docs/metrics.md": metrics,
    "docs/scale.md": scale,
    "docs/serve.md": serve,
    "docs/studies.md": studies,
    "docs/tangent.md": tangent,
    "docs/teachers.md": teachers,
    "docs/words.md": words,
}


@pytest.mark.parametrize("path", with_python(), ids=name_of)
def test_the_python_of_a_page_runs(path: Path, monkeypatch: Patch) -> None:
    page = PAGES[name_of(path)](monkeypatch)
    names = next(page)
    try:
        run_blocks(path, names)
        with pytest.raises(StopIteration):
            page.send(names)
    finally:
        page.close()


# Commands


class Line(NamedTuple):
    """A command of a page, without `trigflow` itself, or one of the studies from `studies` on, and where it stands."""

    where: str
    words: str


def joined(text: str, first: int) -> Iterator[tuple[int, str]]:
    """Numbered lines, those that end in a backslash with those that follow."""
    start, whole = first, ""
    for number, line in enumerate(text.splitlines(), first):
        start = start if whole else number
        whole += line.strip().removesuffix("\\")
        if not line.rstrip().endswith("\\"):
            yield start, whole
            whole = ""


def typed_in(text: str, first: int = 1) -> Iterator[tuple[int, str]]:
    """What follows `trigflow`, `-m trigflow` and two dashes perhaps, or `python -m` with `studies`, on the lines of a block."""
    for number, line in joined(text, first):
        found = re.match(r"(?:trigflow|.* -m trigflow(?: --)?|python -m(?= studies )) +(.*)", line)
        if found and not re.search(r"\.\.\.|--help|[\[|]", found[1]):  # no synopsis, no pipe, nothing left out
            yield number, found[1]


def indented(text: str) -> str:
    """The text with lines that are neither indented nor in a fenced block of the shell blanked."""
    shell, kept = "", list[str]()
    for line in text.splitlines():
        if line.startswith("```"):
            shell = "" if shell else line[3:].strip() or "text"
        inside = shell in ("bash", "sh", "text", "console") if shell else line.startswith("    ")
        kept.append(line if inside else "")
    return "\n".join(kept)


def commands() -> list[Line]:
    found = [Line(f"{name_of(path)}:{n}", c) for path in TEXTS for n, c in typed_in(indented(path.read_text("utf-8")))]
    for path in sorted((ROOT / "examples").glob("*.py")):
        said = ast.get_docstring(ast.parse(path.read_text("utf-8")), clean=False) or ""
        found += [Line(f"{name_of(path)}:{n}", words) for n, words in typed_in(indented(said))]
    return found


def mentions() -> list[Line]:
    """Commands within a sentence, in backticks: those with an option or argument."""
    found = list[Line]()
    for path in TEXTS:
        text = re.sub(r"^```.*?^```$", lambda fenced: "\n" * fenced[0].count("\n"), path.read_text("utf-8"), flags=re.M | re.S)
        for span in re.finditer(r"`(?:trigflow|python -m studies) [^`]+`", text):
            line = text.count("\n", 0, span.start()) + 1
            found += [Line(f"{name_of(path)}:{line}", words) for _, words in typed_in(" ".join(span[0].strip("`").split()))]
    return found


@pytest.fixture
def registries() -> Iterator[None]:
    """What plugins add is taken away again."""
    tables: list[dict[Any, Any]] = [plugins.LOADED, CODECS, NETWORKS, OBJECTIVES, RECIPES, REGISTERED]
    before = [dict(table) for table in tables]
    plugins.LOADED.clear()
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def parse(words: str) -> Any:
    given = shlex.split(words.replace(" examples/", f" {ROOT}/examples/"), comments=True)
    return _parse(given[1:], {"study": Study}) if given[0] == "studies" else _parse(given)


@pytest.mark.parametrize("line", commands(), ids=lambda line: line.where)
def test_a_command_is_understood(line: Line, registries: None) -> None:
    assert callable(parse(line.words).run)


def test_commands_are_found() -> None:
    found = {line.where.split(":")[0] for line in commands()}
    assert {"README.md", "docs/scale.md", "docs/studies.md", "docs/objectives.md", "examples/own_codec.py"} <= found
    assert len(commands()) > 60


@pytest.mark.parametrize("line", mentions(), ids=lambda line: line.where)
def test_a_command_in_a_sentence_exists(line: Line, registries: None) -> None:
    said = ""
    try:
        parse(re.sub(r"\bN\b", "4", line.words))
    except UserError as error:
        said = str(error)
    assert not said or said.startswith(("required options:", "missing argument:")), said  # not told all, which is fine


# Links and names


def anchors_of(path: Path) -> set[str]:
    """Those of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), target
        assert not anchor or anchor in anchors_of(there), target


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_names_of_the_package_exist(path: Path) -> None:
    for name in re.findall(r"`(trigflow(?:\.[A-Za-z_]+)+)(?:\(.*?\))?`", path.read_text("utf-8"), flags=re.S):
        module, attributes = name, list[str]()
        while True:
            try:
                found: Any = importlib.import_module(module)
                break
            except ModuleNotFoundError:
                module, _, last = module.rpartition(".")
                attributes.insert(0, last)
        for attribute in attributes:
            assert hasattr(found, attribute), name
            found = getattr(found, attribute)
