"""A module of the user's own in place of a configured network: trained, resumed, loaded, and in the command line's way."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from training.tiny import differing, digits, state_of, tiny_config
from trigflow import TrigFlow, UserError, load, model_of
from trigflow.codecs import Pixels
from trigflow.conditions import null, takes
from trigflow.models.bridges import FlowBridge
from trigflow.networks import CustomConfig, build
from trigflow.runtime.files import read_tensors, write_tensors
from trigflow.training.runs import distill, train
from trigflow.training.trainer import Trainer

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model.py"
SD = 0.5


class Own(nn.Module):
    """`F(x, t, label)`; without the attributes of a network unless `classes` is given."""

    def __init__(self, classes: int = 0, guided: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(66, 64)
        self.dropout = nn.Dropout(dropout)
        if classes:
            self.embedding = nn.Embedding(classes + 1, 64)
            self.null = {"label": torch.tensor(classes)}
        if classes or guided:
            self.takes = frozenset(["label"] * bool(classes) + ["guidance"] * guided)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        y = self.linear(torch.cat([x.flatten(1), torch.cos(t)[:, None], torch.sin(t)[:, None]], dim=1))
        if label is not None:
            y = y + self.embedding(label)
        if guidance is not None:
            y = y * guidance[:, None]
        return self.dropout(torch.tanh(y)).reshape(x.shape)


def own(**settings: Any) -> Own:
    torch.manual_seed(0)
    return Own(**settings)


def trainer(folder: Path, network: nn.Module, changes: dict[str, Any] | None = None, **kwargs: Any) -> Trainer:
    return Trainer(tiny_config(changes), folder, network=network, dataset=digits(), progress=False, **kwargs)


SCD = {"objective.kind": "scd", "teacher": "flow"}


def test_it_is_trained_and_loaded_again(tmp_path: Path) -> None:
    network = own(classes=10)
    before = copy.deepcopy(network.state_dict())
    model = trainer(tmp_path, network).run()
    assert all(not torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert model.spec == CustomConfig(channels=1, conditioning=model.spec.conditioning)
    assert model.num_classes == 10
    again = load(tmp_path, "cpu", network=Own(classes=10))
    assert again.description() == model.description()
    assert torch.equal(again.sample(3, steps=2), model.sample(3, steps=2))


def compiled(network: nn.Module) -> nn.Module:
    return torch.compile(network, backend="eager")  # type: ignore[return-value]


def compiled_inside(network: Own) -> nn.Module:
    network.linear = compiled(network.linear)  # type: ignore[assignment]
    return network


def compiled_in_place(network: nn.Module) -> nn.Module:
    network.compile(backend="eager")
    return network


@pytest.mark.parametrize(
    "wrap",
    [compiled, compiled_inside, compiled_in_place, nn.DataParallel, AveragedModel, lambda n: compiled(nn.DataParallel(n))],
)
def test_files_do_not_know_what_it_was_wrapped_in(tmp_path: Path, wrap: Callable[[Any], nn.Module]) -> None:
    plain = trainer(tmp_path / "plain", own(classes=10))
    plain.run()
    wrapped = trainer(tmp_path / "wrapped", wrap(own(classes=10)), {"ema.snapshot_every": 3})
    model = wrapped.run()
    assert (model.num_classes, model.takes) == (10, {"label"})  # attributes are found inside
    expected = load(tmp_path / "plain", network=Own(classes=10)).sample(3, steps=2)
    for network in (Own(classes=10), wrap(Own(classes=10))):
        assert torch.equal(load(tmp_path / "wrapped", network=network).sample(3, steps=2), expected)
    names = {"linear.weight", "linear.bias", "embedding.weight"}
    for path in (tmp_path / "wrapped" / "network.safetensors", *(tmp_path / "wrapped" / "ema").glob("*.safetensors")):
        assert read_tensors(path, "weights").keys() == names
    rest = trainer(tmp_path / "wrapped", Own(classes=10), {"ema.snapshot_every": 3}, resume=True)
    assert differing(state_of(plain), state_of(rest)) == []
    again = model_of(wrap(own(classes=10)), (1, 8, 8), num_classes=10).save(tmp_path / "again")
    assert read_tensors(again / "network.safetensors", "weights").keys() == names


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_folders_of_earlier_versions_hold_names_of_wrappers(tmp_path: Path, prefix: str) -> None:
    folder = model_of(own(), (1, 8, 8)).save(tmp_path / "model")
    expected = load(folder, network=Own()).sample(2, steps=2)
    tensors = read_tensors(folder / "network.safetensors", "weights")
    write_tensors(folder / "network.safetensors", {prefix + name: value for name, value in tensors.items()})
    assert torch.equal(load(folder, network=Own()).sample(2, steps=2), expected)


def test_attributes_it_lacks_mean_neither_classes_nor_guidance(tmp_path: Path) -> None:
    network = own()
    model = trainer(tmp_path, network).run()
    assert (takes(network), null(network), "guidance" in model.takes) == (frozenset(), {}, False)
    assert (model.num_classes, model.class_names) == (0, ())
    assert model.sample(2, steps=2).shape == (2, 1, 8, 8)


def test_a_run_is_resumed(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", own(dropout=0.3))
    whole.run()
    part = trainer(tmp_path / "part", own(dropout=0.3))
    for _ in range(3):
        part.step()
    part.save_checkpoint()
    rest = trainer(tmp_path / "part", Own(dropout=0.3), resume=True)
    assert rest.iteration == 3
    rest.run()
    assert differing(state_of(whole), state_of(rest)) == []
    assert rest.config.network.dropout == 0.3


def test_whatever_it_draws_comes_from_the_seed_of_the_run(tmp_path: Path) -> None:
    """Also what is no `nn.Dropout`, as in stochastic depth."""

    class Noisy(Own):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, t) * (torch.rand(len(x)) > 0.5).view(-1, 1, 1, 1)

    states = []
    for i in range(2):
        torch.manual_seed(0)
        run = trainer(tmp_path / str(i), Noisy())
        torch.manual_seed(i)
        run.step()
        run.step()
        states.append(state_of(run))
        assert torch.initial_seed() == i
    assert differing(*states) == []


def test_a_bridged_teacher_and_its_copy_as_the_student(tmp_path: Path) -> None:
    bridge = FlowBridge(nn.Linear(8, 8), TrigFlow(SD), scale=2.0, adapter=lambda model, x, time: model(x))
    student = copy.deepcopy(bridge)
    teacher = model_of(bridge, (1, 8, 8), codec=digits().codec("measured", 0.5))
    before = copy.deepcopy(bridge.state_dict())
    model = trainer(tmp_path, student, SCD, teacher=teacher).run()
    assert model.kind == "consistency"
    assert model.codec == teacher.codec
    assert all(torch.equal(before[name], value) for name, value in bridge.state_dict().items())
    assert not torch.equal(student.model.weight, bridge.model.weight)


def test_the_student_starts_from_the_weights_it_has(tmp_path: Path) -> None:
    teacher = model_of(own(), (1, 8, 8))
    student = Own(dropout=0.1)
    start = copy.deepcopy(student.state_dict())
    run = trainer(tmp_path, student, SCD, teacher=teacher)
    assert all(torch.equal(start[name], value) for name, value in run.network.state_dict().items())


def test_train_and_distill_take_one_too(tmp_path: Path) -> None:
    changes = {"loop.iterations": 1, "data.source": "digits"}
    teacher = train(tiny_config(changes), tmp_path / "teacher", network=own(classes=10), progress=False)
    config = tiny_config({**changes, "objective.kind": "scd", "objective.guidance_max": 1.5})
    student = distill(config, teacher, tmp_path / "student", network=own(classes=10, guided=True), progress=False)
    assert "guidance" in student.takes
    assert student.sample(2, steps=1, guidance=1.5).shape == (2, 1, 8, 8)


def test_model_of_a_network(tmp_path: Path) -> None:
    network = own(classes=2)
    model = model_of(network, (1, 8, 8), process=TrigFlow(0.7), class_names=("a", "b"))
    assert model.process.sigma_data == 0.7
    assert model.codec == Pixels.symmetric((1, 8, 8))
    assert model.num_classes == 2
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert model.sample(3, steps=2, guidance=1.5).shape == (3, 1, 8, 8)
    model.save(tmp_path)
    again = load(tmp_path, "cpu", network=Own(classes=2))
    assert torch.equal(again.sample(3, steps=2), model.sample(3, steps=2))
    bridge = FlowBridge(nn.Linear(8, 8), TrigFlow(0.3))
    assert model_of(bridge, (1, 8, 8)).process is bridge.process


def test_a_folder_without_its_module(tmp_path: Path, cli: Callable[..., Any]) -> None:
    trainer(tmp_path / "run", own(), {"loop.iterations": 1}).run()
    with pytest.raises(UserError, match="module of your own"):
        load(tmp_path / "run", "cpu")
    with pytest.raises(UserError, match="module of your own"):
        build(CustomConfig())
    result = cli("sample", tmp_path / "run", "--out", tmp_path / "grid.png")
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "network=module" in result.err
    assert not (tmp_path / "grid.png").exists()
    with pytest.raises(UserError, match="1 missing, first"):
        load(tmp_path / "run", "cpu", network=Own(classes=3))


def test_mistakes(tmp_path: Path) -> None:
    guided = {**SCD, "objective.guidance_max": 2.0}
    teacher = model_of(own(classes=10), (1, 8, 8), num_classes=10)
    around = FlowBridge(own(), TrigFlow(SD))
    around.spare = nn.Linear(1, 1)
    old, foreign = own(), own()
    old.null_label, foreign.null = 10, {"label": torch.tensor(10)}
    mistakes: list[tuple[Callable[[], Any], str]] = [
        (lambda: trainer(tmp_path / "run", lambda x, t: x), "expected a torch.nn.Module"),  # type: ignore[arg-type]
        (
            lambda: trainer(tmp_path / "run", own(guided=True)),
            "the network takes guidance and the run draws no guidance scales; expected both or neither",
        ),
        (
            lambda: trainer(tmp_path / "run", own(classes=10), guided, teacher=teacher),
            "takes label and the run draws guidance scales",
        ),
        (lambda: trainer(tmp_path / "run", around, SCD, teacher=model_of(around.model, (1, 8, 8))), "share their weights"),
        (lambda: trainer(tmp_path / "run", copy.deepcopy(teacher.network), SCD, teacher=teacher), "frozen"),
        (lambda: trainer(tmp_path / "run", own(), SCD, teacher=teacher), "classes 0 and the teacher 10"),
        (lambda: trainer(tmp_path / "run", own().bfloat16()), "weight 'linear.weight' is in half precision"),
        (lambda: trainer(tmp_path / "run", old), r"null_label = 10 and no takes; expected .*; set takes = .*label"),
        (lambda: trainer(tmp_path / "run", foreign), "null for label and takes none; expected .*; correct takes or null"),
        (lambda: model_of(own(), (1, 8, 8), num_classes=3), "takes no conditions, 3 classes"),
        (lambda: model_of(own(classes=3), (1, 8, 8)), "takes label, 0 classes"),
        (lambda: model_of(own(classes=3), (1, 8, 8), num_classes=3, class_names=("a",)), "1 names"),
    ]
    for make, message in mistakes:
        with pytest.raises(UserError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("own_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rows = example.main(["--flow-iterations", "300", "--iterations", "20", "--num", "200"])
    assert [row["nfe"] for row in rows] == [35, 3, 2, 1]
    assert rows[0]["fd"] < rows[1]["fd"] / 2  # the bridged flow model draws digits
    assert "student" in capsys.readouterr().out
