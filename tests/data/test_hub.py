"""Data sets of the Hugging Face library: on disk in its own form or as Parquet files, and streamed. Nothing is downloaded."""

from __future__ import annotations

import io
import pickle
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from trigflow.data import Loader, open_dataset
from trigflow.data.sources import hub as hub_module
from trigflow.data.sources.hub import Address
from trigflow.runtime.errors import MissingExtraError, UserError

NOISE = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (23, 6, 5, 3), dtype=np.uint8)
PIXELS = torch.from_numpy(NOISE).permute(0, 3, 1, 2)

pytestmark = pytest.mark.usefixtures("offline")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def table(labels: list[Any] | None = None, broken: int | None = None, kind: Any = None) -> datasets.Dataset:
    images: list[Any] = [{"bytes": png(pixels), "path": None} for pixels in NOISE]
    if broken is not None:
        images[broken] = {"bytes": b"no image", "path": None}
    columns = {"picture": images, "kind": [i % 3 for i in range(23)] if labels is None else labels}
    kind = kind or datasets.ClassLabel(names=["cat", "dog", "owl"])
    features = datasets.Features({"picture": datasets.Image(), "kind": kind})
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """As `save_to_disk` writes it."""
    table().save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def parquet(folder: Path, shards: int = 4, **options: Any) -> Path:
    folder.mkdir()
    for number in range(shards):
        table(**options).shard(shards, number, contiguous=True).to_parquet(folder / f"train-{number:05d}.parquet")
    return folder


def test_saved_tables_and_parquet_files(saved: Path, tmp_path: Path) -> None:
    for folder in (saved, parquet(tmp_path / "parquet")):
        for limit in (4, 0):
            dataset = open_dataset(f"hf:{folder}", memory_limit_gib=limit)
            assert torch.equal(torch.cat(list(dataset.chunks())), PIXELS)
            assert dataset.labels is not None
            assert dataset.labels.tolist() == [i % 3 for i in range(23)]
            assert dataset.class_names == ("cat", "dog", "owl")
            assert (dataset.rows is None) == (limit > 0)


def test_workers_read_tables(saved: Path) -> None:
    dataset = open_dataset(f"hf:{saved}", memory_limit_gib=0, workers=1)
    plan = dataset.order(5, 0).indices
    loader = Loader(dataset, plan, 9, workers=2)
    for step in range(9):
        assert torch.equal(loader.read(step, plan(step)), PIXELS[plan(step)])
    loader.close()


def test_images_at_paths(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(NOISE[1]))
    rows = {"image": [str(tmp_path / "1.png")]}
    datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()})).save_to_disk(tmp_path / "saved")
    dataset = open_dataset(f"hf:{tmp_path / 'saved'}")
    assert dataset.labels is None
    assert torch.equal(dataset.images, PIXELS[1:2])


def test_secret_labels_are_none(tmp_path: Path) -> None:
    table(labels=[-1] * 23).save_to_disk(tmp_path / "saved")
    dataset = open_dataset(f"hf:{tmp_path / 'saved'}")
    assert (dataset.labels, dataset.class_names) == (None, ())


def test_integers_are_labels_when_named(tmp_path: Path) -> None:
    table(labels=[7] * 22 + [2], kind=datasets.Value("int64")).save_to_disk(tmp_path / "saved")
    assert open_dataset(f"hf:{tmp_path / 'saved'}").labels is None
    dataset = open_dataset(f"hf:{tmp_path / 'saved'}?label=kind")
    assert dataset.num_classes == 8


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?split=test", "cannot be opened"),
        ("?image=photo", "has no column 'photo'; expected one of picture, kind"),
        ("?label=photo", "has no column 'photo'"),
        ("?colour=red", "sets 'colour'; expected an address like hf:"),
        ("?split", "sets 'split'|cannot be opened"),
        ("?stream=1&window=0", "window=0"),
        ("?stream=1&window=²", "window=²"),
    ],
)
def test_addresses_that_lead_nowhere(tmp_path: Path, query: str, message: str) -> None:
    folder = parquet(tmp_path / "parquet", shards=1)
    with pytest.raises(UserError, match=message) as error:
        open_dataset(f"hf:{folder}{query}")
    assert "\n" not in str(error.value)
    assert str(error.value).count("; ") >= 2


