"""What the study of prediction depth says in sentences made from its numbers."""

from collections.abc import Sequence

from .depth_rows import ALL, CLASS, FREQUENCY, DepthCorrelationRow, PredictionDepthRow
from .number_texts import holds_zero, number_text

QUESTION = (
    "After how many layers does a lens say what the model says, for which tokens does it take "
    "more, and are late predictions those that are hard or were learned late?"
)
METHOD = (
    "The prediction depth of a position is the smallest layer l, of 0 (the embedding) to L (the "
    "model itself), from which the top token of the lens is the model's own at every layer up to "
    "L. It is set against the class and frequency of the text's next token, the model's loss and, "
    "from caches of several checkpoints, the first iteration from which the model's top token is "
    "the text's to the end. Definitions: Belrose et al. (2303.08112, section 4.4), Baldock et al. "
    "(2106.09647); Spearman correlations with intervals over documents."
)
DOES_NOT_SAY = (
    "A small depth under a lens does not say that the model stops computing there: later layers "
    "may change the rest of the distribution, and the lens may guess a frequent token by chance.",
    "A large depth under the logit lens may be the drift of the basis between layers, not late "
    "computation: compare it with a fitted lens.",
    "Frequency, loss, class and iteration learned go together: a correlation with one is no cause, "
    "and the partial correlation given the loss takes away its monotone part alone.",
    "Published, of other models and tasks and not measured here: prediction depth and iteration "
    "learned correlate positively on all 11 tasks of 2303.08112 under the tuned lens of Pythia "
    "12B.",
)


def depth_sentences(
    rows: Sequence[PredictionDepthRow], correlations: Sequence[DepthCorrelationRow], depth: int
) -> list[str]:
    """The sentences; `depth` is the number of blocks L."""
    says = []
    for row in rows:
        if row.division != ALL:
            continue
        says.append(
            f"Under {row.lens}, predictions settle at layer "
            f"{number_text(row.depth, row.depth_interval)} of {depth} on average (median "
            f"{number_text(row.depth_median)}, n = {row.n})."
        )
        says += _group_sentences([other for other in rows if other.lens == row.lens], row.lens)
    return [*says, *map(_correlation_sentence, correlations)]


def _group_sentences(rows: Sequence[PredictionDepthRow], lens: str) -> list[str]:
    """The deepest and the shallowest class, and the rare and frequent tokens, of one lens."""
    says = []
    for division, noun in ((CLASS, "class"), (FREQUENCY, "frequency decile")):
        groups = [row for row in rows if row.division == division and row.depth is not None]
        if len(groups) < 2:
            continue
        low, high = (
            pick(groups, key=lambda row: row.depth if row.depth is not None else 0.0)
            for pick in (min, max)
        )
        is_clear = (
            low.depth_interval[1] is not None
            and high.depth_interval[0] is not None
            and low.depth_interval[1] < high.depth_interval[0]
        )
        contrast = (
            f"is largest for {high.group} ({number_text(high.depth, high.depth_interval)}, n = "
            f"{high.n}) and smallest for {low.group} "
            f"({number_text(low.depth, low.depth_interval)}, n = {low.n})"
        )
        ending = "" if is_clear else "; the intervals overlap: no clear difference"
        says.append(f"By {noun} of the next token, the depth under {lens} {contrast}{ending}.")
    return says


def _correlation_sentence(row: DepthCorrelationRow) -> str:
    """One correlation in words."""
    name = row.variable + (f" given the {row.given}" if row.given else "")
    where = {
        "all": "",
        "right": " where the model is right",
        "learned": " where the last checkpoint is right",
        "all, never last": ", with tokens never learned counted as learned last",
    }[row.positions]
    if row.correlation is None:
        return f"Depth under {row.lens} and {name}{where}: undefined (n = {row.n})."
    value = number_text(row.correlation, row.correlation_interval, 2)
    ending = "; no clear correlation" if holds_zero(row.correlation_interval) else ""
    return f"Depth under {row.lens} and {name}{where}: rho = {value} (n = {row.n}){ending}."
