"""Measures whether residual streams depend on padding, other sequences or later tokens.

Sequences of the token stream run through the model alone and in batches as `forward/batches.py`
forms them: the longest with the shortest, and with the lengths around every constant of the model's
configuration, where windows, chunks, sparse attention and rotary frequencies switch. The result
holds for lengths up to the longest that was run; a stream with longer sequences is measured again.
`model_checks.py` calls `measure_independence`; the manifest keeps the result as rules of batches.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..devices import is_out_of_memory
from ..errors import ModelError
from ..forward.batches import BATCH_TOKENS
from ..model.blocks import DecoderBlocks
from ..tokens.token_stream import TokenStream

CHECK_TOKENS = 4096
"""Most tokens, padding included, of the rows of different lengths that run together, or two
sequences if these are longer."""
EQUAL_TOKENS = CHECK_TOKENS // 2
"""Most tokens of the sequences of equal length that run together, or two sequences."""
CHECKED_LENGTHS = 12
"""Most different lengths that are run."""
EQUAL_ROWS = 8
"""Most sequences of equal length that are run together."""
SHARING_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative change of a row by padding, or by the other rows of its batch, per dtype of the
model. Beyond it lengths are kept apart, or every sequence runs alone."""
REPEAT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Largest relative change of a residual by later tokens, or by running again: the shapes are the
same, so even rounding hardly differs."""
QUIET_ROW = 1e-3
"""Share of the median row norm that divides the change of rows with a smaller norm."""

Layers = list[torch.Tensor]
"""Residual streams of layers 0 to L, each `(rows, length, d_model)`."""


@dataclass(frozen=True)
class Independence:
    """Measured dependence of a sequence's residual stream on everything but its earlier tokens."""

    padding_error: float
    """Largest relative change of a row when its sequence is padded beside a longer one."""
    batch_error: float
    """Largest relative change of a row by other sequences of the same length in its batch."""
    causal: bool
    """False if a later token changes an earlier residual."""
    embedding: bool
    """Whether layer 0 depends on its own token alone; False if positions mix before the blocks."""
    choice: str | None
    """A choice of positions by score inside the model, such as `topk 16 of 64`, None without.

    Equal scores are then broken differently for another shape of the batch."""
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
        """The reason why a cache made with `pad` and `alone` has wrong rows, None if it has not.

        Rows are wrong if they differ from those of sequences that run alone, by more than `slack`
        times the limit, which allows for the rounding of another machine.
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


@dataclass(frozen=True)
class ImageIndependence:
    """Measured dependence of an image's residual stream on the other images of its batch.

    Images have one number of positions, so that none is ever padded; every position reads all
    others, and layer 0 the pixels.
    """

    batch_error: float
    """Largest relative change of a row by the other images of its batch."""
    longest: int
    """Positions of an image."""
    limit: float
    """Relative change up to which a row counts as the same."""
    causal: bool = False
    embedding: bool = False

    @property
    def pad(self) -> bool:
        """False: padding was not measured."""
        return False

    @property
    def alone(self) -> bool:
        """Whether each image must run alone."""
        return not self.batch_error <= self.limit


def measure_independence(
    stack: DecoderBlocks,
    stream: TokenStream,
    short_ids: torch.Tensor,
    batch_tokens: int | None = None,
) -> Independence:
    """Run sequences of `stream` alone and together; call in inference mode.

    `short_ids`: a few short rows of text and of random tokens, `(rows, length)` on the model's
    device, run besides. `batch_tokens` bounds the batches of the extraction (default: the
    device's). Raises `ModelError` if the model gives other residuals when it runs again, or cannot
    run on the longest sequence.
    """
    dtype, device = lowest_dtype(stack.model), short_ids.device
    sequences = _StreamSequences(stream, short_ids)
    longest = sequences.longest()
    choice, longest_layers = _check_repeats(stack, longest, short_ids[:1], dtype)

    # Later and earlier tokens replaced by others: in the longest sequence by random ones, in the
    # short rows by each other's.
    start = max(1, longest.shape[1] // 3)
    random_ids = sequences.random_tokens(longest.shape)
    changed_ids = torch.cat([longest[:, :start], random_ids[:, start:]], 1)
    changed_layers = stack.residuals(changed_ids)
    causal = _is_same_before(start, longest_layers, changed_layers, dtype)
    if not causal:
        # A difference of two runs on the same tokens is no sign of later tokens.
        change = _largest_change(longest_layers, stack.residuals(longest), dtype)
        refuse_difference(stack.model, longest, change)
    short_layers = stack.residuals(short_ids)
    other_ids = torch.roll(short_ids, 1, 0)
    causal = causal and _is_causal(stack, short_ids, short_layers, other_ids, dtype)
    embedding = _is_embedding(stack, longest, random_ids, dtype)
    embedding = embedding and _is_embedding(stack, short_ids, other_ids, dtype)

    # The short rows: of equal length, and the first row cut to half the length.
    single_layers = dict.fromkeys(range(len(short_ids)))
    batch_error = _batch_error(stack, short_ids, dtype, single_layers, short_layers)
    half_row = short_ids[0, : short_ids.shape[1] // 2]
    padding_error = _padding_error(stack, [half_row, *short_ids[1:]], dtype)

    # Sequences of the stream that are short enough to share a batch. Residuals of the longest one
    # are known, unless they would take more memory than the batch.
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS["cpu" if device.type == "cpu" else "gpu"]
    lengths = np.unique(stream.lengths[stream.lengths <= batch_tokens // 2])
    if len(lengths):
        length = int(lengths[-1])
        rows = max(2, min(EQUAL_ROWS, EQUAL_TOKENS // length))
        equal_ids = sequences.of_length(length, rows)
        equal_layers: dict[int, Layers | None] = {0: None, rows - 1: None}
        is_longest = length == longest.shape[1] and 2 * length <= CHECK_TOKENS
        if is_longest:
            equal_ids[-1:] = changed_ids
            equal_layers = {0: longest_layers, rows - 1: changed_layers}
        del changed_layers
        batch_error = max(batch_error, _batch_error(stack, equal_ids, dtype, equal_layers))

        known_layers = longest_layers if is_longest else None
        del longest_layers
        checked_lengths = choose_lengths(lengths, _configuration_integers(stack.model))
        for batch_lengths in _mixed_batches(checked_lengths):
            mixed = sequences.of_lengths(batch_lengths)
            layers = known_layers if batch_lengths[0] == length else None
            padding_error = max(padding_error, _padding_error(stack, mixed, dtype, layers))

    return Independence(
        padding_error=padding_error,
        batch_error=batch_error,
        causal=causal,
        embedding=embedding,
        choice=choice,
        longest=longest.shape[1],
        limit=SHARING_TOLERANCE.get(dtype, 1e-4),
    )


def lowest_dtype(model: torch.nn.Module) -> torch.dtype:
    """The dtype of lowest precision among the weights; packed weights (float8) do not count."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    compute_dtypes = [dtype for dtype in dtypes if dtype.itemsize > 1]
    return max(compute_dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def choose_lengths(lengths: np.ndarray, constants: list[int]) -> list[int]:
    """At most `CHECKED_LENGTHS` of the ascending `lengths`, longest first.

    The shortest and the longest, the last length up to each of `constants` and the first beyond
    the constant, and quantiles. Of long sequences as many lengths as `CHECK_TOKENS` holds rows of
    the longest, at least two.
    """
    most = max(2, min(CHECKED_LENGTHS, CHECK_TOKENS // int(lengths[-1])))
    candidates = [int(lengths[-1]), int(lengths[0])]
    for constant in constants:
        index = int(np.searchsorted(lengths, constant, side="right"))
        if 0 < index < len(lengths):
            candidates += [int(lengths[index - 1]), int(lengths[index])]
    quantiles = [int(lengths[int(q * (len(lengths) - 1))]) for q in (0.5, 0.25, 0.75)]
    # Quantiles are reserved room unless the rows are long and few.
    limit = most - len(quantiles) if most == CHECKED_LENGTHS else most
    chosen = dict.fromkeys([*list(dict.fromkeys(candidates))[:limit], *quantiles])
    return sorted(list(chosen)[:most], reverse=True)


def _configuration_integers(model: Any) -> list[int]:
    """Integers above 1 in the model's configuration, nested ones included, largest first.

    Windows, chunk sizes and limits of positions are among them.
    """
    config = getattr(model, "config", None)
    integers: set[int] = set()

    def collect(value: Any) -> None:
        if isinstance(value, bool):
            return
        if isinstance(value, int) and value > 1:
            integers.add(value)
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)
        elif isinstance(value, list | tuple):
            for item in value:
                collect(item)

    collect(config.to_dict() if config is not None and hasattr(config, "to_dict") else {})
    return sorted(integers, reverse=True)


def _mixed_batches(lengths: list[int]) -> Iterator[list[int]]:
    """Batches of the falling `lengths`, each with its longest first.

    Every length runs beside the longest of all. The shorter half also runs beside its own longest,
    because a model may switch at a width between.
    """
    for first in (0, len(lengths) // 2):
        shorter = lengths[first + 1 :]
        rows = max(1, CHECK_TOKENS // lengths[first] - 1)
        for start in range(0, len(shorter), rows):
            yield [lengths[first], *shorter[start : start + rows]]
        if len(lengths) < 4:
            return


class _StreamSequences:
    """Token ids of a stream's sequences, on the device; random ids fill up rows of one length."""

    def __init__(self, stream: TokenStream, short_ids: torch.Tensor) -> None:
        self._stream = stream
        self._device = short_ids.device
        self._vocabulary = short_ids.unique().cpu().numpy()
        self._rng = np.random.default_rng(1)

    def longest(self) -> torch.Tensor:
        """The longest sequence, `(1, length)`."""
        return self._row(int(np.argmax(self._stream.lengths)))

    def of_length(self, length: int, rows: int) -> torch.Tensor:
        """Sequences of one length, filled up with random ones, `(rows, length)`."""
        numbers = np.flatnonzero(self._stream.lengths == length)[:rows]
        sequences = [self._row(int(number)) for number in numbers]
        if len(sequences) < rows:
            sequences.append(self.random_tokens((rows - len(sequences), length)))
        return torch.cat(sequences)

    def of_lengths(self, lengths: list[int]) -> list[torch.Tensor]:
        """One sequence of each length, `(length,)`."""
        numbers = [int(np.flatnonzero(self._stream.lengths == length)[0]) for length in lengths]
        return [self._row(number)[0] for number in numbers]

    def random_tokens(self, shape: Sequence[int]) -> torch.Tensor:
        """Random tokens from the ids of the short rows, which leave out a masked padding token."""
        return torch.from_numpy(self._rng.choice(self._vocabulary, tuple(shape))).to(self._device)

    def _row(self, number: int) -> torch.Tensor:
        ids = self._stream.sequence(number).astype(np.int64)
        return torch.from_numpy(ids)[None].to(self._device)


def row_change(reference: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> float:
    """Relative change of `rows` from `reference`, both `(..., d_model)`, per row.

    The change of a row is |row - reference| over |reference|, in the Euclidean norm. In float32
    the largest change of all rows is returned; in half precision, where a router of experts may
    tip over rounding, the root of the mean square. Changes are relative to each row, so a few rows
    of huge values do not hide the others. Infinite if other rows are finite than in `reference`.
    """
    a, b = reference.float().flatten(0, -2), rows.float().flatten(0, -2)
    finite = a.isfinite().all(-1)
    if not bool((finite == b.isfinite().all(-1)).all()):
        return float("inf")
    a, b = a[finite], b[finite]
    if not len(a):
        return 0.0
    norms = a.norm(dim=-1)
    smallest_norm = max(QUIET_ROW * float(norms.median()), 1e-30)
    change = (b - a).norm(dim=-1) / norms.clamp_min(smallest_norm)
    if torch.finfo(dtype).bits < 32:
        return float(change.square().mean().sqrt())
    return float(change.max())


def _largest_change(
    reference: Iterable[torch.Tensor], layers: Iterable[torch.Tensor], dtype: torch.dtype
) -> float:
    """The largest `row_change` of all layers."""
    return max(row_change(a, b, dtype) for a, b in zip(reference, layers, strict=True))


def _check_repeats(
    stack: DecoderBlocks, longest: torch.Tensor, short: torch.Tensor, dtype: torch.dtype
) -> tuple[str | None, Layers]:
    """Refuse a model that gives other residuals for the same tokens when it runs again.

    The first half of `longest` runs before and after the whole and `short`: a model may remember
    the longest sequence that it has read. Returns the choice among positions
    (`_choice_among_positions`) and the residuals of `longest`.
    """
    length = longest.shape[1]
    prefix = longest[:, : max(1, length // 2)]
    with _ScoreChoices() as prefix_choices:
        prefix_layers = _run_or_refuse(stack, prefix)
    with _ScoreChoices() as longest_choices:
        longest_layers = _run_or_refuse(stack, longest)
    stack.residuals(short)
    change = _largest_change(prefix_layers, stack.residuals(prefix), dtype)
    refuse_difference(stack.model, prefix, change)
    if prefix.shape[1] == length:  # one token: nothing to choose from
        return None, longest_layers
    choice = _choice_among_positions(longest_choices.choices, prefix_choices.choices)
    return choice, longest_layers


def refuse_difference(model: torch.nn.Module, ids: torch.Tensor, change: float) -> None:
    """Raise `ModelError` if two runs on `ids` differ by more than rounding, a relative `change`."""
    if not change <= REPEAT_TOLERANCE.get(lowest_dtype(model), 1e-5):
        raise ModelError(
            f"{type(model).__name__} is not deterministic: run twice on the same {ids.shape[1]} "
            f"tokens, its residual stream differs by {change:.1e}"
        )


def _run_or_refuse(stack: DecoderBlocks, ids: torch.Tensor) -> Layers:
    """Residuals of `ids`; raises `ModelError` if the model cannot read as many tokens."""
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


def _batch_error(
    stack: DecoderBlocks,
    ids: torch.Tensor,
    dtype: torch.dtype,
    single_layers: Mapping[int, Layers | None],
    batch_layers: Layers | None = None,
) -> float:
    """Relative change of some rows of `ids` by all others; 1 if they do not fit into memory.

    `single_layers` has the compared rows, with their residuals alone where these are known;
    `batch_layers` are the residuals of all rows together, if known.
    """
    try:
        batch_layers = batch_layers or stack.residuals(ids)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return 1.0
    changes = []
    for row, known_layers in single_layers.items():
        layers = known_layers or stack.residuals(ids[row : row + 1])
        changes.append(
            _largest_change(
                (layer[0] for layer in layers),
                (layer[row] for layer in batch_layers),
                dtype,
            )
        )
    return max(changes)


def _padding_error(
    stack: DecoderBlocks,
    sequences: list[torch.Tensor],
    dtype: torch.dtype,
    first_layers: Layers | None = None,
) -> float:
    """Relative change of the rows of `sequences` in one batch, the shorter ones padded.

    `first_layers`: residuals of the first sequence alone, if these are known. The result is 1 if
    the model takes no attention mask, or memory runs out: then only equal lengths may share a
    batch.
    """
    if len(sequences) < 2:
        return 0.0

    # Right-padded with token 0, and masked.
    lengths = torch.tensor([len(ids) for ids in sequences])
    padded_ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    mask = (torch.arange(padded_ids.shape[1]) < lengths[:, None]).long()
    padded_ids = padded_ids.to(sequences[0])
    for row, ids in enumerate(sequences):
        padded_ids[row, : len(ids)] = ids
    try:
        batch_layers = stack.residuals(padded_ids, mask.to(padded_ids.device))
    except (TypeError, ValueError, RuntimeError, MemoryError):
        return 1.0

    changes = []
    for row, ids in enumerate(sequences):
        known_layers = first_layers if row == 0 else None
        single_layers = known_layers or stack.residuals(ids[None])
        changes.append(
            _largest_change(
                (layer[0] for layer in single_layers),
                (layer[row, : len(ids)] for layer in batch_layers),
                dtype,
            )
        )
    return max(0.0, *changes)


def _is_same_before(start: int, layers: Layers, changed_layers: Layers, dtype: torch.dtype) -> bool:
    """Whether `layers` and `changed_layers`, of two token ids, are the same before `start`."""
    change = _largest_change(
        (layer[:, :start] for layer in layers),
        (layer[:, :start] for layer in changed_layers),
        dtype,
    )
    return change <= REPEAT_TOLERANCE.get(dtype, 1e-5)


def _is_causal(
    stack: DecoderBlocks,
    ids: torch.Tensor,
    layers: Layers,
    other_ids: torch.Tensor,
    dtype: torch.dtype,
) -> bool:
    """Whether `layers` of `ids` stay before a position where tokens of `other_ids` begin."""
    length = ids.shape[1]
    return all(
        _is_same_before(
            start,
            layers,
            stack.residuals(torch.cat([ids[:, :start], other_ids[:, start:]], 1)),
            dtype,
        )
        for start in sorted({length // 3, 2 * length // 3, length - 1} - {0})
    )


def _is_embedding(
    stack: DecoderBlocks, ids: torch.Tensor, other_ids: torch.Tensor, dtype: torch.dtype
) -> bool:
    """Whether layer 0 stays the same in the second half when the first half is `other_ids`."""
    middle, limit = ids.shape[1] // 2, REPEAT_TOLERANCE.get(dtype, 1e-5)
    layer_0 = stack.first_layer(ids)
    changed_layer_0 = stack.first_layer(torch.cat([other_ids[:, :middle], ids[:, middle:]], 1))
    return row_change(layer_0[:, middle:], changed_layer_0[:, middle:], dtype) <= limit


Choices = set[tuple[str, int, int]]
"""Name of an operation, number of scores, number of scores that are taken."""


def _choice_among_positions(longest_choices: Choices, shorter_choices: Choices) -> str | None:
    """The first choice of positions by score, as `<operation> <taken> of <scores>`, or None.

    A choice is one of positions if the number of scores changes with the length of the sequence;
    the number of experts does not.
    """
    constant_sizes = {(name, size) for name, size, _ in shorter_choices}
    for name, size, taken in sorted(longest_choices):
        if taken < size and (name, size) not in constant_sizes:
            return f"{name} {taken} of {size}"
    return None


class _ScoreChoices(TorchDispatchMode):
    """Records operations that sort floating-point scores or take the largest ones."""

    def __init__(self) -> None:
        super().__init__()
        self.choices: Choices = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else ""
        if name in ("topk", "kthvalue", "sort", "argsort", "argmax"):
            self._record(name, args, kwargs)
        return func(*args, **kwargs)

    def _record(self, name: str, args: Any, kwargs: Any) -> None:
        scores = args[0]
        if not (isinstance(scores, torch.Tensor) and scores.is_floating_point() and scores.ndim):
            return
        # Signatures: topk(scores, k, dim), kthvalue(scores, k, dim); the others (scores, dim).
        takes_k = name in ("topk", "kthvalue")
        dim_index = 2 if takes_k else 1
        dim_argument = args[dim_index] if len(args) > dim_index else kwargs.get("dim", -1)
        is_index = isinstance(dim_argument, int) and not isinstance(dim_argument, bool)
        size = int(scores.shape[dim_argument if is_index else -1])
        k = int(args[1] if takes_k and len(args) > 1 else kwargs.get("k", 1))
        self.choices.add((name, size, k if takes_k else 1))
