"""Numbers that are none: in what a step computes, and in what a run keeps."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fault_cases.runs import ITERATIONS, Bench, Command, Trial, checkpoint_tensors, expect, newest, read
from trigflow.data.config import DataConfig
from trigflow.lab.recipes import preset
from trigflow.networks import ConditioningConfig, UNetConfig
from trigflow.objectives import as_kind
from trigflow.runtime.errors import EXIT_FAILED, UserError
from trigflow.runtime.files import read_tensors
from trigflow.tangent import Dual
from trigflow.training.config import EMAConfig, GuardConfig, LoopConfig, RunConfig
from trigflow.training.trainer import Trainer

FIRST, LAST = 6, 30
"""Steps between which the number goes wrong; there is a checkpoint before."""
PATIENCE = 3
"""`guard.patience` of these runs."""


class Poisoned(Trainer):
    """A trainer in which a number goes wrong.

    Attributes:
        at: the step in which it does.
        steps: for how many steps in a row, of those whose state is not put back.
        value: what the number becomes.
    """

    at = FIRST
    steps = 1
    value = math.nan
    done = 0

    def now(self) -> bool:
        """Whether the number is to be wrong in this step."""
        return self.iteration >= self.at and self.done < self.steps

    def step(self) -> Any:
        """One step, before which something that is kept may be spoilt."""
        spoils = self.now()
        if spoils:
            self.spoil()
        result = super().step()
        self.done += spoils
        return result

    def spoil(self) -> None:
        """Spoil what is kept; nothing by default."""


def in_output(trainer: Poisoned) -> None:
    """The output of the network, and with it the loss and its gradient."""
    trainer.network.register_forward_hook(lambda m, given, out: out * trainer.value if trainer.now() else None)


def in_gradient(trainer: Poisoned) -> None:
    """A single element of the gradient of a weight; the loss is finite."""

    def wrong(gradient: Tensor) -> Tensor | None:
        if not trainer.now():
            return None
        gradient = gradient.clone()
        gradient.view(-1)[0] = trainer.value
        return gradient

    trainer.parameters[-1].register_hook(wrong)


def in_tangent(trainer: Poisoned) -> None:
    """The tangent of the network's output; the output itself is right."""

    def wrong(module: Any, given: Any, out: Any) -> Any:
        return Dual(out.primal, out.tangent * trainer.value) if type(out) is Dual and trainer.now() else None

    trainer.network.register_forward_hook(wrong)


