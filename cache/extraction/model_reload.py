"""Reloads the model of an existing cache, after a check of its identity: `load_model_of`.

`damage_repair.py` runs damaged parts again with it; causal bases (`analysis/basis`) measure their
influence in it.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING

from ..checks.reference_rows import check_reference_rows
from ..devices import choose_device
from ..errors import MismatchError, ModelError
from ..model.source import ModelSource
from ..optional_libraries import require_extra
from ..store.activation_cache import ActivationCache
from ..store.local_origin import read_origin
from .resolve import describe, differing_fields

if TYPE_CHECKING:
    import torch

    from ..model.blocks import DecoderBlocks


def load_model_of(
    cache: ActivationCache,
    model: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> "DecoderBlocks":
    """The decoder blocks of the model that `cache` was extracted from, loaded on `device`.

    `model` is the present folder or hub id of the model; default the one of the extraction. Code
    that comes with the model runs only with `trust_remote_code`. Raises `MismatchError` if the
    model, its head or its rows are not those of the cache, `ModelError` if no model is found.
    """
    require_extra("extract", "running a model")
    from ..checks.model_checks import recheck_model

    _, module = load_cache_model(cache, model, device, trust_remote_code)
    blocks = recheck_model(module, cache)
    check_reference_rows(blocks, cache.path, cache.manifest.capture.compute_dtype)
    return blocks


def load_cache_model(
    cache: ActivationCache, model: str | None, device: str, trust_remote_code: bool
) -> tuple[ModelSource, "torch.nn.Module"]:
    """Find and load the model of `cache`, by its identity; its rows are not checked.

    Raises as `find_cache_model` does.
    """
    from ..model.model_loading import load_model

    source = find_cache_model(cache, model, trust_remote_code)
    attention = cache.manifest.capture.attention
    return source, load_model(source, choose_device(device), attention, trust_remote_code)


def find_cache_model(
    cache: ActivationCache, model: str | None, trust_remote_code: bool
) -> ModelSource:
    """Find the files of the model of `cache`, by its identity; nothing is loaded.

    `model` overrides the folder or hub id that the cache remembers. Raises `MismatchError` for
    another model, `ModelError` if no model is found or its code needs `trust_remote_code`.
    """
    manifest = cache.manifest
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
    identity = source.identity_for_format(manifest.format)
    if identity != manifest.model:
        differences = differing_fields(asdict(identity), asdict(manifest.model))
        raise MismatchError(
            f"{source.name} is not the model of this cache ({describe(differences)}); say where "
            "the model is with --model"
        )
    return source
