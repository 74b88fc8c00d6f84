"""Writes a cache as plain safetensors or .npy files, for tools that read neither zarr nor this."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..files.json_files import file_digest, make_folder, sync_folder, sync_tree, write_json
from ..format.dtypes import LARGEST, STORED_DTYPES, encode_rows
from ..number_ranges import as_tuple, format_ranges
from ..progress import Progress
from ..store.activation_cache import BLOCK_BYTES, ActivationCache
from ..store.row_runs import RowRuns
from .flat_files import FORMATS, TensorColumn, check_space, staged_folder, write_flat_file

TABLE_ROWS = 1 << 20
"""Rows of a block of the one-dimensional arrays."""
"""Called with (residual rows written, residual rows to write), over all layers."""


def export(
    cache: ActivationCache,
    folder: str | Path,
    *,
    format: str = "safetensors",
    layers: Sequence[int] | None = None,
    split: str = "all",
    dtype: str | None = None,
    logits: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `layers` (default all) of a split into the new `folder`; returns its index.json.

    Rows stream, a block at a time, and the folder appears whole or not at all. Each layer is one
    file with a tensor `(positions, d_model)` in its stored dtype, or in `dtype`. `logits` says
    whether those that the cache keeps come along, as they are stored. Raises `UsageError` if the
    folder has files or `dtype` cannot hold a value, `NoSpaceError` before anything is written.
    """
    folder = Path(folder).expanduser()
    layers = cache.layers if layers is None else as_tuple(layers, "layers")
    _check(cache, folder, format, layers, dtype)
    sequences = cache.sequences(split)
    if not len(sequences):
        raise UsageError(f"the {split} split of this cache has no sequences; choose another")
    files = _files(cache, sequences, layers, dtype, format, logits)
    need = sum(column.bytes for columns in files.values() for column in columns)
    with staged_folder(folder):
        need += sum(path.stat().st_size for path in _head_files(cache))
        make_folder(folder.parent)
        check_space(folder.parent, need, "take fewer --layers, one --split, or another disk")
        staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(staging, ignore_errors=True)
        try:
            (staging / "head").mkdir(parents=True)
            for path in _head_files(cache):
                (staging / "head" / path.name).write_bytes(path.read_bytes())
            written = _write_files(staging, files, format, progress)
            index = _index(cache, format, split, written)
            (staging / "README.md").write_text(_readme(index), encoding="utf-8")
            write_json(staging / "index.json", index)
            sync_tree(staging)
            os.replace(staging, folder)
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return index


def _check(
    cache: ActivationCache, folder: Path, format: str, layers: Sequence[int], dtype: str | None
) -> None:
    if format not in FORMATS:
        raise UsageError(f"format {format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in STORED_DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown; choose one of {', '.join(STORED_DTYPES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and not an empty folder; name a new one")
    cache.check_complete()
    for layer in layers:
        cache.residual_array(layer)
        absmax = max(r.arrays[f"residual/{layer}"].absmax for r in cache.committed.values())
        if dtype is not None and absmax > LARGEST.get(dtype, np.inf):
            raise UsageError(
                f"layer {layer} reaches {absmax:.3g}, which {dtype} cannot hold; "
                "leave the dtype as it is stored, or take float32"
            )


def _head_files(cache: ActivationCache) -> list[Path]:
    return [path for path in (cache.path / "head").iterdir() if path.is_file()]


def _files(
    cache: ActivationCache,
    sequences: np.ndarray,
    layers: Sequence[int],
    dtype: str | None,
    format: str,
    logits: bool,
) -> dict[str, list[TensorColumn]]:
    """Columns of every file by its name without ending: tables, logits, then residuals."""
    tables = _tables(cache, sequences)
    runs = RowRuns.of(cache, sequences)
    if logits and cache.logits_names:
        tables["logits"] = [_logits(cache, name, runs) for name in cache.logits_names]
    files = {
        f"residual.{layer:02d}": [_residual(cache, layer, runs, dtype, cache.block_rows())]
        for layer in layers
    }
    if format == "numpy":
        return {f"{axis}.{c.name}": [c] for axis, cs in tables.items() for c in cs} | files
    # The widest dtype first, so that every tensor is aligned.
    ordered = {a: sorted(cs, key=lambda c: -c.stored.itemsize) for a, cs in tables.items()}
    return ordered | files


def _residual(
    cache: ActivationCache, layer: int, runs: RowRuns, dtype: str | None, rows: int
) -> TensorColumn:
    array = cache.residual_array(layer)
    stored = array.layout.logical_dtype

    def blocks() -> Iterator[np.ndarray]:
        for start, stop in runs.pieces(rows):
            if dtype in (None, stored):
                yield array.read_stored(start, stop)
            else:
                yield encode_rows(array.read(start, stop), dtype)

    return TensorColumn("residual", dtype or stored, (len(runs), cache.d_model), blocks)


