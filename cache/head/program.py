"""A head as a small program of whitelisted operations: data on disk, run by numpy or torch.

The input is `(batch, length, d_model)`, the output `(batch, length, vocab)`. A value is a number, a
string, null, a list of values, or one of three objects: `{"node": i}` the result of node i (0 is
the input, 1 the first node), `{"tensor": name}` a tensor of `head.safetensors`, `{"size": [k, b, l,
o]}` the integer k batchᵇ lengthˡ + o.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptError
from .operations import OPS, NumpyOperations, TorchOperations

NODE_LIMIT = 10_000
SIZE_LIMIT = 1 << 40


@dataclass(frozen=True)
class Node:
    """One operation and its arguments by name."""

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
        """The result for `x` `(batch, length, d_model)`; no value may have over `limit` numbers."""
        sizes = (int(x.shape[0]), int(x.shape[1]))
        values: list[Any] = [x]
        last = self._last_uses()
        for number, node in enumerate(self.nodes, 1):
            args = {k: _evaluate(v, values, tensors, sizes) for k, v in node.args.items()}
            values.append(OPS[node.op].run(xp, **args))
            if limit is not None and math.prod(values[-1].shape) > limit:
                raise ValueError(f"node {number} gives {tuple(values[-1].shape)}")
            for done in last.get(number, ()):
                values[done] = None
        return values[-1]

    def _last_uses(self) -> dict[int, list[int]]:
        """Node -> values that nobody needs after it, so that memory stays small."""
        last = {ref: n for n, node in enumerate(self.nodes, 1) for ref in references(node.args)}
        out: dict[int, list[int]] = {}
        for ref, number in last.items():
            out.setdefault(number, []).append(ref)
        return out

    def to_json(self) -> list[dict[str, Any]]:
        return [{"op": node.op, "args": dict(node.args)} for node in self.nodes]

    @classmethod
    def from_json(cls, entries: Any, names: set[str]) -> "Program":
        """A checked program; `names` are the tensors there are. Raises `CorruptError`."""
        if not isinstance(entries, list) or not 0 < len(entries) <= NODE_LIMIT:
            raise CorruptError(f"a head program has 1 to {NODE_LIMIT} nodes in a list")
        return cls(tuple(_check_node(entry, n, names) for n, entry in enumerate(entries)))


def references(value: Any) -> Iterator[int]:
    """Numbers of the nodes that `value` mentions."""
    if isinstance(value, dict) and set(value) == {"node"}:
        yield value["node"]
    elif isinstance(value, dict):
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def _evaluate(
    value: Any, values: list[Any], tensors: Mapping[str, Any], sizes: tuple[int, int]
) -> Any:
    if isinstance(value, list):
        return [_evaluate(item, values, tensors, sizes) for item in value]
    if not isinstance(value, dict):
        return value
    if "node" in value:
        return values[value["node"]]
    if "tensor" in value:
        return tensors[value["tensor"]]
    factor, batch, length, offset = value["size"]
    return factor * sizes[0] ** batch * sizes[1] ** length + offset


def _check_node(entry: Any, number: int, names: set[str]) -> Node:
    """The node of a JSON object; `number` values are there before it."""
    if not isinstance(entry, dict) or set(entry) != {"op", "args"}:
        raise CorruptError(f"node {number + 1} of the head program is not an operation")
    op = OPS.get(entry["op"]) if isinstance(entry["op"], str) else None
    if op is None:
        raise CorruptError(f"the head program uses the unknown operation {entry['op']!r}")
    args = entry["args"]
    if not isinstance(args, dict) or not op.required <= set(args) <= op.allowed:
        raise CorruptError(f"operation {entry['op']} of the head program has wrong arguments")
    for value in args.values():
        _check_value(value, number, names, 0)
    return Node(entry["op"], args)


def _check_value(value: Any, number: int, names: set[str], depth: int) -> None:
    if value is None or isinstance(value, bool | int | float | str):
        return
    if isinstance(value, list) and depth < 2:
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


def _is_size(value: list[Any]) -> bool:
    plain = len(value) == 4 and all(type(v) is int for v in value)
    return plain and value[1] in (0, 1) and value[2] in (0, 1) and max(map(abs, value)) < SIZE_LIMIT
