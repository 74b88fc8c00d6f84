"""A context that the model cannot take is a `ModelError` that names the length, not a traceback."""

import json
from pathlib import Path
from typing import Any

import pytest

from residua.cache.errors import ModelError
from residua.cache.extraction.answer import answer_request
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.model.source import ModelSource

from ...support.models import save_model


@pytest.mark.parametrize("error", [RuntimeError, IndexError, ValueError])
def test_a_model_that_fails_at_the_context_is_named_with_the_length(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from residua.cache.model import model_loading

    # A model whose positions end before the context of its configuration.
    load = model_loading.load_model

    def load_short(*args: Any, **options: Any) -> Any:
        module = load(*args, **options)

        def refuse_long(module: Any, args: Any, kwargs: Any) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if ids is not None and ids.shape[-1] > 60:
                raise error("index out of range in self")

        module.register_forward_pre_hook(refuse_long, with_kwargs=True)
        return module

    monkeypatch.setattr(model_loading, "load_model", load_short)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "a b c d e f g h " * 9}) + "\n" for _ in range(9)))
    model = save_model(tmp_path / "model")
    context = ModelSource.locate(str(model)).context
    assert context is not None
    request = ExtractionRequest(str(model), str(texts), tmp_path / "root", context=64)
    with pytest.raises(ModelError, match=r"64 tokens.*index out of range.*--context"):
        answer_request(request)
