"""Sentences of `study anomaly`, made from its rows."""

from collections.abc import Sequence

from ....probes.base.resampling import Interval
from .anomaly_rows import DetectionRow, OutcomeRow, TemplateRow
from .anomaly_scores import CLASSIFIER, STATES
from .detectors import DISTANCE, FACTOR

METHOD = (
    "Detectors are fitted on the clean documents of one half of the questions and score all "
    "documents of the other half; AUROC is the mean over several such halves, with a bootstrap "
    "over questions. Features are the trajectory of a prediction under a lens, log q of the "
    "model's top token and the entropy at every layer (Belrose et al., 2303.08112, section "
    "5.2), and the last layer alone; the baseline to beat is the Mahalanobis distance of the "
    "states themselves (Lee et al., 1807.03888), the covariance of standardised columns shrunk "
    "after Ledoit and Wolf. A benign insertion of like length shows what is due to an insertion "
    "as such."
)
DOES_NOT_SAY = (
    "AUROC ranks documents of one source: no threshold was chosen, and a detector for other texts "
    "needs other clean documents.",
    "Templates of one file are alike; attacks of another form, or of the same form as the data, "
    "may not be anomalous at all.",
    "A detector that separates an attack does not show that the model follows it: see the attack "
    "success.",
)


def make_sentences(
    rows: Sequence[DetectionRow],
    templates: Sequence[TemplateRow],
    outcomes: Sequence[OutcomeRow],
    clean: str,
    benign: str | None,
) -> list[str]:
    """What the numbers say, a sentence each."""
    sentences = []
    anomalies = [
        positive
        for negative, positive in dict.fromkeys((row.negative, row.positive) for row in rows)
        if negative == clean and positive != benign
    ]
    for arm in anomalies:
        of_pair = [row for row in rows if (row.negative, row.positive) == (clean, arm)]
        sentences += _detection_sentences(of_pair)
        sentences += _baseline_sentences(of_pair)
        sentences += _benign_sentences(rows, of_pair, clean, benign, arm)
    sentences += _template_sentences(templates)
    sentences += _outcome_sentences(outcomes, clean, benign)
    return sentences


def _detection_sentences(of_pair: Sequence[DetectionRow]) -> list[str]:
    """AUROC of each feature set by the local outlier factor, and its range over detectors."""
    sentences = []
    for features in dict.fromkeys(row.features for row in of_pair if row.features != STATES):
        of_features = [row for row in of_pair if row.features == features]
        factor = next(row for row in of_features if row.detector == FACTOR)
        known = [row.auroc for row in of_features if row.auroc is not None]
        if factor.auroc is None:
            continue
        sentences.append(
            f"{factor.positive} against {factor.negative}, {features}: AUROC {factor.auroc:.2f} "
            f"{show_interval(factor.auroc_interval)} by the {FACTOR}, {min(known):.2f} to "
            f"{max(known):.2f} over {len(known)} detectors (n = {factor.n_negative} + "
            f"{factor.n_positive} documents)."
        )
    return sentences


def _baseline_sentences(of_pair: Sequence[DetectionRow]) -> list[str]:
    """Whether the distance of the states beats the best trajectory."""
    baseline = next(
        row
        for row in of_pair
        if row.layer is None and (row.features, row.detector) == (STATES, DISTANCE)
    )
    layers = [
        row for row in of_pair if row.layer is not None and row.detector == DISTANCE
        and row.auroc is not None
    ]  # fmt: skip
    trajectories = [row for row in of_pair if row.features != STATES and row.auroc is not None]
    if baseline.auroc is None or not layers or not trajectories:
        return []
    low = min(layers, key=lambda row: row.auroc or 0)
    high = max(layers, key=lambda row: row.auroc or 0)
    best = max(trajectories, key=lambda row: row.auroc or 0)
    sentences = [
        f"Baseline, Mahalanobis distance of the states of all layers: {baseline.auroc:.2f} "
        f"{show_interval(baseline.auroc_interval)}; by layer {low.auroc:.2f} (layer {low.layer}) "
        f"to {high.auroc:.2f} (layer {high.layer})."
    ]
    lower, upper = best.difference_interval
    name = (
        f"the best of {len(trajectories)} trajectory detectors ({best.features}, {best.detector})"
    )
    if lower is None or upper is None or best.difference is None:
        return sentences
    found = f"difference {best.difference:+.2f} {show_interval(best.difference_interval)}"
    if upper < 0:
        sentences.append(f"The baseline beats the trajectories, even {name}: {found}.")
    elif lower > 0:
        sentences.append(
            f"The baseline is beaten by {name}: {found}; the choice of the best is in its favour."
        )
    else:
        sentences.append(f"No clear difference between the baseline and {name}: {found}.")
    return sentences


