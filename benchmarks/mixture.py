"""Every choice of the flow map on a mixture in the plane, beside sCD: after how long each is as good, on paired seeds.

    python benchmarks/mixture.py                            # everything, with one thread; half an hour on one core
    python benchmarks/mixture.py --equal --json equal.json  # as many iterations for all
    python benchmarks/mixture.py --seeds 1 --add            # another seed, or a choice, beside those measured before
    python benchmarks/mixture.py --choices self --seeds 0   # some of it, beside sCD

Trains a small network as the teacher, and from its weights each student, with the settings that the library has for its choice.
What belongs to data and run is the same for all: times, a tangent warmup over the first fifth, and the constant c of
normalized tangents, which is the published 0.1 for as few dimensions as these are. Some choices are trained for longer than
sCD: any jumps, most of all where long ones are learned from short ones (Lagrangian, semigroup) or the velocity beside (self),
and rollouts. The learning rate is the better one of two for students of jumps to 0, and for those of any jump; it was chosen
on seed 100, as were the library's settings. How much longer a choice is trained was chosen there too, and doubled or
quadrupled for semigroup, self with Lagrangian and semi-continuous after seeds 0 to 2 had been seen. Each seed has a teacher of
its own; its students see the same data and are drawn from the same noise.

The distance is the energy distance to the mixture, `2 E|x - a| - E|a - a'| - E|x - x'|`. All that concerns the mixture's x is
in closed form, only the samples a are drawn: unbiased, so 0 for samples of the mixture and sometimes negative. `noise` is its
standard deviation over sets of samples of the mixture itself. sCD is trained twice on each seed, with other draws, because
trainings differ more than seeds do: now and then one ends far away. So medians are compared. A choice is `as_good` when its
median over seeds is at most 1.1 times that of all trainings of sCD, plus a tolerance of three times the noise.
"""

from __future__ import annotations

import argparse
import copy
import math
import shlex
import sys
import time
from pathlib import Path
from statistics import median, stdev
from typing import Any

import torch
from torch import Tensor, nn

from trigflow.networks import MLP, ConditioningConfig, MLPConfig
from trigflow.objectives import AdaptiveWeight, Distribution, Given, Objective, StepDraws, TangentConfig, objective_of
from trigflow.process import Proposal, TrigFlow
from trigflow.runtime.files import read_json, write_json
from trigflow.runtime.machine import machine
from trigflow.samplers import consistency_times, flow_map_sample, heun, meanflow_times, network_velocity, sigma_grid

PROCESS = TrigFlow(sigma_data=0.5)
MEANS = torch.tensor([[0.6, 0.3], [-0.3, 0.6], [-0.5, -0.4], [0.35, -0.55]])
SPREAD = 0.15
TIMES = Proposal(-0.8, 1.4)
BATCH = 256
RATES = {"zero": 5e-4, "any": 1e-3}
"""By where jumps end."""
BAR = 1.1
SCD = {"kind": "scd"}
CONSTANT = 0.1 * math.sqrt(2 / 3072)
"""c of `g / (||g|| + c)`: a norm grows with the root of the dimensions, and the published 0.1 is for CIFAR-10's 3,072. With 0.1
here c is larger than most norms: w(t) is then learned of errors that normalizing does not even out, is largest where they are
smallest, and trainings of sCD end far away (results/mixture-constant.json)."""
REPEATS = 2
"""Trainings of sCD on each seed."""
STEPS = (1, 2)
TEACHER_STEPS = 32

