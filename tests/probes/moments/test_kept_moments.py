"""Kept moments: a fit reads what is there, and gives what it would give without."""

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import residua
from residua.cache.errors import MismatchError, ResiduaWarning, UsageError
from residua.cache.files.json_files import read_json, write_json
from residua.cache.format.layout import Layout
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.cache_creation import create_cache
from residua.cache.store.part_writer import PartWriter
from residua.cache.tokens.token_stream import from_sequences
from residua.cli import main
from residua.probes.moments import kept_moments, pass_plan
from residua.probes.moments.kept_moments import find_kept, moment_entries, moments_folder
from residua.probes.moments.moment_collection import collect_moments
from residua.probes.moments.moment_set import MomentSet, write_tensors
from residua.probes.moments.moment_sources import MomentSources, extend, obtain_moments
from residua.probes.moments.pass_plan import MomentRequest
from residua.probes.ridge.ridge_probe import RidgeProbe

from ...support.synthetic import make_cache, random_head

WIDTH, VOCAB, DEPTH, FOLDS = 6, 30, 2, 3
OFFSETS = (0, 1, 3)


def random_layers(rng: np.random.Generator, rows: int) -> list[np.ndarray]:
    signal = rng.normal(size=(rows, WIDTH))
    return [
        (signal @ rng.normal(size=(WIDTH, WIDTH)) + rng.normal(size=(rows, WIDTH)) + 3).astype("f4")
        for _ in range(DEPTH + 1)
    ]