def _benign_sentences(
    rows: Sequence[DetectionRow],
    of_pair: Sequence[DetectionRow],
    clean: str,
    benign: str | None,
    arm: str,
) -> list[str]:
    """How much of the separation a benign insertion explains, for the best of each features."""
    control = {
        (row.features, row.layer, row.detector): row
        for row in rows
        if (row.negative, row.positive) == (clean, benign)
    }
    against = {
        (row.features, row.layer, row.detector): row
        for row in rows
        if (row.negative, row.positive) == (benign, arm)
    }
    if not control:
        return ["There is no benign insertion: how much of this is due to any insertion is open."]
    sentences = []
    chosen = [
        row
        for row in of_pair
        if row.layer is None
        and row.detector == (DISTANCE if row.features == STATES else FACTOR)
        and row.auroc is not None
    ]
    for row in chosen:
        key = row.features, row.layer, row.detector
        of_benign, of_both = control[key], against.get(key)
        low = of_benign.auroc_interval[0]
        if of_benign.auroc is None or of_both is None or of_both.auroc is None or low is None:
            continue
        value = f"{of_benign.auroc:.2f} {show_interval(of_benign.auroc_interval)}"
        rest = f"{arm} against {benign} {of_both.auroc:.2f} {show_interval(of_both.auroc_interval)}"
        name = f"{row.features}, {row.detector}"
        assert row.auroc is not None
        if low > 0.5 and row.auroc > 0.5:
            share = (of_benign.auroc - 0.5) / (row.auroc - 0.5)
            sentences.append(
                f"A part is due to any insertion ({name}): {benign} against {clean} {value}, which "
                f"is {100 * share:.0f} % of what {arm} has above .5; {rest}."
            )
        else:
            sentences.append(
                f"No clear effect of an insertion as such ({name}): {benign} against {clean} "
                f"{value}; {rest}."
            )
    return sentences


def _template_sentences(templates: Sequence[TemplateRow]) -> list[str]:
    """The loss on templates that the training lacks, at the layer that is best within."""
    rows = [row for row in templates if row.detector == CLASSIFIER and row.left_out is not None]
    if not rows:
        return []
    names = list(dict.fromkeys(row.template for row in rows))
    layers = sorted({row.layer for row in rows if row.layer is not None})

    def mean(layer: int, field: str) -> float:
        values = [getattr(row, field) for row in rows if row.layer == layer]
        return sum(value or 0.0 for value in values) / len(values)

    best = max(layers, key=lambda layer: mean(layer, "auroc"))
    parts = [
        f"{row.template} {row.auroc:.2f} -> {row.left_out:.2f} "
        f"{show_interval(row.left_out_interval)}"
        for row in rows
        if row.layer == best and row.auroc is not None
    ]
    return [
        f"A classifier that learns from labelled attacks, on layer {best}: AUROC "
        f"{mean(best, 'auroc'):.2f} trained on all {len(names)} templates, "
        f"{mean(best, 'left_out'):.2f} on a template that its training lacks ({'; '.join(parts)})."
    ]


def _outcome_sentences(outcomes: Sequence[OutcomeRow], clean: str, benign: str | None) -> list[str]:
    """Accuracy and attack success of all arms."""
    sentences = []
    of_arm = {row.arm: row for row in outcomes if row.template == "all"}
    parts = [
        f"{arm} {row.accuracy:.2f} {show_interval(row.accuracy_interval)}"
        + (f", change {row.change:+.2f} {show_interval(row.change_interval)}" if row.change else "")
        for arm, row in of_arm.items()
        if row.accuracy is not None
    ]
    if parts:
        sentences.append(f"The model's top token begins the right answer: {'; '.join(parts)}.")
    base = of_arm.get(clean)
    for arm, row in of_arm.items():
        if arm in (clean, benign) or row.success is None or base is None or base.success is None:
            continue
        low, chance = row.success_interval[0], base.success_interval[1]
        follows = low is not None and chance is not None and low > chance
        sentences.append(
            f"Attack success, {arm}: {row.success:.3f} {show_interval(row.success_interval)} of "
            f"{row.n_success} documents, against {base.success:.3f} in clean ones: "
            + ("the model follows some attacks." if follows else "no clear effect on the answer.")
        )
    return sentences


def show_interval(interval: Interval) -> str:
    """`[low, high]`, or that there is none."""
    low, high = interval
    return "[no interval]" if low is None or high is None else f"[{low:.2f}, {high:.2f}]"
