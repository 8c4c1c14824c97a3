"""A folder of latents and of what text encoders make of their captions, for one teacher: training needs neither again.

    cache.json        format, and which encoders read the captions
    latents.zip       see `trigflow.data.encode`
    text/             see `trigflow.data.captions`

`trigflow.data.open_dataset` opens it.
"""

import math
from pathlib import Path
from typing import Any

import torch

from trigflow.codecs import Latents
from trigflow.data.encode import encode_images, renew_captions
from trigflow.data.sources.opening import CACHE, open_dataset
from trigflow.migrations import migrated, stamped
from trigflow.models.model import unloaded_parts
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import ensure_folder, read_json, write_json
from trigflow.runtime.places import check_outside, check_place


def encode_for(
    run: Path,
    source: str,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    captions: bool = True,
    progress: bool = False,
    **how: Any,
) -> int:
    """Write such a folder; how many latents there are. What is there already is kept, and an interrupted encoding goes on; of
    captions that have changed since, only they are read again.

    Args:
        run: folder of the teacher, whose autoencoder, size and encoders are used.
        source: folder or zip of images; to a teacher of videos each is one of a single frame.
        out: the folder.
        device: where the autoencoder runs.
        captions: False takes none along.
        how: `batch_size` and `workers` of `encode_images`.

    Raises:
        UserError: for a teacher without latents or of longer videos, what `encode_images` and the encoders raise, and a
            folder of another teacher or of other images.
    """
    codec, conditioner = unloaded_parts(run)
    if not isinstance(codec, Latents):
        raise UserError(f"'{run}' has no latents; expected a teacher with an autoencoder; train it on the images themselves")
    if math.prod(codec.shape[1:-2]) != 1:
        raise UserError(
            f"'{run}' draws videos of {codec.shape[1]} frames of latents; expected one, as the data are pictures; import the "
            "teacher with --frames 1"
        )
    reader: Any = conditioner.inputs.get("text")
    reader = reader if captions and hasattr(reader, "kept") else None
    state = {"vae": codec.vae.state(), "size": list(codec.drawn_shape), "reader": reader and reader.state()}
    folder = check_place(out, "folder")
    check_outside(folder, source)
    if (folder / CACHE).is_file():
        found = migrated("cache", read_json(folder / CACHE, "cache"), f"'{folder / CACHE}'")
        for name, value in state.items():
            if found.get(name) != value:
                raise UserError(
                    f"'{folder}' was made with another {name} than '{run}' has; expected one teacher; choose another --out"
                )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"'{folder}' holds something else; expected a new folder; choose another --out")
    ensure_folder(folder)
    write_json(folder / CACHE, stamped("cache", state))
    zipped = folder / "latents.zip"
    if zipped.is_file():
        renew_captions(zipped, source, captions)
    else:
        encode_images(
            source, zipped, vae=codec.vae, resize=codec.drawn_shape[-2], shape=codec.shape,
            device=device, captions=captions, progress=progress, **how,
        )  # fmt: skip
    return len(open_dataset(folder, captions=captions).read_as(conditioner, progress))
