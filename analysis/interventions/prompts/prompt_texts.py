"""Tables, figures and sentences of `study_prompts`."""

from collections.abc import Sequence

from ....probes.base.resampling import Interval
from ...studies.results.study_figures import Panel, Series, StudyFigure
from ...studies.results.study_result import StudyTable
from .prompt_rows import PromptRow, RivalRow, Rivals

QUESTION = (
    "Does a state say which tokens come later, when the model itself is asked by a prompt that "
    "takes this state?"
)
METHOD = (
    "The model reads a prompt, at whose last position one layer is the cached state of t, and "
    "behind it the tokens t+1 to t+N of the text; what it then says is compared with what it "
    "said in the text at t+N (Pal et al., 2311.04897; Patchscopes, 2401.06102; SimLens, "
    "2507.17618). The same is done with the states of other documents. Beside each row stand a "
    "bigram, and a vocabulary probe of the state and the next token's embedding, which know the"
    " given tokens as the prompt does."
)
NOT_SAID = [
    "Precision alone does not say that the state was read: the prompt sees the tokens t+1 to "
    "t+N, so only the gain over shuffled states comes from the state.",
    "A low precision does not say that the state lacks the later tokens: this prompt may not ask.",
    "That a prompt can be made to say a token does not say that the model uses it in the text.",
]


def prompt_tables(rows: Sequence[PromptRow], rivals: Sequence[RivalRow]) -> list[StudyTable]:
    """The table of prompts, and that of the probes at the same positions."""
    tables = [
        StudyTable(
            "prompts",
            "Precision of prompts by layer and offset N",
            {
                "prompt": "prompt",
                "offset": "N",
                "mode": "tokens",
                "layer": "layer",
                "target_layer": "into",
                "n": "n",
                "precision": "precision@1",
                "precision_interval": "95 %",
                "shuffled": "shuffled",
                "gain": "gain",
                "gain_interval": "95 %",
                "next_token": "[h; e(x)]",
                "bigram": "bigram",
                "lead": "lead",
                "text_precision": "text@1",
                "surprisal": "surprisal/nats",
            },
            rows,
        )
    ]
    if rivals:
        tables.append(
            StudyTable(
                "probes",
                "Probes at the same positions",
                {
                    "probe": "probe",
                    "offset": "N",
                    "layer": "layer",
                    "n": "n",
                    "precision": "precision@1",
                    "precision_interval": "95 %",
                    "precision_5": "precision@5",
                    "text_precision": "text@1",
                    "surprisal": "surprisal/nats",
                    "nll": "nll/nats",
                },
                sorted(rivals, key=lambda row: (row.offset, row.probe, row.layer or 0)),
            )
        )
    return tables


def shown_prompts(rows: Sequence[PromptRow]) -> list[str]:
    """Names of the prompts that figures show: the mean stands for the written ones."""
    names = list(dict.fromkeys(row.prompt for row in rows))
    means = [name for name in names if name.startswith("mean of ") and name.endswith(" written")]
    if not means:
        return names
    return [
        name for name in names if name in means or name.startswith("learned") or name == "simlens"
    ]


def precision_figure(
    rows: Sequence[PromptRow], others: Sequence[RivalRow], rivals: Rivals, depth: int
) -> StudyFigure:
    """Precision@1 by layer, a panel for each offset; dashed lines are shuffled states."""
    panels = []
    for offset in sorted({row.offset for row in rows}):
        series = []
        for name in shown_prompts(rows):
            for mode in ("forced", "free"):
                chosen = _chosen(rows, name, offset, mode)
                if not chosen:
                    continue
                label = name if mode == "forced" else f"{name}, free"
                x = [row.layer for row in chosen]
                series.append(
                    Series(
                        label,
                        x,
                        [row.precision for row in chosen],
                        [row.precision_interval[0] for row in chosen],
                        [row.precision_interval[1] for row in chosen],
                    )
                )
                shuffled = [row.shuffled for row in chosen]
                series.append(Series(f"{label}, shuffled", x, shuffled, dash="dash"))
        series += _lines_of_probes(others, offset, rivals)
        bigram = _bigram(others, rivals, offset)
        panels.append(
            Panel(
                f"N = {offset}",
                "layer of the state",
                "precision@1",
                series,
                y_range=(0.0, 1.0),
                reference=bigram,
                reference_label="" if bigram is None else "bigram",
            )
        )
    return StudyFigure(
        "precision",
        f"Share of states of layers 0 to {depth} whose prompt says the model's own token, with "
        "95 % intervals over documents; dashed: the same prompts with states of other documents.",
        _in_rows(panels),
    )


