"""Reloads the model of an existing cache, after a check of its identity: `load_model_of`.

`damage_repair.py` runs damaged parts again with it; causal bases (`analysis/basis`) measure their
influence in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks.reference_rows import check_reference_rows
from ..devices import choose_device
from ..errors import MismatchError, ModelError, ResiduaError, UsageError
from ..files.confined_files import read_confined_json
from ..model.source import ModelSource
from ..optional_libraries import require_extra
from ..store.activation_cache import ActivationCache
from ..store.local_origin import read_origin
from .given_inputs import LOADED
from .resolve import describe, differing_fields

if TYPE_CHECKING:
    import torch

    from ..model.blocks import DecoderBlocks


def load_model_of(
    cache: ActivationCache,
    model: "str | Path | torch.nn.Module | None" = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> "DecoderBlocks":
    """The decoder blocks of the model that `cache` was extracted from, loaded on `device`.

    `model` is the present folder or hub id of the model, or the loaded model itself, which stays on
    its device; default the one of the extraction. Code that comes with the model runs only with
    `trust_remote_code`. Raises `MismatchError` if the model, its head or its rows are not those of
    the cache, `ModelError` if no model is found.
    """
    require_extra("extract", "running a model")
    from ..checks.model_checks import recheck_model

    with hold_cache_model(cache, model, device, trust_remote_code) as (_, module):
        blocks = recheck_model(module, cache)
        check_reference_rows(blocks, cache.path, cache.manifest.capture.compute_dtype)
    return blocks


@contextmanager
def hold_cache_model(
    cache: ActivationCache,
    model: "str | Path | torch.nn.Module | None",
    device: str,
    trust_remote_code: bool,
    tokenizer: Any = None,
) -> Iterator[tuple[ModelSource, "torch.nn.Module"]]:
    """Context with the model of `cache`, found by its identity, and its source.

    Its rows are not checked. Raises as `find_cache_model` does, for a loaded `model` too.
    """
    from ..model.loaded_model import attention_of, hold_loaded_model, is_loaded_model
    from ..model.model_loading import load_model

    cache.check_texts(
        "its model reads pixels, which the cache does not keep, so that nothing runs it again but "
        "`residua extract` with the images"
    )
    attention = cache.manifest.capture.attention
    if is_loaded_model(model):
        if tokenizer is None:  # the cache keeps a copy
            with suppress(ResiduaError, OSError):
                tokenizer = cache.tokenizer()
        with hold_loaded_model(model, tokenizer) as source:
            _check_identity(source, cache)
            if attention_of(source.module) != attention:
                raise MismatchError(
                    f"the rows of this cache were made with attention {attention!r}, the loaded "
                    f"model runs with {attention_of(source.module)!r}"
                )
            yield source, source.module
        return
    if tokenizer is not None:
        raise UsageError("a tokenizer is given beside a loaded model; leave it out")
    name = None if model is None else str(model)
    source = find_cache_model(cache, name, trust_remote_code)
    yield source, load_model(source, choose_device(device), attention, trust_remote_code)


def find_cache_model(
    cache: ActivationCache, model: str | None, trust_remote_code: bool
) -> ModelSource:
    """Find the files of the model of `cache`, by its identity; nothing is loaded.

    `model` overrides the folder or hub id that the cache remembers. Raises `MismatchError` for
    another model, `ModelError` if no model is found, if the cache is of a model that was given in
    Python, or if its code needs `trust_remote_code`.
    """
    manifest = cache.manifest
    if model is None and _was_given(cache):
        raise ModelError(
            f"this cache was extracted from a loaded model ({manifest.model_name}), which lies in "
            "no folder: give the model again (in Python model=..., with its tokenizer), or save it "
            "with save_pretrained and name the folder (--model)"
        )
    name = model or read_origin(cache.path).get("model", manifest.model_name)
    try:
        source = ModelSource.locate(name, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ModelError(f"{error}; say where the model is with --model") from None
    if manifest.model.code is not None and not trust_remote_code:
        raise ModelError(
            "the model of this cache ran code of its own; give --trust-remote-code to run that of "
            f"{source.name} again"
        )
    _check_identity(source, cache)
    return source


def _check_identity(source: ModelSource, cache: ActivationCache) -> None:
    """Raise `MismatchError` unless the model is the cache's."""
    manifest = cache.manifest
    identity = source.identity_for_format(manifest.format)
    if identity != manifest.model:
        differences = differing_fields(asdict(identity), asdict(manifest.model))
        raise MismatchError(
            f"{source.name} is not the model of this cache ({describe(differences)}); say where "
            "the model is with --model"
        )


def _was_given(cache: ActivationCache) -> bool:
    """Whether the model of the cache was given in Python, and lies in no folder."""
    try:
        return bool(read_confined_json(cache.path, "provenance.json").get(LOADED))
    except (ResiduaError, OSError):
        return False
