"""The base install does its work, and what an extra brings is named where it is missing."""

import ast
import pickle
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residua
from residua.cache.errors import MissingLibraryError
from residua.cache.optional_libraries import EXTRA_OF, LIBRARIES_OF, require_extra

from ..support.base_install import run_base_install

ROOT = Path(residua.__file__ or "").parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def distribution_names(requirements: list[str]) -> set[str]:
    """Normalised names of the distributions of `requirements`."""
    names = (re.match(r"[\w.-]+", text) for text in requirements)
    return {re.sub(r"[._]", "-", name[0].lower()) for name in names if name is not None}


def imported_libraries() -> set[str]:
    """Top modules of all libraries that the package imports anywhere."""
    names: set[str] = set()
    files = [p for room in ("cache", "probes", "analysis") for p in (ROOT / room).rglob("*.py")]
    for path in [*files, ROOT / "cli.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add((node.module or "").partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"residua"}


def distributions_of(library: str) -> set[str]:
    return {re.sub(r"[._]", "-", name.lower()) for name in packages_distributions()[library]}


@pytest.mark.slow
def test_every_imported_library_is_of_the_base_or_of_a_named_extra() -> None:
    base = distribution_names(PROJECT["dependencies"])
    for library in imported_libraries():
        distributions = distributions_of(library)
        of_base = bool(distributions & base) or library == "distributed"  # dask[distributed]
        assert of_base != (library in EXTRA_OF), (library, distributions)


@pytest.mark.slow
def test_an_extra_brings_what_it_is_named_for() -> None:
    for library, extra in EXTRA_OF.items():
        try:
            distributions = distributions_of(library)
        except KeyError:  # not installed here: its distribution has its name
            distributions = {library}
        brought = distribution_names(EXTRAS[extra])
        for name in list(brought):
            try:
                brought |= distribution_names(requires(name) or [])
            except PackageNotFoundError:
                continue
        assert distributions & brought, (library, extra)


def test_all_brings_every_extra_of_users_and_dev_brings_all() -> None:
    (everything,) = [text for text in EXTRAS["all"] if text.startswith("residua[")]
    named = set(re.findall(r"[\w-]+", everything)) - {"residua"}
    assert named == set(EXTRAS) - {"all", "dev", "docs"}
    assert "residua[all,docs]" in EXTRAS["dev"]
    assert set(LIBRARIES_OF) <= set(EXTRAS)


def test_the_base_reads_verifies_exports_and_fits(
    tiny_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    code = f"""
cache = residua.ActivationCache({str(tiny_cache.path)!r})
rows = cache.residual(1)[:5].compute()
logits = cache.head.logits(cache.residual_array(cache.n_blocks)[:5])
residua.export(cache, {str(tmp_path / "export")!r})
ridge = residua.RidgeProbe([0, 1]).fit(cache)
residua.save_probe(ridge, {str(tmp_path / "ridge")!r})
kinds = ("Unigram", "Bigram", "Trigram", "LaggedBigram", "BigramChain", "MarginalBigram")
for kind in kinds:
    residua.save_probe(getattr(residua, kind)().fit(cache), {str(tmp_path)!r} + "/" + kind)
assert not [name for name in EXTRA_OF if sys.modules.get(name)], sys.modules
print(json.dumps([residua.verify(cache.path).ok, rows.tolist(), logits.tolist()]))
"""
    ok, rows, logits = run_base_install(code)
    assert ok
    np.testing.assert_array_equal(rows, tiny_cache.residual_array(1)[:5])
    want = tiny_cache.head.logits(tiny_cache.residual_array(tiny_cache.n_blocks)[:5])
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-5)
    ridge = residua.load_probe(tmp_path / "ridge")
    direct = residua.RidgeProbe([0, 1]).fit(tiny_cache)
    np.testing.assert_allclose(ridge.map(1, 0).weight, direct.map(1, 0).weight, atol=1e-6)
    bigram = residua.load_probe(tmp_path / "Bigram")
    rows_of = [residua.evaluate(tiny_cache, [p]).to_dicts() for p in (ridge, bigram)]
    assert all(rows_of)


@pytest.mark.parametrize(
    ("use", "library", "extra"),
    [
        ("residua.VocabProbe", "torch", "fit"),
        ("residua.evaluate(cache, [])", "torch", "fit"),
        ("residua.RidgeProbe().fit(cache, device='cuda')", "torch", "fit"),
        ("residua.extract('a', 'b')", "torch", "extract"),
        ("residua.load_model_of(cache)", "torch", "extract"),
        ("cache.tokenizer()", "tokenizers", "extract"),
        ("residua.push_cache(cache, 'a/b')", "huggingface_hub", "hub"),
        ("residua.pull_probe('a/b')", "huggingface_hub", "hub"),
        ("residua.find_cache('a', 's3://b/c')", "upath", "s3"),
        ("residua.write_report(None, 'report.html')", "plotly", "report"),
        ("import_module('residua.analysis.display.frames').data_frame([])", "pandas", "report"),
    ],
)
def test_what_is_missing_is_named_with_its_extra(
    tiny_cache: residua.ActivationCache, use: str, library: str, extra: str
) -> None:
    code = f"""
from importlib import import_module
cache = residua.ActivationCache({str(tiny_cache.path)!r})
try:
    {use}
except residua.ResiduaError as error:
    assert isinstance(error, ModuleNotFoundError)
    print(json.dumps([error.name, str(error), error.exit_code]))
"""
    name, message, exit_code = run_base_install(code)
    assert name == library
    assert f"pip install 'residua[{extra}]'" in message
    assert exit_code == 2


def test_a_command_names_the_extra_in_one_line(
    tiny_cache: residua.ActivationCache, tmp_path: Path
) -> None:
    code = f"""
from click.testing import CliRunner
from residua.cli import main
root, cache = {str(tiny_cache.path.parent)!r}, {tiny_cache.id!r}
html = ["--html", {str(tmp_path / "report.html")!r}]
maps = ["heatmap", cache]
for words in (["fit", "lens", cache], ["quickstart"], ["evaluate", cache, *html], maps):
    result = CliRunner().invoke(main, [*words, "--root", root])
    print(json.dumps([result.exit_code, result.output]), file=sys.stderr)
    assert result.exit_code == 2 and result.output.count("\\n") == 1, result.output
    name = {{"quickstart": "all", "evaluate": "report"}}.get(words[0], "fit")
    assert f"pip install 'residua[{{name}}]'" in result.output, result.output
print(json.dumps(True))
"""
    assert run_base_install(code)


def test_imports_of_others_get_the_usual_error() -> None:
    code = """
import importlib.util
assert importlib.util.find_spec("torch") is None
try:
    import torch
except ImportError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
    assert run_base_install(code) == ["ModuleNotFoundError", "No module named 'torch'"]


def test_one_missing_library_among_several_is_named() -> None:
    code = """
from residua.cache.optional_libraries import require_extra
try:
    require_extra("extract", "extraction")
except residua.ResiduaError as error:
    print(json.dumps(str(error)))
"""
    message = run_base_install(code, "transformers")
    assert message.startswith("extraction needs transformers, which is not installed")
    require_extra("extract", "extraction")


def test_the_error_survives_a_trip_between_processes() -> None:
    error = MissingLibraryError("torch is not installed", "torch")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.name) == (MissingLibraryError, str(error), "torch")
