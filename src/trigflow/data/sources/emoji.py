"""`emoji`: pictures of the Noto colour font, with their names as captions. Nothing is downloaded.

Every emoji that the font draws as one glyph is a sample, but for the variants in skin tone: about 1,900. Its captions are the
short name of Unicode's CLDR (from the package `emoji`) and other names that people use, each alone, in small letters, and in
templates: "green heart", "a green heart", "heart, green", and the emoji itself. One family in ten (a woman, a man and a person
climbing are one family; things named by their colour stay) is not in `emoji` but in `emoji-held-out`, for measurements on
captions that were never seen.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from trigflow.data.cache import Arrays, remembered
from trigflow.data.captions import Captions
from trigflow.data.dataset import ImageDataset
from trigflow.runtime.errors import MissingExtraError, UserError

FONT = "NotoColorEmoji.ttf"
FOLDERS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts",
    "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts",
)  # fmt: skip
"""Where the font is looked for, sub-folders too."""
FONT_SIZE = 109
"""The one size that the font has bitmaps of: 136 x 128 pixels."""
SIDES = (32, 64)
"""Smallest and largest side of the pictures."""
SIDE = 48
"""Side of the pictures where nothing else is said."""
TONES = "".join(map(chr, range(0x1F3FB, 0x1F400)))
COLOURS = "red orange yellow green blue purple pink brown black white grey".split()
PEOPLE = re.compile(
    r"\b(man|woman|men|women|person|people|boy|girl|child|adult|facing right|red hair|white hair|curly hair|bald)\b"
)


@dataclass(frozen=True)
class Emoji:
    """One emoji: the characters, and its names, that of CLDR first."""

    text: str
    names: tuple[str, ...]

    @property
    def family(self) -> str:
        """What is left of the name without words for people and where they look."""
        return " ".join(PEOPLE.sub(" ", self.names[0]).split()) or self.names[0]

    @property
    def is_held_out(self) -> bool:
        """Whether its family is one of those kept for measurements: one in ten, by a digest of the name, of those without a
        colour in it: what a colour is called has to be learned from few."""
        if set(self.family.lower().split()) & set(COLOURS):
            return False
        return hashlib.blake2b(self.family.lower().encode(), digest_size=4).digest()[0] % 10 == 0

    def captions(self) -> list[str]:
        """The names as they are and in templates, those of CLDR first, each once."""
        found = []
        for name in self.names:
            small = name.lower()
            first, _, rest = small.partition(" ")
            found += [small, small, f"{'an' if small[0] in 'aeiou' else 'a'} {small}", small.capitalize(), name]
            if first in COLOURS and rest:
                found += [f"{rest}, {first}", f"{rest} in {first}"]
        return [*found, self.text]


def list_emoji() -> list[Emoji]:
    """All emoji of the package but those with a skin tone, in the order of their characters. Raises a MissingExtraError without
    the package."""
    try:
        import emoji
    except ImportError as error:
        raise MissingExtraError("the data set 'emoji'", "emoji", "emoji") from error
    listed = []
    for text, about in sorted(emoji.EMOJI_DATA.items()):
        if about["status"] != emoji.STATUS["fully_qualified"] or set(text) & set(TONES):
            continue
        names = [about["en"], *about.get("alias", ())]
        words = [" ".join(name.strip(":").replace("_", " ").split()) for name in names]
        listed.append(Emoji(text, tuple(dict.fromkeys(word for word in words if len(word) > 2))))
    return [one for one in listed if one.names]


def find_font() -> Path:
    """The font file: `$TRIGFLOW_EMOJI_FONT`, or one called `NotoColorEmoji.ttf` in the usual folders. Raises a UserError when
    there is none; it says how to get it."""
    own = os.environ.get("TRIGFLOW_EMOJI_FONT")
    folders = [own] if own else [os.path.expanduser(folder) for folder in FOLDERS]
    for folder in folders:
        if os.path.isfile(folder):
            return Path(folder)
        if found := sorted(Path(folder).rglob(FONT)):
            return found[0]
    raise UserError(
        f"no {FONT} in {', '.join(folders)}; expected the Noto colour emoji font; install it (Debian: apt install "
        "fonts-noto-color-emoji), or name the file in TRIGFLOW_EMOJI_FONT"
    )


def open_emoji(side: int | None = None, *, held_out: bool = False) -> "EmojiDataset":
    """The data set, of those in training or of those held out; pictures uint8 RGB over white.

    Args:
        side: of the pictures in pixels, 32 to 64.
        held_out: the others.

    Raises:
        UserError: for a side out of range, or without the font.
        MissingExtraError: without the package `emoji`.
    """
    side = SIDE if side is None else side
    if not SIDES[0] <= side <= SIDES[1]:
        raise UserError(f"emoji of {side} pixels; expected a side of {SIDES[0]} to {SIDES[1]}; change --resize")
    listed, font = list_emoji(), find_font()
    state = [font.stat().st_size, hashlib.blake2b(repr(listed).encode()).hexdigest()]
    found = remembered(["emoji", str(font), side], state, lambda: _draw(listed, font, side))
    chosen = [i for i in found["drawn"].tolist() if listed[i].is_held_out == held_out]
    values = torch.from_numpy(found["pictures"])[torch.from_numpy(np.isin(found["drawn"], chosen))]
    captions = Captions.of([listed[i].captions() for i in chosen])
    return EmojiDataset("emoji-held-out" if held_out else "emoji", values, captions=captions)


def _draw(listed: Sequence[Emoji], path: Path, side: int) -> Arrays:
    """Pictures `(n, 3, side, side)` of all that the font has as one glyph, and which these are."""
    try:
        font = ImageFont.truetype(str(path), FONT_SIZE)
        none = _picture("\U0010fffd", font, side)
        pictures, drawn = [], []
        for number, one in enumerate(listed):
            if font.getlength(one.text) > 1.5 * font.getlength("\U0001f600"):
                continue  # several glyphs side by side: a sequence that the font does not know
            picture = _picture(one.text, font, side)
            if not np.array_equal(picture, none) and picture.min() < 255:
                pictures.append(picture)
                drawn.append(number)
        if not pictures:
            raise OSError("it has no emoji, or none as bitmaps")
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be drawn with ({error}); expected the Noto colour emoji font; install it anew"
        ) from None
    return {"pictures": np.stack(pictures), "drawn": np.array(drawn)}


def _picture(text: str, font: ImageFont.FreeTypeFont, side: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """One emoji over white, `(3, side, side)`, with a sixteenth of the side free around it."""
    canvas = Image.new("RGBA", (200, 200), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((100, 100), text, font=font, embedded_color=True, anchor="mm")
    around = canvas.getbbox() or (0, 0, 200, 200)
    middle, half = ((around[0] + around[2]) / 2, (around[1] + around[3]) / 2), 136 / 2
    margin = half * 8 / 7
    square = canvas.transform(
        (4 * side, 4 * side),
        Image.Transform.EXTENT,
        (middle[0] - margin, middle[1] - margin, middle[0] + margin, middle[1] + margin),
        Image.Resampling.BICUBIC,
    )
    white = Image.new("RGBA", square.size, "white")
    picture = Image.alpha_composite(white, square).convert("RGB").resize((side, side), Image.Resampling.BOX)
    return np.asarray(picture).transpose(2, 0, 1).copy()


@dataclass(frozen=True, eq=False)
class EmojiDataset(ImageDataset):
    """Emoji that are varied a little each time they are drawn in training: moved by up to a sixteenth of the side, with each
    colour channel paler by up to a tenth. Captions stay true."""

    def vary(self, values: Tensor, count: int, rows: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """With a generator the pictures are moved and paler."""
        if generator is None:
            return values
        most = self.width // 16
        moves = torch.randint(0, 2 * most + 1, (count, 2), generator=generator)
        pales = 1 - 0.1 * torch.rand(count, 3, generator=generator, dtype=torch.float32)
        if rows is not None:
            moves, pales = moves[rows], pales[rows]
        padded = torch.nn.functional.pad(255 - values, (most, most, most, most))
        moved = torch.empty_like(values)
        for picture, whole, (down, right) in zip(moved, padded, moves.tolist(), strict=True):
            picture.copy_(whole[:, down : down + self.height, right : right + self.width])
        return (255 - moved * pales[:, :, None, None].to(values.device)).round().to(torch.uint8)
