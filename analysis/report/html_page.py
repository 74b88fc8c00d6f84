"""Texts, style sheet, script and figures of HTML pages; html_report.py puts the numbers in.

basis_page.py writes pages of the same frame, style and script.
"""

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PLOTLY_BUTTONS = ["toImage", "zoom2d", "pan2d", "resetScale2d"]
"""Plotly's buttons that work without a network."""

GLOSSARY = {
    "layer": "0 is the embedding output, l the output of block l; the last one comes before the "
    "final norm, so there the logit lens at N = 0 is the model itself.",
    "N (offset)": "From the residual stream at token t the probe predicts what the model says at "
    "token t+N; N = 0 is the ordinary next token. A pair (t, t+N) lies inside one document of one "
    "sequence, unless pairs across documents were asked for.",
    "n": "Number of pairs measured. n text: those for which the text goes on.",
    "undefined": "Pairs at which the logits of the model or the probe are no distribution (NaN, "
    "infinity). Measures of a row with such pairs are undefined, and left empty.",
    "nats": "Unit of information with the natural logarithm; 1 nat is 1.44 bits.",
    "KL": "KL(model ‖ probe): nats lost when the probe's distribution stands in for the model's. "
    "0 is perfect. Mean over pairs.",
    "KL reverse": "KL(probe ‖ model): nats lost the other way round. It is large where the probe "
    "gives mass to what the model finds unlikely, infinite where the model's logits exclude that.",
    "confidence": "The model's largest probability at t+N, where the probe is to predict it. A "
    "bucket holds its lower end, not its upper one; the last holds 100 % too.",
    "share": "Part of the pairs of this probe, layer and N that is in the bucket.",
    "p@k (precision@k)": "Share of pairs for which the model's top token at t+N is among the "
    "probe's k likeliest tokens; ties go to the lower token id.",
    "NLL": "-log of the probe's probability of the model's top token, nats.",
    "surprisal": "-log of the model's probability of the probe's top token, nats: how much the "
    "probe's choice would surprise the model (Din et al., arXiv 2303.09435; Future Lens).",
    "text": "NLL text and p@k text compare with the token that follows in the text, x[t+N+1], "
    "instead of the model's top token.",
    "95 % interval": "Percentile bootstrap over whole documents, seeded: what another sample of "
    "as many documents would give. Too narrow for few documents, empty for one sequence. "
    "It says nothing about another corpus or another training run.",
    "logit lens": "The model's own head on a middle layer, without any fit.",
    "bigram": "Witten-Bell bigram of the train split; where that is evaluated, of its documents of "
    "other folds. It reads x[t+N], which no probe of the "
    "residual stream at t sees; a trigram reads x[t+N-1] as well. The unigram reads nothing.",
    "lagged bigram": "What x[t] alone says of the token after t+N, counted at that distance; the "
    "bigram chain computes it from neighbours.",
    "marginalised bigram": "The model's distribution at t, taken N bigram steps further: it reads "
    "no token after t.",
    "shuffled states": "A control: the same probe, but reading the state of another sequence.",
    "permuted labels": "A control: the same probe, but fitted to targets of other sequences.",
    "with the next token": "A control: the same probe, but reading the embedding of the token at "
    "t+1 beside the state at t.",
}
KL_NOTE = (
    "How far each probe is from the model at t+N: lower is better. Bands are 95 % intervals, "
    "dashed lines read tokens alone. On a logarithmic axis, values below 0.001 are drawn there."
)
PRECISION_NOTE = (
    "How often the model's top token is among the probe's k likeliest: higher is better. The "
    "panels have scales of their own."
)
MAP_NOTE = (
    "One passage of the evaluated split. A cell is the token that the lens finds likeliest at this "
    "layer after this input token; darker is more probable. Hover for more."
)
BUCKET_NOTE = (
    "The same numbers where the model itself is less or more sure of what it says at t+N; its "
    "confidence is its largest probability there. Buckets without a pair have no row."
)
TABLE_NOTE = "Click a column's name to sort by it."
def figure_html(figure: "Figure", name: str) -> str:
    """HTML of an interactive figure, a `div` with the id `name`; plotly stands in the page."""
    return figure.to_html(
        include_plotlyjs=False,
        full_html=False,
        div_id=name,
        config={"displaylogo": False, "responsive": True, "modeBarButtons": [PLOTLY_BUTTONS]},
    )


def glossary_html(glossary: Mapping[str, str]) -> str:
    """HTML of a glossary, a definition list."""
    entries = (f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in glossary.items())
    return "<dl>" + "".join(entries) + "</dl>"
