"""The model that comes along."""

from pathlib import Path

import trigflow

FOLDER = Path(__file__).parents[2] / "models" / "emoji"


def test_it_draws_words_and_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 24 * 2**20
    assert {path.name for path in FOLDER.iterdir()} == {"README.md", "model.json", "network.safetensors"}
    model = trigflow.load(FOLDER, "cpu")
    green, blue = (
        model.sample(4, steps=2, prompt=text, guidance=2.0).double().mean((0, 2, 3)) for text in ("green heart", "blue circle")
    )
    assert green.argmax() == 1  # of red, green and blue
    assert blue.argmax() == 2
    assert model.shape == (3, 48, 48)
