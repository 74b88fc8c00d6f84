"""Checks before anything is written: does the head reproduce the model, do rows stand alone?"""

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from ..errors import HeadMismatchError, MismatchError, ModelError
from ..files.disk_columns import row_blocks
from ..format.dtypes import LARGEST, ValueRange, choose_dtype
from ..format.logits_arrays import RECOMPUTE, check_kept_tokens
from ..format.manifest import SHORT_ID
from ..head.head import Head
from ..head.identify_head import SMALL, identify_head, verify_head, with_scaled_tail
from ..head.program_head import ProgramHead
from ..head.record_head import record_head
from ..model.blocks import DecoderBlocks, logits_of, run_model
from ..model.find_blocks import find_blocks
from ..model.memory import memory_errors
from ..store.activation_cache import ActivationCache
from ..tokens.token_stream import TokenStream
from .independence import (
    Independence,
    lowest_dtype,
    measure_independence,
    refuse_difference,
    row_change,
)
from .logits_error import LogitsErrors, measure_logits_errors

ROWS = 4
LENGTH = 48
FIRST = 8
"""Tokens that a model reads before all others, and again at the end."""


@dataclass(frozen=True)
class ModelReport:
    """What a few sequences showed of the model."""

    stack: DecoderBlocks
    head: Head
    tensors: dict[str, torch.Tensor]
    """The head's tensors in the model's own dtype."""
    head_error: float
    """Largest |head(layer L) - logits| over the largest |logit|, on other tokens."""
    logits: LogitsErrors
    """How far each logits mode is from the model."""
    independence: Independence
    """What a row depends on besides its own sequence."""
    dtypes: dict[int, str]
    """Stored dtype of each layer, by the range of its calibrated values."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Compressed over raw bytes by array, where the cache is to be compact."""

    @property
    def pad(self) -> bool:
        """Whether a row is independent of padding, up to rounding."""
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
        """Whether layer 0 follows from its own token: False if something mixes before."""
        return self.independence.embedding

    @property
    def stored_kl(self) -> float:
        """KL in nats per position from the model to the head on layer L as stored."""
        return self.logits.modes[RECOMPUTE].kl_mean

    def report(self) -> dict[str, object]:
        """The measured numbers, for `provenance.json` and people."""
        shown = {"head_error": self.head_error, **asdict(self.independence)}
        dtypes = {str(k): v for k, v in self.dtypes.items()}
        more = {"stored_kl": self.stored_kl, "logits": self.logits.to_dict(), "dtypes": dtypes}
        return {**shown, **more}


def check_model(
    model: torch.nn.Module,
    stream: TokenStream,
    compute_dtype: str,
    policy: str,
    logits: str = RECOMPUTE,
    batch_tokens: int | None = None,
) -> ModelReport:
    """Find stack and head of `model` and measure them on sequences of `stream`.

    `logits` is the mode that is measured beside its alternatives, `batch_tokens` the request's
    bound of a batch. Raises `ModelError` or `HeadMismatchError` with the reason if stack or head is
    not the model's, `UsageError` if the mode does not go with the vocabulary.
    """
    device = next(model.parameters()).device
    with torch.inference_mode(), _memory(model, int(stream.lengths.max())):
        ids, other, fresh = _batches(stream, model, _vocabulary(model), device)
        first = _logits_or_none(model, fresh[:1, :FIRST])
        stack = find_blocks(model, ids, other)
        head, tensors, error = find_head(stack, ids, other, fresh)
        check_kept_tokens(logits, head.vocab)
        independence = measure_independence(stack, stream, fresh, batch_tokens)
        _check_memory(model, fresh[:1, :FIRST], first)
        ranges = measure_value_ranges(stack, stream, device)
        dtypes = {n: choose_dtype(r, compute_dtype, policy) for n, r in enumerate(ranges)}
        return ModelReport(
            stack,
            head,
            tensors,
            error,
            _logits_errors(head, stack, ids, dtypes[stack.depth], policy, logits),
            independence,
            dtypes,
        )


