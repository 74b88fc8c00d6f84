"""Frames, plots, pictures and HTML of evaluations, caches, heads and probes."""

import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import pytest

import residua
from residua.analysis.display.evaluation_plots import TITLES, future_lens_figure
from residua.analysis.evaluation.metrics import EvaluationRow
from residua.analysis.evaluation.result import Evaluation
from residua.cache.errors import MissingLibraryError, NotFoundError, UsageError
from residua.cache.store.activation_cache import ActivationCache

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def ridge(tiny_cache: ActivationCache) -> residua.RidgeProbe:
    return residua.RidgeProbe([0, 1, 2]).fit(tiny_cache, keep=False)


@pytest.fixture(scope="module")
def evaluation(tiny_cache: ActivationCache, ridge: residua.RidgeProbe) -> Evaluation:
    return residua.evaluate(tiny_cache, {"<b>wide</b>": ridge}, max_positions=512)


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def test_a_frame_has_the_rows_with_undefined_measures_as_nan(evaluation: Evaluation) -> None:
    first = replace(evaluation.rows[0], kl=None, nll=math.inf)
    frame: Any = replace(evaluation, rows=[first, *evaluation.rows[1:]]).to_dataframe()
    assert list(frame.columns) == [field.name for field in fields(EvaluationRow)]
    assert len(frame) == len(evaluation.rows)
    assert math.isnan(frame["kl"][0])
    assert frame["nll"][0] == math.inf
    assert frame["kl"][1:].tolist() == [row.kl for row in evaluation.rows[1:]]
    bigram = frame[frame["probe"] == "bigram"]
    assert bigram["layer"].isna().all()
    assert len(bigram)
    assert {type(name) for name in frame["probe"]} == {str}
    assert frame["kl"].dtype == "float64"
    means = frame.groupby("probe")["kl"].mean()
    assert set(means.index) == set(evaluation.probes)
    buckets: Any = evaluation.to_dataframe(buckets=True)
    assert len(buckets) == len(evaluation.buckets)
    assert isinstance(buckets, pd.DataFrame)
    assert "bucket" in buckets.columns or "confidence_from" in buckets.columns


