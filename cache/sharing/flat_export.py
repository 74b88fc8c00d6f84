"""Exports a cache as plain safetensors or .npy files, for tools that do not read zarr.

`export` is the public function (`residua export`). `flat_files.py` writes the files; the README in
the folder says how to open them.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..files.confined_files import is_regular
from ..files.json_files import file_digest, make_folder, write_json
from ..files.read_errors import read_file
from ..files.staging import publish_folder, staging_folder, sweep_staging
from ..format.dtypes import LARGEST, STORED_DTYPES, encode_rows
from ..number_ranges import as_tuple, format_ranges
from ..progress import Progress
from ..store.activation_cache import BLOCK_BYTES, ActivationCache
from ..store.row_runs import RowRuns
from .flat_files import FORMATS, TensorColumn, check_space, write_errors, write_flat_file

TABLE_ROWS = 1 << 20
"""Rows of a block of one-dimensional arrays."""
STAGING_PREFIX = ".residua-export-"
"""Beginning of the names of folders that are filled beside those of exports."""


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
    """Write `layers` (default: all) of a split into the new `folder`; returns its index.json.

    Each layer is one file with a tensor `(positions, d_model)` in its stored dtype, or in `dtype`.
    `format` is `safetensors` or `numpy`. With `logits`, the logits that the cache keeps are written
    too, in their stored dtypes. `progress(done, total)` counts rows over all layers.

    Rows stream in blocks, and the folder appears whole or not at all. Raises `UsageError` if the
    folder has files or `dtype` cannot hold a value, `NoSpaceError` before any file is written.
    """
    folder = Path(folder).expanduser()
    layers = cache.layers if layers is None else as_tuple(layers, "layers")
    _check_request(cache, folder, format, layers, dtype)
    sequences = cache.sequences(split)
    if not len(sequences):
        raise UsageError(f"the {split} split of this cache has no sequences; choose another")

    # Describe all files, so that their size is known before the first byte is written.
    files = _table_files(cache, sequences, format, logits)
    runs = RowRuns.of(cache, sequences)
    for layer in layers:
        files[f"residual.{layer:02d}"] = [_residual_column(cache, layer, runs, dtype)]
    n_bytes = sum(column.bytes for columns in files.values() for column in columns)

    with write_errors(folder):
        n_bytes += sum(path.stat().st_size for path in _head_files(cache))
        make_folder(folder.parent)
        check_space(folder.parent, n_bytes, "take fewer --layers, one --split, or another disk")
        sweep_staging(folder.parent, f"{STAGING_PREFIX}*.tmp")
        with staging_folder(folder.parent, STAGING_PREFIX, ".tmp") as staging:
            (staging / "head").mkdir()
            for path in _head_files(cache):
                (staging / "head" / path.name).write_bytes(read_file(path))
            entries = _write_files(staging, files, format, progress)
            index = _index(cache, format, split, entries)
            (staging / "README.md").write_text(_readme(index), encoding="utf-8")
            write_json(staging / "index.json", index)
            publish_folder(staging, folder)
    return index


def _check_request(
    cache: ActivationCache, folder: Path, format: str, layers: Sequence[int], dtype: str | None
) -> None:
    """Raise unless the options are known, `folder` is free and `dtype` holds every value."""
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
    """Files of the head that the journal names; links and other files in `head/` are no part."""
    names = sorted(name for name in cache.journal.base()[1] if name.startswith("head/"))
    return [cache.path / name for name in names if is_regular(cache.path, name)]


def _table_files(
    cache: ActivationCache, sequences: np.ndarray, format: str, logits: bool
) -> dict[str, list[TensorColumn]]:
    """File name without ending -> columns, for the arrays of tokens, sequences and logits.

    A .npy file has one column; a safetensors file has all columns of an axis.
    """
    runs = RowRuns.of(cache, sequences)
    tables: dict[str, list[TensorColumn]] = {"tokens": [], "sequences": []}
    for name in sorted(cache.journal.base()[0]):
        axis, _, column = name.partition("/")
        if axis == "tokens":
            tables[axis].append(_token_column(cache, column, sequences, runs))
        elif axis == "sequences":
            tables[axis].append(_sequence_column(cache, column, sequences))
    if logits and cache.logits_names:
        tables["logits"] = [_logits_column(cache, name, runs) for name in cache.logits_names]
    if format == "numpy":
        return {
            f"{axis}.{column.name}": [column]
            for axis, columns in tables.items()
            for column in columns
        }
    # The widest dtype first, so that every tensor is aligned.
    return {
        axis: sorted(columns, key=lambda column: -column.stored.itemsize)
        for axis, columns in tables.items()
    }


def _token_column(
    cache: ActivationCache, name: str, sequences: np.ndarray, runs: RowRuns
) -> TensorColumn:
    """The array `tokens/<name>` at the exported positions; sequences are renumbered from 0."""
    array = cache.array(f"tokens/{name}")

    def blocks() -> Iterator[np.ndarray]:
        for start, stop in runs.pieces(TABLE_ROWS):
            values = array.read_stored(start, stop)
            if name == "sequence":
                values = np.searchsorted(sequences, values).astype(values.dtype)
            yield values

    return TensorColumn(name, np.dtype(array.layout.stored_dtype).name, (len(runs),), blocks)


def _sequence_column(cache: ActivationCache, name: str, sequences: np.ndarray) -> TensorColumn:
    """The array `sequences/<name>` of the exported sequences; `start` counts exported positions."""
    array = cache.array(f"sequences/{name}")

    def blocks() -> Iterator[np.ndarray]:
        values = array.take_stored(sequences)
        if name == "start":
            lengths = cache.sequence_length[sequences]
            values = (np.cumsum(lengths) - lengths).astype(values.dtype)
        yield values

    return TensorColumn(name, np.dtype(array.layout.stored_dtype).name, (len(sequences),), blocks)


def _logits_column(cache: ActivationCache, name: str, runs: RowRuns) -> TensorColumn:
    """The array `name` of kept logits at the exported positions."""
    array = cache.array(name)
    block_rows = max(1, BLOCK_BYTES // array.layout.row_bytes)

    def blocks() -> Iterator[np.ndarray]:
        for start, stop in runs.pieces(block_rows):
            yield array.read_stored(start, stop)

    column = name.partition("/")[2]
    return TensorColumn(column, array.layout.logical_dtype, (len(runs), *array.shape[1:]), blocks)


def _residual_column(
    cache: ActivationCache, layer: int, runs: RowRuns, dtype: str | None
) -> TensorColumn:
    """Layer `layer` at the exported positions, `(positions, d_model)`."""
    array = cache.residual_array(layer)
    stored_dtype = array.layout.logical_dtype

    def blocks() -> Iterator[np.ndarray]:
        for start, stop in runs.pieces(cache.block_rows()):
            if dtype in (None, stored_dtype):
                yield array.read_stored(start, stop)
            else:
                yield encode_rows(array.read(start, stop), dtype)

    return TensorColumn("residual", dtype or stored_dtype, (len(runs), cache.d_model), blocks)


def _write_files(
    folder: Path, files: Mapping[str, list[TensorColumn]], format: str, progress: Progress | None
) -> dict[str, dict[str, Any]]:
    """Write every file; returns file name -> entry of index.json."""
    residual = [c for columns in files.values() for c in columns if c.name == "residual"]
    total = sum(column.shape[0] for column in residual)
    done = 0

    def report_rows(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    entries = {}
    for stem, columns in files.items():
        # Progress counts the rows of layers alone.
        report = report_rows if stem.startswith("residual.") else None
        path = folder / f"{stem}.{FORMATS[format]}"
        entries[path.name] = write_flat_file(path, columns, format, report)
    return entries


def _index(
    cache: ActivationCache, format: str, split: str, entries: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The JSON object of index.json."""
    residual = {name: e for name, e in entries.items() if name.startswith("residual.")}
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
        "files": entries,
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
    """Text of the README.md of an export: the files, and code that opens one file."""
    files = list(index["layers"].values())
    dtypes = [index["files"][file]["tensors"]["residual"]["dtype"] for file in files]
    example = _EXAMPLES[index["format"]].format(file=files[-1])
    if index["format"] == "numpy" and "bfloat16" in dtypes:
        example = example.replace(files[-1], files[dtypes.index("bfloat16")]) + _BFLOAT16
    fields = index | {"layers": format_ranges([int(layer) for layer in index["layers"]])}
    return _README.format(**fields, ending=FORMATS[index["format"]], example=example)
