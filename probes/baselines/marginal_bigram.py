"""Marginalised bigrams: a distribution over one token, taken N bigram steps further.

`MarginalBigram` begins with the model's distribution at t, `BigramChain` with the bigram row of
x[t]; both sum out the tokens between and read none of them. Counts are those of `Bigram`.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import UsageError
from ...cache.progress import Auto, Progress
from ..base.readout import ReadoutBatch
from ..base.saved_tensors import SavedTensors
from .ngrams import Bigram
from .token_counts import row_sums, token_array

if TYPE_CHECKING:
    import torch
    from scipy.sparse import csr_matrix

    from ...cache.store.activation_cache import ActivationCache


class MarginalBigram(Bigram):
    """The model's distribution at t, taken N bigram steps further: sum_x p_t(x) P(. | x) at N = 1.

    p_t is the head on the last layer at t, P the `Bigram` of the train split; step by step the
    tokens x[t+1] to x[t+N] are summed out, and none of them is read. The fair floor for probes at
    offsets N >= 1: they beat this baseline only by what the state knows of later tokens beyond the
    next one (marginalisation over next tokens: Mehra et al., 2502.09419).

    The layer of its pairs is the last one. A row takes one product per distinct pair in each step.
    float32.
    """

    kind = "marginal"

    def fit(
        self,
        cache: "ActivationCache",
        *,
        client: Any = None,
        progress: Progress | Auto | None = "auto",
    ) -> "MarginalBigram":
        """Count the tokens of the train split in one pass, without a residual stream.

        The workers of `client` (of `dask.distributed`), if given, share the sequences. `progress`
        is "auto" (bars in a terminal or notebook, elsewhere lines of the logger `residua`), None
        (nothing), or a function that is called with (tokens read, tokens to read).
        """
        super().fit(cache, client=client, progress=progress)
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
        log_p = np.log(self.distribution_after(p, offset))
        return torch.from_numpy(log_p).to(batch.hidden.device)

    def distribution_after(self, p: np.ndarray, steps: int) -> np.ndarray:
        """p P^steps: from distributions `p` `(n, vocab)` of a token to the token `steps` later.

        float32.
        """
        self.check_fitted()
        counted, share, unigram = self._transition()
        for _ in range(steps):
            # P = counted + share unigram': the smoothing is of rank one, and never made dense.
            p = np.ascontiguousarray((counted.T @ p.T).T) + np.outer(p @ share, unigram)
        return p

    def _transition(self) -> "tuple[csr_matrix, np.ndarray, np.ndarray]":
        """P in parts: c(a, b) / (c(a) + T(a)), T(a) / (c(a) + T(a)), and the unigram; float32."""
        if not hasattr(self, "_transition_parts"):
            from scipy.sparse import csr_matrix

            types = np.diff(self.counts_.indptr)
            count = row_sums(self.counts_)
            share = np.where(count > 0, types / np.maximum(count + types, 1), 1.0)
            values = self.counts_.data / np.repeat(count + types, types)
            entries = values.astype(np.float32), self.counts_.indices, self.counts_.indptr
            self._transition_parts = (
                csr_matrix(entries, shape=self.counts_.shape),
                share.astype(np.float32),
                self.unigram_.astype(np.float32),
            )
        return self._transition_parts

    def _saved_tensors(self) -> dict[str, np.ndarray]:
        return {**super()._saved_tensors(), "depth": np.array([self.depth_])}

    def _restore_tensors(self, tensors: SavedTensors) -> None:
        super()._restore_tensors(tensors)
        self.depth_: int = int(tensors.array("depth", (1,), "iu")[0])


class BigramChain(MarginalBigram):
    """The bigram from x[t] alone, N + 1 steps on: the row of x[t] in the (N+1)-th power of P.

    `LaggedBigram` counts at a distance, the chain multiplies counts of neighbours; the two differ
    by how far the text is from a Markov chain. Only the rows of a batch are computed.
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

        # Each distinct token is computed once.
        tokens, row = np.unique(token_array(batch.token), return_inverse=True)
        p = self.distribution_after(np.exp(self.log_probabilities(tokens)), offset)
        return torch.from_numpy(np.log(p)[row]).to(batch.last_token.device)
