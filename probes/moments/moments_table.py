"""`moments.json`, the table of a folder of moments, with every field checked.

Folders of moments lie in caches of strangers: `MomentSet.load` and `kept_moments.py` read the table
here, and use it without further checks. cache/README.md, *Moments*, has the fields.
"""

import re
from pathlib import Path
from typing import Any

from ...cache.files.json_fields import (
    FieldError,
    as_digest,
    as_integer,
    as_number,
    as_object,
    boolean_field,
    checking_fields,
    choice_field,
    digest_field,
    integer_field,
    list_field,
    object_field,
    optional_field,
    required_field,
    shown,
    text_field,
)
from ...cache.files.json_files import read_json
from ...cache.format.manifest import MAX_DEPTH
from ...cache.tokens.splits import SPLITS
from .moments import PRODUCTS

MAX_FOLDS = 1 << 16
"""Most folds of a set of moments."""
MAX_OFFSET = 1 << 31
"""Bound of offsets."""


def read_moments_table(path: Path, of_cache: bool = False) -> dict[str, Any]:
    """Read the `moments.json` at `path`; with `of_cache`, that of moments kept with a cache.

    Raises `CorruptError` for a changed or malformed file, `NotFoundError` for none.
    """
    table = read_json(path)
    with checking_fields(path, "a table of moments"):
        _check_origin(table, of_cache)
        folds = integer_field(table, "folds", 0, MAX_FOLDS)
        layers, content = _layers_of(table, folds), object_field(table, "content")
        for layer, digest in content.items():
            if not re.fullmatch("0|[1-9][0-9]{0,4}", layer):
                raise FieldError(f"content names the layer {shown(layer)}")
            as_digest(digest, f"content of layer {layer}")
        # Moments of arrays have no content.
        if of_cache and not {str(layer) for layer in layers} <= set(content):
            raise FieldError("content does not name the layers of the pairs")
        for name, digest in object_field(table, "tensors").items():
            as_digest(digest, name)
    return table


def _check_origin(table: dict[str, Any], of_cache: bool) -> None:
    """Raise `FieldError` unless `table` says which pairs of which rows were counted."""
    for name in ("cache", "geometry", "split", "products", "sequences", "depth"):
        required_field(table, name)
    if of_cache:
        digest_field(table, "cache")
        choice_field(table, "split", (*SPLITS, "all"))
        choice_field(table, "products", PRODUCTS)
    optional_field(text_field, table, "cache")
    optional_field(text_field, table, "geometry")
    optional_field(text_field, table, "split")
    optional_field(text_field, table, "products")
    optional_field(object_field, table, "sequences")
    optional_field(integer_field, table, "depth", 0, MAX_DEPTH)
    # Tables of the first version lack both.
    if "across_documents" in table:
        boolean_field(table, "across_documents")
    if "drop_first" in table:
        integer_field(table, "drop_first")


def _layers_of(table: dict[str, Any], folds: int) -> set[int]:
    """Layers of the pairs of `table`, each pair with numbers for all `folds`."""
    layers: set[int] = set()
    for row in list_field(table, "pairs"):
        row = as_object(row, "a pair")
        layers |= {integer_field(row, name, 0, MAX_DEPTH) for name in ("layer", "target")}
        integer_field(row, "offset", 0, MAX_OFFSET)
        for count in list_field(row, "n", folds, folds):
            as_integer(count, "n")
        for total in list_field(row, "yy", folds, folds):
            as_number(total, "yy", 0.0)
    return layers
