"""Steps of `residua heatmap`: the passage, the lenses, the page, the picture and the tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import UsageError
from ...cache.files.disk_errors import check_file_target
from ...cache.number_ranges import absolute_numbers
from ...cache.optional_libraries import require_extra
from ...cache.store.activation_cache import ActivationCache
from ..display.lens_map_cells import bar_title, cell_lines, map_name, shows_tracked_number
from .actions import check_outputs
from .probe_names import load_named_probes

if TYPE_CHECKING:
    from ..display.lens_maps import LensMap, LensMaps

MOST_LAYERS = 7
"""Most layers of a table in the terminal."""


@dataclass(frozen=True)
class PassageChoice:
    """The text or the passage that the command line asks for."""

    text: str | None
    """A text of one's own; None for a passage of the cache."""
    model: str | None
    """Folder or hub id of the model that reads the text; None for that of the extraction."""
    trust_remote_code: bool
    """Whether code that comes with the model may run."""
    sequence: int | None
    """Sequence of the cache; None for a telling passage of the split."""
    first: int | None
    """Index of the first token in the sequence; None for 0."""
    tokens: int | None
    """Most tokens of the passage; None for 24."""
    split: str | None
    """Split of a telling passage; None for test."""

    def check(self) -> None:
        """Raise `UsageError` for options of a text beside those of a passage."""
        of_passage = {
            "--sequence": self.sequence,
            "--first": self.first,
            "--tokens": self.tokens,
            "--split": self.split,
        }
        given = [name for name, value in of_passage.items() if value is not None]
        if self.text is not None and given:
            raise UsageError(f"{given[0]} is for a passage of the cache; leave it out with --text")
        if self.text is None and (self.model is not None or self.trust_remote_code):
            raise UsageError(
                "the model reads a text of your own (--text); a passage of the cache needs none"
            )
        if self.sequence is None and self.first is not None:
            raise UsageError("--first counts the tokens of a sequence: give --sequence too")
        if self.sequence is not None and self.split is not None:
            raise UsageError(
                "--split is searched for a telling passage; leave it or --sequence out"
            )


def check_heatmap_outputs(html: Path | None, png: Path | None) -> None:
    """Raise `UsageError` unless a page can be written to `html` and a picture to `png`."""
    check_outputs(html, None)
    if png is None:
        return
    require_extra("report", "a picture")
    if png.suffix.lower() != ".png":
        raise UsageError(f"the picture is a PNG file: name it {png.with_suffix('.png')}")
    check_file_target(png, "heatmap.png")


def read_heatmaps(
    cache: ActivationCache,
    lenses: Sequence[str],
    root: Path,
    passage: PassageChoice,
    *,
    difference: bool,
    offsets: tuple[int, ...] | None,
    layers: tuple[int, ...] | None,
    force: bool,
    device: str,
    **options: Any,
) -> "LensMaps":
    """Read the passage with the lenses of `PROBE` or `NAME=PROBE` arguments.

    Without any, and for `logit`, that is the logit lens. With `difference`, the first of two lenses
    less the second. `options` are the measure and the tracked token.
    """
    require_extra("fit", "a lens heatmap")
    from ..display.lens_maps import CachePassage, read_lens_maps

    if difference and len(lenses) != 2:
        raise UsageError(f"a difference is that of two lenses, not {len(lenses)}")
    readouts = load_named_probes(cache, lenses or ["logit"], root, force, offsets or (0,))
    place: str | CachePassage
    model = None
    if passage.text is None:
        chosen = {"start": passage.first, "width": passage.tokens, "split": passage.split}
        given: dict[str, Any] = {k: value for k, value in chosen.items() if value is not None}
        place = CachePassage(cache, passage.sequence, **given)
    else:
        from ...cache.extraction.model_reload import load_model_of

        place = passage.text
        if not place.strip():
            raise UsageError("the text is empty; give some words for the model to read")
        model = load_model_of(cache, passage.model, device, passage.trust_remote_code)
    maps = read_lens_maps(
        readouts,
        place,
        layers=absolute_numbers(layers, cache.n_blocks),
        offsets=offsets,
        model=model,
        cache=cache if passage.text is not None else None,
        force=force,
        device=device,
        **options,
    )
    if not difference:
        return maps
    first, second = dict.fromkeys(entry.lens for entry in maps)
    return maps.only(first) - maps.only(second)


def write_heatmaps(maps: "LensMaps", html: Path | None, png: Path | None) -> list[str]:
    """Write the page and the picture; returns the paths."""
    written = []
    if html is not None:
        written.append(str(maps.to_html(html)))
    if png is not None:
        written.append(str(maps.to_png(png)))
    return written


def print_heatmaps(maps: "LensMaps", written: Sequence[str]) -> None:
    """Print a table per map, a line per token, and the files that were written."""
    from .terminal import print_table

    for entry in maps:
        count = len(entry.layers)
        # Evenly spread, the first and the last among them.
        rows = np.unique(np.linspace(0, count - 1, MOST_LAYERS).round().astype(int)).tolist()
        lines = [
            [
                token,
                *(_cell_text(entry, maps, row, column) for row in rows),
                entry.targets[column],
            ]
            for column, token in enumerate(entry.tokens)
        ]
        layers = [f"layer {entry.layers[row]}" for row in rows]
        title = f"{map_name(entry, maps)}: {bar_title(entry, maps)}"
        print_table(title, ["token", *layers, "model"], lines)
        if omitted := count - len(rows):
            print(f"{omitted} more layers are not shown: --layers chooses, --html shows all")
    agree = "both lenses say the same" if maps[0].is_difference else "as the last layer says"
    print(f"*: {agree}")
    for path in written:
        print(f"wrote {path}")


def _cell_text(entry: "LensMap", maps: "LensMaps", row: int, column: int) -> str:
    """Token and number of a cell, with a mark where it agrees."""
    text = "/".join(cell_lines(entry, maps, row, column))
    if not shows_tracked_number(maps):
        text += f" {entry.values[maps.measure][row, column]:.3g}"
    return f"{text}{'*' if entry.agrees[row, column] else ''}"
