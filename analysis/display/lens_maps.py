"""`LensMaps`: what lenses read in a passage of a cache or in a text of one's own, cell by cell.

`lens.heatmap(...)` and `residua.read_lens_maps` give them; lens_map_figures.py draws them with
matplotlib, interactive_lens_maps.py with plotly. Each cell is one layer at one token: the lens's
distribution over the vocabulary for the model's token N further, against the model's own there.
Computed in float64: passages are short.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from ...cache.devices import choose_device, copy_to_device, copy_to_host
from ...cache.errors import NotFoundError, UsageError
from ...cache.files.json_files import plain_value
from ...cache.function_above import call_above
from ...cache.number_ranges import as_tuple, as_whole_number, format_ranges
from ...cache.optional_libraries import require_library
from ...cache.store.activation_cache import ActivationCache
from ...cache.tokens.segments import segment_indices
from ...probes.base.readout import Readout, ReadoutBatch
from ...probes.saved.save import check_belongs
from ..evaluation.lens_heatmap import WIDTH, find_telling_passages
from ..evaluation.probe_names import name_readouts, probe_list
from ..token_texts.token_names import UNDEFINED, TokenNames, token_of_text
from .frames import data_frame
from .own_text import PassageStreams, read_own_text

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure
    from plotly.graph_objects import Figure as PlotlyFigure

MEASURES = ("probability", "entropy", "kl", "rank")
"""What the colour of a cell may show."""
BACKENDS = ("matplotlib", "plotly")
"""Libraries that draw maps."""
TOP = 5
"""Likeliest tokens of each cell."""


@dataclass(frozen=True)
class CachePassage:
    """Consecutive tokens of one sequence of a cache."""

    cache: ActivationCache
    sequence: int | None = None
    """Number of the sequence; None for a telling passage of `split`, in which most is decided in
    the upper layers."""
    start: int = 0
    """Index of the first token in the sequence."""
    width: int = WIDTH
    """Most tokens."""
    split: str = "test"
    """Split in which a telling passage is searched."""


@dataclass(frozen=True)
class LensMap:
    """What one lens reads in a passage at one offset; cells are `(layers, tokens)`, low to high."""

    lens: str
    """Name of the lens; `a - b` for a difference."""
    offset: int
    """The lens predicts the model's token after t+offset."""
    layers: tuple[int, ...]
    tokens: tuple[str, ...]
    """Labels of the tokens t that the model read, `(tokens,)`."""
    targets: tuple[str, ...]
    """Labels of the model's own top token at t+N, `(tokens,)`."""
    top: tuple[tuple[tuple[str, ...], ...], ...]
    """Labels of the lens's likeliest tokens, `(layers, tokens, top)`; of a difference those of both
    lenses, the first one's first."""
    top_probability: np.ndarray
    """Their probabilities, `(layers, tokens, top)` float64; NaN where logits are no distribution.
    """
    agrees: np.ndarray
    """Whether the lens's top token is the model's, that of the last layer, `(layers, tokens)` bool;
    of a difference whether both lenses say the same."""
    values: dict[str, np.ndarray] = field(repr=False)
    """Measure -> `(layers, tokens)` float64; NaN where logits are no distribution.

    `probability` and `rank` (1 is the likeliest) are those of the tracked token; without one the
    probability of the lens's top token, and the rank of the model's. `entropy` and `kl`,
    KL(model || lens), are in nats."""
    is_difference: bool = False


