"""A probe's logits beside the model's distribution, pair by pair: KL both ways, ranks, top tokens.

`compare_pairs` gives the `Comparison` that `metrics.py` makes measures of. Rows are read in tiles
that stay in the processor's cache (`pair_tiles.py`), where all passes over a tile run one after the
other; results go to `MeasureBuffers`. What remains for the single numbers of a row is done once for
all tiles. On the CPU, numpy's kernels find top tokens and sum products, where torch takes several
times as long; a GPU runs torch's.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .distributions import MeasureBuffers, Reference, top_token, value_at
from .pair_tiles import as_rows, default_tile_rows, matching_tiles

if TYPE_CHECKING:
    import torch

SEGMENT = 16
"""Tokens of a segment: ranks come from the largest logits of segments, which takes one pass over
the logits for any number of tokens; counting takes two passes for each."""
GATHERED = 1 << 16
"""Segments whose logits are gathered at once."""


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
    confidence: "torch.Tensor"
    """The probe's largest probability, `(n,)` float32; arbitrary where it is not defined."""


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
    token_logit = logits[logit_rows, tokens]
    ranks = _SegmentRanks(token_logit, logits.shape[-1], rank_limit)
    sums = _RowSums(token_logit[0], value_at(reference.log_p, reference.top)[target_rows])
    with np.errstate(invalid="ignore", over="ignore"):
        for tile in matching_tiles(targets, rows, buffers.rows):
            z, p_rows = logits[as_rows(rows[tile])], as_rows(targets[tile])
            sums.write_tile(tile, z, reference.log_p[p_rows], reference.p[p_rows], buffers)
            ranks.write_tile(tile, z)

    defined = logits[logit_rows, sums.top].isfinite()
    to_repeat = sums.without_result() & defined & reference.defined[target_rows]
    for pair in to_repeat.nonzero()[:, 0].tolist():
        sums.repeat(pair, logits[rows[pair]], reference.log_p[targets[pair]])
    kl, reverse = sums.divergences()
    nll = sums.largest - token_logit - sums.log_top
    top_rank, text_rank = ranks.ranks(logits, logit_rows, tokens)
    return Comparison(
        defined=defined,
        top=sums.top,
        kl=kl,
        reverse=reverse,
        nll=(nll[0], nll[1]),
        ranks=(top_rank, text_rank),
        confidence=sums.log_top.exp(),
    )


def rank_of(
    logits: "torch.Tensor", token: "torch.Tensor", limit: int | None = None
) -> "torch.Tensor":
    """Rank of `token` by logit, 0 for the largest, `(n,)` int64; lower ids come first on ties.

    A NaN comes before every number, and a token with the logit NaN comes last. With `limit`, ranks
    of `limit` or more may be any number from `limit` on.
    """
    import torch

    n, vocab = logits.shape
    rows = torch.arange(n, device=logits.device)
    ranks = _SegmentRanks(logits[rows, token[None]], vocab, limit)
    ranks.write_tile(slice(0, n), logits)
    return ranks.ranks(logits, rows, token[None])[0]


