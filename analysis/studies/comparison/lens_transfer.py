"""A lens fitted on one cache and read on others: of a fine-tuned model, or of other texts.

Belrose et al. (2303.08112, section 4.3) carry a lens of LLaMA to Vicuna at a small cost in KL.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ....cache.errors import MismatchError, UsageError
from ....cache.format.manifest import SHORT_ID
from ....cache.progress import Auto, StageProgress, progress_of_stage, show_stages
from ....probes.base.readout import Readout
from ....probes.base.resampling import Interval
from ....probes.lens.logit_lens import LogitLens
from ....probes.saved.save import check_belongs
from ...evaluation.probe_names import describe_names, name_readouts
from ...token_texts.token_text import plain_texts
from ..results.study_figures import HeatPanel, Panel, Series, StudyFigure
from ..results.study_result import StudyResult, StudySubject, StudyTable
from ..trajectories.position_sample import PositionSample, choose_positions
from ..trajectories.readings import Trajectories, measure_trajectories
from .depth_curves import model_labels
from .divergence_figures import format_interval

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache

LOGIT = "logit"
CARRIED = ("other texts", "other model", "same head")
"""Origins of a lens that is not native to the cache that it reads."""
BITS = float(1 / np.log(2))
"""Bits of a nat."""
QUESTION = (
    "What does a lens lose that was fitted on another model, or on other texts, than it reads?"
)
METHOD = (
    "Each lens reads the held-out text of every cache; KL(model || lens) of the model of that "
    "cache is its error (2303.08112, 4.3). The gap is the KL of a carried lens less that of the "
    "native lens of the same kind, fitted on the cache itself, at the same positions; beside it "
    "stands the gain over the logit lens, which is fitted on nothing. Bits per byte are bits per "
    "token times tokens per byte of the text. Intervals (95 %) resample documents, of differences "
    "in pairs."
)
DOES_NOT_SAY = (
    "A small gap says that the lens's map still fits, not that the models compute alike.",
    "A native lens that was fitted on few positions makes the gap of a carried one smaller: the "
    "gap is to the native lens that was given, not to the best one.",
    "Gaps of different caches are in nats of different models and texts.",
)


@dataclass(frozen=True)
class TransferRow:
    """One lens on one cache at one layer."""

    cache: str
    """Model of the cache that is read, or its texts where the model is the same."""
    lens: str
    origin: str
    """`native`: this cache; `other texts` of its model; `other model`; `same head`: a cache of a
    model with this head that is not among those read; `none`: the logit lens."""
    layer: int
    depth: float
    n: int
    kl: float | None
    """Mean KL(model || lens), nats per token."""
    kl_interval: Interval
    gap: float | None
    """Mean KL less that of the native lens of the kind, nats; None without one, and of itself."""
    gap_interval: Interval
    gap_bits_per_token: float | None
    gap_bits_per_byte: float | None
    """None for a cache without a tokenizer."""
    gain: float | None
    """Mean KL of the logit lens less that of this lens, nats."""
    gain_interval: Interval
    cross_entropy: float | None
    """Mean -log q of the text's next token, nats."""


@dataclass(frozen=True)
class TransferSummaryRow:
    """One lens on one cache, means over the layers below the last that all lenses read."""

    cache: str
    lens: str
    origin: str
    n: int
    layers: int
    kl: float | None
    kl_interval: Interval
    gap: float | None
    gap_interval: Interval
    gap_bits_per_byte: float | None
    gain: float | None
    gain_interval: Interval
    kept: float | None
    """Share of the native lens's gain over the logit lens that the carried lens has."""


