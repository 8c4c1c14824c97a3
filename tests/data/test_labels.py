"""Which label each image gets: from sub-folders, from dataset.json, or none."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from trigflow.data import open_dataset
from trigflow.data.check import check_data
from trigflow.data.labels import pair
from trigflow.runtime.errors import UserError

Save = Callable[..., Path]
Pack = Callable[[Path], Path]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


def labelled(photos: Path, content: object) -> Path:
    (photos / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return photos


def test_first_level_folders_are_the_classes(photos: Path, save: Save, pack: Pack) -> None:
    for level, name in enumerate(["10/a.png", "9/a.png", "9/deep/er/b.png", "Zoo/c.png", "apes/d.png"]):
        save(name, level)
    (photos / "empty").mkdir()
    (photos / "empty" / "notes.txt").write_text("a folder without images is no class")
    dataset = open_dataset(pack(photos))
    assert dataset.class_names == ("10", "9", "Zoo", "apes")
    assert dataset.num_classes == 4
    assert dataset.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 1, 2, 3]


def test_one_class_is_fine(photos: Path, save: Save, pack: Pack) -> None:
    save("cats/1.png", 1)
    save("cats/2.png", 1)
    dataset = open_dataset(pack(photos))
    assert dataset.class_names == ("cats",)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 0]


def test_root_and_folders_do_not_mix(photos: Path, save: Save, pack: Pack) -> None:
    save("stray.png", 1)
    save("cats/1.png", 1)
    with pytest.raises(UserError) as error:
        open_dataset(pack(photos))
    message = str(error.value)
    assert "'stray.png'" in message
    assert "'cats/1.png'" in message
    assert "dataset.json" in message
    assert "\n" not in message


def test_json_gives_the_labels_wherever_the_images_lie(photos: Path, save: Save, pack: Pack) -> None:
    for level, name in enumerate(["a.png", "b.png", "sub/c.png", "sub/d.png"]):
        save(name, level)
    entries = [["sub/d.png", 0], ["./b.png", 3], ["a.png", 1], ["sub\\c.png", 3]]
    dataset = open_dataset(pack(labelled(photos, {"labels": entries})))
    assert dataset.labels is not None
    by_level = dict(zip(dataset.images[:, 0, 0, 0].tolist(), dataset.labels.tolist(), strict=True))
    assert by_level == {0: 1, 1: 3, 2: 3, 3: 0}
    assert dataset.class_names == ("0", "1", "2", "3")


def test_json_null_means_no_labels(photos: Path, save: Save, pack: Pack) -> None:
    save("cats/1.png", 1)
    save("2.png", 1)
    dataset = open_dataset(pack(labelled(photos, {"labels": None})))
    assert len(dataset) == 2
    assert dataset.labels is None
    assert dataset.class_names == ()


def test_only_a_json_at_the_root_counts(photos: Path, save: Save, pack: Pack) -> None:
    save("cats/1.png", 1)
    (photos / "cats" / "dataset.json").write_text("not even JSON")
    assert open_dataset(pack(photos)).class_names == ("cats",)


def test_labels_stay_with_their_images_when_some_are_skipped(photos: Path, save: Save, pack: Pack) -> None:
    save("a.png", 10)
    (photos / "b.png").write_bytes(b"junk")
    save("c.png", 30)
    entries = [["c.png", 2], ["b.png", 4], ["a.png", 1]]
    dataset = open_dataset(pack(labelled(photos, {"labels": entries})), skip_corrupt=True)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [1, 2]
    assert dataset.num_classes == 5
    assert dataset.skipped == ("b.png",)


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("{", "is not valid JSON"),
        ("\ud7ff".encode("utf-16").decode("latin-1"), "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ([], 'has no "labels"'),
        ({}, 'has no "labels"'),
        ({"labels": {"a.png": 0}}, "not a list"),
        ({"labels": [["a.png"]]}, r'has the entry \["a.png"\]'),
        ({"labels": ["a.png"]}, 'has the entry "a.png"'),
        ({"labels": [[0, "a.png"]]}, "has the entry"),
        ({"labels": [["a.png", "0"]]}, "has the entry"),
        ({"labels": [["a.png", 0.5]]}, "has the entry"),
        ({"labels": [["a.png", True]]}, "has the entry"),
        ({"labels": [["a.png", None]]}, "has the entry"),
        ({"labels": [["a.png", [0, 1]]]}, "has the entry"),
        ({"labels": [["a.png", -1]]}, "integer from 0 to 999999"),
        ({"labels": [["a.png", 10**9]]}, "integer from 0 to 999999"),
        ({"labels": [["x" * 1000, -1]]}, r"has the entry \[\"x{75}\.\.\.;"),
        ({"labels": [["a.png", 0], ["a.png", 1], ["b.png", 1]]}, "lists 'a.png' twice"),
        ({"labels": [["a.png", 0], ["./a.png", 0], ["b.png", 1]]}, "lists 'a.png' twice"),
        ({"labels": [["a.png", 0], ["b.png", 0], ["z.png", 0]]}, r"names 1 image\(s\) not there, such as 'z.png'"),
        ({"labels": [["a.png", 0], ["b.png", 0], ["../a.png", 0]]}, "not there, such as '../a.png'"),
        ({"labels": [["a.png", 0]]}, r"leaves out 1 image\(s\), such as 'b.png'"),
        ({"labels": []}, r"leaves out 2 image\(s\), such as 'a.png'"),
    ],
)
def test_faults_of_json_are_named(photos: Path, save: Save, pack: Pack, content: object, wrong: str) -> None:
    save("a.png", 1)
    save("b.png", 1)
    with pytest.raises(UserError, match=f"^dataset.json in '.*photos.*' .*{wrong}") as error:
        open_dataset(pack(labelled(photos, content)))
    assert "\n" not in str(error.value)
    assert str(error.value).count("; ") >= 2


# Labels beside images ------------------------------------------------------------------------------------------------


def beside(photos: Path, save: Save, names: dict[str, str]) -> Path:
    """Images, and where a name ends in .cls the label, of these names."""
    for level, (name, label) in enumerate(names.items()):
        if name.lower().endswith(".cls"):
            (photos / name).write_text(label)
        else:
            save(name, level)
    return photos


def as_zip(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder), "zip", folder))


def as_tar(folder: Path) -> Path:
    with tarfile.open(folder.parent / "photos.tar", "w") as archive:
        for path in sorted(folder.rglob("*"), reverse=True):
            archive.add(path, str(path.relative_to(folder)), recursive=False)
    return folder.parent / "photos.tar"


@pytest.fixture(params=["folder", "zip", "tar"])
def kept(request: pytest.FixtureRequest) -> Pack:
    """Hands a folder on as it is, as a zip or as a tar."""
    ways: dict[str, Pack] = {"folder": lambda folder: folder, "zip": as_zip, "tar": as_tar}
    return ways[request.param]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ({"22.05.png": "", "22.05.cls": "3", "22.07.png": "", "22.07.cls": "7"}, [3, 7]),
        ({"22.05.png": "", "22.05.cls": "3", "22.png": "", "22.cls": "1"}, [3, 1]),
        ({"a.PNG": "", "a.CLS": "1", "b.png": "", "b.cls": "0"}, [1, 0]),
        ({"a.rgb.png": "", "a.cls": "1", "b.png": "", "b.seg.cls": "2"}, [1, 2]),
        ({"a.png": "", "a.cls": " 12\n"}, [12]),
    ],
)
def test_a_label_belongs_to_the_image_of_its_name(
    photos: Path, save: Save, kept: Pack, names: dict[str, str], labels: list[int]
) -> None:
    dataset = open_dataset(kept(beside(photos, save, names)))
    assert dataset.labels is not None
    assert dataset.labels.tolist() == labels
    assert dataset.class_names == tuple(str(number) for number in range(max(labels) + 1))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["22.05.png", "22.07.png", "23.01.png", "22.05.cls", "23.01.cls"], {"22.05.png", "23.01.png"}),
        (["22.05.png", "22.07.png", "22.05.cls"], {"22.05.png"}),
        (["x/1.png", "y/1.png", "y/1.cls"], {"y/1.png"}),
        (["x.y/1.png", "x.cls"], set()),
    ],
)
def test_no_image_has_the_label_of_another(names: list[str], found: set[str]) -> None:
    images = [name for name in names if name.endswith("png")]
    assert pair(images, [name for name in names if name.endswith("cls")], "").keys() == found


@pytest.mark.parametrize(
    ("names", "one", "other"),
    [
        (["a.png", "a.jpg", "a.cls"], "a.png", "a.jpg"),
        (["a.png", "a.cls", "a.CLS"], "a.cls", "a.CLS"),
        (["a.x.png", "a.y.png", "a.cls"], "a.x.png", "a.y.png"),
        (["a.x.png", "a.y.cls", "a.cls"], "a.y.cls", "a.cls"),
        (["a.png", "a.png", "a.cls"], "a.png", "a.png"),
        (["a.png", "a.cls", "a.cls"], "a.cls", "a.cls"),
    ],
)
def test_what_can_be_told_in_two_ways_is_an_error_that_names_both(names: list[str], one: str, other: str) -> None:
    labels = [name for name in names if name.lower().endswith("cls")]
    with pytest.raises(UserError, match=f"'{one}' and '{other}' in 'here'"):
        pair([name for name in names if name not in labels], labels, "here")


def test_the_check_finds_what_is_wrong_with_labels(photos: Path, save: Save, kept: Pack) -> None:
    source = kept(beside(photos, save, {"a.png": "", "a.cls": "1", "b.png": "", "b.cls": "0", "c.cls": "0"}))
    report = check_data(str(source))
    assert [os.path.basename(problem.name) for problem in report.problems if problem.kind == "labels"] == ["c.cls"]
    assert "class 1 '1': 1 images" in report.text()


def test_the_check_finds_labels_that_cannot_be_told_apart(photos: Path, save: Save, kept: Pack) -> None:
    source = kept(beside(photos, save, {"a.png": "", "a.jpg": "", "a.cls": "1"}))
    problem, *_ = check_data(str(source)).problems
    assert "a.jpg' and" in problem.what
    assert "a.png'" in problem.what


def test_folders_in_a_tar_are_no_classes_and_the_check_says_so(photos: Path, save: Save) -> None:
    save("cats/1.png", 1)
    save("dogs/1.png", 2)
    source = as_tar(photos)
    assert open_dataset(source).labels is None
    (note,) = (note for note in check_data(str(source)).notes if note.kind == "classes")
    assert note.name == "cats"


# Parts of a data set -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [("train", "val", "test"), ("Training", "DEV"), ("train",)])
def test_splits_are_no_classes(photos: Path, save: Save, pack: Pack, parts: tuple[str, ...]) -> None:
    for level, part in enumerate(parts):
        save(f"{part}/cats/1.png", 10 * level)
        save(f"{part}/dogs/1.png", 10 * level + 1)
    source = pack(photos)
    with pytest.raises(UserError, match="parts of a data set") as error:
        open_dataset(source)
    first = next(part for part in parts if part.lower().startswith("train"))
    assert (f"--data {photos / first}" in str(error.value)) == (source == photos)
    problem, *_ = check_data(str(source)).problems
    assert problem.kind == "labels"
    assert open_dataset(photos / first).class_names == ("cats", "dogs")


def test_a_class_may_be_called_test_beside_others(photos: Path, save: Save, pack: Pack) -> None:
    for level, name in enumerate(("test", "car", "train")):
        save(f"{name}/deep/1.png", level)
    assert open_dataset(pack(photos)).class_names == ("car", "test", "train")


def test_shards_of_several_splits_are_no_data_set(tmp_path: Path) -> None:
    def shard(name: str) -> None:
        with tarfile.open(tmp_path / name, "w") as archive:
            archive.addfile(tarfile.TarInfo("1.png"), io.BytesIO())

    shard("train-0.tar")
    shard("training-1.TAR")
    with pytest.raises(UserError, match="corrupt"):  # that they are empty is all that is wrong with them
        open_dataset(tmp_path)
    shard("val-0.tar")
    with pytest.raises(UserError, match=r"shards of several parts of a data set, such as 'train.*' and 'val-0.tar'"):
        open_dataset(tmp_path)


# Names ---------------------------------------------------------------------------------------------------------------


def test_a_class_has_a_name_that_can_be_printed(photos: Path, save: Save) -> None:
    save("tea/1.png", 1)
    odd = os.fsdecode(b"caf\xe9")
    save(f"{odd}/1.png", 2)
    with pytest.raises(UserError, match=r"class named 'caf\\udce9'; expected a name that can be printed; rename it"):
        open_dataset(photos)
    problem, *_ = check_data(str(photos)).problems
    assert problem.kind == "labels"
    (photos / odd).rename(photos / "café ☕")
    assert open_dataset(photos).class_names == ("café ☕", "tea")
    (photos / "café ☕").rename(photos / unicodedata.normalize("NFD", "café ☕"))  # as macOS packs it
    assert open_dataset(photos).class_names == ("café ☕", "tea")
    save("café ☕/2.png", 3)
    with pytest.raises(UserError, match="two classes named 'café ☕'"):
        open_dataset(photos)
