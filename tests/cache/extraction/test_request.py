"""The options of an extraction are the same in Python, at the command line and in the request."""

import inspect
from dataclasses import MISSING, fields
from typing import Any

import pytest

import residua
from residua.cache.extraction.request import ExtractionRequest
from residua.cli import main

ONLY_KEYWORDS = {"client", "progress", "tokenizer"}
ONLY_OPTIONS = {"scheduler", "dry_run", "find", "server", "no_tty", "as_json"}


def request_defaults() -> dict[str, Any]:
    """Field -> default of `ExtractionRequest`, without the required fields."""
    return {f.name: f.default for f in fields(ExtractionRequest) if f.default is not MISSING}


def keyword_defaults() -> dict[str, Any]:
    """Keyword -> default of `residua.extract`, without the required parameters."""
    parameters = inspect.signature(residua.extract).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def command_line_values() -> dict[str, Any]:
    """Option or argument -> value of `residua extract model data`."""
    return main.commands["extract"].make_context("extract", ["model", "data"]).params


def test_extract_has_the_fields_of_the_request_as_keywords_with_the_same_defaults() -> None:
    keywords = keyword_defaults()
    assert {n: v for n, v in keywords.items() if n not in ONLY_KEYWORDS} == request_defaults()
    assert set(keywords) - set(request_defaults()) == ONLY_KEYWORDS


def test_extract_spells_its_keywords_in_the_order_of_the_fields_and_documents_each() -> None:
    names = [field.name for field in fields(ExtractionRequest) if field.name != "given"]
    parameters = list(inspect.signature(residua.extract).parameters)
    assert parameters[: len(names)] == names
    documentation = inspect.getdoc(residua.extract) or ""
    documented = [
        line.split(":")[0].strip()
        for line in documentation.partition("Args:")[2].splitlines()
        if line.startswith("    ") and not line.startswith("     ")
    ]
    assert documented == parameters


def test_the_command_line_has_the_fields_of_the_request_with_the_same_defaults() -> None:
    values = command_line_values()
    assert (values.pop("model"), values.pop("data")) == ("model", "data")
    assert {n: v for n, v in values.items() if n not in ONLY_OPTIONS} == request_defaults()
    assert set(values) - set(request_defaults()) == ONLY_OPTIONS


def test_an_unknown_keyword_is_refused() -> None:
    with pytest.raises(TypeError, match="contex"):
        residua.extract("model", "data", contex=5)  # pyright: ignore[reportCallIssue]
