"""Probes that were saved are read and used where scikit-learn is not installed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import residua
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.baselines.ngrams import Unigram
from residua.probes.ridge.ridge_probe import RidgeProbe
from residua.probes.saved.save import save_probe
from residua.probes.vocabulary.vocab_probe import VocabProbe

from ...support.evaluations import assert_same_rows

BLOCKED = "import sys; sys.modules['sklearn'] = None\nimport json, numpy as np, residua\n"


def run_without_sklearn(code: str) -> Any:
    """What `code` prints, as JSON, in a process that cannot import scikit-learn."""
    found = subprocess.run(
        [sys.executable, "-c", BLOCKED + code], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def fitted_probes(cache: ActivationCache) -> list[Any]:
    fast: dict[str, Any] = {"layers": [1], "lr": 1e-2, "epochs": 1, "batch": 64}
    return [
        RidgeProbe([0, 1]).fit(cache),
        RidgeProbe(target=[1, 3], layers=[0]).fit(cache),
        VocabProbe(**fast).fit(cache),
        VocabProbe(rank=3, **fast).fit(cache),
        VocabProbe(form="head", **fast).fit(cache),
        Unigram().fit(cache),
        residua.ControlProbe(RidgeProbe(), "shuffled").fit(cache),
    ]


def test_saved_probes_say_the_same(tiny_cache: ActivationCache, tmp_path: Path) -> None:
    probes = fitted_probes(tiny_cache)
    folders = [str(save_probe(probe, tmp_path / str(n))) for n, probe in enumerate(probes)]
    code = (
        f"cache = residua.ActivationCache({str(tiny_cache.path)!r})\n"
        f"probes = [residua.load_probe(folder) for folder in {folders}]\n"
        "print(json.dumps(residua.evaluate(cache, probes).to_dicts()))"
    )
    assert_same_rows(run_without_sklearn(code), residua.evaluate(tiny_cache, probes))


def test_predictions_are_the_same_and_wrong_rows_are_refused(
    tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    rows = np.asarray(tiny_cache.residual_array(1)[:7])
    np.save(tmp_path / "rows.npy", rows)
    probe = RidgeProbe(layers=[1]).fit(tiny_cache)
    code = (
        f"probe = residua.load_probe({str(save_probe(probe, tmp_path / 'p'))!r})\n"
        f"rows = np.load({str(tmp_path / 'rows.npy')!r})\n"
        "try:\n    probe.predict(rows[:, 1:])\nexcept residua.ResiduaError as error:\n"
        "    print(json.dumps([probe.predict(rows).tolist(), str(error)]))"
    )
    found, message = run_without_sklearn(code)
    # The arrays are the same; their product may be rounded otherwise, where memory lies otherwise.
    np.testing.assert_allclose(found, probe.predict(rows), rtol=1e-5, atol=1e-5)
    assert "expected finite rows" in message


def test_fits_of_a_cache_need_no_sklearn_and_those_of_arrays_say_so(
    tiny_cache: ActivationCache,
) -> None:
    code = (
        f"cache = residua.ActivationCache({str(tiny_cache.path)!r})\n"
        "probe = residua.RidgeProbe(layers=[1]).fit(cache)\n"
        "try:\n    residua.RidgeProbe().fit(np.ones((20, 3)), np.ones((20, 2)))\n"
        "except residua.ResiduaError as error:\n"
        "    print(json.dumps([probe.map(1, 0).weight.tolist(), str(error)]))"
    )
    found, message = run_without_sklearn(code)
    want = RidgeProbe(layers=[1]).fit(tiny_cache).map(1, 0).weight
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    assert "needs scikit-learn" in message


def test_a_probe_that_is_not_fitted_says_so() -> None:
    code = (
        "try:\n"
        "    residua.RidgeProbe().predict(np.ones((2, 3)))\n"
        "except ValueError as error:\n"
        "    print(json.dumps([type(error).__name__, str(error)]))"
    )
    kind, message = run_without_sklearn(code)
    assert kind == "NotFittedError"
    assert "call fit first" in message
