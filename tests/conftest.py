"""Fixtures: a model folder, a file of texts, and a cache of both, made once."""

import json
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def private_folders(tmp_path_factory: pytest.TempPathFactory):
    """Keep everything that libraries write out of the user's folders."""
    home = tmp_path_factory.mktemp("home")
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HOME", str(home / "huggingface"))
    patch.setenv("HF_DATASETS_CACHE", str(home / "datasets"))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    patch.delenv("RESIDUA_ROOT", raising=False)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-NeoX with its tokenizer."""
    from .models import save_model

    return save_model(tmp_path_factory.mktemp("models") / "neox")


@pytest.fixture(scope="session")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents as .jsonl."""
    from .models import texts

    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(120)))
    return path


@pytest.fixture(scope="session")
def tiny_cache(model_folder: Path, texts_file: Path, tmp_path_factory: pytest.TempPathFactory):
    """A complete cache of `model_folder` on `texts_file`, in several parts."""
    import residua

    root = tmp_path_factory.mktemp("root")
    return residua.extract(
        str(model_folder), str(texts_file), root=root, context=64, part_positions=1024
    )
