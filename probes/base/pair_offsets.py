"""Offsets at which the sequences of a split have pairs (t, t+N), found before a fit reads rows."""

from collections.abc import Iterable

from ...cache.errors import UsageError
from ...cache.number_ranges import format_ranges
from ...cache.store.activation_cache import ActivationCache
from ...cache.tokens.segments import PairScope, is_of_images


def largest_pair_offset(
    cache: ActivationCache,
    offsets: Iterable[int],
    scope: PairScope,
    split: str = "train",
    text: bool = False,
) -> int:
    """Largest offset with a pair in `split`, -1 for none; reads no residual stream.

    Reading stops as soon as the largest of `offsets` has a pair, so the result may be any number
    from there on. With `text`, a pair counts only if a token of the text follows t+N, and only
    `offsets` are tried.
    """
    offsets = sorted(set(offsets))
    largest_with_pair = -1
    for sequences in cache.blocks(cache.sequences(split)):
        # Largest N of each position t with (t, t+N) a pair; negative for none.
        largest_offsets = scope.largest_offsets(cache, sequences)
        if text:
            positions = cache.positions_of(sequences)
            for offset in [offset for offset in offsets if offset > largest_with_pair]:
                targets = positions[largest_offsets >= offset] + offset
                if not len(targets):
                    break
                if (cache.following_tokens(targets, scope.across_documents) >= 0).any():
                    largest_with_pair = offset
        else:
            largest_with_pair = max(largest_with_pair, int(largest_offsets.max(initial=-1)))
        if offsets and largest_with_pair >= offsets[-1]:
            break
    return largest_with_pair


def check_pair_offsets(
    cache: ActivationCache,
    offsets: Iterable[int],
    scope: PairScope,
    split: str = "train",
    text: bool = False,
) -> None:
    """Raise `UsageError` unless `split` has a pair (t, t+N) at each N of `offsets`.

    With `text`, a token of the text must follow t+N, too. The message names the missing offsets and
    the largest one with a pair.
    """
    offsets = sorted(set(offsets))
    largest = largest_pair_offset(cache, offsets, scope, split, text)
    missing = [offset for offset in offsets if offset > largest]
    if not missing:
        return
    if is_of_images(cache) and not scope.across_documents:
        raise UsageError(
            f"offsets {format_ranges(missing)} have no meaning in a cache of images, in which "
            "position t+N is another patch; leave offsets out (0), or give across_documents=True "
            "(--across-documents) to pair patches all the same"
        )
    condition = " with a token of the text after it" if text else ""
    segment = "sequence" if scope.across_documents else "document of one sequence"
    dropped = (
        f" and t must not be among the {scope.drop_first} first positions of a sequence"
        if scope.drop_first
        else ""
    )
    limit = f"the largest offset is {largest}" if largest >= 0 else "none is long enough"
    plural = "s" if len(missing) > 1 else ""
    raise UsageError(
        f"the {split} split has no pair at offset{plural} {format_ranges(missing)}{condition}: t "
        f"and t+N must lie in one {segment}{dropped}; {limit}; use smaller offsets or longer "
        "sequences"
    )