@dataclass(frozen=True)
class LensMaps:
    """Maps of several lenses and offsets of one passage, and the measure that colours them."""

    maps: tuple[LensMap, ...]
    """By offset, then lens."""
    measure: str
    """One of `MEASURES`."""
    tracked: str | None
    """Label of the token whose probability and rank are shown; None without one."""
    passage: str
    """What the passage is: `sequence 3, token 10`, or `own text`."""

    def __len__(self) -> int:
        return len(self.maps)

    def __iter__(self) -> Iterator[LensMap]:
        return iter(self.maps)

    def __getitem__(self, number: int) -> LensMap:
        return self.maps[number]

    def __repr__(self) -> str:
        lenses = ", ".join(dict.fromkeys(entry.lens for entry in self.maps))
        offsets = format_ranges(sorted({entry.offset for entry in self.maps}))
        return (
            f"<LensMaps of {lenses} at offsets {offsets}: {self.measure}, {self.passage}, "
            f"{max(len(entry.tokens) for entry in self.maps)} tokens>"
        )

    def with_measure(self, measure: str) -> "LensMaps":
        """The same cells, coloured by another measure; nothing is computed again."""
        return replace(self, measure=check_measure(measure))

    def only(self, lens: str) -> "LensMaps":
        """The maps of one lens; raises `NotFoundError` for a name that none has."""
        maps = tuple(entry for entry in self.maps if entry.lens == lens)
        if not maps:
            names = ", ".join(dict.fromkeys(entry.lens for entry in self.maps))
            raise NotFoundError(f"there is no map of the lens {lens!r}; these are of {names}")
        return replace(self, maps=maps)

    def __sub__(self, other: "LensMaps") -> "LensMaps":
        """The difference of two lenses, cell by cell, at the layers and offsets that both have.

        Raises `UsageError` for maps of different passages, or of as many lenses as no pairs make.
        """
        return subtract_maps(self, other)

    @overload
    def plot(self, backend: Literal["matplotlib"] = "matplotlib") -> "Figure": ...

    @overload
    def plot(self, backend: Literal["plotly"]) -> "PlotlyFigure": ...

    def plot(self, backend: str = "matplotlib") -> "Figure | PlotlyFigure":
        """A panel per map, agreement with the last layer outlined.

        A figure of matplotlib, or one of plotly (`backend="plotly"`), which shows the likeliest
        tokens and all measures of the cell under the mouse.
        """
        if backend not in BACKENDS:
            raise UsageError(f'backend must be "matplotlib" or "plotly", not {backend!r}')
        if backend == "plotly":
            require_library("plotly", "a figure of plotly")
            return call_above("analysis.display.interactive_lens_maps", "interactive_figure", self)
        require_library("matplotlib", "a picture")
        return call_above("analysis.display.lens_map_figures", "lens_maps_figure", self)

    def to_png(self, path: str | Path) -> Path:
        """Write `plot()` to the PNG file `path`, 150 dpi."""
        from ...cache.files.json_files import make_folder
        from ..report.picture_files import write_figure

        make_folder(Path(path).parent)
        write_figure(self.plot(), Path(path))
        return Path(path)

    def to_html(self, path: str | Path, *, title: str | None = None) -> Path:
        """Write an interactive page of all maps, one file that needs no network, to `path`."""
        require_library("plotly", "a page of lens heatmaps")
        return call_above(
            "analysis.display.interactive_lens_maps", "write_lens_maps_page", self, path, title
        )

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dictionary of plain values per map; None for undefined numbers.

        `top`, `top_probability`, `agrees` and the measures are lists by layer, then token.
        """
        return [
            {
                "lens": str(entry.lens),
                "offset": entry.offset,
                "is_difference": entry.is_difference,
                "layers": list(entry.layers),
                "tokens": list(entry.tokens),
                "targets": list(entry.targets),
                "top": [[list(cell) for cell in row] for row in entry.top],
                "top_probability": plain_value(entry.top_probability),
                "agrees": entry.agrees.tolist(),
                **{name: plain_value(values) for name, values in entry.values.items()},
            }
            for entry in self.maps
        ]

    def _repr_png_(self) -> bytes:
        """The picture, for notebooks."""
        from io import BytesIO

        picture = BytesIO()
        self.plot().savefig(picture, format="png", dpi=110)
        return picture.getvalue()

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per lens, offset, layer and token, with all measures; needs pandas."""
        records: list[dict[str, Any]] = []
        for entry in self.maps:
            for (row, column), agrees in np.ndenumerate(entry.agrees):
                records.append(
                    {
                        "lens": str(entry.lens),
                        "offset": entry.offset,
                        "layer": entry.layers[row],
                        "position": column,
                        "token": entry.tokens[column],
                        "target": entry.targets[column],
                        "top": entry.top[row][column][0],
                        "agrees": bool(agrees),
                        **{name: float(v[row, column]) for name, v in entry.values.items()},
                    }
                )
        return data_frame(records)


def check_measure(measure: str) -> str:
    """`measure` itself; raises `UsageError` for an unknown one."""
    if measure not in MEASURES:
        raise UsageError(f"there is no measure {measure!r}; choose one of {', '.join(MEASURES)}")
    return measure


