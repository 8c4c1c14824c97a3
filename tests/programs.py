"""Programs in processes of their own, without the seconds that each would take to import PyTorch.

They are forked from a server that has imported it, see `program_server.py`; where it cannot be, they are started as usual.
`programs.py ARGUMENTS` is a process that stands for `python ARGUMENTS` where something else than a test starts it, as torchrun
does: it passes SIGTERM on, and ends as the program does.
Tests of what a program imports, of its memory, or of what is settled while importing start an interpreter of their own.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

Output = IO[Any] | int | None
"""As for `subprocess.Popen`."""


@functools.cache
def server() -> socket.socket:
    """A connection to the server of this run of the tests, which whoever needs it first starts and the last one ends."""
    run_id = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    name = "\0" + os.environ.setdefault("PROGRAM_SERVER", f"trigflow-programs-{run_id}")
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(name)
        except ConnectionRefusedError:
            connection.close()
        else:
            atexit.register(connection.close)
            return connection
        with socket.socket(socket.AF_UNIX) as listening:
            try:
                listening.bind(name)
            except OSError:  # another process is about to listen there
                continue
            listening.listen()
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("program_server.py")), str(listening.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[listening.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C reaches the tests, which end programs as they see fit
            )
            atexit.register(process.wait)  # when its connection has been closed


class Program:
    """What `subprocess.Popen` of `python *arguments` is, as far as tests need it.

    Args:
        arguments: as after `python`: -c CODE, -m MODULE or a file, and its own.
        stdout: a file, `subprocess.PIPE`, or None for that of the tests.
        stderr: the same, or `subprocess.STDOUT`.
        environment: in full; by default the present one. Either way with OMP_NUM_THREADS=1 where it does not say.
        cwd: its folder.
        session: whether it leads a session, and so a group of processes, of its own.
        imports: modules that are imported before it starts, and only once for all programs.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        stdout: Output = None,
        stderr: Output = None,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        session: bool = False,
        imports: Sequence[str] = (),
    ) -> None:
        self.returncode: int | None = None
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        with contextlib.ExitStack() as stack:

            def file(place: Output, usual: int) -> tuple[int, IO[str] | None]:
                if place is None:
                    return usual, None
                if place == subprocess.PIPE:
                    ours, theirs = os.pipe()
                    stack.callback(os.close, theirs)
                    return theirs, open(ours, encoding="utf-8")
                return place if isinstance(place, int) else place.fileno(), None

            nothing = os.open(os.devnull, os.O_RDONLY)
            stack.callback(os.close, nothing)
            out, self.stdout = file(stdout, 1)
            err, self.stderr = (out, None) if stderr == subprocess.STDOUT else file(stderr, 2)
            self._told, told = os.pipe()
            stack.callback(os.close, told)
            request = json.dumps(
                {
                    "arguments": [str(argument) for argument in arguments],
                    "environment": {"OMP_NUM_THREADS": "1", **(os.environ if environment is None else environment)},
                    "folder": str(cwd or Path.cwd()),
                    "session": session,
                    "imports": list(imports),
                }
            ).encode()
            socket.send_fds(server(), [len(request).to_bytes(8, "big")], [nothing, out, err, told])
            server().sendall(request)
        self.pid = int(self._line())

    def _line(self, timeout: float | None = None) -> bytes:
        """The next line of the server on this program, none after its time."""
        if not select.select([self._told], [], [], timeout)[0]:
            return b""
        found = b""
        while not found.endswith(b"\n"):
            byte = os.read(self._told, 1)
            assert byte, "the server of programs has ended"
            found += byte
        return found

    def poll(self, timeout: float | None = 0) -> int | None:
        if self.returncode is None and (line := self._line(timeout)):
            self.returncode = int(line)
            os.close(self._told)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        code = self.poll(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("program", timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What is left to read of its output, at its end."""
        end = None if timeout is None else time.monotonic() + timeout
        said = {"stdout": "", "stderr": ""}

        def read(name: str, file: IO[str]) -> None:
            with file:
                said[name] = file.read()

        files = [(name, file) for name in said if (file := getattr(self, name)) is not None]
        threads = [threading.Thread(target=read, args=pair, daemon=True) for pair in files]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
            if thread.is_alive():
                raise subprocess.TimeoutExpired("program", timeout or 0)
        self.wait(None if end is None else max(0.0, end - time.monotonic()))
        return said["stdout"], said["stderr"]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    arguments: Sequence[object],
    *,
    stdout: Output = None,
    stderr: Output = None,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    session: bool = False,
    imports: Sequence[str] = (),
) -> Program | subprocess.Popen[str]:
    """A program that runs; arguments as of `Program`."""
    if sys.platform == "linux":
        return Program(
            arguments, stdout=stdout, stderr=stderr, environment=environment, cwd=cwd, session=session, imports=imports
        )
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        text=True,
        env={"OMP_NUM_THREADS": "1", **(os.environ if environment is None else environment)},
        cwd=cwd,
        start_new_session=session,
    )


def run(
    arguments: Sequence[object], *, timeout: float = 300, check: bool = False, **settings: Any
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` is to `subprocess.Popen`, with both outputs captured."""
    process = start(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    command = ["python", *map(str, arguments)]
    done = subprocess.CompletedProcess(command, process.wait(), out, err)
    if check:
        done.check_returncode()
    return done


if __name__ == "__main__":
    program = Program(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda number, _: program.send_signal(number))
    sys.exit(program.wait() & 0xFF)
