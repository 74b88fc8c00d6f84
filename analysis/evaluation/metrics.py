"""KL, precision@k, NLL and surprisal of a probe against the model, with bootstrap intervals.

`measure_distribution` gives the measures of every position, `MetricSums` adds them up per document,
and `MetricSums.row` makes an `EvaluationRow` of means and 95 % intervals. `evaluate` reaches them
through `BucketTally` (confidence_buckets.py).

Logits are a distribution where the largest logit is finite: -inf excludes a token, while NaN, +inf
or nothing but -inf leave the softmax undefined. Undefined positions are NaN in every sum that they
enter, and so None in the `EvaluationRow`: they never count as a hit, and are never left out of a
mean.
"""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.files.json_files import plain_value
from ...probes.base.resampling import Interval, bootstrap_interval

if TYPE_CHECKING:
    import torch

KS = (1, 5, 10)
"""The k of precision@k."""
TILE_BYTES = 4 << 20
"""Bytes of float32 logits measured at once: intermediate results stay in the processor's cache."""
COLUMNS = (
    "n",
    "n_undefined",
    "kl",
    "kl_reverse",
    *(f"precision_at_{k}" for k in KS),
    "nll",
    "surprisal",
    "n_text",
    "nll_text",
    *(f"precision_at_{k}_text" for k in KS),
)
"""Measures that are summed over positions, in the order of the columns of `MetricSums`."""


@dataclass(frozen=True)
class EvaluationRow:
    """Means of one probe's measures over `n` pairs at one layer and offset; nats, shares.

    A measure is None if the measure is undefined for at least one pair; see `n_undefined`.
    """

    probe: str
    layer: int | None
    """Layer whose residual stream was read; None for a probe that reads tokens only."""
    offset: int
    n: int
    """Number of pairs (t, t+N), undefined pairs included."""
    n_undefined: int
    """Pairs at which the model's or the probe's logits are no distribution (NaN, +inf)."""
    kl: float | None
    """KL(model || probe); infinite if the probe excludes a token that the model gives mass to."""
    kl_low: float | None
    """Lower end of the 95 % interval of `kl`; None with fewer than two documents."""
    kl_high: float | None
    kl_reverse: float | None
    """KL(probe || model); infinite if the probe gives mass to a token that the model excludes."""
    precision_at_1: float | None
    """Share of pairs for which the probe's top token is the model's."""
    precision_at_1_low: float | None
    precision_at_1_high: float | None
    precision_at_5: float | None
    precision_at_10: float | None
    nll: float | None
    """-log of the probe's probability of the model's top token."""
    surprisal: float | None
    """-log of the model's probability of the probe's top token (Din et al., 2303.09435)."""
    n_text: int
    """Pairs for which the text goes on after t+N."""
    nll_text: float | None
    """-log of the probe's probability of the text's token x[t+N+1]."""
    precision_at_1_text: float | None
    precision_at_5_text: float | None
    precision_at_10_text: float | None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain numbers for JSON; None for undefined and for infinite measures."""
        return plain_value(asdict(self))


def kl_sort_key(row: EvaluationRow) -> float:
    """Key that sorts rows by KL, undefined KL last."""
    return math.inf if row.kl is None else row.kl


def precision_sort_key(row: EvaluationRow) -> float:
    """Key that sorts rows by precision@1, undefined precision below every number."""
    return -1.0 if row.precision_at_1 is None else row.precision_at_1


def format_measure(value: float | None, digits: int) -> str:
    """A measure as text: `1.234`, `inf`, or `undefined`."""
    return "undefined" if value is None else f"{value:.{digits}f}"


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
    def of(cls, logits: "torch.Tensor", text: "torch.Tensor") -> "Reference":
        """The reference of the model's logits `(n, vocab)` and the text's next tokens `(n,)`."""
        logits = logits.float()
        log_p, top = logits.log_softmax(-1), top_token(logits)
        return cls(log_p, log_p.exp(), top, text, is_distribution(logits, top))

    @property
    def confidence(self) -> np.ndarray:
        """The model's largest probability, `(n,)` float32; NaN where undefined."""
        return _value_at(self.p, self.top).cpu().numpy()

    def take(self, index: np.ndarray) -> "Reference":
        """The targets `index`, `(m,)` ascending numbers; no copy if they are neighbours."""
        first, last = int(index[0]), int(index[-1])
        rows = slice(first, last + 1) if last - first + 1 == len(index) else index
        return Reference(
            self.log_p[rows], self.p[rows], self.top[rows], self.text[rows], self.defined[rows]
        )


