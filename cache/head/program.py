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

from ..errors import CorruptError
from .operations import OPS, NumpyOperations, TorchOperations

NODE_LIMIT = 10_000
"""Most nodes of a program."""
SIZE_LIMIT = 1 << 40
"""Bound of the numbers of a `size` argument."""
LIST_DEPTH_LIMIT = 2
"""Most lists around an argument: no operation takes lists of lists of lists."""


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
        xp: NumpyOperations | TorchOperations,
        limit: int | None = None,
    ) -> Any:
        """Run the program on `x`, `(batch, length, d_model)`, with the backend `xp`.

        `tensors` are those of `head.safetensors` by name, as arrays of the backend. Raises
        `ValueError` if the result of a node has more than `limit` numbers.
        """
        sizes = (int(x.shape[0]), int(x.shape[1]))
        results: list[Any] = [x]
        last_uses = self._last_uses()
        for number, node in enumerate(self.nodes, 1):
            args = {k: _evaluate(v, results, tensors, sizes) for k, v in node.args.items()}
            results.append(OPS[node.op].run(xp, **args))
            if limit is not None and math.prod(results[-1].shape) > limit:
                raise ValueError(f"node {number} gives {tuple(results[-1].shape)}")
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

        Raises `CorruptError` for an unknown operation or an argument of another form.
        """
        if not isinstance(entries, list) or not 0 < len(entries) <= NODE_LIMIT:
            raise CorruptError(f"a head program has 1 to {NODE_LIMIT} nodes in a list")
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
        raise CorruptError(f"node {number + 1} of the head program is not an operation")
    op = OPS.get(entry["op"]) if isinstance(entry["op"], str) else None
    if op is None:
        raise CorruptError(f"the head program uses the unknown operation {entry['op']!r}")
    args = entry["args"]
    if not isinstance(args, dict) or not op.required <= set(args) <= op.allowed:
        raise CorruptError(f"operation {entry['op']} of the head program has wrong arguments")
    for value in args.values():
        _check_value(value, number, names)
    return Node(entry["op"], args)


def _check_value(value: Any, number: int, names: set[str], depth: int = 0) -> None:
    """Raise `CorruptError` unless `value` is an argument of the forms above.

    `number` is the last result that can be read, `depth` the count of lists around the value.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return
    if isinstance(value, list) and depth < LIST_DEPTH_LIMIT:
        for item in value:
            _check_value(item, number, names, depth + 1)
        return
    if isinstance(value, dict) and len(value) == 1:
        kind, content = next(iter(value.items()))
        if kind == "node" and type(content) is int and 0 <= content <= number:
            return
        if kind == "tensor" and isinstance(content, str) and content in names:
            return
        if kind == "size" and isinstance(content, list) and _is_size(content):
            return
    raise CorruptError(f"node {number + 1} of the head program has a wrong value")


def _is_size(numbers: list[Any]) -> bool:
    """Whether `numbers` are k, b, l, o with powers b and l of 0 or 1."""
    if len(numbers) != 4 or any(type(number) is not int for number in numbers):
        return False
    _, batch_power, length_power, _ = numbers
    has_powers = batch_power in (0, 1) and length_power in (0, 1)
    return has_powers and max(map(abs, numbers)) < SIZE_LIMIT
