"""Texts, legends and figures of HTML pages; html_report.py puts the numbers in.

page_frame.py has the frame, style sheet and scripts, which pages of causal bases share.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from .probe_style import color, label, marker, stroke

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PLOTLY_BUTTONS = ["toImage", "zoom2d", "pan2d", "resetScale2d"]
"""Plotly's buttons that work without a network."""

DASHES = {
    "solid": "none",
    "dash": "9 4",
    "dot": "2 3",
    "dashdot": "9 3 2 3",
    "longdash": "14 5",
    "longdashdot": "12 3 2 3",
}
"""Patterns of SVG lines for plotly's dashes."""
SHAPES = {
    "circle": "M19 3a4 4 0 1 0 .01 0z",
    "square": "M15 3h8v8h-8z",
    "triangle-up": "M19 2l5 9h-10z",
    "triangle-down": "M19 12l5-9h-10z",
    "diamond": "M19 2l5 5-5 5-5-5z",
    "x": "M15 4.5l1.5-1.5 2.5 2.5 2.5-2.5 1.5 1.5-2.5 2.5 2.5 2.5-1.5 1.5-2.5-2.5-2.5 2.5"
    "-1.5-1.5 2.5-2.5z",
    "cross": "M17.5 2.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "star": "M19 1.5l1.6 3.6 3.9.4-2.9 2.7.8 3.9-3.4-2-3.4 2 .8-3.9-2.9-2.7 3.9-.4z",
    "pentagon": "M19 2l5 3.7-1.9 5.8h-6.2l-1.9-5.8z",
    "hexagon": "M19 2l4.4 2.5v5l-4.4 2.5-4.4-2.5v-5z",
}
"""SVG paths of plotly's markers around (19, 7)."""
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
    "dashed lines read tokens alone. A logarithmic axis ends below the smallest value that is not "
    "the model itself; what lies below is drawn at that end."
)
PRECISION_NOTE = (
    "How often the model's top token is among the probe's k likeliest: higher is better. The "
    "panels have scales of their own."
)
MAP_NOTE = (
    "Passages of the evaluated split. A cell is the token that the lens finds likeliest at this "
    "layer after this input token; darker is more probable. Hover for more."
)
BUCKET_NOTE = (
    "The same numbers where the model itself is less or more sure of what it says at t+N; its "
    "confidence is its largest probability there. Buckets without a pair have no row."
)
EXAMPLE_NOTE = (
    "Pairs at which a lens is farthest from the model and nearest to it, in its middle layer at "
    "its smallest N, at most one of each sequence. The grey words at the end of a text come after "
    "the token that the lens reads."
)
CONFIDENCE_NOTE = (
    "Precision@1 by layer, a line for each range of the model's largest probability at t+N. Panels "
    "in which the ranges do not differ are left out."
)
TABLE_NOTE = "Click a column's name to sort by it."


def figure_html(figure: "Figure", name: str) -> str:
    """HTML of an interactive figure, a `div` with the id `name`; plotly stands in the page."""
    return figure.to_html(
        include_plotlyjs=False,
        full_html=False,
        div_id=name,
        config={
            "displaylogo": False,
            "responsive": figure.layout.autosize is not False,
            "modeBarButtons": [PLOTLY_BUTTONS],
        },
    )


def panel_html(figure: "Figure", name: str, caption: str, *, wide: bool = False) -> str:
    """HTML of a figure with a plain-text `caption` above; a `wide` one scrolls in itself."""
    div = figure_html(figure, name)
    inner = f"<div class='wide'>{div}</div>" if wide else div
    return f"<figure class='panel'><figcaption>{escape(caption)}</figcaption>{inner}</figure>"


def buttons_html(labels: Sequence[str]) -> str:
    """HTML of buttons that each show one part (`data-part`, a number) of a section."""
    buttons = (
        f"<button value='{number}' aria-pressed='{'false' if number else 'true'}'>"
        f"{escape(label)}</button>"
        for number, label in enumerate(labels)
    )
    return f"<div class='choice'>{''.join(buttons)}</div>"


def list_html(title: str, labels: Sequence[str]) -> str:
    """HTML of a list to choose one part of a section from, like `buttons_html`."""
    options = (
        f"<option value='{number}'>{escape(label)}</option>" for number, label in enumerate(labels)
    )
    return (
        f"<div class='choice'><label>{escape(title)} <select>{''.join(options)}</select></label>"
        "</div>"
    )


def legend_html(probes: Mapping[str, bool]) -> str:
    """HTML of a legend of `probes`, name -> whether it reads layers; a click hides a probe."""
    entries = (
        f"<li><button value='{escape(probe)}' aria-pressed='true'>{_sign(probe, reads_layers)}"
        f"{escape(label(probe))}</button></li>"
        for probe, reads_layers in probes.items()
    )
    return f"<ul class='legend'>{''.join(entries)}</ul>"


def _sign(probe: str, reads_layers: bool) -> str:
    """An SVG of the line and the marker of a probe, as plotly draws them."""
    dash = stroke(probe, ("-", "solid") if reads_layers else ("--", "dash"))[1]
    pattern = DASHES.get(dash, dash.replace("px", ""))
    shape = SHAPES.get(marker(probe)[1], SHAPES["circle"]) if reads_layers else ""
    return (
        f"<svg width='38' height='14' viewBox='0 0 38 14' data-color='{color(probe)}' "
        f"style='color: {color(probe)}' aria-hidden='true'>"
        f"<path d='M1 7H37' stroke='currentColor' stroke-width='2' stroke-dasharray='{pattern}'/>"
        f"<path d='{shape}' fill='currentColor'/></svg>"
    )


def glossary_html(glossary: Mapping[str, str]) -> str:
    """HTML of a glossary, a definition list."""
    entries = (f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in glossary.items())
    return "<dl>" + "".join(entries) + "</dl>"
