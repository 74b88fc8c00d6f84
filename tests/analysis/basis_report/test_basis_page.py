"""Claims about the page on causal bases: one file, every number, nothing injected or empty."""

import json
import math
import re
from dataclasses import replace
from html import escape, unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from residua.analysis.basis.direction_passages import Passage
from residua.analysis.basis.direction_readings import DirectionReading, LayerReading
from residua.analysis.basis.layer_persistence import DirectionMatch
from residua.analysis.basis.token_changes import TokenChange
from residua.analysis.basis_report import interactive_spectra, static_spectra
from residua.analysis.basis_report.basis_page import write_basis_png, write_basis_report
from residua.analysis.basis_report.basis_texts import BASIS_GLOSSARY, MODEL_GLOSSARY
from residua.analysis.basis_report.span_curves import format_number, span_curves
from residua.cache.errors import UsageError
from residua.cache.store.activation_cache import ActivationCache

from ...support.synthetic import make_cache, random_head

K = 5
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
RNG = np.random.default_rng(0)


def random_span(ks: tuple[int, ...] = (1, 2, 4, K)) -> dict[int, dict[str, float]]:
    """Estimates of which no two are alike."""
    spans = {}
    for k in ks:
        low, kl, high = np.sort(RNG.uniform(0, k, 3)).tolist()
        spans[k] = {"kl": kl, "low": low, "high": high}
    return spans


def random_row(layer: int) -> dict[str, Any]:
    return {
        "layer": layer,
        "k": K,
        "method": "joint",
        "metric": "covariance",
        "n": 1000 + layer,
        "n_test": 2000 + layer,
        "energies": RNG.uniform(0, 1, K).tolist(),
        "influences": RNG.uniform(0, 1, K).tolist(),
        "span": random_span(),
        "pca": random_span(),
        "random": random_span(),
        "evaluations": 3000 + layer,
        "cpu_seconds": float(RNG.uniform(1, 9)),
    }


def random_influence() -> dict[str, Any]:
    return {
        "n": 7123,
        "lens_influences": RNG.uniform(0, 1, K).tolist(),
        "model_influences": RNG.uniform(0, 1, K).tolist(),
        "lens_span": random_span(),
        "model_span": random_span(),
        "control_spans": {"pca": random_span(), "random": random_span()},
        "spearman": {"value": 0.8125, "low": 0.5125, "high": 0.9125},
        "alignment": {"mean": 0.6125, "low": 0.5625, "high": 0.6625, "n": 256},
        "span_alignment": {"mean": 0.7125, "low": 0.6875, "high": 0.7375, "n": 255},
    }


def reading_of(layer: int, previous: int | None, text: str = "cat") -> LayerReading:
    directions = tuple(
        DirectionReading(
            direction=number,
            energy=0.1,
            influence=0.1,
            deviation=1.0,
            promoted=(TokenChange(3, f"␣{text}", 1.234 + number),),
            suppressed=(TokenChange(4, f"{text}s", -2.345 - number),),
            highest=(Passage(77, 1, f"the {text} ", f"␣{text}", f" ran {number}", 3.21),),
            lowest=(Passage(78, 2, "on ", "␣mat", f" by {text}", -2.13),),
            match=None if previous is None else DirectionMatch(previous, number, -0.87, 0.65),
        )
        for number in range(K)
    )
    overlaps = {"overlap": 0.45, "chance_overlap": 0.15} if previous is not None else {}
    return LayerReading(
        layer=layer,
        k=K,
        split="test",
        n=4321,
        n_token_rows=256,
        directions=directions,
        previous_layer=previous,
        overlap=overlaps.get("overlap"),
        chance_overlap=overlaps.get("chance_overlap"),
    )


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [random_row(2), random_row(1)]


@pytest.fixture(scope="module")
def readings() -> dict[int, LayerReading]:
    return {1: reading_of(1, None), 2: reading_of(2, 1)}


