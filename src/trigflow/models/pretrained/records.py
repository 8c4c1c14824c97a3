"""What a network snapshot is made of, and the names by which its pickle asks for it.

Tensors and arrays are records of where their numbers lie in the file; they are read one at a time, when they are wanted.

Two containers are understood. A plain pickle, as NVIDIA publishes them, carries each storage as the bytes of a small legacy
`torch.save` file: four pickles (magic number, version, machine, storage), the list of keys, and for each key the number of
elements and the elements. An archive written by `torch.save` carries one pickle and one file for each storage.
"""

import math
import re
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trigflow.models.pretrained.unpickle import Known, Record, Source, Span, Unpickler, shown
from trigflow.runtime.errors import UserError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
MAX_AXES = 8

STORAGES = {
    "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Double": torch.float64,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
}  # fmt: skip
"""Storage classes `torch.<name>Storage` and their element types."""

MODULES = (
    "torch.nn.modules.container.ModuleDict",
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.container.Sequential",
)
"""Classes of PyTorch that hold the blocks of a network; taken as records."""


@dataclass(eq=False)
class Storage:
    """A run of numbers in the file. `start` is None until the place is known."""

    dtype: torch.dtype
    numel: int
    start: int | None = None


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in the file: a strided view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def extent(self) -> int:
        """Elements of the storage from the first one used to the last."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if self.numel else 0

    def read(self, source: Source) -> Tensor:
        """The numbers, in the type they are stored in."""
        if self.storage.start is None:
            source.refuse("lacks the numbers of a tensor")
        flat = torch.empty(self.extent, dtype=self.dtype)
        data = flat.view(torch.uint8).numpy()
        source.file.seek(self.storage.start + self.offset * self.dtype.itemsize)
        if source.file.readinto(data) != data.nbytes:  # type: ignore[attr-defined]
            source.refuse(f"is cut short after {source.size} bytes")
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Latin1:
    """Bytes written as text."""

    text: str


@dataclass(frozen=True, eq=False)
class StoredArray:
    """A numpy array, or a single number, in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    data: Span | Latin1

    def read(self, source: Source) -> np.ndarray[Any, Any]:
        """The numbers."""
        data = source.read(self.data) if isinstance(self.data, Span) else self.data.text.encode("latin-1", "replace")
        if len(data) != math.prod(self.shape) * self.dtype.itemsize:
            source.refuse(f"is damaged: {len(data)} bytes for an array of shape {self.shape}")
        return np.frombuffer(data, self.dtype).reshape(self.shape)


class ArrayType(Record):
    """An element type of numpy, for example `f4`; its state says the byte order."""

    @property
    def dtype(self) -> np.dtype[Any]:
        order = self.state.get("", (3, "<"))
        big = isinstance(order, tuple) and len(order) > 1 and order[1] == ">"
        return np.dtype(f"{'>' if big else '<'}{self.class_name}")


class ArrayShell(Record):
    """An array whose shape, type and numbers the pickle restores later."""

    @property
    def array(self) -> StoredArray | None:
        match self.state.get(""):
            case (int(), tuple(shape), ArrayType() as kind, False, (Span() | Latin1()) as data) if _sizes(shape):
                return StoredArray(kind.dtype, shape, data)
        return None


# Names and calls ----------------------------------------------------------------------------------------------------

STORAGE_NAMES = {f"torch.{name}Storage": Known(f"torch.{name}Storage", dtype) for name, dtype in STORAGES.items()}
"""The only names allowed inside the bytes of a storage."""
LOAD_BYTES = "torch.storage._load_from_bytes"
NUMPY = ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
NAMES = {
    **STORAGE_NAMES,
    **{
        name: Known(name)
        for name in (
            "torch._utils._rebuild_tensor",
            "torch._utils._rebuild_tensor_v2",
            "torch._utils._rebuild_parameter",
            "torch_utils.persistence._reconstruct_persistent_obj",
            "collections.OrderedDict",
            "dnnlib.util.EasyDict",
            "builtins.set",
            "__builtin__.set",
            "_codecs.encode",
            "numpy.ndarray",
            "numpy.dtype",
            *(f"numpy.{core}.{function}" for core in ("core", "_core") for function in NUMPY),
            *MODULES,
        )
    },
}
"""Every name that a snapshot may use, but for `LOAD_BYTES`, which the bytes of a storage may not."""


def build(source: Source, name: str, arguments: tuple[Any, ...]) -> Any:
    """The record that a call of a known name stands for; `NotImplemented` for arguments that make no sense."""
    match name.replace("numpy._core", "numpy.core"), arguments:
        case (
            "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2",
            (Storage() as storage, int(offset), tuple(shape), tuple(stride), *_),
        ) if _sizes((offset,)) and _sizes(shape) and _sizes(stride) and len(shape) == len(stride):
            tensor = StoredTensor(storage, offset, shape, stride)
            return tensor if offset + tensor.extent <= storage.numel else NotImplemented
        case "torch._utils._rebuild_parameter", (StoredTensor() as tensor, *_):
            return tensor
        case "torch.storage._load_from_bytes", (Span() as span,):
            storage = _read_saved_storage(source, span)
            return storage if isinstance(storage, Storage) else NotImplemented
        # NVIDIA's objects: `meta` has type, version, module_src, class_name and state; the source code is dropped unread.
        case (
            "torch_utils.persistence._reconstruct_persistent_obj",
            ({"type": "class", "class_name": str(class_name), "state": dict(state)},),
        ):
            return Record(class_name, state)
        case "collections.OrderedDict" | "dnnlib.util.EasyDict", ():
            return {}
        case "builtins.set" | "__builtin__.set", (list(items),):  # as protocols 2 and 3 write it; its list takes no copy
            return items
        case "_codecs.encode", (str(text), "latin1"):  # bytes as protocol 2 writes them: each character is a byte
            return Latin1(text)
        case "numpy.dtype", (str(code), *_) if re.fullmatch(r"[iu][1248]|f[248]|b1", code):
            return ArrayType(code)
        case "numpy.core.multiarray._reconstruct", _:
            return ArrayShell("numpy.ndarray")
        case "numpy.core.multiarray.scalar", (ArrayType() as kind, (Span() | Latin1()) as data):
            return StoredArray(kind.dtype, (), data)
        case ("numpy.core.numeric._frombuffer", ((Span() | Latin1()) as data, ArrayType() as kind, tuple(shape), "C")) if (
            _sizes(shape)
        ):
            return StoredArray(kind.dtype, shape, data)
        case module, () if module in MODULES:
            return Record(module)
    return NotImplemented