def read_lens_maps(
    lenses: Readout | Sequence[Readout] | Mapping[str, Readout],
    passage: str | CachePassage | ActivationCache,
    *,
    layers: int | Iterable[int] | None = None,
    offsets: int | Iterable[int] | None = None,
    measure: str = "probability",
    track: str | int | None = None,
    model: Any = None,
    cache: ActivationCache | None = None,
    force: bool = False,
    device: "str | torch.device" = "auto",
) -> LensMaps:
    """Read a passage with every one of `lenses`, at all their layers and offsets.

    Args:
        lenses: A lens, several, or several with names: any probe that reads layers.
        passage: A text of your own, which the model reads; a `CachePassage`; or a cache, for a
            telling passage of its test split.
        layers: Layers to show. Default those of each lens.
        offsets: Offsets N to show, a map each. Default the smallest of each lens.
        measure: Colour of the cells: `probability`, `entropy`, `kl` or `rank`.
        track: A token, as its text (such as " Paris") or its id, whose probability and rank are
            shown. Default the lens's top token, and the rank of the model's.
        model: For a text: the model's folder or hub id, the loaded model of transformers, or the
            `DecoderBlocks` of `residua.load_model_of` (with `cache`).
        cache: For a text: a cache of the model, whose head, tokenizer and identity are used;
            without `model`, the model is loaded from where it was extracted.
        force: Read with lenses of another model, too.
        device: Device of the products, and of a model that is loaded here.

    Raises `NotFoundError` for a lens without the layers and offsets, `UsageError` for a passage
    that is too short or a tracked text that is not one token, `MismatchError` for a lens of another
    model.
    """
    check_measure(measure)
    listed = probe_list(lenses)
    if not listed:
        raise UsageError("give at least one lens")
    named = name_readouts(lenses if isinstance(lenses, Mapping) else listed)
    wanted_layers = None if layers is None else as_tuple(layers, "layers")
    wanted_offsets = None if offsets is None else as_tuple(offsets, "offsets")
    torch_device = choose_device(device)
    offsets_of = {
        name: wanted_offsets or (_smallest_offset(name, lens),) for name, lens in named.items()
    }
    ahead = max(0, *(offset for offsets in offsets_of.values() for offset in offsets))

    if isinstance(passage, str):
        streams = read_own_text(passage, model, cache, torch_device)
    else:
        if model is not None:
            raise UsageError(
                "the model is for a text of your own; a passage of a cache needs none: leave it out"
            )
        place = CachePassage(passage) if isinstance(passage, ActivationCache) else passage
        if not isinstance(place, CachePassage):
            raise UsageError(
                f"a passage cannot be a {type(passage).__name__}; give a text, a "
                "residua.CachePassage(cache, ...) or a cache"
            )
        place.cache.check_texts("it has no passage of text")
        streams = streams_of_cache(place, ahead, torch_device)
    owner: Any = streams
    for lens in listed:
        check_belongs(lens, owner, force)

    tracked = None if track is None else token_to_track(track, streams)
    maps = []
    for name, lens in named.items():
        for offset in offsets_of[name]:
            lens_layers = _layers_of(name, lens, offset, wanted_layers)
            maps.append(_read_map(name, lens, offset, lens_layers, streams, tracked))
    maps.sort(key=lambda entry: entry.offset)
    label = None if tracked is None else streams.names(tracked)
    return LensMaps(tuple(maps), measure, label, streams.title)


def _smallest_offset(name: str, lens: Readout) -> int:
    offsets = [offset for layer, offset in lens.pairs() if layer is not None]
    if not offsets:
        raise NotFoundError(f"{name} reads no layer: there is no heatmap of it")
    return min(offsets)


def _layers_of(
    name: str, lens: Readout, offset: int, wanted: Sequence[int] | None
) -> tuple[int, ...]:
    """The layers to read with `lens` at `offset`, ascending."""
    available = sorted({la for la, n in lens.pairs() if la is not None and n == offset})
    layers = [layer for layer in available if wanted is None or layer in wanted]
    if not layers:
        offsets = sorted({n for layer, n in lens.pairs() if layer is not None})
        asked = "" if wanted is None else f"layers {format_ranges(sorted(wanted))} at "
        raise NotFoundError(
            f"{name} does not read {asked or 'any layer at '}offset {offset}; it reads layers "
            f"{format_ranges(available) if available else 'none'} there, and offsets "
            f"{format_ranges(offsets) if offsets else 'none'}"
        )
    return tuple(layers)


