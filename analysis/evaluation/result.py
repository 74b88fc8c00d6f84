"""The result of an evaluation: rows of measures and heatmaps, as plain data."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ...probes.base.readout import Readout
from ...probes.ridge.error_share import ErrorShare
from .confidence_buckets import BucketRow, ResultKey
from .heatmap import Heatmap, heatmaps
from .metrics import EvaluationRow

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured, with what is needed to say on which data."""

    rows: list[EvaluationRow]
    """Sorted by offset, probe, layer."""
    buckets: list[BucketRow]
    """The same by the model's confidence at t+N: each row's parts, in the same order."""
    cache_id: str
    model_name: str
    data_name: str
    split: str
    seed: int
    n: int
    """Positions evaluated; a pair at offset N also needs t in the sequence and document of t+N."""
    positions: int
    """Positions of the sequences taken, more than `n` where a mask chose among them."""
    sequences: int
    layers: tuple[int, ...]
    offsets: tuple[int, ...]
    probes: tuple[str, ...]
    """Names of the probes, baselines first."""
    across_documents: bool = False
    """Whether pairs may join two documents of a sequence."""
    drop_first: int = 0
    """Positions at the start of each sequence that were no sources."""
    crossing: dict[int, float] = field(default_factory=dict)
    """Share of the sequences' pairs that join two documents, by offset; counted or left out."""
    unit: str = "document"
    """What intervals resample: `document`, or `sequence` where there is one document."""
    units: int = 0
    """How many of them were evaluated."""
    shares: dict[ResultKey, ErrorShare] = field(default_factory=dict)
    """How few pairs make most of the squared error to residual_L, for ridge and lenses."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers must know, one sentence each: undefined measures, pairs that a
    probe lacks, few documents, a baseline that is left out."""
    cache: "ActivationCache | None" = field(default=None, repr=False, compare=False)
    readouts: tuple[Readout, ...] = field(default=(), repr=False, compare=False)

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dictionary of plain numbers per row; None for what is infinite or undefined."""
        return [row.to_dict() for row in self.rows]

    def bucket_dicts(self) -> list[dict[str, Any]]:
        """One dictionary of plain numbers per row of `buckets`; None as in `to_dicts`."""
        return [row.to_dict() for row in self.buckets]

    def about(self) -> dict[str, Any]:
        """What was evaluated, as plain values: split, pairs, unit of the intervals, notes."""
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
        """Sentences on pairs, intervals and squared errors, then the notes; plain text."""
        what = "counted" if self.across_documents else "left out"
        shares = [f"{100 * share:.1f} % at N = {n}" for n, share in self.crossing.items() if share]
        plural = "" if self.units == 1 else "s"
        found = [f"intervals resample the {self.units:,} {self.unit}{plural} evaluated"]
        if shares:
            found.append(f"pairs that join two documents are {what}: {', '.join(shares)}")
        if self.drop_first:
            found.append(f"the first {self.drop_first} positions of each sequence are no sources")
        by_probe: dict[str, ErrorShare] = {}
        for (name, _, _), share in self.shares.items():
            worst = by_probe.get(name)
            if worst is None or (share.top_error or 0) > (worst.top_error or 0):
                by_probe[name] = share
        for name, share in by_probe.items():
            if share.top_error is not None and share.top_target is not None:
                found.append(
                    f"{name}: the largest 0.1 % of the pairs make at most "
                    f"{100 * share.top_error:.1f} % of the squared error of a map, and there "
                    f"{100 * share.top_target:.1f} % of the target's variance"
                )
        return [*found, *(f"note: {note}" for note in self.notes)]

    def select(self, probe: str, offset: int) -> list[EvaluationRow]:
        """Rows of one probe at one offset, by layer."""
        return [row for row in self.rows if row.probe == probe and row.offset == offset]

    def select_buckets(self, probe: str, offset: int) -> list[BucketRow]:
        """Rows of `buckets` of one probe at one offset, by layer, then from the least sure."""
        return [row for row in self.buckets if row.probe == probe and row.offset == offset]

    def heatmaps(self, split: str | None = None) -> list[Heatmap]:
        """Lens heatmaps of one passage: the logit lens and the probes that read offset 0."""
        if self.cache is None:
            return []
        # A control says little about a passage.
        shown = [readout for readout in self.readouts if not hasattr(readout, "view")]
        return heatmaps(self.cache, shown, split=split or self.split)