def _logits_or_none(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits of a short sequence by a model that has read nothing else; None if it cannot run."""
    try:
        logits = getattr(run_model(model, ids), "logits", None)
    except Exception:  # said, with the reason, where the stack is looked for
        return None
    return logits.clone() if isinstance(logits, torch.Tensor) else None


def _check_memory(model: torch.nn.Module, ids: torch.Tensor, first: torch.Tensor | None) -> None:
    """Refuse a model that gives other logits for `ids` now that it has read longer sequences."""
    if first is not None:
        again = logits_of(run_model(model, ids))
        refuse_difference(model, ids, row_change(first, again, lowest_dtype(model)))


def _memory(model: torch.nn.Module, length: int) -> AbstractContextManager[None]:
    """Memory that runs out here, before any batch can be halved, is an error that says so."""
    return memory_errors(
        f"{type(model).__name__} cannot be checked: {ROWS} sequences of {LENGTH} tokens, or one of "
        f"{length}, do not fit into memory beside the model; extract with a shorter --context, or "
        "on another --device; other programs may also hold memory"
    )


def find_head(
    stack: DecoderBlocks, ids: torch.Tensor, other: torch.Tensor, fresh: torch.Tensor
) -> tuple[Head, dict[str, torch.Tensor], float]:
    """The explicit head, else the recorded one, its tensors and its error on `fresh`.

    Raises `ModelError` or `HeadMismatchError` if neither gives the model's logits.
    """
    try:
        head, tensors = identify_head(stack, other)
        return head, tensors, _head_error(head, stack, fresh, other)
    except (ModelError, HeadMismatchError) as error:
        explicit = error
    try:
        program, tensors = record_head(stack, ids, other)
    except ModelError as error:
        raise ModelError(f"{explicit}; {error}") from None
    # Copies: the model may be changed or freed while the head lives.
    arrays = {name: tensor.float().cpu().clone().numpy() for name, tensor in tensors.items()}
    head = ProgramHead(
        program, arrays, stack.d_model, logits_of(run_model(stack.model, fresh)).shape[-1]
    )
    return head, tensors, _head_error(head, stack, fresh, other)


def _head_error(
    head: Head, stack: DecoderBlocks, fresh: torch.Tensor, other: torch.Tensor
) -> float:
    """Error of the head on other tokens, another shape, and residuals so small that eps matters."""
    hidden, dtype = stack.residuals(fresh)[-1], lowest_dtype(stack.model)
    error = verify_head(head, hidden, logits_of(run_model(stack.model, fresh)), dtype)
    small = with_scaled_tail(hidden, SMALL)
    tokens = other[: fresh.shape[0], : fresh.shape[1]].contiguous()
    return max(error, verify_head(head, small, stack.run_tail(small, tokens), dtype))


def recheck_model(model: torch.nn.Module, cache: ActivationCache) -> DecoderBlocks:
    """The stack of `model`, once it has shown that it can go on with `cache`.

    The head kept in `cache` must reproduce the model's logits, and the cache's sequences must be
    independent of each other as its manifest says. Raises `HeadMismatchError`, `MismatchError`.
    """
    lengths = cache.contexts.length
    stream = TokenStream(cache.contexts.ids, lengths, np.arange(len(lengths)))
    device = next(model.parameters()).device
    with torch.inference_mode(), _memory(model, int(lengths.max())):
        ids, other, fresh = _batches(stream, model, _vocabulary(model), device)
        stack = find_blocks(model, ids, other)
        _head_error(cache.head, stack, fresh, other)
        found = measure_independence(stack, stream, fresh, cache.manifest.batch_tokens)
    if reason := found.contradiction(cache.manifest.pad, cache.manifest.alone):
        raise MismatchError(
            f"rows of cache {cache.id[:SHORT_ID]} ran in batches that changed them: {reason}; they "
            "are not the model's for each sequence alone. Extract the texts anew into another root"
        )
    return stack


def independence_of(stack: DecoderBlocks, stream: TokenStream, batch_tokens: int) -> Independence:
    """What `measure_independence` finds for the sequences of `stream`."""
    model = stack.model
    device = next(model.parameters()).device
    with torch.inference_mode(), _memory(model, int(stream.lengths.max())):
        *_, fresh = _batches(stream, model, _vocabulary(model), device)
        return measure_independence(stack, stream, fresh, batch_tokens)


def _batches(
    stream: TokenStream, model: Any, vocab: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Two batches of one shape and one of another; real tokens first, random ones after them."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, (3, ROWS, LENGTH))
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    if (
        isinstance(pad, int)
        and vocab > 1
        and not any((b == pad).any() for b in row_blocks(stream.ids))
    ):
        # Some models mask this token by its id; text that lacks it never meets that.
        ids[ids == pad] = (pad + 1) % vocab
    real = stream.ids[: ROWS * LENGTH].astype(np.int64)
    ids[0].reshape(-1)[: len(real)] = real
    fresh = ids[2, :3, : LENGTH - 11].copy()
    fresh[0, :] = ids[0, 1, : LENGTH - 11]
    return tuple(torch.from_numpy(a).to(device) for a in (ids[0], ids[1], fresh))


def _vocabulary(model: torch.nn.Module) -> int:
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if not hasattr(embedding, "weight"):
        found = "none" if embedding is None else type(embedding).__name__
        raise ModelError(
            f"{type(model).__name__} has no single token embedding (found {found}); a model that "
            "reads one token per position is needed"
        )
    return int(embedding.weight.shape[0])


def measure_value_ranges(
    stack: DecoderBlocks, stream: TokenStream, device: torch.device
) -> list[ValueRange]:
    """Range of each layer's values on the first sequences, first tokens included."""
    ranges = [ValueRange()] * (stack.depth + 1)
    for number in range(min(ROWS, len(stream.lengths))):
        ids = torch.from_numpy(stream.sequence(number).astype(np.int64))[None].to(device)
        for layer, hidden in enumerate(stack.residuals(ids)):
            ranges[layer] = ranges[layer].joined(value_range(hidden))
    return ranges


def value_range(rows: torch.Tensor) -> ValueRange:
    """Range of the finite values of `rows`, `(..., width)`, and what float16 costs a row."""
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
    """Every logits mode against the model, on real tokens; layer L is stored in `dtype`."""
    ids = ids[:2]
    hidden = stack.residuals(ids)[-1].float().flatten(0, 1).cpu().numpy()
    model = logits_of(run_model(stack.model, ids)).float().flatten(0, 1).cpu().numpy()

    def choose(rows: np.ndarray) -> str:
        # The head computes in float32 whatever the model ran in.
        return choose_dtype(value_range(torch.from_numpy(rows)), "float32", policy)

    return measure_logits_errors(head, hidden, model, dtype, choose, mode)
