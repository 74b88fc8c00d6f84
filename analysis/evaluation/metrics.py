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

from ...cache.devices import copy_to_host
from ...cache.files.json_files import plain_value
from ...probes.base.resampling import Interval, bootstrap_interval
from .comparison import compare_pairs
from .distributions import MeasureBuffers, Reference

if TYPE_CHECKING:
    import torch

KS = (1, 5, 10)
"""The k of precision@k."""
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
    "confidence",
)
"""Measures that are summed over positions, in the order of the columns of `MetricSums`.

`confidence` is the probe's own largest probability."""


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
        return plain_value({**asdict(self), "probe": str(self.probe)})


def kl_sort_key(row: EvaluationRow) -> float:
    """Key that sorts rows by KL, undefined KL last."""
    return math.inf if row.kl is None else row.kl


def precision_sort_key(row: EvaluationRow) -> float:
    """Key that sorts rows by precision@1, undefined precision below every number."""
    return -1.0 if row.precision_at_1 is None else row.precision_at_1


def format_measure(value: float | None, digits: int) -> str:
    """A measure as text: `1.234`, `inf`, or `undefined`."""
    return "undefined" if value is None else f"{value:.{digits}f}"


def measure_distribution(
    reference: Reference,
    logits: "torch.Tensor",
    targets: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    *,
    buffers: MeasureBuffers | None = None,
) -> "torch.Tensor":
    """The measures `COLUMNS` of every pair, `(n, columns)` float64 on the CPU.

    `logits` are the probe's, `(any, vocab)`; the softmax is float32. `targets` `(n,)` are the
    numbers of the pairs in `reference`, and `rows` `(n,)` those of their rows in `logits`; both
    are ascending and default to 0 to n - 1. Needs no float64 of the device.
    """
    import torch

    logits = logits.float()
    targets = np.arange(len(logits)) if targets is None else targets
    compared = compare_pairs(reference, logits, targets, rows, rank_limit=max(KS), buffers=buffers)
    target_rows = torch.from_numpy(targets).to(logits.device)
    has_text = reference.text[target_rows] >= 0
    nll, text_nll = compared.nll
    rank, text_rank = compared.ranks

    # Columns in the order of `COLUMNS`: counts, against the model, against the text.
    against_model = [
        compared.kl,
        compared.reverse,
        *(rank < k for k in KS),
        nll,
        -reference.log_p[target_rows, compared.top],
    ]
    against_text = [
        text_nll.masked_fill_(~has_text, 0.0),
        *((text_rank < k) & has_text for k in KS),
    ]
    both_defined = compared.defined & reference.defined[target_rows]
    columns = [
        torch.ones_like(has_text),
        ~both_defined,
        *against_model,
        has_text,
        *against_text,
        compared.confidence,
    ]
    # One copy from the device, and float64 on the host.
    values = torch.stack([column.float() for column in (*columns, compared.defined)])
    *measured, defined = copy_to_host(values).double()
    measures = torch.stack(measured, dim=-1)

    # Undefined positions are NaN: against the text, only the probe's distribution matters.
    undefined = measures[:, COLUMNS.index("n_undefined")] > 0
    if bool(undefined.any()):
        first, first_text = COLUMNS.index("kl"), COLUMNS.index("nll_text")
        measures[undefined, first : first + len(against_model)] = math.nan
        text_undefined = (defined == 0) & (measures[:, COLUMNS.index("n_text")] > 0)
        measures[text_undefined, first_text : COLUMNS.index("confidence")] = math.nan
        measures[defined == 0, COLUMNS.index("confidence")] = math.nan
    return measures


class MetricSums:
    """Running sums of `COLUMNS` per group of positions, `(groups, columns)` float64.

    The order of the additions does not matter. A group is a cell of a `BucketTally` while windows
    are read, and a document when rows are made.
    """

    def __init__(self, groups: int) -> None:
        self.sums: np.ndarray = np.zeros((groups, len(COLUMNS)))

    def add(
        self,
        groups: np.ndarray,
        reference: Reference,
        logits: "torch.Tensor",
        targets: np.ndarray | None = None,
        *,
        rows: np.ndarray | None = None,
        buffers: MeasureBuffers | None = None,
    ) -> None:
        """Add positions of `groups` `(n,)` with the probe's `logits`.

        `targets`, `rows` and `buffers` are those of `measure_distribution`.
        """
        measures = measure_distribution(reference, logits, targets, rows, buffers=buffers)
        self.add_measures(groups, measures.numpy())

    def add_measures(self, groups: np.ndarray, measures: np.ndarray) -> None:
        """Add `measures` `(n, columns)` of positions of `groups` `(n,)`."""
        np.add.at(self.sums, groups, measures)

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
        del total["confidence"]
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