def in_state(trainer: Poisoned, entry: str) -> None:
    """A single element of the optimizer's state."""

    def spoil() -> None:
        states = [state[entry] for state in trainer.optimizer.state.values() if entry in state]
        states[len(states) // 2].view(-1)[0] = trainer.value

    trainer.spoil = spoil  # type: ignore[method-assign]


def in_average(trainer: Poisoned) -> None:
    """A single element of the average of the weights."""

    def spoil() -> None:
        next(trainer.ema.network.parameters()).view(-1)[0] = trainer.value

    trainer.spoil = spoil  # type: ignore[method-assign]


def in_weights(trainer: Poisoned) -> None:
    """A single weight."""

    def spoil() -> None:
        with torch.no_grad():
            trainer.parameters[0].view(-1)[0] = trainer.value

    trainer.spoil = spoil  # type: ignore[method-assign]


def poisons(bench: Bench) -> Iterator[Trial]:
    """NaN and infinity in every place, for one step; and in the gradient for several steps, and for good."""
    places: list[tuple[str, Callable[[Poisoned], None], tuple[str, ...]]] = [
        ("the loss", in_output, ("diffusion", "sct")),
        ("a gradient", in_gradient, ("diffusion", "sct")),
        ("the tangent", in_tangent, ("sct",)),
        ("Adam's first moment", functools.partial(in_state, entry="exp_avg"), ("diffusion", "sct")),
        ("Adam's second moment", functools.partial(in_state, entry="exp_avg_sq"), ("diffusion", "sct")),
        ("Muon's momentum", functools.partial(in_state, entry="momentum"), ("sct",)),
        ("the average", in_average, ("diffusion", "sct")),
        ("a weight", in_weights, ("diffusion", "sct")),
    ]
    for what, place, kinds in places:
        for kind in kinds:
            for value in (math.nan, math.inf):
                run = functools.partial(_poison, bench, what, kind, place, value, 1)
                yield Trial(f"{value} in {what}, {kind}", run)
    for steps in (PATIENCE - 1, PATIENCE, 4 * PATIENCE):
        run = functools.partial(_poison, bench, "a gradient", "diffusion", in_gradient, math.nan, steps)
        yield Trial(f"nan in a gradient, {steps} steps in a row", run)
    run = functools.partial(_poison, bench, "a gradient", "diffusion", in_gradient, math.nan, 10**9)
    yield Trial("nan in a gradient, in every step from then on", run)


def _poison(
    bench: Bench, what: str, kind: str, place: Callable[[Poisoned], None], value: float, steps: int, folder: Path
) -> dict[str, Any]:
    random, out = bench.random("numbers", what, kind, value, steps), folder / "run"
    at = random.randrange(FIRST, LAST)

    def train() -> None:
        torch.set_num_threads(1)
        trainer = Poisoned(config_of(bench, kind), out, progress=False)
        trainer.at, trainer.steps, trainer.value = at, steps, value
        place(trainer)
        trainer.run()
        (folder / "done.json").write_text(json.dumps({"steps": trainer.done, **trainer.guard.counts()}))

    command = Command((), folder / "train", call=reporting(train))
    if steps > 10 * ITERATIONS:
        said = command.ends_with_one_line()
        expect("gone back" in said, f"unclear: {said}")
        check_finite(checkpoint_tensors(newest(out)), "the last checkpoint")
        return {"gave_up": 1}
    command.ends_well()
    done = read(folder / "done.json")
    expect(done["steps"] == steps, f"wrong in {done['steps']} steps instead of {steps}")
    expect(done["skipped"] + done["rollbacks"] > 0, f"not noticed: {done}")
    expect(newest(out).name == f"{ITERATIONS:08d}", f"ended at iteration {newest(out).name}")
    check_finite(checkpoint_tensors(newest(out)), "the last checkpoint")
    check_finite(read_tensors(out / "network.safetensors", "network"), "the model")
    for path in (out / "ema").glob("*.safetensors"):
        check_finite(read_tensors(path, "snapshot"), f"snapshot {path.name}")
    return {"skipped": done["skipped"], "rollbacks": done["rollbacks"]}


def reporting(function: Callable[[], None]) -> Callable[[], None]:
    """The function, whose mistakes of a user end the process as on the command line."""

    def run() -> None:
        try:
            function()
        except UserError as error:
            print(f"trigflow: error: {error}", file=sys.stderr)
            sys.exit(EXIT_FAILED)

    return run


def config_of(bench: Bench, kind: str) -> RunConfig:
    """A teacher with Adam, or sCT with Muon."""
    config = preset("digits", "train")
    muon = kind == "sct"
    return dataclasses.replace(
        config,
        data=DataConfig(source=str(bench.data)),
        network=UNetConfig(patch=2, width=32 if muon else 8, mult=(1, 2), blocks=1, conditioning=ConditioningConfig(width=8)),
        objective=as_kind(config.objective, kind),
        optimizer=dataclasses.replace(config.optimizer, name="muon" if muon else "adam"),
        ema=EMAConfig(snapshot_every=20),
        loop=LoopConfig(iterations=ITERATIONS, batch_size=16, log_every=4, sample_every=0, checkpoint_every=4, device="cpu"),
        guard=GuardConfig(patience=PATIENCE),
    )


def check_finite(tensors: dict[str, Tensor], what: str) -> None:
    """Raise `Lost` unless all numbers are finite."""
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    expect(not bad, f"{what} has {len(bad)} tensors that are not finite, first {bad[:1]}")
