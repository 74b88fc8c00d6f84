"""Measures what a sequence's residual stream depends on besides its own tokens: padding, the batch.

Sequences of the stream go through the model alone, and in batches as `batches.py` would form them:
the longest with the shortest, and with those around every constant of the configuration, where
windows, chunks, sparse attention and rotary frequencies switch. What is found holds for lengths up
to the longest that was run; a stream with longer sequences is measured again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ModelError
from ..forward.batches import BATCH_TOKENS
from ..model.blocks import DecoderBlocks
from ..model.memory import is_out_of_memory
from ..tokens.token_stream import TokenStream

CHECK_TOKENS = 4096
"""Tokens of a batch of these checks, two sequences at least."""
CHECKED_LENGTHS = 12
"""Different lengths that are run at most."""
EQUAL_ROWS = 8
"""Sequences of equal length that are run together at most."""
SHARING_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative change of a row by padding, or by the other rows of its batch, per dtype of the
model. Beyond it lengths are kept apart, or every sequence runs alone."""
REPEAT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Largest relative change of a residual by later tokens, or by running again: the shapes are the
same, so even rounding hardly differs."""
QUIET_ROW = 1e-3
"""Share of the median row's norm below which a row's change is measured against that instead."""


@dataclass(frozen=True)
class Independence:
    """What the residual stream of a row was found to depend on."""

    padding_error: float
    """Largest relative change of a row when its sequence is padded beside a longer one."""
    batch_error: float
    """Largest relative change of a row by other sequences of the same length in its batch."""
    causal: bool
    """False if a later token changes an earlier residual."""
    embedding: bool
    """Whether layer 0 follows from its own token: False if something mixes before the blocks."""
    choice: str | None
    """How the model chooses some of all positions by their scores, such as `topk 16 of 64`; equal
    scores then fall this way or that with the shape of the batch. None if it does not."""
    longest: int
    """Tokens of the longest sequence that was run."""
    limit: float
    """Relative change up to which a row counts as the same."""

    @property
    def pad(self) -> bool:
        """Whether sequences of different lengths may share a batch."""
        return self.padding_error <= self.limit

    @property
    def alone(self) -> bool:
        """Whether each sequence must run alone."""
        return self.choice is not None or not self.batch_error <= self.limit

    def contradiction(self, pad: bool, alone: bool, slack: float = 4.0) -> str | None:
        """Why rows that ran with `pad` and `alone` are not those of the sequences alone, or None.

        `slack` is allowed for the rounding of another machine.
        """
        if alone:
            return None
        if self.choice is not None:
            return f"the model chooses among positions ({self.choice})"
        if not self.batch_error <= slack * self.limit:
            return f"other rows of the batch change a row by {self.batch_error:.1e}"
        if pad and not self.padding_error <= slack * self.limit:
            return f"padding changes a row by {self.padding_error:.1e}"
        return None


def measure_independence(
    stack: DecoderBlocks, stream: TokenStream, fresh: torch.Tensor, batch_tokens: int | None = None
) -> Independence:
    """Run sequences of `stream` alone and together; to be called in inference mode.

    `fresh`: a few rows of random tokens, `(rows, length)`, run besides. `batch_tokens` bounds the
    batches of the extraction (default: the device's). Raises `ModelError` if the model gives other
    residuals when it runs again, or cannot run on the longest sequence.
    """
    dtype, device = lowest_dtype(stack.model), fresh.device
    real = _Sequences(stream, fresh)
    longest = real.longest()
    _check_repeats(stack, longest, fresh[:1], dtype)
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS["cpu" if device.type == "cpu" else "gpu"]
    batch_error = _batch_error(stack, fresh, dtype)
    padding_error = _padding_error(stack, list(_half(fresh)), dtype)
    shared = np.unique(stream.lengths[stream.lengths <= batch_tokens // 2])
    if len(shared):  # longer ones run alone anyway
        rows = max(2, min(EQUAL_ROWS, CHECK_TOKENS // int(shared[-1])))
        together = real.of_length(int(shared[-1]), rows)
        batch_error = max(batch_error, _batch_error(stack, together, dtype))
        for batch in _mixed_batches(choose_lengths(shared, _constants(stack.model))):
            padding_error = max(padding_error, _padding_error(stack, real.of_lengths(batch), dtype))
    other = real.random_tokens(longest.shape)
    roll = torch.roll(fresh, 1, 0)
    return Independence(
        padding_error,
        batch_error,
        _is_causal(stack, fresh, roll, dtype) and _is_causal(stack, longest, other, dtype),
        _is_embedding(stack, fresh, roll, dtype) and _is_embedding(stack, longest, other, dtype),
        _choice_among_positions(stack, longest),
        longest.shape[1],
        SHARING_TOLERANCE.get(dtype, 1e-4),
    )


def lowest_dtype(model: torch.nn.Module) -> torch.dtype:
    """The lowest precision among the weights of the model; packed ones (float8) do not count."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    running = [dtype for dtype in found if dtype.itemsize > 1]
    return max(running, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def choose_lengths(lengths: np.ndarray, constants: list[int]) -> list[int]:
    """At most `CHECKED_LENGTHS` of the ascending `lengths`: the ends, the last up to each constant
    and the first beyond it, and quantiles."""
    chosen = [int(lengths[-1]), int(lengths[0])]
    for constant in constants:
        place = int(np.searchsorted(lengths, constant, side="right"))
        if 0 < place < len(lengths):
            chosen += [int(lengths[place - 1]), int(lengths[place])]
    quantiles = [int(lengths[int(q * (len(lengths) - 1))]) for q in (0.5, 0.25, 0.75)]
    most = CHECKED_LENGTHS - len(quantiles)
    return sorted({*list(dict.fromkeys(chosen))[:most], *quantiles}, reverse=True)


def _mixed_batches(lengths: list[int]) -> Iterator[list[int]]:
    """Batches of different `lengths`, which fall: each begins with its longest.

    All of them stand beside the longest; the shorter half also beside its own longest, because a
    model may switch at a width between.
    """
    for first in (0, len(lengths) // 2):
        rest = lengths[first + 1 :]
        rows = max(1, CHECK_TOKENS // lengths[first] - 1)
        for start in range(0, len(rest), rows):
            yield [lengths[first], *rest[start : start + rows]]
        if len(lengths) < 4:
            return


class _Sequences:
    """Rows of token ids on the device: the stream's own, and random ones where it has too few."""

    def __init__(self, stream: TokenStream, fresh: torch.Tensor) -> None:
        self._stream = stream
        self._device = fresh.device
        self._tokens = fresh.unique().cpu().numpy()
        self._rng = np.random.default_rng(1)

    def longest(self) -> torch.Tensor:
        """`(1, length)`."""
        return self._row(int(np.argmax(self._stream.lengths)))

    def of_length(self, length: int, rows: int) -> torch.Tensor:
        """Sequences of one length, `(rows, length)`."""
        numbers = np.flatnonzero(self._stream.lengths == length)[:rows]
        found = [self._row(int(number)) for number in numbers]
        more = rows - len(found)
        return torch.cat([*found, self.random_tokens((more, length))]) if more else torch.cat(found)

    def of_lengths(self, lengths: list[int]) -> list[torch.Tensor]:
        """One sequence of each length, `(length,)`."""
        numbers = [int(np.flatnonzero(self._stream.lengths == length)[0]) for length in lengths]
        return [self._row(number)[0] for number in numbers]

    def random_tokens(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Tokens among those of the random rows, which leave out what the model masks by its id."""
        return torch.from_numpy(self._rng.choice(self._tokens, tuple(shape))).to(self._device)

    def _row(self, number: int) -> torch.Tensor:
        ids = self._stream.sequence(number).astype(np.int64)
        return torch.from_numpy(ids)[None].to(self._device)


def _constants(model: Any) -> list[int]:
    """Integers of the configuration and of its parts, ascending: windows, chunks, limits."""
    config = getattr(model, "config", None)
    found: set[int] = set()

    def collect(value: Any) -> None:
        if isinstance(value, bool):
            return
        if isinstance(value, int) and value > 1:
            found.add(value)
        for inner in value.values() if isinstance(value, dict) else ():
            collect(inner)
        for inner in value if isinstance(value, list | tuple) else ():
            collect(inner)

    collect(config.to_dict() if config is not None and hasattr(config, "to_dict") else {})
    return sorted(found, reverse=True)


def row_change(one: torch.Tensor, many: torch.Tensor, dtype: torch.dtype) -> float:
    """Relative change of rows `(..., d_model)`: |many - one| over |one|, in the Euclidean norm.

    The largest of all rows in float32; in half precision, where a router of experts may tip over
    rounding, the root of the mean square. A change of one row among many is not hidden by a few
    rows of huge values.
    """
    a, b = one.float().flatten(0, -2), many.float().flatten(0, -2)
    finite = a.isfinite().all(-1)
    if not bool((finite == b.isfinite().all(-1)).all()):
        return float("inf")
    a, b = a[finite], b[finite]
    if not len(a):
        return 0.0
    norms = a.norm(dim=-1)
    change = (b - a).norm(dim=-1) / norms.clamp_min(max(QUIET_ROW * float(norms.median()), 1e-30))
    if torch.finfo(dtype).bits < 32:
        return float(change.square().mean().sqrt())
    return float(change.max())


def _worst(pairs: Iterator[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> float:
    return max(row_change(one, many, dtype) for one, many in pairs)


def _check_repeats(
    stack: DecoderBlocks, longest: torch.Tensor, short: torch.Tensor, dtype: torch.dtype
) -> None:
    """Refuse a model that gives other residuals for the same tokens, again or after others.

    The shorter one runs first: a model may remember the longest sequence that it has read.
    """
    middle = longest[:, : max(1, 3 * longest.shape[1] // 4)]
    first = [_run_or_refuse(stack, ids) for ids in (middle, longest)]
    stack.residuals(short)
    for ids, before in zip((middle, longest), first, strict=True):
        refuse_difference(stack.model, ids, _worst(_pairs(before, stack.residuals(ids)), dtype))


def refuse_difference(model: torch.nn.Module, ids: torch.Tensor, change: float) -> None:
    """Refuse a model that gave other numbers, by the relative `change`, for the same tokens."""
    if not change <= REPEAT_TOLERANCE.get(lowest_dtype(model), 1e-5):
        raise ModelError(
            f"{type(model).__name__} is not deterministic: run twice on the same {ids.shape[1]} "
            f"tokens, its residual stream differs by {change:.1e}"
        )


def _run_or_refuse(stack: DecoderBlocks, ids: torch.Tensor) -> list[torch.Tensor]:
    """Residuals of `ids`; refuses a model that cannot read as many tokens."""
    try:
        return stack.residuals(ids)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{type(stack.model).__name__} cannot run on a sequence of {ids.shape[1]} tokens "
            f"({reason}); extract with a shorter --context"
        ) from None


def _batch_error(stack: DecoderBlocks, ids: torch.Tensor, dtype: torch.dtype) -> float:
    """Relative change of the rows of `ids` by each other; 1 if they do not fit together."""
    try:
        together = stack.residuals(ids)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return 1.0
    return max(
        _worst(((a[0], b[row]) for a, b in _pairs(stack.residuals(ids[row : row + 1]), together)),
               dtype)
        for row in range(len(ids))
    )  # fmt: skip


def _padding_error(
    stack: DecoderBlocks, sequences: list[torch.Tensor], dtype: torch.dtype
) -> float:
    """Relative change of `sequences` when they run together, the shorter ones padded."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    ids = ids.to(sequences[0])
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
    if len(sequences) < 2:
        return 0.0
    try:
        together = stack.residuals(ids, mask.to(ids.device))
    except (TypeError, ValueError, RuntimeError, MemoryError):
        return 1.0  # the model takes no such mask, or memory ran out: equal lengths only
    worst = 0.0
    for row, sequence in enumerate(sequences):
        alone = stack.residuals(sequence[None])
        pairs = ((a[0], b[row, : len(sequence)]) for a, b in _pairs(alone, together))
        worst = max(worst, _worst(pairs, dtype))
    return worst


def _pairs(one: list, other: list) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(one, other, strict=True)


def _half(ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """The first row of `ids` cut in half, and the others."""
    yield ids[0, : ids.shape[1] // 2]
    yield from ids[1:]


def _is_causal(
    stack: DecoderBlocks, ids: torch.Tensor, other: torch.Tensor, dtype: torch.dtype
) -> bool:
    """Whether tokens of `other` from some position on leave all layers before it as they are."""
    length, limit = ids.shape[1], REPEAT_TOLERANCE.get(dtype, 1e-5)
    before = stack.residuals(ids)
    for start in sorted({length // 3, 2 * length // 3, length - 1} - {0}):
        after = stack.residuals(torch.cat([ids[:, :start], other[:, start:]], 1))
        if (
            not _worst(((a[:, :start], b[:, :start]) for a, b in _pairs(before, after)), dtype)
            <= limit
        ):
            return False
    return True


def _is_embedding(
    stack: DecoderBlocks, ids: torch.Tensor, other: torch.Tensor, dtype: torch.dtype
) -> bool:
    """Whether other tokens before some position leave layer 0 from there on as it is."""
    middle, limit = ids.shape[1] // 2, REPEAT_TOLERANCE.get(dtype, 1e-5)
    before = stack.residuals(ids)[0]
    after = stack.residuals(torch.cat([other[:, :middle], ids[:, middle:]], 1))[0]
    return row_change(before[:, middle:], after[:, middle:], dtype) <= limit


class _Choices(TorchDispatchMode):
    """Notes where floating-point scores are sorted or cut to the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, int, int]] = set()
        """Name of the operation, scores, and how many of them are taken."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else ""
        if name in ("topk", "kthvalue", "sort", "argsort", "argmax"):
            self._note(name, args, kwargs)
        return func(*args, **kwargs)

    def _note(self, name: str, args: Any, kwargs: Any) -> None:
        scores = args[0]
        if not (isinstance(scores, torch.Tensor) and scores.is_floating_point() and scores.ndim):
            return
        counted = name in ("topk", "kthvalue")
        place = 2 if counted else 1
        found = args[place] if len(args) > place else kwargs.get("dim", -1)
        dim = found if isinstance(found, int) and not isinstance(found, bool) else -1
        size = int(scores.shape[dim])
        taken = int(args[1] if counted and len(args) > 1 else kwargs.get("k", 1))
        self.found.add((name, size, taken if counted else 1))


def _choice_among_positions(stack: DecoderBlocks, longest: torch.Tensor) -> str | None:
    """The first choice of some of all positions, as `<operation> <taken> of <scores>`.

    Scores of positions are those whose number changes with the length; experts' does not.
    """
    shorter = longest[:, : longest.shape[1] - max(1, longest.shape[1] // 4)]
    if not shorter.shape[1]:
        return None
    runs = []
    for ids in (longest, shorter):
        with _Choices() as choices:
            stack.residuals(ids)
        runs.append(choices.found)
    sizes = {(name, size) for name, size, _ in runs[1]}
    for name, size, taken in sorted(runs[0]):
        if taken < size and (name, size) not in sizes:
            return f"{name} {taken} of {size}"
    return None
