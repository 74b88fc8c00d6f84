"""HTML of the pairs at which a lens is farthest from the model and nearest to it."""

from collections.abc import Sequence
from html import escape

from ..evaluation.kl_examples import KlExample, KlExamples
from ..evaluation.metrics import format_measure
from .html_page import list_html
from .probe_style import label


def examples_html(examples: Sequence[KlExamples]) -> str:
    """HTML of all `examples`: a list of lenses to choose from, and two tables of each lens."""
    parts = [
        f"<div class='choice-of' data-part='{number}'{' hidden' if number else ''}>"
        f"{_table('Farthest from the model', lens_examples.worst)}"
        f"{_table('Nearest to the model', lens_examples.best)}</div>"
        for number, lens_examples in enumerate(examples)
    ]
    names = [
        f"{label(found.probe)}, layer {found.layer}, N = {found.offset}, n = {found.n:,}"
        for found in examples
    ]
    return f"<div>{list_html('lens', names)}{''.join(parts)}</div>"


def _table(title: str, examples: Sequence[KlExample]) -> str:
    """HTML of a table, one row per example."""
    headings = ("KL, nats", "text", "model", "lens")
    head = "".join(f"<th>{escape(name)}</th>" for name in headings)
    return (
        f"<h3>{escape(title)}</h3><table class='examples'><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(_row(example) for example in examples)}</tbody></table>"
    )


def _row(example: KlExample) -> str:
    """HTML of one example: KL, text, what the model says next, what the lens says."""
    ahead = f"<span>{escape(example.ahead)}</span>" if example.ahead else ""
    return (
        f"<tr><td class='kl' data-name='KL'>{format_measure(example.kl, 3)}</td>"
        f"<td class='text'><bdi>{escape(example.context)}</bdi>{ahead}</td>"
        f"<td class='says' data-name='model:'>{_tokens(example.model)}</td>"
        f"<td class='says' data-name='lens:'>{_tokens(example.lens)}</td></tr>"
    )


def _tokens(tokens: Sequence[tuple[str, float]]) -> str:
    """HTML of tokens with their probabilities in percent."""
    return "<br>".join(f"<bdi>{escape(name)}</bdi> {100 * p:.0f} %" for name, p in tokens)