def study_transfer(
    cache: "ActivationCache",
    lenses: Sequence[Readout] | Mapping[str, Readout],
    *,
    to: "Sequence[ActivationCache]" = (),
    split: str = "test",
    max_positions: int = 16384,
    seed: int = 0,
    device: str = "auto",
    progress: StageProgress | Auto | None = "auto",
) -> StudyResult:
    """Read `lenses` on `cache` and on the caches `to`: KL to each model, gaps to native lenses.

    The logit lens is always read. A lens is native to the cache that it was fitted on. Raises
    `MismatchError` for a cache whose model has another width, depth or vocabulary than `cache`'s,
    `UsageError` without a lens or another cache.
    """
    caches = [cache, *to]
    named = name_readouts(lenses)
    if not named or not to:
        raise UsageError(
            "give a probe that was fitted on the cache, and another cache to read it on (--to): a "
            "cache of the fine-tuned model, or of other texts (residua extract)"
        )
    if len({found.id for found in caches}) < len(caches):
        raise UsageError("a cache is given twice; name caches of different models or texts")
    for other in to:
        check_same_shape(cache, other)
    for name, lens in named.items():
        for found in caches:
            try:
                check_belongs(lens, found, force=True)
            except MismatchError as error:
                raise MismatchError(f"{name} on cache {found.id[:SHORT_ID]}: {error}") from None
    labels = cache_labels(caches)
    rows: list[TransferRow] = []
    summaries: list[TransferSummaryRow] = []
    samples, notes = [], []
    with show_stages(progress) as report:
        for found, label in zip(caches, labels, strict=True):
            sample = choose_positions(found, split, max_positions, seed)
            readouts: dict[str, Readout] = {LOGIT: LogitLens.of(found, 0)}
            readouts |= {str(name): lens for name, lens in named.items()}
            readings = measure_trajectories(
                sample,
                readouts,
                measures=("kl", "cross_entropy"),
                device=device,
                progress=progress_of_stage(report, "trajectories"),
            )
            origins = {name: lens_origin(lens, found, caches) for name, lens in readouts.items()}
            scores = TransferScores(sample, label, readouts, readings, origins)
            rows += scores.layer_rows()
            summaries += scores.summary_rows()
            samples.append(sample)
            notes += scores.notes()
    return StudyResult(
        study="transfer",
        title=f"Lenses of {labels[0]} on {', '.join(labels[1:])}",
        question=QUESTION,
        method=METHOD,
        subject=StudySubject(
            caches=tuple(found.id for found in caches),
            model_name=", ".join(dict.fromkeys(found.manifest.model_name for found in caches)),
            data_name=", ".join(dict.fromkeys(found.manifest.data_name for found in caches)),
            split=split,
            n=sum(sample.count for sample in samples),
            n_of="positions",
            units=samples[0].units.name,
            n_units=sum(sample.units.count for sample in samples),
            probes={str(name): repr(probe) for name, probe in named.items()},
        ),
        tables=[
            StudyTable("lenses", "Lenses on each cache, means over layers", SUMMARY, summaries),
            StudyTable("layers", "By layer", BY_LAYER, rows),
        ],
        figures=[draw_layers(rows), draw_matrix(summaries)],
        says=describe_transfer(summaries),
        does_not_say=DOES_NOT_SAY,
        notes=[*notes, *describe_names(named)],
        settings={"max_positions": max_positions, "seed": seed},
    )


SUMMARY = {
    "cache": "read on",
    "lens": "lens",
    "origin": "fitted on",
    "n": "n",
    "layers": "layers",
    "kl": "KL, nats",
    "kl_interval": "95 %",
    "gap": "gap to native",
    "gap_interval": "95 %",
    "gap_bits_per_byte": "gap, bits per byte",
    "gain": "gain over logit lens",
    "gain_interval": "95 %",
    "kept": "of native's gain",
}
BY_LAYER = {
    "cache": "read on",
    "lens": "lens",
    "origin": "fitted on",
    "layer": "layer",
    "kl": "KL, nats",
    "kl_interval": "95 %",
    "gap": "gap to native",
    "gap_interval": "95 %",
    "gap_bits_per_byte": "gap, bits per byte",
    "gain": "gain over logit lens",
    "gain_interval": "95 %",
}


def check_same_shape(cache: "ActivationCache", other: "ActivationCache") -> None:
    """Raise `MismatchError` unless a lens of one model can read the other."""
    shapes = [(found.d_model, found.n_blocks, found.vocab) for found in (cache, other)]
    if shapes[0] != shapes[1]:
        texts = [f"width {d}, {blocks} blocks, {vocab:,} tokens" for d, blocks, vocab in shapes]
        raise MismatchError(
            f"cache {cache.id[:SHORT_ID]} is of a model of {texts[0]}, cache {other.id[:SHORT_ID]} "
            f"of one of {texts[1]}: a lens can only be carried to a model of the same shape, such "
            "as a fine-tuned one"
        )


def cache_labels(caches: "Sequence[ActivationCache]") -> list[str]:
    """Name of each cache: its model, or its texts where all have one model."""
    if len({cache.manifest.model.weights for cache in caches}) > 1:
        return model_labels(caches)
    names = [cache.manifest.data_name.rstrip("/").rpartition("/")[2] for cache in caches]
    return [
        f"{name} {cache.id[:SHORT_ID]}" if names.count(name) > 1 or not name else name
        for name, cache in zip(names, caches, strict=True)
    ]


