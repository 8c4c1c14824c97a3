"""Starts Python programs for `programs.py` by forking itself, having imported what takes long; its argument listens.

It computes nothing, so that no thread holds a lock of PyTorch or Python, and a fork is sound. A program finds the process as a
fresh interpreter would be, but for modules that are imported already: its own `sys.argv`, environment, folder, files, signals,
random numbers and `__main__`.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
import types
from typing import Any, NoReturn

EVERY = ("numpy", "sklearn.datasets", "torch", "torch._dynamo", "trigflow.cli", "trigflow.training.trainer")
"""What nearly every program imports; `torch._dynamo` with its first optimizer."""


def program(arguments: list[str]) -> None:
    """What `python ARGUMENTS` runs: -c CODE, -m MODULE or a file."""
    first = arguments[0]
    if first == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(first)))
        runpy.run_path(first, run_name="__main__")


def fork(arguments: list[str], files: list[int]) -> int:
    """`python ARGUMENTS` in a session of its own, otherwise as this process is; gives its number.

    Args:
        arguments: of it.
        files: its standard input and its outputs; it has no others.
    """
    here = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "session": True}
    child = os.fork()
    if not child:
        run(here, files)
    return child


def run(request: dict[str, Any], files: list[int]) -> NoReturn:
    """Be the program to its end; in a child."""
    code: Any = 1
    try:
        if request["session"]:
            os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        atexit._clear()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        sys.path[:0] = [path for path in paths if path not in sys.path]
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        if "torch" in sys.modules and "OMP_NUM_THREADS" in os.environ:
            sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        program(request["arguments"])
        code = 0
    except SystemExit as leave:
        code = leave.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((code or 0) & 0xFF)


def serve(listening: socket.socket) -> None:
    """Fork at each request, say its number, and how it ended when it has; until nobody can ask any more."""
    waiting, asking = selectors.DefaultSelector(), 0
    waiting.register(listening, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is listening:
                waiting.register(listening.accept()[0], selectors.EVENT_READ)
                asking += 1
                continue
            if not isinstance(key.fileobj, socket.socket):  # a program has ended
                child, told = key.data
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                with contextlib.suppress(OSError):
                    os.write(told, f"{code}\n".encode())
                waiting.unregister(key.fileobj)
                os.close(key.fd)
                os.close(told)
                continue
            requests = key.fileobj
            size, files, _, _ = socket.recv_fds(requests, 8, 4)
            if not size:
                waiting.unregister(requests)
                requests.close()
                asking -= 1
                continue
            left, parts = int.from_bytes(size, "big"), []
            while left:
                parts.append(requests.recv(left))
                left -= len(parts[-1])
            request = json.loads(b"".join(parts))
            for name in request["imports"]:
                importlib.import_module(name)
            told = files.pop()
            gc.freeze()  # garbage is not looked for among modules, in memory that would be copied for it
            child = os.fork()
            if not child:
                run(request, files)
            for file in files:
                os.close(file)
            os.write(told, f"{child}\n".encode())
            waiting.register(os.pidfd_open(child), selectors.EVENT_READ, (child, told))
        if not asking and all(key.fileobj is not listening for key, _ in waiting.select(0)):
            return


if __name__ == "__main__":
    try:
        for module in EVERY:
            importlib.import_module(module)
        serve(socket.socket(fileno=int(sys.argv[1])))
    except BaseException:
        traceback.print_exc()
        raise