def top_token(logits: "torch.Tensor") -> "torch.Tensor":
    """The lowest id among the largest logits, `(n,)` int64 (torch promises the first maximum).

    A NaN counts as the largest.
    """
    return logits.argmax(-1)


def is_distribution(logits: "torch.Tensor", top: "torch.Tensor") -> "torch.Tensor":
    """Whether the softmax of each row is defined, `(n,)` bool; `top` comes from `top_token`."""
    return _value_at(logits, top).isfinite()


def rank_of(logits: "torch.Tensor", token: "torch.Tensor") -> "torch.Tensor":
    """Rank of `token` by logit, 0 for the largest, `(n,)` int64; lower ids come first on ties.

    A NaN comes before every number, and a token with the logit NaN comes last.
    """
    import torch

    token_logit = logits.gather(-1, token[:, None])
    # Counts the complement of `<=`, because every comparison with NaN is false.
    rank = logits.shape[-1] - _count_true(logits <= token_logit)
    # Every token ties with itself; only further ties are worth another pass.
    ties = logits == token_logit
    if int(_count_true(ties).sum()) > len(token):
        ids = torch.arange(logits.shape[-1], device=logits.device)
        rank += _count_true(ties & (ids < token[:, None]))
    return rank


def _count_true(mask: "torch.Tensor") -> "torch.Tensor":
    """True values per row, `(n,)` int64; numpy counts five times as fast as torch on a CPU."""
    import torch

    if mask.device.type != "cpu":
        return mask.sum(-1)
    return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=-1))


