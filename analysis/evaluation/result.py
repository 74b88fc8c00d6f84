"""The result of an evaluation as plain data: rows of measures, notes, and on request heatmaps.

`evaluate` makes an `Evaluation`; analysis/report/ draws one as HTML, pictures and tables.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache.format.manifest import SHORT_ID
from ...cache.function_above import call_above
from ...cache.number_ranges import format_ranges
from ...cache.tokens.segments import PairScope, is_of_images
from ...probes.base.readout import Readout
from ...probes.ridge.error_share import ErrorShare
from .confidence_buckets import BucketRow, ResultKey
from .kl_examples import COUNT, KlExamples, find_kl_examples
from .lens_heatmap import Heatmap, heatmaps
from .metrics import EvaluationRow

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes
    from plotly.graph_objects import Figure as PlotlyFigure

    from ...cache.store.activation_cache import ActivationCache

WANTED_WIDTH = 0.05
"""Half width of an interval of KL, as a share of KL, that two probes are usually told apart by."""


@dataclass(frozen=True)
class Evaluation:
    """Measures of probes on held-out text, with the description of the data."""

    rows: list[EvaluationRow]
    """Sorted by offset, probe, layer."""
    buckets: list[BucketRow]
    """The same measures by the model's confidence at t+N: the parts of each row, in row order."""
    cache_id: str
    model_name: str
    data_name: str
    split: str
    seed: int
    n: int
    """Positions evaluated; a pair at offset N also needs t in the sequence and document of t+N."""
    positions: int
    """Positions of the evaluated sequences; more than `n` where a mask leaves some out."""
    sequences: int
    """Number of evaluated sequences."""
    layers: tuple[int, ...]
    offsets: tuple[int, ...]
    probes: tuple[str, ...]
    """Names of the probes, baselines first."""
    across_documents: bool = False
    """Whether pairs may join two documents of a sequence."""
    drop_first: int = 0
    """Positions at the start of each sequence that are no sources t."""
    crossing: dict[int, float] = field(default_factory=dict)
    """Share of the sequences' pairs that join two documents, by offset; `across_documents` says
    whether such pairs are counted."""
    unit: str = "document"
    """Unit that intervals resample: `document`, or `sequence` if all text is one document."""
    units: int = 0
    """Number of evaluated units."""
    shares: dict[ResultKey, ErrorShare] = field(default_factory=dict)
    """Shares of the squared error to residual_L that few pairs make, for ridge and lenses."""
    notes: tuple[str, ...] = ()
    """Sentences that a reader of the numbers needs: undefined measures, layers and offsets that a
    probe lacks, few documents, a baseline that is left out."""
    cache: "ActivationCache | None" = field(default=None, repr=False, compare=False)
    """The evaluated cache; heatmaps read it."""
    readouts: tuple[Readout, ...] = field(default=(), repr=False, compare=False)
    """The probes, in the order of `probes`."""
    where: "np.ndarray | None" = field(default=None, repr=False, compare=False)
    """Mask of the positions whose pairs were counted; examples come from the same."""
    split_positions: int = field(default=0, repr=False, compare=False)
    """Positions of the whole split."""
    device: str = field(default="auto", repr=False, compare=False)
    """Device that heatmaps are computed on."""

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dictionary of plain numbers per row; None for infinite and undefined measures."""
        return [row.to_dict() for row in self.rows]

    def bucket_dicts(self) -> list[dict[str, Any]]:
        """One dictionary of plain numbers per row of `buckets`; None as in `to_dicts`."""
        return [row.to_dict() for row in self.buckets]

    def to_dataframe(self, buckets: bool = False) -> "pd.DataFrame":
        """The rows as a data frame of pandas, one column per field; of `buckets` instead if asked.

        Undefined measures are NaN, and a baseline's layer is <NA>. Raises `MissingLibraryError`
        where pandas is not installed; `to_dicts` gives the same rows without it.
        """
        rows = self.buckets if buckets else self.rows
        return call_above("analysis.display.frames", "rows_frame", rows)

    def plot(
        self,
        measure: str = "kl",
        x: str = "layer",
        *,
        layer: int | Iterable[int] | None = None,
        offset: int | Iterable[int] | None = None,
        probes: str | Iterable[str] | None = None,
        ax: "Axes | None" = None,
        backend: str = "matplotlib",
    ) -> "Axes | PlotlyFigure":
        """Draw a measure of all probes against the layer or the offset, with 95 % intervals.

        Args:
            measure: Field of `EvaluationRow`, such as `kl`, `precision_at_1` (or `precision@1`),
                `nll`, `surprisal`.
            x: `layer`, or `offset` for N.
            layer: With x="offset": the layer that is read, or several. Default the middle one.
            offset: With x="layer": the offset, or several. Default the smallest.
            probes: Names of the probes to draw. Default all.
            ax: Axes of matplotlib to draw on. Default new ones of `matplotlib.pyplot`.
            backend: `matplotlib`, which gives axes, or `plotly`, which gives a figure.

        Raises `UsageError` for an unknown measure, `NotFoundError` for a layer, an offset or a
        probe that was not measured.
        """
        options: dict[str, Any] = {"layer": layer, "offset": offset, "probes": probes}
        return call_above(
            "analysis.display.evaluation_plots",
            "plot_evaluation",
            self,
            measure,
            x,
            ax=ax,
            backend=backend,
            **options,
        )

    def to_png(self, folder: str | Path) -> list[Path]:
        """Write all figures as PNG files into `folder`, 150 dpi, and return their paths.

        Curves of each measure, confidence, the heatmap of every lens, and for several offsets
        `future_lens.png`: precision@1 against N at one layer and against the layer at one N.
        """
        return call_above(
            "analysis.display.evaluation_plots", "write_evaluation_pngs", self, folder
        )

    def __repr__(self) -> str:
        return (
            f"<Evaluation of {', '.join(self.probes)} on cache {self.cache_id[:SHORT_ID]}: "
            f"{self.split} split, {self.n} positions, layers {format_ranges(self.layers)}, offsets "
            f"{format_ranges(self.offsets)}>"
        )

    def _repr_html_(self) -> str:
        """The tables by offset, for notebooks."""
        return call_above("analysis.display.object_html", "evaluation_html", self)

    def about(self) -> dict[str, Any]:
        """Plain values about the data for JSON: split, pairs, unit of the intervals, notes."""
        names = ("split", "seed", "n", "positions", "sequences", "across_documents", "drop_first")
        return {
            **{name: getattr(self, name) for name in names},
            "crossing": {str(offset): share for offset, share in self.crossing.items()},
            "unit": self.unit,
            "units": self.units,
            "squared_errors": [
                {"probe": name, "layer": layer, "offset": offset, **asdict(share)}
                for (name, layer, offset), share in self.shares.items()
            ],
            "notes": list(self.notes),
        }

    def facts(self) -> list[str]:
        """Plain-text sentences on pairs, intervals and squared errors, then the notes."""
        plural = "" if self.units == 1 else "s"
        resampled = f"{self.units:,} {self.unit}{plural}"
        sentences = [f"intervals resample the {resampled} evaluated{self._width_fact()}"]

        shares = [f"{100 * share:.1f} % at N = {n}" for n, share in self.crossing.items() if share]
        if shares:
            treatment = "counted" if self.across_documents else "left out"
            sentences.append(f"pairs that join two documents are {treatment}: {', '.join(shares)}")
        if self.drop_first:
            sentences.append(
                f"the first {self.drop_first} positions of each sequence are no sources"
            )

        # Of each probe, the map whose squared error depends most on few pairs.
        worst_share: dict[str, ErrorShare] = {}
        for key, share in self.shares.items():
            worst = worst_share.get(key.probe)
            if worst is None or (share.top_error or 0) > (worst.top_error or 0):
                worst_share[key.probe] = share
        for name, share in worst_share.items():
            if share.top_error is not None and share.top_target is not None:
                sentences.append(
                    f"{name}: the largest 0.1 % of the pairs make at most "
                    f"{100 * share.top_error:.1f} % of the squared error of a map, and there "
                    f"{100 * share.top_target:.1f} % of the target's variance"
                )
        return [*sentences, *(f"note: {note}" for note in self.notes)]

    @property
    def kl_half_width(self) -> float | None:
        """Half of the 95 % interval of KL as a share of KL, in the median row; None without one."""
        widths = sorted(
            (row.kl_high - row.kl_low) / (2 * row.kl)
            for row in self.rows
            if row.kl and row.kl_low is not None and row.kl_high is not None
        )
        return widths[len(widths) // 2] if widths else None

    def _width_fact(self) -> str:
        """How wide the intervals are, and how many positions would make them `WANTED_WIDTH`."""
        width = self.kl_half_width
        if width is None:
            return ""
        fact = f": KL is known to {100 * width:.1f} % of itself in the median row"
        if width <= WANTED_WIDTH or self.positions >= self.split_positions:
            return fact
        # An interval narrows with the root of the number of documents.
        positions = min(self.split_positions, self.positions * (width / WANTED_WIDTH) ** 2)
        return (
            f"{fact}; for {100 * WANTED_WIDTH:.0f} % take about {positions:,.0f} of the "
            f"{self.split_positions:,} positions of the split (max_positions)"
        )

    def select(self, probe: str, offset: int) -> list[EvaluationRow]:
        """Rows of one probe at one offset, by layer."""
        return [row for row in self.rows if row.probe == probe and row.offset == offset]

    def select_buckets(self, probe: str, offset: int) -> list[BucketRow]:
        """Bucket rows of one probe at one offset, by layer, then by rising confidence."""
        return [row for row in self.buckets if row.probe == probe and row.offset == offset]

    def heatmaps(self, split: str | None = None, passages: int = 1) -> list[Heatmap]:
        """Lens heatmaps of at most `passages` passages of `split` (default: the evaluated split).

        In each, the logit lens and the probes that read layers at offset 0, without controls, which
        say little about a passage; empty without a cache, and for images, which have no text.
        """
        if self.cache is None or is_of_images(self.cache):
            return []
        lenses = {
            name: readout
            for name, readout in zip(self.probes, self.readouts, strict=False)
            if not hasattr(readout, "view")
        }
        return heatmaps(
            self.cache, lenses, split=split or self.split, device=self.device, passages=passages
        )

    def kl_examples(self, count: int = COUNT) -> list[KlExamples]:
        """Pairs with the largest and the smallest KL, of every lens in its middle layer.

        Of the probes that read layers, without controls, at their smallest offset; pairs come from
        the first of the evaluated sequences. Empty without a cache, and for images.
        """
        if self.cache is None or is_of_images(self.cache):
            return []
        found = []
        for name, readout in zip(self.probes, self.readouts, strict=False):
            rows = [row for row in self.rows if row.probe == name and row.layer is not None]
            if not rows or hasattr(readout, "view"):
                continue
            offset = min(row.offset for row in rows)
            layers = sorted(row.layer or 0 for row in rows if row.offset == offset)
            examples = find_kl_examples(
                self.cache,
                readout,
                layer=layers[len(layers) // 2],
                offset=offset,
                split=self.split,
                seed=self.seed,
                scope=PairScope(self.across_documents, self.drop_first),
                where=self.where,
                name=name,
                count=count,
                device=self.device,
            )
            found.append(examples)
        return [examples for examples in found if examples.n]