CHOICES: dict[str, dict[str, Any]] = {
    "any jumps": {"kind": "flow-map"},
    "Lagrangian": {"kind": "flow-map", "residual": "lagrangian"},
    "semigroup": {"kind": "flow-map", "residual": "semigroup", "anchor": 0.5},
    "self": {"kind": "flow-map", "velocity": "self", "anchor": 0.5},
    "self, Lagrangian": {"kind": "flow-map", "velocity": "self", "anchor": 0.5, "residual": "lagrangian"},
    "self, semigroup": {"kind": "flow-map", "velocity": "self", "anchor": 0.5, "residual": "semigroup"},
    "semi-continuous": {"kind": "scd", "semi_step": 1e-3},
    "rollouts": {"kind": "scd-vsd", "rollouts": 4, "fake_weighting": "sine", "fake_lr": 1e-3, "lambda_vsd": 0.03},
}
"""The settings that make a choice, all others being the library's."""
OTHERS: dict[str, dict[str, Any]] = {
    "sCD, c = 0.1": {"kind": "scd", "c": 0.1},
    "rollouts, slow fake score": CHOICES["rollouts"] | {"fake_lr": None, "lambda_vsd": 0.1},
    "rollouts, fast fake score": CHOICES["rollouts"] | {"lambda_vsd": 0.1},
}
"""Measured where they are named: no choices, but why there is CONSTANT (`--choices "sCD, c = 0.1" --iterations 6000`), and why
the fake score learns faster than the student."""
LONGER = {
    "any jumps": 4, "Lagrangian": 8, "semigroup": 16, "self": 8, "self, Lagrangian": 16, "self, semigroup": 16,
    "semi-continuous": 4, "rollouts": 4,
}  # fmt: skip
"""How many times as long as sCD a choice is trained, but with --equal."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The mixture ---------------------------------------------------------------------------------------------------------


def data(n: int, random: torch.Generator) -> Tensor:
    """Samples `(n, 2)` of four Gaussians of equal weight."""
    component = torch.randint(len(MEANS), (n,), generator=random)
    return MEANS[component] + SPREAD * torch.randn(n, 2, generator=random)


def mean_length(distance: Tensor, spread: float) -> Tensor:
    """`E|d + spread n|` for n normal in the plane and `|d| = distance`: the mean of the Rice distribution."""
    half = distance.square() / (4 * spread**2)
    bessel = (1 + 2 * half) * torch.special.i0e(half) + 2 * half * torch.special.i1e(half)
    return spread * math.sqrt(math.pi / 2) * bessel


def energy_distance(samples: Tensor) -> float:
    """Of samples `(n, 2)` to the mixture."""
    n, means = len(samples), MEANS.double()
    across = mean_length(torch.cdist(samples.double(), means), SPREAD).mean()
    within = torch.zeros((), dtype=torch.float64)
    for part in samples.split(500):
        squared = sum((part[:, None, i] - samples[None, :, i]).square() for i in range(2))
        within += torch.as_tensor(squared).sqrt().sum(dtype=torch.float64)
    of_mixture = mean_length(torch.cdist(means, means), SPREAD * math.sqrt(2)).mean()
    return float(2 * across - within / (n * (n - 1)) - of_mixture)


# Training and drawing ------------------------------------------------------------------------------------------------


class Learner:
    """A network and what is learned beside it, under Adam whose rate is constant for the first half and then falls to zero."""

    def __init__(self, network: MLP, iterations: int, rate: float) -> None:
        self.network, self.weight, self.vsd_weight = network, AdaptiveWeight(PROCESS), AdaptiveWeight(PROCESS)
        modules: list[nn.Module] = [network, self.weight, self.vsd_weight]
        self.adam = torch.optim.Adam([p for m in modules for p in m.parameters()], lr=rate, betas=(0.9, 0.99))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, lambda i: min(1.0, 2 * (1 - i / iterations)))

    def descend(self, value: Tensor) -> None:
        self.adam.zero_grad()
        value.backward()
        self.adam.step()
        self.schedule.step()


def network(told: tuple[str, ...] = ()) -> MLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLP(MLPConfig(width=64, depth=2, conditioning=ConditioningConfig(width=16, takes=told)))


def train(objective: Objective, seed: int, iterations: int, rate: float, teacher: MLP | None = None) -> MLP:
    """A network trained from the teacher's weights, or from its own."""
    net, velocity, fake = network(objective.told), None, None
    if teacher is not None:
        net.load_state_dict(teacher.state_dict(), strict=False)
        velocity = network_velocity(teacher, PROCESS)
        if isinstance(objective, Distribution):
            fake = Learner(copy.deepcopy(teacher).requires_grad_(True), iterations, objective.fake_lr or rate)
    student, of_data, of_objective = Learner(net, iterations, rate), seeded(seed), seeded(seed + 1_000_000)

    def noise() -> Tensor:
        return PROCESS.sample_noise(torch.empty(BATCH, 2), of_objective)

    for i in range(iterations):
        x0 = data(BATCH, of_data)
        batch = {"x0": x0, "noise": PROCESS.sample_noise(x0, of_data)}
        draws = StepDraws(BATCH, PROCESS, of_objective, i, lambda values: values, noise)
        batch |= objective.draw(draws) | objective.draw_more(draws)
        weight = student.weight if objective.learns_weight else None
        value = objective.loss(Given(net, PROCESS, batch, {}, i, iterations, velocity, weight)).value
        if fake is not None and isinstance(objective, Distribution):
            given = Given(net, PROCESS, batch, {}, i, iterations, velocity, student.vsd_weight)
            sample = objective.generate(given)
            vsd = objective.distribution_loss(sample, given, network_velocity(fake.network, PROCESS))
            value = value + objective.lambda_vsd * vsd.value
            judged = Given(fake.network, PROCESS, batch, {}, i, iterations, None, fake.weight)
            fake.descend(objective.fake_loss(sample.detach(), judged).value)
        student.descend(value)
    return net.eval().requires_grad_(False)


def draw(net: MLP, objective: Objective, steps: int, seed: int, count: int) -> Tensor:
    """Samples `(count, 2)` in so many evaluations, as the objective has its students drawn from."""
    random, sampling = seeded(seed + 2_000_000), objective.sampling
    noise = PROCESS.sample_noise(torch.empty(count, 2), random)
    velocity = network_velocity(net, PROCESS)
    if sampling.kind == "ode":
        return heun(velocity, noise, sigma_grid(PROCESS, steps))
    times = (meanflow_times if sampling.jumps == "any" else consistency_times)(PROCESS, steps)
    return flow_map_sample(velocity, PROCESS, noise, times, gamma=sampling.noise, generator=random)