def test_without_pandas_a_message_says_what_to_install(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    message = r"a data frame needs pandas, .* pip install 'residua\[report\]'"
    with pytest.raises(MissingLibraryError, match=message):
        evaluation.to_dataframe()


def lines_of(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


def test_a_plot_has_a_line_per_probe_by_layer_and_by_offset(evaluation: Evaluation) -> None:
    by_layer: Any = evaluation.plot("kl", offset=1)
    lines = lines_of(by_layer)
    assert set(lines) == {"bigram", "logit lens", "<b>wide</b>"}
    rows = evaluation.select("<b>wide</b>", 1)
    assert list(lines["<b>wide</b>"].get_xdata()) == [row.layer for row in rows]
    assert list(lines["<b>wide</b>"].get_ydata()) == [row.kl for row in rows]

    by_offset: Any = evaluation.plot("precision@1", x="offset", layer=2)
    lines = lines_of(by_offset)
    expected = [
        row.precision_at_1
        for row in evaluation.rows
        if row.probe == "<b>wide</b>" and row.layer == 2
    ]
    assert list(lines["<b>wide</b>"].get_xdata()) == [0, 1, 2]
    assert list(lines["<b>wide</b>"].get_ydata()) == expected
    assert list(lines["bigram"].get_xdata()) == [1, 2]


def test_several_offsets_and_chosen_probes(evaluation: Evaluation) -> None:
    import matplotlib.pyplot as plt

    _, axes = plt.subplots()
    given = evaluation.plot("nll", offset=[0, 2], probes="<b>wide</b>", ax=axes)
    assert given is axes
    assert set(lines_of(axes)) == {"<b>wide</b>, N = 0", "<b>wide</b>, N = 2"}


@pytest.mark.parametrize("measure", list(TITLES))
def test_every_measure_can_be_drawn(evaluation: Evaluation, measure: str) -> None:
    axes: Any = evaluation.plot(measure, probes=["logit", "<b>wide</b>"])
    assert axes.get_ylabel() == TITLES[measure]
    axes.figure.canvas.draw()


def test_plotly_draws_the_same(evaluation: Evaluation) -> None:
    figure: Any = evaluation.plot("kl", offset=0, backend="plotly")
    rows = evaluation.select("<b>wide</b>", 0)
    (trace,) = [trace for trace in figure.data if "wide" in trace.name]
    assert trace.name == "&lt;b&gt;wide&lt;/b&gt;"
    assert list(trace.x) == [row.layer for row in rows]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"measure": "loss"}, UsageError, "there is no measure 'loss'; choose one of kl"),
        ({"x": "N"}, UsageError, 'x must be "layer" or "offset"'),
        ({"backend": "bokeh"}, UsageError, "backend must be"),
        ({"offset": 7}, NotFoundError, "offset 7 was not measured; the evaluation has 0-2"),
        ({"x": "offset", "layer": 99}, NotFoundError, "layer 99 was not measured"),
        ({"layer": 1}, UsageError, "leave it out, or x='offset'"),
        ({"x": "offset", "offset": 1}, UsageError, "leave it out, or x='layer'"),
        ({"probes": ["x"]}, NotFoundError, "there is no probe 'x' in the evaluation; it has"),
        ({"offset": 0, "probes": "bigram"}, NotFoundError, "no probe of bigram has a row"),
        ({"backend": "plotly", "ax": object()}, UsageError, "ax is an axes of matplotlib"),
    ],
)
def test_what_cannot_be_drawn_is_named(
    evaluation: Evaluation, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluation.plot(**options)


def test_the_future_lens_figure_has_both_panels(
    evaluation: Evaluation, tiny_cache: ActivationCache, ridge: residua.RidgeProbe
) -> None:
    figure = future_lens_figure(evaluation, layer=1, offset=2)
    left, right = figure.axes
    assert (left.get_xlabel(), right.get_xlabel()) == ("N (tokens further ahead)", "layer")
    assert left.get_title().endswith("layer 1")
    assert right.get_title().endswith("N = 2")
    one = residua.evaluate(tiny_cache, ridge, offsets=0, max_positions=256)
    with pytest.raises(UsageError, match="has the offset 0 alone"):
        future_lens_figure(one)


def test_pictures_are_written(evaluation: Evaluation, tmp_path: Path) -> None:
    paths = evaluation.to_png(tmp_path / "pictures")
    names = {path.name for path in paths}
    assert {"kl.png", "precision_at_1.png", "future_lens.png"} <= names
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)


def test_short_reprs(
    evaluation: Evaluation, tiny_cache: ActivationCache, ridge: residua.RidgeProbe
) -> None:
    assert repr(evaluation).startswith("<Evaluation of bigram, logit, <b>wide</b> on cache ")
    assert len(repr(evaluation)) < 250
    assert repr(tiny_cache.head) == "<Head layernorm: 32 -> 300 logits>"
    assert repr(residua.LogitLens([1], [0])) == "LogitLens(layers=(1,), offsets=(0,))"
    assert repr(ridge) == "RidgeProbe(offsets=[0, 1, 2])"


def test_html_of_everything_is_escaped_and_short(
    evaluation: Evaluation, tiny_cache: ActivationCache, ridge: residua.RidgeProbe
) -> None:
    html = evaluation._repr_html_()
    assert "&lt;b&gt;wide&lt;/b&gt;" in html
    assert "<b>wide" not in html
    assert html.count("<table") == 4  # facts and three offsets
    cache_html = tiny_cache._repr_html_()
    assert tiny_cache.id[:12] in cache_html
    assert f"{tiny_cache.positions:,} in" in cache_html
    assert "layernorm" in tiny_cache.head._repr_html_()
    fitted = ridge._repr_html_()
    assert "RidgeProbe(offsets=[0, 1, 2])" in fitted
    assert f"train split of cache {tiny_cache.id[:12]}" in fitted
    assert "<th style='padding:0.1em 0.7em'>layer</th>" in fitted
    assert ridge._repr_mimebundle_()["text/html"] == fitted
    for probe in (residua.RidgeProbe([1]), residua.TunedLens(), residua.LogitLens([1], [0])):
        assert repr(probe) in probe._repr_html_()  # not fitted: parameters alone


def test_a_cache_with_a_hostile_name_is_escaped(
    tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = replace(tiny_cache.manifest, data_name="<script>alert(1)</script>")
    cache = residua.open(tiny_cache.path)
    cache.manifest = manifest
    assert "<script>" not in cache._repr_html_()
