"""The model's and a probe's distributions at the same positions: KL both ways, ranks, top tokens.

`Reference` is the model's side, computed once for a window of positions; `Divergence.of` and
`rank_of` compare the logits of a probe with it. `metrics.py` makes measures of them.

A matrix `(rows, vocab)` is read as seldom as the measures allow, and none is allocated: results go
to `MeasureBuffers`. On the CPU, numpy's kernels find maxima and sum products, where torch takes
several times as long; a GPU runs torch's.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


class MeasureBuffers:
    """Matrices that the comparison of up to `rows` rows of `vocab` logits writes to."""

    def __init__(self, rows: int, vocab: int, device: "torch.device | str" = "cpu") -> None:
        import torch

        self.rows = rows
        """Most rows of a comparison."""
        self.log_q = torch.empty(rows, vocab, device=device)
        """Log-probabilities of the probe, then differences, then comparisons, float32."""
        self.q = torch.empty_like(self.log_q)
        """Probabilities of the probe times a factor of each row, then comparisons, float32."""


@dataclass(frozen=True)
class Reference:
    """The model's distribution at target positions, computed once and shared by all probes."""

    log_p: "torch.Tensor"
    """Logarithms of the probabilities, `(n, vocab)` float32."""
    p: "torch.Tensor"
    """Probabilities, `(n, vocab)` float32."""
    top: "torch.Tensor"
    """The model's top token, the lowest id on ties, `(n,)` int64."""
    text: "torch.Tensor"
    """The text's next token, -1 at the end of the text, `(n,)` int64."""
    defined: "torch.Tensor"
    """Whether the model's logits are a distribution, `(n,)` bool."""

    @classmethod
    def of(
        cls,
        logits: "torch.Tensor",
        text: "torch.Tensor",
        log_p: "torch.Tensor | None" = None,
        p: "torch.Tensor | None" = None,
    ) -> "Reference":
        """The reference of the model's logits `(n, vocab)` and the text's next tokens `(n,)`.

        `log_p` and `p` `(n, vocab)` float32 are written to; `log_p` may be `logits` itself.
        """
        import torch

        logits = logits.float()
        top = top_token(logits)
        largest = value_at(logits, top)
        # log p = logits - largest - log(total); NaN and +inf end as NaN in the whole row.
        log_p = torch.sub(logits, largest[:, None], out=log_p)
        p = torch.exp(log_p, out=p)
        total = p.sum(-1)
        p.div_(total[:, None])
        log_p.sub_(total.log()[:, None])
        return cls(log_p, p, top, text, largest.isfinite())

    @property
    def confidence(self) -> np.ndarray:
        """The model's largest probability, `(n,)` float32; NaN where undefined."""
        return value_at(self.p, self.top).cpu().numpy()

    def take(self, rows: "slice | np.ndarray") -> "Reference":
        """The targets `rows`; no copy of a slice."""
        return Reference(
            self.log_p[rows],
            self.p[rows],
            self.top[rows],
            self.text[rows],
            self.defined[rows],
        )