def measure(settings: dict[str, Any], seed: int, draws: int, teacher: MLP, iterations: int, count: int) -> dict[str, Any]:
    """Distances by number of steps, and seconds of training, of one student; `draws` is the seed of what it is trained on."""
    own = {"c": CONSTANT, **settings}
    objective = objective_of(proposal=TIMES, tangent=TangentConfig(warmup=iterations // 5, c=own.pop("c")), **own)
    began = time.perf_counter()
    net = train(objective, draws, iterations, RATES[objective.sampling.jumps], teacher)
    seconds = time.perf_counter() - began
    distance = {str(n): energy_distance(draw(net, objective, n, seed, count)) for n in STEPS}
    return {"distance": distance, "iterations": iterations, "seconds": seconds}


def measure_seed(seed: int, choices: list[str], iterations: int, count: int, equal: bool) -> dict[str, Any]:
    """The distance of the teacher, and what is measured of each student."""
    plain = objective_of("diffusion", proposal=TIMES)
    teacher = train(plain, seed, 4 * iterations // 3, 2e-3)
    students: dict[str, Any] = {}
    known = CHOICES | OTHERS
    runs = [("sCD", SCD, seed + 1000 * k) for k in range(REPEATS)] + [(name, known[name], seed) for name in choices]
    for name, settings, draws in runs:
        longer = 1 if equal else LONGER.get(name, 1)
        found = measure(settings, seed, draws, teacher, longer * iterations, count)
        students.setdefault(name, []).append(found)
        said = ", ".join(f"{distance:.2e}" for distance in found["distance"].values())
        print(f"seed {seed}, {name}: {said}, {found['seconds']:.0f} s", flush=True)
    return {"teacher": energy_distance(draw(teacher, plain, TEACHER_STEPS, seed, count)), "students": students}


# The whole -----------------------------------------------------------------------------------------------------------


def summary(by_seed: dict[str, Any], noise: float) -> dict[str, Any]:
    """By choice and steps: median distance, its ratio to sCD's, all distances, and whether it is as good as sCD."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for found in by_seed.values():
        for name, own in found["students"].items():
            runs.setdefault(name, []).extend(own)
    result: dict[str, Any] = {}
    for name, own in runs.items():
        result[name] = {"iterations": own[0]["iterations"], "seconds": median(run["seconds"] for run in own)}
        for steps in map(str, STEPS):
            each, scd = ([run["distance"][steps] for run in those] for those in (own, runs["sCD"]))
            result[name][steps] = {
                "distance": median(each),
                "ratio": median(each) / median(scd),
                "each": each,
                "as_good": median(each) <= BAR * median(scd) + 3 * noise,
            }
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--choices", nargs="+", choices=[*CHOICES, *OTHERS], default=list(CHOICES), metavar="CHOICE")
    parser.add_argument("--iterations", type=int, default=1500, help="of sCD")
    parser.add_argument("--equal", action="store_true", help="as many for all")
    parser.add_argument("--samples", type=int, default=20_000, help="samples behind each distance")
    parser.add_argument("--add", action="store_true", help="keep what the file has of other seeds and choices")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "mixture.json")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    command = shlex.join(["python", "benchmarks/mixture.py", *(sys.argv[1:] if arguments is None else arguments)])
    settings = {"iterations": args.iterations, "equal": args.equal, "samples": args.samples}
    before = read_json(args.json, "results") if args.add and args.json.is_file() else {"settings": settings, "by_seed": {}}
    if before["settings"] != settings:
        parser.error(f"{args.json} was measured with {before['settings']}; expected the same; leave out --add")
    by_seed, commands = before["by_seed"], [*([before["command"]] if "command" in before else []), command]
    for seed in args.seeds:
        found = measure_seed(seed, args.choices, args.iterations, args.samples, args.equal)
        kept = by_seed.get(str(seed), found)["students"]
        by_seed[str(seed)] = found | {"students": kept | found["students"]}
    noise = stdev(energy_distance(data(args.samples, seeded(3_000_000 + k))) for k in range(8))
    result = {
        "command": "; ".join(commands), "machine": machine(), "settings": settings, "bar": BAR, "noise": noise,
        "teacher": median(found["teacher"] for found in by_seed.values()), "summary": summary(by_seed, noise),
        "by_seed": by_seed,
    }  # fmt: skip
    write_json(args.json, result)
    for name, row in result["summary"].items():
        cells = "  ".join(
            f"{row[k]['distance']:9.2e} ({row[k]['ratio']:.2f}{'' if row[k]['as_good'] else ' *'})" for k in map(str, STEPS)
        )
        print(f"{name:28} {row['iterations']:6}  {cells}  {row['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
