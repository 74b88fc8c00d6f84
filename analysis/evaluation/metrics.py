"""Measures a probe's distribution against the model's: sums per document, rows with intervals.

Logits are a distribution where their largest one is finite: -inf excludes a token, while NaN, +inf
or nothing but -inf leave the softmax undefined. Undefined positions are NaN in every sum that they
enter, and so None in the `Row`: they never count as a hit, and are never left out of a mean.
"""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.files.json_files import plain_value

if TYPE_CHECKING:
    import torch

KS = (1, 5, 10)
"""The k of precision@k."""
RESAMPLES = 500
"""Bootstrap resamples of the documents behind an interval."""
TILE_BYTES = 4 << 20
"""Float32 logits that are measured at once: what is made of them stays near the processor."""
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
"""What is summed over positions, in this order."""


@dataclass(frozen=True)
class EvaluationRow:
    """Measures of one probe at one layer and offset, means over `n` positions; nats, shares.

    A measure is None where it is undefined at one of the positions at least; see `n_undefined`.
    """

    probe: str
    layer: int | None
    """Layer whose residual stream was read; None for a probe that reads tokens only."""
    offset: int
    n: int
    """Number of pairs (t, t+N), the undefined ones among them."""
    n_undefined: int
    """Pairs at which the model's or the probe's logits are no distribution (NaN, +inf)."""
    kl: float | None
    """KL(model || probe); infinite if the probe excludes what the model gives mass to."""
    kl_low: float | None
    """Lower end of the 95 % interval of `kl`; None with fewer than two documents."""
    kl_high: float | None
    kl_reverse: float | None
    """KL(probe || model); infinite if the probe gives mass to what the model's logits exclude."""
    precision_at_1: float | None
    """Share of positions where the probe's first token is the model's."""
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
        """All fields as JSON has them: plain numbers, None also for what is infinite."""
        return plain_value(asdict(self))


def ascending_kl(row: EvaluationRow) -> float:
    """Key that sorts rows by KL, undefined ones last."""
    return math.inf if row.kl is None else row.kl


def precision(row: EvaluationRow) -> float:
    """Key that sorts rows by precision@1, undefined ones below every number."""
    return -1.0 if row.precision_at_1 is None else row.precision_at_1


def shown(value: float | None, digits: int) -> str:
    """A measure for people: `1.234`, `inf`, or `undefined`."""
    return "undefined" if value is None else f"{value:.{digits}f}"


@dataclass(frozen=True)
class Reference:
    """The model's distribution at target positions, computed once and shared by all probes."""

    log_p: "torch.Tensor"
    """`(n, vocab)` float32."""
    p: "torch.Tensor"
    """`(n, vocab)` float32."""
    top: "torch.Tensor"
    """The model's top token, the lowest id on ties, `(n,)` int64."""
    text: "torch.Tensor"
    """The text's next token, -1 at the end of a sequence, `(n,)` int64."""
    defined: "torch.Tensor"
    """Whether the model's logits are a distribution, `(n,)` bool."""

    @classmethod
    def of(cls, logits: "torch.Tensor", text: "torch.Tensor") -> "Reference":
        """From the model's logits `(n, vocab)` and the text's next tokens `(n,)`."""
        logits = logits.float()
        log_p, top = logits.log_softmax(-1), first_max(logits)
        return cls(log_p, log_p.exp(), top, text, is_distribution(logits, top))

    @property
    def confidence(self) -> np.ndarray:
        """The model's largest probability, `(n,)` float32; NaN where it is undefined."""
        return _pick(self.p, self.top).cpu().numpy()

    def take(self, index: np.ndarray) -> "Reference":
        """The targets `index`, `(m,)` increasing numbers; no copy if they are neighbours."""
        first, last = int(index[0]), int(index[-1])
        rows = slice(first, last + 1) if last - first + 1 == len(index) else index
        return Reference(
            self.log_p[rows], self.p[rows], self.top[rows], self.text[rows], self.defined[rows]
        )


def first_max(logits: "torch.Tensor") -> "torch.Tensor":
    """The lowest id among the largest logits, `(n,)` int64 (torch promises the first maximum).

    A NaN counts as the largest.
    """
    return logits.argmax(-1)


def is_distribution(logits: "torch.Tensor", top: "torch.Tensor") -> "torch.Tensor":
    """Whether the softmax of each row is defined, `(n,)` bool; `top` is that of `first_max`."""
    return _pick(logits, top).isfinite()


def rank_of(logits: "torch.Tensor", token: "torch.Tensor") -> "torch.Tensor":
    """Number of tokens that come before `token`, larger logits and then lower ids, `(n,)` int64.

    A NaN comes before every number, and a token whose own logit is NaN comes last.
    """
    import torch

    own = logits.gather(-1, token[:, None])
    # The complement: every comparison with NaN is false.
    rank = logits.shape[-1] - _count(logits <= own)
    ties = logits == own
    if int(_count(ties).sum()) > len(token):
        ids = torch.arange(logits.shape[-1], device=logits.device)
        rank += _count(ties & (ids < token[:, None]))
    return rank


def _count(mask: "torch.Tensor") -> "torch.Tensor":
    """True values per row, `(n,)` int64; numpy counts five times as fast as torch on a CPU."""
    import torch

    if mask.device.type != "cpu":
        return mask.sum(-1)
    return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=-1))


