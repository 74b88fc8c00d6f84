"""Checks of a model before a row is stored: its blocks and head are found and measured.

A cache can hold a model if a head on layer L gives the model's logits, and if the residual stream
of a sequence does not depend on other sequences. `check_model` measures both on a few sequences;
`extraction/prepare.py` calls it for a new cache, `recheck_model` is for a cache to be continued.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from ..devices import is_out_of_memory, memory_errors
from ..errors import CorruptError, HeadMismatchError, MismatchError, ModelError, ResiduaError
from ..files.disk_columns import row_blocks
from ..format.dtypes import LARGEST, ValueRange, choose_dtype
from ..format.logits_arrays import RECOMPUTE, check_kept_tokens
from ..format.manifest import SHORT_ID
from ..head.head import Head
from ..head.head_identification import SMALL_STD, identify_head, scale_to_std, verify_head
from ..head.head_recording import record_head
from ..head.program_head import ProgramHead
from ..model.block_search import find_blocks
from ..model.blocks import DecoderBlocks, logits_of, run_model
from ..model.model_devices import input_device
from ..store.activation_cache import ActivationCache
from ..tokens.token_stream import TokenStream
from .independence import (
    ImageIndependence,
    Independence,
    lowest_dtype,
    measure_independence,
    refuse_difference,
    row_change,
)
from .logits_error import LogitsErrors, measure_logits_errors

ROWS = 4
"""Sequences of a batch of check tokens."""
LENGTH = 48
"""Tokens of each of these sequences."""
HELD_OUT_ROWS, HELD_OUT_LENGTH = 3, LENGTH - 11
"""Shape of the held-out batch: another number of sequences, another length."""
RANGE_TOKENS = 10 * LENGTH
"""Tokens of a sequence whose values are measured to choose stored dtypes."""
FIRST_TOKENS = 8
"""Tokens that a model reads before all others, and again at the end."""


@dataclass(frozen=True)
class ModelReport:
    """Blocks and head of a model, and the measurements of a few sequences."""

    stack: DecoderBlocks
    """The decoder blocks."""
    head: Head
    tensors: dict[str, torch.Tensor]
    """The head's tensors in the model's own dtype."""
    head_error: float
    """Largest |head(layer L) - logits| over the largest |logit|, on held-out tokens."""
    logits: LogitsErrors
    """Error of each logits mode against the model."""
    independence: Independence | ImageIndependence
    """Change of rows by padding, other sequences and later tokens."""
    dtypes: dict[int, str]
    """Stored dtype of each layer, by the range of its values."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Compressed over raw bytes by array; empty for a raw cache."""

    @property
    def pad(self) -> bool:
        """Whether sequences of different lengths may share a batch."""
        return self.independence.pad

    @property
    def alone(self) -> bool:
        """Whether each sequence must run alone, because others in its batch change its rows."""
        return self.independence.alone

    @property
    def causal(self) -> bool:
        """False if a later token changes an earlier residual."""
        return self.independence.causal

    @property
    def embedding(self) -> bool:
        """Whether layer 0 depends on its own token alone."""
        return self.independence.embedding

    @property
    def stored_kl(self) -> float:
        """KL in nats per position from the model to the head on layer L as stored."""
        return self.logits.modes[RECOMPUTE].kl_mean

    def to_dict(self) -> dict[str, object]:
        """The measurements as a JSON object, for `provenance.json` and `residua info`."""
        return {
            "head_error": self.head_error,
            **asdict(self.independence),
            "stored_kl": self.stored_kl,
            "logits": self.logits.to_dict(),
            "dtypes": {str(layer): dtype for layer, dtype in self.dtypes.items()},
        }


