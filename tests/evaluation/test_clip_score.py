"""The CLIP score: the cosine of the library's own embeddings, on a small model with random weights."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from trigflow.evaluation.clip_score import MEAN, STD, ClipScore
from trigflow.runtime.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = transformers.CLIPTextConfig(
        vocab_size=8, max_position_embeddings=8, eos_token_id=1, bos_token_id=2, pad_token_id=0, **sizes
    )
    vision = transformers.CLIPVisionConfig(image_size=16, patch_size=8, **sizes)
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=4)
    transformers.CLIPModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(("<p>", "<e>", "<u>", "a", "cat", "dog"))}, "<u>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<p>", eos_token="<e>", unk_token="<u>"
    ).save_pretrained(folder)
    return folder


def test_cosine_of_embeddings(folder):
    score = ClipScore(str(folder))
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    texts = ["a cat", "dog", "a a cat dog cat a a dog cat cat"]
    x = (images.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    for i, found in enumerate(score(images, texts)):
        ids = score.tokenizer(texts[i], return_tensors="pt", truncation=True, max_length=8)
        with torch.no_grad():
            out = score.clip(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], pixel_values=x[i : i + 1])
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
        torch.testing.assert_close(found, 100 * cosine.clamp(min=0)[0], rtol=1e-4, atol=1e-4)
    gray = images[:, :1]
    torch.testing.assert_close(score(gray, texts), score(gray.expand(-1, 3, -1, -1), texts))


def test_what_is_no_clip(tmp_path):
    with pytest.raises(UserError, match=r"CLIP .* cannot be read .*; correct --clip"):
        ClipScore(str(tmp_path))
