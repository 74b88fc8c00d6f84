"""Which sequences go through the model together: a fixed plan, the same for any worker.

A part needs the sequences that overlap its rows. Those that start in it are sorted by length
within windows and grouped; the one that runs on into the next part goes through the model
alone, so that the next part, made by another worker, gets the same bytes for it.
"""

from dataclasses import dataclass

import numpy as np

from .layout import Layout

WINDOW_CHUNKS = 4
"""Sequences are sorted by length only within this many chunks, which bounds the writer's memory."""


@dataclass(frozen=True)
class Batch:
    """Numbers of sequences, none longer than the first one by `plan_part`'s order."""

    sequences: tuple[int, ...]


def plan_part(
    starts: np.ndarray,
    lengths: np.ndarray,
    layout: Layout,
    part: int,
    batch_tokens: int,
    pad: bool = True,
    sizes: np.ndarray | None = None,
    window_rows: int | None = None,
) -> list[Batch]:
    """Batches for `part`, in the order in which they should run.

    `starts` and `lengths` are rows of the cache, `sizes` tokens that the model reads (default:
    the lengths). `batch_tokens` bounds sequences times longest size. Without `pad` only
    sequences of equal size share a batch. `window_rows` is where sorting ends (default:
    `WINDOW_CHUNKS` chunks).
    """
    if not len(starts):
        return []
    positions = int(starts[-1] + lengths[-1])
    begin, end = layout.rows(part, positions)
    first = max(0, int(np.searchsorted(starts, begin, side="right")) - 1)
    last = int(np.searchsorted(starts, end, side="left"))
    batches: list[Batch] = []
    if starts[first] < begin:
        if starts[first] + lengths[first] > begin:
            batches.append(Batch((first,)))
        first += 1
    alone = last > first and starts[last - 1] + lengths[last - 1] > end
    sizes = lengths if sizes is None else sizes
    inside = np.arange(first, last - 1 if alone else last)
    window = (starts[inside] - begin) // (window_rows or WINDOW_CHUNKS * layout.chunk_rows)
    order = inside[np.lexsort((inside, -sizes[inside], window))]
    batches += _group(
        order, sizes, window[order - first] if len(order) else window, batch_tokens, pad
    )
    if alone:
        batches.append(Batch((last - 1,)))
    return batches


def _group(
    order: np.ndarray, lengths: np.ndarray, window: np.ndarray, batch_tokens: int, pad: bool
) -> list[Batch]:
    """Cut `order` (longest first within a window) into batches."""
    groups: list[list[int]] = []
    for place, number in enumerate(order):
        length, group = lengths[number], groups[-1] if groups else None
        fits = (
            group is not None
            and window[place] == window[place - 1]
            and (len(group) + 1) * max(lengths[group[0]], length) <= batch_tokens
            and (pad or lengths[group[0]] == length)
        )
        if fits and group is not None:
            group.append(int(number))
        else:
            groups.append([int(number)])
    return [Batch(tuple(group)) for group in groups]