def divergences(
    reference: Reference, logits: "torch.Tensor", top: "torch.Tensor"
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """Log-probabilities of the probe, KL(model || probe) and KL(probe || model) in nats.

    With p the model's and q the probe's probabilities, sums over the vocabulary:

        KL(model || probe) = sum p (log p - log q),    KL(probe || model) = sum q (log q - log p)

    Returns `(n, vocab)`, `(n,)` and `(n,)` float32, from one exp; `top` are the tokens of the
    probe's largest logits, `(n,)`. 0 log 0 is 0, and rounding below 0 is cut. Logarithms come from
    logits: a probability that underflows to 0 adds 0 to the sum that the probability weighs, and a
    finite value to the other sum.
    """
    # log q = logits - largest - log(total); q holds the probabilities times `total`.
    log_q = logits - logits.gather(-1, top[:, None])
    q = log_q.exp()
    total = q.sum(-1)
    log_q.sub_(total.log()[:, None])
    # Both sums from one matrix of differences, in place.
    difference = reference.log_p - log_q
    reverse = -q.mul_(difference).sum(-1).div_(total)
    kl = difference.mul_(reference.p).sum(-1)
    # A token without mass adds nothing, even where the other side excludes the token (0 * inf).
    if not bool(kl.isfinite().all()):
        kl = difference.masked_fill_(reference.p == 0, 0.0).sum(-1)
    if not bool(reverse.isfinite().all()):
        reverse = -q.masked_fill_(log_q.exp() == 0, 0.0).sum(-1).div_(total)
    return log_q, kl.clamp_min_(0.0), reverse.clamp_min_(0.0)


def measure_distribution(reference: Reference, logits: "torch.Tensor") -> "torch.Tensor":
    """The measures `COLUMNS` of every position, `(n, columns)` float64.

    `logits` are the probe's, `(n, vocab)`; the softmax is float32.
    """
    import torch

    # The probe's distribution, and where each reference token stands in its order.
    logits = logits.float()
    top = top_token(logits)
    log_q, kl, reverse = divergences(reference, logits, top)
    has_text = reference.text >= 0
    text = reference.text.clamp_min(0)
    rank, text_rank = rank_of(logits, reference.top), rank_of(logits, text)

    # Columns in the order of `COLUMNS`: counts, against the model, against the text.
    zero = torch.zeros((), device=logits.device)
    against_model = [
        kl,
        reverse,
        *(rank < k for k in KS),
        -_value_at(log_q, reference.top),
        -_value_at(reference.log_p, top),
    ]
    against_text = [
        torch.where(has_text, -_value_at(log_q, text), zero),
        *((text_rank < k) & has_text for k in KS),
    ]
    probe_defined = is_distribution(logits, top)
    both_defined = probe_defined & reference.defined
    columns = [torch.ones_like(has_text), ~both_defined, *against_model, has_text, *against_text]
    measures = torch.stack([column.double() for column in columns], dim=-1)

    # Undefined positions are NaN: against the text, only the probe's distribution matters.
    if not bool(both_defined.all()):
        first, first_text = COLUMNS.index("kl"), COLUMNS.index("nll_text")
        measures[~both_defined, first : first + len(against_model)] = math.nan
        measures[~probe_defined & has_text, first_text:] = math.nan
    return measures


def _value_at(values: "torch.Tensor", token: "torch.Tensor") -> "torch.Tensor":
    """The value of each row at its `token` `(n,)`, from `values` `(n, vocab)`."""
    return values.gather(-1, token[:, None])[:, 0]


class MetricSums:
    """Running sums of `COLUMNS` per group of positions, `(groups, columns)` float64.

    The order of the additions does not matter. A group is a cell of a `BucketTally` while windows
    are read, and a document when rows are made.
    """

    def __init__(self, groups: int) -> None:
        self.sums = np.zeros((groups, len(COLUMNS)))

    def add(
        self,
        groups: np.ndarray,
        reference: Reference,
        logits: "torch.Tensor",
        targets: np.ndarray | None = None,
    ) -> None:
        """Add positions of `groups` `(n,)` with the probe's `logits` `(n, vocab)`.

        `targets` `(n,)` are the numbers of the positions in `reference`, ascending; default all.
        """
        targets = np.arange(len(groups)) if targets is None else targets
        tile_rows = max(1, TILE_BYTES // (4 * logits.shape[-1]))
        for start in range(0, len(groups), tile_rows):
            tile = slice(start, start + tile_rows)
            measures = measure_distribution(reference.take(targets[tile]), logits[tile])
            np.add.at(self.sums, groups[tile], measures.cpu().numpy())

    def merge(self, other: "MetricSums") -> None:
        """Add the sums of another pass over the same groups."""
        self.sums += other.sums

    def sum_by_unit(self, unit_of_group: np.ndarray, units: int) -> "MetricSums":
        """The sums per unit; group i is part of `unit_of_group[i]`, or of no unit if that is -1."""
        by_unit, in_unit = MetricSums(units), unit_of_group >= 0
        np.add.at(by_unit.sums, unit_of_group[in_unit], self.sums[in_unit])
        return by_unit

    def row(
        self, probe: str, layer: int | None, offset: int, weights: np.ndarray
    ) -> EvaluationRow | None:
        """Means and 95 % intervals over the groups (documents); None without a pair.

        `weights` comes from `resampling_counts`.
        """
        total = dict(zip(COLUMNS, self.sums.sum(0).tolist(), strict=True))
        n, n_text, n_undefined = (int(total.pop(name)) for name in ("n", "n_text", "n_undefined"))
        if n == 0:
            return None
        divisor = {name: n_text if name.endswith("_text") else n for name in total}
        means: dict[str, Any] = {
            name: None if math.isnan(value) or not divisor[name] else value / divisor[name]
            for name, value in total.items()
        }
        kl_low, kl_high = self._interval("kl", weights)
        precision_low, precision_high = self._interval("precision_at_1", weights)
        return EvaluationRow(
            probe=probe,
            layer=layer,
            offset=offset,
            n=n,
            n_undefined=n_undefined,
            n_text=n_text,
            kl_low=kl_low,
            kl_high=kl_high,
            precision_at_1_low=precision_low,
            precision_at_1_high=precision_high,
            **means,
        )

    def _interval(self, name: str, weights: np.ndarray) -> Interval:
        """Interval of the mean `name` over documents, see `bootstrap_interval`."""
        return bootstrap_interval(self.sums[:, 0], self.sums[:, COLUMNS.index(name)], weights)
