"""Measures probes against the model's own predictions, streamed from a cache without the model.

`evaluate` (also the command `residua evaluate`) works in four steps:

1. plan.py decides which probe is read at which layers and offsets, and adds the baselines;
2. windows.py takes whole sequences of a split and cuts their positions into windows;
3. for each window, the probes' logits are compared with the model's (window_tally.py,
   probe_head.py, distributions.py, comparison.py, metrics.py), and added up per document and
   confidence bucket (confidence_buckets.py);
4. the sums become rows with bootstrap intervals, an `Evaluation` (result.py), which the files of
   analysis/report/ draw.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...cache.devices import choose_device
from ...cache.errors import ResiduaWarning, UsageError
from ...cache.number_ranges import as_whole_number, format_ranges
from ...cache.progress import Auto, Progress, show_stage
from ...cache.tokens.segments import PairScope, is_of_images
from ...probes.base.readout import Readout
from ...probes.base.resampling import ResamplingUnits, resampling_counts
from ...probes.baselines.ngrams import CrossFittedBigram
from ...probes.ridge.error_share import ErrorShare, domination_message, error_shares
from ...probes.saved.save import check_belongs
from .confidence_buckets import BucketTally, ResultKey
from .metrics import EvaluationRow
from .plan import FITTED_SPLITS, EvaluationPlan, plan_evaluation
from .probe_head import check_products, rounding_notes
from .probe_names import probe_list
from .result import Evaluation
from .window_tally import tally_windows
from .windows import EvaluationSample, check_where, choose_sequences, class_token_mask

if TYPE_CHECKING:
    import torch

    from ...cache.store.activation_cache import ActivationCache

MAX_UNDEFINED_NAMED = 3
"""Most rows that the warning about undefined measures names."""


def evaluate(
    cache: "ActivationCache",
    probes: Readout | Sequence[Readout] | Mapping[str, Readout] = (),
    *,
    split: str = "test",
    offsets: int | Iterable[int] | None = None,
    layers: int | Iterable[int] | None = None,
    max_positions: int = 16384,
    batch_rows: int | None = None,
    products: str = "auto",
    device: "str | torch.device" = "auto",
    seed: int = 0,
    where: np.ndarray | None = None,
    force: bool = False,
    across_documents: bool = False,
    drop_first: int = 0,
    progress: Progress | Auto | None = "auto",
) -> Evaluation:
    """Measure `probes`, the logit lens and a bigram on whole sequences of `split`.

    Logits are float32, sums of measures float64.

    - `probes`: one probe, several, or several with names: `{"long": ridge, "short": other}`.
      Without names a probe is called by its kind, the second of a kind `ridge 2`; the notes of the
      result say which probe a given name or a number stands for.
    - `split`: train, validation, test or all. Sequences are taken in a seeded random order, up to
      `max_positions` positions, but one sequence at least.
    - `offsets`, `layers`: default those of the probes, else offsets 0-3 and all layers.
    - `batch_rows`: most rows of a `(rows, vocab)` matrix; default by the size of the vocabulary.
    - `products`: `float32`, `bfloat16` or `auto`, the precision of the head's products for probes.
      `bfloat16` rounds the products of the difference to the model (`probe_head.py`), `auto` takes
      it for 32,768 tokens and more, where the device multiplies it faster; the model's own
      distribution is float32 always. A note in the result says so.
    - `device`: torch's device for products and measures; `auto` is the first GPU, else the CPU. A
      window that does not fit into its memory is halved.
    - In a cache of images the class tokens count, of which `max_positions` are taken; a mask
      `where` of other positions compares probes with the head on the last layer there.
    - `where`: bool mask `(positions,)` of the cache, such as `position_masks.name_mask` makes: only
      pairs whose target t+N is in the mask are counted. The sequences are the same without a mask.
    - `force`: evaluate probes of another model, too.
    - `across_documents`: allow pairs (t, t+N), and tokens of the text after them, of two documents
      of one sequence. By default both lie in one document.
    - `drop_first`: positions at the start of each sequence that are no sources t.
    - `progress`: "auto" (bars in a terminal or notebook, elsewhere lines of the logger `residua`),
      None (nothing), or a function that is called with (positions done, positions in all).

    Intervals resample documents. The bigram is counted on the train split; where that split is
    evaluated (`train`, `all`), on its documents of other folds (`CrossFittedBigram`). Logits that
    are no distribution (NaN, +inf) make the measures of their row None; one `ResiduaWarning` and
    the `notes` of the result name the rows.

    Raises `UsageError` if the split is empty or holds no pair, `where` is no such mask, `products`
    is unknown, or a probe holds NaN or an infinity; `ModelError` for a device that cannot be used;
    `NotFoundError` for a layer that the cache lacks, an offset that no probe has, or a probe
    without any of the requested pairs; `MismatchError` for a probe of another model, unless
    `force`.
    """
    max_positions = as_whole_number(max_positions, "max_positions")
    seed = as_whole_number(seed, "seed")
    listed = probe_list(probes)
    for probe in listed:
        check_belongs(probe, cache, force)
    check_where(cache, where)
    check_products(products)
    torch_device = choose_device(device)

    # 1. What is measured: sequences and their pairs, probes with their layers and offsets.
    grid, most = cache.manifest.image_grid, max_positions
    if grid is not None and where is None:
        where, most = class_token_mask(cache), max_positions * grid.tokens
    sequences = choose_sequences(cache, split, most, seed)
    scope = PairScope(across_documents, drop_first).check()
    sample = EvaluationSample(cache, sequences, scope, where)
    plan = plan_evaluation(
        cache,
        probes if isinstance(probes, Mapping) else listed,
        offsets=offsets,
        layers=layers,
        split=split,
        across_documents=scope.across_documents,
        progress="auto" if progress == "auto" else None,
    )

    # 2. and 3. Windows of positions, whose measures are summed per document and bucket.
    units = ResamplingUnits.of(cache, sequences, seed)
    tally = BucketTally(plan.keys, units=units.n_resampled, positions=sample.targets.count)
    with show_stage(progress, "evaluate") as report:
        products = tally_windows(
            sample,
            plan,
            units,
            tally,
            device=torch_device,
            products=products,
            batch_rows=batch_rows,
            progress=report,
        )

    # 4. Rows with intervals, and what to know when they are read.
    rows, buckets = tally.rows(resampling_counts(units.n_resampled, seed))
    if not rows:
        raise no_pair_error(sample, plan.offsets, split)
    undefined = describe_undefined(rows)
    if undefined:
        warnings.warn(undefined, ResiduaWarning, stacklevel=2)
    shares = map_error_shares(sample, plan)
    measured_offsets = tuple(sorted({row.offset for row in rows}))
    notes = [
        *plan.notes,
        *missing_offset_notes(plan.offsets, measured_offsets, split),
        *([undefined] if undefined else []),
        *([units.note] if units.note else []),
        *fitted_split_notes(cache, plan.readouts, split),
        *domination_notes(shares),
        *plan.baseline_notes,
        *image_notes(cache, where),
        *rounding_notes(products),
    ]
    return Evaluation(
        rows=rows,
        buckets=buckets,
        cache_id=cache.id,
        model_name=cache.manifest.model_name,
        data_name=cache.manifest.data_name,
        split=split,
        seed=seed,
        n=sample.targets.count,
        positions=int(cache.sequence_length[sequences].sum()),
        sequences=len(sequences),
        layers=plan.layers,
        offsets=measured_offsets,
        probes=tuple(plan.readouts),
        across_documents=scope.across_documents,
        drop_first=scope.drop_first,
        crossing=sample.crossing_shares(measured_offsets),
        unit=units.name,
        units=units.count,
        shares=shares,
        notes=tuple(notes),
        cache=cache,
        readouts=tuple(plan.readouts.values()),
        split_positions=int(cache.sequence_length[cache.sequences(split)].sum()),
        device=str(torch_device),
        where=where,
    )


def map_error_shares(sample: EvaluationSample, plan: EvaluationPlan) -> dict[ResultKey, ErrorShare]:
    """Shares of the squared error that few pairs make, for probes that map to the last layer."""
    last_layer, shares = sample.cache.n_blocks, {}
    for name, readout in plan.readouts.items():
        residual_map = getattr(readout, "residual_map", None)
        if residual_map is None:
            continue
        maps = {
            (key.layer, key.offset, last_layer): affine_map
            for key in plan.keys
            if key.probe == name
            and key.layer is not None
            and (affine_map := residual_map(key.layer, key.offset)) is not None
        }
        probe_shares = error_shares(
            sample.cache, maps, sample.sequences, sample.scope, sample.where
        )
        for (layer, offset, _), share in probe_shares.items():
            shares[ResultKey(name, layer, offset)] = share
    return shares


def describe_undefined(rows: Sequence[EvaluationRow]) -> str:
    """A sentence that names the rows with undefined measures; empty without such a row."""
    undefined_rows = [row for row in rows if row.n_undefined]
    if not undefined_rows:
        return ""
    names = [
        f"{row.probe}{'' if row.layer is None else f' layer {row.layer}'} N = {row.offset} "
        f"({row.n_undefined:,} of {row.n:,} pairs)"
        for row in undefined_rows[:MAX_UNDEFINED_NAMED]
    ]
    unnamed = len(undefined_rows) - len(names)
    return (
        "logits that are no distribution (NaN or +inf) leave measures undefined, they are None: "
        + ", ".join(names)
        + (f" and {unnamed} more rows" if unnamed else "")
    )


def fitted_split_notes(
    cache: "ActivationCache", probes: Mapping[str, Readout], split: str
) -> list[str]:
    """A note that names the probes fitted on the text of `split`; none for held-out text."""
    names = [
        name
        for name, probe in probes.items()
        if getattr(probe, "cache_id_", None) == cache.id
        and not isinstance(probe, CrossFittedBigram)
    ]
    if split not in FITTED_SPLITS or not names:
        return []
    return [
        f"the {split} split holds text that these probes were fitted on: {', '.join(names)}; "
        "use split='test' for what they say of other text"
    ]


def image_notes(cache: "ActivationCache", where: np.ndarray | None) -> list[str]:
    """What counts in a cache of images, whose model says something at the class token alone."""
    if not is_of_images(cache) or where is None:
        return []
    if np.array_equal(where, class_token_mask(cache)):
        return [
            "of each image the class token counts; patches count with `where` (--where patches)"
        ]
    return [
        "patches are compared with the head on their own last layer, which the model itself reads "
        "at the class token alone"
    ]


def missing_offset_notes(offsets: Sequence[int], measured: Sequence[int], split: str) -> list[str]:
    """A note that names the requested `offsets` without a pair, which have no row."""
    missing = sorted(set(offsets) - set(measured))
    if not missing:
        return []
    return [
        f"offsets {format_ranges(missing)} have no pair in the measured {split} sequences and no "
        f"row; the largest with pairs is {max(measured)}"
    ]


def domination_notes(shares: dict[ResultKey, ErrorShare]) -> list[str]:
    """A note on maps whose squared error comes from few pairs, such as attention sinks."""
    message = domination_message(
        {(key.layer, key.offset, key.probe): share for key, share in shares.items()}
    )
    return [message] if message else []


def no_pair_error(sample: EvaluationSample, offsets: tuple[int, ...], split: str) -> UsageError:
    """The error for a sample without a pair: the mask, short documents, or short sequences."""
    lengths, targets = sample.cache.sequence_length[sample.sequences], sample.targets
    smallest, in_mask = min(offsets), int(targets.in_mask.sum())
    if (targets.largest_offset >= smallest).any():
        return UsageError(
            f"`where` holds {in_mask} of the {lengths.sum()} positions taken from the {split} "
            f"split, none with a token {smallest} before it; raise max_positions or use another "
            "mask"
        )
    if (targets.largest_offset_across >= smallest).any():
        return UsageError(
            f"no document of the {len(lengths)} {split} sequences is longer inside one sequence "
            f"than the offsets {offsets} ask for; use smaller offsets, or across_documents=True "
            "(--across-documents)"
        )
    return UsageError(
        f"no {split} sequence is longer than the offsets {offsets} ask for, beside the positions "
        f"that drop_first leaves out: the longest of {len(lengths)} has {lengths.max()} tokens"
    )