def _sizes(numbers: tuple[Any, ...]) -> bool:
    """Whether these are at most `MAX_AXES` whole numbers, from 0 to 2^62."""
    return len(numbers) <= MAX_AXES and all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)


# Containers ---------------------------------------------------------------------------------------------------------


def read_pickle(source: Source) -> Any:
    """The object in a plain pickle, or in an archive written by `torch.save`. Raises a UserError when the file is neither, is
    damaged, or asks for anything but the parts of a snapshot."""
    head = source.read(Span(0, min(source.size, 16)))
    if head.startswith(b"PK\x03\x04"):
        return _read_archive(source)
    if len(head) < 2 or head[0] != 0x80 or not 3 <= head[1] <= 5:
        source.refuse("is no pickle of protocol 3 to 5" if head else "is empty")
    return Unpickler(source, Span(0, source.size), {**NAMES, LOAD_BYTES: Known(LOAD_BYTES)}, build).load()


def _read_saved_storage(source: Source, span: Span) -> Any:
    """The object that `torch.save` wrote in its older format, here within `span`; nothing but storages is allowed."""
    storages: dict[str, Storage] = {}
    unpickler = Unpickler(source, span, STORAGE_NAMES, build, lambda reference: _storage(source, reference, storages))
    magic, version, machine = (unpickler.load() for _ in range(3))
    if magic != LEGACY_MAGIC or version != LEGACY_VERSION or not isinstance(machine, dict):
        source.refuse(f"is damaged: no saved storage at byte {span.start}")
    if machine.get("little_endian") is not True:
        source.refuse("was written on a big-endian machine", "write it again on a little-endian one")
    content, keys = unpickler.load(), unpickler.load()
    position = unpickler.position
    for key in keys if isinstance(keys, list) else []:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or position + 8 > span.stop:
            source.refuse(f"is damaged: no saved storage at byte {position}")
        (numel,) = struct.unpack("<q", source.read(Span(position, 8)))
        storage.start, position = position + 8, position + 8 + storage.numel * storage.dtype.itemsize
        if numel != storage.numel or position > span.stop:
            source.refuse(f"is cut short or damaged: {numel} elements at byte {storage.start}, {storage.numel} announced")
    return content


def _read_archive(source: Source) -> Any:
    """The object of a zip archive written by `torch.save`."""
    try:
        with zipfile.ZipFile(source.file) as archive:
            places = {info.filename: _place(source, info) for info in archive.infolist()}
    except UserError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        source.refuse(f"is a damaged archive ({shown(error)})")
    pickles = [name for name in places if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        source.refuse("is a zip archive without a pickle")
    folder = pickles[0].removesuffix("data.pkl")
    order = places.get(f"{folder}byteorder")
    if order is not None and source.read(order) != b"little":
        source.refuse("was written on a big-endian machine", "write it again on a little-endian one")
    storages: dict[str, Storage] = {}
    content = Unpickler(
        source, places[pickles[0]], NAMES, build, lambda reference: _storage(source, reference, storages)
    ).load()
    for key, storage in storages.items():
        place = places.get(f"{folder}data/{key}")
        if place is None or place.length != storage.numel * storage.dtype.itemsize:
            source.refuse(f"is damaged: the archive has no whole storage '{shown(key)}'")
        storage.start = place.start
    return content


def _place(source: Source, info: zipfile.ZipInfo) -> Span:
    """Where a file of an archive lies; after its local header of 30 bytes, a name and an extra field."""
    header = source.read(Span(info.header_offset, 30))
    name, extra = struct.unpack("<HH", header[26:30])
    span = Span(info.header_offset + 30 + name + extra, info.file_size)
    if header[:4] != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED or span.stop > source.size:
        source.refuse("is a damaged or compressed archive", "unpack it, or save it again with torch.save")
    return span


def _storage(source: Source, reference: Any, storages: dict[str, Storage]) -> Storage:
    """The storage that a persistent id `("storage", class, key, device, elements[, None])` refers to."""
    match reference:
        case ("storage", Known(value=torch.dtype() as dtype), str(key), str(), int(numel), *_) if _sizes((numel,)):
            if numel * dtype.itemsize > source.size:
                source.distrust(f"announces {numel} numbers in {source.size} bytes")
            return storages.setdefault(key, Storage(dtype, numel))
    return source.refuse("is damaged: a reference to a storage makes no sense")
