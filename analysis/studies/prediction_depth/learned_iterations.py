"""When a position was learned: the checkpoint from which the model's top token is the text's.

Caches of several checkpoints of one model hold the same tokens. A position is found in another
cache by the hash of its sequence (`sequences/hash`: token ids, documents, split) and its index in
it. The iteration learned is that of Baldock et al. (2106.09647): the first checkpoint from which
the prediction is right at every later checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ....cache.devices import TileRows, copy_to_device, copy_to_host
from ....cache.errors import MismatchError, UsageError
from ....cache.format.manifest import SHORT_ID
from ....cache.progress import Progress
from ...evaluation.distributions import top_token
from ...evaluation.windows import default_window_rows
from ..trajectories.position_sample import PositionSample

if TYPE_CHECKING:
    import torch

    from ....cache.store.activation_cache import ActivationCache


@dataclass(frozen=True, eq=False)
class CheckpointReadings:
    """Whether the model of each checkpoint predicts the text's next token; arrays of the sample."""

    iterations: tuple[int, ...]
    """Iterations (training steps) of the checkpoints, ascending."""
    correct: np.ndarray
    """Whether the top token is the text's, `(n, checkpoints)` bool."""
    known: np.ndarray
    """Positions with a next token where every checkpoint has a prediction, `(n,)` bool."""
    sequences: int
    """Sequences of the sample that every checkpoint has."""

    def learned(self) -> np.ndarray:
        """Iteration learned, `(n,)` float64; NaN where it is not known, or never learned."""
        found = iterations_learned(self.correct, self.iterations)
        return np.where(self.known, found, np.nan)

    def learned_or_later(self) -> np.ndarray:
        """Like `learned`; positions that are not learned by the last checkpoint get infinity."""
        found = self.learned()
        return np.where(self.known & np.isnan(found), np.inf, found)


def parse_checkpoints(arguments: Sequence[str]) -> dict[int, str]:
    """Iteration -> name of a cache, from arguments such as `1000=3f2a`.

    Raises `UsageError` for another form, and for an iteration that comes twice.
    """
    names: dict[int, str] = {}
    for argument in arguments:
        iteration, sign, name = argument.partition("=")
        if not (sign and name and iteration.strip().isdecimal()):
            raise UsageError(f"a step is ITERATION=CACHE, such as 1000=3f2a, not {argument!r}")
        if int(iteration) in names:
            raise UsageError(f"the iteration {int(iteration)} has two checkpoints: give one")
        names[int(iteration)] = name
    return names


def iterations_learned(correct: np.ndarray, iterations: Sequence[int]) -> np.ndarray:
    """First iteration from which `correct` `(n, checkpoints)` is true to the end, `(n,)` float64.

    NaN where the last checkpoint is wrong.
    """
    run = np.cumprod(correct[:, ::-1], axis=1).sum(1).astype(np.int64)
    numbers = np.array(iterations, np.float64)
    return np.where(run > 0, numbers[len(numbers) - np.maximum(run, 1)], np.nan)


def read_checkpoints(
    sample: PositionSample,
    checkpoints: "Mapping[int, ActivationCache]",
    device: "torch.device",
    progress: Progress | None = None,
) -> CheckpointReadings:
    """Read the top token of every checkpoint at the positions of `sample`.

    `progress` counts checkpoints. Raises `UsageError` for fewer than two checkpoints,
    `MismatchError` for a cache of other tokens.
    """
    if len(checkpoints) < 2:
        raise UsageError(
            f"when a position was learned takes at least 2 checkpoints, not {len(checkpoints)}: "
            "give --step ITERATION=CACHE for each"
        )
    iterations = tuple(sorted(checkpoints))
    rows = {number: find_positions(sample, checkpoints[number]) for number in iterations}
    everywhere = np.all([found >= 0 for found in rows.values()], axis=0)
    if not everywhere.any():
        raise MismatchError(
            "no sequence of the sample lies in the caches of all checkpoints: extract the same "
            "texts with every checkpoint"
        )
    top = np.full((sample.count, len(iterations)), -1, np.int64)
    for column, number in enumerate(iterations):
        cache = checkpoints[number]
        top[everywhere, column] = read_top_tokens(cache, rows[number][everywhere], device)
        if progress is not None:
            progress(column + 1, len(iterations))
    return CheckpointReadings(
        iterations=iterations,
        correct=top == sample.text_tokens[:, None],
        known=(top >= 0).all(1) & (sample.text_tokens >= 0),
        sequences=len(np.unique(sample.sequence_numbers[everywhere])),
    )


def find_positions(sample: PositionSample, other: "ActivationCache") -> np.ndarray:
    """Position in `other` of each position of `sample`, `(n,)` int64; -1 where there is none.

    Raises `MismatchError` if no sequence of the sample is in `other`, or if tokens differ.
    """
    cache = sample.cache
    keys = {key: number for number, key in reversed(list(enumerate(_sequence_keys(other))))}
    own = _sequence_keys(cache, sample.sequences)
    found = np.array([keys.get(key, -1) for key in own], np.int64)
    name = f"{other.manifest.model_name} ({other.id[:SHORT_ID]})"
    if not (found >= 0).any():
        raise MismatchError(
            f"the cache of {name} holds none of the {len(found)} sequences that were drawn from "
            f"{cache.id[:SHORT_ID]}: extract the same texts with the same tokenizer, --context, "
            "--seed and packing"
        )
    place = np.searchsorted(sample.sequences, sample.sequence_numbers)
    inside = sample.positions - cache.sequence_start[sample.sequence_numbers]
    positions = np.where(found[place] >= 0, other.sequence_start[found[place]] + inside, -1)
    here = positions >= 0
    differ = np.asarray(other.tokens[positions[here]], np.int64) != sample.tokens[here]
    if differ.any():
        raise MismatchError(
            f"{int(differ.sum())} of {int(here.sum())} tokens of {name} are others than those of "
            f"{cache.id[:SHORT_ID]} at the same positions: the caches were made with different "
            "tokenizers"
        )
    return positions


def _sequence_keys(
    cache: "ActivationCache", sequences: np.ndarray | None = None
) -> list[tuple[int, int, int]]:
    """Hash, first index in the context and length of each sequence."""
    numbers = np.arange(len(cache.sequence_length)) if sequences is None else sequences
    lengths = cache.sequence_length[numbers]
    first = np.zeros(len(numbers), np.int64)
    if cache.has("context/ids"):
        full = lengths > 0
        first[full] = cache.token_index.take(cache.sequence_start[numbers[full]])
    hashes = cache.sequence_hash[numbers]
    return list(zip(hashes.tolist(), first.tolist(), lengths.tolist(), strict=True))


def read_top_tokens(
    cache: "ActivationCache", positions: np.ndarray, device: "torch.device"
) -> np.ndarray:
    """The model's top token at each of `positions`, `(n,)` int64; -1 where undefined."""
    import torch

    head, array = cache.head.torch(device), cache.residual_array(cache.n_blocks)
    top = np.full(len(positions), -1, np.int64)

    def read(rows: slice) -> None:
        states = np.asarray(array[positions[rows]], np.float32)
        logits = head(copy_to_device(torch.from_numpy(states), device))
        best = top_token(logits)
        is_defined = logits.gather(-1, best[:, None])[:, 0].isfinite()
        top[rows] = copy_to_host(best.masked_fill(~is_defined, -1)).numpy()

    with torch.no_grad():
        TileRows(default_window_rows(cache.vocab, device), device).run(len(positions), read)
    return top
