"""A fit on a cache eight times larger than the memory the process may have, which is enforced."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .synthetic import make_cache, random_head

WIDTH, LAYERS, SEQUENCE = 128, 8, 256
LIMIT = 256 << 20
ROWS = 8 * LIMIT // (2 * WIDTH * LAYERS)

CHILD = """
import json, os, resource, sys, threading
path, limit = sys.argv[1], int(sys.argv[2])
# Private memory: all but the maps of files, whose pages the kernel takes back when it likes.
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
# Threads reserve memory, too: stacks, and 32 MiB of OpenBLAS each.
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
threading.stack_size(1 << 20)
sys.modules["pandas"] = None  # scikit-learn would import it: a quarter of the limit for nothing
import numpy as np
from residua.cache.store import ActivationCache
from residua.probes.ridge import RidgeProbe

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.02):
        lines = open("/proc/self/status").read().splitlines()
        peak = max(peak, *(int(l.split()[1]) * 1024 for l in lines if l.startswith("RssAnon")))
threading.Thread(target=watch, daemon=True).start()
try:
    np.ones(limit // 8)
    refused = False
except MemoryError:
    refused = True
source = ActivationCache(path)
probe = RidgeProbe(folds=3, products="float32").fit(source, memory=24 << 20, keep=False)
done.set()
np.save(sys.argv[3], np.stack([probe.map(layer, 0).weight for layer in source.layers]))
print(json.dumps({"peak": peak, "refused": refused, "r2": [r["r2"] for r in probe.metrics()]}))
"""


class Repeated:
    """Rows of one block again and again, made as they are asked for."""

    def __init__(self, block: np.ndarray) -> None:
        self.block = block
        self.shape = (ROWS, block.shape[1])

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.block[np.arange(rows.start, rows.stop) % len(self.block)]


@pytest.mark.slow
def test_a_cache_eight_times_the_memory_is_fitted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    last = rng.normal(size=(1 << 13, WIDTH)).astype(np.float32)
    maps = [np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0] for _ in range(LAYERS - 1)]
    maps.append(np.eye(WIDTH))
    # Layer L is x @ map, but for the rounding to float16.
    layers: list[Any] = [Repeated((last @ m.T).astype(np.float32)) for m in maps]
    big = make_cache(
        tmp_path, layers, [SEQUENCE] * (ROWS // SEQUENCE), random_head(WIDTH, 50),
        dtype="float16", part_rows=1 << 16, chunk_rows=1 << 12,
    )  # fmt: skip
    assert big.bytes >= 8 * LIMIT
    found = tmp_path / "maps.npy"
    command = [sys.executable, "-c", CHILD, str(big.path), str(LIMIT), str(found)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(
        f"\ncache {big.bytes >> 20} MiB, limit {LIMIT >> 20} MiB, peak {report['peak'] >> 20} MiB"
    )
    assert report["refused"]
    assert 0 < report["peak"] <= LIMIT
    assert min(report["r2"]) > 1 - 1e-5
    np.testing.assert_allclose(np.load(found), np.stack(maps), atol=1e-4)
