"""Activation patching of one passage: the effect of each layer at each position (`patch_passage`).

One row at a time is replaced, by the row of the same position of another passage (interchange), or
by the layer's mean (ablation), and the prediction after the last position is compared with that of
the unchanged passage. Rows come from the cache; the model runs from the layer on.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import UsageError
from ...cache.progress import Progress
from ..token_texts.token_names import TokenNames
from .layer_runs import choose_layers, load_resumable, mean_rows

if TYPE_CHECKING:
    from ...cache.resuming.resumable_model import ResumableModel
    from ...cache.store.activation_cache import ActivationCache

BATCH_BYTES = 64 << 20
"""Bytes of float32 logits of the positions that run together."""


@dataclass(frozen=True)
class PatchCell:
    """The effect of one row, on the prediction after the last position of a passage."""

    layer: int
    index: int
    """Index of the changed position in its sequence."""
    token: str
    """Token at that position."""
    source_token: str | None
    """Token of the other passage there; None for mean ablation."""
    kl: float | None
    """KL(unchanged || changed) in nats; None where the logits are no distribution."""
    log_odds: float | None
    """log p(first) - log p(second) of the chosen tokens; None without tokens."""
    log_odds_change: float | None
    """That, less its value in the unchanged passage."""


@dataclass(frozen=True)
class PatchMap:
    """Cells of all layers and positions of a passage, and the passage's own log-odds."""

    cells: tuple[PatchCell, ...]
    sequence: int
    source: int | None
    last: int
    """Index of the position whose prediction is read."""
    tokens: tuple[str, str] | None
    log_odds: float | None
    """Of the unchanged passage."""
    source_log_odds: float | None
    """Of the other passage."""


