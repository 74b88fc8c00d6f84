"""Records that are damaged or lost are named, and made again from what is whole."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import residua
from residua.cache.errors import CorruptError, ModelError
from residua.cache.extraction.damage_repair import repair
from residua.cache.files.json_files import read_json, write_json
from residua.cache.format.journal import Journal
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.verification import verify
from residua.cache.tokens.token_stream import KeptRuns
from residua.probes.ridge.ridge_probe import RidgeProbe

from ...support.synthetic import make_cache, random_head

NO_MODEL = "/nowhere/without/a/model"
"""`repair` with this model fails if it needs one."""


@pytest.fixture
def damaged(tiny_cache: ActivationCache, tmp_path: Path) -> Path:
    """A copy of the cache, to be damaged; without the moments that other tests kept."""
    path = Path(shutil.copytree(tiny_cache.path, tmp_path / "root" / tiny_cache.id))
    shutil.rmtree(path / "moments", ignore_errors=True)
    return path


@pytest.fixture(scope="module")
def extended(model_folder: Path, texts_file: Path, tmp_path_factory: pytest.TempPathFactory):
    """A cache whose layers 0 and 2 were added to layer 1, in several parts."""
    options = {"root": tmp_path_factory.mktemp("extended"), "context": 64, "part_positions": 1024}
    residua.extract(model_folder, texts_file, layers=[1], **options)
    return residua.extract(model_folder, texts_file, layers=[0, 1, 2], **options)


@pytest.fixture
def damaged_extended(extended: ActivationCache, tmp_path: Path) -> Path:
    return Path(shutil.copytree(extended.path, tmp_path / "root" / extended.id))


def files(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def assert_same_rows(path: Path, original: ActivationCache) -> None:
    cache = ActivationCache(path)
    assert cache.layers == original.layers
    for layer in original.layers:
        np.testing.assert_array_equal(
            cache.residual_array(layer)[:], original.residual_array(layer)[:]
        )
    for name in ("train", "validation", "test"):
        np.testing.assert_array_equal(cache.sequences(name), original.sequences(name))


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_link(path: Path) -> None:
    target = path.rename(path.parent.parent.parent / "target.json")
    path.symlink_to(target)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_text("x")


def reseal(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A forger's change of a record: the digest is made right again."""

    def apply(path: Path) -> None:
        value = read_json(path)
        change(value)
        write_json(path, value)

    return apply


def first_shard(value: dict) -> dict:
    return next(iter(value["arrays"].values()))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit": flip_bit,
    "no byte": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
    "no UTF-8": lambda path: path.write_bytes(b"\xff" * 90),
    "a FIFO": make_fifo,
    "a link": make_link,
    "a folder": make_folder,
}
BASE_FORGERIES: dict[str, Callable[[Path], object]] = {
    "files as list": reseal(lambda value: value.update(files=[])),
    "no arrays": reseal(lambda value: value.pop("arrays")),
    "a digest of 63": reseal(lambda value: value["files"].update({"head/x": "0" * 63})),
    "a digest as number": reseal(lambda value: value["files"].update({"head/x": 3})),
    "an array outside": reseal(lambda value: value["arrays"].update({"../ids": {}})),
    "an array of parts": reseal(lambda value: value["arrays"].update({"residual/0": {}})),
    "a shard as word": reseal(lambda value: first_shard(value).update({"x": {}})),
    "a negative shard": reseal(lambda value: first_shard(value).update({"-1": {}})),
    "a shard of no bytes": reseal(lambda value: first_shard(value)["0"].pop("bytes")),
}
FORGERIES: dict[str, Callable[[Path], object]] = {
    "another part": reseal(lambda value: value.update(part=0)),
    "a part as text": reseal(lambda value: value.update(part="1")),
    "fewer rows": reseal(lambda value: value["rows"].__setitem__(1, 1500)),
    "huge rows": reseal(lambda value: value.update(rows=[1024, 1 << 70])),
    "no rows": reseal(lambda value: value.update(rows=[])),
    "rows beyond": reseal(lambda value: value.update(rows=[1 << 40, 1 << 41])),
    "arrays as list": reseal(lambda value: value.update(arrays=[])),
    "a name outside": reseal(lambda value: value["arrays"].update({"../x": {}})),
    "an unknown layer": reseal(
        lambda value: value["arrays"].update({"residual/77": first_shard(value)})
    ),
    "negative bytes": reseal(lambda value: first_shard(value).update(bytes=-1)),
    "a fraction of bytes": reseal(lambda value: first_shard(value).update(bytes=1.5)),
    "a huge checksum": reseal(lambda value: first_shard(value).update(crc32c=1 << 40)),
    "a true checksum": reseal(lambda value: first_shard(value).update(crc32c=True)),
    "negative absmax": reseal(lambda value: first_shard(value).update(absmax=-1.0)),
    "no absmax": reseal(lambda value: first_shard(value).pop("absmax")),
    "quarantine as list": reseal(lambda value: value.update(quarantine=[3])),
    "a sequence beyond": reseal(lambda value: value.update(quarantine={"99999999": "x"})),
    "a sequence as word": reseal(lambda value: value.update(quarantine={"x": "y"})),
}


