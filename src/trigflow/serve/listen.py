"""From a run folder to a server that listens: what `trigflow serve` does."""

import contextlib
import gc
import importlib.util
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from trigflow.runtime.errors import MissingExtraError, UserError
from trigflow.runtime.machine import resolve_device
from trigflow.serve.limits import Limits, check_token
from trigflow.serve.offers import offers_of

TOKEN_VARIABLE = "TRIGFLOW_TOKEN"


def listen(
    run: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    origins: Sequence[str] = (),
    device: str = "auto",
    variant: str = "auto",
    workers: int | None = None,
    threads: int | None = None,
    limits: Limits | None = None,
    verbose: bool = False,
    open: bool = False,
) -> None:
    """Serve a run folder until interrupted.

    Args:
        workers, threads: see `use_cores`; the others are those of `trigflow serve`.

    Raises:
        MissingExtraError: without the extra `serve`.
        UserError: when the folder cannot be loaded, the address cannot be listened at, or an origin is none.
    """
    for package in ("fastapi", "uvicorn", "websockets", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("trigflow serve", package.replace("_", "-"), "serve")
    from trigflow.serve.app import create_app
    from trigflow.serve.server import make_server
    from trigflow.serve.service import normal_origin

    origins = [normal_origin(origin) for origin in origins]
    limits = limits or Limits()
    workers = use_cores(resolve_device(device), workers, threads)
    with bind(host, port) as listener:
        with said_after(2.0, f"getting '{run}' ready to draw batches of 1 to {limits.batch}; this takes a few seconds"):
            offers = offers_of(run, limits, device, variant, workers)
        app = create_app(offers, limits, token=token, origins=origins)
        server = make_server(app, host, port, log_level="info" if verbose else "warning")
        address = _shown(listener)
        print(f"{' and '.join(offer.name for offer in offers)} at http://{address}, documentation at /docs", flush=True)
        if token is None and not address.startswith(("127.", "[::1]")):
            print("no token: whoever reaches this address can use it; set one with --token-file", flush=True)
        if open:  # in a thread: a browser in a terminal ends when its user leaves it
            threading.Thread(target=show, args=[f"http://{address}/"], daemon=True).start()
        try:
            with settled_heap():
                server.run(sockets=[listener])
        except KeyboardInterrupt:
            print("closed", flush=True)


def show(address: str) -> None:
    """Open the page in the browser of this machine, or say that there is none."""
    reachable = address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    if not webbrowser.open(reachable):
        print(f"no browser can be opened from here; open {reachable} in one", file=sys.stderr, flush=True)


@contextlib.contextmanager
def said_after(seconds: float, line: str) -> Iterator[None]:
    """Say this on stderr if what is done meanwhile takes longer."""
    timer = threading.Timer(seconds, print, [line], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def settled_heap() -> Iterator[None]:
    """While open, garbage is looked for only among objects made since: going through all of PyTorch takes a tenth of a second,
    in which no frame is sent."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def use_cores(device: torch.device, workers: int | None, threads: int | None) -> int:
    """Divide the cores among the workers of a model; gives how many there are.

    The threads of an operation wait for the slowest of them, and those of a small network do so every few microseconds: where
    one has to share its core with the server's own work or with clients, all stand still. Workers do not wait for each other.

    Args:
        device: where pictures are computed.
        workers: batches of a model drawn at a time; by default two on a CPU with several cores, otherwise one.
        threads: cores for each of them; by default its share of all, or of OMP_NUM_THREADS.

    Raises:
        UserError: for less than one.
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"pictures drawn by {value} {name}; expected at least 1; change --{name}")
    cores = torch.get_num_threads()
    if workers is None:
        workers = 2 if device.type == "cpu" and cores > 1 else 1
    torch.set_num_threads(threads or max(1, cores // workers))
    return workers


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to this address. Raises a UserError when there is no such address, or it is taken."""
    if not 0 <= port < 2**16:
        raise UserError(f"cannot listen at port {port}; expected a number from 0 to 65535; change --port")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:  # the latter of a name that cannot be one
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot listen at {host}, port {port} ({reason}); expected an address of this machine and a port that is free; "
            "change --host or --port"
        ) from None


def read_token(file: Path | None) -> str | None:
    """The token of a file, or of the variable TRIGFLOW_TOKEN, or None. Raises a UserError when the file cannot be read, or the
    token is none."""
    if file is None:
        token, where = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
        if token is None:
            return None
    else:
        where = f"'{file}'"
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise UserError(f"the token in {where} cannot be read ({error}); expected a text file; check the path") from None
    check_token(token, f"the token in {where}")
    return token


def _shown(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
