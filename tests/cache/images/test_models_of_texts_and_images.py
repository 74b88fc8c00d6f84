"""Models of texts and images: refused with the reason, or extracted on texts that hold no image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import residua
from residua.cache.errors import DataError, ModelError

from ...support import models
from ...support.images import move_parameters

TEXT = {
    "vocab_size": models.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
PLACEHOLDER = 5
"""Token in whose place the models read an image."""
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(transformers.__version__ < "5", reason="written with transformers 5"),
]


def save(folder: Path, model: Any) -> Path:
    move_parameters(model, scale=0.1)
    model.save_pretrained(folder)
    models.build_tokenizer().save_pretrained(folder)
    return folder


def llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**IMAGES),  # type: ignore[arg-type]
        text_config=transformers.LlamaConfig(**TEXT),  # type: ignore[arg-type]
        image_token_index=PLACEHOLDER,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},  # type: ignore[arg-type]
        vision_config=vision,  # type: ignore[arg-type]
        image_token_id=PLACEHOLDER,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def gemma3() -> Any:
    config = transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 16},  # type: ignore[arg-type]
        vision_config=IMAGES,  # type: ignore[arg-type]
        image_token_index=PLACEHOLDER,
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("build", [llava, qwen2_vl])
def test_a_model_that_reads_images_among_texts_is_refused_by_its_name(
    build: Any, texts_file: Path, tmp_path: Path
) -> None:
    folder = save(tmp_path / "model", build())
    with pytest.raises(ModelError, match="reads images among its texts") as raised:
        residua.extract(str(folder), str(texts_file), root=tmp_path / "root")
    assert "ForConditionalGeneration" in str(raised.value)
    assert len(str(raised.value)) < 400  # not the list of all classes
    assert not list((tmp_path / "root").glob("*"))


def test_its_texts_are_extracted_right_and_placeholders_of_images_are_refused(
    tmp_path: Path,
) -> None:
    model = gemma3()
    folder = save(tmp_path / "model", model)
    rng = np.random.default_rng(0)
    rows = [[*map(int, rng.integers(PLACEHOLDER + 1, models.VOCAB, 20))] for _ in range(12)]
    data = tmp_path / "ids.jsonl"

    def extract() -> residua.ActivationCache:
        data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
        return residua.extract(
            str(folder), str(data), root=tmp_path / "root", pack=False, dtype="float32"
        )

    cache = extract()
    ids = torch.from_numpy(cache.tokens[:20].astype(np.int64))[None]
    with torch.no_grad():
        want = model.eval()(input_ids=ids).logits[0].numpy()
    own = cache.logits()[:20].compute()
    assert np.abs(own - want).max() <= 1e-4 * np.abs(want).max()

    rows[3][7] = PLACEHOLDER
    with pytest.raises(DataError, match=f"token {PLACEHOLDER}, in whose place .* reads an image"):
        extract()
