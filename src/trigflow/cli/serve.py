"""`trigflow serve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from trigflow.serve.limits import Limits


@dataclass(frozen=True)
class Serve:
    """Draw images for clients: HTTP, a WebSocket of frames, OpenAPI documentation at /docs.

    A run folder of a student that still has its teacher serves both.

    Example: trigflow serve runs/demo --port 8000
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder of a teacher or a student."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for every one of this machine, best with a token."""
    port: int = 8000
    """Port to listen at; 0 for any that is free."""
    token_file: Path | None = None
    """File whose only line is a token that clients must show; by default the variable TRIGFLOW_TOKEN, or no token."""
    origins: tuple[str, ...] = ()
    """Pages from elsewhere that may open streams, such as https://example.org."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    variant: str = "auto"
    """How the network is computed; the variants of `trigflow bench`."""
    workers: int | None = None
    """Batches of a model drawn at a time; by default two on a CPU with several cores, otherwise one."""
    threads: int | None = None
    """Cores for each worker; by default its share of all, or of OMP_NUM_THREADS."""
    verbose: bool = False
    """Log every request."""
    limits: Limits = field(default_factory=Limits)

    def run(self) -> None:
        from trigflow.serve.listen import listen, read_token

        options = {**vars(self), "token": read_token(self.token_file)}
        del options["token_file"]
        listen(options.pop("run_folder"), **options)
