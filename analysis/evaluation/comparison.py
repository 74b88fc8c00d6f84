"""A probe's logits beside the model's distribution, pair by pair: KL both ways, ranks, top tokens.

`compare_pairs` gives the `Comparison` that `metrics.py` makes measures of. Rows are read in tiles
that stay in the processor's cache (`pair_tiles.py`), where all passes over a tile run one after the
other; results go to `MeasureBuffers`. What remains for the single numbers of a row is done once for
all tiles. On the CPU, numpy's kernels find maxima and sum products, where torch takes several times
as long; a GPU runs torch's.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .distributions import MeasureBuffers, Reference, top_token
from .pair_tiles import as_rows, default_tile_rows, matching_tiles

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

    `targets` `(n,)` are the numbers of the pairs in `reference`, and `rows` `(n,)` those of their
    rows in `logits`; both are ascending and default to 0 to n - 1. `rank_limit` is the limit of
    `rank_of`. `buffers` limit the rows that are compared at once; default `pair_tiles.TILE_BYTES`.

    Sums run over the vocabulary. 0 log 0 is 0, and rounding below 0 is cut. Logarithms come from
    logits: a probability that underflows to 0 adds 0 to the sum that the probability weighs, and a
    finite value to the other sum.
    """
    import torch

    targets = np.arange(len(logits)) if targets is None else targets
    rows = np.arange(len(targets)) if rows is None else rows
    if buffers is None:
        tile_rows = min(len(targets), default_tile_rows(logits.shape[-1], logits.device))
        buffers = MeasureBuffers(tile_rows, logits.shape[-1], logits.device)
    target_rows, logit_rows = (
        torch.from_numpy(numbers).to(logits.device) for numbers in (targets, rows)
    )
    # The model's top token and the text's token.
    tokens = torch.stack([reference.top[target_rows], reference.text[target_rows].clamp_min(0)])
    counts = _RankCounts(logits[logit_rows, tokens], logits.shape[-1], rank_limit)
    sums = _RowSums(counts.token_logit[0])
    with np.errstate(invalid="ignore", over="ignore"):
        for tile in matching_tiles(targets, rows, buffers.rows):
            z = logits[as_rows(rows[tile])]
            sums.write_tile(tile, z, reference.log_p[as_rows(targets[tile])], buffers)
            counts.write_tile(tile, z, buffers)

    defined = logits[logit_rows, sums.top].isfinite()
    to_repeat = sums.without_result() & defined & reference.defined[target_rows]
    for pair in to_repeat.nonzero()[:, 0].tolist():
        sums.repeat(pair, logits[rows[pair]], reference.log_p[targets[pair]])
    kl, reverse, nll = sums.divergences(counts.token_logit)
    ranks = counts.ranks(logits, logit_rows, tokens)
    return Comparison(
        defined=defined,
        top=sums.top,
        kl=kl,
        reverse=reverse,
        nll=(nll[0], nll[1]),
        ranks=(ranks[0], ranks[1]),
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
    counts = _RankCounts(logits[rows, token[None]], vocab, limit)
    for start in range(0, n, buffers.rows):
        tile = slice(start, min(n, start + buffers.rows))
        counts.write_tile(tile, logits[tile], buffers)
    return counts.ranks(logits, rows, token[None])[0]


class _RowSums:
    """Sums over the vocabulary for each of n rows, written tile by tile of rows."""

    def __init__(self, shift: "torch.Tensor") -> None:
        import torch

        self.top = torch.empty(len(shift), dtype=torch.int64, device=shift.device)
        """Token of the largest logit, `(n,)`."""
        self.shift = shift.clone()
        """What logits are less by before they are exponentiated, `(n,)`: any logit of the row that
        is not far below the largest. `compare_pairs` takes that of the model's top token, known
        before the row is read; rows whose sums overflow are repeated with the largest logit."""
        self.total = torch.empty_like(shift)
        """Sum of exp(logits - shift), `(n,)`."""
        self.weighted = shift.new_empty(2, len(shift))
        """Sums of p, and of exp(logits - shift), times (log p - log q), `(2, n)`."""

    def write_tile(
        self, tile: slice, logits: "torch.Tensor", log_p: "torch.Tensor", buffers: MeasureBuffers
    ) -> None:
        """Write the sums of the rows `tile`, from matrices `(rows of the tile, vocab)`."""
        import torch

        n, total = tile.stop - tile.start, self.total[tile]
        self.top[tile] = top_token(logits)
        log_q, p_and_q = buffers.log_q[:n], buffers.pair[:, :n]
        torch.sub(logits, self.shift[tile, None], out=log_q)
        torch.exp(log_q, out=p_and_q[1])
        torch.exp(log_p, out=p_and_q[0])
        torch.sum(p_and_q[1], -1, out=total)
        log_q.sub_(total.log()[:, None])
        # Both sums from one matrix of differences, which takes the place of log q. The difference
        # of the logarithms is summed and not p log p and p log q alone: these are equal in most
        # digits where the probe is good.
        difference = torch.sub(log_p, log_q, out=log_q)
        if logits.device.type == "cpu":
            # A product of matrices for each row: BLAS reads both once and writes no matrix.
            np.matmul(
                p_and_q.numpy()[:, :, None, :],
                difference.numpy()[:, :, None],
                out=self.weighted[:, tile].numpy()[:, :, None, None],
            )
        else:
            torch.linalg.vecdot(p_and_q, difference, out=self.weighted[:, tile])

    def without_result(self) -> "torch.Tensor":
        """Whether a sum of each row is infinite or NaN, `(n,)` bool."""
        return ~(self.weighted.isfinite().all(0) & self.total.isfinite())

    def repeat(self, row: int, logits: "torch.Tensor", log_p: "torch.Tensor") -> None:
        """Write the sums of one `row`, of `(vocab,)` logits, without the tokens of no mass.

        A token that one side gives no mass adds nothing to that side's sum, even where the other
        side excludes the token (0 * inf).
        """
        self.shift[row] = logits[self.top[row]]
        log_q = logits.log_softmax(-1)
        p, powers = log_p.exp(), (logits - self.shift[row]).exp_()
        self.total[row] = powers.sum()
        difference = log_p - log_q
        self.weighted[0, row] = (p * difference).masked_fill_(p == 0, 0.0).sum()
        self.weighted[1, row] = (powers * difference).masked_fill_(powers == 0, 0.0).sum()

    def divergences(
        self, token_logit: "torch.Tensor"
    ) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
        """KL(p || q), KL(q || p) `(n,)`; -log q of the tokens with `token_logit` `(2, n)`."""
        kl, reverse = self.weighted[0], self.weighted[1].neg().div_(self.total)
        nll = (self.shift - token_logit).add_(self.total.log())
        return kl.clamp_min(0.0), reverse.clamp_min_(0.0), nll


class _RankCounts:
    """Counts that rank some tokens in each of n rows of logits, written tile by tile of rows."""

    def __init__(self, token_logit: "torch.Tensor", vocab: int, limit: int | None) -> None:
        self.token_logit = token_logit
        """Logits of the tokens, `(tokens, n)`."""
        self.vocab, self.limit = vocab, vocab if limit is None else min(limit, vocab)
        self._not_above = token_logit.new_empty(token_logit.shape)
        """Number of logits that are not above that of the token."""
        self._equal = token_logit.new_ones(token_logit.shape)
        """Number of equal logits, its own included; right where the rank is below the limit."""

    def write_tile(self, tile: slice, logits: "torch.Tensor", buffers: MeasureBuffers) -> None:
        """Write the counts of the rows `tile`, whose `logits` are `(rows of the tile, vocab)`."""
        import torch

        matrices = buffers.pair[: len(self.token_logit), : tile.stop - tile.start]
        token_logit = self.token_logit[:, tile, None]
        # Comparisons written as 0.0 and 1.0 take a fifth of the time of those written as booleans.
        # Their float32 sums are exact up to 2**24 tokens. Counts the complement of `>`, because
        # every comparison with NaN is false.
        torch.le(logits, token_logit, out=matrices)
        not_above = torch.sum(matrices, -1, out=self._not_above[:, tile])
        if logits.device.type == "cpu" and not_above.numpy().max() <= self.vocab - self.limit:
            return
        torch.eq(logits, token_logit, out=matrices)
        torch.sum(matrices, -1, out=self._equal[:, tile])

    def ranks(
        self, logits: "torch.Tensor", rows: "torch.Tensor", tokens: "torch.Tensor"
    ) -> "torch.Tensor":
        """Ranks `(tokens, n)` int64 of `tokens` `(tokens, n)` in `rows` `(n,)` of `logits`."""
        import torch

        ranks = self.vocab - self._not_above.long()
        # Ties move a token down. Every token ties with itself; only further ties need the ids.
        tied = ((ranks < self.limit) & (self._equal > 1)).nonzero(as_tuple=True)
        tied_rows, token, token_logit = rows[tied[1]], tokens[tied], self.token_logit[tied]
        if logits.device.type == "cpu":
            lower = [
                np.count_nonzero(logits[row, :own].numpy() == logit)
                for row, own, logit in zip(
                    tied_rows.tolist(), token.tolist(), token_logit.tolist(), strict=True
                )
            ]
            ranks[tied] += torch.tensor(lower, dtype=torch.int64)
        elif len(token):
            ids = torch.arange(self.vocab, device=logits.device)
            equal = logits[tied_rows] == token_logit[:, None]
            ranks[tied] += (equal & (ids < token[:, None])).sum(-1)
        return ranks
