"""The command `trigflow`: parses, calls, prints. Everything it does can be done from Python in as many lines."""

import contextlib
import dataclasses
import functools
import gc
import io
import itertools
import operator
import os
import select
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro import MISSING, MISSING_NONPROP
from tyro.conf import subcommand

from trigflow.cli.commands import COMMANDS, Command
from trigflow.cli.evaluation import Evaluate, Reference
from trigflow.cli.lab import Demo
from trigflow.cli.models import Sample
from trigflow.cli.training import Convert, Distill, Train
from trigflow.lab.recipes import RUNS, preset, recipe_for
from trigflow.objectives import as_kind
from trigflow.plugins import load_plugin
from trigflow.runtime.distributed import launched, process_group, rank
from trigflow.runtime.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED, UserError, shortened
from trigflow.runtime.files import read_json
from trigflow.runtime.interrupt import Terminated, terminable
from trigflow.runtime.machine import resolve_device
from trigflow.tangent import TangentError
from trigflow.training.config import ParallelConfig, RunConfig, from_dict
from trigflow.version import __version__

ABOUT = (
    "Turn any diffusion or flow model into one that draws in one or two steps. Every command takes --plugin FILE: a Python "
    "file that adds an objective, codec, network, data or preset. --version says which one this is."
)


