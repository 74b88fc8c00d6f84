"""What the study of lens quality says in sentences made from its numbers."""

from collections.abc import Sequence

from ..prediction_depth.number_texts import holds_zero, number_text, percent_text
from .early_guesses import BUCKETS, EarlyGuessRow
from .entropy_profiles import ProfileClassifierRow
from .layer_similarity import LayerPairRow
from .layer_transfer import DriftRow
from .lens_layers import LensLayerRow

QUESTION = (
    "What do lenses make of the layers of a model: how well do they predict at each layer, how "
    "biased are they, how far does the basis of the residual stream drift from layer to layer, and "
    "how is a first guess refined?"
)
METHOD = (
    "The logit lens and every given lens read the same held-out positions at every layer; their "
    "distributions are compared with the model's and with the text. Translators of affine lenses "
    "are also applied to the states of other layers, and their penalty is set against the "
    "similarity of the layers' covariances. Measures: Belrose et al. (2303.08112); early guesses: "
    "2510.18871; entropy profiles: 2502.16570."
)
DOES_NOT_SAY = (
    "A lens shows what an affine map can read from a layer, which is not what the model's later "
    "blocks make of it.",
    "A lens with a small KL may read more than the model uses: it is fitted to say what the last "
    "layer says.",
    "The correlation of transfer penalty and similarity is over pairs of layers of one model, "
    "which are no independent observations; nearby layers are alike in both.",
    "Published, of other models and not measured here: 4 to 5 bits of marginal bias of the logit "
    "lens of GPT-Neo 2.7B at most layers, and rho = -0.78 between transfer penalty and covariance "
    "similarity in Pythia 12B (2303.08112); 75 % of the top tokens of layer 1 among the 10 most "
    "frequent, more than 70 % of them revised (2510.18871).",
)


def quality_sentences(rows: Sequence[LensLayerRow], middle_layer: int) -> list[str]:
    """What each lens reaches at the middle layer, and its largest bias and echo below the last.

    `middle_layer` is the number of the middle layer of the model.
    """
    says = []
    lenses = dict.fromkeys(row.lens for row in rows)
    last = {row.lens: row for row in rows}
    for lens in lenses:
        below = [row for row in rows if row.lens == lens and row is not last[lens]]
        if not below:
            continue
        middle = min(below, key=lambda row: abs(row.layer - middle_layer))
        says.append(
            f"{lens} at layer {middle.layer}: perplexity "
            f"{number_text(middle.perplexity, middle.perplexity_interval)} (the model "
            f"{number_text(last[lens].perplexity, last[lens].perplexity_interval)}), KL "
            f"{number_text(middle.kl, middle.kl_interval)} nats, n = {middle.n}."
        )
        biased = [row for row in below if row.marginal_bias_bits is not None]
        if biased:
            most = max(biased, key=lambda row: row.marginal_bias_bits or 0.0)
            least = min(biased, key=lambda row: row.marginal_bias_bits or 0.0)
            says.append(
                f"The mean distribution of {lens} is "
                f"{number_text(least.marginal_bias_bits, digits=2)} (layer {least.layer}) to "
                f"{number_text(most.marginal_bias_bits, digits=2)} bits (layer {most.layer}) from "
                "the model's."
            )
        echoing = max(below, key=lambda row: row.echo or 0.0)
        own = last[lens]
        clear = not holds_zero(echoing.echo_excess_interval)
        says.append(
            f"{lens} repeats the input token most at layer {echoing.layer}: "
            f"{percent_text(echoing.echo, echoing.echo_interval)} of positions, the model itself "
            f"{percent_text(own.echo, own.echo_interval)}; difference "
            f"{percent_text(echoing.echo_excess, echoing.echo_excess_interval)}"
            f"{'' if clear else ': no clear difference'}."
        )
    return says


def drift_sentences(rows: Sequence[DriftRow], pairs: Sequence[LayerPairRow]) -> list[str]:
    """The correlation of penalty and similarity, and what persists between neighbours."""
    says = []
    for row in rows:
        if row.similarity != "similarity":
            continue
        given = ", given their distance" if row.given else ""
        given += " (without the embedding)" if row.layers == "blocks" else ""
        if row.correlation is None:
            says.append(
                f"Transfer penalty of {row.lens} and covariance similarity{given}: undefined "
                f"({row.pairs} pairs of layers)."
            )
            continue
        p = "" if row.p_value is None else f", p = {row.p_value:.2g} by permuting the layers"
        unclear = row.p_value is not None and row.p_value > 0.05
        says.append(
            f"Transfer penalty of {row.lens} and covariance similarity{given}: rho = "
            f"{row.correlation:.2f} over {row.pairs} ordered pairs of layers{p}"
            f"{': no clear correlation' if unclear else ''}."
        )
    layers = sorted({layer for row in pairs for layer in (row.layer, row.other)})
    neighbours = {(a, b) for a, b in zip(layers, layers[1:], strict=False)}
    shared = [
        row
        for row in pairs
        if (row.layer, row.other) in neighbours and row.coordinate_overlap is not None
    ]
    if shared:
        low = min(shared, key=lambda row: row.coordinate_overlap or 0.0)
        says.append(
            f"The {low.directions} directions of largest variance persist least from layer "
            f"{low.layer} to {low.other}: coordinates overlap by "
            f"{number_text(low.coordinate_overlap, digits=2)}, against "
            f"{number_text(low.coordinate_chance, digits=2)} with random directions."
        )
    return says


def guess_sentences(rows: Sequence[EarlyGuessRow]) -> list[str]:
    """How frequent the guesses of the lowest layer are, and how many are revised."""
    frequent, says = next(iter(BUCKETS)), []
    for lens in dict.fromkeys(row.lens for row in rows):
        own = [row for row in rows if row.lens == lens]
        # Layer 0 is the embedding; the published figure is of layer 1.
        layer = min((row.layer for row in own if row.layer > 0), default=0)
        at = {row.bucket: row for row in own if row.layer == layer}
        if at["all"].revised is None:
            continue
        says.append(
            f"Of the top tokens of {lens} at layer {layer}, "
            f"{percent_text(at[frequent].share, at[frequent].share_interval)} are among the 10 "
            f"most frequent tokens (the model {percent_text(at[frequent].model_share)}, the text "
            f"{percent_text(at[frequent].text_share)}); "
            f"{percent_text(at['all'].revised, at['all'].revised_interval)} of all and "
            f"{percent_text(at[frequent].revised, at[frequent].revised_interval)} of the frequent "
            f"ones are revised (n = {at['all'].n} and {at[frequent].n})."
        )
    return says


def classifier_sentences(rows: Sequence[ProfileClassifierRow], label: str) -> list[str]:
    """How well profiles tell the classes of `label`, against guessing."""
    says = []
    for row in rows:
        low, high = row.accuracy_interval
        chance = max(row.majority, row.permuted)
        unclear = (
            low is None
            or high is None
            or holds_zero((low - chance, high - chance))
            or row.accuracy <= max(chance, row.permuted_high)
        )
        says.append(
            f"{row.classifier} on the entropy of {row.lens} ({row.features}) tells the "
            f"{row.classes} classes of {label} in {percent_text(row.accuracy, (low, high))} of "
            f"{row.n} held-out sequences (largest class {percent_text(row.majority)}, permuted "
            f"labels {percent_text(row.permuted)})"
            f"{': no clear difference from guessing' if unclear else ''}."
        )
    return says
