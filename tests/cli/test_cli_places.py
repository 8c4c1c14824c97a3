"""Where commands write: what cannot be written is said before any work, what they write is told from what others wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from PIL import Image

from training.tiny import tiny_config
from trigflow.data import open_dataset
from trigflow.training.trainer import Trainer

Cli = Callable[..., Any]
SETTINGS = ["--loop.iterations", "2", "--loop.batch-size", "4", "--loop.sample-every", "0", "--quiet"]


def refuse(*args: object, **kwargs: object) -> NoReturn:
    raise AssertionError("work has begun")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a network is loaded nor data are read. What imports these functions comes first: none keeps `refuse`."""
    for name in (
        "trigflow.lab.demo.load",
        "trigflow.deploy.export.load",
        "trigflow.data.encode.list_files",
        "trigflow.evaluation.measure_reference.list_files",
        "trigflow.models.model.load",
        "trigflow.models.model.read_tensors",
        "trigflow.data.sources.opening.list_files",
        "trigflow.evaluation.measure_reference.measure_reference",
        "trigflow.models.pretrained.write.open_snapshot",
    ):
        monkeypatch.setattr(name, refuse)


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """Names that are taken: `dir`, `grid.png` and `ref.npz` are folders, `file` is a file."""
    for name in ("dir", "grid.png", "ref.npz", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "000099.png").touch()
    (tmp_path / "file").write_text("here")
    return tmp_path


LONG = "n" * 300


@pytest.mark.parametrize(
    ("command", "out"),
    [
        *[(["sample", "RUN"], out) for out in ("grid.png", "file/grid.png", "file", "file/", "full", f"{LONG}.png")],
        *[(["evaluate", "RUN"], out) for out in ("dir", "file/x.json", f"{LONG}.json")],
        *[(["reference", "digits"], out) for out in ("ref.npz", "file/x.npz", f"{LONG}.npz")],
        *[(["train"], out) for out in ("file", "file/run", LONG)],
        *[(["distill", "RUN"], out) for out in ("file/run", LONG)],
        *[(["convert", "RUN"], out) for out in ("file/run", LONG)],
        *[(["demo", "--quick"], out) for out in ("file/run", LONG)],
        *[(["import", "weights.pkl"], out) for out in ("full", "file/run", LONG)],
        *[(["encode", "photos"], out) for out in ("file/x.zip", f"{LONG}.zip")],
        *[(["bench", "RUN", "--json"], out) for out in ("dir", "file/x.json")],
        *[(["export", "RUN", "--to", "torchscript"], out) for out in ("full", "file/x", LONG)],
    ],
)
def test_what_cannot_be_written_is_found_first(
    cli: Cli, places: Path, teacher_folder: Path, no_work: None, command: list[str], out: str
) -> None:
    words = [str(teacher_folder) if word == "RUN" else word for word in command]
    option = {"bench": [], "export": []}.get(command[0], ["--out"])
    before = sorted(places.rglob("*"))
    result = cli(*words, *option, f"{places}/{out}")
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert len(result.err) < 400
    assert sorted(places.rglob("*")) == before


@pytest.mark.parametrize("out", ["samples/guidance-1.5", "samples/guidance-1.5/", "samples/v1.0", ".hidden", "x.png/"])
def test_a_folder_may_have_a_dot_in_its_name(cli: Cli, tmp_path: Path, teacher_folder: Path, out: str) -> None:
    (tmp_path / "samples" / "v1.0").mkdir(parents=True)
    result = cli("sample", teacher_folder, "--num", 3, "--steps", 1, "--quiet", "--out", f"{tmp_path}/{out}")
    assert result.code == 0, result.err
    assert sorted(path.name for path in (tmp_path / out).iterdir()) == [f"{i:06d}.png" for i in range(3)]


def test_images_of_two_calls_do_not_mix(cli: Cli, tmp_path: Path, teacher_folder: Path) -> None:
    def sample(num: int, seed: int) -> Any:
        return cli("sample", teacher_folder, "--num", num, "--seed", seed, "--steps", 1, "--quiet", "--out", tmp_path / "a")

    assert sample(3, 0).code == 0
    first = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    refused = sample(2, 1)
    assert refused.code == 2
    assert "holds 1 images of another call, such as 000002.png" in refused.err
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == first
    assert sample(3, 1).code == 0  # replaces them all
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} != first


def test_nothing_is_written_into_the_data(cli: Cli, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(8):
        path = data / ("cat", "dog")[number // 4] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 30 * number).save(path)
    (tmp_path / "link").symlink_to(data)
    config = tiny_config({"data.source": str(data), "loop.iterations": 1})
    Trainer(config, tmp_path / "run", progress=False).run()
    before = sorted(data.rglob("*"))
    inside = [data, data / "run", data / "cat" / "run", tmp_path / "link" / "run"]
    for out in inside:
        for command in (
            ["train", "--data", data, *SETTINGS, "--out"],
            ["train", "--data", tmp_path / "link", *SETTINGS, "--out"],
            ["distill", tmp_path / "run", *SETTINGS, "--out"],
            ["convert", tmp_path / "run", "--quiet", "--out"],
            ["sample", tmp_path / "run", "--num", 2, "--quiet", "--out"],
            ["export", tmp_path / "run", "--to", "torchscript"],
        ):
            result = cli(*command, out)
            assert (result.code, result.out) == (2, ""), command
            assert "outside of the data" in result.err or "new or empty folder" in result.err
    assert sorted(data.rglob("*")) == before
    with pytest.raises(ValueError, match="outside of the data"):
        Trainer(dataclasses.replace(config), data / "run", dataset=open_dataset(data), progress=False)
    assert cli("sample", tmp_path / "run", "--num", 2, "--steps", 1, "--out", tmp_path / "cat").code == 0
