"""Results of studies as JSON, tables, pictures and pages."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from residua.analysis.studies.results.study_figures import HeatPanel, Panel, Series, StudyFigure
from residua.analysis.studies.results.study_files import StudyFiles
from residua.analysis.studies.results.study_page import write_study_page
from residua.analysis.studies.results.study_result import StudyResult, StudySubject, StudyTable
from residua.cache.errors import NotFoundError, UsageError

HOSTILE = "</script><script>alert(1)</script>$x_$"


@dataclass(frozen=True)
class Row:
    name: str
    value: float | None
    value_interval: tuple[float | None, float | None]
    n: int


def result_of(name: str = "toy") -> StudyResult:
    curves = Panel(
        "curves",
        "layer",
        "nats",
        [
            Series(HOSTILE, [0, 1, 2], [1.0, None, 3.0], [0.5, None, 2.0], [1.5, None, 4.0]),
            Series("other", [0, 1, 2], [3.0, 2.0, 1.0], dash="dash"),
        ],
        log_y=True,
        reference=1.5,
        reference_label="chance",
    )
    words = Panel(
        "words",
        "class",
        "share",
        [
            Series("other", ["a", "b"], [0.2, 0.4], [0.1, 0.3], [0.3, 0.5], kind="bars"),
            Series(HOSTILE, ["a", "c"], [0.5, None], kind="bars"),
        ],
        y_range=(0, 1),
    )
    cloud = Panel("cloud", "x", "y", [Series("points", [0.5], [1.0], kind="points", names=["p"])])
    heat = HeatPanel(
        "heat",
        "token",
        "layer",
        ["a", "a", HOSTILE],
        ["0", "1"],
        [[0.0, 1.0, None], [float("nan"), 0.5, 0.2]],
        "p",
        texts=[["x", HOSTILE, ""], ["y", "z", "long text of a cell"]],
        hovers=[["1\n2", "", ""], ["", "", ""]],
    )
    difference = HeatPanel("d", "x", "y", ["a"], ["b"], [[-2.0]], "nats", diverging=True)
    return StudyResult(
        study=name,
        title=f"A toy of {HOSTILE}",
        question="Does it?",
        method="It is counted.",
        subject=StudySubject(
            ("0" * 64,), HOSTILE, "data", "test", 3, "rows", "document", 2, {"long": HOSTILE}
        ),
        tables=[
            StudyTable(
                "rows",
                "Rows",
                {"name": "name", "value": "value (nats)", "value_interval": "95 %"},
                [Row(HOSTILE, 1.0, (0.5, 1.5), 3), Row("b", None, (None, None), 0)],
            ),
            StudyTable("none", "No rows", {"name": "name"}, []),
        ],
        figures=[
            StudyFigure("main", "All panels.", [[curves, words, cloud], [heat]]),
            StudyFigure("difference", "One cell.", [[difference]]),
        ],
        says=[f"It says {HOSTILE}."],
        does_not_say=["Nothing else."],
        notes=["One value is missing."],
        settings={"seed": 0},
    )


def test_json_tables_and_frames_hold_all_fields() -> None:
    value = json.loads(json.dumps(result_of().to_dict(), allow_nan=False))
    assert value["tables"]["rows"][0] == {
        "name": HOSTILE,
        "value": 1.0,
        "value_interval": [0.5, 1.5],
        "n": 3,
    }
    assert value["figures"][0]["rows"][1][0]["values"] == [[0.0, 1.0, None], [None, 0.5, 0.2]]
    assert value["subject"]["probes"] == {"long": HOSTILE}
    assert list(result_of().to_dataframe()["n"]) == [3, 0]
    with pytest.raises(NotFoundError, match="no table 'x'"):
        result_of().table("x")
    with pytest.raises(NotFoundError, match="no figure 'x'"):
        result_of().plot("x")


def test_a_notebook_shows_what_the_study_says_and_its_table() -> None:
    shown = result_of()._repr_html_()
    assert "Does it?" in shown
    assert "0.500 to 1.500" in shown
    assert "<script>" not in shown


def test_pictures_have_every_panel_and_one_legend() -> None:
    figure = result_of().plot()
    titles = {axis.get_title(loc="left") for axis in figure.axes}
    assert {"curves", "words", "cloud", "heat"} <= titles
    assert figure._repr_png_().startswith(b"\x89PNG")  # pyright: ignore[reportAttributeAccessIssue]
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 3
    drawn: Any = result_of().to_plotly()
    assert len({trace.name for trace in drawn.data if trace.showlegend}) == 3
    other: Any = result_of().to_plotly("difference")
    assert other.data[0].zmin == -2.0


def test_files_are_written_and_pages_are_safe(tmp_path: Path) -> None:
    files = StudyFiles(tmp_path / "page.html", tmp_path / "png", tmp_path / "csv")
    files.check()
    written = files.write([result_of()], "residua study toy <x>")
    names = [Path(path).name for path in written]
    assert names == ["toy-rows.csv", "toy-main.png", "toy-difference.png", "page.html"]
    table = (tmp_path / "csv" / "toy-rows.csv").read_text().splitlines()
    assert table[0] == "name,value,value_low,value_high,n"
    assert table[2] == "b,,,,0"
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    for part in ("Does it?", "It is counted.", "Nothing else.", "residua study toy &lt;x&gt;"):
        assert part in page
    assert (tmp_path / "png" / "toy-main.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_of_several_studies_names_what_was_skipped(tmp_path: Path) -> None:
    results = [result_of("one"), result_of("two")]
    path = write_study_page(results, tmp_path / "p.html", skipped={"three": "no labels <b>"})
    page = path.read_text()
    assert 'href="#two"' in page
    assert "no labels &lt;b&gt;" in page
    assert page.count('<section class="study"') == 2


def test_wrong_places_series_and_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        StudyFiles(png=tmp_path / "file").check()
    with pytest.raises(UsageError, match="is a folder"):
        StudyFiles(html=tmp_path).check()
    with pytest.raises(ValueError, match="differ in length"):
        Series("a", [1, 2], [1.0])
    with pytest.raises(ValueError, match="is not"):
        HeatPanel("h", "x", "y", ["a"], ["b"], [[1.0, 2.0]], "c")
    with pytest.raises(ValueError, match="no field"):
        StudyTable("t", "T", {"nothing": "x"}, [Row("a", 1.0, (None, None), 1)])
