"""Reader and writer of files of Jacobian lenses, the published one and one with means.

`.pt`, the published format (package jlens, github.com/anthropics/jacobian-lens, and lenses on the
hub made with it): a torch file of a dict with `J` (number of a block -> `(d, d)` float16),
`source_layers`, `n_prompts` and `d_model`. Blocks count from 0 and J is that of a block's output,
layer block + 1 of a cache, so that layer 0 (the embeddings) has no place in it.

`.safetensors`: tensors `J.<layer>` `(d, d)` and `mean.<layer>` `(d,)` by the layers of a cache,
float32, with `format`, `depth`, `n_prompts` and `n_positions` among the metadata of the file.

Files are read as tensors only: pickled objects are refused.
"""

import json
import math
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import CorruptError, ModelError, NotFoundError, UsageError
from ...cache.files.json_fields import checking_fields, digest_field
from ...cache.files.json_files import make_folder, sync_folder, write_atomically
from ...cache.files.paths import open_new
from ...cache.files.read_errors import check_readable, read_file
from ...cache.format.manifest import MAX_DEPTH
from ...cache.model.safetensors_header import read_header
from ..base.saved_tensors import SavedTensors
from .jacobian_lens import JacobianLens, check_shape

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

FORMAT = "jacobian-lens/1"
"""`format` in the metadata of a .safetensors file."""
MAX_WIDTH = 1 << 17
"""Most rows of a Jacobian."""
MAX_COUNT = 1 << 62
"""Most prompts or positions."""


def read_jacobian_lens(
    path: str | Path,
    cache: "ActivationCache | None" = None,
    *,
    offsets: int | tuple[int, ...] = 0,
    centered: bool | None = None,
) -> JacobianLens:
    """Read a file of a Jacobian lens, .pt or .safetensors.

    With a `cache`, width and depth must be those of its model (`MismatchError`), and a `centered`
    lens takes the means that its file lacks from the train split. `centered` defaults to whether
    the file has means. Raises `NotFoundError` without the file, and `CorruptError` for a file that
    holds something else than tensors of such a lens, before memory is taken for them.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(
            f"there is no file {path}; expected a Jacobian lens, .pt or .safetensors"
        )
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"PK":
        lens = _read_torch(path)
    elif path.suffix == ".safetensors":
        lens = _read_safetensors(path)
    else:
        raise CorruptError(
            f"{path} is no Jacobian lens: expected a torch file of tensors (.pt of torch 1.6 or "
            "newer) or .safetensors; other pickles are refused"
        )
    if cache is not None:
        check_shape(lens, cache)
    wants_means = bool(lens.means_) if centered is None else centered
    if wants_means and not lens.means_ and cache is not None:
        lens = lens.with_means(cache)
    return lens.with_options(offsets=offsets, centered=wants_means)


def write_jacobian_lens(lens: JacobianLens, path: str | Path) -> Path:
    """Write a lens as .pt in the published format, or as .safetensors with its means.

    The published format has float16 Jacobians of block outputs: layer 0 and the means are left
    out, and values beyond float16 are refused (`UsageError`).
    """
    lens.check_fitted()
    path = Path(path)
    make_folder(path.parent)
    if path.suffix == ".safetensors":
        write_atomically(path, _safetensors_bytes(lens))
    elif path.suffix == ".pt":
        _write_torch(lens, path)
    else:
        raise UsageError(f"a Jacobian lens is written as .pt or .safetensors, not {path.name!r}")
    return path


# The published format


def _read_torch(path: Path) -> JacobianLens:
    """The lens of a torch file in the published format."""
    import pickle

    import torch

    _check_zip(path)
    check_readable(path)
    try:
        # Memory-mapped: nothing is allocated before shapes are checked.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CorruptError(
            f"{path} holds pickled objects beside tensors, which are never run: save the Jacobians "
            f"alone ({_first_line(error)})"
        ) from None
    except (RuntimeError, EOFError, AttributeError, TypeError, ValueError, KeyError) as error:
        raise CorruptError(f"{path} is no torch file of tensors: {_first_line(error)}") from None
    matrices = content.get("J", content) if isinstance(content, dict) else None
    if not isinstance(matrices, dict) or not matrices:
        keys = sorted(map(str, content))[:8] if isinstance(content, dict) else type(content)
        raise CorruptError(
            f"{path} is no Jacobian lens: expected a dict with 'J', Jacobians by the number of "
            f"their block; found {keys}"
        )
    jacobians, size = {}, path.stat().st_size
    for block, matrix in matrices.items():
        if type(block) is not int or not 0 <= block < MAX_DEPTH:
            raise CorruptError(f"{path} has a Jacobian of block {str(block)[:40]!r}, not a number")
        _check_matrix(matrix, f"{path}: Jacobian of block {block}", size)
        size -= matrix.nbytes
        jacobians[block + 1] = matrix
    n_prompts = content.get("n_prompts")
    return JacobianLens.of(
        {layer: matrix.float().numpy() for layer, matrix in jacobians.items()},
        n_prompts=n_prompts if type(n_prompts) is int and 0 <= n_prompts < MAX_COUNT else None,
    )


def _check_zip(path: Path) -> None:
    """Raise `CorruptError` unless the archive stores its entries without compression."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CorruptError(f"{path} is no whole torch file: {_first_line(error)}") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CorruptError(f"{path} is compressed, which torch files are not")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CorruptError(f"{path} promises more bytes than it has")


