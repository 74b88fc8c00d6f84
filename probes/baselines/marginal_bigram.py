"""Marginalised bigrams: a bigram taken several steps further, over the tokens that are not seen."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import UsageError
from ..base.readout import ReadoutBatch
from .ngrams import Bigram
from .token_counts import row_sums, tokens_of

if TYPE_CHECKING:
    import torch
    from scipy.sparse import csr_matrix

    from ...cache.store.activation_cache import ActivationCache


class MarginalBigram(Bigram):
    """The model's distribution at t, taken N bigram steps further: sum_x p_t(x) P(. | x) at N = 1.

    p_t is the head on the last layer at t, P the `Bigram` of the train split; step by step the
    tokens x[t+1] to x[t+N] are summed out, so that it reads none of them. The fair floor for
    probes at offsets N >= 1: they beat it only by what the state knows of later tokens beyond the
    next one (marginalisation over next tokens: Mehra et al., 2502.09419).

    Its pairs are those of the last layer. A row takes as many products a step as there are
    distinct pairs. float32.
    """

    kind = "marginal"

    def fit(self, cache: "ActivationCache", *, client: Any = None) -> "MarginalBigram":
        """Count the tokens of the train split in one pass, without a residual stream.

        The workers of `client` (of `dask.distributed`), if given, share the sequences.
        """
        super().fit(cache, client=client)
        self.depth_ = cache.n_blocks
        return self

    def pairs(self) -> list[tuple[int | None, int]]:
        """The last layer with every offset."""
        self.check_fitted()
        return [(self.depth_, offset) for offset in self._offsets()]

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """Log-probabilities of the token after t+N, `(n, vocab)` float32."""
        import torch

        if batch.hidden is None:
            raise UsageError("the marginalised bigram reads the last layer; this batch has none")
        p = batch.head(batch.hidden).softmax(-1).cpu().numpy()
        out = np.log(self.further(p, offset))
        return torch.from_numpy(out).to(batch.hidden.device)

    def further(self, p: np.ndarray, steps: int) -> np.ndarray:
        """Distributions `p` `(n, vocab)` of a token to those `steps` tokens later, float32."""
        self.check_fitted()
        seen, share, unigram = self._transition()
        for _ in range(steps):
            # P = seen + share unigram': the smoothing is of rank one, and never made dense.
            p = np.ascontiguousarray((seen.T @ p.T).T) + np.outer(p @ share, unigram)
        return p

    def _transition(self) -> "tuple[csr_matrix, np.ndarray, np.ndarray]":
        """c(a, b) / (c(a) + T(a)), T(a) / (c(a) + T(a)) and the unigram; float32."""
        if not hasattr(self, "_parts"):
            from scipy.sparse import csr_matrix

            types = np.diff(self.counts_.indptr)
            count = row_sums(self.counts_)
            share = np.where(count > 0, types / np.maximum(count + types, 1), 1.0)
            values = self.counts_.data / np.repeat(count + types, types)
            parts = values.astype(np.float32), self.counts_.indices, self.counts_.indptr
            seen = csr_matrix(parts, shape=self.counts_.shape)
            self._parts = seen, share.astype(np.float32), self.unigram_.astype(np.float32)
        return self._parts

    def _tensors(self) -> dict[str, np.ndarray]:
        return {**super()._tensors(), "depth": np.array([self.depth_])}

    def _read(self, tensors: dict[str, np.ndarray]) -> None:
        super()._read(tensors)
        self.depth_ = int(tensors["depth"][0])


class BigramChain(MarginalBigram):
    """The bigram from x[t] alone, N + 1 steps on: the row of x[t] in the (N+1)-th power of P.

    What `LaggedBigram` counts at a distance, a chain of neighbours computes; the two differ by
    what text is beyond a Markov chain. Only the rows that are asked for are computed.
    """

    kind = "chain"
    least_offset = 0

    def __init__(
        self, offsets: int | Iterable[int] = (0, 1, 2, 3), across_documents: bool = False
    ) -> None:
        super().__init__(offsets, across_documents)

    def pairs(self) -> list[tuple[int | None, int]]:
        """Layer None with every offset."""
        return [(None, offset) for offset in self._offsets()]

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """Log-probabilities of the token N+1 after `batch.token`, `(n, vocab)` float32."""
        import torch

        tokens, row = np.unique(tokens_of(batch.token), return_inverse=True)
        p = self.further(np.exp(self.log_probabilities(tokens)), offset)
        return torch.from_numpy(np.log(p)[row]).to(batch.last_token.device)
