"""The study of vision: planted classes are found where they are, and its numbers are numpy's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import residua
from residua.analysis.studies.vision.class_labels import classes_by_name, label_classes
from residua.analysis.studies.vision.class_token_study import study_vision
from residua.analysis.token_texts.position_masks import patch_mask
from residua.cache.errors import MismatchError, NotFoundError, UsageError
from residua.cli import main

from ....support.images import CLASSES, save_classifier, save_pictures, save_planted_classifier

BLOCK, LAYERS = 3, 4
"""Block of the planted model that tells the class token the class; number of its blocks."""
TOKENS = 17


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> residua.ActivationCache:
    """30 pictures whose colour is their class, and one of three colours by place."""
    folder = tmp_path_factory.mktemp("planted")
    model = save_planted_classifier(folder / "vit", BLOCK, LAYERS)
    pictures = save_pictures(folder / "pictures", 10, side=16)
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:] = (255, 0, 0)
    pixels[:4] = (0, 0, 255)  # the first row of patches
    pixels[4:, 12:] = (0, 255, 0)  # the last column below it
    Image.fromarray(pixels).save(pictures / "cat" / "places.png")
    return residua.extract(str(model), str(pictures), root=folder / "root", dtype="float32")


def softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def test_the_planted_class_is_read_from_its_block_on_and_chance_is_below(
    planted: residua.ActivationCache,
) -> None:
    result = study_vision(planted, split="all")
    rows = {row.layer: row for row in result.table("layers").rows}
    share_of_first = float((planted.label("label") == "cat").mean())
    for layer, row in rows.items():
        assert (row.n, row.labelled) == (31, 31)
        if layer >= BLOCK:
            assert row.accuracy == row.agreement == 1.0
            assert row.kl == pytest.approx(0.0, abs=1e-6)
        else:  # the class token holds a little of class 0, whatever the image
            assert row.accuracy == pytest.approx(share_of_first)
            low, high = row.accuracy_interval
            assert low < 1 / 3 + 0.1
            assert high < 0.65
            assert row.kl > 1.0
    assert any(f"from layer {BLOCK} of {LAYERS} on" in sentence for sentence in result.says)


def test_patches_lie_in_the_maps_as_in_the_image(planted: residua.ActivationCache) -> None:
    number = int(np.flatnonzero(planted.label("file") == "cat/places.png")[0])
    result = study_vision(planted, split="all", image=number)
    rows = {row.layer: row for row in result.table("patches").rows}
    # Before the block every patch says its own colour: 9 of 16 are red, the model's class.
    assert rows[0].top_share == pytest.approx(9 / 16)
    assert (rows[0].row, rows[0].column) == (1, 0)
    panel: Any = result.figure("patches").rows[0][0]
    assert "p(cat)" in panel.title
    values = dict(zip(panel.y_names, panel.values, strict=True))
    assert panel.y_names == ["3", "2", "1", "0"]  # the first row of a panel is at the bottom
    red = np.array([values[str(row)] for row in range(4)], float) > 0.5
    expected = np.zeros((4, 4), bool)
    expected[1:, :3] = True
    np.testing.assert_array_equal(red, expected)
    assert "top class bird" in panel.hovers[-1][0]
    assert "top class dog" in panel.hovers[0][3]


@pytest.mark.filterwarnings("ignore:few rows dominate")
def test_numbers_are_those_of_numpy(planted: residua.ActivationCache, tmp_path: Path) -> None:
    # A model off its planted numbers, so that nothing is 0 or 1.
    folder = save_classifier(tmp_path / "vit")
    pictures = save_pictures(tmp_path / "pictures", 5)
    cache = residua.extract(str(folder), str(pictures), root=tmp_path / "root", dtype="float32")
    ridge = residua.RidgeProbe().fit(cache)
    result = study_vision(cache, {"mine": ridge}, split="all", image=2)
    classes = np.array([CLASSES.index(name) for name in cache.label("label")])
    shape = len(classes), TOKENS, -1
    last = softmax(cache.head.logits(cache.residual_array(3)[:])).reshape(shape)
    model = last[:, 0]
    table = {(row.lens, row.layer): row for row in result.table("layers").rows}
    patches = {(row.lens, row.layer): row for row in result.table("patches").rows}
    chosen = int(model[2].argmax())
    for layer in range(4):
        hidden = cache.residual_array(layer)[:].astype(np.float64)
        weight, bias = ridge.maps_[layer, 0].weight, ridge.maps_[layer, 0].bias
        for lens, states in (("logit", hidden), ("mine", hidden @ weight + bias)):
            q = softmax(cache.head.logits(states.astype(np.float32))).reshape(shape)
            if layer == 3:
                q = last
            row, cls = table[lens, layer], q[:, 0]
            entropy = -(cls * np.log(cls)).sum(-1)
            kl = (model * np.log(model / cls)).sum(-1)
            assert row.accuracy == pytest.approx((cls.argmax(-1) == classes).mean())
            assert row.agreement == pytest.approx((cls.argmax(-1) == model.argmax(-1)).mean())
            assert row.kl == pytest.approx(kl.mean(), abs=2e-5)
            assert row.entropy == pytest.approx(entropy.mean(), abs=1e-5)
            assert row.perplexity == pytest.approx(np.exp(entropy).mean(), abs=1e-5)
            assert row.confidence == pytest.approx(cls.max(-1).mean(), abs=1e-5)
            of_image = patches[lens, layer]
            assert of_image.class_token == pytest.approx(cls[2, chosen], abs=1e-5)
            assert of_image.patch_mean == pytest.approx(q[2, 1:, chosen].mean(), abs=1e-5)
            assert of_image.top_share == pytest.approx((q[2, 1:].argmax(-1) == chosen).mean())
    difference = next(
        sentence for sentence in result.says if "mine" in sentence and "KL" in sentence
    )
    assert "at layer 1" in difference or "at layer 2" in difference


def test_evaluation_counts_the_class_token_and_patches_on_request(
    planted: residua.ActivationCache,
) -> None:
    evaluation = residua.evaluate(planted, split="all")
    assert evaluation.offsets == (0,)
    assert evaluation.n == 31
    assert evaluation.unit == "image"
    assert {row.n_text for row in evaluation.rows} == {0}
    assert any("class token counts" in note for note in evaluation.notes)
    p = softmax(planted.logits().compute())
    q = softmax(planted.head.logits(planted.residual_array(1)[:]))
    kl = (p * (np.log(p) - np.log(np.maximum(q, 1e-300)))).sum(-1)
    row = next(row for row in evaluation.rows if row.layer == 1)
    assert row.kl == pytest.approx(kl[::TOKENS].mean(), rel=1e-4)
    of_patches = residua.evaluate(planted, split="all", where=patch_mask(planted))
    assert of_patches.n == 31 * 16
    assert any("patches are compared" in note for note in of_patches.notes)
    is_patch = planted.tokens[:] != 0
    row = next(row for row in of_patches.rows if row.layer == 1)
    assert row.kl == pytest.approx(kl[is_patch].mean(), rel=1e-4)
    assert of_patches.heatmaps() == of_patches.kl_examples() == []
    # As many images as positions are asked for, not a seventeenth of them.
    assert residua.evaluate(planted, split="all", max_positions=20).n == 20


def test_labels_are_matched_with_classes_by_name_or_number(
    planted: residua.ActivationCache,
) -> None:
    names = ("tench, Tinca tinca", "great white shark", "cock", "Cock")
    found = classes_by_name(names)
    assert found["tinca tinca"] == found["tench"] == 0
    assert found["great white shark"] == 1
    assert "cock" not in found  # two classes have the name
    labels = label_classes(planted)
    np.testing.assert_array_equal(
        labels.classes, [CLASSES.index(name) for name in planted.label("label")]
    )
    files = label_classes(planted, "file")
    assert set(files.classes) == {-1}
    assert "31 values of the label 'file' are no class" in files.notes[0]
    result = study_vision(planted, split="all", label="file")
    row = result.table("layers").rows[0]
    assert (row.accuracy, row.accuracy_interval, row.labelled) == (None, (None, None), 0)
    assert row.agreement is not None
    with pytest.raises(NotFoundError, match="no label 'breed'"):
        study_vision(planted, label="breed")


def test_wrong_caches_images_and_lenses_are_refused(
    planted: residua.ActivationCache, tiny_cache: residua.ActivationCache
) -> None:
    with pytest.raises(UsageError, match="a cache of images"):
        study_vision(tiny_cache)
    with pytest.raises(NotFoundError, match="holds images 0-30"):
        study_vision(planted, image=31)
    with pytest.raises(MismatchError):
        study_vision(planted, residua.RidgeProbe(layers=[1]).fit(tiny_cache))
    with pytest.raises(UsageError, match="only a cache of images has patches"):
        patch_mask(tiny_cache)


def test_a_cache_of_class_tokens_has_no_maps(planted: residua.ActivationCache) -> None:
    origin = planted.path.parents[1]
    cache = residua.extract(
        str(origin / "vit"), str(origin / "pictures"), root=origin / "root", positions="cls"
    )
    result = study_vision(cache, split="test")
    assert [table.name for table in result.tables] == ["layers"]
    assert any("no whole image" in note for note in result.notes)
    with pytest.raises(UsageError, match="--positions all"):
        study_vision(cache, image=0)


def test_the_command_writes_page_tables_and_pictures(
    planted: residua.ActivationCache, tmp_path: Path
) -> None:
    command = ["study", "vision", planted.id[:8], "--root", str(planted.path.parent)]
    command += ["--split", "all", "--image", "3", "--html", str(tmp_path / "page.html")]
    command += ["--csv", str(tmp_path / "tables")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "page.html").read_text()
    assert "What it does not say" in page
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == [
        "vision-layers.csv",
        "vision-patches.csv",
    ]
    result = CliRunner().invoke(main, ["info", planted.id[:8], "--root", str(planted.path.parent)])
    assert "17 positions each, position 0 the class token" in result.output
