"""Caches of images: what lenses say at the class token and at each patch, layer by layer."""

from typing import TYPE_CHECKING

from ....cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .class_token_study import study_vision as study_vision
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
