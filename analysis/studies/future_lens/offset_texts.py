"""Headings and sentences of the study."""

from collections.abc import Sequence
from typing import Any

from ....probes.base.resampling import Interval
from .confidence_rows import PUBLISHED_NAME, BucketPrecision, CalibrationRow
from .layer_rows import DifferenceRow, PeakRow
from .name_rows import NameRow
from .offset_figures import shown_name
from .pair_filters import KeptRow
from .repeated_names import NameMask

FEWEST_PAIRS = 50
"""Fewest pairs inside names that a sentence is made of."""
QUESTION = (
    "Does the state of a layer at one token say what the model will predict not only next, but "
    "two, three, four tokens further, and at which layer is that read best?"
)
METHOD = (
    "Probes of the residual stream at t are compared with the model's own distribution after the "
    "token t+N of the text, by precision, surprisal and KL (Future Lens: Pal et al., 2311.04897); "
    "they read the state alone, never the tokens between. Floors are counted on the train split: a "
    "bigram, which reads the true token at t+N, and the marginalised bigram, which reads the "
    "model's distribution at t. Intervals are bootstrapped over documents."
)
DOES_NOT_SAY = (
    "That a later token can be read from a state does not mean that the model computed it there or "
    "uses it: text is predictable, and a probe may know only what usually follows.",
    "The published numbers are of a learned prompt on GPT-J that reads the true tokens between t "
    "and t+N; linear and hidden-state probes do not, and other models and texts have other "
    "ceilings.",
    "The pair filters change the texts that are measured: where the model is right, tokens are "
    "easier, for every probe and baseline.",
)
OFFSET_HEADINGS = {
    "probe": "probe",
    "offset": "N",
    "layer": "layer",
    "n": "n",
    "precision_at_1": "P@1",
    "precision_at_1_interval": "95 %",
    "precision_at_5": "P@5",
    "precision_at_10": "P@10",
    "kl": "KL, nats",
    "nll": "-log q(model's), nats",
    "surprisal": "surprisal, nats",
    "precision_at_1_text": "P@1 of the text",
    "nll_text": "-log q(text's), nats",
}
PEAK_HEADINGS = {
    "probe": "probe",
    "offset": "N",
    "n": "n",
    "peak": "best layer",
    "peak_interval": "95 % of the layer",
    "precision_at_1": "P@1 there",
    "precision_at_1_interval": "95 %",
    "beats_bigram_from": "above the bigram from",
    "beats_marginal_from": "above the marginalised bigram from",
}
DIFFERENCE_HEADINGS = {
    "probe": "probe",
    "offset": "N",
    "layer": "layer",
    "other": "less",
    "other_layer": "its layer",
    "difference": "difference of P@1",
    "difference_interval": "95 %",
}
BUCKET_HEADINGS = {
    "probe": "probe",
    "offset": "N",
    "layer": "layer",
    "bucket": "model's confidence",
    "n": "n",
    "share": "share of pairs",
    "precision_at_1": "P@1",
    "precision_at_1_interval": "95 %",
}
CALIBRATION_HEADINGS = {
    "probe": "probe",
    "offset": "N",
    "layer": "layer",
    "n": "n",
    "confidence": "mean confidence",
    "precision_at_1": "P@1",
    "ece": "calibration error",
    "ece_interval": "95 %",
    "precision_at_1_text": "P@1 of the text",
    "ece_text": "calibration error, text",
    "ece_text_interval": "95 %",
}
CURVE_HEADINGS = {
    "probe": "probe",
    "offset": "N",
    "layer": "layer",
    "bin_from": "confidence from",
    "bin_to": "to",
    "n": "n",
    "confidence": "mean confidence",
    "precision_at_1": "P@1",
    "precision_at_1_interval": "95 %",
    "precision_at_1_text": "P@1 of the text",
    "precision_at_1_text_interval": "95 %",
}
KEPT_HEADINGS = {
    "offset": "N",
    "keep": "filter",
    "pairs": "pairs",
    "kept": "kept",
    "share": "share",
    "share_interval": "95 %",
}
NAME_HEADINGS = {
    "probe": "probe",
    "offset": "N",
    "layer": "layer",
    "n": "n in names",
    "precision_at_1": "P@1 in names",
    "precision_at_1_interval": "95 %",
    "precision_at_1_all": "P@1 of all",
    "difference": "difference",
    "difference_interval": "95 %",
    "published": "published in names (learned prompt, GPT-J)",
}