class _RowSums:
    """Sums over the vocabulary for each of n rows, written tile by tile of rows."""

    def __init__(self, token_logit: "torch.Tensor", token_log_p: "torch.Tensor") -> None:
        """`token_logit` and `token_log_p` `(n,)`: the probe's logit of the model's top token, and
        its log p."""
        import torch

        self.top: torch.Tensor = torch.empty(
            len(token_logit), dtype=torch.int64, device=token_logit.device
        )
        """Token of the largest logit, `(n,)`."""
        self.largest: torch.Tensor = torch.empty_like(token_logit)
        """Largest logit, `(n,)`."""
        self.log_top: torch.Tensor = torch.empty_like(token_logit)
        """Logarithm of the largest probability, `(n,)`: log q = logits - largest + log_top."""
        self.shift: torch.Tensor = token_logit - token_log_p
        """What logits are less by where log p is compared with them, `(n,)`: log p and shifted
        logits are equal at the model's top token, and so differ little where the probe is good."""
        self.weighted: torch.Tensor = token_logit.new_empty(2, len(token_logit))
        """Sums of p and of q, times log p - (logits - shift), `(2, n)`."""

    def write_tile(
        self,
        tile: slice,
        logits: "torch.Tensor",
        log_p: "torch.Tensor",
        p: "torch.Tensor",
        buffers: MeasureBuffers,
    ) -> None:
        """Write the sums of the rows `tile`, from matrices `(rows of the tile, vocab)`."""
        import torch

        n = tile.stop - tile.start
        q, difference = buffers.q[:n], buffers.difference[:n]
        top = self.top[tile] = top_token(logits)
        self.largest[tile] = value_at(logits, top)
        torch.softmax(logits, -1, out=q)
        torch.log(value_at(q, top), out=self.log_top[tile])
        # Both sums from one matrix of differences. The difference of the logarithms is summed and
        # not p log p and p log q alone: these are equal in most digits where the probe is good.
        torch.sub(logits, self.shift[tile, None], out=difference)
        torch.sub(log_p, difference, out=difference)
        for side, weights in enumerate((p, q)):
            _sum_products(weights, difference, self.weighted[side, tile])

    def without_result(self) -> "torch.Tensor":
        """Whether a sum of each row is infinite or NaN, `(n,)` bool."""
        return ~self.weighted.isfinite().all(0)

    def repeat(self, row: int, logits: "torch.Tensor", log_p: "torch.Tensor") -> None:
        """Write the sums of one `row`, of `(vocab,)` logits, without the tokens of no mass.

        A token that one side gives no mass adds nothing to that side's sum, even where the other
        side excludes the token (0 * inf).
        """
        self.shift[row] = self.largest[row]
        shifted = logits - self.shift[row]
        difference, log_q = log_p - shifted, shifted + self.log_top[row]
        for side, weights in enumerate((log_p.exp(), log_q.exp())):
            products = (weights * difference).masked_fill_(weights == 0, 0.0)
            self.weighted[side, row] = products.sum()

    def divergences(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """KL(p || q) and KL(q || p), `(n,)`."""
        # log q = (logits - shift) + constant, and both p and q sum to 1.
        constant = self.shift - self.largest + self.log_top
        kl, reverse = self.weighted[0] - constant, constant - self.weighted[1]
        return kl.clamp_min_(0.0), reverse.clamp_min_(0.0)


def _sum_products(a: "torch.Tensor", b: "torch.Tensor", out: "torch.Tensor") -> None:
    """Write the sum of the products of each row of `a` and `b` `(n, vocab)` into `out` `(n,)`."""
    import torch

    if a.device.type == "cpu":
        # A product of matrices for each row: BLAS reads both once and writes no matrix.
        rows, columns = a.numpy()[:, None, :], b.numpy()[:, :, None]
        np.matmul(rows, columns, out=out.numpy()[:, None, None])
    else:
        torch.linalg.vecdot(a, b, out=out)


class _SegmentRanks:
    """Ranks of some tokens in each of n rows of logits.

    The vocabulary is cut into segments of `SEGMENT` tokens, token t in segment t modulo the number
    of segments, and the last few tokens by themselves. A segment whose largest logit is above that
    of a token holds tokens before it: where these are as many as the limit, that is enough. Else
    the logits of the few segments are compared one by one.
    """

    def __init__(self, token_logit: "torch.Tensor", vocab: int, limit: int | None) -> None:
        self.token_logit: torch.Tensor = token_logit
        """Logits of the tokens, `(tokens, n)`."""
        self.limit: int = vocab if limit is None else min(limit, vocab)
        self.segments: int = vocab // SEGMENT
        self.maxima: torch.Tensor = token_logit.new_empty(token_logit.shape[1], self.segments)
        """Largest logit of each segment, `(n, segments)`; NaN if any is NaN."""

    def write_tile(self, tile: slice, logits: "torch.Tensor") -> None:
        """Write the maxima of the rows `tile`, whose `logits` are `(rows of the tile, vocab)`."""
        import torch

        if self.segments:
            in_segments = logits[:, : SEGMENT * self.segments]
            in_segments = in_segments.unflatten(1, (SEGMENT, self.segments))
            torch.amax(in_segments, 1, out=self.maxima[tile])

    def ranks(
        self, logits: "torch.Tensor", rows: "torch.Tensor", tokens: "torch.Tensor"
    ) -> "torch.Tensor":
        """Ranks `(tokens, n)` int64 of `tokens` `(tokens, n)` in `rows` `(n,)` of `logits`."""
        import torch

        token_logit = self.token_logit[..., None]
        # Comparisons with NaN are false: "not less or equal" counts NaN as above, "less" does not.
        ranks = (~(self.maxima <= token_logit)).sum(-1)
        near = ranks < self.limit
        ranks.masked_fill_(near, 0)
        found = (~(self.maxima < token_logit) & near[..., None]).nonzero()
        in_segment = self.segments * torch.arange(SEGMENT, device=logits.device)
        for token, row, segment in (part.unbind(1) for part in found.split(GATHERED)):
            ids = segment[:, None] + in_segment
            before = _is_before(
                logits[rows[row, None], ids],
                self.token_logit[token, row, None],
                ids,
                tokens[token, row, None],
            )
            ranks.index_put_((token, row), before.sum(1), accumulate=True)
        last = torch.arange(SEGMENT * self.segments, logits.shape[1], device=logits.device)
        if len(last):
            before = _is_before(logits[rows[:, None], last], token_logit, last, tokens[..., None])
            ranks += (before & near[..., None]).sum(-1)
        return ranks


def _is_before(
    logits: "torch.Tensor", token_logit: "torch.Tensor", ids: "torch.Tensor", token: "torch.Tensor"
) -> "torch.Tensor":
    """Whether the tokens `ids` with `logits` come before `token`, as `rank_of` says; bool."""
    return ~(logits <= token_logit) | ((logits == token_logit) & (ids < token))
