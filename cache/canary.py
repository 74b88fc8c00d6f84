"""Checks before anything is written: does the head reproduce the model, do rows stand alone?"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .columns import blocks
from .create import choose_dtype
from .discover import find_stack
from .errors import HeadMismatchError, ModelError
from .head import Head
from .headprobe import SMALL, probe_head, scaled, verify_head
from .logits import RECOMPUTE, check_size
from .logitserror import LogitsErrors, measure
from .oom import is_out_of_memory, memory_errors
from .programhead import ProgramHead
from .record import record_head
from .stack import Stack, logits_of, run
from .store import ActivationCache
from .tokens import TokenStream

ROWS = 4
LENGTH = 48
PADDING_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative change of a residual by right padding, per dtype of the model; beyond it,
only sequences of equal length share a batch."""
BATCH_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.5, torch.bfloat16: 0.5}
"""Largest relative change of a residual by other rows of its batch; in half precision a router of
experts may tip over rounding, in float32 nothing may."""
CAUSAL_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Largest relative change of a residual by later tokens, or by running again: the shapes are the
same, so even rounding hardly differs."""


@dataclass(frozen=True)
class Canary:
    """What a few sequences showed of the model."""

    stack: Stack
    head: Head
    tensors: dict[str, torch.Tensor]
    """The head's tensors in the model's own dtype."""
    head_error: float
    """Largest |head(layer L) - logits| over the largest |logit|, on other tokens."""
    logits: LogitsErrors
    """How far each logits mode is from the model."""
    padding_error: float
    """Largest relative change of a residual when its row is padded on the right."""
    causal: bool
    """False if a later token changes an earlier residual."""
    batch_error: float
    """Largest relative change of a residual by the other rows of its batch."""
    embedding: bool
    """Whether layer 0 follows from its own token: False if something mixes before the blocks."""
    dtypes: dict[int, str]
    """Stored dtype of each layer, from the calibrated absmax."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Compressed over raw bytes by array, where the cache is to be compact."""

    @property
    def pad(self) -> bool:
        """Whether a row is independent of padding, up to rounding."""
        limit = PADDING_TOLERANCE.get(_dtype(self.stack.model), 1e-4)
        return self.padding_error <= limit

    @property
    def stored_kl(self) -> float:
        """KL in nats per position from the model to the head on layer L as stored."""
        return self.logits.modes[RECOMPUTE].kl_mean

    def report(self) -> dict[str, object]:
        """The measured numbers, for `provenance.json` and people."""
        skip = {"stack", "head", "tensors", "dtypes", "logits", "ratios"}
        shown = {k: getattr(self, k) for k in self.__dataclass_fields__ if k not in skip}
        dtypes = {str(k): v for k, v in self.dtypes.items()}
        more = {"stored_kl": self.stored_kl, "logits": self.logits.to_dict(), "dtypes": dtypes}
        return {**shown, **more}


def examine(
    model: torch.nn.Module,
    stream: TokenStream,
    compute_dtype: str,
    policy: str,
    logits: str = RECOMPUTE,
) -> Canary:
    """Find stack and head of `model` and measure them on the first sequences of `stream`.

    `logits` is the mode that is measured beside its alternatives. Raises `ModelError` or
    `HeadMismatchError` with the reason if stack or head is not the model's, `UsageError` if the
    mode does not go with the vocabulary.
    """
    device = next(model.parameters()).device
    with torch.inference_mode(), _memory(model, int(stream.lengths[:ROWS].max())):
        ids, other, fresh = _batches(stream, model, _vocabulary(model), device)
        stack = find_stack(model, ids, other)
        head, tensors, error = find_head(stack, ids, other, fresh)
        check_size(logits, head.vocab)
        real = torch.from_numpy(stream.sequence(0).astype(np.int64))[None].to(device)
        _check_repeats(stack, real)
        batch_error = _batch_error(stack, fresh)
        absmax = calibrate(stack, stream, device)
        dtypes = {n: choose_dtype(a, compute_dtype, policy) for n, a in enumerate(absmax)}
        return Canary(
            stack,
            head,
            tensors,
            error,
            _logits_errors(head, stack, ids, dtypes[stack.depth], policy, logits),
            _padding_error(stack, fresh),
            _is_causal(stack, fresh),
            batch_error,
            _is_embedding(stack, fresh),
            dtypes,
        )


