"""Loads a model to be resumed from its layers: `load_model`."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..devices import choose_device
from ..errors import UsageError
from ..extraction.model_reload import load_model_of
from ..model.block_search import find_blocks
from ..model.loaded_model import check_loaded_module, is_loaded_model
from ..model.model_loading import load_model as load_whole_model
from ..model.source import ModelSource
from ..number_ranges import as_whole_number
from ..optional_libraries import require_extra
from ..store.activation_cache import ActivationCache
from .resumable_model import ResumableModel, random_ids
from .upper_blocks import load_upper_blocks

if TYPE_CHECKING:
    import torch

SEARCH_SHAPE = (4, 48)
"""Shape of the random token ids on which blocks are searched."""


def load_model(
    model: "str | Path | torch.nn.Module | ActivationCache",
    *,
    layer: int = 0,
    device: str = "cpu",
    attention: str = "default",
    trust_remote_code: bool = False,
) -> ResumableModel:
    """The frozen model of a folder, hub id or cache, whose layers can be given: see `resume`.

    `model` may also be a loaded model of transformers, which stays where it is, or a cache, whose
    own model is loaded and compared with its rows. With `layer` only the blocks above it are read
    from the folder, where it allows that: the model then resumes from `layer` and the layers above.

    Raises `ModelError` for a model that is not found, has no decoder blocks, or cannot be resumed
    from `layer`; `MismatchError` if the model of a cache has changed.
    """
    require_extra("extract", "running a model")
    layer = as_whole_number(layer, "layer")
    if layer < 0:
        raise UsageError(f"layer must be 0 or more, not {layer}")
    device = str(choose_device(device))
    if isinstance(model, ActivationCache):
        loaded = ResumableModel(load_model_of(model, None, device, trust_remote_code))
    elif is_loaded_model(model):
        check_loaded_module(model)
        loaded = _resumable(model)  # pyright: ignore[reportArgumentType]
    else:
        source = ModelSource.locate(str(model), trust_remote_code=trust_remote_code)
        partial = load_upper_blocks(source, layer, device, attention) if layer else None
        if partial is not None:
            loaded = _resumable(partial[0])
            if loaded.blocks.name == partial[1]:
                loaded.drop_lower_blocks(layer)
                return loaded
            # Other blocks than those that were left out carry the stream: the whole model is read.
            del loaded, partial
        loaded = _resumable(load_whole_model(source, device, attention, trust_remote_code))
    if layer > loaded.depth:
        raise UsageError(f"the model has layers 0 to {loaded.depth}, there is no layer {layer}")
    if layer and not is_loaded_model(model):
        loaded.drop_lower_blocks(layer)
    return loaded


def _resumable(module: "torch.nn.Module") -> ResumableModel:
    """The blocks of a loaded model, found and checked, ready to be resumed."""
    import torch

    with torch.inference_mode():
        ids = (random_ids(module, SEARCH_SHAPE, seed) for seed in (0, 1))
        blocks = find_blocks(module, *ids)
    return ResumableModel(blocks)
