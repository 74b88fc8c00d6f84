"""Caches of images: rows are the classifier's, however they were made; others are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import residua
from residua.cache.errors import DataError, MismatchError, ModelError, UsageError
from residua.cache.images import classifier_blocks
from residua.cache.images.classifier_source import ClassifierSource
from residua.cache.images.image_rows import image_hash
from residua.cache.model.source import ModelSource

from ...support.images import (
    CLASSES,
    CONFIG,
    make_picture,
    move_parameters,
    save_classifier,
    save_pictures,
    save_processor,
)

TOKENS = 17
"""Positions of an image: the class token and 4 x 4 patches."""
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier") / "vit")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures") / "animals", 12)


@pytest.fixture(scope="module")
def images(vit: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory):
    """A cache of all positions of 36 images, in several parts."""
    root = tmp_path_factory.mktemp("image-root")
    return residua.extract(str(vit), str(pictures), root=root, part_positions=128, dtype="float32")


def blocks_of(model: Any) -> Any:
    """The blocks of a ViT, of either version of transformers."""
    return model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer


def model_layers(folder: Path, pixels: torch.Tensor) -> tuple[list[np.ndarray], np.ndarray]:
    """Layers 0 to L of a ViT by hooks of its own, and its logits."""
    model: Any = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    blocks = blocks_of(model)
    layers: list[Any] = []
    blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: layers.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    for block in blocks:
        block.register_forward_hook(
            lambda _, __, output: layers.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
    return [layer.numpy() for layer in layers], logits.numpy()


def pixels_of(folder: Path, files: list[Path]) -> torch.Tensor:
    source = ClassifierSource.of(ModelSource.locate(str(folder)))
    opened = [Image.open(file).convert("RGB") for file in files]
    return torch.from_numpy(source.pixels(opened, [str(file) for file in files]))


def test_rows_are_those_of_the_model_and_the_head_gives_its_logits(
    images: residua.ActivationCache, vit: Path, pictures: Path
) -> None:
    files = [pictures / name for name in images.label("file")]
    layers, logits = model_layers(vit, pixels_of(vit, files))
    assert images.layers == (0, 1, 2, 3)
    for layer, rows in enumerate(layers):
        found = images.residual_array(layer)[:].reshape(rows.shape)
        np.testing.assert_allclose(found, rows, atol=2e-5 * np.abs(rows).max())
    own = images.logits().compute().reshape(len(files), TOKENS, len(CLASSES))
    np.testing.assert_allclose(own[:, 0], logits, atol=1e-5 * np.abs(logits).max())
    # At a patch the head reads the patch's own last layer.
    patch = images.head.logits(layers[-1][:, 5])
    np.testing.assert_allclose(own[:, 5], patch, atol=1e-5)


def test_positions_are_numbers_of_patches_and_images_are_known_by_their_bytes(
    images: residua.ActivationCache, pictures: Path
) -> None:
    count = len(images.sequence_length)
    assert count == 36
    np.testing.assert_array_equal(images.tokens[:], np.tile(np.arange(TOKENS), count))
    grid = images.manifest.image_grid
    assert grid is not None
    assert (grid.tokens, grid.rows, grid.columns, grid.first_patch) == (TOKENS, 4, 4, 1)
    names = images.label("file")
    hashes = [image_hash((pictures / name).read_bytes()) for name in names]
    np.testing.assert_array_equal(images.sequence_document, np.array(hashes, np.uint64))
    np.testing.assert_array_equal(images.label("label"), [name.split("/")[0] for name in names])
    tokens = images.manifest.tokens
    assert (tokens.split_by, tokens.packed, tokens.context) == ("image", False, TOKENS)
    assert not (images.path / "head" / "tokenizer.json").exists()
    assert residua.verify(images.path).ok
    for split in ("train", "validation", "test"):
        assert len(images.sequences(split))


def test_the_same_request_is_a_hit_and_other_pixels_are_another_cache(
    images: residua.ActivationCache, vit: Path, pictures: Path, tmp_path: Path
) -> None:
    root = images.path.parent
    again = residua.extract(str(vit), str(pictures), root=root, dtype="float32")
    assert again.id == images.id
    # Files under other names are the same images; one more image is another cache.
    moved = tmp_path / "moved"
    shutil.copytree(pictures, moved)
    (moved / "cat" / "000.png").rename(moved / "cat" / "renamed.png")
    ids = set()
    for folder in (moved,):
        cache = residua.extract(str(vit), str(folder), root=tmp_path / "a", dtype="float32")
        ids.add(tuple(sorted(cache.sequence_document.tolist())))
    assert ids == {tuple(sorted(images.sequence_document.tolist()))}
    # Another normalization is another identity.
    other = tmp_path / "other"
    shutil.copytree(vit, other)
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(
        json.dumps({**settings, "image_std": [1, 1, 1]})
    )
    changed = residua.extract(str(other), str(pictures), root=tmp_path / "b", dtype="float32")
    assert changed.manifest.tokens.tokenizer != images.manifest.tokens.tokenizer
    assert changed.manifest.tokens.digest == images.manifest.tokens.digest


def test_equal_files_are_one_image_and_missing_ones_are_left_out(
    vit: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "twice"
    shutil.copytree(pictures, folder)
    shutil.copy(folder / "cat" / "001.png", folder / "dog" / "copy.png")
    cache = residua.extract(str(vit), str(folder), root=tmp_path / "root")
    assert len(cache.sequence_length) == 36
    dropped = json.loads((cache.path / "provenance.json").read_text())["reading"]["dropped"]
    assert dropped["the same file as an earlier image"]["documents"] == 1


def test_a_data_set_given_in_python_is_extracted_with_its_classes(
    images: residua.ActivationCache, vit: Path, pictures: Path, tmp_path: Path
) -> None:
    files = [pictures / name for name in ("cat/001.png", "dog/002.png", "bird/003.png")]
    values = [{"bytes": file.read_bytes(), "path": None} for file in files]
    given: Any = datasets.Dataset.from_dict(
        {"photo": [*values, None], "kind": [0, 1, 2, 0]},
        features=datasets.Features(
            photo=datasets.Image(), kind=datasets.ClassLabel(names=list(CLASSES))
        ),
    )
    cache = residua.extract(str(vit), given, root=tmp_path, dtype="float32")
    assert sorted(cache.label("kind")) == sorted(CLASSES)
    reading = json.loads((cache.path / "provenance.json").read_text())["reading"]
    assert reading["text_column"] == "photo"
    assert reading["dropped"]["missing"] == {"documents": 1, "rows": [3]}
    # The same files are the same rows, wherever they come from.
    order = {name: n for n, name in enumerate(images.label("file"))}
    for number, kind in enumerate(cache.label("kind")):
        name = {"cat": "cat/001.png", "dog": "dog/002.png", "bird": "bird/003.png"}[kind]
        start = TOKENS * order[name]
        np.testing.assert_allclose(
            cache.residual_array(2)[TOKENS * number : TOKENS * (number + 1)],
            images.residual_array(2)[start : start + TOKENS],
            atol=1e-5,
        )


def test_class_tokens_alone_are_the_same_rows(
    images: residua.ActivationCache, vit: Path, pictures: Path
) -> None:
    root = images.path.parent
    alone = residua.extract(
        str(vit), str(pictures), root=root, positions="cls", dtype="float32", logits="full"
    )
    assert alone.positions == 36
    assert set(alone.tokens[:]) == {0}
    for layer in alone.layers:
        whole = images.residual_array(layer)[:].reshape(36, TOKENS, -1)[:, 0]
        np.testing.assert_allclose(alone.residual_array(layer)[:], whole, atol=1e-5)
    np.testing.assert_allclose(
        alone.logits().compute(), images.logits().compute()[::TOKENS], atol=1e-5
    )
    some = residua.extract(str(vit), str(pictures), root=root, positions="sample:3")
    assert some.positions == 3 * 36
    # A probe of class tokens belongs to the cache of all positions.
    ridge = residua.RidgeProbe().fit(alone)
    assert residua.evaluate(images, ridge, split="all").n == 36


def test_interrupted_and_extended_caches_get_the_rows_of_a_whole_one(
    images: residua.ActivationCache, vit: Path, pictures: Path, tmp_path: Path
) -> None:
    def extract(**options: Any) -> residua.ActivationCache:
        options = {"part_positions": 128, "dtype": "float32", **options}
        return residua.extract(str(vit), str(pictures), root=tmp_path, **options)

    first = extract(part="1/2", layers=[2])
    assert not first.complete
    whole = extract(layers=[2])
    assert whole.layers == (2, 3)
    extended = extract()
    assert extended.id == whole.id == images.id
    for layer in images.layers:
        np.testing.assert_allclose(
            extended.residual_array(layer)[:], images.residual_array(layer)[:], atol=1e-5
        )
    # More images make another cache: images are not added in place.
    more = tmp_path / "more"
    shutil.copytree(pictures, more)
    Image.fromarray(make_picture(np.random.default_rng(9), "cat")).save(more / "cat" / "new.png")
    larger = residua.extract(str(vit), str(more), root=tmp_path, dtype="float32")
    assert len(larger.sequence_length) == 37
    assert "extends" not in larger.manifest.extra


def test_images_that_are_gone_or_changed_are_named(
    vit: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    cache = residua.extract(str(vit), str(folder), root=tmp_path / "root", layers=[3])
    (folder / "dog" / "003.png").unlink()
    other = residua.extract(str(vit), str(folder), root=tmp_path / "root", layers=[3])
    assert other.id == cache.id  # the cache covers the images that are left
    with pytest.raises(DataError, match="an image of the cache is not in"):
        residua.extract(str(vit), str(folder), root=tmp_path / "root", layers=[1, 3])
    (folder / "dog" / "004.png").write_bytes(b"\x89PNG\r\n\x1a\n no")
    with pytest.raises(DataError, match=r"dog/004\.png"):
        residua.extract(str(vit), str(folder), root=tmp_path / "new")
    assert not list((tmp_path / "new").glob("*")) if (tmp_path / "new").exists() else True


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("DeiT", {}, marks=pytest.mark.slow),
        ("Beit", {"use_mean_pooling": False, "use_absolute_position_embeddings": True}),
        pytest.param("ViTMSN", {}, marks=pytest.mark.slow),
    ],
)
def test_other_vision_transformers_with_a_class_token_are_extracted(
    kind: str, changes: dict[str, Any], pictures: Path, tmp_path: Path
) -> None:
    folder = save_classifier(tmp_path / "model", kind, **changes)
    cache = residua.extract(str(folder), str(pictures), root=tmp_path / "root", dtype="float32")
    grid = cache.manifest.image_grid
    assert grid is not None
    assert grid.tokens == (18 if kind == "DeiT" else 17)
    files = [pictures / name for name in cache.label("file")]
    model: Any = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        want = model(pixel_values=pixels_of(folder, files)).logits.numpy()
    own = cache.logits().compute()[:: grid.tokens]
    np.testing.assert_allclose(own, want, atol=1e-4 * np.abs(want).max())


def save_with_teacher(folder: Path) -> Path:
    config = transformers.DeiTConfig(**CONFIG)  # type: ignore[arg-type]
    model = transformers.DeiTForImageClassificationWithTeacher(config)
    move_parameters(model)
    model.save_pretrained(folder)
    save_processor(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        pytest.param("Beit", {}, "mean of the patches", marks=pytest.mark.slow),
        ("Dinov2", {}, "mean of the patches"),
        ("IJepa", {}, "none of them a class token"),
        (
            "ResNet",
            {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8},
            "no list of blocks that gives one residual stream",
        ),
        pytest.param("teacher", {}, "more than the class token", marks=pytest.mark.slow),
    ],
)
def test_classifiers_whose_logits_are_not_of_the_class_token_are_refused(
    kind: str, changes: dict[str, Any], reason: str, pictures: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    if kind == "teacher":
        save_with_teacher(model)
    else:
        save_classifier(model, kind, **changes)
    with pytest.raises(ModelError, match=reason):
        residua.extract(str(model), str(pictures), root=tmp_path / "root")
    assert not list((tmp_path / "root").glob("[0-9a-f]*"))


def test_a_model_that_mixes_the_images_of_a_batch_runs_them_alone(
    vit: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mixing(*args: Any) -> Any:
        model = load(*args)
        blocks_of(model.classifier)[1].register_forward_hook(
            lambda _, __, output: output + 0.1 * output.mean(0, keepdim=True)
        )
        return model

    load: Any = classifier_blocks.load_classifier
    monkeypatch.setattr(classifier_blocks, "load_classifier", mixing)
    cache = residua.extract(str(vit), str(pictures), root=tmp_path / "root", dtype="float32")
    assert cache.manifest.alone
    provenance = json.loads((cache.path / "provenance.json").read_text())
    assert provenance["canary"]["batch_error"] > 1e-3


def test_a_model_that_gives_other_logits_each_time_is_refused(
    vit: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(*args: Any) -> Any:
        model = load(*args)
        model.classifier.classifier.register_forward_hook(
            lambda _, __, output: output + torch.randn_like(output)
        )
        return model

    load: Any = classifier_blocks.load_classifier
    monkeypatch.setattr(classifier_blocks, "load_classifier", noisy)
    with pytest.raises(ModelError, match="not deterministic"):
        residua.extract(str(vit), str(pictures), root=tmp_path / "root")


def test_another_model_cannot_go_on_with_a_cache(
    vit: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    residua.extract(str(vit), str(pictures), root=tmp_path / "root", layers=[3])

    def changed(*args: Any) -> Any:
        model = load(*args)
        blocks_of(model.classifier)[0].register_forward_hook(lambda _, __, output: 1.5 * output)
        return model

    load: Any = classifier_blocks.load_classifier
    monkeypatch.setattr(classifier_blocks, "load_classifier", changed)
    with pytest.raises(MismatchError, match="reference image differs"):
        residua.extract(str(vit), str(pictures), root=tmp_path / "root", layers=[1])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"context": 8}, "context is for texts"),
        ({"bos": "none"}, "bos is for texts"),
        ({"positions": "last"}, "positions last is for texts"),
        ({"format": 1}, "format 2"),
        ({"max_tokens": 16}, "less than the 17 positions of one image"),
        ({"trust_remote_code": True}, "trust-remote-code"),
        ({"logits": "topk:3"}, "no choice from a vocabulary of 3"),
    ],
)
def test_options_of_texts_are_refused(
    options: dict[str, Any], reason: str, vit: Path, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=reason):
        residua.extract(str(vit), str(pictures), root=tmp_path, **options)


def test_what_an_image_classifier_needs_is_said(
    vit: Path, pictures: Path, model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(vit, bare)
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"holds no preprocessor_config\.json"):
        residua.extract(str(bare), str(pictures), root=tmp_path)
    with pytest.raises(DataError, match="a folder of image files"):
        residua.extract(str(vit), str(texts_file), root=tmp_path)
    with pytest.raises(DataError, match="rows of texts"):
        residua.extract(str(vit), ["a text"], root=tmp_path)
    with pytest.raises(UsageError, match="class token of images"):
        residua.extract(str(model_folder), str(texts_file), root=tmp_path, positions="cls")
    loaded: Any = transformers.AutoModelForImageClassification.from_pretrained(vit).eval()
    with pytest.raises(ModelError, match="give the folder"):
        residua.extract(loaded, str(pictures), root=tmp_path)


def test_a_cache_of_images_says_what_it_has_not(images: residua.ActivationCache) -> None:
    with pytest.raises(UsageError, match="no tokenizer"):
        images.tokenizer()
    with pytest.raises(UsageError, match="reads pixels"):
        residua.load_model_of(images)
    with pytest.raises(UsageError, match="no meaning in a cache of images"):
        residua.RidgeProbe(offsets=(0, 1)).fit(images)
    with pytest.raises(UsageError, match="measure offset 0"):
        residua.evaluate(images, offsets=(0, 2))
    with pytest.raises(UsageError, match="no tokens of a text"):
        residua.Bigram().fit(images)


def test_damage_is_found_and_a_repair_says_that_it_needs_the_images(
    images: residua.ActivationCache, tmp_path: Path
) -> None:
    copy = tmp_path / images.id
    shutil.copytree(images.path, copy)
    shard = next((copy / "arrays.zarr" / "residual" / "1" / "c").rglob("0"))
    shard = shard if shard.is_file() else next(path for path in shard.rglob("*") if path.is_file())
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(bytes(content))
    assert not residua.verify(copy).ok
    with pytest.raises(UsageError, match="residua extract"):
        residua.repair(copy)
    # Records and the image processor need no model.
    shard.write_bytes((images.path / shard.relative_to(copy)).read_bytes())
    (copy / "journal" / "base.json").write_text("{}")
    assert residua.repair(copy).ok
    assert residua.verify(copy).ok


def test_a_manifest_that_is_half_of_images_is_refused(
    images: residua.ActivationCache, tmp_path: Path
) -> None:
    from dataclasses import replace

    manifest = images.manifest
    for changed in (
        replace(manifest, extra={"pad": False}),
        replace(
            manifest, extra={**manifest.extra, "image": {"tokens": 16, "rows": 4, "columns": 4}}
        ),
        replace(manifest, tokens=replace(manifest.tokens, split_by="document")),
    ):
        changed.write(tmp_path / "manifest.json")
        with pytest.raises(residua.ResiduaError, match="images|class token|image"):
            type(manifest).read(tmp_path / "manifest.json")
