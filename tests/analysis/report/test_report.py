"""Claims about reports and pictures: one file, no network, nothing injected, equal bytes."""

import re
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from plotly.offline import get_plotlyjs

from residua.analysis.evaluation.kl_examples import KlExample, KlExamples
from residua.analysis.evaluation.lens_heatmap import Heatmap, heatmaps
from residua.analysis.evaluation.metrics import EvaluationRow
from residua.analysis.evaluation.probe_evaluation import evaluate
from residua.analysis.evaluation.result import Evaluation
from residua.analysis.report import interactive_figures as interactive
from residua.analysis.report import static_figures as plots
from residua.analysis.report.html_page import GLOSSARY
from residua.analysis.report.html_report import BUCKET_COLUMNS, COLUMNS, write_pngs, write_report
from residua.analysis.report.probe_style import SCALE, letter_color, log_floor
from residua.analysis.report.tables import headlines
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.base.readout import Readout
from residua.probes.baselines.ngrams import Unigram
from residua.probes.ridge.ridge_probe import RidgeProbe
from residua.probes.saved.library import load_probe_for
from residua.probes.saved.save import save_probe

from ...support.synthetic import make_cache, random_head

EVIL = "</script><script>alert(1)"
ODD = (EVIL, "<img src=x onerror=alert(1)>", "$x_1$", "日本", "\\n", "&amp;", "%{x}", "�")


@pytest.fixture(scope="module")
def tiny_cache(tmp_path_factory) -> ActivationCache:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 20, 60).tolist()
    states = [rng.normal(0, 1, (sum(lengths), 8)) for _ in range(3)]
    return make_cache(tmp_path_factory.mktemp("caches"), states, lengths, random_head(8, 31))


@pytest.fixture(scope="module")
def evaluation(tiny_cache) -> Evaluation:
    return evaluate(tiny_cache, split="train")


def odd_heatmap() -> Heatmap:
    """Two layers by eight tokens whose texts do what they can to break the page."""
    shape = (2, len(ODD))
    return Heatmap(
        probe=EVIL,
        offset=0,
        split="test",
        sequence=3,
        start=0,
        layers=(0, 5),
        tokens=ODD,
        targets=ODD,
        top=tuple(
            tuple(tuple(np.roll(ODD, n)[:5].tolist()) for n in range(len(ODD))) for _ in "ab"
        ),
        probability=np.full((*shape, 5), 0.2, np.float32),
        entropy=np.ones(shape),
        kl=np.ones(shape),
    )


def page_without_plotly(path: Path) -> str:
    page = path.read_text(encoding="utf-8")
    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


def test_report_is_one_file_that_fetches_nothing(tmp_path, tiny_cache, evaluation):
    path = write_report(evaluation, tmp_path / "new" / "report.html", command="residua evaluate x")
    assert list(path.parent.iterdir()) == [path]
    page = page_without_plotly(path)
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", page)
    assert not re.search(r"@import|url\(|<link|<iframe|<base", page)
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")


def test_texts_and_names_cannot_inject(tmp_path, evaluation):
    rows = [*evaluation.rows, replace(evaluation.rows[-1], probe=EVIL)]
    names = {"model_name": EVIL, "data_name": EVIL, "split": EVIL}
    evil = replace(evaluation, rows=rows, probes=(*evaluation.probes, EVIL), **names)
    tokens = ((EVIL, 0.5), (ODD[1], 0.1))
    example = KlExample(0, 1, 2.0, EVIL, ODD[1], tokens, tokens)
    examples = [KlExamples(EVIL, 1, 0, 9, (example,), (example,))]
    shown = {"heatmaps": [odd_heatmap()], "examples": examples}
    clean = write_report(evaluation, tmp_path / "a.html", **shown)
    path = write_report(evil, tmp_path / "b.html", **shown, title=EVIL, command=EVIL)
    page = page_without_plotly(path)
    assert page.count("<script") == page_without_plotly(clean).count("<script")
    assert "alert(1)" in page
    assert not re.search(r"<script[^>]*>alert|<img", page)
    assert escape(EVIL) in page