def lens_origin(
    lens: Readout, cache: "ActivationCache", caches: "Sequence[ActivationCache]"
) -> str:
    """What `lens` was fitted on, seen from `cache`."""
    cache_id, geometry = getattr(lens, "cache_id_", None), getattr(lens, "geometry_", None)
    if cache_id is None and geometry is None:
        return "none"
    if cache_id == cache.id:
        return "native"
    # Fine-tuning may leave the head as it was: the cache of the fit knows its model.
    home = next((found for found in caches if found.id == cache_id), None)
    if home is None:
        return "same head" if geometry == cache.head.digest else "other model"
    same = home.manifest.model.weights == cache.manifest.model.weights
    return "other texts" if same else "other model"


@dataclass(eq=False)
class TransferScores:
    """Scores of all lenses on one cache."""

    sample: PositionSample
    label: str
    readouts: Mapping[str, Readout]
    readings: Mapping[str, Trajectories]
    origins: Mapping[str, str]

    def native(self, name: str) -> str | None:
        """The native lens of the kind of a carried one; None without one, and for other lenses."""
        if self.origins[name] in ("native", "none"):
            return None
        kind = self.readouts[name].kind
        return next(
            (
                other
                for other, origin in self.origins.items()
                if origin == "native" and self.readouts[other].kind == kind
            ),
            None,
        )

    def _kl(self, name: str, layers: Sequence[int]) -> np.ndarray:
        """Mean KL over `layers` at each position, `(n,)` float64."""
        found = self.readings[name]
        columns = [found.column(layer) for layer in layers]
        return found.values["kl"][:, columns].astype(np.float64).mean(1)

    def bytes_per_token(self) -> float | None:
        """Bytes of text of a token of the sample; None without a tokenizer."""
        cache = self.sample.cache
        if not (cache.path / "head" / "tokenizer.json").is_file():
            return None
        texts = plain_texts(cache.tokenizer(), cache.vocab)
        sizes = np.array([len(text.encode("utf-8", "surrogateescape")) for text in texts])
        return float(sizes[self.sample.tokens].mean()) or None

    def _compared(self, name: str, layers: Sequence[int]) -> dict[str, Any]:
        """KL, gap and gain of a lens, means over `layers`, with intervals."""
        mean, own = self.sample.mean, self._kl(name, layers)
        kl, kl_interval = mean(own)
        fields: dict[str, Any] = {"kl": kl, "kl_interval": kl_interval}
        none: tuple[float | None, Interval] = (None, (None, None))
        native = self.native(name)
        if native is not None and not set(layers) <= set(self.readings[native].layers):
            native = None
        gap, gap_interval = none if native is None else mean(own - self._kl(native, layers))
        gain, gain_interval = none if name == LOGIT else mean(self._kl(LOGIT, layers) - own)
        per_token = None if gap is None else gap * BITS
        size = self.bytes if gap is not None else None
        return fields | {
            "gap": gap,
            "gap_interval": gap_interval,
            "gap_bits_per_byte": per_token / size if per_token is not None and size else None,
            "gain": gain,
            "gain_interval": gain_interval,
        }

    def __post_init__(self) -> None:
        self.bytes: float | None = self.bytes_per_token()

    def layer_rows(self) -> list[TransferRow]:
        """A row for each lens and layer below the last."""
        rows = []
        for name, found in self.readings.items():
            for column, layer in enumerate(found.layers[:-1]):
                fields = self._compared(name, [layer])
                gap = fields["gap"]
                rows.append(
                    TransferRow(
                        cache=self.label,
                        lens=name,
                        origin=self.origins[name],
                        layer=layer,
                        depth=layer / self.sample.cache.n_blocks,
                        n=int((~np.isnan(found.values["kl"][:, column])).sum()),
                        gap_bits_per_token=None if gap is None else gap * BITS,
                        cross_entropy=self.sample.mean(found.values["cross_entropy"][:, column])[0],
                        **fields,
                    )
                )
        return rows

    @property
    def shared_layers(self) -> list[int]:
        """Layers below the last that all lenses read."""
        layers = [set(found.layers[:-1]) for found in self.readings.values()]
        return sorted(set.intersection(*layers))

    def summary_rows(self) -> list[TransferSummaryRow]:
        """A row for each lens, over the layers that all read; none without such a layer."""
        layers, rows = self.shared_layers, []
        if not layers:
            return []
        for name in self.readings:
            fields = self._compared(name, layers)
            native = self.native(name)
            kept = None
            if native is not None and fields["gain"] is not None:
                best = self._compared(native, layers)["gain"]
                kept = fields["gain"] / best if best is not None and best > 0 else None
            rows.append(
                TransferSummaryRow(
                    cache=self.label,
                    lens=name,
                    origin=self.origins[name],
                    n=self.sample.count,
                    layers=len(layers),
                    kept=kept,
                    **fields,
                )
            )
        return rows

    def notes(self) -> list[str]:
        """What to know about this cache's scores."""
        notes = [f"{self.label}: {self.sample.units.note}"] * bool(self.sample.units.note)
        if not self.shared_layers:
            notes.append(f"{self.label}: there is no layer that all lenses read")
        if undefined := sum(found.undefined for found in self.readings.values()):
            notes.append(
                f"{self.label}: {undefined:,} readings have logits that are no distribution"
            )
        for name, origin in self.origins.items():
            if origin in CARRIED and self.native(name) is None:
                kind = self.readouts[name].kind
                notes.append(
                    f"{name} has no gap on {self.label}: no {kind} lens was fitted on it (residua "
                    f"fit {kind} {self.sample.cache.id[:SHORT_ID]}, then name that probe, too)"
                )
        return notes


