"""Captions of folders, zips, tars, tables and streams, against the libraries whose layouts these are."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from tiny_vae import write_images, write_vae
from trigflow.data import open_dataset
from trigflow.data.check import check_data
from trigflow.data.encode import encode_images
from trigflow.data.findings import Report
from trigflow.runtime.errors import UserError

Save = Callable[..., Path]
Pack = Callable[[Path], Path]

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def photos(save: Save) -> Path:
    """Four images in two classes."""
    for index in range(4):
        path = save(f"{'cats' if index % 2 else 'dogs'}/{index}.png", 60 * index)
    return path.parent.parent


NAMES = ["cats/1.png", "cats/3.png", "dogs/0.png", "dogs/2.png"]


def write(folder: Path, **contents: Any) -> None:
    """Files by name, with `__` for the slash: text, bytes, or anything else as JSON."""
    for name, content in contents.items():
        path = folder / name.replace("__", "/")
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def texts(source: Any, **options: Any) -> Any:
    captions = open_dataset(source, **options).captions
    return None if captions is None else [*captions.texts]


# Folders and zips ----------------------------------------------------------------------------------------------------


def test_without_captions_nothing_is_other_than_it_was(photos: Path, pack: Pack) -> None:
    bare = open_dataset(pack(photos)).fingerprint()
    write(
        photos,
        **{"cats__1.json": {"index": 1}, "README.txt": "cats and dogs", "dogs__0.txt": " \n", "metadata.csv": "a,b\n1,2\n"},
    )
    dataset = open_dataset(pack(photos))
    assert dataset.captions is None
    assert dataset.fingerprint() == bare


def test_files_beside_images(photos: Path, pack: Pack) -> None:
    write(photos, **{"cats__1.txt": "\ufeffa  cat,\nsitting\n", "cats__3.json": {"id": 3, "captions": ["one", " ", "two"]}})
    write(photos, **{"dogs__0.CAPTION": "ein Hund \N{DOG FACE}", "dogs__2.json": {"id": 2}, "dogs__2.txt": "dog"})
    dataset = open_dataset(pack(photos))
    assert dataset.captions is not None
    assert [*dataset.captions.texts] == [("a cat, sitting",), ("one", "two"), ("ein Hund \N{DOG FACE}",), ("dog",)]
    assert dataset.class_names == ("cats", "dogs")
    assert texts(pack(photos), captions=False) is None
    in_place = open_dataset(pack(photos), memory_limit_gib=0)
    assert in_place.fingerprint() == dataset.fingerprint()


def test_what_is_under_which_name_and_which_file_decides(photos: Path) -> None:
    write(photos, **{"cats__1.json": {"text": "b", "caption": "a", "captions": None}, "cats__1.txt": "c", "cats__3.txt": "d"})
    write(photos, **{"cats__metadata.jsonl": {"file_name": "3.png", "text": "e"}})
    assert texts(photos) == [("a",), ("e",), (), ()]


def test_names_up_to_the_first_dot_and_what_is_ambiguous(photos: Path) -> None:
    (photos / "cats" / "1.png").rename(photos / "cats" / "1.rgb.png")
    write(photos, **{"cats__1.txt": "one"})
    assert texts(photos)[0] == ("one",)
    (photos / "cats" / "3.png").rename(photos / "cats" / "1.gray.png")
    with pytest.raises(UserError, match=r"images 'cats/1.gray.png' and 'cats/1.rgb.png' .* captions .*one \.txt of a name"):
        open_dataset(photos)
    assert texts(photos, captions=False) is None
    write(photos, **{"cats__1.txt": "", "cats__1.json": {"index": 1}})
    (photos / "cats" / "1.txt").unlink()
    assert texts(photos) is None


def test_corrupt_images_take_their_captions_along(photos: Path, pack: Pack) -> None:
    for index, name in enumerate(NAMES):
        write(photos, **{name.replace("/", "__").replace("png", "txt"): str(index)})
    (photos / NAMES[1]).write_bytes(b"")
    for limit in (4, 0):
        assert texts(pack(photos), skip_corrupt=True, memory_limit_gib=limit) == [("0",), ("2",), ("3",)]


ROWS = [("cats/1.png", "a, cat"), ("dogs/0.png", 'a "dog"'), ("dogs/2.png", "Hund\nund Katze")]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_tables_are_read_as_the_datasets_library_does(photos: Path, kind: str) -> None:
    (photos / "cats" / "3.png").unlink()
    table = "file_name,text\n" + "".join(f'{name},"{text.replace(chr(34), chr(34) * 2)}"\n' for name, text in ROWS)
    if kind == "jsonl":
        table = "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in ROWS)
    write(photos, **{f"metadata.{kind}": table})
    theirs = datasets.load_dataset("imagefolder", data_dir=str(photos), split="train")
    said = {tuple(np.asarray(row["image"]).flatten()): " ".join(row["text"].split()) for row in theirs}
    ours = open_dataset(photos)
    assert ours.captions is not None
    assert [said[tuple(image.flatten().tolist())] for image in ours.images] == [text for (text,) in ours.captions.texts]
    assert len(ours) == 3


def test_several_captions_in_tables(photos: Path, pack: Pack) -> None:
    rows = [{"captions": ["a", "b"], "file_name": "1.png"}, *({"file_name": "./3.png", "caption": text} for text in "cd")]
    table = 'file_name,caption\ndogs\\0.png,"[""e"", ""f""]"\ndogs/2.png,[g]\n'
    write(photos, **{"cats__metadata.jsonl": "\n".join(map(json.dumps, rows)), "metadata.CSV": table})
    assert texts(pack(photos)) == [("a", "b"), ("c", "d"), ("e", "f"), ("[g]",)]


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "binary": ({"cats__1.txt": b"\x89PNG\xff"}, r"'cats/1.txt' in .* is no text; expected UTF-8"),
    "utf-16": ({"cats__1.caption": "a cat".encode("utf-16")}, r"'cats/1.caption' in .* is no text"),
    "control": ({"cats__1.txt": "a\x07cat"}, r"'cats/1.txt' in .*'\\x07'.*without control characters"),
    "control in a table": ({"metadata.csv": "file_name,text\ncats/1.png,a\x00b\n"}, r"'metadata.csv'"),
    "half a character": ({"cats__1.json": b'{"text": "\\ud800"}'}, r"'cats/1.json' in .*'\\ud800'"),
    "huge": ({"cats__1.txt": "a" * (1 << 20) + "b"}, r"'cats/1.txt' in .*has 1048577 letters; expected at most 1048576"),
    "no JSON": ({"cats__1.json": "{"}, r"'cats/1.json' in .*expected JSON"),
    "deep JSON": ({"cats__1.json": "[" * 100_000}, r"'cats/1.json' in .*expected JSON"),
    "a number": ({"cats__1.json": {"caption": 3}}, r"'cats/1.json' in .* holds '?3'?; expected a text or a list"),
    "a list of numbers": ({"cats__1.json": {"captions": ["a", 3]}}, r"'cats/1.json' in .*; expected a text or a list"),
    "a row without a name": ({"metadata.jsonl": {"text": "a"}}, r"row 1 of 'metadata.jsonl' .*\"file_name\""),
    "a row that is none": ({"metadata.jsonl": "\n[]\n"}, r"row 2 of 'metadata.jsonl' .*an object"),
    "an image not there": ({"metadata.csv": "file_name,text\n../x.png,a\n"}, r"row 1 of 'metadata.csv' .*'../x.png', which"),
    "two tables": (
        {"metadata.csv": "file_name,text\ncats/1.png,a\n", "cats__metadata.jsonl": {"file_name": "1.png", "text": "b"}},
        r"'cats/metadata.jsonl' and 'metadata.csv' .* of 'cats/1.png'; expected one table",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line_that_names_the_file(photos: Path, pack: Pack, fault: str) -> None:
    contents, message = FAULTS[fault]
    write(photos, **contents)
    source = pack(photos)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert texts(source, captions=False) is None
    assert [(finding.kind, finding.name) for finding in check_data(str(source)).problems if finding.kind == "captions"] == [
        ("captions", str(source))
    ]


# Tars, tables of the hub, streams ------------------------------------------------------------------------------------


def test_tars_as_the_webdataset_library_writes_them(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "shards" / "train-%04d.tar"), maxcount=3, verbose=0) as writer:
        for index, name in enumerate(NAMES):
            said = {"txt": f"number {index}"} if index < 2 else {"json": {"caption": [f"number {index}", "two"]}}
            writer.write({"__key__": f"{index:06d}", "png": (photos / name).read_bytes(), "cls": index % 2, **said})
    dataset = open_dataset(tmp_path / "shards")
    assert dataset.captions is not None
    assert [*dataset.captions.texts] == [("number 0",), ("number 1",), ("number 2", "two"), ("number 3", "two")]
    assert dataset.labels is not None
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        write(photos, **{"cats__1.caption": "a cat"})
        for name in (NAMES[0], "cats/1.caption"):
            archive.add(photos / name, name)
    assert texts(tmp_path / "one.tar") == [("a cat",)]


def table(**columns: list[Any]) -> datasets.Dataset:
    images = [Image.new("RGB", (4, 4), (index, 0, 0)) for index in range(4)]
    return datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())


MANY = [["a", "b"], [], None, ["c"]]


def test_tables_with_a_column_of_captions(tmp_path: Path) -> None:
    table(prompt=["p"] * 4, text=["one", "", None, "two\nwords"], id=[1, 2, 3, 4]).save_to_disk(tmp_path / "saved")
    assert texts(f"hf:{tmp_path / 'saved'}") == [("one",), (), (), ("two words",)]
    assert texts(f"hf:{tmp_path / 'saved'}?caption=prompt") == [("p",)] * 4
    assert texts(f"hf:{tmp_path / 'saved'}", captions=False) is None
    with pytest.raises(UserError, match=r"no column 'nothing'; expected one of .*; correct caption="):
        texts(f"hf:{tmp_path / 'saved'}?caption=nothing")
    with pytest.raises(UserError, match=r"row 0 of .* holds '?1'?; expected a text or a list"):
        texts(f"hf:{tmp_path / 'saved'}?caption=id")
    table(captions=MANY).save_to_disk(tmp_path / "many")
    assert texts(f"hf:{tmp_path / 'many'}") == [("a", "b"), (), (), ("c",)]


def test_parquet_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for number in range(2):
        table(captions=MANY).shard(2, number, contiguous=True).to_parquet(tmp_path / "rows" / f"train-{number}.parquet")
    expected = open_dataset(f"hf:{tmp_path / 'rows'}")
    for source in (tmp_path / "rows", tmp_path / "rows" / "train-0.parquet"):
        dataset = open_dataset(source)
        assert torch.equal(dataset.values, expected.values[: len(dataset)])
        assert texts(source) == [("a", "b"), (), (), ("c",)][: len(dataset)]
    assert check_data(str(tmp_path / "rows")).captions == 2
    (tmp_path / "rows" / "train-0.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match="cannot be opened"):
        open_dataset(tmp_path / "rows" / "train-0.parquet")


def test_streams(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for number in range(2):
        table(captions=MANY).shard(2, number, contiguous=True).to_parquet(tmp_path / "rows" / f"train-{number}.parquet")
    for _ in range(2):  # the second time from the index
        assert texts(f"hf:{tmp_path / 'rows'}?stream=1") == [("a", "b"), (), (), ("c",)]
    assert texts(f"hf:{tmp_path / 'rows'}?stream=1", captions=False) is None


# Latents -------------------------------------------------------------------------------------------------------------


def test_latents_keep_captions_wherever_their_writing_was_cut(tmp_path: Path) -> None:
    names, vae = [f"{index}.png" for index in range(4)], write_vae(tmp_path / "vae")
    folder = write_images(tmp_path / "images", names)
    plain = tmp_path / "plain.zip"
    encode_images(folder, plain, vae=str(vae), batch_size=2)
    write(folder, **{"1.txt": "ein M\u00fchlrad", "3.json": {"captions": ["a", "b"]}})
    out = tmp_path / "latents.zip"
    encode_images(folder, out, vae=str(vae), batch_size=2)
    assert texts(out) == [(), ("ein M\u00fchlrad",), (), ("a", "b")]
    assert texts(plain) is None
    assert torch.equal(open_dataset(out).values, open_dataset(plain).values)
    assert texts(out, memory_limit_gib=0) == texts(out)
    whole = out.read_bytes()
    for cut in (len(whole) // 3, whole.rindex(b"metadata.jsonl"), len(whole) - 10):
        out.unlink()
        (tmp_path / "latents.zip.partial").write_bytes(whole[:cut])
        encode_images(folder, out, vae=str(vae), batch_size=2)
        assert out.read_bytes() == whole
    out.unlink()
    encode_images(folder, out, vae=str(vae), batch_size=2, captions=False)
    assert out.read_bytes() == plain.read_bytes()


# The check -----------------------------------------------------------------------------------------------------------


def told(report: Report) -> list[str]:
    return [finding.text() for finding in report.notes if finding.kind == "captions"]


def test_the_check_tells_of_captions(photos: Path, pack: Pack) -> None:
    before = check_data(str(pack(photos)))
    assert (before.captions, told(before)) == (0, [])
    write(photos, **{"cats__1.txt": "a pet", "dogs__0.json": {"captions": ["a pet", "\N{DOG FACE}" * 17, "d" * 63]}})
    write(photos, **{"dogs__2.txt": " ", "notes.txt": "by hand"})
    report = check_data(str(pack(photos)))
    assert report.captions == 2
    assert "captions: of 2 images" in report.text()
    missing, empty, repeated, long = told(report)
    assert "'cats/3.png' has no caption" in missing
    assert "1 such" in missing
    assert "'dogs/2.png' has an empty caption" in empty
    assert "'cats/1.png' has the caption 'a pet'" in repeated
    assert "'dogs/0.png'" in repeated
    assert "'dogs/0.png' has a caption of 68 bytes; 1 are cut at the 63" in long
    assert [finding.name for finding in report.notes if finding.kind == "other files"] == ["notes.txt"]