@dataclass(frozen=True)
class Divergence:
    """What a probe's distribution q differs by from the model's p, each `(n,)` float32 in nats."""

    kl: "torch.Tensor"
    """KL(model || probe) = sum p (log p - log q)."""
    reverse: "torch.Tensor"
    """KL(probe || model) = sum q (log q - log p)."""
    nll: "torch.Tensor"
    """-log q of the model's top token."""
    nll_text: "torch.Tensor"
    """-log q of the text's next token; of token 0 where the text ends."""

    @classmethod
    def of(
        cls,
        reference: Reference,
        logits: "torch.Tensor",
        top: "torch.Tensor",
        buffers: MeasureBuffers | None = None,
    ) -> "Divergence":
        """Compare the probe's `logits`, `(n, vocab)` float32, with the model; `logits` are kept.

        `top` are the tokens of the probe's largest logits, `(n,)`. From one exp; sums run over the
        vocabulary. 0 log 0 is 0, and rounding below 0 is cut. Logarithms come from logits: a
        probability that underflows to 0 adds 0 to the sum that the probability weighs, and a finite
        value to the other sum.
        """
        import torch

        n = len(logits)
        buffers = buffers or MeasureBuffers(n, logits.shape[-1], logits.device)
        # log q = logits - largest - log(total); q holds the probabilities times `total`.
        log_q = torch.sub(logits, value_at(logits, top)[:, None], out=buffers.log_q[:n])
        q = torch.exp(log_q, out=buffers.q[:n])
        total = q.sum(-1)
        log_q.sub_(total.log()[:, None])
        nll = -value_at(log_q, reference.top)
        nll_text = -value_at(log_q, reference.text.clamp_min(0))
        # Both sums from one matrix of differences, which takes the place of log q. The difference
        # of the logarithms is summed and not p log p and p log q alone: these are equal in most
        # digits where the probe is good.
        difference = torch.sub(reference.log_p, log_q, out=log_q)
        kl = sum_products(reference.p, difference)
        reverse = sum_products(q, difference).neg_().div_(total)
        # A token without mass adds nothing, even where the other side excludes the token (0 * inf).
        if not bool(kl.isfinite().all()):
            kl = (difference * reference.p).masked_fill_(reference.p == 0, 0.0).sum(-1)
        if not bool(reverse.isfinite().all()):
            no_mass = logits.log_softmax(-1).exp_() == 0
            reverse = -(difference * q).masked_fill_(no_mass, 0.0).sum(-1).div_(total)
        return cls(kl.clamp_min_(0.0), reverse.clamp_min_(0.0), nll, nll_text)


def top_token(logits: "torch.Tensor") -> "torch.Tensor":
    """The lowest id among the largest logits, `(n,)` int64.

    A NaN counts as the largest. torch and numpy both promise the first maximum.
    """
    import torch

    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def is_distribution(logits: "torch.Tensor", top: "torch.Tensor") -> "torch.Tensor":
    """Whether the softmax of each row is defined, `(n,)` bool; `top` comes from `top_token`."""
    return value_at(logits, top).isfinite()


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
    token_logit = logits.gather(-1, token[:, None])
    # Comparisons written as 0.0 and 1.0 take a fifth of the time of those written as booleans.
    # Their float32 sums are exact up to 2**24 tokens. Counts the complement of `<=`, because every
    # comparison with NaN is false.
    rank = vocab - torch.le(logits, token_logit, out=buffers.q[:n]).sum(-1).long()

    # Ties move a token down. Every token ties with itself; only further ties need the ids.
    rows = (rank < (vocab if limit is None else limit)).nonzero()[:, 0]
    equal = torch.index_select(logits, 0, rows, out=buffers.log_q[: len(rows)])
    rows = rows[equal.eq_(token_logit[rows]).sum(-1) > 1]
    if len(rows):
        ids = torch.arange(vocab, device=logits.device)
        equal = logits[rows] == token_logit[rows]
        rank[rows] += (equal & (ids < token[rows, None])).sum(-1)
    return rank


def sum_products(a: "torch.Tensor", b: "torch.Tensor") -> "torch.Tensor":
    """Sums over the vocabulary of a * b, two matrices `(n, vocab)`, as `(n,)` float32."""
    import torch

    if a.device.type == "cpu":
        # A product of matrices for each row: BLAS reads both once and writes no matrix.
        with np.errstate(invalid="ignore", over="ignore"):
            return torch.from_numpy((a.numpy()[:, None, :] @ b.numpy()[:, :, None])[:, 0, 0])
    return torch.linalg.vecdot(a, b)


def value_at(values: "torch.Tensor", token: "torch.Tensor") -> "torch.Tensor":
    """The value of each row at its `token` `(n,)`, from `values` `(n, vocab)`."""
    return values.gather(-1, token[:, None])[:, 0]
