"""Fits and evaluations of a cache eight times larger than the memory the process may have.

The limit is enforced on private memory, with the libraries' own. Maps of files are not in it: the
kernel takes their pages back when it likes. How many of them were resident is printed beside it.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residua.cache.store.activation_cache import ActivationCache
from residua.probes.lens.fit_groups import SAMPLE_ROWS

from ..support.synthetic import make_cache, random_head

WIDTH, LAYERS, SEQUENCE, VOCAB = 128, 8, 256, 50
LIMIT = 512 << 20
ROWS = 8 * LIMIT // (2 * WIDTH * LAYERS)
BLOCK = 1 << 13

CHILD = """
import json, os, resource, sys, threading
path, limit, work = sys.argv[1], int(sys.argv[2]), sys.argv[3]
# Private memory: all but the maps of files, whose pages the kernel takes back when it likes.
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
# Threads reserve memory, too: stacks, and 32 MiB of OpenBLAS each.
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
threading.stack_size(1 << 20)
sys.modules["pandas"] = None  # scikit-learn would import it: a quarter of the limit for nothing
import numpy as np
from residua.cache.store.activation_cache import ActivationCache

peak, done = {"RssAnon": 0, "RssFile": 0}, threading.Event()
def watch():
    while not done.wait(0.02):
        for line in open("/proc/self/status"):
            name = line.partition(":")[0]
            if name in peak:
                peak[name] = max(peak[name], int(line.split()[1]) * 1024)
threading.Thread(target=watch, daemon=True).start()
try:
    np.ones(limit // 8)
    refused = False
except MemoryError:
    refused = True
source = ActivationCache(path)
found = None
exec(work)
done.set()
print(json.dumps({"private": peak["RssAnon"], "maps": peak["RssFile"], "refused": refused,
                  "found": found}))
"""


class Repeated:
    """Rows of one block again and again, made as they are asked for."""

    def __init__(self, block: np.ndarray) -> None:
        self.block = block
        self.shape = (ROWS, block.shape[1])

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.block[np.arange(rows.start, rows.stop) % len(self.block)]


@pytest.fixture(scope="module")
def maps() -> list[np.ndarray]:
    """Layer L is x @ map of every layer, but for the rounding to float16."""
    rng = np.random.default_rng(0)
    turns = [np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0] for _ in range(LAYERS - 1)]
    return [*turns, np.eye(WIDTH)]


@pytest.fixture(scope="module")
def big(
    maps: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ActivationCache]:
    last = np.random.default_rng(1).normal(size=(BLOCK, WIDTH)).astype(np.float32)
    layers: list[Any] = [Repeated((last @ m.T).astype(np.float32)) for m in maps]
    found = make_cache(
        tmp_path_factory.mktemp("big"), layers, [SEQUENCE] * (ROWS // SEQUENCE),
        random_head(WIDTH, VOCAB), dtype="float16", part_rows=1 << 16, chunk_rows=1 << 12,
    )  # fmt: skip
    assert found.bytes >= 8 * LIMIT
    yield found
    shutil.rmtree(found.path)  # gigabytes that later tests have no use for


def run_with_limited_memory(cache: ActivationCache, work: str) -> Any:
    """What `work` puts into `found`, in a process with `LIMIT` bytes of private memory."""
    command = [sys.executable, "-c", CHILD, str(cache.path), str(LIMIT), work]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    mib = {name: report[name] >> 20 for name in ("private", "maps")}
    print(
        f"\ncache {cache.bytes >> 20} MiB, limit {LIMIT >> 20} MiB, peak {mib['private']} MiB, "
        f"beside maps of files of {mib['maps']} MiB"
    )
    assert report["refused"]
    assert 0 < report["private"] <= LIMIT
    return report["found"]


@pytest.mark.slow
def test_a_cache_eight_times_the_memory_is_fitted(
    big: ActivationCache, maps: list[np.ndarray], tmp_path: Path
) -> None:
    file = tmp_path / "maps.npy"
    r2 = run_with_limited_memory(
        big,
        "from residua.probes.ridge.ridge_probe import RidgeProbe\n"
        "fit = RidgeProbe(folds=3, products='float32').fit(source, memory=24 << 20, keep=False)\n"
        f"np.save({str(file)!r}, np.stack([fit.map(layer, 0).weight for layer in source.layers]))\n"
        "found = [row['r2'] for row in fit.metrics()]",
    )
    assert min(r2) > 1 - 1e-5
    np.testing.assert_allclose(np.load(file), np.stack(maps), atol=1e-4)


@pytest.mark.slow
def test_a_lens_is_fitted_to_a_cache_eight_times_the_memory(
    big: ActivationCache, maps: list[np.ndarray], tmp_path: Path
) -> None:
    file = tmp_path / "map.npy"
    (row,) = run_with_limited_memory(
        big,
        "from residua.probes.lens.tuned_lens import TunedLens\n"
        "fit = TunedLens(layers=[3], steps=30, batch=512, lr=0.1).fit(source, memory=24 << 20)\n"
        f"np.save({str(file)!r}, fit.map(3).weight)\n"
        "found = fit.metrics()",
    )
    # The start takes a sample of the rows, drawn from all of them.
    assert row["n"] == SAMPLE_ROWS
    assert row["kl_logit"] > 0.1
    assert row["kl"] <= row["kl_ridge"] < 1e-5
    np.testing.assert_allclose(np.load(file), maps[3], atol=1e-2)


@pytest.mark.slow
def test_a_vocabulary_probe_is_fitted_to_a_cache_eight_times_the_memory(
    big: ActivationCache,
) -> None:
    """The model's top token is that of a linear map of the rows: found to a few percent."""
    (row,) = run_with_limited_memory(
        big,
        "from residua.probes.vocabulary.vocab_probe import VocabProbe\n"
        "fit = VocabProbe(0, [3], epochs=1, batch=4096, lr=0.02)\n"
        "found = fit.fit(source, memory=24 << 20).metrics()",
    )
    assert row["n"] > 0.7 * ROWS
    assert row["validation"] < 0.25 * np.log(VOCAB)


@pytest.mark.slow
def test_a_cache_eight_times_the_memory_is_evaluated(big: ActivationCache) -> None:
    import residua

    found = run_with_limited_memory(
        big,
        "from residua.analysis.evaluation.probe_evaluation import evaluate\n"
        "found = evaluate(source, split='train', offsets=(0, 1), max_positions=100_000).to_dicts()",
    )
    want = residua.evaluate(big, split="train", offsets=(0, 1), max_positions=100_000).to_dicts()
    assert [row["n"] for row in found] == [row["n"] for row in want]
    assert max(row["n"] for row in found) > 90_000
    for mine, theirs in zip(found, want, strict=True):
        assert mine["kl"] == pytest.approx(theirs["kl"], rel=1e-4, abs=1e-6)
    last = [row for row in found if (row["layer"], row["offset"]) == (big.n_blocks, 0)]
    assert last[0]["kl"] < 1e-6
