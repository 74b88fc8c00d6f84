"""Names of probes in evaluations: one probe, several, or names that the user gives."""

import copy
import json
import pickle
from typing import Any

import pytest

import residua
from residua.analysis.evaluation.probe_names import ProbeName, name_readouts
from residua.analysis.report.interactive_figures import panel_figure
from residua.analysis.report.probe_style import color, label, marker, stroke
from residua.cache.errors import UsageError
from residua.cache.store.activation_cache import ActivationCache

FEW = {"max_positions": 512, "progress": None}


@pytest.fixture(scope="module")
def ridges(tiny_cache: ActivationCache) -> list[residua.RidgeProbe]:
    """Two ridge probes of other penalties."""
    return [
        residua.RidgeProbe(alpha=alpha, folds=1, layers=[1]).fit(tiny_cache, keep=False)
        for alpha in (1.0, 1e5)
    ]


def test_one_probe_and_a_list_of_it_are_measured_alike(
    tiny_cache: ActivationCache, ridges: list[residua.RidgeProbe]
) -> None:
    one = residua.evaluate(tiny_cache, ridges[0], **FEW)
    several = residua.evaluate(tiny_cache, [ridges[0]], **FEW)
    assert one.rows == several.rows
    assert one.probes == ("logit", "ridge")


def test_given_names_are_those_of_rows_tables_and_notes(
    tiny_cache: ActivationCache, ridges: list[residua.RidgeProbe]
) -> None:
    named = {"long": ridges[0], "lens": ridges[1]}
    evaluation = residua.evaluate(tiny_cache, named, **FEW)
    unnamed = residua.evaluate(tiny_cache, ridges, **FEW)
    assert evaluation.probes == ("logit", "long", "lens")
    assert [row.kl for row in evaluation.select("long", 0)] == [
        row.kl for row in unnamed.select("ridge", 0)
    ]
    assert {row["probe"] for row in json.loads(json.dumps(evaluation.to_dicts()))} == {
        "logit",
        "long",
        "lens",
    }
    notes = [note for note in evaluation.notes if " is RidgeProbe(" in note]
    assert [note.partition(" is ")[0] for note in notes] == ["long", "lens"]
    assert "alpha=1.0" in notes[0]
    assert "alpha=100000.0" in notes[1]
    assert all(tiny_cache.id[:12] in note for note in notes)


def test_a_given_name_is_written_as_it_is_and_drawn_by_its_kind(
    tiny_cache: ActivationCache, ridges: list[residua.RidgeProbe]
) -> None:
    evaluation = residua.evaluate(tiny_cache, {"lens": ridges[0], "future 3": ridges[1]}, **FEW)
    names = evaluation.probes[1:]
    assert [label(name) for name in names] == ["lens", "future 3"]
    assert [color(name) for name in names] == [color("ridge"), color("ridge 2")]
    assert [marker(name) for name in names] == [marker("ridge"), marker("ridge 2")]
    assert [stroke(name) for name in names] == [stroke("ridge"), stroke("ridge 2")]
    traces: Any = panel_figure(evaluation, "kl", 0).data
    styles = {
        trace.name: (trace.line.color, trace.line.dash, trace.marker.symbol)
        for trace in traces
        if trace.fill is None
    }
    assert len(set(styles.values())) == 3


def test_numbers_count_the_probes_of_a_kind(ridges: list[residua.RidgeProbe]) -> None:
    logit = residua.LogitLens([1], [0])
    names = list(name_readouts([ridges[0], logit, ridges[1]]))
    assert names == ["ridge", "logit", "ridge 2"]
    given = list(name_readouts({"a": ridges[0], "b": logit, "c": ridges[1]}))
    assert [(getattr(name, "kind", None), getattr(name, "number", 0)) for name in given] == [
        ("ridge", 1),
        ("logit", 1),
        ("ridge", 2),
    ]


@pytest.mark.parametrize("name", ["", " ", "_hidden", "two\nlines", 3, None])
def test_a_name_that_no_table_can_show_is_refused(
    tiny_cache: ActivationCache, ridges: list[residua.RidgeProbe], name: Any
) -> None:
    with pytest.raises(UsageError, match="a probe cannot be named"):
        residua.evaluate(tiny_cache, {name: ridges[0]}, **FEW)


def test_the_name_of_a_baseline_is_refused_unless_it_is_the_baseline(
    tiny_cache: ActivationCache, ridges: list[residua.RidgeProbe]
) -> None:
    with pytest.raises(UsageError, match="'logit' is that of a baseline"):
        residua.evaluate(tiny_cache, {"logit": ridges[0]}, **FEW)
    lens = residua.LogitLens([1], [0])
    evaluation = residua.evaluate(tiny_cache, {"logit": lens, "ridge": ridges[0]}, **FEW)
    assert evaluation.probes == ("logit", "ridge")


def test_a_note_names_probes_of_the_measured_text_by_their_names(
    tiny_cache: ActivationCache, ridges: list[residua.RidgeProbe]
) -> None:
    evaluation = residua.evaluate(tiny_cache, {"long": ridges[0]}, split="train", **FEW)
    assert any("were fitted on: long;" in note for note in evaluation.notes)


def test_no_probe_is_refused_with_a_word(tiny_cache: ActivationCache) -> None:
    word: Any = {"long": object()}
    with pytest.raises(UsageError, match="predicts nothing"):
        residua.evaluate(tiny_cache, word, **FEW)


def test_copies_of_a_name_know_its_kind() -> None:
    name = ProbeName("long", "ridge", 2, is_given=True)
    for twin in (copy.deepcopy(name), pickle.loads(pickle.dumps(name))):
        assert (twin, twin.kind, twin.number, twin.is_given) == ("long", "ridge", 2, True)
