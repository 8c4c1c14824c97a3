"""Which label each image gets: from sub-folders, from dataset.json, or none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trigflow.data import open_dataset
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
