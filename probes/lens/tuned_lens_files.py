"""Reader and writer of lens files of the `tuned-lens` package (Belrose et al., 2303.08112).

Such a lens is a folder with `config.json` and `params.pt`. `params.pt` is the state dict of one
linear layer per layer of the model: `<layer>.weight` `(d, d)` and `<layer>.bias` `(d,)`, applied
as h + weight h + bias; the last layer has none. It is loaded as tensors only: pickled objects are
refused. `read_tuned_lens` gives a `TunedLens`, `write_tuned_lens` writes one.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import CorruptError, MismatchError, NotFoundError, UsageError
from ...cache.files.json_files import make_folder, sync_folder, write_atomically
from ...cache.files.paths import open_new
from ..ridge.solver import AffineMap
from ..saved.save import check_finite
from .tuned_lens import TunedLens

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

LENS_TYPE = "linear_tuned_lens"
"""Only `lens_type` of the package that is read and written here."""


def read_tuned_lens(
    folder: str | Path, cache: "ActivationCache | None" = None, force: bool = False
) -> TunedLens:
    """Read the lens in a folder of the `tuned-lens` package, as a fitted `TunedLens`.

    With a `cache`, the lens must have been made for its width, depth and unembedding
    (`MismatchError`). `force` skips the check of the unembedding, whose hash also differs if only
    the padding of the vocabulary was cut. Raises `NotFoundError`, `CorruptError` or `UsageError`
    for other files, and `UsageError` for a translator with NaN or an infinity, as a diverged fit
    leaves it.
    """
    path = Path(folder)
    config = _read_config(path / "config.json")
    state = _read_params(path / "params.pt")
    check_finite(state, str(path / "params.pt"))
    width, depth = config["d_model"], config["num_hidden_layers"]
    maps = {}
    for layer in range(depth):
        weight, bias = state.get(f"{layer}.weight"), state.get(f"{layer}.bias", np.zeros(width))
        if weight is None or weight.shape != (width, width) or bias.shape != (width,):
            raise CorruptError(
                f"{path / 'params.pt'} has no translator of width {width} for layer {layer}, "
                "which its config.json promises"
            )
        # The package stores h + weight h; an AffineMap is h @ weight.
        maps[layer, 0] = AffineMap(weight.T + np.eye(width, dtype=np.float32), bias)
    geometry = None
    if cache is not None:
        _check_same_model(config, cache, force)
        geometry = cache.head.digest
    return TunedLens.of(maps, geometry)


def write_tuned_lens(
    lens: TunedLens, folder: str | Path, cache: "ActivationCache", revision: str | None = None
) -> Path:
    """Write a fitted lens as the `tuned-lens` package does; `cache` names the model.

    The package has offset 0 only, and needs a translator for every layer except the last
    (`UsageError`). `revision` is the revision of the model on the hub.
    """
    import torch

    lens.check_fitted()
    missing = [la for la in range(cache.n_blocks) if (la, 0) not in lens.maps_]
    if missing:
        raise UsageError(
            f"the tuned-lens package needs every layer at offset 0; this lens lacks {missing}"
        )
    state = {}
    for layer in range(cache.n_blocks):
        affine = lens.maps_[layer, 0].astype(np.float64)
        weight = (affine.weight - np.eye(len(affine.bias))).T
        arrays = {f"{layer}.weight": weight, f"{layer}.bias": affine.bias}
        check_finite(arrays, "this lens")
        for name, array in arrays.items():
            state[name] = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    config = {
        "base_model_name_or_path": cache.manifest.model_name,
        "d_model": cache.d_model,
        "num_hidden_layers": cache.n_blocks,
        "bias": True,
        "base_model_revision": revision,
        "unembed_hash": unembed_hash(cache.head.unembedding),
        "lens_type": LENS_TYPE,
    }
    # The config is written last: a folder with a config is whole.
    path = Path(folder)
    make_folder(path)
    temporary = path / ".params.pt.tmp"
    with open_new(temporary) as file:
        torch.save(state, file)
    sync_folder(temporary)
    temporary.replace(path / "params.pt")
    sync_folder(path)
    write_atomically(path / "config.json", json.dumps(config, allow_nan=False).encode())
    return path


def unembed_hash(unembedding: np.ndarray) -> str:
    """The package's hash of a matrix: sha256 of its abbreviated print to one decimal.

    The print shows the corners only: matrices with equal hashes may differ, matrices with
    different hashes do.
    """
    # The package prints with numpy's default options; set them, whatever the caller has set.
    with np.printoptions(threshold=1000, edgeitems=3, linewidth=75, suppress=False):
        text = np.array_str(np.asarray(unembedding, np.float32), precision=1)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_config(path: Path) -> dict[str, Any]:
    """The JSON object of `config.json`, with the keys that a lens needs."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFoundError(f"{path} is missing: {path.parent} is no tuned-lens folder") from None
    except ValueError as error:
        raise CorruptError(f"{path} is not JSON: {error}") from None
    numbers = [config.get(key) for key in ("d_model", "num_hidden_layers")]
    if any(type(number) is not int or number < 1 for number in numbers):
        raise CorruptError(f"{path} does not say d_model and num_hidden_layers: {numbers}")
    kind = config.get("lens_type", LENS_TYPE)
    if kind != LENS_TYPE:
        raise UsageError(f"{path} holds a lens of type {kind!r}; only {LENS_TYPE!r} can be read")
    return config


def _read_params(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict as float32 arrays; raises `CorruptError` for other objects."""
    import pickle

    import torch

    if not path.is_file():
        raise NotFoundError(f"{path} is missing: {path.parent} is no tuned-lens folder")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.float().numpy() for name, tensor in state.items()}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptError(f"{path} is not a state dict of tensors: {reason}") from None


def _check_same_model(config: dict[str, Any], cache: "ActivationCache", force: bool) -> None:
    """Raise `MismatchError` unless the lens was made for the model of `cache`."""
    model_name = str(config.get("base_model_name_or_path") or "unknown")
    width, depth = config["d_model"], config["num_hidden_layers"]
    if (width, depth) != (cache.d_model, cache.n_blocks):
        raise MismatchError(
            f"the lens is for width {width} and {depth} layers, this cache has width "
            f"{cache.d_model} and {cache.n_blocks}; take a cache of {model_name}"
        )
    expected = config.get("unembed_hash")
    if expected and not force and expected != unembed_hash(cache.head.unembedding):
        raise MismatchError(
            f"the lens was made for another unembedding (model {model_name}) than that of "
            f"{cache.manifest.model_name}; force=True reads the lens all the same"
        )