@pytest.fixture(scope="module")
def influences() -> dict[int, dict[str, Any]]:
    return {1: random_influence(), 2: random_influence()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> ActivationCache:
    states = [RNG.normal(0, 1, (40, 8)) for _ in range(3)]
    return make_cache(tmp_path_factory.mktemp("caches"), states, [20, 20], random_head(8, 31))


def page_without_plotly(path: Path) -> str:
    page = path.read_text(encoding="utf-8")
    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


def visible_text(html: str) -> str:
    """Text of a page without scripts, style and tags."""
    html = re.sub(r"<(script|style)\b.*?</\1>", " ", html, flags=re.S)
    return unescape(re.sub(r"<[^>]*>", " ", html))


def numbers_of(value: Any) -> list[float]:
    """All numbers inside lists and mappings."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers_of(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers_of(item)]
    return [] if value is None or isinstance(value, str) else [value]


def test_the_page_holds_every_number_of_rows_and_influences(tmp_path, rows, readings, influences):
    path = write_basis_report(
        tmp_path / "page.html", rows=rows, readings=readings, model_influence=influences
    )
    page = page_without_plotly(path)
    text = visible_text(page)
    for number in [*numbers_of(rows), *numbers_of(influences)]:
        shown = f"{number:,}" if isinstance(number, int) else format_number(number)
        assert shown in text, number
    # Measures stand with all digits in the attributes that tables are sorted by.
    for row in rows:
        for span in (row["span"], row["pca"], row["random"]):
            assert all(f"data-v='{estimate['kl']!r}'" in page for estimate in span.values())
        for energy in row["energies"]:
            assert f"title='{energy!r}'" in page
    for word in BASIS_GLOSSARY | MODEL_GLOSSARY:
        assert escape(word) in page


def test_layers_stand_in_order_and_are_linked(tmp_path, rows, readings):
    page = page_without_plotly(
        write_basis_report(tmp_path / "a.html", rows=rows, readings=readings)
    )
    assert re.findall(r"<h2 id='layer-(\d)'>", page) == ["1", "2"]
    contents = page[page.index("class='contents'") :]
    assert re.findall(r"href='#layer-(\d)'>layer", contents) == ["1", "2"]
    assert "n = 2,001 held-out positions" in page
    assert "n = 4,321 random positions of the test split" in page


def test_directions_show_tokens_passages_and_matches(tmp_path, rows, readings):
    page = page_without_plotly(
        write_basis_report(tmp_path / "a.html", rows=rows, readings=readings)
    )
    for number in range(K):
        assert f"+{1.234 + number:.2f}" in page
        assert f"-{2.345 + number:.2f}" in page
        assert f"the cat <mark>␣cat</mark> ran {number}" in page
    assert "+3.2 sd" in page
    assert "-2.1 sd" in page
    # Only the second layer has a previous one.
    assert page.count("best match in layer 1</th>") == 1
    assert page.count("r = -0.87") == K
    assert "overlap with those of layer 1 by 0.45 (random directions: 0.15)" in page


def test_the_page_is_one_file_that_fetches_nothing(tmp_path, rows, readings, influences, cache):
    path = write_basis_report(
        tmp_path / "new" / "page.html",
        rows=rows,
        readings=readings,
        model_influence=influences,
        cache=cache,
        facts={"lens": "tuned lens"},
        command="residua fit basis x",
    )
    assert list(path.parent.iterdir()) == [path]
    page = page_without_plotly(path)
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", page)
    assert not re.search(r"@import|url\(|<link|<iframe|<base", page)
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")
    assert cache.id[:12] in page
    assert "residua fit basis x" in page
    assert "tuned lens" in page


def test_texts_and_names_cannot_inject(tmp_path, rows, influences):
    clean = write_basis_report(
        tmp_path / "a.html",
        rows=rows,
        readings={1: reading_of(1, None)},
        model_influence=influences,
    )
    evil_influences = {
        layer: influence | {"control_spans": {EVIL: random_span(), "pca": random_span()}}
        for layer, influence in influences.items()
    }
    path = write_basis_report(
        tmp_path / "b.html",
        rows=[row | {"method": EVIL, "metric": EVIL} for row in rows],
        readings={1: replace(reading_of(1, None, EVIL), split=EVIL)},
        model_influence=evil_influences,
        facts={EVIL: EVIL},
        title=EVIL,
        command=EVIL,
    )
    page = page_without_plotly(path)
    assert page.count("<script") == page_without_plotly(clean).count("<script")
    assert not re.search(r"<script[^>]*>alert|<img", page)
    assert f"␣{escape(EVIL)}" in page


def test_without_influence_in_the_model_no_column_is_empty(tmp_path, rows, readings, influences):
    page = page_without_plotly(
        write_basis_report(tmp_path / "a.html", rows=rows, readings=readings)
    )
    tables = re.findall(r"<table class='(?:numbers|directions)'>.*?</table>", page, re.S)
    assert len(tables) == 1 + 2 * len(rows)
    for table in tables:
        headings = re.findall(r"<th[ >].*?</th>", table)
        lines = [
            re.findall(r"<td.*?</td>", line) for line in re.findall(r"<tr>.*?</tr>", table)[1:]
        ]
        assert {len(line) for line in lines} == {len(headings)}
        for column in range(len(headings)):
            assert any(re.sub(r"<[^>]*>", "", line[column]) for line in lines), headings[column]
    text = visible_text(page)
    for word in ("Spearman", "lignment", "in the model,", ", model"):
        assert word not in text.replace(visible_text(BASIS_GLOSSARY["influence"]), "")
    # With an influence of one layer alone, the other layer has no column for it.
    some = {1: influences[1]}
    page = page_without_plotly(
        write_basis_report(tmp_path / "b.html", rows=rows, readings=readings, model_influence=some)
    )
    first, second = page.split("<h2 id='layer-2'>")
    assert "<th class='number'>in the model</th>" in first
    assert "<th class='number'>in the model</th>" not in second


def test_without_readings_the_numbers_stand_alone(tmp_path, rows):
    page = page_without_plotly(write_basis_report(tmp_path / "a.html", rows=rows))
    assert "<th class='tokens'>" not in page
    assert "best match in layer" not in page
    assert page.count("<td class='number'>") == 2 * K * 3


def test_undefined_measures_and_intervals_are_told(tmp_path):
    row = random_row(3)
    row["span"][2] = {"kl": 0.5, "low": None, "high": None}
    row["pca"][4] = {"kl": math.nan, "low": math.nan, "high": math.nan}
    row["energies"][1] = math.inf
    page = page_without_plotly(write_basis_report(tmp_path / "a.html", rows=[row]))
    assert "<td data-v='0.5'>0.5</td>" in page
    assert "<td data-v=''>undefined</td>" in page
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        write_basis_png(path, rows=[row])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_keys_of_json_are_as_good_as_numbers(tmp_path, rows, influences):
    from_json = json.loads(json.dumps(rows)), json.loads(json.dumps(influences))
    one = write_basis_report(tmp_path / "1", rows=rows, model_influence=influences)
    other = write_basis_report(tmp_path / "2", rows=from_json[0], model_influence=from_json[1])
    assert one.read_bytes() == other.read_bytes()


def test_the_figure_draws_spans_bands_and_influences(rows, influences):
    row = rows[0]
    figure = interactive_spectra.layer_figure(row, influences[2]).to_plotly_json()
    lines = {t["name"]: t for t in figure["data"] if t["type"] == "scatter" and "fill" not in t}
    assert list(lines) == [
        *(f"{name}, lens" for name in ("causal basis", "PCA", "random directions")),
        *(f"{name}, model" for name in ("causal basis", "PCA", "random directions")),
    ]
    assert lines["causal basis, lens"]["x"] == [1, 2, 4, K]
    expected = [estimate["kl"] for estimate in row["pca"].values()]
    drawn = lines["PCA, lens"]["y"]
    assert all(d == max(v, 1e-3) or d == v for d, v in zip(drawn, expected, strict=True))
    # A basis has one colour; the model is dashed.
    for name in ("causal basis", "PCA", "random directions"):
        lens, model = lines[f"{name}, lens"]["line"], lines[f"{name}, model"]["line"]
        assert lens["color"] == model["color"]
        assert (lens["dash"], model["dash"]) == ("solid", "dash")
    bands = [t for t in figure["data"] if "fill" in t]
    assert len(bands) == 6
    bars = [t for t in figure["data"] if t["type"] == "bar"]
    assert [bar["y"] for bar in bars] == [
        influences[2]["lens_influences"],
        influences[2]["model_influences"],
    ]
    titles = " ".join(a["text"] for a in figure["layout"]["annotations"])
    assert f"n = {row['n_test']:,}" in titles
    alone = interactive_spectra.layer_figure(row).to_plotly_json()
    assert [t["y"] for t in alone["data"] if t["type"] == "bar"] == [row["influences"]]


def test_the_picture_has_a_panel_per_layer(rows, influences, tmp_path):
    figure = static_spectra.spectra(rows, influences, "tiny")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == [
        "layer 2, n = 2,002, model n = 7,123",
        "layer 1, n = 2,001, model n = 7,123",
    ]
    for axes, row in zip(shown, rows, strict=True):
        for line, curve in zip(
            axes.get_lines(), span_curves(row, influences[row["layer"]]), strict=True
        ):
            assert line.get_label() == curve.label
            assert line.get_linestyle() == ("--" if curve.in_model else "-")
            assert list(np.asarray(line.get_xdata())) == curve.ks
        assert len(axes.collections) == 6
    path = write_basis_png(tmp_path / "p.png", rows=rows, model_influence=influences)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"span": None}, "lack span"),
        ({"energies": [0.1]}, "5 directions, but 1 energies"),
        ({"pca": {1: {"kl": 1, "low": 0, "high": 2}}}, "no pca for k = 5"),
    ],
)
def test_rows_that_lack_something_are_refused(tmp_path, change, message):
    row = {key: value for key, value in (random_row(1) | change).items() if value is not None}
    with pytest.raises(UsageError, match=message):
        write_basis_report(tmp_path / "a.html", rows=[row])
    with pytest.raises(UsageError, match=message):
        write_basis_png(tmp_path / "a.png", rows=[row])
    assert list(tmp_path.iterdir()) == []


def test_influences_of_another_fit_are_refused(tmp_path, rows, influences):
    other = {1: influences[1] | {"model_influences": [0.1]}}
    with pytest.raises(UsageError, match="5 directions, but 1 model_influences"):
        write_basis_report(tmp_path / "a.html", rows=rows, model_influence=other)
    with pytest.raises(UsageError, match="no row of metrics"):
        write_basis_report(tmp_path / "a.html", rows=[])
    lacking = {1: {key: value for key, value in influences[1].items() if key != "spearman"}}
    with pytest.raises(UsageError, match="model influence of layer 1 lack spearman"):
        write_basis_png(tmp_path / "a.png", rows=rows, model_influence=lacking)
