"""What one client, and all of them together, may ask of the server, and what shows that they may."""

import math
import re
from dataclasses import dataclass, fields

from trigflow.runtime.errors import UserError

TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,256}")
"""What can stand in a header and in the name of a subprotocol, and is not guessed."""


def check_token(token: str, what: str = "the token") -> None:
    """Raise a UserError for a token that is none; `what` names it."""
    if not TOKEN.fullmatch(token):
        raise UserError(
            f"{what} cannot be used; expected 16 to 256 letters, digits and . _ ~ -; "
            "make one with: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )


@dataclass(frozen=True)
class Limits:
    """Bounds on everything a client can send or leave lying about; the defaults suit a small model on a small machine.

    Raises:
        UserError: unless every limit is a number of its kind, finite and positive (the batching window may be 0).
    """

    images: int = 256
    """Images of one request."""
    steps: int = 64
    """Sampling steps."""
    guidance: float = 10.0
    """Guidance scale of a model that is guided by a second evaluation; a student that takes the scale has its own bound."""
    mixed_labels: int = 4
    """Classes in the mix of one frame; each costs an evaluation a step."""
    frame_images: int = 64
    """Images of one frame of a stream."""
    prompt_bytes: int = 1_024
    """Bytes of a prompt, of a model that reads as many; one of its own may read fewer."""
    body_bytes: int = 65_536
    """Body of a request."""
    edit_bytes: int = 4_194_304
    """Body of a request with a picture to edit."""
    edit_pixels: int = 16_777_216
    """Pixels of such a picture."""
    message_bytes: int = 4_096
    """Message of a stream, from the client."""
    batch: int = 64
    """Images drawn at once; a longer request is drawn in parts, between those of others."""
    window_ms: float = 2.0
    """How long an image request waits for others to be drawn with it. Frames of a stream do not wait."""
    queue: int = 1024
    """Images of all requests that wait to be drawn, for each model; 429 beyond it."""
    queue_seconds: float = 10.0
    """How long a request may wait, 429 after it, or a frame, whose stream is closed with 1013."""
    connections: int = 512
    """Open HTTP connections; beyond it the one that has been silent longest is closed."""
    streams: int = 256
    """Open streams; 429 beyond it."""
    silent_seconds: float = 10.0
    """How long an HTTP connection may take to say what it wants, or between two requests."""
    stream_idle_seconds: float = 300.0
    """How long a stream stays open without a message."""
    send_seconds: float = 10.0
    """How long a frame may take to leave before its stream is closed, and how long a client may take nothing of an answer."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), int if isinstance(field.default, int) else int | float
            fine = isinstance(value, kind) and not isinstance(value, bool) and 0 <= value < math.inf
            if not fine or (value == 0 and field.name != "window_ms"):
                option = f"--limits.{field.name.replace('_', '-')}"
                what = "whole" if kind is int else "finite"
                raise UserError(f"limit {field.name} = {value!r}; expected a {what} number above 0; correct {option}")
