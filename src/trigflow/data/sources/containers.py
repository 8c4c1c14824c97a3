"""What can be odd about a folder, zip or tar before any image in it is opened."""

import os
import re
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from trigflow.data.findings import Report
from trigflow.data.labels import CLASS_ENDING, LABEL_FILE
from trigflow.data.latent_files import ENDING as LATENT_ENDING
from trigflow.data.sources.files import Files, FolderFiles
from trigflow.data.sources.hub import PREFIX, HubFiles
from trigflow.data.sources.opening import list_files
from trigflow.data.sources.tars import TarFiles, find_shards, is_plain, tar_members
from trigflow.data.sources.zips import ZipFiles, member_name, open_zip
from trigflow.runtime.errors import UserError

UNSAFE = re.compile(r"^[/\\]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)|[\x00-\x1f]")
"""Names that lead, or could lead, outside of where they are unpacked."""
TAR_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


def examine_container(source: str) -> tuple[Files, Report]:
    """The files of a data set, and a report of what is odd about how they are kept. Raises a UserError if it cannot be read at
    all."""
    path = os.path.expanduser(source)
    shards = None if source.startswith(PREFIX) or "\0" in path else find_shards(path)
    if shards and all(map(os.path.isfile, shards)):
        report = Report(source, "tar shards")
        files: Files = TarFiles.of(path, _whole_shards(shards, report))
    else:
        files = list_files(source)
        kind = "Hugging Face" if isinstance(files, HubFiles) else "zip" if isinstance(files, ZipFiles) else "folder"
        report = Report(source, kind)
        if isinstance(files, ZipFiles):
            _examine_zip(path, report)
        elif isinstance(files, FolderFiles):
            _examine_links(path, report)
    return files, report


def _examine_zip(path: str, report: Report) -> None:
    with open_zip(path) as archive:
        members = [info for info in archive.infolist() if not info.is_dir()]
    _check_names((info.filename for info in members), report)
    _check_repeated((member_name(info) for info in members), report)
    for info in members:
        if stat.S_ISLNK(info.external_attr >> 16):
            report.problem("link", info.filename, "is a symbolic link; what it holds is read as if it were an image")
    packed = [info for info in members if info.compress_type != zipfile.ZIP_STORED]
    if packed:
        what = f"and {len(packed) - 1} others are compressed in the zip, which is slower to read; pack it with: zip -0"
        report.note("compressed", packed[0].filename, what)


def _whole_shards(shards: Sequence[str], report: Report) -> list[str]:
    """The shards that can be read. Raises a UserError if none can."""
    whole, failure = [], None
    for shard in shards:
        name = os.path.basename(shard)
        try:
            members = list(tar_members(shard))
        except UserError as error:
            failure = error
            report.problem("shard", name, f"cannot be read: {str(error).split(';')[0]}")
            continue
        whole.append(shard)
        _check_names((f"{name}/{member.name}".replace("//", "/") for member in members), report)
        _check_names((member.name for member in members if member.name.startswith("/")), report)
        _check_repeated((f"{name}/{member.name}" for member in members if member.isreg()), report)
        for member in members:
            if not is_plain(member) and not member.isdir():
                kind = TAR_KINDS.get(member.type, "of an unknown type")
                report.problem("left out", f"{name}/{member.name}", f"is {kind} and is passed over")
    if failure is not None and not whole:
        raise failure
    return whole


def _check_names(names: Iterable[str], report: Report) -> None:
    for name in names:
        if UNSAFE.search(name):
            report.problem("unsafe name", name, "would lead outside if it were unpacked; nothing is unpacked here")


def _check_repeated(names: Iterable[str], report: Report) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            report.problem("repeated name", name, f"is there {count} times")


def _examine_links(path: str, report: Report) -> None:
    for folder, folders, files in os.walk(path, followlinks=False):
        real = os.path.realpath(folder)
        for name in folders:
            full = os.path.join(folder, name)
            target = os.path.realpath(full)
            if os.path.islink(full) and (real + os.sep).startswith(target.rstrip(os.sep) + os.sep):
                report.problem("link", os.path.relpath(full, path), "leads back to a folder that it is in, and is passed over")
        for name in files:
            full = os.path.join(folder, name)
            if os.path.islink(full) and not os.path.exists(full):
                report.problem("link", os.path.relpath(full, path), "leads nowhere")


def note_others(files: Files, captions: Collection[str], report: Report) -> None:
    """Count the files that are neither images nor belong to them, as those with their captions do."""
    used = {*files.images()}
    known = (LATENT_ENDING, CLASS_ENDING)
    others = [
        name
        for index, name in enumerate(files.names)
        if index not in used and name not in captions and name.lower() != LABEL_FILE and not name.lower().endswith(known)
    ]
    if others:
        what = f"and {len(others) - 1} others are no images by their endings, and are passed over"
        report.note("other files", others[0], what)