def main(args: list[str] | None = None, commands: Mapping[str, type[Command]] = COMMANDS, prog: str = "trigflow") -> None:
    """Entry point: exit code 0; 1 for what the doctor found; 2 for input that cannot be used (one line on stderr); 130 after
    Ctrl-C; and of commands that train, 143 after SIGTERM.

    Args:
        args: the command line; by default that of this process.
        commands: by name; one alone is not named on the command line.
        prog: what is typed before it.
    """
    if args is None:
        gc.freeze()  # nothing that was imported will be garbage
    given = list(sys.argv[1:] if args is None else args)
    process = ""
    try:
        command = _parse(given, commands, prog)
        with contextlib.ExitStack() as stack:
            if isinstance(command, Convert | Demo | Distill | Train):
                stack.enter_context(terminable())
            if launched() > 1:
                stack.enter_context(_joined(command))
                process = f" in process {rank()}" if rank() else ""
            if not getattr(command, "dry", False):
                resolve_device(*_device(command))  # what is wrong with it is said before anything is read
            command.run()
    except (UserError, TangentError) as error:
        print(f"trigflow: error{process}: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except BrokenPipeError:
        if not _unread():
            raise
    except OSError as error:
        if error.filename is None:
            raise
        reason = f"'{shortened(error.filename)}' cannot be used ({error.strerror})"
        print(f"trigflow: error{process}: {reason}; expected a path that can be; check it", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Terminated)
        what = "terminated" if terminated else "interrupted"
        print(f"trigflow: {what}; what was saved can be resumed", file=sys.stderr)
        sys.exit(EXIT_TERMINATED if terminated else EXIT_INTERRUPTED)
    finally:
        try:
            print(end="", flush=True)
        except OSError as error:  # what is left is read by nobody
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(error, BrokenPipeError):
                print(
                    f"trigflow: error: the output cannot be written ({error.strerror}); expected room for it", file=sys.stderr
                )
                sys.exit(EXIT_FAILED)


def _unread() -> bool:
    """Whether whoever read what is printed has had enough, as with `| head`."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return bool(output.poll(0))


def _device(command: Command) -> tuple[str, str]:
    """The device that a command is told, and the option that says it."""
    if isinstance(command, Distill | Train):
        return command.loop.device, "--loop.device"
    return getattr(command, "device", "auto"), "--device"


@contextlib.contextmanager
def _joined(command: Command) -> Iterator[None]:
    """A command in one of the processes that torchrun started; only the first one prints."""
    if not isinstance(command, Distill | Evaluate | Reference | Sample | Train):
        raise UserError(
            f"{type(command).__name__.lower()} in {launched()} processes; expected one process, or a command that several can "
            "work on: train, distill, sample, evaluate or reference; start it without torchrun"
        )
    settings = command.parallel if isinstance(command, Distill | Train) else ParallelConfig()
    with process_group(_device(command)[0], settings.timeout), contextlib.ExitStack() as stack:
        if rank():
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


def _parse(given: list[str], known: Mapping[str, type[Command]] = COMMANDS, prog: str = "trigflow") -> Command:
    """The command with its options. The defaults of train and distill come from a preset, which is looked up first."""
    if given[:1] == ["--version"]:
        print(f"trigflow {__version__}")
        sys.exit()
    given = _with_resume(_with_plugins(given))
    defaults: dict[str, Any] = {}
    if given[:1] == ["train"]:
        name = _preset(given, _option(given, "--data", _option(given, "--data.source", "digits")))
        recipe = _of_kind(given, preset(name, "train"))
        defaults["train"] = Train(
            MISSING, name, data=recipe.data, process=recipe.process, network=recipe.network,
            objective=recipe.objective, optimizer=recipe.optimizer, ema=recipe.ema, loop=recipe.loop,
        )  # fmt: skip
    elif given[:1] == ["distill"]:
        name = _preset(given, _trained_on(given))
        recipe = _of_kind(given, preset(name, "distill"))
        defaults["distill"] = Distill(
            MISSING, MISSING, name, objective=recipe.objective, optimizer=recipe.optimizer, ema=recipe.ema, loop=recipe.loop,
            dropout=recipe.network.dropout if name in RUNS else None,
            dropout_up_to=getattr(recipe.network, "dropout_up_to", None) if name in RUNS else None,
        )  # fmt: skip
    commands: Any = [
        Annotated[command, subcommand(name, default=defaults.get(name, MISSING_NONPROP))] for name, command in known.items()
    ]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            command: Command = tyro.cli(
                functools.reduce(operator.or_, commands), prog=prog, description=ABOUT if len(known) > 1 else None, args=given
            )
    except SystemExit as stop:
        if stop.code == 2:
            typed = " ".join([prog, *(word for word in given[:1] if word in known)])
            if defaults and any(word.startswith("--objective.") for word in given):
                typed += f" --objective.kind {recipe.objective.kind}"  # the objective that these settings have to be of
            raise UserError(_one_line(printed.getvalue(), typed)) from None
        raise
    return command


def _one_line(box: str, command: str) -> str:
    """The error that tyro draws as a box of several lines, in one: its text between the first rules."""
    title, *lines = [line.strip("╭╮╰╯│─ ") for line in box.splitlines()]
    inner = itertools.dropwhile(operator.not_, (line if line.strip("-") else "" for line in lines))
    text = f"{title.lower()}: {' '.join(itertools.takewhile(bool, inner)).removeprefix(title + ': ')}"
    return f"{text.rstrip('.:')}; expected options as in '{command} --help'; correct the command line"


def _preset(given: list[str], data: str) -> str:
    """The preset named on the command line, or the one that suits the data."""
    named = _option(given, "--preset", "auto")
    return recipe_for(data) if named == "auto" else named


def _with_plugins(given: list[str]) -> list[str]:
    """The arguments without `--plugin FILE`, after these files have been imported."""
    rest: list[str] = []
    words = iter(given)
    for word in words:
        name, sign, value = word.partition("=")
        if name != "--plugin":
            rest.append(word)
            continue
        file = value if sign else next(words, "")
        if not file:
            raise UserError("--plugin without a file; expected a Python file; pass --plugin my_objective.py")
        load_plugin(file)
    return rest


def _of_kind(given: list[str], recipe: RunConfig) -> RunConfig:
    """The settings of a preset with the objective that `--objective.kind` names, whose own settings are then options.

    Raises:
        UserError: for an unknown kind, or settings as earlier versions spelled them; the message says how they are spelled now.
    """
    for word in given:
        flag = word.split("=")[0].replace("_", "-")
        if flag.startswith("--objective.meanflow."):
            name = flag.removeprefix("--objective.meanflow.")
            now = {"mean": "proposal.mean (of log sigma, which is log 0.5 lower)", "std": "proposal.std", "equal": "anchor"}
            raise UserError(
                f"{flag} is now --objective.{now.get(name, name)}; expected it by that name; correct the command line"
            )
    kind = _option(given, "--objective.kind", recipe.objective.kind)
    return dataclasses.replace(recipe, objective=as_kind(recipe.objective, kind))


def _with_resume(given: list[str]) -> list[str]:
    """The arguments of train or distill, in which `--resume` may stand alone, with a value for it."""
    if given[:1] not in (["train"], ["distill"]):
        return given
    values = ("yes", "no", "auto")
    bare = {i for i, word in enumerate(given) if word == "--resume" and (i + 1 == len(given) or given[i + 1] not in values)}
    return ["--resume=yes" if i in bare else word for i, word in enumerate(given)]


def _option(given: list[str], name: str, default: str) -> str:
    """Value of `name VALUE` or `name=VALUE` among the arguments."""
    for i, word in enumerate(given):
        if word == name and i + 1 < len(given):
            return given[i + 1]
        if word.startswith(f"{name}="):
            return word.split("=", 1)[1]
    return default


def _trained_on(given: list[str]) -> str:
    """Data source of the first run folder among the arguments: that of the teacher."""
    for word in given:
        config = Path(word) / "config.json"
        if config.is_file():
            return from_dict(read_json(config, "configuration")).data.source
        with contextlib.suppress(AttributeError, KeyError, TypeError):  # what is no model is said when it is loaded
            if (model := Path(word) / "model.json").is_file() and read_json(model, "model")["network"].get("base"):
                return "adapters"
    return "digits"
