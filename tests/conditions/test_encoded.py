"""Texts read by frozen encoders of transformers, small ones with random weights; and the cache of what they make of them."""

import shutil
from unittest import mock

import pytest
import torch
import transformers

from trigflow.conditions import Conditioner, Encoded
from trigflow.conditions import encoded as room
from trigflow.data.captions import Captions, encoder_named
from trigflow.networks import TextConfig
from trigflow.runtime.errors import UserError

WORDS = ["<pad>", "<eos>", "<unk>", *"a an red green blue heart apple circle cat dog the of".split()]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )


def network(kind):
    if kind == "clip":
        return transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=32, eos_token_id=1, pad_token_id=0, bos_token_id=2,
            )
        )  # fmt: skip
    if kind == "t5":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
        )
    return transformers.GemmaModel(
        transformers.GemmaConfig(
            vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=4, max_position_embeddings=32,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for number, kind in enumerate(("clip", "t5", "gemma")):
        made[kind] = folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(number)
        network(kind).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return made


@pytest.mark.parametrize("kind", ["clip", "t5", "gemma"])
@pytest.mark.parametrize("states", ["last", "penultimate", "pooled"])
def test_states_are_those_of_the_library(folders, kind, states):
    encoder = Encoded(str(folders[kind]), 6, states).known()
    told = Conditioner({"text": encoder}).conditions({"text": ["red heart", "a"]}, 2)
    loaded = room.opened(str(folders[kind]))
    read = loaded.tokenizer("red heart", return_tensors="pt")
    with torch.no_grad():
        out = loaded.network(**{k: read[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True)
    if states == "pooled":
        expected = out.pooler_output if kind == "clip" else out.last_hidden_state.mean(1)
        assert told["text"].shape == (2, 2, 8)
        torch.testing.assert_close(told["text"][0, 0], expected[0])
        assert told["text_mask"].tolist() == [[True, False]] * 2
    else:
        expected = out.last_hidden_state if states == "last" else out.hidden_states[-2]
        assert told["text"].shape == (2, 6, 8)
        torch.testing.assert_close(told["text"][0, :3], expected[0], rtol=1e-4, atol=1e-5)  # two words and the end
        assert told["text_mask"].tolist() == [[True] * 3 + [False] * 3, [True] * 2 + [False] * 4]
        assert (told["text"][~told["text_mask"]] == 0).all()


@pytest.mark.parametrize("kind", ["clip", "t5", "gemma"])
def test_pooled_captions_are_of_the_whole_text(folders, monkeypatch, tmp_path, kind):
    monkeypatch.setenv("TRIGFLOW_CACHE", str(tmp_path))
    caption = "the red heart of a cat"
    encoder = encoder_named(str(folders[kind]), "pooled", 6)
    told = Captions.of([[caption]]).encoded(encoder).rows(torch.tensor([0]))
    torch.testing.assert_close(told["text"], encoder.encode([caption])["text"], rtol=2e-3, atol=2e-3)
    kept = encoder.kept([caption + " red" * 60])  # the beginning, as far as the encoder reads
    assert torch.equal(kept[0]["text"], encoder.kept([caption + " red" * 90])[0]["text"])
    with pytest.raises(UserError, match=r"61 tokens; expected at most 32; shorten"):
        encoder.encode(["red " * 60])


def test_other_texts_of_a_batch_say_nothing(folders):
    encoder = Encoded(str(folders["t5"]), 6).known()
    alone, both = encoder.encode(["cat"]), encoder.encode(["cat", "the red heart of a"])
    torch.testing.assert_close(alone["text"][0], both["text"][0], rtol=1e-4, atol=1e-5)


def test_the_empty_text_is_the_null_of_a_network(folders):
    encoder = Encoded(str(folders["clip"]), 6).known()
    assert encoder.features == 8
    none = TextConfig(length=6, features=8).null
    for texts in ([""], ["", "cat"]):
        told = encoder.rows(texts, 1, 0)
        assert all(torch.equal(told[name][0], row) for name, row in none.items())


def test_features_are_taken_for_the_text_that_they_are_of(folders):
    encoder = Encoded(str(folders["clip"]), 6).known()
    made = encoder.encode(["red heart", "", "cat"])
    told = Conditioner({"text": encoder}).conditions({"text": made["text"]}, 3)
    assert all(torch.equal(told[name], made[name]) for name in made)


def test_state_and_another_encoder_under_the_name(folders, tmp_path):
    folder = tmp_path / "encoder"
    shutil.copytree(folders["clip"], folder)
    conditioner = Conditioner({"text": Encoded(str(folder), 6).known()})
    again = Conditioner.from_state(conditioner.state())
    assert again == conditioner
    room.opened.cache_clear()
    torch.manual_seed(9)
    network("clip").save_pretrained(folder)
    with pytest.raises(UserError, match="another than the model was trained with"):
        again.conditions({"text": "cat"})
    assert again.conditions({}, 2)["text"].shape == (2, 6, 8)  # which no encoder is needed for


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        (7, ("is no text",)),
        ("the red heart of a cat", ("7 tokens", "at most 6", "shorten")),
        ("x" * 20_000, ("20000 letters", "16384")),
        ("a\x00", ("printed",)),
    ],
)
def test_what_is_no_prompt(folders, said, parts):
    conditioner = Conditioner({"text": Encoded(str(folders["t5"]), 6).known()})
    with pytest.raises(UserError) as error:
        conditioner.conditions({"text": said})
    assert all(part in str(error.value) for part in parts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["tokenizer", "weights", "everything"])
def test_a_folder_without_what_is_needed(folders, tmp_path, missing):
    folder = tmp_path / "encoder"
    folder.mkdir()
    for path in folders["clip"].iterdir():
        drop = {"tokenizer": "token", "weights": ".safetensors", "everything": ""}[missing]
        if drop not in path.name:
            shutil.copy(path, folder)
    with pytest.raises(UserError, match=r"the text encoder .* cannot be read .*; expected a folder with tokenizer") as error:
        Encoded(str(folder), 6).known()
    assert "\n" not in str(error.value)


def test_damaged_weights(folders, tmp_path):
    shutil.copytree(folders["clip"], tmp_path / "encoder")
    (tmp_path / "encoder" / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="cannot be read"):
        Encoded(str(tmp_path / "encoder"), 6).known()


@pytest.mark.parametrize("settings", [{"states": "first"}, {"length": 1}, {"encoder": ""}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(UserError, match="the text encoder"):
        Encoded(**{"encoder": "x", **settings})


def test_captions_are_read_once(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("TRIGFLOW_CACHE", str(tmp_path))
    captions = Captions.of([["red heart", "a cat"], [], ["the red heart of a cat"]])
    (folders["t5"] / "notes").symlink_to("nowhere")
    spoiled = captions.encoded(encoder_named(str(folders["t5"]), "last", 6)).features.places
    for path in {*spoiled.values()}:
        path.write_bytes(path.read_bytes()[:-2])
    read = captions.encoded(encoder_named(str(folders["t5"]), "last", 6))
    expected = read.input.encode(["red heart", "", "the red heart of a cat"], cut=True)
    indices = torch.tensor([0, 1, 2])
    for again in (read, read.only(indices), captions.encoded(encoder_named(str(folders["t5"]), "last", 6))):
        told = again.rows(indices)
        assert torch.equal(told["text_mask"], expected["text_mask"])
        torch.testing.assert_close(told["text"], expected["text"], rtol=2e-3, atol=2e-3)  # kept in float16

    def never(name):
        raise AssertionError("the encoder was loaded")

    monkeypatch.setattr(room, "opened", never)
    captions.encoded(encoder_named(str(folders["t5"]), "last", 6))
    with pytest.raises(AssertionError, match="was loaded"):
        Captions.of([["green apple"]]).encoded(encoder_named(str(folders["t5"]), "last", 6))
    with pytest.raises(AssertionError, match="was loaded"):  # other states are other features
        captions.encoded(encoder_named(str(folders["t5"]), "penultimate", 6))
    monkeypatch.delenv("TRIGFLOW_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", mock.Mock(side_effect=RuntimeError))
    with pytest.raises(
        UserError, match="no home folder to keep a cache in; expected one; name another folder in TRIGFLOW_CACHE"
    ):
        captions.encoded(Encoded(str(folders["t5"]), 6))
