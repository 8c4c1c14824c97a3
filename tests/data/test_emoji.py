"""The emoji: which there are, what they are called, and that pictures and captions go together."""

import pytest
import torch

from trigflow.data import open_dataset
from trigflow.data.sources import emoji
from trigflow.data.sources.emoji import Emoji, find_font, list_emoji, open_emoji
from trigflow.runtime.errors import UserError


def has_font():
    try:
        return bool(find_font())
    except UserError:
        return False


needs_font = pytest.mark.skipif(not has_font(), reason="the Noto colour emoji font is not installed")


@pytest.fixture(scope="module")
def data():
    return open_dataset("emoji")


@pytest.fixture(scope="module")
def others():
    """Those held out, remembered with the others: the cache folder of a single test would have all drawn anew."""
    return open_emoji(held_out=True)


def picture_of(data, name):
    return data.images[next(i for i, texts in enumerate(data.captions.texts) if texts[0] == name)].float()


def test_captions_of_one():
    heart = Emoji("💚", ("green heart", "Love"))
    captions = heart.captions()
    assert captions[0] == "green heart"
    assert {"a green heart", "Green heart", "heart, green", "a love", "Love", "💚"} < set(captions)
    assert "an apple" in Emoji("x", ("apple",)).captions()


def test_families_are_held_out_together():
    listed = list_emoji()
    held = {}
    for one in listed:
        held.setdefault(one.family, set()).add(one.is_held_out)
    assert all(len(kinds) == 1 for kinds in held.values())
    assert Emoji("a", ("woman climbing",)).family == Emoji("b", ("person climbing",)).family == "climbing"
    share = sum(one.is_held_out for one in listed) / len(listed)
    assert 0.07 < share < 0.13
    assert not any(one.is_held_out for one in listed if one.names[0] in ("green heart", "blue circle", "red apple"))


def test_no_skin_tones():
    assert not any(set(one.text) & set(emoji.TONES) for one in list_emoji())


@needs_font
def test_pictures_over_white(data):
    assert data.images.shape[1:] == (3, 48, 48)
    assert len(data) > 1500
    corners = data.images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all()  # a free edge around each
    red, green = picture_of(data, "red circle")[:, 24, 24], picture_of(data, "green circle")[:, 24, 24]
    assert red[0] > 200 > red[1] + 50
    assert green[1] > green[0] + 40


@needs_font
def test_held_out_are_the_others(data, others):
    assert others.shape == data.shape
    assert others.name == "emoji-held-out"
    assert not {texts[-1] for texts in data.captions.texts} & {texts[-1] for texts in others.captions.texts}


@needs_font
def test_pictures_of_another_size(monkeypatch):
    few = list_emoji()[::20]
    monkeypatch.setattr(emoji, "list_emoji", lambda: few)
    other = open_emoji(32, held_out=True)
    assert other.shape == (3, 32, 32)
    assert 0 < len(other) < len(open_emoji(32)) < len(few)


@needs_font
def test_variation_is_small_and_the_same_for_the_same_seed(data):
    indices = torch.arange(0, 160, 10)
    plain, _ = data.batch(indices)
    assert torch.equal(plain, data.images[indices])
    varied, _ = data.batch(indices, generator=torch.Generator().manual_seed(3))
    again, _ = data.batch(indices, generator=torch.Generator().manual_seed(3), rows=torch.tensor([4, 1]))
    assert torch.equal(again, varied[[4, 1]])
    assert not torch.equal(varied, plain)
    ink, moved = (255 - plain.float()).sum((2, 3)), (255 - varied.float()).sum((2, 3))
    assert (
        (moved <= ink + 0.5 * 48 * 48) & (moved >= 0.88 * ink - 0.5 * 48 * 48)
    ).all()  # nothing is pushed out of the picture


@needs_font
@pytest.mark.parametrize(("options", "said"), [({"resize": 20}, "32 to 64"), ({"channels": 1}, "expected 3")])
def test_sizes_and_channels_out_of_range(options, said):
    with pytest.raises(UserError, match=said):
        open_dataset("emoji", **options)


def test_no_font(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIGFLOW_EMOJI_FONT", str(tmp_path / "none.ttf"))
    with pytest.raises(UserError, match=r"apt install fonts-noto-color-emoji.*TRIGFLOW_EMOJI_FONT"):
        open_emoji()


def test_a_file_that_is_no_font(monkeypatch, tmp_path):
    (tmp_path / "font.ttf").write_bytes(b"no font")
    monkeypatch.setenv("TRIGFLOW_EMOJI_FONT", str(tmp_path / "font.ttf"))
    with pytest.raises(UserError, match=r"font\.ttf' cannot be drawn with"):
        open_emoji()


def test_a_font_without_emoji(monkeypatch):
    pytest.importorskip("emoji")
    from matplotlib import get_data_path

    monkeypatch.setenv("TRIGFLOW_EMOJI_FONT", f"{get_data_path()}/fonts/ttf/cmex10.ttf")
    with pytest.raises(UserError, match=r"cannot be drawn with .*no emoji.*; expected the Noto colour emoji font; install it"):
        open_dataset("emoji")
