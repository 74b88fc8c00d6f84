"""The Future Lens picture: what each layer says of the tokens after each token of a passage.

Rows are layers, columns the tokens that were read; a cell holds the likeliest next token and those
after it, its colour is the mean of their probabilities (Pal et al., 2311.04897). The cells are
those of `residua.read_lens_maps`, which reads all tokens of a layer in one batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ....probes.base.readout import Readout
from ....probes.lens.logit_lens import LogitLens
from ...display.lens_maps import CachePassage, LensMap, read_lens_maps
from ...evaluation.confidence_buckets import ResultKey
from ...report.probe_style import label
from ...token_texts.token_names import TokenNames
from ..results.study_figures import HeatPanel
from .pair_measures import HIT, TEXT_HIT, PairMeasures

if TYPE_CHECKING:
    import torch

    from ....cache.store.activation_cache import ActivationCache

MOST_OFFSETS = 4
"""Most tokens of a cell."""
WIDTH = 12
"""Tokens of a passage."""
LETTERS = 20
"""Letters of a cell in pictures for papers."""


@dataclass(frozen=True)
class PicturePassage:
    """Some tokens of a sequence."""

    sequence: int
    start: int
    width: int


def find_telling_future(
    cache: "ActivationCache",
    measures: PairMeasures,
    sequences: np.ndarray,
    peaks: Mapping[int, ResultKey],
    baseline: str | None,
    width: int,
) -> PicturePassage | None:
    """The recorded passage in which a probe says most of later words that the baseline does not.

    `peaks` are the results of the probe by offset; a pair at N >= 1 counts where the probe's top
    token is the model's and the text's, has a letter, and is not the `baseline`'s at the same
    target. None without such a pair.
    """
    records = measures.records
    assert records is not None
    n = records.n
    positions = cache.positions_of(sequences)[:n]
    following, names = cache.following_tokens(positions), TokenNames(cache)
    has_letter = {
        token: any(letter.isalpha() for letter in names(token).replace("\\n", ""))
        for token in np.unique(following).tolist()
        if token >= 0
    }
    is_word = np.array([has_letter.get(token, False) for token in following.tolist()], bool)
    score = np.zeros(n)
    for offset, key in peaks.items():
        if offset < 1 or offset >= n:
            continue
        right = records.has(key, HIT) & records.has(key, TEXT_HIT) & is_word
        other = ResultKey(baseline or "", None, offset)
        if other in records.bits:
            right &= ~records.has(other, HIT)
        score[: n - offset] += right[offset:]

    # The best run of `width` neighbours inside one sequence.
    best, choice, row = 0.0, None, 0
    for sequence in sequences.tolist():
        length = int(cache.sequence_length[sequence])
        part = score[row : row + length]
        row += length
        if not len(part):
            continue
        size = min(width, len(part))
        sums = np.convolve(part, np.ones(size), "valid")
        start = int(sums.argmax())
        if sums[start] > best:
            best, choice = float(sums[start]), PicturePassage(sequence, start, size)
    return choice


def picture_panel(
    cache: "ActivationCache",
    name: str,
    lens: Readout,
    offsets: Sequence[int],
    passage: PicturePassage,
    device: "str | torch.device" = "auto",
) -> HeatPanel:
    """The panel of one probe in a passage: the offsets 0 to 3 that it reads.

    Where the probe has no offset 0, the next token is the logit lens's, as in the paper.
    """
    place = CachePassage(cache, passage.sequence, passage.start, passage.width)
    fitted = sorted({n for layer, n in lens.pairs() if layer is not None and n in offsets})
    fitted = fitted[:MOST_OFFSETS]
    maps: list[LensMap] = list(read_lens_maps({name: lens}, place, offsets=fitted, device=device))
    if 0 not in fitted:
        layers = sorted({layer for layer, _ in lens.pairs() if layer is not None})
        next_token = read_lens_maps({"logit": LogitLens(layers, (0,))}, place, device=device)
        maps = [*next_token, *maps[: MOST_OFFSETS - 1]]
    layers = sorted(set.intersection(*(set(entry.layers) for entry in maps)))
    width = min(len(entry.tokens) for entry in maps)
    cells = [[_cell(maps, layer, column) for column in range(width)] for layer in layers]
    source = "" if 0 in fitted else " (t+1: logit lens)"
    return HeatPanel(
        title=f"{label(name)}{source}, sequence {passage.sequence} from token {passage.start}",
        x_label="token that was read",
        y_label="layer",
        x_names=list(maps[0].tokens[:width]),
        y_names=[str(layer) for layer in layers],
        values=[[cell.mean for cell in row] for row in cells],
        color_label="mean probability",
        texts=[[cell.text for cell in row] for row in cells],
        hovers=[[cell.hover for cell in row] for row in cells],
        color_range=(0.0, 1.0),
        letters=LETTERS,
    )


@dataclass(frozen=True)
class _PictureCell:
    text: str
    """The tokens one after the other."""
    mean: float | None
    """Mean of their probabilities; None where one is undefined."""
    hover: str


def _cell(maps: Sequence[LensMap], layer: int, column: int) -> _PictureCell:
    """The tokens that the maps of one probe have at `layer` for the token `column`."""
    tokens, probabilities, lines = [], [], []
    for entry in maps:
        row = entry.layers.index(layer)
        token, share = entry.top[row][column][0], float(entry.top_probability[row, column, 0])
        tokens.append(token)
        probabilities.append(share)
        lines.append(f"t+{entry.offset + 1}: {token} {share:.3f}, model {entry.targets[column]}")
    mean = float(np.mean(probabilities))
    text = "".join(tokens).replace("␣", " ")
    return _PictureCell(
        text=text,
        mean=mean if np.isfinite(mean) else None,
        hover="\n".join([f"mean probability {mean:.3f}", *lines]),
    )
