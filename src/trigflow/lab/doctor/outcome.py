"""What a check can come to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Diagnosis:
    """Something is wrong."""

    name: str
    """Of the check."""
    title: str
    """In plain words."""
    evidence: str
    """Numbers from the run."""
    remedy: str
    """Which setting to change."""


@dataclass(frozen=True)
class Sound:
    """Looked at, nothing found."""

    name: str
    seen: str
    """What was looked at, with numbers."""


@dataclass(frozen=True)
class NotSeen:
    """Could not be looked at."""

    name: str
    reason: str
    """Why, and what would help."""


Outcome = Diagnosis | Sound | NotSeen