def _memory(model: torch.nn.Module, length: int) -> AbstractContextManager[None]:
    """Memory that runs out here, before any batch can be halved, is an error that says so."""
    return memory_errors(
        f"{type(model).__name__} cannot be checked: {ROWS} sequences of {LENGTH} tokens, or one of "
        f"{length}, do not fit into memory beside the model; extract with a shorter --context, or "
        "on another --device; other programs may also hold memory"
    )


def find_head(
    stack: Stack, ids: torch.Tensor, other: torch.Tensor, fresh: torch.Tensor
) -> tuple[Head, dict[str, torch.Tensor], float]:
    """The explicit head, else the recorded one, its tensors and its error on `fresh`.

    Raises `ModelError` or `HeadMismatchError` if neither gives the model's logits.
    """
    try:
        head, tensors = probe_head(stack, other)
        return head, tensors, _prove(head, stack, fresh, other)
    except (ModelError, HeadMismatchError) as error:
        explicit = error
    try:
        program, tensors = record_head(stack, ids, other)
    except ModelError as error:
        raise ModelError(f"{explicit}; {error}") from None
    # Copies: the model may be changed or freed while the head lives.
    arrays = {name: tensor.float().cpu().clone().numpy() for name, tensor in tensors.items()}
    head = ProgramHead(program, arrays, stack.d_model, logits_of(run(stack.model, fresh)).shape[-1])
    return head, tensors, _prove(head, stack, fresh, other)


def _prove(head: Head, stack: Stack, fresh: torch.Tensor, other: torch.Tensor) -> float:
    """Error of the head on other tokens, another shape, and residuals so small that eps matters."""
    hidden, dtype = stack.residuals(fresh)[-1], _dtype(stack.model)
    error = verify_head(head, hidden, logits_of(run(stack.model, fresh)), dtype)
    small = scaled(hidden, SMALL)
    tokens = other[: fresh.shape[0], : fresh.shape[1]].contiguous()
    return max(error, verify_head(head, small, stack.tail(small, tokens), dtype))


def reexamine(model: torch.nn.Module, cache: ActivationCache) -> Stack:
    """The stack of `model`, once the head kept in `cache` has reproduced the model's logits."""
    device = next(model.parameters()).device
    rows = int(min(cache.positions, ROWS * LENGTH))
    stream = TokenStream(cache.tokens[:rows], np.array([rows]), np.array([0]))
    with torch.inference_mode(), _memory(model, LENGTH):
        ids, other, fresh = _batches(stream, model, _vocabulary(model), device)
        stack = find_stack(model, ids, other)
        _prove(cache.head, stack, fresh, other)
    return stack