def test_a_data_set_that_cannot_be_reached() -> None:
    with pytest.raises(UserError, match=r"'hf:no/such' cannot be opened \(.*\); expected .*; check its name"):
        open_dataset("hf:no/such")
    with pytest.raises(UserError, match="names no data set"):
        open_dataset("hf:")


def test_columns_that_are_not_there_or_too_many(tmp_path: Path) -> None:
    table().remove_columns("picture").save_to_disk(tmp_path / "none")
    with pytest.raises(UserError, match="has no column of images among kind; "):
        open_dataset(f"hf:{tmp_path / 'none'}")
    images = [{"bytes": png(pixels), "path": None} for pixels in NOISE]
    features = datasets.Features({"picture": datasets.Image(), "other": datasets.Image()})
    datasets.Dataset.from_dict({"picture": images, "other": images}, features=features).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match="has 2 columns that may be the image: picture, other; "):
        open_dataset(f"hf:{tmp_path / 'two'}")
    assert len(open_dataset(f"hf:{tmp_path / 'two'}?image=other")) == 23


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?label=name", r"row 0 of .* has the label 'a'; expected an integer that names a class"),
        ("?label=name&stream=1", r"row 0 of shard 0 of .* has the label 'a'; expected an integer that names a class"),
        ("?image=kind", r"the column 'kind' holds no images \(.*\); expected image files; choose another with image="),
        ("?caption=picture&stream=1", r"the caption in a row of .* is no text \(.*\); expected a text or a list of texts"),
    ],
)
def test_columns_of_another_kind(tmp_path: Path, query: str, message: str) -> None:
    (tmp_path / "odd").mkdir()
    table().add_column("name", ["a"] * 23).to_parquet(tmp_path / "odd" / "train.parquet")
    with pytest.raises(UserError, match=message):
        open_dataset(f"hf:{tmp_path / 'odd'}{query}")


def test_a_split_of_a_single_table(saved: Path) -> None:
    assert len(open_dataset(f"hf:{saved}?split=train")) == 23
    with pytest.raises(UserError, match=r"names a split of a single table, .*; expected .* several splits; leave split= out"):
        open_dataset(f"hf:{saved}?split=test")
    with pytest.raises(UserError, match="names a split of a single table"):
        open_dataset(f"hf:{saved}?split=train[:5]")


def test_missing_labels_are_named(tmp_path: Path) -> None:
    table(labels=[0] * 4 + [None] + [1] * 18).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"row 4 of .* has the label None; "):
        open_dataset(f"hf:{tmp_path / 'saved'}")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r'run: pip install "trigflow\[hf\]"'):
        open_dataset("hf:any/thing")


def test_addresses() -> None:
    address = Address.parse("hf:org/name?split=train%5B:10%25%5D&stream=1&window=7")
    assert (address.name, address.settings["split"], address.streams, address.window) == ("org/name", "train[:10%]", True, 7)
    assert not Address.parse("hf:org/name?stream=0").streams


# Streams -------------------------------------------------------------------------------------------------------------


