"""Runs on captioned data: a teacher, a guided student of it, and everything that is done with both."""

import functools
import json

import pytest
import torch

from trigflow.conditions import Text
from trigflow.data import ImageDataset
from trigflow.data.captions import Captions
from trigflow.evaluation.evaluate_model import evaluate_model
from trigflow.models.model import load
from trigflow.networks import TextConfig
from trigflow.runtime.errors import UserError
from trigflow.training.config import LoopConfig
from trigflow.training.setup import fit_network
from trigflow.training.trainer import Trainer

from .tiny import change, differing, digits, state_of, tiny_config

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@functools.cache
def captioned():
    """Eighty digits with two captions each, and without classes."""
    data = digits().subset(torch.arange(80))
    texts = [[NAMES[label], f"a {NAMES[label]}"] for label in data.labels.tolist()]
    return ImageDataset("words", data.images, captions=Captions.of(texts))


def config(changes=None):
    words = {
        "network.mult": (1, 2),
        "network.attention": (1,),
        "network.conditioning.text": TextConfig(length=8, width=8, depth=1, heads=2),
        "objective.label_dropout": 0.2,
    }
    return change(tiny_config(), {**words, **(changes or {})})


def train(folder, changes=None, *, teacher=None, resume=False):
    settings = config()
    if teacher is not None:
        settings = change(tiny_config({"objective.kind": "scd", "objective.guidance_max": 3.0}), {"network": teacher.spec})
        settings = change(settings, {"teacher": "teacher"})
    trainer = Trainer(
        change(settings, changes or {}), folder, teacher=teacher, dataset=captioned(), resume=resume, progress=False
    )
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    train(folder / "teacher", {"loop.iterations": 12, "loop.sample_every": 12})
    train(folder / "student", teacher=load(folder / "teacher"))
    return folder


def test_a_network_reads_because_the_data_have_captions():
    fitted = fit_network(tiny_config(), captioned()).network.conditioning.text
    assert fitted == TextConfig(length=64)
    assert not fit_network(tiny_config(), digits()).network.conditioning.text
    with pytest.raises(UserError, match="the network takes text and the data have no such condition"):
        fit_network(config(), digits())


def test_the_model_knows_how_it_is_told(runs):
    for name, takes in (("teacher", set()), ("student", {"guidance"})):
        model = load(runs / name)
        assert model.takes == {"text", "text_mask"} | takes
        assert model.conditioner.inputs == {"text": Text(8)}
    assert json.loads((runs / "student" / "model.json").read_text())["conditioner"] == {"text": {"kind": "text", "length": 8}}


def test_prompts_change_what_is_drawn_and_numbers_do_not(runs):
    model = load(runs / "student")
    one, two = (model.sample(4, prompt=prompt, guidance=2.0) for prompt in ("one", "two"))
    assert not torch.equal(one, two)
    both = model.sample(4, prompt=["one", "two"], guidance=2.0, batch_size=3)
    assert torch.equal(both[::2], one[::2])
    assert torch.equal(both[1::2], two[1::2])
    assert torch.equal(model.sample(4), model.sample(4, prompt=""))


def test_guidance_of_a_teacher_leads_away_from_the_empty_text(runs):
    model = load(runs / "teacher")
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 0.5])
    told, none = (model.conditioner.conditions({"text": text}, 2) for text in ("six", ""))
    with_, without = (model.velocity(rows)(x, t) for rows in (told, none))
    torch.testing.assert_close(model.velocity(told, 2.5)(x, t), without + 2.5 * (with_ - without), rtol=1e-4, atol=1e-5)


def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path):
    straight = train(tmp_path / "straight")
    stopping = Trainer(change(config(), {"loop.checkpoint_every": 3}), tmp_path / "halves", dataset=captioned(), progress=False)
    save = stopping.save_checkpoint

    def stop(*, wait=True):
        save(wait=True)
        raise KeyboardInterrupt

    stopping.save_checkpoint = stop
    with pytest.raises(KeyboardInterrupt):
        stopping.run()
    resumed = train(tmp_path / "halves", {"loop.checkpoint_every": 3}, resume=True)
    assert differing(state_of(straight), state_of(resumed)) == []


def test_another_seed_draws_other_captions(tmp_path):
    one = train(tmp_path / "one", {"loop": LoopConfig(iterations=1, batch_size=8, sample_every=0, device="cpu")})
    generator = torch.Generator().manual_seed(0)
    indices = torch.zeros(32, dtype=torch.int64)
    told = one.batches.draw(indices, generator)
    rows = told["condition.text"]
    again = one.batches.draw(indices, torch.Generator().manual_seed(0))
    assert torch.equal(rows, again["condition.text"])
    assert len(rows.unique(dim=0)) == 3  # both captions, and the empty one of those that are dropped
    assert (rows[:, 1] == 0).any()


class Letters(torch.nn.Module):
    """In place of CLIP: the number of letters."""

    def __init__(self, name):
        super().__init__()

    def forward(self, images, texts):
        assert len(images) == len(texts)
        return torch.tensor([float(len(text)) for text in texts])


def test_captions_are_measured_and_shown(runs, monkeypatch):
    model, said = load(runs / "student"), []
    sample = model.sample

    def recorded(num, **how):
        said.append(model.conditioner.conditions(how.get("conditions"), num, how["first"])["text"])
        return sample(num, **how)

    monkeypatch.setattr(model, "sample", recorded)
    monkeypatch.setattr("trigflow.evaluation.evaluate_model.load_data", lambda *_: captioned())
    monkeypatch.setattr("trigflow.evaluation.evaluate_model.ClipScore", Letters)
    found = evaluate_model(model, num=100, features="pixels", batch_size=40, clip="letters")
    assert (found["data"], found["num"]) == ("words", 100)
    first = captioned().captions.of_samples(torch.arange(100) % 80)
    assert found["clip_score"] == pytest.approx(sum(map(len, first)) / 100)
    told = captioned().read_by(model.network.null).told(torch.arange(100) % 80)["text"]
    assert torch.equal(torch.cat(said[1:]), told)  # the first draw tries whether it works
    assert (runs / "teacher" / "samples" / "00000012.png").is_file()


def test_a_pipeline_takes_prompts(runs):
    from trigflow.deploy.pipeline import TrigFlowPipeline

    model = load(runs / "student")
    pipeline = TrigFlowPipeline.from_model(model)
    noise = model.noise(0, 0, 0, 2) / model.process.sigma_data
    images = pipeline(prompt=["one", "two"], num_inference_steps=1, guidance_scale=2.0, latents=noise, output_type="pt").images
    drawn = model.sample(2, prompt=["one", "two"], steps=1, guidance=2.0)
    assert torch.equal((images * 255).round().to(torch.uint8).cpu(), drawn)


def test_other_captions_on_resuming(tmp_path):
    train(tmp_path / "run")
    texts = [["another"]] * len(captioned())
    other = ImageDataset("words", captioned().images, captions=Captions.of(texts))
    with pytest.raises(UserError, match="captions"):
        Trainer(config({"loop.iterations": 9}), tmp_path / "run", dataset=other, resume=True, progress=False)
