"""All studies of a cache: what it allows is made in one go, and the rest says why not."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import residua
from residua.analysis.commands.study_commands import study
from residua.analysis.studies import all_studies as all_studies_file
from residua.analysis.studies.all_studies import run_all_studies
from residua.analysis.studies.study_registry import STUDIES
from residua.cache.errors import NotFoundError, UsageError
from residua.cache.store.activation_cache import ActivationCache
from residua.cli import main
from residua.probes.lens.logit_lens import LogitLens


def test_every_study_is_a_command_and_an_entry_and_can_be_loaded() -> None:
    assert list(STUDIES) == sorted(STUDIES)
    assert set(study.commands) == {"all", *STUDIES}
    for name, entry in STUDIES.items():
        assert callable(entry.load()), name


def test_each_study_is_made_or_skipped_with_a_reason(
    tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    stages: list[tuple[str, int, int]] = []
    found = run_all_studies(
        tiny_cache,
        {"own": LogitLens.of(tiny_cache, 0)},
        split="all",
        max_positions=200,
        progress=lambda *call: stages.append(call),
    )
    assert {result.study for result in found.results} | set(found.skipped) == set(STUDIES)
    assert "--positions answer" in found.skipped["essential-layers"]
    assert all(found.skipped.values())
    assert ("studies", len(STUDIES), len(STUDIES)) in stages
    json.dumps(found.to_dict(), allow_nan=False)
    page = found.write_html(tmp_path / "page.html").read_text()
    assert "Not answered by this cache" in page


def test_rows_are_read_once_for_all_studies_of_lenses(
    tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    read = all_studies_file.measure_trajectories

    def counted(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        return read(*args, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(all_studies_file, "measure_trajectories", counted)
    run_all_studies(tiny_cache, split="all", max_positions=100, progress=None)
    assert calls == any(entry.takes_readings for entry in STUDIES.values())


def test_an_empty_split_is_refused(tiny_cache: ActivationCache) -> None:
    with pytest.raises(UsageError, match="split"):
        run_all_studies(tiny_cache, split="tset", progress=None)


def test_the_command_writes_a_page_and_prints_what_was_skipped(
    tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    words = ["study", "all", tiny_cache.id[:8], "--root", str(tiny_cache.path.parent)]
    words += ["--split", "all", "--max-positions", "100"]
    result = CliRunner().invoke(main, [*words, "--html", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert "skipped essential-layers: this cache keeps the positions" in result.stdout
    assert (tmp_path / "page.html").stat().st_size > 1000
    value = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert set(value["skipped"]) | set(value["studies"]) == set(STUDIES)


def test_a_study_is_made_by_its_name(tiny_cache: ActivationCache) -> None:
    result = residua.study("tuned-lens", tiny_cache, split="all", max_positions=100, progress=None)
    assert result.study == "tuned-lens"
    with pytest.raises(NotFoundError, match="no study 'astrology'; studies are"):
        residua.study("astrology", tiny_cache)