def _check_matrix(matrix: Any, where: str, bytes_left: int) -> None:
    """Raise `CorruptError` unless `matrix` is a dense square tensor of floats of the file."""
    import torch

    if type(matrix) is not torch.Tensor or matrix.layout != torch.strided:
        raise CorruptError(f"{where} is no tensor")
    shape, is_square = tuple(matrix.shape), matrix.ndim == 2 and len(set(matrix.shape)) == 1
    if not is_square or not 1 <= shape[0] <= MAX_WIDTH or not matrix.is_floating_point():
        raise CorruptError(
            f"{where} has shape {shape} of {matrix.dtype}; expected (d, d) of floats"
        )
    # A tensor of stride 0 names more numbers than the file holds.
    if matrix.device.type != "cpu" or matrix.nbytes > bytes_left:
        raise CorruptError(f"{where} has {matrix.nbytes} bytes, more than the file holds")


def _write_torch(lens: JacobianLens, path: Path) -> None:
    """Write the published format, durably."""
    import torch

    halves: dict[int, torch.Tensor] = {}
    for layer, matrix in lens.jacobians_.items():
        if layer == 0:
            continue
        half = torch.from_numpy(np.ascontiguousarray(matrix)).half()
        if not bool(half.isfinite().all()):
            raise UsageError(
                f"the Jacobian of layer {layer} has values beyond float16, which the published "
                "format has; write .safetensors"
            )
        halves[layer - 1] = half
    if not halves:
        raise UsageError("the published format has no place for layer 0; write .safetensors")
    content = {
        "J": halves,
        "n_prompts": lens.n_prompts_ or 0,
        "source_layers": sorted(halves),
        "d_model": lens.n_features_in_,
    }
    temporary = path.with_name(f".{path.name}.tmp")
    with open_new(temporary) as file:
        torch.save(content, file)
    sync_folder(temporary)
    temporary.replace(path)
    sync_folder(path.parent)


# The format with means


def _read_safetensors(path: Path) -> JacobianLens:
    """The lens of a .safetensors file."""
    try:
        entries = read_header(path)
    except ModelError as error:
        raise CorruptError(str(error)) from None
    layers: dict[str, list[int]] = {"J": [], "mean": []}
    for name, entry in entries.items():
        kind, _, number = name.partition(".")
        is_layer = number.isdecimal() and number.isascii() and int(number[:9]) <= MAX_DEPTH
        if kind not in layers or not is_layer or math.prod(entry.shape) > MAX_WIDTH**2:
            raise CorruptError(
                f"{path} is no Jacobian lens: expected tensors J.<layer> and mean.<layer>, found "
                f"{name[:40]!r} of shape {entry.shape}"
            )
        layers[kind].append(int(number))
    if not layers["J"]:
        raise CorruptError(f"{path} is no Jacobian lens: it has no tensor J.<layer>")
    data = read_file(path)
    tensors = SavedTensors.parse(data, path)
    width = entries[f"J.{layers['J'][0]}"].shape[0]
    about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    return JacobianLens.of(
        {layer: tensors.array(f"J.{layer}", (width, width)) for layer in layers["J"]},
        {layer: tensors.array(f"mean.{layer}", (width,)) for layer in layers["mean"]},
        depth=_metadata_number(about, "depth", path, MAX_DEPTH),
        n_prompts=_metadata_number(about, "n_prompts", path),
        n_positions=_metadata_number(about, "n_positions", path),
        geometry=_metadata_digest(about, path),
    )


def _metadata_number(about: Any, name: str, path: Path, most: int = MAX_COUNT) -> int | None:
    """A whole number of the metadata of a .safetensors file; None if it is missing."""
    text = about.get(name) if isinstance(about, dict) else None
    if text is None:
        return None
    if not isinstance(text, str) or not text.isdecimal() or not int(text[:20]) <= most:
        raise CorruptError(f"{path}: {name} is {str(text)[:40]!r}, not a whole number")
    return int(text)


def _metadata_digest(about: dict[str, Any], path: Path) -> str | None:
    """Digest of the head in the metadata; None if it is missing."""
    with checking_fields(path, "a Jacobian lens"):
        return None if about.get("geometry") is None else digest_field(about, "geometry")


def _safetensors_bytes(lens: JacobianLens) -> bytes:
    """The bytes of a .safetensors file of `lens`."""
    from safetensors.numpy import save

    tensors = {f"J.{layer}": matrix for layer, matrix in lens.jacobians_.items()}
    tensors |= {f"mean.{layer}": mean for layer, mean in lens.means_.items()}
    about = {
        "depth": lens.depth_,
        "n_prompts": lens.n_prompts_,
        "n_positions": lens.n_positions_,
        "geometry": lens.geometry_,
    }
    metadata = {name: str(value) for name, value in about.items() if value is not None}
    return save(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
        {"format": FORMAT, **metadata},
    )


def _first_line(error: Exception) -> str:
    """First line of an error's message, at most 200 characters."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
