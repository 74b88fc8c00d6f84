"""Interactive heatmaps show each cell's tokens and measures, and mark agreement; one page each."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residua
from residua.analysis.display.lens_map_cells import DIFFERENCE_SCALE, cell_colors
from residua.analysis.display.lens_maps import MEASURES, LensMaps
from residua.analysis.report.probe_style import SCALE, letter_color
from residua.cache.errors import UsageError
from residua.cache.store.activation_cache import ActivationCache


@pytest.fixture(scope="module")
def maps(tiny_cache: ActivationCache) -> LensMaps:
    ridge = residua.RidgeProbe([0, 1], layers=[1, 2]).fit(tiny_cache, keep=False)
    lens = residua.TunedLens(layers=[1, 2], steps=4, batch=128, lr=0.1).fit(tiny_cache)
    lenses = {"ridge": ridge, "a <b> & c": lens}
    return residua.read_lens_maps(lenses, residua.CachePassage(tiny_cache, sequence=0, width=6))


def outlined_cells(figure: Any, number: int) -> set[tuple[int, int]]:
    """(row, column) of the boxes that lines with gaps draw in one map of a figure."""
    cells = set()
    for trace in figure.data:
        if (
            trace.type == "scatter"
            and trace.mode == "lines"
            and trace.yaxis == ("y2" if number else "y")
        ):
            corners = np.array([trace.x, trace.y], dtype=float)
            boxes = corners.reshape(2, -1, 6)[:, :, :4].mean(-1)  # the middles of four corners
            cells |= {(round(y), round(x)) for x, y in boxes.T}
    return cells


def test_a_cell_says_its_tokens_and_all_measures(maps: LensMaps) -> None:
    figure: Any = maps.plot("plotly")
    for number, entry in enumerate(maps):
        cells = next(trace for trace in figure.data if trace.yaxis == ("y2" if number else "y"))
        np.testing.assert_allclose(np.array(cells.z, float), entry.values["probability"])
        text = cells.hovertext[1][2]
        assert text.startswith(f"<b>layer {entry.layers[1]}, after ")
        for top, share in zip(entry.top[1][2], entry.top_probability[1, 2], strict=True):
            shown = top.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            assert f" {shown}  {share:.3f}" in text
        for measure in ("entropy", "kl"):
            assert f" {entry.values[measure][1, 2]:.3f} nats" in text
        assert f"rank of the model's token {entry.values['rank'][1, 2]:,.0f}" in text
        verb = "agrees" if entry.agrees[1, 2] else "does not agree"
        assert f"<br>{verb} with the last layer" in text
        np.testing.assert_allclose(entry.top_probability[..., 0], entry.values["probability"])
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert "a &lt;b&gt; &amp; c at N = 0" in titles[1]


def test_agreement_with_the_last_layer_is_outlined(maps: LensMaps) -> None:
    figure: Any = maps.plot("plotly")
    for number, entry in enumerate(maps):
        agreeing = {(int(row), int(column)) for row, column in np.argwhere(entry.agrees)}
        assert outlined_cells(figure, number) == agreeing


def test_a_difference_outlines_where_the_lenses_disagree(maps: LensMaps) -> None:
    a, b = (LensMaps((entry,), "kl", None, maps.passage) for entry in maps)
    difference = a - b
    figure: Any = difference.plot("plotly")
    (entry,) = difference
    disagreeing = {(int(row), int(column)) for row, column in np.argwhere(~entry.agrees)}
    assert outlined_cells(figure, 0) == disagreeing
    cells = figure.data[0]
    assert cells.zmin == -cells.zmax
    text = cells.hovertext[0][0]
    first, second = (side[0].top[0][0][0] for side in (a, b))
    assert f"ridge lens: {first}  " in text
    assert f"a &lt;b&gt; &amp; c: {second}  " in text
    assert f"difference of KL to the model {entry.values['kl'][0, 0]:+.3f} nats" in text


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_has_its_colours(maps: LensMaps, measure: str) -> None:
    figure: Any = maps.with_measure(measure).plot("plotly")
    values = maps[0].values[measure]
    shown = np.array(figure.data[0].z, float)
    np.testing.assert_allclose(10**shown if measure == "rank" else shown, values)
    assert figure.data[0].zmin <= shown.min()
    assert figure.data[0].zmax >= shown.max() - 1e-9


def test_maps_do_not_overlap(maps: LensMaps) -> None:
    layout: Any = maps.plot("plotly").layout
    assert layout.yaxis.domain[0] > layout.yaxis2.domain[1]  # the first map is on top
    assert layout.yaxis2.domain[0] > 0
    assert (layout.xaxis4.overlaying, layout.xaxis4.side) == ("x3", "top")
    assert list(layout.xaxis2.tickvals) == list(range(6))


def test_undefined_cells_are_white_with_black_letters() -> None:
    values = np.array([[np.nan, 2.0], [0.5, 4.0]])
    for measure in MEASURES:
        for is_difference in (False, True):
            colors = cell_colors(values, measure, is_difference)
            assert colors.letters_on(float("nan")) == "#000000"
            assert np.isnan(colors.share(float("nan")))
            assert 0 <= colors.share(0.5) <= colors.share(4.0) <= 1
    assert cell_colors(np.full((1, 1), np.nan), "kl", True).high == 1.0


@pytest.mark.parametrize("scale", [SCALE, DIFFERENCE_SCALE])
def test_letters_can_be_read_on_every_colour(scale: Any) -> None:
    """Contrast of 4.5 (WCAG 2.2), computed here by hand at every hundredth of the scale."""
    at = [stop for stop, _ in scale]
    rgb = np.array([[int(name[i : i + 2], 16) for i in (1, 3, 5)] for _, name in scale]) / 255
    for share in np.linspace(0, 1, 101):
        color = np.array([np.interp(share, at, rgb[:, part]) for part in range(3)])
        linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
        luminance = linear @ [0.2126, 0.7152, 0.0722]
        letters = 0.0 if letter_color(float(share), scale) == "#000000" else 1.0
        low, high = sorted((luminance, letters))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_a_page_holds_all_maps_without_a_network(maps: LensMaps, tmp_path: Path) -> None:
    path = maps.to_html(tmp_path / "a" / "maps.html")
    page = path.read_text()
    assert page.count("class='panel'") == len(maps)
    assert "a &lt;b&gt; &amp; c at N = 0 (next token); sequence 0, token 0" in page
    assert "<b> & c" not in page
    assert "default-src 'none'" in page
    assert "<script src" not in page
    assert maps.to_html(tmp_path / "b.html", title="My <title>").read_text().count("My &lt;") == 2


def test_dictionaries_are_json(maps: LensMaps) -> None:
    (value, _) = json.loads(json.dumps(maps.to_dicts(), allow_nan=False))
    assert value["tokens"] == list(maps[0].tokens)
    assert np.array(value["kl"]).tolist() == maps[0].values["kl"].tolist()
    assert np.array(value["top_probability"]).shape == (2, 6, 5)


def test_an_unknown_backend_is_named(maps: LensMaps) -> None:
    with pytest.raises(UsageError, match='backend must be "matplotlib" or "plotly"'):
        maps.plot("bokeh")  # pyright: ignore[reportCallIssue, reportArgumentType]