def divergences(
    reference: Reference, logits: "torch.Tensor", top: "torch.Tensor"
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """log of the probe's probabilities, KL(model || probe) and KL(probe || model) in nats.

    `(n, vocab)` and twice `(n,)` float32, with one exp; `top` are the largest logits' tokens.
    0 log 0 is 0, and rounding below 0 is cut. Logarithms come from logits: a probability that
    underflows to 0 adds 0 on its own side, and what it costs the other side stays finite.
    """
    log_q = logits - logits.gather(-1, top[:, None])
    q = log_q.exp()  # times `total`, to save a pass
    total = q.sum(-1)
    log_q.sub_(total.log()[:, None])
    terms = reference.log_p - log_q
    reverse = -q.mul_(terms).sum(-1).div_(total)
    kl = terms.mul_(reference.p).sum(-1)
    # A token without mass adds nothing, even where the other side excludes it (0 * inf).
    if not bool(kl.isfinite().all()):
        kl = terms.masked_fill_(reference.p == 0, 0.0).sum(-1)
    if not bool(reverse.isfinite().all()):
        reverse = -q.masked_fill_(log_q.exp() == 0, 0.0).sum(-1).div_(total)
    return log_q, kl.clamp_min_(0.0), reverse.clamp_min_(0.0)


def measure_distribution(reference: Reference, logits: "torch.Tensor") -> "torch.Tensor":
    """The values of `COLUMNS` for every position, `(n, columns)` float64; float32 log-softmax."""
    import torch

    logits = logits.float()
    top = first_max(logits)
    log_q, kl, reverse = divergences(reference, logits, top)
    known = reference.text >= 0
    text = reference.text.clamp_min(0)
    rank, rank_text = rank_of(logits, reference.top), rank_of(logits, text)
    zero = torch.zeros((), device=logits.device)
    against_model = [
        kl,
        reverse,
        *(rank < k for k in KS),
        -_pick(log_q, reference.top),
        -_pick(reference.log_p, top),
    ]
    against_text = [
        torch.where(known, -_pick(log_q, text), zero),
        *((rank_text < k) & known for k in KS),
    ]
    own = is_distribution(logits, top)
    both = own & reference.defined
    columns = [torch.ones_like(known), ~both, *against_model, known, *against_text]
    found = torch.stack([column.double() for column in columns], dim=-1)
    if not bool(both.all()):
        first, text_first = COLUMNS.index("kl"), COLUMNS.index("nll_text")
        found[~both, first : first + len(against_model)] = math.nan
        found[~own & known, text_first:] = math.nan
    return found


def _pick(values: "torch.Tensor", token: "torch.Tensor") -> "torch.Tensor":
    return values.gather(-1, token[:, None])[:, 0]


class MetricSums:
    """Running sums of `COLUMNS` per group of positions, `(groups, columns)` float64; order-free.

    A group is a document where a row is asked for, or else what is resampled.
    """

    def __init__(self, groups: int) -> None:
        self.sums = np.zeros((groups, len(COLUMNS)))

    def add(
        self,
        slots: np.ndarray,
        reference: Reference,
        logits: "torch.Tensor",
        targets: np.ndarray | None = None,
    ) -> None:
        """Add positions of the groups `slots` `(n,)` with the probe's `logits` `(n, vocab)`.

        `targets` `(n,)` are their numbers in `reference`, increasing; by default all of them.
        """
        targets = np.arange(len(slots)) if targets is None else targets
        rows = max(1, TILE_BYTES // (4 * logits.shape[-1]))
        for start in range(0, len(slots), rows):
            here = slice(start, start + rows)
            found = measure_distribution(reference.take(targets[here]), logits[here])
            np.add.at(self.sums, slots[here], found.cpu().numpy())

    def merge(self, other: "MetricSums") -> None:
        """Add the sums that another pass made over the same groups."""
        self.sums += other.sums

    def by(self, unit: np.ndarray, units: int) -> "MetricSums":
        """The sums per document; group i is part of `unit[i]`, or of none where that is -1."""
        found, kept = MetricSums(units), unit >= 0
        np.add.at(found.sums, unit[kept], self.sums[kept])
        return found

    def row(
        self, probe: str, layer: int | None, offset: int, weights: np.ndarray
    ) -> EvaluationRow | None:
        """Means and 95 % intervals, with the resamples of `resampling`; None without a pair."""
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
        low, high = self._interval("precision_at_1", weights)
        return EvaluationRow(
            probe=probe,
            layer=layer,
            offset=offset,
            n=n,
            n_undefined=n_undefined,
            n_text=n_text,
            kl_low=kl_low,
            kl_high=kl_high,
            precision_at_1_low=low,
            precision_at_1_high=high,
            **means,
        )

    def _interval(self, name: str, weights: np.ndarray) -> tuple[float | None, float | None]:
        """Percentile bootstrap over documents of the mean `name` (Efron, 1979).

        Positions of one document are alike: whole documents are drawn (a cluster bootstrap).
        """
        n, values = self.sums[:, 0], self.sums[:, COLUMNS.index(name)]
        if np.count_nonzero(n) < 2 or not np.isfinite(values).all():
            return None, None
        drawn = weights @ n
        means = (weights @ values)[drawn > 0] / drawn[drawn > 0]
        low, high = np.percentile(means, (2.5, 97.5))
        return float(low), float(high)


def resampling_counts(units: int, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each resample draws each unit (a document), `(resamples, units)` float64."""
    rng = np.random.default_rng(seed)
    share = np.full(units, 1 / units)
    return rng.multinomial(units, share, size=resamples).astype(np.float64)
