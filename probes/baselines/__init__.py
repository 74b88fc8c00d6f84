"""Baselines that count tokens."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .ngrams import Bigram as Bigram
    from .ngrams import CrossFittedBigram as CrossFittedBigram
    from .token_counts import CountBaseline as CountBaseline
    from .token_counts import unfitted_baselines as unfitted_baselines
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