class GrowingCache:
    """A cache, and how to make those that begin with its sequences."""

    def __init__(self, root: Path, first: int = 60, sequences: int = 100, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.lengths = rng.integers(1, 20, sequences).tolist()
        self.layers = random_layers(rng, sum(self.lengths))
        self.ids = rng.integers(0, VOCAB, sum(self.lengths))
        self.head = random_head(WIDTH, VOCAB)
        self.root = root
        rows = sum(self.lengths[:first])
        old = [layer[:rows] for layer in self.layers]
        self.first = make_cache(
            root, old, self.lengths[:first], self.head, self.ids[:rows], part_rows=128
        )

    def grow(
        self,
        old: ActivationCache,
        count: int,
        layers: list[np.ndarray] | None = None,
        layout: Layout | None = None,
    ) -> ActivationCache:
        """A cache of the first `count` sequences that says that it extends `old`."""
        layers = layers or self.layers
        rows = sum(self.lengths[:count])
        stream = from_sequences(np.split(self.ids[:rows], np.cumsum(self.lengths[:count])[:-1]))
        digest, hashes = stream.digests()
        tokens = replace(old.manifest.tokens, digest=digest, positions=rows, sequences=count)
        layout = layout or old.manifest.layout
        manifest = replace(old.manifest, tokens=tokens, layout=layout, extra={"extends": old.id})
        numbers = tuple(range(len(layers)))
        dtypes = dict.fromkeys(numbers, "float32")
        path = create_cache(self.root, manifest, stream, hashes, dtypes, self.head.save, {})
        for part in range(manifest.layout.parts(rows)):
            write_part(ActivationCache(path), part, layers)
        return ActivationCache(path)


def write_part(source: ActivationCache, part: int, layers: list[np.ndarray]) -> None:
    numbers = tuple(range(len(layers)))
    with PartWriter(source.path, source.manifest.layout, part, numbers) as writer:
        for number, values in enumerate(layers):
            writer.write(number, writer.start, values[writer.start : writer.stop])
        writer.commit()


def request_for(source: ActivationCache, **options: Any) -> MomentRequest:
    return MomentRequest.of(source, None, OFFSETS, None, folds=FOLDS, **options)


def obtain_all(
    source: ActivationCache, request: MomentRequest, **options: Any
) -> tuple[MomentSet, MomentSources]:
    """All moments of `request`, and where they came from."""
    sources = MomentSources()
    options = {"keep": True, **options}
    found = list(obtain_moments(ActivationCache(source.path), request, sources=sources, **options))
    pairs = {pair: parts for one in found for pair, parts in one.pairs.items()}
    assert sorted(pairs) == sorted(request.pairs)
    return replace(found[0], pairs=pairs), sources


def assert_same(found: MomentSet, expected: MomentSet, rtol: float = 1e-12) -> None:
    for pair, parts in expected.pairs.items():
        for mine, theirs in zip(found.pairs[pair], parts, strict=True):
            assert mine.n == theirs.n
            for name in ("mean_x", "mean_y", "xx", "xy", "yy"):
                a, b = getattr(mine, name), getattr(theirs, name)
                np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def collect_anew(source: ActivationCache, request: MomentRequest) -> MomentSet:
    return collect_moments(
        source, request.layers, request.offsets, request.targets,
        folds=request.folds, split=request.split, products=request.products,
    )  # fmt: skip


def test_a_second_fit_reads_no_row(tmp_path: Path) -> None:
    source = GrowingCache(tmp_path).first
    first = RidgeProbe(OFFSETS, folds=FOLDS).fit(source, keep=True)
    again = RidgeProbe(OFFSETS, folds=FOLDS).fit(ActivationCache(source.path))
    assert (first.moments_["computed"], again.moments_["computed"]) == (9, 0)
    assert (again.moments_["kept"], again.moments_["positions"]) == (9, 0)
    assert first.moments_["saved"] == first.moments_["bytes"] + 8 * 2 * WIDTH * 9 * FOLDS
    for pair, found in first.maps_.items():
        # Moments come back bit by bit; LAPACK may round by where they lie in memory.
        np.testing.assert_allclose(again.maps_[pair].weight, found.weight, rtol=1e-5, atol=1e-6)
        assert again.alpha_[pair] == pytest.approx(first.alpha_[pair], rel=1e-12)


def test_only_what_is_missing_is_computed(tmp_path: Path) -> None:
    source = GrowingCache(tmp_path).first
    obtain_all(source, replace(request_for(source), layers=(0, 1), offsets=(0,)))
    obtain_all(source, replace(request_for(source), layers=(1,), offsets=(3,)))
    found, sources = obtain_all(source, request_for(source))
    assert (sources.kept, sources.computed) == (3, 6)
    assert_same(found, collect_anew(source, request_for(source)))
    assert obtain_all(source, request_for(source))[1].computed == 0


@pytest.mark.parametrize(
    "other", [{"folds": FOLDS + 1}, {"split": "validation"}, {"products": "float32"}]
)
def test_other_requests_are_kept_apart(tmp_path: Path, other: dict[str, Any]) -> None:
    source = GrowingCache(tmp_path).first
    request = replace(request_for(source), **other)
    assert obtain_all(source, request)[1].computed == 9
    found, sources = obtain_all(source, request_for(source))
    assert sources.computed == 9
    assert_same(found, collect_anew(source, request_for(source)))
    assert obtain_all(source, request)[1].kept == 9


def test_exact_moments_serve_who_asks_for_quick_ones(tmp_path: Path) -> None:
    source = GrowingCache(tmp_path).first
    obtain_all(source, request_for(source))
    assert obtain_all(source, request_for(source, products="float32"))[1].kept == 9


def test_a_cache_that_has_grown_needs_only_its_new_rows(tmp_path: Path) -> None:
    made = GrowingCache(tmp_path)
    obtain_all(made.first, request_for(made.first))
    bigger = made.grow(made.first, 80)
    found, sources = obtain_all(bigger, request_for(bigger))
    new = bigger.sequences("train")[bigger.sequences("train") >= 60]
    assert (sources.extended, sources.computed) == (9, 0)
    assert sources.positions == bigger.sequence_length[new].sum()
    assert_same(found, collect_anew(bigger, request_for(bigger)))
    assert obtain_all(bigger, request_for(bigger))[1].kept == 9
    largest = made.grow(bigger, 100)
    found, sources = obtain_all(largest, request_for(largest))
    assert sources.extended == 9
    assert_same(found, collect_anew(largest, request_for(largest)))


@pytest.mark.parametrize("rows", [(64, 64), (32, 512), (128, 1024)])
def test_a_small_cache_that_has_grown_into_other_parts_needs_only_its_new_rows(
    tmp_path: Path, rows: tuple[int, int]
) -> None:
    """Caches that fill no part have smaller parts than those that they grow into."""
    made = GrowingCache(tmp_path)
    obtain_all(made.first, request_for(made.first))
    bigger = made.grow(made.first, 80, layout=Layout(*rows))
    assert bigger.manifest.layout != made.first.manifest.layout
    found, sources = obtain_all(bigger, request_for(bigger))
    new = bigger.sequences("train")[bigger.sequences("train") >= 60]
    assert (sources.extended, sources.computed) == (9, 0)
    assert sources.positions == bigger.sequence_length[new].sum()
    assert_same(found, collect_anew(bigger, request_for(bigger)), rtol=1e-9)
    expected = collect_moments(bigger, None, OFFSETS, None, folds=FOLDS)
    assert_same(
        extend(collect_moments(made.first, None, OFFSETS, None, folds=FOLDS), bigger), expected
    )
    for row in (0, made.first.positions - 1):
        changed = [layer.copy() for layer in made.layers]
        changed[1][row, 2] += 1
        other = GrowingCache(tmp_path / f"{row}", seed=0)
        obtain_all(other.first, request_for(other.first))
        moved = other.grow(other.first, 80, changed, Layout(*rows))
        found, sources = obtain_all(moved, request_for(moved))
        assert (sources.extended, sources.computed) == (6, 3)
        assert_same(found, collect_anew(moved, request_for(moved)))


def test_growth_skips_a_cache_without_moments(tmp_path: Path) -> None:
    made = GrowingCache(tmp_path)
    obtain_all(made.first, replace(request_for(made.first), layers=(1,)))
    largest = made.grow(made.grow(made.first, 80), 100)
    found, sources = obtain_all(largest, request_for(largest))
    assert (sources.extended, sources.computed) == (3, 6)
    assert_same(found, collect_anew(largest, request_for(largest)))


def test_moments_in_memory_are_extended(tmp_path: Path) -> None:
    made = GrowingCache(tmp_path)
    old = collect_moments(made.first, None, OFFSETS, [1, 2], folds=FOLDS)
    bigger = made.grow(made.grow(made.first, 80), 100)
    found = extend(old, bigger)
    expected = collect_moments(bigger, None, OFFSETS, [1, 2], folds=FOLDS)
    assert_same(found, expected)
    assert sorted(found.pairs) == sorted(expected.pairs)
    assert (found.cache_id, found.sequences) == (bigger.id, expected.sequences)
    assert found.content == expected.content
    with pytest.raises(MismatchError, match="collect them anew"):
        extend(expected, made.first)
    with pytest.raises(MismatchError, match="collect them anew"):
        extend(replace(old, sequences={"count": 3, "digest": ""}), bigger)


@pytest.mark.parametrize("row", [0, -1])
def test_other_rows_are_not_taken_for_the_old_ones(tmp_path: Path, row: int) -> None:
    """One number of layer 1 differs: in a whole part, or in the one in which the old rows end."""
    made = GrowingCache(tmp_path)
    obtain_all(made.first, request_for(made.first))
    changed = [layer.copy() for layer in made.layers]
    changed[1][range(made.first.positions)[row], 2] += 1
    bigger = made.grow(made.first, 100, changed)
    found, sources = obtain_all(bigger, request_for(bigger))
    assert (sources.extended, sources.computed) == (6, 3)
    assert_same(found, collect_anew(bigger, request_for(bigger)))


def test_splits_that_moved_are_counted_anew(tmp_path: Path) -> None:
    """Three sequences have one of every split, which no longer holds among a hundred."""
    made = GrowingCache(tmp_path, first=3)
    request = replace(request_for(made.first), folds=1)
    for split in ("train", "validation", "test"):
        obtain_all(made.first, replace(request, split=split))
    bigger = made.grow(made.first, 100)
    moved = bigger.sequence_split[:3] != made.first.sequence_split
    assert moved.any()
    for split in ("train", "validation", "test"):
        found, sources = obtain_all(bigger, replace(request, split=split))
        same = np.array_equal(made.first.sequences(split), np.flatnonzero(
            bigger.sequence_split[:3] == ("train", "validation", "test").index(split)
        ))  # fmt: skip
        assert sources.extended == (9 if same else 0)
        assert_same(found, collect_anew(bigger, replace(request, split=split)))


def test_moments_of_rows_that_were_written_anew_are_dropped(tmp_path: Path) -> None:
    made = GrowingCache(tmp_path)
    obtain_all(made.first, request_for(made.first))
    changed = [layer + (number == 1) for number, layer in enumerate(made.layers)]
    write_part(made.first, 0, changed)
    source = ActivationCache(made.first.path)
    found, sources = obtain_all(source, request_for(source))
    assert sources.kept == 6
    assert_same(found, collect_anew(source, request_for(source)))
    assert obtain_all(source, request_for(source))[1].kept == 9


@pytest.mark.parametrize("name", ["moments.safetensors", "moments.json"])
def test_damaged_moments_are_computed_again(tmp_path: Path, name: str) -> None:
    source = GrowingCache(tmp_path).first
    obtain_all(source, request_for(source))
    (entry,) = moment_entries(source)
    raw = bytearray((entry.path / name).read_bytes())
    raw[-9] ^= 1
    (entry.path / name).write_bytes(raw)
    found, sources = obtain_all(source, request_for(source))
    assert sources.computed > 0
    assert_same(found, collect_anew(source, request_for(source)))
    assert obtain_all(source, request_for(source))[1].kept == 9


def set_field(*path: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a table: the value at the end of `path` is put where the rest leads."""

    def change(table: Any) -> None:
        *parents, name, value = path
        for parent in parents:
            table = table[parent]
        table[name] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_field("split", "everything"),
        set_field("split", None),
        set_field("folds", 1 << 40),
        set_field("folds", -1),
        set_field("products", 5),
        set_field("cache", []),
        set_field("sequences", "x"),
        set_field("drop_first", -1),
        set_field("across_documents", 3),
        set_field("depth", "3"),
        set_field("content", {}),
        set_field("content", "-1", "0" * 64),
        set_field("content", "0", 7),
        set_field("tensors", []),
        set_field("tensors", "0.0.0.xx", "x"),
        set_field("pairs", {"a": 1}),
        set_field("pairs", 0, []),
        set_field("pairs", 0, "layer", {}),
        set_field("pairs", 0, "offset", -1),
        set_field("pairs", 0, "target", "1"),
        set_field("pairs", 0, "n", 5),
        set_field("pairs", 0, "n", [1]),
        set_field("pairs", 0, "n", 0, -4),
        set_field("pairs", 0, "yy", 0, "x"),
    ],
)
def test_forged_moments_are_computed_again(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    source = GrowingCache(tmp_path).first
    obtain_all(source, request_for(source))
    (entry,) = moment_entries(source)
    table = read_json(entry.path / "moments.json")
    change(table)
    write_json(entry.path / "moments.json", table)
    found, sources = obtain_all(source, request_for(source))
    assert sources.computed > 0
    assert_same(found, collect_anew(source, request_for(source)))
    assert obtain_all(source, request_for(source))[1].kept == 9


@pytest.mark.parametrize("shape", [(), (3, 1), (2,)])
def test_forged_shapes_of_moments_are_computed_again(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    source = GrowingCache(tmp_path).first
    obtain_all(source, request_for(source))
    (entry,) = moment_entries(source)
    table, tensors = (
        read_json(entry.path / "moments.json"),
        load_file(entry.path / "moments.safetensors"),
    )
    name = next(name for name in tensors if name.endswith("mean_x"))
    tensors[name] = np.zeros(shape)
    table["tensors"] = write_tensors(entry.path / "moments.safetensors", tensors)
    write_json(entry.path / "moments.json", table)
    found, sources = obtain_all(source, request_for(source))
    assert sources.computed > 0
    assert_same(found, collect_anew(source, request_for(source)))


def test_damaged_moments_of_the_old_cache_cost_a_whole_pass(tmp_path: Path) -> None:
    made = GrowingCache(tmp_path)
    obtain_all(made.first, request_for(made.first))
    (entry,) = moment_entries(made.first)
    (entry.path / "moments.safetensors").write_bytes(b"")
    bigger = made.grow(made.first, 100)
    seen: list[tuple[int, int]] = []
    found, sources = obtain_all(bigger, request_for(bigger), progress=lambda *at: seen.append(at))
    assert (sources.extended, sources.computed) == (0, 9)
    assert seen[-1][0] == seen[-1][1]
    assert_same(found, collect_anew(bigger, request_for(bigger)))


def test_a_fit_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    source = GrowingCache(tmp_path).first
    with pytest.warns(ResiduaWarning, match="9 passes over the rows"):
        part = next(obtain_moments(source, request_for(source), keep=True, memory=1))
    found, sources = obtain_all(source, request_for(source))
    assert (sources.kept, sources.computed) == (len(part.pairs), 9 - len(part.pairs))
    assert_same(found, collect_anew(source, request_for(source)))


def test_writers_may_race(tmp_path: Path) -> None:
    source = GrowingCache(tmp_path).first
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: obtain_all(source, request_for(source))[0], range(4)))
    for one in found[1:]:
        assert_same(one, found[0])
    assert len(list(moment_entries(source))) == 1
    assert not list(moments_folder(source).glob(".*"))
    assert set(find_kept(source, request_for(source))) == set(request_for(source).pairs)


def test_what_a_dead_writer_left_is_removed(tmp_path: Path) -> None:
    source = GrowingCache(tmp_path).first
    left = moments_folder(source) / ".abc.tmp"
    left.mkdir()
    (left / "moments.safetensors").write_bytes(b"half")
    obtain_all(source, request_for(source))
    assert not left.exists()


def test_a_cache_that_cannot_be_written_is_fitted_all_the_same(tmp_path: Path) -> None:
    source = GrowingCache(tmp_path).first
    shutil.rmtree(moments_folder(source))
    moments_folder(source).touch()
    probe = RidgeProbe(OFFSETS, folds=FOLDS).fit(source)
    assert "cannot be written to" in probe.moments_["why"]
    assert probe.moments_["saved"] == 0
    with pytest.raises(UsageError, match="cannot be written to; fit without keeping them"):
        RidgeProbe(OFFSETS, folds=FOLDS).fit(source, keep=True)


def test_moments_are_small_beside_the_cache_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = GrowingCache(tmp_path).first
    monkeypatch.setattr(kept_moments, "SMALL_BYTES", 0)
    big = RidgeProbe(range(9), folds=9).fit(source)
    assert "more than 1/4 of the residual streams" in big.moments_["why"]
    assert not list(moment_entries(source))
    assert RidgeProbe(0, folds=2).fit(source, keep=False).moments_["why"] == "not asked for"
    assert not list(moment_entries(source))
    small = RidgeProbe(0, folds=2).fit(source)
    assert (small.moments_["why"], len(list(moment_entries(source)))) == ("", 1)


def test_moments_of_few_bytes_are_kept_however_small_the_cache(tmp_path: Path) -> None:
    source = GrowingCache(tmp_path).first
    probe = RidgeProbe(range(9), folds=9)
    assert probe.fit(source).moments_["why"] == ""
    again = probe.fit(source).moments_
    assert (again["kept"], again["positions"]) == (9 * len(source.layers), 0)


def test_a_sample_of_moments_is_that_of_its_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pass_plan, "FEWEST_SEQUENCES", 3)
    source = GrowingCache(tmp_path).first
    whole, numbers = request_for(source), source.sequences("train")
    most = int(source.sequence_length[numbers].sum()) // 2
    sample = replace(whole, max_positions=most)
    drawn = sample.sequences(source)
    positions = int(source.sequence_length[drawn].sum())
    assert set(drawn.tolist()) < set(numbers.tolist())
    assert 3 <= positions <= most
    (moments,) = obtain_moments(source, sample)
    # Counted are the pairs of these sequences alone, and no later fit finds them.
    assert sum(fold.n for fold in moments.pairs[0, 0, source.n_blocks]) == positions
    assert not list(moment_entries(source))
    # Moments of all sequences serve the sample, too.
    obtain_all(source, whole)
    sources = MomentSources()
    (kept,) = obtain_moments(source, sample, sources=sources)
    assert (sources.kept, sources.positions) == (len(whole.pairs), 0)
    assert sum(fold.n for fold in kept.pairs[0, 0, source.n_blocks]) > positions


def test_an_extraction_of_more_tokens_extends_the_moments(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"root": tmp_path, "context": 32, "part_positions": 256}
    model, texts = str(model_folder), str(texts_file)
    first = residua.extract(model, texts, max_tokens=700, **options)
    RidgeProbe((0, 2), folds=FOLDS).fit(first, keep=True)
    bigger = residua.extract(model, texts, max_tokens=1500, **options)
    assert bigger.manifest.extra["extends"] == first.id
    probe = RidgeProbe((0, 2), folds=FOLDS).fit(bigger, keep=True)
    assert probe.moments_["extended"] == 2 * len(bigger.layers)
    assert 0 < probe.moments_["positions"] <= bigger.positions - first.positions
    request = MomentRequest.of(bigger, None, (0, 2), None, folds=FOLDS)
    assert_same(obtain_all(bigger, request)[0], collect_anew(bigger, request))


def test_kept_moments_are_what_the_format_page_says(tmp_path: Path) -> None:
    """Read with nothing of this package."""
    source = GrowingCache(tmp_path).first
    request = replace(request_for(source), targets=(1, DEPTH))
    expected, _ = obtain_all(source, request)
    (folder,) = moments_folder(source).iterdir()
    about = json.loads((folder / "moments.json").read_bytes())
    tensors = load_file(folder / "moments.safetensors")
    assert set(about["tensors"]) == set(tensors)
    for name, tensor in tensors.items():
        assert hashlib.sha256(tensor.tobytes()).hexdigest() == about["tensors"][name]
    numbers = source.sequences("train").astype("<i8").tobytes()
    assert about["sequences"]["digest"] == hashlib.sha256(numbers).hexdigest()
    for layer, digest in about["content"].items():
        shards = []
        for part, record in sorted(source.committed.items()):
            shard = record.arrays[f"residual/{layer}"]
            shards.append([part, record.start, record.stop, shard.bytes, shard.crc32c])
        text = json.dumps(["float32", *shards], separators=(",", ":"))
        assert digest == hashlib.sha256(text.encode()).hexdigest()
    for row in about["pairs"]:
        layer, offset, target = row["layer"], row["offset"], row["target"]
        for fold, moments in enumerate(expected.pairs[layer, offset, target]):
            x, y = f"{layer}.{offset}.{fold}", f"{layer}.{offset}.{target}.{fold}"
            assert (row["n"][fold], row["yy"][fold]) == (moments.n, moments.yy)
            for name, found in (("xx", x), ("mean_x", x), ("xy", y), ("mean_y", y)):
                np.testing.assert_array_equal(tensors[f"{found}.{name}"], getattr(moments, name))


def test_the_command_keeps_and_finds_moments(tmp_path: Path) -> None:
    source = GrowingCache(tmp_path).first
    command = ["fit", "ridge", source.id, "--root", str(tmp_path), "--offsets", "0-1", "--target",
               "1,2", "--memory", "0.1", "--json"]  # fmt: skip
    found = []
    for option in ("--no-keep-moments", "--keep-moments", "--keep-moments"):
        result = CliRunner().invoke(main, [*command, option])
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.output))
    moments = [value["moments"] for value in found]
    assert [m["computed"] for m in moments] == [12, 12, 0]
    assert moments[0]["saved"] == 0 < moments[1]["saved"]
    assert moments[2]["kept"] == 12
    assert found[2]["metrics"] == found[1]["metrics"]
    assert {row["target"] for row in found[2]["metrics"]} == {1, 2}