def describe_results(
    peaks: Sequence[PeakRow],
    differences: Sequence[DifferenceRow],
    *,
    buckets: Sequence[BucketPrecision],
    calibration: Sequence[CalibrationRow],
    kept: Sequence[KeptRow],
    names: Sequence[NameRow],
    keep: str,
) -> list[str]:
    """Sentences made from the numbers."""
    says = []
    if keep != "none":
        shares = [row for row in kept if row.keep == keep and row.share is not None]
        parts = ", ".join(f"{100 * (row.share or 0):.0f} % at N = {row.offset}" for row in shares)
        says.append(f"The filter {keep!r} keeps {parts} of the pairs; all numbers are of these.")
    for peak in peaks:
        beside = [
            row for row in differences if (row.probe, row.offset) == (peak.probe, peak.offset)
        ]
        says.append(_describe_peak(peak, beside))
    says += _describe_buckets(buckets)
    for row in calibration:
        if row.offset == 1 and row.precision_at_1_text is not None and row.ece_text is not None:
            side = "too sure" if row.confidence > row.precision_at_1_text else "not sure enough"
            says.append(
                f"{shown_name(row.probe)} at N = 1, layer {row.layer}: its confidence is "
                f"{row.confidence:.3f} on average, the text's token its top one in "
                f"{row.precision_at_1_text:.3f} of {row.n_text:,} pairs: {side}, with a "
                f"calibration error of {row.ece_text:.3f}{_interval(row.ece_text_interval)}."
            )
    for row in names:
        if row.offset < 1 or row.precision_at_1 is None or row.difference is None:
            continue
        if row.n < FEWEST_PAIRS:
            says.append(
                f"{shown_name(row.probe)} at N = {row.offset}: only {row.n} pairs lie inside "
                "names, too few to say anything."
            )
            continue
        says.append(
            f"{shown_name(row.probe)} at N = {row.offset}, layer {row.layer}, inside names: "
            f"precision@1 {row.precision_at_1:.3f}{_interval(row.precision_at_1_interval)}, n = "
            f"{row.n:,}; {_describe_difference(row.difference, row.difference_interval)} all pairs."
        )
    return says


def _describe_peak(peak: PeakRow, differences: Sequence[DifferenceRow]) -> str:
    """The best layer of one probe and offset, and its differences to floors and controls there."""
    low, high = peak.peak_interval
    known = low is not None and high is not None
    layers = f" ({low:.0f} to {high:.0f})" if known and low != high else ""
    sentence = (
        f"{shown_name(peak.probe)} reads N = {peak.offset} best at layer {peak.peak}{layers}: "
        f"precision@1 {peak.precision_at_1:.3f}{_interval(peak.precision_at_1_interval)}, n = "
        f"{peak.n:,}"
    )
    parts = [
        f"{_describe_difference(row.difference, row.difference_interval)} "
        f"the {shown_name(row.other)}"
        for row in differences
        if row.difference == row.difference
    ]
    floors = (("bigram", peak.beats_bigram_from), ("marginalised bigram", peak.beats_marginal_from))
    starts = [f"above the {name} from layer {layer} on" for name, layer in floors if layer]
    return "; ".join([sentence, *parts, *starts]) + "."


def _describe_difference(difference: float, interval: Interval) -> str:
    """`+0.020 [+0.010, +0.030] above`, or that nothing is clear."""
    low, high = interval
    if low is None or high is None:
        return f"{difference:+.3f} (no interval) to"
    ends = f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
    if low <= 0 <= high:
        return f"no clear difference ({ends}) to"
    return f"{ends} {'above' if difference > 0 else 'below'}"


def _describe_buckets(buckets: Sequence[BucketPrecision]) -> list[str]:
    """For N = 1, precision@1 where the model is least and most sure."""
    says = []
    for probe in dict.fromkeys(row.probe for row in buckets):
        rows = [row for row in buckets if row.probe == probe and row.offset == 1 and row.n]
        if probe == PUBLISHED_NAME or len(rows) < 2:
            continue
        parts = [
            f"{row.precision_at_1:.3f}{_interval(row.precision_at_1_interval)} (n = {row.n:,}) at "
            f"{row.bucket}"
            for row in rows
            if row.precision_at_1 is not None
        ]
        says.append(
            f"{shown_name(probe)} at N = 1, layer {rows[0].layer}, by the model's confidence: "
            f"precision@1 {', '.join(parts)}."
        )
    return says


def _interval(interval: Interval) -> str:
    low, high = interval
    return "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"


def describe_names(found: NameMask, repeats: str) -> str:
    """A note on what the detector of names found."""
    where = {
        "document": "again in the same document",
        "data": "in several documents of the sample",
        "any": "anywhere",
    }[repeats]
    examples = ", ".join(repr(name) for name in found.examples)
    return (
        f"names are runs of capitalised words inside sentences, of two tokens or more, that occur "
        f"{where}: {found.names:,} distinct ones, {found.occurrences:,} occurrences"
        + (f", such as {examples}" if examples else "")
        + "; a heuristic, with acronyms and titles among them"
    )


def probe_descriptions(readouts: dict[str, Any]) -> dict[str, str]:
    """Name in the tables -> what it is."""
    return {str(name): " ".join(repr(readout).split()) for name, readout in readouts.items()}