@pytest.mark.parametrize("kind", [*DAMAGE, *FORGERIES])
def test_a_damaged_commit_record_is_named_and_made_again_without_the_model(
    tiny_cache: ActivationCache, damaged: Path, kind: str
) -> None:
    record = damaged / "journal/00000001.json"
    (DAMAGE | FORGERIES)[kind](record)
    assert [damage.file for damage in verify(damaged).damages] == ["journal/00000001.json"]
    with pytest.raises(CorruptError, match=r"00000001\.json"):
        ActivationCache(damaged).check_complete()

    repaired = repair(damaged, NO_MODEL)
    assert repaired.ok
    assert repaired.rebuilt == ("journal/00000001.json",)
    assert (repaired.mended, repaired.changed) == ((), ())
    assert record.is_file()
    assert not record.is_symlink()
    verification = verify(damaged)
    assert verification.ok
    assert verification.missing_parts == ()
    assert_same_rows(damaged, tiny_cache)

    # Sizes and checksums are those that were lost; the range is that of the stored values.
    old, new = (c.journal.parts()[1] for c in (tiny_cache, ActivationCache(damaged)))
    assert (old.rebuilt, new.rebuilt) == (False, True)
    assert old.arrays.keys() == new.arrays.keys()
    for name, shard in old.arrays.items():
        assert (new.arrays[name].bytes, new.arrays[name].crc32c) == (shard.bytes, shard.crc32c)
        assert new.arrays[name].absmax == pytest.approx(shard.absmax, rel=2**-8)


def test_a_damaged_record_hides_no_other_damage(
    tiny_cache: ActivationCache,
    damaged: Path,
    model_folder: Path,
    texts_file: Path,
    tmp_path: Path,
) -> None:
    """Of its own part, whose damaged shard the model computes again, and of others."""
    before = files(damaged)
    shards = [f"arrays.zarr/residual/{layer}/c/{part}/0" for layer, part in ((1, 1), (2, 0))]
    flip_bit(damaged / "journal/00000001.json")
    for shard in shards:
        flip_bit(damaged / shard)
    copy = Path(shutil.copytree(damaged, tmp_path / "copy" / damaged.name))
    repaired = repair(damaged, str(model_folder))
    assert repaired.ok
    assert repaired.missing_parts == ()
    assert {*repaired.rebuilt, *repaired.mended} >= set(shards)
    assert verify(damaged).ok
    after = files(damaged)
    assert {name for name in before if before[name] != after.get(name)} == {"journal/00000001.json"}
    options = {"root": damaged.parent, "context": 64, "part_positions": 1024}
    assert residua.extract(model_folder, texts_file, **options).path == damaged
    assert_same_rows(damaged, tiny_cache)

    # Without the model, what needs none is mended, and the extraction goes on with the rest.
    with pytest.raises(ModelError):
        repair(copy, NO_MODEL)
    assert verify(copy).missing_parts == (1,)
    repaired = repair(copy, str(model_folder))
    assert (repaired.ok, repaired.missing_parts) == (True, (1,))
    options["root"] = copy.parent
    assert residua.extract(model_folder, texts_file, **options).path == copy
    assert verify(copy).ok
    assert_same_rows(copy, tiny_cache)