def _logits(cache: ActivationCache, name: str, runs: RowRuns) -> TensorColumn:
    array = cache.array(name)
    rows = max(1, BLOCK_BYTES // array.layout.row_bytes)

    def blocks() -> Iterator[np.ndarray]:
        for start, stop in runs.pieces(rows):
            yield array.read_stored(start, stop)

    column = name.partition("/")[2]
    return TensorColumn(column, array.layout.logical_dtype, (len(runs), *array.shape[1:]), blocks)


def _tables(cache: ActivationCache, sequences: np.ndarray) -> dict[str, list[TensorColumn]]:
    """Columns of `tokens` and `sequences`, renumbered to the chosen sequences."""
    runs = RowRuns.of(cache, sequences)
    tables: dict[str, list[TensorColumn]] = {"tokens": [], "sequences": []}
    for name in sorted(cache.journal.base()[0]):
        axis, _, column = name.partition("/")
        if axis in tables:
            source = _token_column if axis == "tokens" else _sequence_column
            tables[axis].append(source(cache, column, sequences, runs))
    return tables


def _token_column(
    cache: ActivationCache, name: str, sequences: np.ndarray, runs: RowRuns
) -> TensorColumn:
    array = cache.array(f"tokens/{name}")

    def blocks() -> Iterator[np.ndarray]:
        for start, stop in runs.pieces(TABLE_ROWS):
            rows = array.read_stored(start, stop)
            numbers = np.searchsorted(sequences, rows) if name == "sequence" else rows
            yield numbers.astype(rows.dtype)

    return TensorColumn(name, np.dtype(array.layout.stored_dtype).name, (len(runs),), blocks)


def _sequence_column(
    cache: ActivationCache, name: str, sequences: np.ndarray, runs: RowRuns
) -> TensorColumn:
    array = cache.array(f"sequences/{name}")

    def blocks() -> Iterator[np.ndarray]:
        values = array.take_stored(sequences)
        if name == "start":
            lengths = cache.sequence_length[sequences]
            values = (np.cumsum(lengths) - lengths).astype(values.dtype)
        yield values

    return TensorColumn(name, np.dtype(array.layout.stored_dtype).name, (len(sequences),), blocks)


def _write_files(
    folder: Path, files: Mapping[str, list[TensorColumn]], format: str, progress: Progress | None
) -> dict[str, dict[str, Any]]:
    """Write every file; its entry of index.json by its name."""
    residual = [c for columns in files.values() for c in columns if c.name == "residual"]
    total = sum(column.shape[0] for column in residual)
    done = 0
    entries = {}
    for stem, columns in files.items():
        counts = stem.startswith("residual.")

        def wrote(rows: int, counts: bool = counts) -> None:
            nonlocal done
            done += rows * counts
            if progress is not None and counts:
                progress(done, total)

        path = folder / f"{stem}.{FORMATS[format]}"
        entries[path.name] = write_flat_file(path, columns, format, wrote)
    return entries


def _index(
    cache: ActivationCache, format: str, split: str, files: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    residual = {name: e for name, e in files.items() if name.startswith("residual.")}
    return {
        "export": 1,
        "format": format,
        "cache": cache.id,
        "identity": cache.manifest.identity,
        "model": cache.manifest.model_name,
        "data": cache.manifest.data_name,
        "split": split,
        "positions": next(iter(residual.values()))["tensors"]["residual"]["shape"][0],
        "d_model": cache.d_model,
        "vocab": cache.vocab,
        "depth": cache.n_blocks,
        "layers": {str(int(name.split(".")[1])): name for name in residual},
        "files": files,
        "head": {path.name: file_digest(path) for path in sorted(_head_files(cache), key=str)},
    }


_README = """# Residual streams of {model}

Exported by residua from cache `{cache}`: {split} split, {positions} positions of {data},
layers {layers} (0 is the embedding output, {depth} the last block **before** the final norm).
`residual.NN.{ending}` is layer NN, `(positions, d_model)`; `tokens` has ids, sequence and index
of every position, `logits` (where the cache keeps some) its logits, `sequences` start, length,
split, hash and source row of every sequence. `index.json` has dtypes, shapes and sha256 of all
files, `head/` the final norm, the unembedding and the tokenizer.

```python
{example}
```
"""
_EXAMPLES = {
    "safetensors": """from safetensors.torch import load_file  # or safe_open, to read a part

hidden = load_file("{file}")["residual"]""",
    "numpy": """import numpy as np

hidden = np.load("{file}", mmap_mode="r")""",
}
_BFLOAT16 = """
# bfloat16 is kept as uint16 (numpy has none): the upper half of a float32
rows = (hidden[:8].astype(np.uint32) << 16).view(np.float32)"""


def _readme(index: dict[str, Any]) -> str:
    """README.md of the folder: what it holds and how to open it."""
    files = list(index["layers"].values())
    kinds = [index["files"][file]["tensors"]["residual"]["dtype"] for file in files]
    example = _EXAMPLES[index["format"]].format(file=files[-1])
    if index["format"] == "numpy" and "bfloat16" in kinds:
        example = example.replace(files[-1], files[kinds.index("bfloat16")]) + _BFLOAT16
    shown = index | {"layers": format_ranges([int(layer) for layer in index["layers"]])}
    return _README.format(**shown, ending=FORMATS[index["format"]], example=example)
