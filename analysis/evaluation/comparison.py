"""A probe's logits beside the model's distribution, pair by pair: KL both ways, ranks, top tokens.

`compare_pairs` gives the `Comparison` that `metrics.py` makes measures of. Rows are read in tiles
that stay in the processor's cache (`row_tiles.py`), where all passes over a tile run one after the
other; results go to `MeasureBuffers`. What remains for the single numbers of a row is done once for
all tiles. On the CPU, numpy's kernels find maxima and sum products, where torch takes several times
as long; a GPU runs torch's.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .distributions import MeasureBuffers, Reference, top_token
from .row_tiles import as_rows, default_tile_rows, matching_tiles

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Comparison:
    """A probe's distribution q beside the model's p for n pairs; divergences in nats."""

    defined: "torch.Tensor"
    """Whether the probe's logits are a distribution, `(n,)` bool."""
    top: "torch.Tensor"
    """The probe's top token, the lowest id on ties, `(n,)` int64."""
    kl: "torch.Tensor"
    """KL(model || probe) = sum p (log p - log q), `(n,)` float32."""
    reverse: "torch.Tensor"
    """KL(probe || model) = sum q (log q - log p), `(n,)` float32."""
    nll: "tuple[torch.Tensor, torch.Tensor]"
    """-log q of the model's top token, and of the text's next token, each `(n,)` float32.

    Of token 0 where the text ends."""
    ranks: "tuple[torch.Tensor, torch.Tensor]"
    """Ranks of these two tokens in the probe's order, each `(n,)` int64, see `rank_of`."""


def compare_pairs(
    reference: Reference,
    logits: "torch.Tensor",
    targets: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    *,
    rank_limit: int | None = None,
    buffers: MeasureBuffers | None = None,
) -> Comparison:
    """Compare rows of a probe's `logits`, `(any, vocab)` float32, with rows of the `reference`.

    `targets` `(n,)` are the numbers of the pairs in `reference`, ascending, and `rows` `(n,)` those
    of their rows in `logits`; both default to 0 to n - 1. `rank_limit` is the limit of `rank_of`.
    `buffers` limit the rows that are compared at once; default `row_tiles.TILE_BYTES`.

    From one exp; sums run over the vocabulary. 0 log 0 is 0, and rounding below 0 is cut.
    Logarithms come from logits: a probability that underflows to 0 adds 0 to the sum that the
    probability weighs, and a finite value to the other sum.
    """
    import torch

    targets = np.arange(len(logits)) if targets is None else targets
    rows = np.arange(len(targets)) if rows is None else rows
    n, vocab = len(targets), logits.shape[-1]
    if buffers is None:
        tile_rows = min(n, default_tile_rows(vocab, logits.device))
        buffers = MeasureBuffers(tile_rows, vocab, logits.device)
    target_rows, logit_rows = (
        torch.from_numpy(numbers).to(logits.device) for numbers in (targets, rows)
    )
    tokens = reference.top[target_rows], reference.text[target_rows].clamp_min(0)
    counts = [
        _RankCounts(logits[logit_rows, token], vocab, vocab if rank_limit is None else rank_limit)
        for token in tokens
    ]
    sums = _RowSums(n, logits)

    with np.errstate(invalid="ignore", over="ignore"):
        for tile in matching_tiles(targets, rows, buffers.rows):
            model, z = as_rows(targets[tile]), logits[as_rows(rows[tile])]
            sums.write_tile(tile, z, reference.log_p[model], reference.p[model], buffers)
            for count in counts:
                count.write_tile(tile, z, buffers)

    defined = sums.largest.isfinite()
    kl, reverse = sums.kl, sums.reverse.neg_().div_(sums.total)
    # A token without mass adds nothing, even where the other side excludes the token (0 * inf).
    infinite = ~(kl.isfinite() & reverse.isfinite())
    for pair in (infinite & defined & reference.defined[target_rows]).nonzero()[:, 0].tolist():
        kl[pair], reverse[pair] = _divergences_of_masses(
            reference.log_p[targets[pair]], reference.p[targets[pair]], logits[rows[pair]]
        )
    log_total = sums.total.log()
    nll, text_nll = ((sums.largest - count.token_logit).add_(log_total) for count in counts)
    rank, text_rank = (
        count.ranks(logits, logit_rows, token) for count, token in zip(counts, tokens, strict=True)
    )
    return Comparison(
        defined=defined,
        top=sums.top,
        kl=kl.clamp_min_(0.0),
        reverse=reverse.clamp_min_(0.0),
        nll=(nll, text_nll),
        ranks=(rank, text_rank),
    )


def rank_of(
    logits: "torch.Tensor",
    token: "torch.Tensor",
    limit: int | None = None,
    buffers: MeasureBuffers | None = None,
) -> "torch.Tensor":
    """Rank of `token` by logit, 0 for the largest, `(n,)` int64; lower ids come first on ties.

    A NaN comes before every number, and a token with the logit NaN comes last. With `limit`, ranks
    of `limit` or more do not count the tokens that tie. The matrices of `buffers` are written to.
    """
    import torch

    n, vocab = logits.shape
    buffers = buffers or MeasureBuffers(n, vocab, logits.device)
    rows = torch.arange(n, device=logits.device)
    counts = _RankCounts(logits[rows, token], vocab, vocab if limit is None else limit)
    for start in range(0, n, buffers.rows):
        tile = slice(start, min(n, start + buffers.rows))
        counts.write_tile(tile, logits[tile], buffers)
    return counts.ranks(logits, rows, token)