def surprisal_figure(
    rows: Sequence[PromptRow], others: Sequence[RivalRow], rivals: Rivals
) -> StudyFigure:
    """Mean surprisal by layer, a panel for each offset."""
    panels = []
    for offset in sorted({row.offset for row in rows}):
        series = []
        for name in shown_prompts(rows):
            chosen = _chosen(rows, name, offset, "forced")
            if not chosen:
                continue
            x = [row.layer for row in chosen]
            series.append(
                Series(
                    name,
                    x,
                    [row.surprisal for row in chosen],
                    [row.surprisal_interval[0] for row in chosen],
                    [row.surprisal_interval[1] for row in chosen],
                )
            )
            shuffled = [row.shuffled_surprisal for row in chosen]
            series.append(Series(f"{name}, shuffled", x, shuffled, dash="dash"))
        for name in dict.fromkeys(row.probe for row in others if row.layer is not None):
            found = [row for row in others if (row.probe, row.offset) == (name, offset)]
            if found:
                x = [row.layer or 0 for row in found]
                series.append(Series(name, x, [row.surprisal for row in found], dash="dot"))
        panels.append(Panel(f"N = {offset}", "layer of the state", "surprisal (nats)", series))
    return StudyFigure(
        "surprisal",
        "Mean of -log p of the token that the prompt says, p of the model in the text; lower is "
        "better.",
        _in_rows(panels),
    )


def _chosen(rows: Sequence[PromptRow], name: str, offset: int, mode: str) -> list[PromptRow]:
    """Rows of one line, by layer."""
    found = [row for row in rows if (row.prompt, row.offset, row.mode) == (name, offset, mode)]
    return sorted(found, key=lambda row: row.layer)


def _lines_of_probes(others: Sequence[RivalRow], offset: int, rivals: Rivals) -> list[Series]:
    """Dotted lines of the probes that read layers."""
    lines = []
    for name in dict.fromkeys(row.probe for row in others if row.layer is not None):
        found = [row for row in others if (row.probe, row.offset) == (name, offset)]
        found.sort(key=lambda row: row.layer or 0)
        if found:
            label = "[h; next token's embedding]" if name == rivals.next_token else name
            x = [row.layer or 0 for row in found]
            lines.append(Series(label, x, [row.precision for row in found], dash="dot"))
    return lines


def _bigram(others: Sequence[RivalRow], rivals: Rivals, offset: int) -> float | None:
    """Precision@1 of the bigram at an offset."""
    for row in others:
        if (row.probe, row.offset) == (rivals.bigram, offset):
            return row.precision
    return None


def _in_rows(panels: Sequence[Panel]) -> list[list[Panel]]:
    """Panels, two in a row."""
    return [list(panels[start : start + 2]) for start in range(0, len(panels), 2)]


def describe_offsets(
    rows: Sequence[PromptRow], others: Sequence[RivalRow], rivals: Rivals
) -> list[str]:
    """A sentence for each offset and prompt: the layer of the largest gain over shuffled states."""
    sentences = []
    for offset in sorted({row.offset for row in rows}):
        for name in shown_prompts(rows):
            for mode in ("forced", "free"):
                chosen = [row for row in _chosen(rows, name, offset, mode) if row.gain is not None]
                if chosen:
                    sentences.append(_sentence(chosen, mode))
    return sentences


def _sentence(chosen: Sequence[PromptRow], mode: str) -> str:
    """The sentence of one prompt at one offset."""
    best = max(chosen, key=lambda row: row.gain or 0.0)
    how = "" if mode == "forced" else ", going on with its own tokens"
    text = (
        f"N = {best.offset}, {best.prompt!r}{how}: the largest gain is at layer {best.layer}, "
        f"precision@1 {best.precision:.3f}{_span(best.precision_interval)} against "
        f"{best.shuffled:.3f} with shuffled states (n = {best.n}; gain {best.gain:+.3f}"
        f"{_span(best.gain_interval)}{_clear(best.gain_interval)})"
    )
    if best.lead is not None:
        named = [("[h; e(x)]", best.next_token), ("bigram", best.bigram)]
        values = ", ".join(f"{name} {value:.3f}" for name, value in named if value is not None)
        text += (
            f"; {values}: {best.lead:+.3f}{_span(best.lead_interval)} to the better one"
            f"{_clear(best.lead_interval)}"
        )
    return text + "."


def _span(interval: Interval) -> str:
    low, high = interval
    return "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"


def _clear(interval: Interval) -> str:
    """Words for an interval that holds 0."""
    low, high = interval
    if low is None or high is None:
        return ", no interval"
    return ", no clear difference" if low <= 0 <= high else ""