def test_equal_numbers_give_equal_bytes(tmp_path, evaluation):
    maps = evaluation.heatmaps()
    one, other = (write_report(evaluation, tmp_path / n, heatmaps=maps) for n in ("1", "2"))
    assert one.read_bytes() == other.read_bytes()
    first, second = (write_pngs(tmp_path / n, evaluation, maps) for n in ("p", "q"))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_the_report_holds_every_number_and_word(tmp_path, tiny_cache, evaluation):
    page = page_without_plotly(write_report(evaluation, tmp_path / "report.html"))
    whole, buckets = re.findall(r"class='numbers'>.*?<tbody>(.*?)</tbody>", page, re.S)
    tables = (
        (whole, evaluation.rows, COLUMNS),
        (buckets, evaluation.buckets, BUCKET_COLUMNS),
    )
    for body, rows, columns in tables:
        assert body.count("<tr>") == len(rows)
        assert body.count("<td") == len(rows) * len(columns)
        assert f"{rows[0].kl_reverse:.3f}" in body
    assert f"<td data-v='{evaluation.buckets[0].share}'>" in buckets
    assert evaluation.cache_id[:12] in page
    for word in GLOSSARY:
        assert escape(word) in page
    for text in headlines(evaluation):
        assert escape(text) in page


def test_headlines_say_what_the_rows_say(evaluation):
    first, second, *_ = headlines(evaluation)
    row = next(r for r in evaluation.select("logit", 0) if r.layer == 1)
    assert first.startswith(f"At layer 1 the logit lens is {row.kl:.2f} [")
    best = max(row.precision_at_1 for row in evaluation.select("logit", 1))
    assert f"is {best:.3f} [" in second
    assert f"{evaluation.select('bigram', 1)[0].precision_at_1:.3f}" in second


def test_pngs_are_written_for_every_measure_and_heatmap(tmp_path, evaluation):
    paths = write_pngs(tmp_path, evaluation, [*evaluation.heatmaps(), odd_heatmap()])
    names = [path.name for path in paths]
    assert names[:4] == ["kl.png", *(f"precision_at_{k}.png" for k in (1, 5, 10))]
    assert names[4:6] == ["confidence.png", "heatmap_logit_N0.png"]
    assert len(names) == 7
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_pictures_leave_matplotlib_as_it_was(evaluation):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.curves(evaluation, "kl")
    assert dict(matplotlib.rcParams) == before
    from matplotlib import _pylab_helpers

    assert not _pylab_helpers.Gcf.get_all_fig_managers()


def test_every_axis_is_named_and_every_panel_has_n(evaluation):
    figure = plots.curves(evaluation, "precision_at_1")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == len(evaluation.offsets)
    for axes in shown:
        assert axes.get_xlabel() == "layer"
        assert "share" in axes.get_ylabel()
        assert "n = " in axes.get_title()


def test_kl_is_logarithmic_only_where_it_spans_more(evaluation):
    row = evaluation.rows[-1]
    wide = [replace(row, kl=value) for value in (0.01, 5.0)]
    narrow = [replace(row, kl=value) for value in (0.5, 5.0)]
    assert log_floor(wide) == pytest.approx(0.007)
    assert log_floor(narrow) == 0.0


def test_the_model_itself_does_not_stretch_the_axis_of_kl(evaluation):
    row = evaluation.rows[-1]
    assert log_floor([replace(row, kl=0.0), replace(row, kl=3.0)]) == 0.0
    assert log_floor([]) == 0.0
    rows = [replace(row, kl=value) for value in (0.0, 1e-6, 0.1, 9.0, None, float("inf"))]
    assert log_floor(rows) == pytest.approx(0.07)


@pytest.mark.parametrize("value", [*np.linspace(0, 1, 41), float("nan")])
def test_letters_in_cells_are_readable(value):
    def luminance(rgb):
        parts = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(parts @ [0.2126, 0.7152, 0.0722])

    colors = LinearSegmentedColormap.from_list("probability", list(SCALE), N=4096)
    cell = luminance(np.array(colors(0.0 if np.isnan(value) else value)[:3]))
    letters = luminance(np.array(to_rgb(letter_color(value))))
    high, low = max(cell, letters), min(cell, letters)
    assert (high + 0.05) / (low + 0.05) >= 4.5


def test_hover_tells_value_interval_and_n(evaluation):
    figure = interactive.panel_figure(evaluation, "kl", 1)
    row: EvaluationRow = evaluation.select("logit", 1)[2]
    texts = [str(text) for trace in figure.data for text in trace.hovertext or ()]  # pyright: ignore
    told = next(t for t in texts if "layer 2" in t and "N = 1" in t)
    assert f"{row.kl:.4g} nats" in told
    assert f"{row.kl_low:.4g} to {row.kl_high:.4g}" in told
    assert f"n = {row.n:,}" in told