@dataclass(frozen=True)
class CheckTokens:
    """Three batches of token ids on which a model is checked, all on the model's device."""

    text: torch.Tensor
    """First tokens of the stream, random ones after its end, `(ROWS, LENGTH)` int64."""
    random: torch.Tensor
    """Random tokens, `(ROWS, LENGTH)` int64."""
    held_out: torch.Tensor
    """Tokens that verify the head, of another shape, `(HELD_OUT_ROWS, HELD_OUT_LENGTH)` int64.

    The first row is the beginning of `text[1]`, the others are random.
    """


def check_model(
    model: torch.nn.Module,
    stream: TokenStream,
    compute_dtype: str,
    policy: str,
    logits: str = RECOMPUTE,
    batch_tokens: int | None = None,
) -> ModelReport:
    """Find blocks and head of `model` and measure both on sequences of `stream`.

    `compute_dtype`: dtype in which the model runs. `policy`: the request's stored dtype, or `auto`.
    `logits`: the logits mode of the request, measured beside its alternatives. `batch_tokens`:
    the request's bound of a batch. Raises `ModelError` or `HeadMismatchError` with the reason if
    blocks or head do not give the model's logits, `UsageError` if the mode does not suit the
    vocabulary.
    """
    device = input_device(model)
    with torch.inference_mode(), _memory_errors_of_checks(model, int(stream.lengths.max())):
        tokens = _check_tokens(stream, model, vocabulary_size(model), device)

        # Logits before the model has read anything else, compared below.
        first_tokens = tokens.held_out[:1, :FIRST_TOKENS]
        first_logits = _logits_or_none(model, first_tokens)

        # Blocks and head.
        stack = find_blocks(model, tokens.text, tokens.random)
        head, tensors, head_error = find_head(stack, tokens)
        check_kept_tokens(logits, head.vocab)

        # Rows of one sequence must not depend on others, nor on what the model read before.
        with _length_errors(model, int(stream.lengths.max())):
            independence = measure_independence(stack, stream, tokens.held_out, batch_tokens)
        _check_no_memory(model, first_tokens, first_logits)

        # Stored dtypes, and the error of each way to keep logits.
        ranges = measure_value_ranges(stack, stream, device)
        dtypes = {
            layer: choose_dtype(layer_range, compute_dtype, policy)
            for layer, layer_range in enumerate(ranges)
        }
        return ModelReport(
            stack=stack,
            head=head,
            tensors=tensors,
            head_error=head_error,
            logits=_logits_errors(head, stack, tokens.text, dtypes[stack.depth], policy, logits),
            independence=independence,
            dtypes=dtypes,
        )


def recheck_model(model: torch.nn.Module, cache: ActivationCache) -> DecoderBlocks:
    """The decoder blocks of `model`, checked to continue `cache`.

    The head stored in the cache must reproduce the model's logits, else `HeadMismatchError`. The
    cache's sequences must be independent of each other as its manifest says, else
    `MismatchError`.
    """
    lengths = cache.contexts.length
    stream = TokenStream(cache.contexts.ids, lengths, np.arange(len(lengths)))
    device = input_device(model)
    with torch.inference_mode(), _memory_errors_of_checks(model, int(lengths.max())):
        tokens = _check_tokens(stream, model, vocabulary_size(model), device)
        stack = find_blocks(model, tokens.text, tokens.random)
        _head_error(cache.head, stack, tokens)
        with _length_errors(model, int(lengths.max())):
            independence = measure_independence(
                stack, stream, tokens.held_out, cache.manifest.batch_tokens
            )
    if reason := independence.contradiction(cache.manifest.pad, cache.manifest.alone):
        raise MismatchError(
            f"rows of cache {cache.id[:SHORT_ID]} ran in batches that changed them: {reason}; they "
            "are not the model's for each sequence alone. Extract the texts anew into another root"
        )
    return stack


