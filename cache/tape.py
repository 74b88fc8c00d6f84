"""From recordings of a function on batches of other sizes to one program for any size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import ModelError
from .program import Node, Program, references


@dataclass
class Tape:
    """What one run of the tail did."""

    nodes: list[Node] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    """Node that no program can express -> why."""


def prune(tape: Tape, output: int) -> Tape:
    """Only the nodes that the output needs, renumbered."""
    needed, todo = set(), [output]
    while todo:
        if (number := todo.pop()) and number not in needed:
            needed.add(number)
            todo += references(dict(tape.nodes[number - 1].args))
    if reasons := [tape.reasons[n] for n in sorted(needed) if n in tape.reasons]:
        raise ModelError(f"the tail cannot be kept as a head program: {reasons[0]}")
    order = {old: new for new, old in enumerate(sorted(needed), 1)} | {0: 0}
    nodes = [
        Node(tape.nodes[n - 1].op, _renumber(tape.nodes[n - 1].args, order)) for n in sorted(needed)
    ]
    return Tape(nodes, tape.tensors)


def _renumber(value: Any, order: Mapping[int, int]) -> Any:
    if isinstance(value, Mapping) and set(value) == {"node"}:
        return {"node": order[value["node"]]}
    if isinstance(value, Mapping):
        return {key: _renumber(item, order) for key, item in value.items()}
    return [_renumber(item, order) for item in value] if isinstance(value, list) else value


def generalize(
    tapes: list[Tape], shapes: Sequence[tuple[int, int]]
) -> tuple[Program, dict[str, torch.Tensor]]:
    """One program from recordings at `shapes` (batch, length), and its tensors.

    Raises `ModelError` where they differ by more than their sizes.
    """
    if len({tuple(node.op for node in tape.nodes) for tape in tapes}) != 1:
        raise ModelError("the tail does other operations on other batches")
    merger = _Merger(tapes, shapes)
    nodes = [
        Node(
            same[0].op,
            {key: merger.join([node.args[key] for node in same]) for key in same[0].args},
        )
        for same in zip(*(tape.nodes for tape in tapes), strict=True)
    ]
    return Program(tuple(nodes)), merger.tensors


class _Merger:
    """Joins what the same argument was in every recording."""

    def __init__(self, tapes: list[Tape], shapes: Sequence[tuple[int, int]]) -> None:
        self.tapes = tapes
        self.shapes = shapes
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[tuple[int, ...], str] = {}

    def join(self, values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, dict) and "tensor" in first:
            return {"tensor": self._tensor(tuple(value["tensor"] for value in values))}
        if isinstance(first, list) and len({len(value) for value in values}) == 1:
            return [self.join(list(items)) for items in zip(*values, strict=True)]
        if all(value == first and type(value) is type(first) for value in values):
            return first
        return {"size": self._formula(values)}

    def _tensor(self, numbers: tuple[int, ...]) -> str:
        if numbers not in self._names:
            found = [tape.tensors[n] for tape, n in zip(self.tapes, numbers, strict=True)]
            self._names[numbers] = name = f"t{len(self._names)}"
            self.tensors[name] = _shared(found)
        return self._names[numbers]

    def _formula(self, values: list[Any]) -> list[int]:
        """`[k, b, l, o]` with value = k batchᵇ lengthˡ + o for every recording."""
        if all(type(value) is int for value in values):
            for batch, length in ((0, 1), (1, 0), (1, 1)):
                units = [b**batch * t**length for b, t in self.shapes]
                factor = (values[0] - values[1]) // (units[0] - units[1])
                offset = values[0] - factor * units[0]
                if values == [factor * unit + offset for unit in units]:
                    return [factor, batch, length, offset]
        raise ModelError(f"a number in the tail depends on the tokens: {values}")


def _shared(found: list[torch.Tensor]) -> torch.Tensor:
    """The tensor that all recordings used; axes that follow the batch must not matter."""
    if len({tensor.ndim for tensor in found}) == 1:
        differ = [n for n in range(found[0].ndim) if len({t.shape[n] for t in found}) > 1]
        cut = [
            t[tuple(slice(1) if n in differ else slice(None) for n in range(t.ndim))] for t in found
        ]
        flat = (
            all(bool((t == c).all()) for t, c in zip(found, cut, strict=True)) if differ else True
        )
        if flat and all(torch.equal(cut[0], other) for other in cut[1:]):
            return cut[0].detach()
    raise ModelError("a tensor in the tail depends on the tokens or on the size of the batch")