def test_one_part_of_each_section_is_shown_at_first(tmp_path, evaluation):
    here = evaluation.heatmaps()
    later = [replace(heatmap, sequence=7, start=5) for heatmap in here]
    path = write_report(evaluation, tmp_path / "r.html", heatmaps=[*here, *later])
    page = page_without_plotly(path)
    sections = re.findall(r"<section><h2>(.*?)</h2>(.*?)</section>", page, re.S)
    parts = {
        title: re.findall(r"data-part='(\d+)'( hidden)?>", content) for title, content in sections
    }
    chosen = [("0", ""), ("1", " hidden"), ("2", " hidden")]
    assert parts["Precision@k by layer"] == chosen
    assert parts["KL to the model by layer"] == chosen[:1]
    assert parts["What each layer says, token by token"] == chosen[:2]
    # A control for each part, and a panel for each offset and measure.
    contents = dict(sections)
    assert re.findall(r"<button value='(\d)' aria", contents["Precision@k by layer"]) == [*"012"]
    for offset in evaluation.offsets:
        assert f'id="precision_at_5-{offset}"' in contents["Precision@k by layer"]


def test_passages_are_of_other_sequences_the_most_telling_first(tiny_cache):
    ridges = [RidgeProbe(alpha=alpha, folds=1).fit(tiny_cache, keep=False) for alpha in (1.0, 9.0)]
    named: dict[str, Readout] = {"weak": ridges[0], "strong": ridges[1]}
    found = heatmaps(tiny_cache, named, split="train", width=6, passages=3)
    assert [heatmap.probe for heatmap in found] == ["logit", "weak", "strong"] * 3
    passages = [(heatmap.sequence, heatmap.start) for heatmap in found]
    assert passages[::3] == passages[1::3] == passages[2::3]
    assert len({sequence for sequence, _ in passages}) == 3
    one = heatmaps(tiny_cache, ridges, split="train", width=6)
    assert [(heatmap.probe, heatmap.sequence) for heatmap in one] == [
        (probe, passages[0][0]) for probe in ("logit", "ridge", "ridge")
    ]


def test_the_legend_names_every_probe_once(tmp_path, evaluation):
    page = page_without_plotly(write_report(evaluation, tmp_path / "r.html"))
    legend = re.search(r"<ul class='legend'>.*?</ul>", page, re.S)
    assert legend is not None
    named = re.findall(r"<button value='(.*?)'", legend[0])
    assert named == list(evaluation.probes)
    traces = interactive.panel_figure(evaluation, "kl", 1).to_plotly_json()["data"]
    groups = {trace["legendgroup"] for trace in traces}
    assert groups <= set(named)


def test_an_evaluation_without_a_cache_is_still_a_report(tmp_path, evaluation):
    alone = replace(evaluation, cache=None)
    page = page_without_plotly(write_report(alone, tmp_path / "report.html"))
    assert "token by token" not in page
    assert "All numbers" in page


def test_probes_of_one_kind_are_told_apart(tiny_cache, tmp_path):
    ridges = [RidgeProbe(alpha=alpha, folds=1).fit(tiny_cache, keep=False) for alpha in (1.0, 1e5)]
    saved = [
        load_probe_for(tiny_cache, save_probe(r, tmp_path / f"{n}")) for n, r in enumerate(ridges)
    ]
    unigrams = [Unigram(0).fit(tiny_cache) for _ in range(2)]
    found = evaluate(tiny_cache, [*ridges, *saved, *unigrams], split="all", offsets=0)
    for name, told in {
        "ridge": "alpha=1.0",
        "ridge 2": "alpha=100000.0",
        "ridge 4": str(tmp_path / "1"),
    }.items():
        note = next(note for note in found.notes if note.startswith(f"{name} is "))
        assert told in note
        assert tiny_cache.id[:12] in note
    figure = interactive.panel_figure(found, "kl", 0)
    lines = [trace for trace in figure.data if trace.fill is None]  # pyright: ignore
    looks = [(t.line.color, t.line.dash, t.marker.symbol) for t in lines]  # pyright: ignore
    assert len(set(looks)) == len(lines) == 7
    drawn = plots.curves(found, "kl").axes[0].get_lines()
    styles = [(line.get_color(), str(line._dash_pattern), line.get_marker()) for line in drawn]  # pyright: ignore
    assert len(set(styles)) == len(drawn) == 7
