"""The unigram baseline: how often each token follows another one, whatever the context."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from .counts import Counted, count_followers, unigram
from .readout import Batch

if TYPE_CHECKING:
    import torch

    from ..cache.store import ActivationCache


class Unigram(Counted):
    """P(b) = (c(b) + T / vocab) / (n + T): the marginal of the train split, for every offset.

    `c` counts the tokens that follow another one in their document, which are those that a model
    predicts; `T` of them are distinct. What a probe says that has learnt nothing of its input.
    """

    kind = "unigram"

    counts_: np.ndarray
    """c(b), `(vocab,)` int64."""

    def __init__(
        self, offsets: int | Iterable[int] = (0, 1, 2, 3), across_documents: bool = False
    ) -> None:
        self.offsets = offsets
        self.across_documents = across_documents

    def fit(self, cache: "ActivationCache", *, client: Any = None) -> "Unigram":
        """Count the tokens of the train split in one pass, on the workers of `client` if given."""
        self._start(cache)
        self.counts_ = count_followers(cache, client, self.across_documents)
        self.unigram_ = unigram(self.counts_)
        return self

    def logits(self, batch: Batch, layer: int | None, offset: int) -> "torch.Tensor":
        """The same log-probabilities for every row, `(n, vocab)` float32."""
        import torch

        self.check_fitted()
        row = torch.from_numpy(np.log(self.unigram_).astype(np.float32))
        return row.to(batch.last_token.device).expand(len(batch.last_token), -1)

    def _size(self, offset: int) -> dict[str, int]:
        return {"n": int(self.counts_.sum()), "distinct": int(np.count_nonzero(self.counts_))}

    def _tensors(self) -> dict[str, np.ndarray]:
        return {"count": self.counts_}

    def _read(self, tensors: dict[str, np.ndarray]) -> None:
        self.counts_ = tensors["count"]