def test_a_record_that_is_lost_is_told_from_a_part_that_was_never_extracted(
    tiny_cache: ActivationCache, damaged: Path
) -> None:
    (damaged / "journal/00000001.json").unlink()
    verification = verify(damaged)
    assert not verification.ok
    assert verification.damages == ()
    assert verification.missing_parts == (1,)
    assert verification.lost_records == ("journal/00000001.json",)
    assert repair(damaged, NO_MODEL).rebuilt == ("journal/00000001.json",)
    assert_same_rows(damaged, tiny_cache)
    # Without one of its shards, the part may as well never have been written.
    (damaged / "journal/00000001.json").unlink()
    (damaged / "arrays.zarr/residual/2/c/1/0").unlink()
    verification = verify(damaged)
    assert verification.ok
    assert verification.missing_parts == (1,)


@pytest.mark.parametrize("record", ["00000001.1.json", "00000001.json"])
def test_a_lost_record_of_an_added_layer_is_not_ok_and_is_made_again(
    extended: ActivationCache, damaged_extended: Path, record: str
) -> None:
    assert verify(damaged_extended).ok
    (damaged_extended / "journal" / record).unlink()
    verification = verify(damaged_extended)
    assert not verification.ok
    assert verification.missing_parts == (1,)
    names = {*verification.lost_records, *(damage.file for damage in verification.damages)}
    assert names == {f"journal/{record}"}
    repaired = repair(damaged_extended, NO_MODEL)
    assert repaired.ok
    assert repaired.rebuilt == (f"journal/{record}",)
    assert verify(damaged_extended).ok
    assert_same_rows(damaged_extended, extended)


@pytest.mark.parametrize("kind", [*DAMAGE, *BASE_FORGERIES, "lost"])
def test_base_records_are_made_again_with_the_same_content(
    tiny_cache: ActivationCache, damaged: Path, kind: str
) -> None:
    record = damaged / "journal/base.json"
    original = record.read_bytes()
    if kind == "lost":
        record.unlink()
    else:
        (DAMAGE | BASE_FORGERIES)[kind](record)
    assert "journal/base.json" in [damage.file for damage in verify(damaged).damages]
    with pytest.raises((CorruptError, FileNotFoundError), match=r"base\.json"):
        ActivationCache(damaged).residual_array(1)
    repaired = repair(damaged, NO_MODEL)
    assert repaired.ok, repaired.left
    assert repaired.rebuilt == ("journal/base.json",)
    assert record.read_bytes() == original
    assert_same_rows(damaged, tiny_cache)


def test_metadata_of_every_array_are_made_again(tiny_cache: ActivationCache, damaged: Path) -> None:
    before = files(damaged)
    names = [name for name in before if name.endswith("/zarr.json") and name.count("/") > 2]
    assert "arrays.zarr/sequences/split/zarr.json" in names
    for name in names:
        (damaged / name).unlink()
    repaired = repair(damaged, NO_MODEL)
    assert repaired.ok, repaired.left
    assert sorted(repaired.mended) == sorted(names)
    assert files(damaged) == before


def test_all_records_can_be_lost_at_once(tiny_cache: ActivationCache, damaged: Path) -> None:
    names = {path.name for path in (damaged / "journal").iterdir()}
    for path in (damaged / "journal").iterdir():
        path.unlink()
    repaired = repair(damaged, NO_MODEL)
    assert repaired.ok
    assert {name.removeprefix("journal/") for name in repaired.rebuilt} == names
    assert verify(damaged).ok
    assert_same_rows(damaged, tiny_cache)