def test_a_stream_gives_every_image_once_an_epoch(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "parquet")
    stream = open_dataset(f"hf:{folder}?stream=1&window=3")
    plain = open_dataset(f"hf:{folder}")
    assert stream.rows is not None
    assert stream.rows.shards == (6, 6, 6, 5)
    assert (len(stream), stream.shape, stream.class_names) == (23, (3, 6, 5), plain.class_names)
    assert stream.labels is not None
    assert plain.labels is not None
    assert torch.equal(stream.labels, plain.labels)
    assert stream.codec("measured", 0.5) == plain.codec("measured", 0.5)
    order = stream.order(4, seed=0)
    seen = torch.cat([order.indices(step) for step in range(23)])
    for epoch in range(4):
        assert sorted(seen[23 * epoch : 23 * (epoch + 1)].tolist()) == list(range(23))
    images = torch.cat([stream.stored(order.indices(step)) for step in range(23)])
    assert torch.equal(images, PIXELS[seen])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_resumed_stream_goes_on_exactly(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open_dataset(f"hf:{parquet(tmp_path / 'parquet')}?stream=1&window=4")
    order = stream.order(3, seed=5)
    for start in (0, 1, 4, 9):
        loader = Loader(pickle.loads(pickle.dumps(stream)), order.indices, 12, workers=workers)
        assert loader.workers == min(workers, 1)
        for step in range(start, 12):
            assert torch.equal(loader.read(step, order.indices(step)), PIXELS[order.indices(step)])
        loader.close()


def test_a_shard_is_read_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trigflow.data.stream import Shards

    stream = open_dataset(f"hf:{parquet(tmp_path / 'parquet')}?stream=1&window=2")
    opened: list[int] = []
    read = Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, shard: opened.append(shard) or read(self, shard))
    order = stream.order(4, seed=0)
    for step in range(5):
        stream.stored(order.indices(step))
    assert len(opened) == len(set(opened))


def test_corrupt_images_of_a_stream(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "parquet", broken=7)
    with pytest.raises(UserError, match=r"1 of the 23 images of .* are corrupt; .*--skip-corrupt"):
        open_dataset(f"hf:{folder}?stream=1")
    stream = open_dataset(f"hf:{folder}?stream=1&window=3", skip_corrupt=True)
    assert stream.rows is not None
    assert stream.rows.shards == (6, 5, 6, 5)
    kept = torch.tensor([i for i in range(23) if i != 7])
    assert torch.equal(torch.cat(list(stream.chunks())), PIXELS[kept])
    assert stream.skipped == ("row 7",)


def test_parts_of_a_stream(tmp_path: Path) -> None:
    stream = open_dataset(f"hf:{parquet(tmp_path / 'parquet')}?stream=1&window=3")
    part = stream.subset(torch.tensor([0, 4, 5, 11, 20]))
    assert part.rows is not None
    assert part.rows.shards == (3, 1, 0, 1)
    assert torch.equal(next(part.chunks()), PIXELS[[0, 4, 5, 11, 20]])
    assert sorted(torch.cat([part.order(5, 0).indices(0)]).tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="expected rising indices"):
        stream.subset(torch.tensor([3, 1]))


def test_a_stream_that_changed_is_said_so(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "parquet")
    stream = open_dataset(f"hf:{folder}?stream=1")
    table().select(range(3)).to_parquet(folder / "train-00002.parquet")
    stored = pickle.loads(pickle.dumps(stream)).stored
    with pytest.raises(UserError, match=r"shard 2 of .* has changed since it was indexed|shard 2 of .* cannot be read"):
        stored(torch.tensor([15]))
    assert hub_module.PREFIX == "hf:"


def test_a_stream_of_other_files_is_indexed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step, place in enumerate(("here", "there", "here")):
        (tmp_path / place / "set").mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(tmp_path / place)
        labels = [(i + step) % 3 for i in range(23)]
        table(labels).to_parquet(tmp_path / place / "set" / "train.parquet")
        found = open_dataset("hf:./set?stream=1").labels
        assert found is not None
        assert found.tolist() == labels


def test_rows_that_a_stream_passes_over_are_not_kept() -> None:
    from trigflow.data.stream import _Reading

    class Row(dict[str, Any]):
        alive = 0

        def __init__(self) -> None:
            Row.alive += 1

        def __del__(self) -> None:
            Row.alive -= 1

    class Source:
        def read(self, shard: int) -> Any:
            for number in range(100):
                row = Row()
                most.append(Row.alive)
                row["number"] = number
                yield row

    most: list[int] = []
    assert [row["number"] for row in _Reading().take(Source(), 0, [97, 99])] == [97, 99]  # type: ignore[arg-type]
    assert max(most) < 6