def independence_of(stack: DecoderBlocks, stream: TokenStream, batch_tokens: int) -> Independence:
    """`measure_independence` for the sequences of `stream` and the check tokens."""
    model = stack.model
    device = input_device(model)
    with torch.inference_mode(), _memory_errors_of_checks(model, int(stream.lengths.max())):
        tokens = _check_tokens(stream, model, vocabulary_size(model), device)
        with _length_errors(model, int(stream.lengths.max())):
            return measure_independence(stack, stream, tokens.held_out, batch_tokens)


@contextmanager
def _length_errors(model: torch.nn.Module, length: int) -> Iterator[None]:
    """Turn an error of the first passes over whole sequences into a `ModelError`.

    The model has read short sequences before; its configuration may promise a longer context than
    its positions have.
    """
    try:
        yield
    except (RuntimeError, IndexError, ValueError, TypeError, AssertionError) as error:
        if isinstance(error, ResiduaError) or is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{type(model).__name__} cannot read sequences of {length} tokens, the longest here: "
            f"{reason}; extract with a shorter --context"
        ) from None


def _memory_errors_of_checks(model: torch.nn.Module, length: int) -> AbstractContextManager[None]:
    """Turn an out-of-memory error of the checks into a `ModelError` that says what to do.

    A sequence of `length` tokens, the longest, runs whole: there is no batch to halve yet.
    """
    return memory_errors(
        f"{type(model).__name__} cannot be checked: {ROWS} sequences of {LENGTH} tokens, or one of "
        f"{length}, do not fit into memory beside the model; extract with a shorter --context, or "
        "on another --device; other programs may also hold memory"
    )


def _check_tokens(stream: TokenStream, model: Any, vocab: int, device: torch.device) -> CheckTokens:
    rng = np.random.default_rng(0)
    batches = rng.integers(0, vocab, (3, ROWS, LENGTH))

    # Some models mask the padding token by its id, which text without this token never meets.
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    if (
        isinstance(pad, int)
        and vocab > 1
        and not any((block == pad).any() for block in row_blocks(stream.ids))
    ):
        batches[batches == pad] = (pad + 1) % vocab

    text, random, held_out = batches
    stream_ids = stream.ids[: ROWS * LENGTH].astype(np.int64)
    text.reshape(-1)[: len(stream_ids)] = stream_ids
    held_out = held_out[:HELD_OUT_ROWS, :HELD_OUT_LENGTH].copy()
    held_out[0] = text[1, :HELD_OUT_LENGTH]
    return CheckTokens(*(torch.from_numpy(ids).to(device) for ids in (text, random, held_out)))


def vocabulary_size(model: torch.nn.Module) -> int:
    """Rows of the token embedding; raises `ModelError` if the model has none."""
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if not hasattr(embedding, "weight"):
        embedding_type = "none" if embedding is None else type(embedding).__name__
        raise ModelError(
            f"{type(model).__name__} has no single token embedding (found {embedding_type}); a "
            "model that reads one token per position is needed"
        )
    return int(embedding.weight.shape[0])