def draw_layers(rows: Sequence[TransferRow]) -> StudyFigure:
    """KL by layer of every lens, a panel for each cache."""
    panels = []
    for cache in dict.fromkeys(row.cache for row in rows):
        lines = []
        for lens in dict.fromkeys(row.lens for row in rows):
            curve = [row for row in rows if (row.cache, row.lens) == (cache, lens)]
            carried = curve[0].origin in CARRIED
            lines.append(
                Series(
                    lens,
                    [row.layer for row in curve],
                    [row.kl for row in curve],
                    [row.kl_interval[0] for row in curve],
                    [row.kl_interval[1] for row in curve],
                    dash="dash" if carried else "solid",
                )
            )
        n = max(row.n for row in rows if row.cache == cache)
        panels.append(
            Panel(f"On {cache}, n = {n:,}", "layer", "KL(model || lens), nats", lines, (0, None))
        )
    return StudyFigure(
        "layers",
        "KL to the model of each cache; broken lines are lenses that were fitted on another one.",
        [panels],
    )


def draw_matrix(rows: Sequence[TransferSummaryRow]) -> StudyFigure:
    """Mean KL of every lens (rows) on every cache (columns)."""
    caches = list(dict.fromkeys(row.cache for row in rows))
    lenses = list(dict.fromkeys(row.lens for row in rows))
    kl = {(row.lens, row.cache): row.kl for row in rows}
    values = [[kl[lens, cache] for cache in caches] for lens in lenses]
    return StudyFigure(
        "matrix",
        "Mean KL of every lens on every cache, over the layers that all lenses read.",
        [
            [
                HeatPanel(
                    "KL(model || lens)",
                    "read on",
                    "lens",
                    caches,
                    lenses,
                    values=values,
                    color_label="mean KL, nats",
                    texts=[["-" if v is None else f"{v:.3f}" for v in row] for row in values],
                    color_range=(0.0, None),
                )
            ]
        ],
    )


def describe_transfer(rows: Sequence[TransferSummaryRow]) -> list[str]:
    """A sentence for each carried lens."""
    says = []
    for row in rows:
        if row.origin not in CARRIED or row.kl is None:
            continue
        carried = f"{row.lens} ({row.origin}), read on {row.cache} (n = {row.n:,})"
        low, high = row.gap_interval
        if row.gap is not None and (low is None or high is None or low <= 0 <= high):
            says.append(
                f"{carried}: no clear gap to the native lens ({row.gap:+.4f} nats "
                f"{format_interval(row.gap_interval, '+.4f')})."
            )
        elif row.gap is not None:
            bits, kept = row.gap_bits_per_byte, row.kept
            says.append(
                f"{carried}: {row.gap:+.4f} nats per token "
                f"{format_interval(row.gap_interval, '+.4f')} beside the native lens"
                + ("" if bits is None else f", {bits:+.4f} bits per byte")
                + ("." if kept is None else f"; it keeps {kept:.0%} of the native lens's gain.")
            )
        low, high = row.gain_interval
        if row.gain is not None and (low is None or high is None):
            says.append(
                f"{carried}: {row.gain:+.3f} nats beside the logit lens, without an interval."
            )
        elif row.gain is not None and low is not None and high is not None and low <= 0 <= high:
            says.append(
                f"{carried}: no clear difference from the logit lens ({row.gain:+.3f} nats)."
            )
        elif row.gain is not None:
            word = "better" if row.gain > 0 else "worse"
            says.append(
                f"{carried}: {word} than the logit lens by {abs(row.gain):.3f} nats "
                f"{format_interval(row.gain_interval, '+.3f')}."
            )
    return says or ["No lens was carried: all were fitted on the caches that they read."]
