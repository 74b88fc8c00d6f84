"""Head programs: lists of whitelisted operations (`operations.py`), run by numpy or torch.

A program is data in `head.json`, made by `record_head.py` and run by `program_head.py`. Files come
from strangers: `Program.from_json` accepts only known operations with well-formed arguments.

The input is `(batch, length, d_model)`, the output `(batch, length, vocab)`. An argument is a
number, a string, null, a list of arguments, or one of three objects: `{"node": i}`, the result of
node i (0 is the input, 1 the first node); `{"tensor": name}`, a tensor of `head.safetensors`;
`{"size": [k, b, l, o]}`, the integer k batchᵇ lengthˡ + o.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..files.json_fields import FieldError, shown
from .operations import OPS

NODE_LIMIT = 10_000
"""Most nodes of a program."""
SIZE_LIMIT = 1 << 40
"""Bound of the numbers of a `size` argument."""
NUMBER_LIMIT = 1 << 63
"""Bound of whole numbers: torch writes the end of a slice as the largest int64."""
AXES_LIMIT = 64
"""Most numbers in a list of axes or sizes."""
ARRAY_LISTS = ("tensors",)
"""Parameters that are lists of arrays."""
NUMBER_LISTS = ("dim", "dims", "size", "pad", "normalized_shape")
"""Parameters that may be lists of numbers."""
TEXTS = ("approximate",)
"""Parameters that are words."""


@dataclass(frozen=True)
class Node:
    """One operation, a key of `operations.OPS`, and its arguments by name."""

    op: str
    args: Mapping[str, Any]


@dataclass(frozen=True)
class Program:
    """Nodes in order of execution; the last one is the output."""

    nodes: tuple[Node, ...]

    def run(
        self,
        x: Any,
        tensors: Mapping[str, Any],
        xp: Any,
    ) -> Any:
        """Run the program on `x`, `(batch, length, d_model)`, with the backend `xp`.

        `tensors` are those of `head.safetensors` by name, as arrays of the backend: numpy, torch,
        or the shapes alone (`program_bounds.py`).
        """
        sizes = (int(x.shape[0]), int(x.shape[1]))
        results: list[Any] = [x]
        last_uses = self._last_uses()
        for number, node in enumerate(self.nodes, 1):
            args = {k: _evaluate(v, results, tensors, sizes) for k, v in node.args.items()}
            results.append(OPS[node.op].run(xp, **args))
            # Free results that no later node reads.
            for unused in last_uses.get(number, ()):
                results[unused] = None
        return results[-1]

    def _last_uses(self) -> dict[int, list[int]]:
        """Node number -> results that no later node reads."""
        last_reader = {
            ref: number
            for number, node in enumerate(self.nodes, 1)
            for ref in references(node.args)
        }
        last_uses: dict[int, list[int]] = {}
        for ref, number in last_reader.items():
            last_uses.setdefault(number, []).append(ref)
        return last_uses

    def to_json(self) -> list[dict[str, Any]]:
        """The value of `nodes` in `head.json`."""
        return [{"op": node.op, "args": dict(node.args)} for node in self.nodes]

    @classmethod
    def from_json(cls, entries: Any, names: set[str]) -> "Program":
        """Check and load the `nodes` of a `head.json` whose tensors are called `names`.

        Raises `FieldError` for an unknown operation or an argument of another form.
        """
        if not isinstance(entries, list) or not 0 < len(entries) <= NODE_LIMIT:
            raise FieldError(f"a head program has 1 to {NODE_LIMIT} nodes in a list")
        return cls(tuple(_parse_node(entry, n, names) for n, entry in enumerate(entries)))


def references(value: Any) -> Iterator[int]:
    """Numbers of the nodes whose results an argument, or a mapping of arguments, reads."""
    if isinstance(value, dict) and set(value) == {"node"}:
        yield value["node"]
    elif isinstance(value, dict):
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def _evaluate(
    value: Any, results: list[Any], tensors: Mapping[str, Any], sizes: tuple[int, int]
) -> Any:
    """The array or number that an argument stands for; `sizes` are batch and length."""
    if isinstance(value, list):
        return [_evaluate(item, results, tensors, sizes) for item in value]
    if not isinstance(value, dict):
        return value
    if "node" in value:
        return results[value["node"]]
    if "tensor" in value:
        return tensors[value["tensor"]]
    factor, batch_power, length_power, offset = value["size"]
    batch, length = sizes
    return factor * batch**batch_power * length**length_power + offset


def _parse_node(entry: Any, number: int, names: set[str]) -> Node:
    """The node of a JSON object that may read the results 0 to `number`."""
    if not isinstance(entry, dict) or set(entry) != {"op", "args"}:
        raise FieldError(f"node {number + 1} of the head program is not an operation")
    op = OPS.get(entry["op"]) if isinstance(entry["op"], str) else None
    if op is None:
        raise FieldError(f"the head program uses the unknown operation {shown(entry['op'])}")
    args = entry["args"]
    if not isinstance(args, dict) or not op.required <= set(args) <= op.allowed:
        raise FieldError(f"operation {entry['op']} of the head program has wrong arguments")
    if not all(_is_argument(name, value, number, names) for name, value in args.items()):
        raise FieldError(f"node {number + 1} of the head program has a wrong value")
    # Python computes with numbers alone at any length: 7 ** 10 ** 9.
    if not any(_is_array(v, number, names) for v in (*args.values(), *args.get("tensors", ()))):
        raise FieldError(f"node {number + 1} of the head program computes with no array")
    return Node(entry["op"], args)


def _is_argument(name: str, value: Any, number: int, names: set[str]) -> bool:
    """Whether `value` has one of the forms above, and one that the parameter `name` takes.

    `number` is the last result that can be read. In lists and words, `*` would repeat the value.
    """
    if name in ARRAY_LISTS:
        is_list = isinstance(value, list) and 0 < len(value) <= NODE_LIMIT
        return is_list and all(_is_array(item, number, names) for item in value)
    if name in NUMBER_LISTS and isinstance(value, list):
        return len(value) <= AXES_LIMIT and all(_is_number(item) for item in value)
    if name in TEXTS:
        return isinstance(value, str)
    return value is None or _is_number(value) or _is_array(value, number, names)


def _is_array(value: Any, number: int, names: set[str]) -> bool:
    """Whether `value` is a tensor of `names`, or one of the results 0 to `number`."""
    if not isinstance(value, dict) or len(value) != 1:
        return False
    kind, content = next(iter(value.items()))
    if kind == "node":
        return type(content) is int and 0 <= content <= number
    return kind == "tensor" and isinstance(content, str) and content in names


def _is_number(value: Any) -> bool:
    """Whether `value` is a number, or a size from which a number follows."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        is_size = set(value) == {"size"} and isinstance(value["size"], list)
        return is_size and _is_size(value["size"])
    return isinstance(value, int) and abs(value) <= NUMBER_LIMIT


def _is_size(numbers: list[Any]) -> bool:
    """Whether `numbers` are k, b, l, o with powers b and l of 0 or 1."""
    if len(numbers) != 4 or any(type(number) is not int for number in numbers):
        return False
    _, batch_power, length_power, _ = numbers
    has_powers = batch_power in (0, 1) and length_power in (0, 1)
    return has_powers and max(map(abs, numbers)) < SIZE_LIMIT
