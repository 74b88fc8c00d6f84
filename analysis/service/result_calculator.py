"""`ResultCalculator`: passages, lens maps, cells and bases of caches under a root, as JSON bytes.

result_routes.py answers requests with them. Answers are kept, the most recent first, within a
bound of bytes; caches and probes stay open between requests; all work runs on few threads.
"""

import json
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ...cache.errors import LimitError, NotFoundError, UsageError
from ...cache.files.json_files import plain_value
from ...cache.files.paths import is_remote
from ...cache.optional_libraries import is_installed
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.catalog import list_paths
from ...probes.base.readout import Readout
from ...probes.saved.library import load_probe_for
from ...probes.saved.probe_list import probe_folders

LOGIT_LENS = "logit"
"""Name of the logit lens, which is no saved probe."""
MAX_TOKENS = 128
"""Most tokens of a lens map."""
MAX_LAYERS = 128
"""Most layers of a lens map."""
MAX_LOGITS = 1 << 24
"""Most numbers (tokens, vocab) that a lens map computes at once, in float64."""
KEPT_BYTES = 64 << 20
"""Bytes of the answers that are kept."""
MAX_WAITING = 64
"""Most answers that are computed or wait for it at a time."""
OPEN_CACHES = 4
OPEN_PROBES = 8
READING_POSITIONS = 2048
"""Positions over which the directions of a basis are read."""

Kept = TypeVar("Kept")


