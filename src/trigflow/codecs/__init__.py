"""Between stored data and x0, and between x0 and what a person gets: one file a kind of data."""

from trigflow.codecs.codec import CODECS, Codec, codec_from_state, register
from trigflow.codecs.latents import Latents
from trigflow.codecs.pictures import DrawnPictures
from trigflow.codecs.pixels import Pixels

__all__ = ["CODECS", "Codec", "DrawnPictures", "Latents", "Pixels", "codec_from_state", "register"]
