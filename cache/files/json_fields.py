"""Typed, bounded readers of JSON that comes from disk: every byte may be a stranger's.

`parse_json_object` turns bytes into an object of bounded size and depth. The readers of fields
(`integer_field`, `text_field`, ...) check type and range of one field before anybody computes or
allocates with it; `checking_fields` names the file in their errors. Used for manifest, journal,
`zarr.json`, head, moments and saved probes.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CorruptError

MAX_JSON_BYTES = 128 << 20
"""Largest JSON file that is parsed; the largest real one is a tokenizer of some 40 MiB."""
MAX_CONTAINERS = 1 << 21
"""Most objects and lists of a file; each takes some hundred bytes of memory."""
MAX_ITEMS = 1 << 23
"""Most commas of a file, hence of items beyond the first of their container."""
MAX_DEPTH = 64
"""Most objects and lists around a value."""
MAX_INTEGER = (1 << 63) - 1
"""Largest whole number, unless a smaller bound is given: that of an int64."""
MAX_TEXT = 4096
"""Most characters of a text field, unless another bound is given."""
SHOWN_CHARACTERS = 60
"""Characters of a wrong value that a message shows."""
Value = TypeVar("Value")
JsonObject = Mapping[str, Any]


class FieldError(CorruptError):
    """A field of a JSON file that is missing, of another type, or out of range."""


@contextmanager
def checking_fields(path: Path | str, content: str) -> Iterator[None]:
    """Name the file in errors of fields: `<path> is not <content>: <error>`.

    `content` is such as `a manifest of this format`. Raises `CorruptError` for a `FieldError`.
    """
    try:
        yield
    except FieldError as error:
        raise CorruptError(f"{path} is not {content}: {error}") from None


def parse_json_object(raw: bytes, path: Path | str) -> dict[str, Any]:
    """Parse the bytes `raw` of the file `path`, which hold one JSON object.

    Raises `CorruptError` for other content: no UTF-8, a key given twice, NaN or an infinity, half
    of a surrogate pair, numbers or nesting without a bound.
    """
    try:
        if len(raw) > MAX_JSON_BYTES:
            raise FieldError(f"{len(raw)} bytes; at most {MAX_JSON_BYTES} are read")
        n_containers, n_items = raw.count(b"[") + raw.count(b"{"), raw.count(b",")
        if n_containers > MAX_CONTAINERS or n_items > MAX_ITEMS:
            raise FieldError(f"{n_containers} objects and lists, {n_items} items: too many")
        value = json.loads(
            raw.decode("utf-8"),
            parse_float=_parse_float,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique_keys,
        )
        # Cheap tests tell whether the checks of every value are needed.
        if n_containers > MAX_DEPTH:
            _check_depth(value)
        if re.search(rb"\\u[dD][89a-fA-F]", raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        if not isinstance(value, dict):
            raise FieldError(f"expected an object, found {shown(value)}")
    except RecursionError:
        raise CorruptError(f"{path} is not JSON of this format: nested too deeply") from None
    except (ValueError, FieldError) as error:  # UnicodeDecodeError and JSONDecodeError too
        raise CorruptError(f"{path} is not JSON of this format: {error}") from None
    return value


def _parse_float(text: str) -> float:
    """The number `text`; raises `FieldError` beyond the range of a float, such as for 1e999."""
    number = float(text)
    if not math.isfinite(number):
        raise FieldError(f"a number of {len(text)} characters is beyond the range of a float")
    return number


def _refuse_constant(name: str) -> Any:
    raise FieldError(f"{name} is not a number of JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`; raises `FieldError` for a key that comes twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in value if keys.count(key) > 1)
        raise FieldError(f"the key {shown(twice)} comes twice")
    return value


def _check_depth(value: Any) -> None:
    """Raise `FieldError` if more than `MAX_DEPTH` objects and lists lie around a value."""
    level, depth = [value], 0
    while level:
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [
            item
            for container in containers
            for item in (container.values() if isinstance(container, dict) else container)
        ]
        depth += bool(containers)
        if depth > MAX_DEPTH:
            raise FieldError(f"more than {MAX_DEPTH} objects and lists inside each other")


def shown(value: Any) -> str:
    """`value` for a message: as JSON in ASCII, cut to `SHOWN_CHARACTERS`.

    Control characters, which a terminal would obey, come as escapes.
    """
    if isinstance(value, dict | list):
        kind = "an object" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**SHOWN_CHARACTERS:
        return f"a number of {value.bit_length()} bits"
    text = json.dumps(value[:MAX_TEXT] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def required_field(parent: JsonObject, name: str) -> Any:
    """The field `name` of `parent`, of any type; raises `FieldError` if it is missing."""
    if name not in parent:
        raise FieldError(f"{name} is missing")
    return parent[name]


def optional_field(
    reader: Callable[..., Value], parent: JsonObject, name: str, *bounds: Any
) -> Value | None:
    """What `reader(parent, name, *bounds)` gives; None if the field is missing or null."""
    return None if parent.get(name) is None else reader(parent, name, *bounds)


def check_known_fields(parent: JsonObject, names: Collection[str], where: str) -> None:
    """Raise `FieldError` if `parent`, called `where` in the message, has a field beyond `names`."""
    for name in parent:
        if name not in names:
            raise FieldError(f"{where} has the unknown field {shown(name)}")


def as_integer(value: Any, where: str, low: int = 0, high: int = MAX_INTEGER) -> int:
    """`value` if it is a whole number (no bool, no float) of `low` to `high`."""
    if type(value) is not int or not low <= value <= high:
        raise FieldError(f"{where} is {shown(value)}; expected a whole number from {low} to {high}")
    return value


def as_number(
    value: Any, where: str, low: float = -math.inf, high: float = math.inf
) -> int | float:
    """`value` if it is a finite number (no bool) of `low` to `high`."""
    # Integers beyond the range of a float would overflow later.
    is_number = type(value) in (int, float) and abs(value) < 1 << 1023 and math.isfinite(value)
    if not is_number or not low <= value <= high:
        bounds = "" if (low, high) == (-math.inf, math.inf) else f" from {low} to {high}"
        raise FieldError(f"{where} is {shown(value)}; expected a finite number{bounds}")
    return value


def as_text(value: Any, where: str, longest: int = MAX_TEXT) -> str:
    """`value` if it is a text of at most `longest` characters."""
    if not isinstance(value, str) or len(value) > longest:
        raise FieldError(
            f"{where} is {shown(value)}; expected a text of at most {longest} characters"
        )
    return value


def as_digest(value: Any, where: str) -> str:
    """`value` if it is a sha256 of 64 hexadecimal digits in lower case."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise FieldError(f"{where} is {shown(value)}; expected 64 hexadecimal digits")
    return value