def _batches(
    stream: TokenStream, model: Any, vocab: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Two batches of one shape and one of another; real tokens first, random ones after them."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, (3, ROWS, LENGTH))
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    if isinstance(pad, int) and vocab > 1 and not any((b == pad).any() for b in blocks(stream.ids)):
        # Some models mask this token by its id; text that lacks it never meets that.
        ids[ids == pad] = (pad + 1) % vocab
    real = stream.ids[: ROWS * LENGTH].astype(np.int64)
    ids[0].reshape(-1)[: len(real)] = real
    fresh = ids[2, :3, : LENGTH - 11].copy()
    fresh[0, :] = ids[0, 1, : LENGTH - 11]
    return tuple(torch.from_numpy(a).to(device) for a in (ids[0], ids[1], fresh))


def _dtype(model: torch.nn.Module) -> torch.dtype:
    """The lowest precision among the weights of the model."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


def _vocabulary(model: torch.nn.Module) -> int:
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if not hasattr(embedding, "weight"):
        found = "none" if embedding is None else type(embedding).__name__
        raise ModelError(
            f"{type(model).__name__} has no single token embedding (found {found}); a model that "
            "reads one token per position is needed"
        )
    return int(embedding.weight.shape[0])


def calibrate(stack: Stack, stream: TokenStream, device: torch.device) -> list[float]:
    """Largest |value| of each layer on the first sequences, first tokens included."""
    absmax = [0.0] * (stack.depth + 1)
    for number in range(min(ROWS, len(stream.lengths))):
        ids = torch.from_numpy(stream.sequence(number).astype(np.int64))[None].to(device)
        for layer, hidden in enumerate(stack.residuals(ids)):
            absmax[layer] = max(absmax[layer], float(hidden.abs().max()))
    return absmax


def _logits_errors(
    head: Head, stack: Stack, ids: torch.Tensor, dtype: str, policy: str, mode: str
) -> LogitsErrors:
    """Every logits mode against the model, on real tokens; layer L is stored in `dtype`."""
    ids = ids[:2]
    hidden = stack.residuals(ids)[-1].float().flatten(0, 1).cpu().numpy()
    model = logits_of(run(stack.model, ids)).float().flatten(0, 1).cpu().numpy()

    def choose(absmax: float) -> str:
        # The head computes in float32 whatever the model ran in.
        return choose_dtype(absmax, "float32", policy)

    return measure(head, hidden, model, dtype, choose, mode)


def _change(one: torch.Tensor, many: torch.Tensor) -> float:
    """Largest |many - one| over the largest |one|."""
    change = (many.float() - one.float()).abs().max()
    return float(change / one.float().abs().max().clamp_min(1e-30))


def _check_repeats(stack: Stack, ids: torch.Tensor) -> None:
    """Refuse a model that gives other residuals for the same tokens, at their real length."""
    limit = CAUSAL_TOLERANCE.get(_dtype(stack.model), 1e-5)
    pairs = zip(stack.residuals(ids), stack.residuals(ids), strict=True)
    if not (worst := max(_change(one, two) for one, two in pairs)) <= limit:
        raise ModelError(
            f"{type(stack.model).__name__} is not deterministic: run twice on the same "
            f"{ids.shape[1]} tokens, its residual stream differs by {worst:.1e}"
        )


def _batch_error(stack: Stack, ids: torch.Tensor) -> float:
    """Relative change of a row's residuals by the rows beside it; raises if they depend on them."""
    alone, together = stack.residuals(ids[:1]), stack.residuals(ids)
    worst = max(_change(a[0], b[0]) for a, b in zip(alone, together, strict=True))
    limit = BATCH_TOLERANCE.get(_dtype(stack.model), 1e-3)
    if not worst <= limit:
        raise ModelError(
            f"{type(stack.model).__name__}: a sequence's residual stream changes with the other "
            f"rows of its batch (by {worst:.1e}, allowed {limit:.0e}), so it cannot be cached"
        )
    return worst


def _padding_error(stack: Stack, ids: torch.Tensor) -> float:
    """Relative change of a short row's residuals when it is padded beside a longer one."""
    short = ids.shape[1] // 2
    mask = torch.ones_like(ids)
    mask[0, short:] = 0
    padded = ids.clone()
    padded[0, short:] = 0
    alone = stack.residuals(ids[:1, :short])
    try:
        many = stack.residuals(padded, mask)
    except (TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return 1.0  # the model takes no mask: batches of equal length only
    return max(_change(a[0], b[0, :short]) for a, b in zip(alone, many, strict=True))


def _is_causal(stack: Stack, ids: torch.Tensor) -> bool:
    """Whether other tokens from some position on leave all layers before it as they are."""
    length, limit = ids.shape[1], CAUSAL_TOLERANCE.get(_dtype(stack.model), 1e-5)
    before = stack.residuals(ids)
    for start in (length // 3, 2 * length // 3, length - 1):
        after = stack.residuals(_other_tokens(ids, slice(start, None)))
        pairs = zip(before, after, strict=True)
        if any(_change(a[:, :start], b[:, :start]) > limit for a, b in pairs):
            return False
    return True


def _is_embedding(stack: Stack, ids: torch.Tensor) -> bool:
    """Whether other tokens before some position leave layer 0 from there on as it is."""
    middle, limit = ids.shape[1] // 2, CAUSAL_TOLERANCE.get(_dtype(stack.model), 1e-5)
    before = stack.residuals(ids)[0]
    after = stack.residuals(_other_tokens(ids, slice(None, middle)))[0]
    return _change(before[:, middle:], after[:, middle:]) <= limit


def _other_tokens(ids: torch.Tensor, where: slice) -> torch.Tensor:
    """`ids` with the tokens of the row above at the positions `where`."""
    changed = ids.clone()
    changed[:, where] = torch.roll(ids, 1, 0)[:, where]
    return changed