def test_files_that_are_not_whole_get_into_no_new_base_record(damaged: Path) -> None:
    bad = ["head/head.safetensors", "head/tokenizer.json", "arrays.zarr/residual/2/zarr.json"]
    for name in bad:
        raw = (damaged / name).read_bytes()
        (damaged / name).write_bytes(raw.replace(b"1", b"2", 1) if b"1" in raw else raw[:-1])
    flip_bit(damaged / "arrays.zarr/tokens/index/c/0")
    (damaged / "head/payload").write_text("of a stranger")
    (damaged / "journal/base.json").write_bytes(b"")
    with pytest.raises((CorruptError, ModelError)):
        repair(damaged, NO_MODEL)
    arrays, named = Journal(damaged / "journal").base()
    assert not set(bad) & set(named)
    assert "head/payload" not in named
    assert not arrays.get("tokens/index")
    assert not verify(damaged).ok


def test_a_lost_record_of_the_metadata_of_added_layers_is_named_and_made_again(
    extended: ActivationCache, damaged_extended: Path
) -> None:
    record = damaged_extended / "journal/base.1.json"
    original = record.read_bytes()
    for break_record in (flip_bit, Path.unlink):
        break_record(record)
        verification = verify(damaged_extended)
        assert [damage.file for damage in verification.damages] == ["journal/base.1.json"]
        assert repair(damaged_extended, NO_MODEL).rebuilt == ("journal/base.1.json",)
        assert record.read_bytes() == original
    assert verify(damaged_extended).ok
    assert_same_rows(damaged_extended, extended)