def streams_of_cache(passage: CachePassage, ahead: int, device: "torch.device") -> PassageStreams:
    """The residual streams of a passage of a cache, and of `ahead` tokens after it."""
    import torch

    cache = passage.cache
    width = as_whole_number(passage.width, "width")
    start = as_whole_number(passage.start, "start")
    if passage.sequence is None:
        ((sequence, start),) = find_telling_passages(cache, passage.split, width, device)
    else:
        sequence = as_whole_number(passage.sequence, "sequence")
    if not 0 <= sequence < len(cache.sequence_length):
        raise UsageError(f"sequence must lie in 0-{len(cache.sequence_length) - 1}, not {sequence}")
    length = int(cache.sequence_length[sequence])
    if not 0 <= start < length or width < 1:
        raise UsageError(
            f"sequence {sequence} has {length} tokens: no passage of {width} begins at {start}"
        )
    first = int(cache.sequence_start[sequence]) + start
    stop = first + min(width + ahead, length - start)
    _, tokens_after = segment_indices(cache, np.array([sequence]))

    def hidden(lens: Readout, layer: int) -> "torch.Tensor":
        view = getattr(lens, "view", None)
        source = cache if view is None else view(cache)
        rows = np.array(source.residual_array(layer)[first:stop])
        return copy_to_device(torch.from_numpy(rows), device)

    return PassageStreams(
        tokens=np.array(cache.tokens[first:stop]).astype(np.int64),
        tokens_after=np.asarray(tokens_after[start : start + stop - first]),
        width=width,
        head=cache.head,
        names=TokenNames(cache),
        tokenizer=cache.tokenizer,
        title=f"sequence {sequence}, token {start}",
        n_blocks=cache.n_blocks,
        hidden=hidden,
        device=device,
    )


def token_to_track(track: str | int, streams: PassageStreams) -> int:
    """The id of the token to track; raises `UsageError` unless it is one token."""
    if not isinstance(track, str):
        token = as_whole_number(track, "track")
        if not 0 <= token < streams.vocab:
            raise UsageError(f"track must be a token in 0-{streams.vocab - 1}, not {token}")
        return token
    return token_of_text(track, streams.tokenizer(), streams.names)


def _read_map(
    name: str,
    lens: Readout,
    offset: int,
    layers: tuple[int, ...],
    streams: PassageStreams,
    tracked: int | None,
) -> LensMap:
    """All cells of one lens at one offset."""
    import torch

    count = streams.count(offset)
    device, head = streams.device, streams.torch_head
    ids = torch.from_numpy(streams.tokens).to(device)
    before = torch.cat([ids.new_full((1,), -1), ids])  # the token before each one
    with torch.no_grad():
        model_logits = streams.model_logits[offset : offset + count]
        log_p = model_logits.log_softmax(-1)
        p = log_p.exp()
        model_top = model_logits.argmax(-1)
        is_defined = torch.isfinite(model_logits.amax(-1))
        cells = []
        for layer in layers:
            batch = ReadoutBatch(
                hidden=streams.hidden(lens, layer)[:count],
                last_token=ids[offset : offset + count],
                head=head,
                token=ids[:count],
                previous_token=before[offset : offset + count],
            )
            logits = lens.logits(batch, layer, offset).double()
            if tuple(logits.shape) != (count, streams.vocab):
                raise UsageError(
                    f"{name} gives logits of shape {tuple(logits.shape)}, expected "
                    f"({count}, {streams.vocab}): only a probe that predicts tokens has a heatmap"
                )
            cells.append(_cells(logits, log_p, p, model_top, is_defined, tracked))

    host = [{key: copy_to_host(value).numpy() for key, value in cell.items()} for cell in cells]
    names = streams.names
    return LensMap(
        lens=name,
        offset=offset,
        layers=layers,
        tokens=tuple(names(int(token)) for token in streams.tokens[:count]),
        targets=tuple(
            names(token) if defined else UNDEFINED
            for token, defined in zip(model_top.tolist(), is_defined.tolist(), strict=True)
        ),
        top=tuple(
            tuple(tuple(names(int(token)) for token in tokens) for tokens in cell["top"])
            for cell in host
        ),
        top_probability=np.stack([cell["top_probability"] for cell in host]),
        agrees=np.stack([cell["agrees"] for cell in host]),
        values={measure: np.stack([cell[measure] for cell in host]) for measure in MEASURES},
    )


