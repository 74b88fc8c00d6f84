"""The budget is known before, kept while, and true after."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import residua
from residua.cache.errors import UsageError
from residua.cache.extraction.answer import answer_request, estimate_request
from residua.cache.extraction.request import ExtractionRequest
from residua.cli import main


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "float32", "layers": (0, 2)}, {"part_positions": 512}]
)
def test_a_dry_run_predicts_the_bytes_within_two_percent_and_writes_nothing(
    model_folder: Path, texts_file: Path, tmp_path: Path, options: dict
) -> None:
    request = ExtractionRequest(str(model_folder), str(texts_file), tmp_path, context=64, **options)
    estimate = estimate_request(replace(request, root=tmp_path / "not" / "yet"))
    assert not list(tmp_path.iterdir())
    cache = answer_request(request).cache
    arrays = sum(f.stat().st_size for f in (cache.path / "arrays.zarr").rglob("c/*"))
    arrays = sum(f.stat().st_size for f in cache.path.rglob("c/*/0") if f.is_file()) + sum(
        f.stat().st_size
        for name in ("tokens", "sequences")
        for f in (cache.path / "arrays.zarr" / name).rglob("c/*")
        if f.is_file()
    )
    predicted = sum(b for name, b in estimate.arrays.items() if name != "head")
    assert abs(predicted - arrays) <= 0.02 * arrays
    assert estimate.largest.startswith("residual/")


def test_dry_run_at_the_command_line(model_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    args = ["extract", str(model_folder), str(texts_file), "--dry-run", "--root", str(tmp_path)]
    found = json.loads(CliRunner().invoke(main, [*args, "--json"]).stdout)
    assert found["fits"] is True
    assert found["largest"].startswith("residual/")
    shown = CliRunner().invoke(main, args).stdout
    assert "fits into" in shown


def test_max_bytes_is_kept_and_ends_with_a_whole_sequence(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    whole = residua.extract(model_folder, texts_file, root=tmp_path / "a", part_positions=256)
    limit = whole.bytes * 6 // 10
    cache = residua.extract(
        model_folder, texts_file, root=tmp_path / "b", part_positions=256, max_bytes=limit
    )
    assert 0.3 * whole.positions < cache.positions < whole.positions
    assert cache.bytes <= limit
    assert cache.positions == int(cache.sequence_length.sum())


def test_max_bytes_below_one_sequence_is_refused(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="one sequence needs"):
        residua.extract(model_folder, texts_file, root=tmp_path, max_bytes=1000)
    assert not list(tmp_path.glob("*/manifest.json"))