@pytest.mark.parametrize("name", ["../outside/zarr.json", "/tmp/outside/x", "a/../../x", "", "\0"])
def test_repair_writes_nothing_outside_of_the_cache(
    damaged: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "root/outside").mkdir()
    (damaged / "head/payload").write_text("chosen by a stranger")
    base = read_json(damaged / "journal/base.json")
    base["files"]["head/payload"] = base["files"]["manifest.json"]
    base["files"][name] = base["files"]["manifest.json"]
    write_json(damaged / "journal/base.json", base)
    assert "journal/base.json" in [damage.file for damage in verify(damaged).damages]
    assert repair(damaged, NO_MODEL).ok
    assert list((tmp_path / "root/outside").iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == [damaged.name, "outside"]


@pytest.mark.parametrize("name", ["arrays.zarr", "head", "journal", "leases"])
def test_repair_writes_nothing_through_a_link_in_place_of_a_folder(
    damaged: Path, tmp_path: Path, name: str
) -> None:
    outside = (damaged / name).rename(tmp_path / "outside")
    (damaged / name).symlink_to(outside)
    flip_bit(outside / {"arrays.zarr": "zarr.json", "head": "head.json"}.get(name, "../keep"))
    before = files(outside)
    assert name in [damage.file for damage in verify(damaged).damages]
    repaired = repair(damaged, NO_MODEL)
    assert not repaired.ok
    assert files(outside) == before
    with pytest.raises(CorruptError, match="is a link, where a cache has a folder"):
        ActivationCache(damaged)


@pytest.fixture(autouse=True)
def keep_file(tmp_path: Path) -> None:
    (tmp_path / "keep").write_bytes(b"xxx")


def test_a_lock_that_is_a_link_is_not_written_through(damaged: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    lock = damaged / "leases/00000001.lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(mine)
    flip_bit(damaged / "journal/00000001.json")
    with pytest.raises(OSError, match="00000001"):
        repair(damaged, NO_MODEL)
    assert mine.read_text() == "precious"


@pytest.mark.parametrize("kind", ["a bit", "no byte", "lost"])
def test_a_lost_manifest_comes_back_with_the_same_extraction_and_the_shards_stay(
    tiny_cache: ActivationCache, damaged: Path, model_folder: Path, texts_file: Path, kind: str
) -> None:
    manifest = damaged / "manifest.json"
    if kind == "lost":
        manifest.unlink()
    else:
        DAMAGE[kind](manifest)
    assert "manifest.json" in [damage.file for damage in verify(damaged).damages]
    with pytest.raises(CorruptError, match="the same `residua extract` as before makes it again"):
        repair(damaged, NO_MODEL)
    shards = {path: path.stat().st_mtime_ns for path in damaged.glob("arrays.zarr/**/c/**/*")}
    options = {"root": damaged.parent, "context": 64}
    with pytest.raises(CorruptError, match="has lost its manifest, and the one of this request"):
        residua.extract(model_folder, texts_file, part_positions=512, **options)
    cache = residua.extract(model_folder, texts_file, part_positions=1024, **options)
    assert cache.path == damaged
    assert manifest.read_bytes() == (tiny_cache.path / "manifest.json").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert verify(damaged).ok
    assert_same_rows(damaged, tiny_cache)


def test_a_lost_provenance_is_named_and_the_cache_can_be_read(
    tiny_cache: ActivationCache, damaged: Path
) -> None:
    (damaged / "provenance.json").write_bytes(b"")
    assert [damage.file for damage in verify(damaged).damages] == ["provenance.json"]
    repaired = repair(damaged, NO_MODEL)
    assert [damage.file for damage in repaired.left] == ["provenance.json"]
    assert_same_rows(damaged, tiny_cache)


@pytest.mark.parametrize("file", ["moments.json", "moments.safetensors"])
@pytest.mark.parametrize("kind", ["a bit", "no byte", "a FIFO", "a link"])
def test_damaged_moments_are_named_removed_and_computed_again(
    damaged: Path, file: str, kind: str
) -> None:
    RidgeProbe(layers=[1], folds=2).fit(ActivationCache(damaged), keep=True)
    (folder,) = (damaged / "moments").iterdir()
    assert verify(damaged).ok
    DAMAGE[kind](folder / file)
    assert [d.file for d in verify(damaged).damages] == [f"moments/{folder.name}/{file}"]
    repaired = repair(damaged, NO_MODEL)
    assert repaired.ok
    assert repaired.removed == (f"moments/{folder.name}",)
    assert not folder.exists()
    assert verify(damaged).ok
    probe = RidgeProbe(layers=[1], folds=2).fit(ActivationCache(damaged), keep=True)
    assert probe.moments_["kept"] == 0


@pytest.mark.parametrize("sparse", [False, True])
def test_a_rebuilt_record_quarantines_the_sequences_of_rows_that_are_not_finite(
    tmp_path: Path, sparse: bool
) -> None:
    rng = np.random.default_rng(0)
    lengths, runs = [100, 30, 300, 70, 100], None
    rows = sum(lengths)
    if sparse:  # two runs of 20 tokens of each context of 100
        lengths = [100] * 6
        sequence = np.repeat(np.arange(6), 2)
        runs = KeptRuns(sequence, np.tile([3, 60], 6), np.full(12, 20))
        rows = 12 * 20
    layers = [rng.normal(size=(rows, 4)).astype(np.float32) for _ in range(2)]
    layers[0][131:133, 2] = np.inf
    layers[1][130, :] = np.nan
    cache = make_cache(tmp_path, layers, lengths, random_head(4, 9), dtype="float16", runs=runs)
    assert cache.quarantined == {}
    (cache.path / "journal/00000000.json").write_bytes(b"")
    assert repair(cache.path, NO_MODEL).ok
    repaired = ActivationCache(cache.path)
    first, other = ("6", "7") if sparse else ("2", None)
    assert {str(number) for number in repaired.quarantined} == {first, *filter(None, [other])}
    assert repaired.quarantined[int(first)] == "2 non-finite values at layer 0"
    record = repaired.journal.parts()[0]
    assert [record.arrays[f"residual/{layer}"].nonfinite for layer in (0, 1)] == [2, 4]
    finite = layers[1][np.isfinite(layers[1]).all(-1)][:256]
    assert record.arrays["residual/1"].absmax == pytest.approx(np.abs(finite).max(), rel=1e-3)