def _cells(
    logits: "torch.Tensor",
    log_p: "torch.Tensor",
    p: "torch.Tensor",
    model_top: "torch.Tensor",
    model_is_defined: "torch.Tensor",
    tracked: int | None,
) -> "dict[str, torch.Tensor]":
    """The cells of one layer: `top` and `top_probability` `(tokens, TOP)`, others `(tokens,)`."""
    import torch

    is_defined = torch.isfinite(logits.amax(-1))
    log_q = logits.log_softmax(-1)
    q = log_q.exp()
    likeliest = q.topk(min(TOP, q.shape[-1]), dim=-1)
    top = torch.where(is_defined[:, None], likeliest.indices, -1)

    # KL(model || lens): tokens without probability add nothing.
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    entropy = -torch.where(q > 0, q * log_q, 0.0).sum(-1)

    # The token whose rank is shown; ties go to the lower id, as in precision@k.
    token = torch.full_like(model_top, tracked) if tracked is not None else model_top
    value = logits.gather(-1, token[:, None])
    ids = torch.arange(logits.shape[-1], device=logits.device)
    is_before = (logits > value) | ((logits == value) & (ids < token[:, None]))
    rank = 1.0 + is_before.sum(-1)
    needs_model = model_is_defined if tracked is None else torch.ones_like(is_defined)
    shown = likeliest.values[:, 0] if tracked is None else q.gather(-1, token[:, None])[:, 0]
    nan = torch.full_like(kl, math.nan)
    return {
        "top": top,
        "top_probability": torch.where(is_defined[:, None], likeliest.values, math.nan),
        "agrees": (top[:, 0] == model_top) & is_defined & model_is_defined,
        "probability": torch.where(is_defined, shown, nan),
        "entropy": torch.where(is_defined, entropy, nan),
        "kl": torch.where(is_defined & model_is_defined, kl.clamp_min(0.0), nan),
        "rank": torch.where(is_defined & needs_model, rank.to(kl.dtype), nan),
    }


def subtract_maps(first: LensMaps, second: LensMaps) -> LensMaps:
    """See `LensMaps.__sub__`."""
    if len(first) != len(second) and len(second) != 1:
        raise UsageError(
            f"{len(first)} maps less {len(second)} maps make no pairs; subtract as many, or one"
        )
    others = list(second) * (len(first) if len(second) == 1 else 1)
    maps = tuple(_difference(a, b) for a, b in zip(first, others, strict=True))
    if first.passage != second.passage or first.tracked != second.tracked:
        raise UsageError(
            f"the maps are of {first.passage} (tracked: {first.tracked}) and of {second.passage} "
            f"(tracked: {second.tracked}); read both of one passage"
        )
    return LensMaps(maps, first.measure, first.tracked, first.passage)


def _difference(a: LensMap, b: LensMap) -> LensMap:
    """The map of `a` less that of `b`, at the layers that both have."""
    if a.offset != b.offset or a.tokens != b.tokens:
        raise UsageError(
            f"{a.lens} was read at offset {a.offset} of {len(a.tokens)} tokens, {b.lens} at offset "
            f"{b.offset} of {len(b.tokens)}; read both of one passage at one offset"
        )
    layers = tuple(layer for layer in a.layers if layer in b.layers)
    if not layers:
        raise UsageError(f"{a.lens} and {b.lens} have no layer in common")
    rows_a = [a.layers.index(layer) for layer in layers]
    rows_b = [b.layers.index(layer) for layer in layers]
    top = tuple(
        tuple((ta[0], tb[0]) for ta, tb in zip(a.top[i], b.top[j], strict=True))
        for i, j in zip(rows_a, rows_b, strict=True)
    )
    return LensMap(
        lens=f"{a.lens} - {b.lens}",
        offset=a.offset,
        layers=layers,
        tokens=a.tokens,
        targets=a.targets,
        top=top,
        top_probability=np.stack(
            [a.top_probability[rows_a, :, 0], b.top_probability[rows_b, :, 0]], axis=-1
        ),
        agrees=np.array([[one == other for one, other in row] for row in top]),
        values={name: a.values[name][rows_a] - b.values[name][rows_b] for name in MEASURES},
        is_difference=True,
    )