class RecentValues(Generic[Kept]):
    """Values by key, at most `size` together; the least recently used are dropped first.

    `size_of` gives the size of a value; by default every value counts one. Safe to use from
    several threads.
    """

    def __init__(self, size: int, size_of: Callable[[Kept], int] = lambda value: 1) -> None:
        self.size, self.size_of = size, size_of
        self._values: OrderedDict[Hashable, Kept] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def obtain(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """The value of `key`, made where it is not kept; a larger one than `size` is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self._used += self.size_of(value)
            while self._used > self.size:
                _, dropped = self._values.popitem(last=False)
                self._used -= self.size_of(dropped)
        return value


@dataclass(frozen=True)
class LensMapQuery:
    """One lens map, as a URL asks for it."""

    cache: str
    """Beginning of the cache's id."""
    probe: str = LOGIT_LENS
    """Beginning of a probe's name, or `logit`."""
    sequence: int | None = None
    """Number of the sequence; None for a telling passage of the test split."""
    first: int = 0
    """Index of the first token in the sequence."""
    tokens: int = 24
    layers: tuple[int, ...] | None = None
    """Layers to show; None for all that the probe reads."""
    offset: int | None = None
    """Offset N; None for the smallest of the probe."""
    track: str | int | None = None
    """Token whose probability and rank are shown: its text or its id."""


@dataclass
class ResultCalculator:
    """Computes what the dashboard shows of caches and probes under `root`."""

    root: Path
    threads: int = 2
    """Answers that are computed at the same time, each on one thread of torch."""
    device: str = "cpu"
    _answers: RecentValues[bytes] = field(init=False, repr=False)
    _caches: RecentValues[ActivationCache] = field(init=False, repr=False)
    _probes: RecentValues[Any] = field(init=False, repr=False)
    _pool: ThreadPoolExecutor | None = field(default=None, init=False, repr=False)
    _waiting: int = field(default=0, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        self._answers = RecentValues(KEPT_BYTES, len)
        self._caches = RecentValues(OPEN_CACHES)
        self._probes = RecentValues(OPEN_PROBES)

    def start(self) -> ThreadPoolExecutor:
        """The calculator's threads, started at the first call, which imports torch."""
        with self._lock:
            if self._pool is None:
                self._pool = _make_pool(self.threads)
            return self._pool

    def submit(self, work: Callable[..., bytes], *args: Any) -> "Future[bytes]":
        """Have `work(*args)` done on one of the calculator's threads, in its turn.

        Raises `LimitError` if `MAX_WAITING` others wait already.
        """
        pool = self.start()
        with self._lock:
            if self._waiting >= MAX_WAITING:
                raise LimitError(f"{self._waiting} requests for results wait; ask again later")
            self._waiting += 1
        future = pool.submit(work, *args)
        future.add_done_callback(self._count_ended)
        return future

    def _count_ended(self, future: "Future[bytes]") -> None:
        with self._lock:
            self._waiting -= 1

    def run(self, work: Callable[..., bytes], *args: Any) -> bytes:
        """The result of `submit`, waited for."""
        return self.submit(work, *args).result()

    def close(self) -> None:
        """Stop the threads; answers that nobody has begun are dropped."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool = None

    # Caches and probes by name

    def cache(self, name: str) -> ActivationCache:
        """The cache whose id begins with `name`, opened; never a path.

        Raises `NotFoundError` for none and `UsageError` for several.
        """
        paths = list_paths(self.root)
        if not re.fullmatch(r"[0-9a-f]{1,64}", name):
            raise NotFoundError(f"{name[:80]!r} is no beginning of a cache's id")
        path = _only_one(name, paths, "cache")
        return self._caches.obtain((path, _stamp(path)), lambda: ActivationCache(path))

    def probe_path(self, name: str) -> Path:
        """The folder of the only probe under the root whose name begins with `name`."""
        return _only_one(name, probe_folders(self.root), "probe")

    def lens(self, name: str, cache: ActivationCache) -> tuple[str, Readout]:
        """Name and readout of a probe that belongs to `cache`, or of the logit lens.

        The logit lens reads the offsets 0 to 8.
        """
        from ...probes.lens.logit_lens import LogitLens

        if name == LOGIT_LENS:
            return LOGIT_LENS, LogitLens.of(cache, range(9))
        path = self.probe_path(name)
        probe = self._probes.obtain(
            (path, _stamp(path), cache.id), lambda: load_probe_for(cache, path)
        )
        if not hasattr(probe, "pairs") or not hasattr(probe, "logits"):
            raise UsageError(
                f"{path.name} predicts no tokens: choose a lens, or a vocabulary probe"
            )
        return path.name, probe

    # Answers

    def passages(self, cache_name: str, search: str | None, sequence: int | None) -> bytes:
        """Matches of a text, the tokens of one sequence, or a telling passage to begin with."""
        from ..display.passage_search import read_sequence_text, search_passages

        cache = self.cache(cache_name)

        def compute() -> dict[str, Any]:
            if search is not None:
                return search_passages(cache, search).to_dict()
            if sequence is not None:
                return read_sequence_text(cache, sequence)
            return self._telling_passage(cache)

        return self._answer(("passages", cache.id, search, sequence), compute)

    def _telling_passage(self, cache: ActivationCache) -> dict[str, Any]:
        """A passage in which most is decided in the upper layers, and the number of sequences."""
        import torch

        from ..evaluation.lens_heatmap import WIDTH, find_telling_passages

        ((sequence, first),) = find_telling_passages(cache, "test", WIDTH, torch.device("cpu"))
        sequences = len(cache.sequence_length)
        return {"sequence": sequence, "first": first, "tokens": WIDTH, "sequences": sequences}

    def lens_map(self, query: LensMapQuery) -> bytes:
        """The cells of a lens in a passage: `LensMap` as JSON, with where the passage lies."""
        from ..display.lens_cells import plain_lens_map
        from ..display.lens_maps import CachePassage, read_lens_maps

        cache = self.cache(query.cache)
        name, lens = self.lens(query.probe, cache)
        tokens = min(MAX_TOKENS, max(1, MAX_LOGITS // cache.vocab))
        if not 1 <= query.tokens <= tokens:
            raise UsageError(f"tokens must lie in 1-{tokens} for this cache, not {query.tokens}")
        pairs = [(layer, offset) for layer, offset in lens.pairs() if layer is not None]
        if not pairs:
            raise NotFoundError(f"{name} reads no layer: there is no map of it")
        offsets = sorted({offset for _, offset in pairs})
        offset = offsets[0] if query.offset is None else query.offset
        readable = sorted({layer for layer, at in pairs if at == offset})
        wanted = query.layers
        layers = [la for la in readable if wanted is None or la in wanted]
        if len(layers) > MAX_LAYERS:
            raise UsageError(
                f"a map shows at most {MAX_LAYERS} layers, not {len(layers)}: name layers"
            )

        def compute() -> dict[str, Any]:
            sequence, first = query.sequence, query.first
            if sequence is None:
                place = self._telling_passage(cache)
                sequence, first = place["sequence"], place["first"]
            passage = CachePassage(cache, sequence, first, query.tokens)
            maps = read_lens_maps(
                {name: lens},
                passage,
                layers=layers or wanted,
                offsets=offset,
                track=query.track,
                device=self.device,
            )
            return {
                "cache": cache.id,
                "probe": name,
                "sequence": sequence,
                "first": first,
                "length": int(cache.sequence_length[sequence]),
                "tracked": maps.tracked,
                "available": {"layers": readable, "offsets": offsets},
                "vocab": cache.vocab,
                **plain_lens_map(maps[0]),
            }

        key = ("map", cache.id, cache.layers, name, self._probe_stamp(name), query)
        return self._answer(key, compute)

    def lens_cell(self, query: LensMapQuery, layer: int, count: int) -> bytes:
        """The likeliest tokens of one cell: `LensCell` as JSON.

        The cell is `layer` at token `first`.
        """
        from ..display.lens_cells import read_lens_cell
        from ..display.lens_maps import CachePassage

        cache = self.cache(query.cache)
        name, lens = self.lens(query.probe, cache)
        offsets = [offset for at, offset in lens.pairs() if at == layer]
        offset = min(offsets, default=0) if query.offset is None else query.offset

        def compute() -> dict[str, Any]:
            passage = CachePassage(cache, query.sequence, query.first, 1)
            return read_lens_cell(
                lens,
                passage,
                layer=layer,
                offset=offset,
                count=count,
                track=query.track,
                name=name,
                device=self.device,
            ).to_dict()

        key = ("cell", cache.id, name, self._probe_stamp(name), query, layer, count)
        return self._answer(key, compute)

    def basis(self, name: str, layer: int | None) -> bytes:
        """Spectra of a causal basis by layer, and with `layer` what its directions mean there.

        `readings` is None without `layer`, or with a note where the basis's lens is gone.
        """
        from ...probes.basis.causal_basis import CausalBasis
        from ...probes.saved.save import load_probe
        from ..basis.basis_lens import find_basis_maps
        from ..basis.direction_readings import read_directions

        path = self.probe_path(name)
        basis = self._probes.obtain((path, _stamp(path)), lambda: load_probe(path))
        if not isinstance(basis, CausalBasis):
            raise UsageError(f"{path.name} is no causal basis; residua fit basis makes one")
        if layer is not None:
            basis.basis(layer)  # raises for a layer that was not fitted

        def compute() -> dict[str, Any]:
            rows = basis.metrics()
            readings, note = None, None
            if layer is not None:
                try:
                    cache = self.cache(str(basis.cache_id_))
                    maps = find_basis_maps(cache, basis, self.root)
                    readings = read_directions(
                        cache,
                        {layer: basis.bases_[layer]},
                        {layer: maps[layer]},
                        rows_of_metrics=rows,
                        positions=READING_POSITIONS,
                        n_tokens=8,
                        n_passages=3,
                        seed=basis.seed,
                        drop_first=basis.drop_first,
                    )[layer].to_dict()
                except NotFoundError as error:
                    note = str(error)
            return {
                "probe": path.name,
                "cache": basis.cache_id_,
                "lens": basis.lens_["kind"],
                "layers": list(basis.bases_),
                "params": basis.get_params(),
                "metrics": rows,
                "layer": layer,
                "readings": readings,
                "note": note,
            }

        return self._answer(("basis", path, _stamp(path), layer), compute)

    def _answer(self, key: Hashable, compute: Callable[[], dict[str, Any]]) -> bytes:
        """The JSON bytes of an answer, kept or computed."""
        return self._answers.obtain(
            key, lambda: json.dumps(plain_value(compute()), allow_nan=False).encode()
        )

    def _probe_stamp(self, name: str) -> Hashable:
        """What changes when a probe is fitted again under its name."""
        return None if name == LOGIT_LENS else _stamp(self.probe_path(name))


def _make_pool(threads: int) -> ThreadPoolExecutor:
    """Threads that each use one thread of torch; searches need no torch."""
    if not is_installed("torch"):
        return ThreadPoolExecutor(threads)
    from ...probes.training.threads import thread_pool

    return thread_pool(threads)


def _only_one(name: str, paths: Sequence[Path], kind: str) -> Path:
    """The only path whose last part begins with `name`; a whole name goes before its extensions."""
    matches = [path for path in paths if name and path.name.startswith(name)]
    matches = [path for path in matches if path.name == name] or matches
    if len(matches) > 1:
        raise UsageError(
            f"{name[:80]!r} begins the names of {len(matches)} {kind}s; give more of it"
        )
    if not matches:
        raise NotFoundError(f"no {kind} {name[:80]!r} here ({len(paths)} {kind}s)")
    return matches[0]


def _stamp(path: Path) -> Hashable:
    """What changes when the cache or the probe at `path` does: times of its files.

    In an object store, which has no such times, the minute.
    """
    if is_remote(path):
        return int(time.time() // 60)
    times = []
    for name in ("manifest.json", "journal", "config.json"):
        try:
            times.append(os.stat(path / name).st_mtime_ns)
        except FileNotFoundError:
            times.append(0)
    return tuple(times)


def parse_layers(text: str) -> tuple[int, ...]:
    """Layers of `0-3,6`; raises `UsageError` for other texts and for numbers above 10,000."""
    layers: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", piece)
        if match is None or max(int(n) for n in match.groups() if n) > 10_000:
            raise UsageError(f"{text[:80]!r} are no layers; write them like 0-3,6")
        layers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not layers:
        raise UsageError(f"{text[:80]!r} are no layers: the first is larger than the last")
    return tuple(sorted(layers))