class _RowSums:
    """Numbers of each row of a comparison, `(n,)`, written tile by tile."""

    def __init__(self, n: int, like: "torch.Tensor") -> None:
        import torch

        self.top = torch.empty(n, dtype=torch.int64, device=like.device)
        """Tokens of the largest logits."""
        self.largest, self.total, self.kl, self.reverse = like.new_empty(4, n)
        """Largest logit; sum of exp(logit - largest); sum p (log p - log q); sum of these
        exponentials times (log p - log q)."""

    def write_tile(
        self,
        tile: slice,
        logits: "torch.Tensor",
        log_p: "torch.Tensor",
        p: "torch.Tensor",
        buffers: MeasureBuffers,
    ) -> None:
        """Write the numbers of the rows `tile`, from matrices `(rows of the tile, vocab)`."""
        import torch

        largest, total = self.largest[tile], self.total[tile]
        top = top_token(logits)
        self.top[tile] = top
        torch.gather(logits, -1, top[:, None], out=largest[:, None])
        log_q, q = buffers.log_q[: len(logits)], buffers.q[: len(logits)]
        # log q = logits - largest - log(total), and q the probabilities times the total.
        torch.sub(logits, largest[:, None], out=log_q)
        torch.exp(log_q, out=q)
        torch.sum(q, -1, out=total)
        log_q.sub_(total.log()[:, None])
        # Both sums from one matrix of differences, which takes the place of log q. The difference
        # of the logarithms is summed and not p log p and p log q alone: these are equal in most
        # digits where the probe is good.
        difference = torch.sub(log_p, log_q, out=log_q)
        write_product_sums(p, difference, self.kl[tile])
        write_product_sums(q, difference, self.reverse[tile])


class _RankCounts:
    """Counts that rank one token in each of n rows of logits, written tile by tile."""

    def __init__(self, token_logit: "torch.Tensor", vocab: int, limit: int) -> None:
        self.token_logit, self.vocab, self.limit = token_logit, vocab, limit
        self._not_above = token_logit.new_empty(len(token_logit))
        """Tokens whose logit is not above that of the token."""
        self._equal = token_logit.new_ones(len(token_logit))
        """Tokens with the same logit, itself included; only where the rank is below the limit."""

    def write_tile(self, tile: slice, logits: "torch.Tensor", buffers: MeasureBuffers) -> None:
        """Write the counts of the rows `tile`, whose `logits` are `(rows of the tile, vocab)`."""
        import torch

        matrix, token_logit = buffers.q[: len(logits)], self.token_logit[tile, None]
        # Comparisons written as 0.0 and 1.0 take a fifth of the time of those written as booleans.
        # Their float32 sums are exact up to 2**24 tokens. Counts the complement of `>`, because
        # every comparison with NaN is false.
        not_above = torch.sum(
            torch.le(logits, token_logit, out=matrix), -1, out=self._not_above[tile]
        )
        if logits.device.type == "cpu" and not_above.numpy().max() <= self.vocab - self.limit:
            return
        torch.sum(torch.eq(logits, token_logit, out=matrix), -1, out=self._equal[tile])

    def ranks(
        self, logits: "torch.Tensor", rows: "torch.Tensor", token: "torch.Tensor"
    ) -> "torch.Tensor":
        """The ranks of `token` `(n,)` in `rows` `(n,)` of `logits` `(any, vocab)`, int64."""
        import torch

        rank = self.vocab - self._not_above.long()
        # Ties move a token down. Every token ties with itself; only further ties need the ids.
        tied = ((rank < self.limit) & (self._equal > 1)).nonzero()[:, 0]
        if logits.device.type == "cpu":
            for pair, row, own in zip(
                tied.tolist(), rows[tied].tolist(), token[tied].tolist(), strict=True
            ):
                lower_ids = logits[row, :own].numpy()
                rank[pair] += int(np.count_nonzero(lower_ids == self.token_logit[pair].item()))
        elif len(tied):
            ids = torch.arange(self.vocab, device=logits.device)
            equal = logits[rows[tied]] == self.token_logit[tied, None]
            rank[tied] += (equal & (ids < token[tied, None])).sum(-1)
        return rank


def write_product_sums(a: "torch.Tensor", b: "torch.Tensor", out: "torch.Tensor") -> None:
    """Write the sums over the vocabulary of a * b, two matrices `(n, vocab)`, into `out` `(n,)`."""
    import torch

    if a.device.type == "cpu":
        # A product of matrices for each row: BLAS reads both once and writes no matrix.
        np.matmul(a.numpy()[:, None, :], b.numpy()[:, :, None], out=out.numpy()[:, None, None])
    else:
        torch.linalg.vecdot(a, b, out=out)


def _divergences_of_masses(
    log_p: "torch.Tensor", p: "torch.Tensor", logits: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """KL(p || q) and KL(q || p) of one row `(vocab,)`, without the tokens that have no mass."""
    log_q = logits.log_softmax(-1)
    q = log_q.exp()
    difference = log_p - log_q
    kl = (p * difference).masked_fill_(p == 0, 0.0).sum()
    return kl, -(q * difference).masked_fill_(q == 0, 0.0).sum()