def patch_passage(
    cache: "ActivationCache",
    sequence: int,
    source: int | None = None,
    *,
    model: Any = None,
    tokens: tuple[str, str] | None = None,
    last: int | None = None,
    width: int = 24,
    layers: Any = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> PatchMap:
    """Change the rows of `sequence`, one at a time, in the `width` positions up to `last`.

    `sequence` and `source` are numbers of sequences of the cache; without `source` rows become the
    mean row of the layer. `last` is the index of the position whose prediction is read (default:
    the last that both have). `tokens` are two texts of one token whose log-odds are compared.
    Raises `UsageError` for sequences and tokens that are not there.
    """
    import torch

    chosen = choose_layers(cache, layers, last=True)
    for number in (sequence, source):
        if number is not None and not 0 <= number < len(cache.sequence_start):
            raise UsageError(
                f"the cache has sequences 0 to {len(cache.sequence_start) - 1}, there is no "
                f"{number}"
            )
    length = min(
        int(cache.sequence_length[number]) for number in (sequence, source) if number is not None
    )
    last = length - 1 if last is None else last
    if not 0 <= last < length:
        raise UsageError(f"the passages have positions 0 to {length - 1}, there is no {last}")
    if width < 1:
        raise UsageError(f"width must be 1 or more, not {width}")
    ids = None if tokens is None else token_pair(cache, tokens)
    loaded = load_resumable(cache, model, device)
    passage = _Passage(cache, loaded, sequence, last)
    indices = np.arange(max(0, last + 1 - width), last + 1)
    means = mean_rows(cache, chosen, seed) if source is None else {}
    other = None if source is None else _Passage(cache, loaded, source, last)
    cells: list[PatchCell] = []
    with torch.inference_mode():
        names = TokenNames(cache)
        texts = [names(token) for token in passage.tokens[indices].tolist()]
        source_texts = (
            None if other is None else [names(token) for token in other.tokens[indices].tolist()]
        )
        own = None if ids is None else passage.log_odds(ids)
        for done, layer in enumerate(chosen):
            rows = passage.rows(layer)
            values = means[layer][None] if other is None else other.rows(layer)[indices]
            kl, log_odds = passage.effects(layer, rows, indices, values, ids)
            for column, index in enumerate(indices.tolist()):
                change = None if ids is None or own is None else log_odds[column] - own
                cells.append(
                    PatchCell(
                        layer=layer,
                        index=index,
                        token=texts[column],
                        source_token=None if source_texts is None else source_texts[column],
                        kl=_finite(kl[column]),
                        log_odds=None if ids is None else _finite(log_odds[column]),
                        log_odds_change=None if change is None else _finite(change),
                    )
                )
            if progress is not None:
                progress(done + 1, len(chosen))
        from_source = None if ids is None or other is None else other.log_odds(ids)
    return PatchMap(
        cells=tuple(cells),
        sequence=sequence,
        source=source,
        last=last,
        tokens=tokens,
        log_odds=own,
        source_log_odds=from_source,
    )


class _Passage:
    """One sequence of a cache up to the position that is read."""

    def __init__(
        self, cache: "ActivationCache", model: "ResumableModel", sequence: int, last: int
    ) -> None:
        self._cache = cache
        self._model = model
        start = int(cache.sequence_start[sequence])
        self._positions = np.arange(start, start + last + 1)
        self.tokens = np.asarray(cache.tokens.take(self._positions), np.int64)

    def rows(self, layer: int) -> np.ndarray:
        """Rows of `layer`, `(length, d_model)` float32."""
        return np.asarray(self._cache.residual_array(layer).take(self._positions), np.float32)

    def log_odds(self, ids: tuple[int, int]) -> float:
        """log p(first) - log p(second) after the unchanged passage, by the cache's head."""
        logits = self._cache.head.logits(self.rows(self._cache.n_blocks)[-1:])[0]
        return float(logits[ids[0]]) - float(logits[ids[1]])

    def effects(
        self,
        layer: int,
        rows: np.ndarray,
        indices: np.ndarray,
        values: np.ndarray,
        ids: tuple[int, int] | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """KL and log-odds with each of `indices` set to its row of `values`; each `(k,)`.

        `values` are `(k, d_model)`, or `(1, d_model)` for all.
        """
        import torch

        from .effects import measure_effects

        model = self._model
        run = model.resume if model.can_resume(layer) else model.overwrite
        clean = run(layer, rows, self.tokens)[-1:]
        values = np.broadcast_to(values, (len(indices), rows.shape[1]))
        limit = max(1, BATCH_BYTES // (4 * self._cache.vocab * len(rows)))
        kl, log_odds = [], []
        for start in range(0, len(indices), limit):
            part = indices[start : start + limit]
            hidden = np.repeat(rows[None], len(part), 0)
            hidden[np.arange(len(part)), part] = values[start : start + limit]
            ids_of_batch = np.repeat(self.tokens[None], len(part), 0)
            logits = run(layer, hidden, ids_of_batch)[:, -1]
            no_text = np.full(len(part), -1)
            kl.append(measure_effects(clean.expand_as(logits), logits, no_text)["kl"])
            if ids is None:
                log_odds.append(np.full(len(part), np.nan))
            else:
                odds = logits[:, ids[0]].double() - logits[:, ids[1]].double()
                log_odds.append(torch.as_tensor(odds).cpu().numpy())
        return np.concatenate(kl), np.concatenate(log_odds)


def token_pair(cache: "ActivationCache", texts: tuple[str, str]) -> tuple[int, int]:
    """Ids of two texts of one token each; raises `UsageError` for other texts.

    A word after a space is tried with the space first.
    """
    first, second = (token_id(cache, text) for text in texts)
    if first == second:
        raise UsageError(f"{texts[0]!r} and {texts[1]!r} are one token; choose two tokens")
    return first, second


def token_id(cache: "ActivationCache", text: str) -> int:
    """The id of the one token `text`, with a space before it or as it is."""
    tokenizer = cache.tokenizer()
    pieces: list[str] = []
    for candidate in (" " + text.strip(), text.strip(), text):
        encoding = tokenizer.encode(candidate, add_special_tokens=False)
        ids = encoding.ids
        spaces = [token.strip("▁Ġ ") == "" for token in encoding.tokens]
        # Some tokenizers put the space before a word into a token of its own.
        ids = [number for number, is_space in zip(ids, spaces, strict=True) if not is_space]
        if len(ids) == 1:
            return int(ids[0])
        pieces = pieces or list(encoding.tokens)
    raise UsageError(f"{text!r} is not one token of this model but {pieces}; choose another word")


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
