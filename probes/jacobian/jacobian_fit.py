"""Fits a Jacobian lens from the states of a cache, with its model: `fit_jacobian_lens`."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import NotFoundError, UsageError
from ...cache.number_ranges import absolute_numbers, as_tuple, as_whole_number, format_ranges
from ...cache.progress import Auto, StageProgress, show_stages
from ...cache.store.activation_cache import ActivationCache
from ...cache.tokens.segments import is_sparse
from ..lens.jacobian_lens import JacobianLens, mean_states
from ..prompts.learned_prompt import model_of_cache
from ..training.checkpoint import Checkpoint, lock_folder
from .jacobian_sums import JacobianSums, PromptBatch, batch_jacobians

if TYPE_CHECKING:
    import torch

SKIP_FIRST = 16
"""First positions of a prompt that are neither source nor target, as in the released `jlens`."""
BATCH_TOKENS = 512
"""Positions of the prompts that go backward together."""


def fit_jacobian_lens(
    cache: ActivationCache,
    model: Any = None,
    *,
    layers: int | Sequence[int] | None = None,
    prompts: int = 1000,
    length: int = 128,
    offset: int | None = None,
    skip_first: int = SKIP_FIRST,
    split: str = "train",
    centered: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    checkpoint: str | Path | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    device: str = "auto",
    progress: StageProgress | Auto | None = "auto",
) -> JacobianLens:
    """The mean Jacobian of each of `layers` to the last one, over `prompts` of a split of `cache`.

    A prompt is the beginning of a sequence, at most `length` tokens; sequences are drawn at random
    by `seed`. Positions from `skip_first` on count, but the last one, as in the released `jlens`
    (Gurnee et al., 2026). With `offset` N only the target t + N of each source counts, by random
    signs; by default all later targets are summed. States of the lowest layer come from the cache,
    the blocks above it are the `model`'s: its folder, hub id or the loaded model; default the one
    of the extraction.

    `centered` adds the mean states of the split, so that the lens corrects the mean. The sums are
    kept in the folder `checkpoint` after each batch: a killed fit goes on from there to the same
    lens. `progress` is called with ("jacobian", backward passes done, passes).

    Raises `UsageError` for a cache without whole sequences, or without a long enough one,
    `NotFoundError` for layers that the cache lacks, `MismatchError` for another model.
    """
    numbers = _checked_numbers(prompts, length, skip_first, batch_tokens, seed)
    prompts, length, skip_first, batch_tokens, seed = numbers
    offset = None if offset is None else as_whole_number(offset, "offset")
    layer_numbers = _layers_of(cache, layers)
    chosen = _draw_prompts(
        cache,
        split,
        prompts=prompts,
        length=length,
        skip_first=skip_first,
        offset=offset,
        seed=seed,
    )
    resumable = model_of_cache(cache, model, device, trust_remote_code)
    batches = list(_batches(chosen, batch_tokens))
    saved = None
    if checkpoint is not None:
        identity = {
            "cache": cache.id,
            "layers": list(layer_numbers),
            "prompts": hashlib.sha256(repr(chosen).encode()).hexdigest(),
            "skip_first": skip_first,
            "batch_tokens": batch_tokens,
            "offset": offset,
            "seed": seed,
        }
        saved = Checkpoint(checkpoint, identity, "jacobian.json")
    with show_stages(progress) as show:
        total = len(batches) * cache.d_model

        def report(done: int) -> None:
            if show is not None:
                show("jacobian", done, total)

        with lock_folder(None if checkpoint is None else Path(checkpoint)):
            sums = _sum_batches(
                batches,
                lambda prompts, number: batch_jacobians(
                    resumable,
                    layer_numbers,
                    _read_batch(
                        cache, layer_numbers[0], prompts, skip_first, offset, (seed, number)
                    ),
                    lambda passes: report(number * cache.d_model + passes),
                ),
                JacobianSums.empty(layer_numbers, cache.d_model),
                saved,
            )
            if saved is not None:
                saved.remove()
    depth = cache.n_blocks
    means = mean_states(cache, (*layer_numbers, depth), split) if centered else None
    return JacobianLens.of(
        sums.means(),
        means,
        depth=depth,
        offsets=0 if offset is None else offset,
        centered=centered,
        n_prompts=sums.n_prompts,
        n_positions=sums.n_positions,
        geometry=cache.head.digest,
        cache_id=cache.id,
        split=split,
    )


def _checked_numbers(*numbers: int) -> tuple[int, ...]:
    """The whole numbers of a fit; raises `UsageError` for those that cannot be right."""
    names = ("prompts", "length", "skip_first", "batch_tokens", "seed")
    found = tuple(as_whole_number(n, name) for n, name in zip(numbers, names, strict=True))
    for name, number in zip(names, found, strict=True):
        least = 0 if name in ("skip_first", "seed") else 1
        if number < least:
            raise UsageError(f"{name} must be {least} or more, not {number}")
    return found


def _layers_of(cache: ActivationCache, layers: int | Sequence[int] | None) -> tuple[int, ...]:
    """Layers to fit, ascending, below the last one."""
    if is_sparse(cache):
        raise UsageError(
            "a Jacobian needs the states of whole sequences, and this cache has only some of their "
            "positions; extract with --positions all"
        )
    last = cache.n_blocks
    cache.residual_array(last)
    given = [layer for layer in cache.layers if layer < last] if layers is None else layers
    numbers = tuple(sorted(set(absolute_numbers(as_tuple(given, "layers"), last) or ())))
    if missing := sorted(set(numbers) - set(cache.layers)):
        raise NotFoundError(
            f"this cache has no layer {format_ranges(missing)}; it has layers "
            f"{format_ranges(cache.layers)}"
        )
    if not numbers or numbers[-1] >= last:
        raise UsageError(f"the Jacobian leads from layers below {last} to layer {last}")
    return numbers


Prompt = tuple[int, int]
"""First position in the cache, and length."""


def _draw_prompts(
    cache: ActivationCache,
    split: str,
    *,
    prompts: int,
    length: int,
    skip_first: int,
    offset: int | None,
    seed: int,
) -> list[Prompt]:
    """Beginnings of sequences that have a source and its target, by their length."""
    sequences = cache.sequences(split)
    lengths = np.minimum(cache.sequence_length[sequences], length)
    # The last position counts neither as source nor as target.
    is_long_enough = lengths - 1 - skip_first - (offset or 0) >= 1
    sequences, lengths = sequences[is_long_enough], lengths[is_long_enough]
    if not len(sequences):
        raise UsageError(
            f"no sequence of the split {split!r} has more than {skip_first + 1 + (offset or 0)} "
            "tokens; use a smaller skip_first, offset, or longer sequences"
        )
    if len(sequences) > prompts:
        drawn = np.random.default_rng(seed).choice(len(sequences), prompts, replace=False)
        sequences, lengths = sequences[drawn], lengths[drawn]
    starts = cache.sequence_start[sequences]
    return sorted(zip(starts.tolist(), lengths.tolist(), strict=True), key=lambda x: (x[1], x[0]))


def _batches(prompts: Sequence[Prompt], batch_tokens: int) -> Iterator[list[Prompt]]:
    """Prompts of one length, at most `batch_tokens` tokens together, or one longer prompt."""
    batch: list[Prompt] = []
    for prompt in prompts:
        length = prompt[1]
        if batch and (batch[0][1] != length or (len(batch) + 1) * length > batch_tokens):
            yield batch
            batch = []
        batch.append(prompt)
    yield batch


def _sum_batches(
    batches: Sequence[Sequence[Prompt]],
    sums_of: Callable[[Sequence[Prompt], int], JacobianSums],
    sums: JacobianSums,
    saved: Checkpoint | None,
) -> JacobianSums:
    """`sums` of no prompt, with those of all batches, from where a killed fit stopped."""
    done, sums = _load(saved, sums)
    for number in range(done, len(batches)):
        sums = sums.merge(sums_of(batches[number], number))
        if saved is not None:
            saved.save(
                {"step": number + 1, "prompts": sums.n_prompts, "positions": sums.n_positions},
                _tensors(sums),
            )
    return sums


def _read_batch(
    cache: ActivationCache,
    layer: int,
    prompts: Sequence[Prompt],
    skip_first: int,
    offset: int | None,
    seed: tuple[int, int],
) -> PromptBatch:
    """Tokens and states of some prompts of one length."""
    length = prompts[0][1]
    rows = np.array([start for start, _ in prompts])[:, None] + np.arange(length)
    shape = (len(prompts), length)
    signs = None
    if offset is not None:
        signs = np.random.default_rng(seed).choice(np.array([-1.0, 1.0], np.float32), shape)
    return PromptBatch(
        tokens=np.asarray(cache.tokens.take(rows.ravel()), np.int64).reshape(shape),
        states=np.asarray(cache.residual_array(layer).take(rows.ravel()), np.float32).reshape(
            *shape, cache.d_model
        ),
        first=skip_first,
        last=length - 1 - (offset or 0),
        offset=offset,
        signs=signs,
    )


def _tensors(sums: JacobianSums) -> "dict[str, torch.Tensor]":
    """The sums as tensors of a checkpoint."""
    import torch

    return {f"sum.{layer}": torch.from_numpy(values) for layer, values in sums.sums.items()}


def _load(saved: Checkpoint | None, empty: JacobianSums) -> tuple[int, JacobianSums]:
    """Batches done and their sums, of a killed fit; none of a new one."""
    loaded = None if saved is None else saved.load()
    if loaded is None:
        return 0, empty
    state, tensors = loaded
    sums = {layer: tensors[f"sum.{layer}"].numpy() for layer in empty.sums}
    return int(state["step"]), JacobianSums(sums, state["prompts"], state["positions"])
