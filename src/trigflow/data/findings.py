"""What `trigflow data check` finds, and how it is told."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing that was found. Its kind is a word or two, such as `corrupt` or `duplicate`; the name, a file or what else it
    is about."""

    kind: str
    name: str
    what: str

    def text(self) -> str:
        """In one line, whatever the name holds."""
        return f"{self.kind}: {self.name!r} {self.what}"


@dataclass
class Report:
    """What there is to say about a data set.

    Attributes:
        source: its path or address.
        kind: folder, zip, tar shards, or Hugging Face.
        images: how many images or latents there are, corrupt ones included.
        of: images, or latents.
        sizes: how many there are of each size, such as `64x64 RGB`.
        classes: how many there are of each class; empty without labels.
        captions: how many have one or several that are not empty.
        mean: of each channel; pixels in [-1, 1].
        std: standard deviation of each channel.
        problems: what training would stop at, pass over or learn wrongly.
        notes: what it copes with.
    """

    source: str
    kind: str
    images: int = 0
    of: str = "images"
    sizes: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    captions: int = 0
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)

    def problem(self, kind: str, name: str, what: str) -> None:
        """Add a problem."""
        self.problems.append(Finding(kind, name, what))

    def note(self, kind: str, name: str, what: str) -> None:
        """Add a note."""
        self.notes.append(Finding(kind, name, what))

    def facts(self) -> dict[str, Any]:
        """All of it in plain types, for JSON."""
        return asdict(self)

    def text(self, limit: int = 20) -> str:
        """All of it in lines; of each kind of finding at most `limit` of them, 0 for all."""
        lines = [
            f"{self.images} {self.of} in {self.source!r} ({self.kind})",
            *(f"size: {size}, {count} {self.of}" for size, count in self.sizes.items()),
            *(f"class {i} {name!r}: {count} {self.of}" for i, (name, count) in enumerate(self.classes.items())),
        ]
        if self.captions:
            lines.append(f"captions: of {self.captions} {self.of}")
        if self.mean:
            numbers = (f"mean {mean:.3f}, deviation {std:.3f}" for mean, std in zip(self.mean, self.std, strict=True))
            lines += [f"channel {channel}: {text}" for channel, text in enumerate(numbers)]
        lines += [f"note: {line}" for line in _lines(self.notes, limit)]
        lines += [f"problem: {line}" for line in _lines(self.problems, limit)]
        lines.append(f"{len(self.problems)} problem{'' if len(self.problems) == 1 else 's'} found")
        return "\n".join(lines)


def _lines(findings: list[Finding], limit: int) -> list[str]:
    shown: Counter[str] = Counter()
    lines = []
    for finding in findings:
        shown[finding.kind] += 1
        if not limit or shown[finding.kind] <= limit:
            lines.append(finding.text())
    return lines + [f"{kind}: {count - limit} more" for kind, count in shown.items() if limit and count > limit]
