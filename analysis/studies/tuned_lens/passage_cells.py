"""Prediction trajectories of one passage: every measure at every layer and token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ....cache.devices import choose_device
from ....cache.errors import UsageError
from ....cache.progress import Progress
from ....probes.base.readout import Readout
from ...evaluation.lens_heatmap import find_telling_passages
from ...token_texts.token_names import TokenNames
from ..trajectories.position_sample import PositionSample
from ..trajectories.readings import MEASURES, Trajectories, measure_trajectories

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache


@dataclass(frozen=True)
class PassageCellRow:
    """What one lens says at one layer after one token; nats, None where undefined."""

    lens: str
    index: int
    """Index of the token in its sequence."""
    token: str
    """The token that was read."""
    target: str
    """The model's top token after it."""
    layer: int
    top: str
    """The lens's top token."""
    kl: float | None
    entropy: float | None
    rank: float | None
    """Rank of the model's top token, 1 for the top."""
    js: float | None
    total_variation: float | None
    cross_entropy: float | None
    """-log q of the text's next token; None at the end of a text."""
    max_probability: float | None
    tracked_rank: float | None
    """Rank of the tracked token; None without one."""
    tracked_log_p: float | None
    """Its log q."""


@dataclass(frozen=True)
class LensPassage:
    """A run of tokens of one sequence."""

    sequence: int
    start: int
    """Index of the first token in the sequence."""
    width: int


def choose_passage(
    cache: "ActivationCache",
    split: str,
    sequence: int | None,
    start: int | None,
    width: int,
    device: str,
) -> LensPassage:
    """The passage that was asked for, else the most telling one of the split.

    Raises `UsageError` for a sequence or start that is not there.
    """
    if width < 1:
        raise UsageError(f"a passage has at least 1 token, not {width}")
    if sequence is None:
        if start is not None:
            raise UsageError("a start is an index in a sequence: name the sequence, too")
        ((sequence, start),) = find_telling_passages(cache, split, width, choose_device(device))
    if not 0 <= sequence < len(cache.sequence_length):
        raise UsageError(f"sequence must lie in 0-{len(cache.sequence_length) - 1}, not {sequence}")
    length, start = int(cache.sequence_length[sequence]), start or 0
    if not 0 <= start < length:
        raise UsageError(f"sequence {sequence} has {length} tokens: none at {start}")
    return LensPassage(sequence, start, min(width, length - start))


def find_token(cache: "ActivationCache", token: "str | int | None") -> int | None:
    """Id of a token given by its text (`␣` is a space) or its id.

    Raises `UsageError` for a text of several tokens, and for an id beyond the vocabulary.
    """
    if token is None:
        return None
    if isinstance(token, int):
        if not 0 <= token < cache.vocab:
            raise UsageError(f"there is no token {token} in a vocabulary of {cache.vocab}")
        return token
    names = TokenNames(cache)
    if names.tokenizer is None:
        raise UsageError(f"the cache keeps no tokenizer: give the id of the token, not {token!r}")
    text = token.replace("␣", " ")
    ids = names.tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) != 1:
        parts = " ".join(names(one) for one in ids) or "none"
        raise UsageError(f"{token!r} is {len(ids)} tokens ({parts}): give one, such as '␣the'")
    return int(ids[0])


def read_passage(
    cache: "ActivationCache",
    passage: LensPassage,
    lenses: Mapping[str, Readout],
    tracked: int | None,
    device: str,
    progress: Progress | None = None,
) -> dict[str, Trajectories]:
    """All measures of all lenses in `passage`; arrays are `(width, layers)`."""
    first = int(cache.sequence_start[passage.sequence]) + passage.start
    where = np.zeros(cache.positions, bool)
    where[first : first + passage.width] = True
    sample = PositionSample(cache, "all", np.array([passage.sequence]), where=where)
    return measure_trajectories(
        sample, lenses, measures=MEASURES, tracked=tracked, device=device, progress=progress
    )


def passage_rows(
    cache: "ActivationCache", passage: LensPassage, readings: Mapping[str, Trajectories]
) -> list[PassageCellRow]:
    """One row for each lens, token and layer."""
    names = TokenNames(cache)
    first = int(cache.sequence_start[passage.sequence]) + passage.start
    tokens = np.asarray(cache.tokens[first : first + passage.width], np.int64)
    fields = [
        name for name in PassageCellRow.__dataclass_fields__ if name in (*MEASURES, "tracked")
    ]
    fields += ["tracked_rank", "tracked_log_p"]
    rows = []
    for lens in readings.values():
        for place, token in enumerate(tokens.tolist()):
            for column, layer in enumerate(lens.layers):
                measured = {
                    name: _known(lens.values[name][place, column]) if name in lens.values else None
                    for name in fields
                }
                rows.append(
                    PassageCellRow(
                        lens=str(lens.lens),
                        index=passage.start + place,
                        token=names(token),
                        target=names(int(lens.top[place, -1])),
                        layer=layer,
                        top=names(int(lens.top[place, column])),
                        **measured,
                    )
                )
    return rows


def _known(value: np.floating) -> float | None:
    """A number, None for NaN."""
    return None if np.isnan(value) else float(value)