def as_object(value: Any, where: str) -> dict[str, Any]:
    """`value` if it is an object."""
    if not isinstance(value, dict):
        raise FieldError(f"{where} is {shown(value)}; expected an object")
    return value


def as_list(value: Any, where: str, shortest: int = 0, longest: int = MAX_ITEMS) -> list[Any]:
    """`value` if it is a list of `shortest` to `longest` items."""
    if not isinstance(value, list) or not shortest <= len(value) <= longest:
        raise FieldError(
            f"{where} is {shown(value)}; expected a list of {shortest} to {longest} items"
        )
    return value


def integer_field(parent: JsonObject, name: str, low: int = 0, high: int = MAX_INTEGER) -> int:
    """The field `name`, a whole number of `low` to `high`; raises `FieldError` for another."""
    return as_integer(required_field(parent, name), name, low, high)


def number_field(
    parent: JsonObject, name: str, low: float = -math.inf, high: float = math.inf
) -> int | float:
    """The field `name`, a finite number of `low` to `high`; raises `FieldError` for another."""
    return as_number(required_field(parent, name), name, low, high)


def boolean_field(parent: JsonObject, name: str) -> bool:
    """The field `name`, true or false; raises `FieldError` for another value."""
    value = required_field(parent, name)
    if not isinstance(value, bool):
        raise FieldError(f"{name} is {shown(value)}; expected true or false")
    return value


def text_field(parent: JsonObject, name: str, longest: int = MAX_TEXT) -> str:
    """The field `name`, a text of at most `longest` characters; raises `FieldError`."""
    return as_text(required_field(parent, name), name, longest)


def choice_field(parent: JsonObject, name: str, choices: Collection[str]) -> str:
    """The field `name`, one of the texts `choices`; raises `FieldError` for another value."""
    value = required_field(parent, name)
    if not isinstance(value, str) or value not in choices:
        raise FieldError(f"{name} is {shown(value)}; expected one of {', '.join(choices)}")
    return value


def digest_field(parent: JsonObject, name: str) -> str:
    """The field `name`, a sha256 of 64 hexadecimal digits; raises `FieldError` for another."""
    return as_digest(required_field(parent, name), name)


def object_field(parent: JsonObject, name: str) -> dict[str, Any]:
    """The field `name`, an object; raises `FieldError` for another value."""
    return as_object(required_field(parent, name), name)


def list_field(
    parent: JsonObject, name: str, shortest: int = 0, longest: int = MAX_ITEMS
) -> list[Any]:
    """The field `name`, a list of `shortest` to `longest` items; raises `FieldError`."""
    return as_list(required_field(parent, name), name, shortest, longest)