def _logits_or_none(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits of a short sequence by a model that has read nothing else; None if it cannot run."""
    try:
        logits = getattr(run_model(model, ids), "logits", None)
    except Exception:  # `find_blocks` runs into the same error and reports the reason
        return None
    return logits.clone() if isinstance(logits, torch.Tensor) else None


def _check_no_memory(
    model: torch.nn.Module, ids: torch.Tensor, first_logits: torch.Tensor | None
) -> None:
    """Refuse a model that gives other logits for `ids` after it has read longer sequences."""
    if first_logits is not None:
        logits = logits_of(run_model(model, ids))
        refuse_difference(model, ids, row_change(first_logits, logits, lowest_dtype(model)))


def find_head(
    stack: DecoderBlocks, tokens: CheckTokens
) -> tuple[Head, dict[str, torch.Tensor], float]:
    """The head, its tensors in the model's dtype, and its error on held-out tokens.

    The head is read off the model's modules; where that fails, the model's tail is recorded as a
    program. Raises `ModelError` or `HeadMismatchError` if neither gives the model's logits.
    """
    try:
        head, tensors = identify_head(stack, tokens.random)
        return head, tensors, _head_error(head, stack, tokens)
    except (ModelError, HeadMismatchError) as error:
        identify_error = error
    try:
        program, tensors = record_head(stack, tokens.text, tokens.random)
    except ModelError as error:
        raise ModelError(f"{identify_error}; {error}") from None
    # Copies: the model may be changed or freed while the head lives.
    arrays = {name: tensor.float().cpu().clone().numpy() for name, tensor in tensors.items()}
    vocab = logits_of(run_model(stack.model, tokens.held_out)).shape[-1]
    head = ProgramHead(program, arrays, stack.d_model, vocab)
    try:
        head.check_bounds()
    except CorruptError as error:  # readers would refuse the cache
        raise ModelError(f"{identify_error}; {error}") from None
    return head, tensors, _head_error(head, stack, tokens)


def _head_error(head: Head, stack: DecoderBlocks, tokens: CheckTokens) -> float:
    """Largest relative error of the head; raises `HeadMismatchError` beyond rounding.

    Measured on held-out tokens, and on residuals so small that the norm's eps matters.
    """
    dtype = lowest_dtype(stack.model)
    layers, logits = stack.residuals_and_logits(tokens.held_out)
    hidden = layers[-1]
    error = verify_head(head, hidden, logits, dtype)

    small_hidden = scale_to_std(hidden, SMALL_STD)
    rows, length = tokens.held_out.shape
    tail_tokens = tokens.random[:rows, :length].contiguous()
    small_logits = stack.run_tail(small_hidden, tail_tokens)
    return max(error, verify_head(head, small_hidden, small_logits, dtype))


def measure_value_ranges(
    stack: DecoderBlocks, stream: TokenStream, device: torch.device
) -> list[ValueRange]:
    """Range of the values of each layer, 0 to L, on the first sequences of `stream`.

    Of each sequence the first `RANGE_TOKENS` tokens are read: many models have massive activations
    at the first.
    """
    ranges = [ValueRange()] * (stack.depth + 1)
    for number in range(min(ROWS, len(stream.lengths))):
        sequence = stream.sequence(number)[:RANGE_TOKENS].astype(np.int64)
        ids = torch.from_numpy(sequence)[None].to(device)
        for layer, hidden in enumerate(stack.residuals(ids)):
            ranges[layer] = ranges[layer].joined(value_range(hidden))
    return ranges


def value_range(rows: torch.Tensor) -> ValueRange:
    """Peak of the finite values of `rows`, `(..., width)`, and relative rounding error in float16.

    The error of a row is relative to the row's own peak; rows beyond float16 have no error.
    """
    values = rows.float()
    values = torch.where(values.isfinite(), values, 0.0)
    peaks = values.abs().amax(-1)
    fits = (peaks > 0) & (peaks <= LARGEST["float16"])
    errors = (values.half().float() - values).abs().amax(-1)
    loss = torch.where(fits, errors / peaks.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    return ValueRange(float(peaks.max()), float(loss.max()))


def _logits_errors(
    head: Head, stack: DecoderBlocks, ids: torch.Tensor, dtype: str, policy: str, mode: str
) -> LogitsErrors:
    """Error of every logits mode against the model on two sequences of `ids`.

    `dtype`: stored dtype of layer L; `policy`: the request's stored dtype, also for logits.
    """
    ids = ids[:2]
    layers, logits = stack.residuals_and_logits(ids)
    hidden = layers[-1].float().flatten(0, 1).cpu().numpy()
    model_logits = logits.float().flatten(0, 1).cpu().numpy()

    def choose_logits_dtype(logits: np.ndarray) -> str:
        # The head computes in float32 whatever the dtype of the model.
        return choose_dtype(value_range(torch.from_numpy(logits)), "float32", policy)

    return measure_logits_errors(head, hidden, model_logits, dtype, choose_logits_dtype, mode)
