"""One process, two and four: the same losses, weights and files, however weights are laid out."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from training.distributed_cases import FSDP, make_trainer, run_case
from training.shared import free_ports, made_once, run_group
from training.tiny import TWO_LEVELS, tiny_config, tiny_trainer, untrained_teacher
from trigflow.codecs import Latents
from trigflow.codecs.pictures import make_grid
from trigflow.data import LatentDataset
from trigflow.models.model import load
from trigflow.networks import build
from trigflow.runtime.distributed import launched
from trigflow.runtime.errors import UserError
from trigflow.training.batch import Batches
from trigflow.training.checkpoint import list_checkpoints, open_checkpoint
from trigflow.training.log import read_metrics
from trigflow.training.parallel import Share, blocks_of

needs_gloo = pytest.mark.skipif(
    sys.platform != "linux" or not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)

FEW = {"loop.iterations": 5}
COMPILED = {"loop.compile": "on"}

TWO: list[tuple[str, str, dict[str, Any]]] = [
    ("teacher", "teacher", FEW),
    ("sct", "sct", FEW),
    ("scd", "scd", {}),
    ("teacher, fsdp", "teacher", FSDP | FEW),
    ("sct, fsdp", "sct", FSDP | FEW),
    ("scd, fsdp", "scd", FSDP | FEW),
    ("sct, compiled", "sct", FEW | COMPILED),
    ("sct, fsdp, compiled", "sct", FEW | FSDP | COMPILED),
    ("vsd", "vsd", {}),
    ("vsd, fsdp", "vsd, recomputed", FSDP | {"parallel.reshard": False}),
    ("muon", "muon", {}),
    ("muon, fsdp", "muon", FSDP),
    ("edm2, fsdp", "edm2", FSDP),
    ("guided, fsdp", "guided", FSDP),
    ("bf16, fsdp", "gathered in bf16", FSDP),
    ("instruments", "instruments", {}),
    ("poisoned, fsdp", "poisoned", FSDP),
    ("stopped", "stopped", {}),
]
FOUR: list[tuple[str, str, dict[str, Any]]] = [
    ("teacher, four", "teacher", FEW),
    ("sct, four", "sct", FEW),
    ("scd, four", "scd", FEW),
    ("two shards", "two shards", FSDP),
]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of several processes, below one folder; what they printed is in `output`."""

    def make(folder: Path) -> None:
        for steps, processes, commands in ((TWO, 2, 5), (FOUR, 4, 0)):
            arguments = [json.dumps(steps), json.dumps(free_ports(1 + commands))]
            run_group(folder, "distributed_worker", arguments, processes, "0", 500)

    return made_once(tmp_path_factory, "distributed", make)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that gives the folder of a case, run by this process."""
    root, made = tmp_path_factory.mktemp("alone"), set()

    def folder(case: str) -> Path:
        if case not in made:
            made.add(case)
            run_case(case, root / case, FEW if case in ("teacher", "sct") else {}, stop=False)
        return root / case

    return folder


def series(folder: Path, name: str) -> Tensor:
    return torch.tensor([line[name] for line in read_metrics(folder)], dtype=torch.float64)


def weights(folder: Path) -> dict[str, Tensor]:
    """What the last checkpoint holds."""
    with open_checkpoint(list_checkpoints(folder)[-1]) as stored:
        return {name: stored.read(name) for name in stored.shapes}


def gap(folder: Path, other: Path) -> float:
    """Largest difference of any entry of the last checkpoints."""
    one, two = weights(folder), weights(other)
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in two.items()}
    return max((one[name].double() - two[name].double()).abs().max().item() for name in one if one[name].numel())


@needs_gloo
def test_compiled_runs_are_compiled(several: Path) -> None:
    """With all weights in each process the loss; with shards every block, with and without tangents."""
    assert "without compilation" not in (several / "output").read_text()
    first, second = ([int(n) for n in line.split()] for line in (several / "graphs").read_text().splitlines())
    assert first == [1, 0, 0]
    assert second[0] == second[2] == 0
    assert second[1] > 1


@needs_gloo
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *((kind, layout) for kind in ("teacher", "sct", "scd") for layout in ("", ", four", ", fsdp")),
        ("sct", ", compiled"),
        ("sct", ", fsdp, compiled"),
    ],
)
def test_losses_do_not_depend_on_the_number_of_processes(several: Path, alone: Any, kind: str, layout: str) -> None:
    here, there = alone(kind), several / f"{kind}{layout}"
    steps = len(read_metrics(there))
    assert steps == (20 if f"{kind}{layout}" == "scd" else 5), (several / "output").read_text()[-3000:]
    for name in ("loss", "weighted_loss", "grad_norm"):
        torch.testing.assert_close(series(there, name), series(here, name)[:steps], atol=1e-5, rtol=1e-5)


@needs_gloo
@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("vsd", "vsd"),
        ("vsd, fsdp", "vsd"),
        ("muon", "muon"),
        ("muon, fsdp", "muon"),
        ("edm2, fsdp", "edm2"),
        ("guided, fsdp", "guided"),
        ("two shards", "two shards"),
        ("instruments", "instruments"),
    ],
)
def test_every_part_of_training_works_with_several_processes(several: Path, alone: Any, name: str, case: str) -> None:
    """Accumulation, clipping, fake scores updated twice, snapshots, grids, recomputed blocks, scalars and matrices."""
    here, there = alone(case), several / name
    assert len(read_metrics(there)) == 3, (several / "output").read_text()[-3000:]
    for figure in ("loss", "grad_norm"):
        torch.testing.assert_close(series(there, figure), series(here, figure), atol=1e-5, rtol=1e-5)
    assert gap(there, here) < 1e-4
    files = [
        sorted(str(p.relative_to(run)) for p in run.rglob("*") if not p.name.startswith(("events", "state-", "state.s")))
        for run in (here, there)
    ]
    assert files[0] == files[1]


@needs_gloo
def test_weights_gathered_in_half_precision_are_those_of_autocast(several: Path, alone: Any) -> None:
    here, there = alone("bf16"), several / "bf16, fsdp"
    torch.testing.assert_close(series(there, "loss"), series(here, "loss"), atol=2e-3, rtol=2e-2)
    assert not torch.equal(series(there, "loss"), series(here, "loss"))
    assert all(value.dtype != torch.bfloat16 for value in weights(there).values())


@needs_gloo
def test_a_sample_that_is_not_finite_in_one_process_is_a_step_skipped_by_all(several: Path, alone: Any) -> None:
    here, there = alone("poisoned"), several / "poisoned, fsdp"
    skipped = [[line["skipped"] for line in read_metrics(run)] for run in (here, there)]
    assert skipped[0] == skipped[1] == [0, 0, 1, 1, 1]
    assert gap(there, here) < 1e-4


@needs_gloo
def test_ctrl_c_in_one_process_stops_all_after_the_same_step_and_one_process_goes_on(several: Path, alone: Any) -> None:
    there = several / "stopped"
    assert [path.name for path in list_checkpoints(there)] == ["00000003"]
    assert not (there / "model.json").exists()
    make_trainer("stopped", there, {}, resume=True).run()
    assert gap(there, alone("stopped")) < 1e-4


@needs_gloo
def test_commands_share_their_work_and_the_first_process_writes_and_prints(several: Path) -> None:
    printed = (several / "output").read_text()
    assert printed.count("Trained.") == printed.count("Distilled.") == 1, printed[-3000:]
    assert load(several / "student").kind == "consistency"
    for name in ("run", "student"):
        model = load(several / name, "cpu")
        drawn = Image.open(several / f"{name}.png")
        expected = make_grid(model.sample(7))
        gaps = torch.tensor(list(drawn.tobytes())) - torch.tensor(list(expected.tobytes()))
        assert drawn.size == expected.size
        assert gaps.abs().max() <= 1


@needs_gloo
def test_what_cannot_be_is_said_by_every_process(several: Path) -> None:
    said = [json.loads((several / f"said-{i}.json").read_text())["refusals"] for i in range(2)]
    assert said[0] == said[1]
    assert "batch of 8 in 8 part(s)" in said[0]["uneven"]
    assert "2 processes" in said[0]["uneven"]
    assert "parallel.shards is 3 for 2 processes" in said[0]["shards"]
    assert "parallel.mode ddp" in said[0]["instruments"]
    assert "already holds a run" in said[0]["taken"]
    assert all("\n" not in line for line in said[0].values())


@needs_gloo
def test_a_process_that_is_gone_ends_the_others_with_one_line(several: Path) -> None:
    said = json.loads((several / "said-0.json").read_text())["lost"]
    assert said.startswith("another process of this run has gone")
    assert "--resume" in said
    assert "\n" not in said


@needs_gloo
def test_a_command_for_one_process_fails_in_each_with_one_line(several: Path) -> None:
    for rank in range(2):
        code, err = json.loads((several / f"said-{rank}.json").read_text())["info"]
        assert code == 2
        (line,) = err.splitlines()
        assert line.startswith("trigflow: error")
        assert "info in 2 processes" in line
        assert "without torchrun" in line


# In one process ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {"data.flip": True},
        {"objective.kind": "scd-vsd", "objective.guidance_max": 2.0, "teacher": "teacher"},
        {"objective.kind": "meanflow"},
    ],
)
def test_shares_of_a_batch_are_the_batch(changes: dict[str, Any], processes: int, accumulate: int, tmp_path: Path) -> None:
    distills = "teacher" in changes
    trainer = tiny_trainer(tmp_path, changes, teacher=untrained_teacher() if distills else None)
    check_shares(trainer.batches, torch.arange(8), processes, accumulate)


def test_shares_of_a_batch_of_latents_are_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 8, 4, 4, generator=generator)
    dataset = LatentDataset("latents", images, torch.arange(10) % 2, ("a", "b"))
    network = nn.Linear(1, 1)
    network.takes, network.null = frozenset({"label"}), {"label": torch.tensor(2)}
    batches = Batches(
        tiny_config(), dataset, Latents.edm2(dataset.shape), network, torch.device("cpu"), torch.contiguous_format
    )
    assert "condition.label" in batches.draw(torch.arange(8), torch.Generator().manual_seed(5))
    check_shares(batches, torch.arange(8), 2, 2)


def test_a_share_takes_a_part_of_every_part() -> None:
    assert [Share(12, 2, 3, rank).rows().tolist() for rank in range(3)] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    with pytest.raises(UserError, match=r"a batch of 12 in 5 part\(s\) \(loop.accumulate\) on 1 processes"):
        Share(12, 5)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, 1),
        ({"MASTER_ADDR": "localhost"}, 1),
        ({"WORLD_SIZE": "1"}, 1),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 2),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=2"),
        ({"WORLD_SIZE": "x", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "WORLD_SIZE=x"),
    ],
)
def test_the_environment_says_how_many_processes_there_are(
    environment: dict[str, str], said: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(said, int):
        assert launched() == said
    else:
        with pytest.raises(UserError, match=said):
            launched()


def test_one_process_sets_nothing_up(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, {"parallel.mode": "fsdp", "loop.iterations": 1})
    trainer.run()
    assert not torch.distributed.is_initialized()
    assert not trainer.parallel.sharded


def test_recomputed_blocks_run_twice_and_give_the_same_gradients(tmp_path: Path) -> None:
    states, calls = [], []
    for recompute in (False, True):
        trainer = tiny_trainer(tmp_path / str(recompute), {"objective.kind": "sct", "parallel.recompute": recompute})
        block = next(blocks_of(trainer.network))
        count = 0

        def counted(*args: Any) -> None:
            nonlocal count
            count += 1

        block.get_submodule("norm0").register_forward_pre_hook(counted)
        trainer.step()
        calls.append(count)
        states.append({name: p.detach().clone() for name, p in trainer.network.named_parameters()})
    assert calls == [1, 2]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_blocks_are_the_outermost_members_of_lists_that_have_parts() -> None:
    network = build(TWO_LEVELS)
    names = {id(module): name for name, module in network.named_modules()}
    found = [names[id(block)] for block in blocks_of(network)]
    assert found == [
        "encoder.0", "encoder.1", "encoder.2", "middle.0", "middle.1",
        "decoder.0.0", "decoder.0.1", "decoder.1.0", "decoder.1.1", "ups.0",
    ]  # fmt: skip


def check_shares(batches: Batches, indices: Tensor, processes: int, accumulate: int) -> None:
    whole = batches.draw(indices, torch.Generator().manual_seed(5))
    shares = [Share(len(indices), accumulate, processes, rank) for rank in range(processes)]
    for share in shares:
        part = dataclasses.replace(batches, share=share).draw(indices, torch.Generator().manual_seed(5))
        assert part.keys() == whole.keys()
        assert all(torch.equal(part[name], whole[name][share.rows()]) for name in whole)
    assert sorted(torch.cat([share.rows() for share in shares]).tolist()) == list(range(len(indices)))
