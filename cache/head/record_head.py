"""Records a model's own tail, from the last block's output to the logits, as a head program.

The tail runs eagerly under a `TorchDispatchMode` on three batches of other sizes and other tokens.
Only what lies downstream of the residual stream is kept. Numbers that follow the batch's size
become functions of it; a tensor that differs between the batches depends on the tokens and
refuses the head.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ModelError
from ..model.blocks import DecoderBlocks
from .operations import OPS
from .program import Node, Program, references

SHAPES = ((2, 7), (3, 11), (4, 14))
"""Batch and length of the recordings; batch, length and their product are on no common line, so
that a size is a function of only one of them."""
# fmt: off
NAMES = {
    "view": "reshape", "_unsafe_view": "reshape", "reshape": "reshape", "_reshape_alias": "reshape",
    "_softmax": "softmax", "native_layer_norm": "layer_norm", "_fused_rms_norm": "rms_norm",
    "constant_pad_nd": "pad",
}
"""aten operators under another name; all others keep theirs."""
SAME = {"detach", "alias", "clone", "_to_copy", "contiguous", "lift_fresh"}
"""Operators that do not change values; a change of dtype is left out, programs run in float32."""
DROPPED = {"half_to_float", "dtype", "memory_format", "rounding_mode", "implicit", "layout"}


@dataclass
class Recording:
    """What one run of the tail did."""

    nodes: list[Node] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    """Node that no program can express -> why."""


# fmt: on


class Recorder(TorchDispatchMode):
    """Notes every operation on values that depend on `x`."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.tape = Recording()
        self._places: dict[int, int] = {id(x): 0}
        self._constants: dict[int, int] = {}
        # Identities are only unique while the tensors live.
        self._alive: list[Any] = [x]
        self._written: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        bound = _bind(func, args, kwargs)
        if any(self._place(t) is not None for t in _tensors(bound)):
            self._alive += [bound, out]
            self._note(func, bound, out)
        return out

    def place(self, tensor: torch.Tensor) -> int:
        """The node that gave `tensor`; raises `ModelError` if none did."""
        found = self._place(tensor)
        if found is None:
            raise ModelError("the logits do not come from the last block's output")
        return found

    def _place(self, tensor: torch.Tensor) -> int | None:
        found = self._places.get(id(tensor))
        if found is None and tensor.untyped_storage().data_ptr() in self._written:
            return self._refuse("a tensor is filled in place")
        return found

    def _refuse(self, reason: str) -> int:
        self.tape.nodes.append(Node("refused", {}))
        self.tape.reasons[len(self.tape.nodes)] = reason
        return len(self.tape.nodes)

    def _note(self, func: Any, bound: dict[str, Any], out: Any) -> None:
        name = func.overloadpacket.__name__
        first = next(iter(bound.values()))
        if name.endswith("_") and not name.startswith("_"):
            if self._places.get(id(first)) is None or first._is_view():
                self._written.add(first.untyped_storage().data_ptr())
            name = name[:-1]
        if name in SAME:
            same = out.is_floating_point()
            self._places[id(out)] = (
                self.place(first) if same else self._refuse("a cast to integers")
            )
        elif isinstance(out, torch.Tensor):
            self._places[id(out)] = self._add(name, bound)
        elif name in ("split", "split_with_sizes", "unbind", "chunk"):
            for tensor, node in zip(out, self._pieces(name, bound, out), strict=True):
                self._places[id(tensor)] = node
        elif isinstance(out, tuple | list):
            for number, tensor in enumerate(t for t in out if isinstance(t, torch.Tensor)):
                known = number == 0 and NAMES.get(name, name) in OPS
                node = self._add(name, bound) if known else self._refuse(f"a result of {name}")
                self._places[id(tensor)] = node

    def _pieces(self, name: str, bound: dict[str, Any], out: Any) -> Iterator[int]:
        """The parts of a split tensor, as slices."""
        source, dim, start = bound["self"], bound.get("dim", 0), 0
        for number, piece in enumerate(out):
            if name == "unbind":
                yield self._add("select", {"self": source, "dim": dim, "index": number})
            else:
                end = start + piece.shape[dim]
                yield self._add("slice", {"self": source, "dim": dim, "start": start, "end": end})
                start = end

    def _add(self, name: str, bound: dict[str, Any]) -> int:
        op = NAMES.get(name, name)
        if op not in OPS:
            return self._refuse(f"the operator {name} is not one of a head program")
        if bound.get("rounding_mode") is not None or bound.get("half_to_float"):
            return self._refuse(f"the operator {name} rounds")
        given = {k: v for k, v in bound.items() if k not in DROPPED and k in OPS[op].allowed}
        if bad := [
            k for k in bound if k not in given and k not in DROPPED and bound[k] is not None
        ]:
            return self._refuse(f"the operator {name} has {bad[0]}")
        if not all(_is_plain(value) for value in given.values()):
            return self._refuse(f"the operator {name} has an argument that is no number")
        args = {key: self._value(value) for key, value in given.items()}
        self.tape.nodes.append(Node(op, args))
        return len(self.tape.nodes)

    def _value(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            place = self._place(value)
            return {"node": place} if place is not None else {"tensor": self._constant(value)}
        if isinstance(value, list | tuple):
            return [self._value(item) for item in value]
        return value

    def _constant(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self._constants:
            self._constants[id(tensor)] = len(self.tape.tensors)
            self.tape.tensors.append(tensor)
        return self._constants[id(tensor)]


def _bind(func: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments of an aten operator by name, defaults included."""
    out = {}
    for number, argument in enumerate(func._schema.arguments):
        if number < len(args):
            out[argument.name] = args[number]
        elif argument.name in kwargs:
            out[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            out[argument.name] = argument.default_value
    return out


def _is_plain(value: Any) -> bool:
    """Whether a program's JSON can hold `value`."""
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str | torch.Tensor)


def _tensors(bound: Any) -> Iterator[torch.Tensor]:
    for value in bound.values() if isinstance(bound, dict) else bound:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def record_head(
    stack: DecoderBlocks, ids: torch.Tensor, other: torch.Tensor
) -> tuple[Program, dict[str, torch.Tensor]]:
    """The tail of `stack` as a program and its tensors; `ids`, `other`: two batches of one shape.

    Raises `ModelError` where the tail is no function of the last block's output alone, or uses an
    operation that no program has.
    """
    tapes = []
    for number, (batch, length) in enumerate(SHAPES):
        # Other tokens in every recording, and residuals of yet others: no constant may follow them.
        own, tokens = (
            torch.roll(t, (number, number), (0, 1))[:batch, :length].clone() for t in (ids, other)
        )
        tapes.append(
            record_program(
                lambda h, tokens=tokens: stack.run_tail(h, tokens), stack.residuals(own)[-1]
            )
        )
    return generalize(tapes, SHAPES)


def record_program(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Recording:
    """What `function` does to `x`, as far as its result needs it."""
    # Not under inference mode: there composite operators stay whole.
    with torch.inference_mode(False), torch.no_grad():
        x = x.clone()
        with Recorder(x) as recorder:
            out = function(x)
        return prune(recorder.tape, recorder.place(out))


def prune(tape: Recording, output: int) -> Recording:
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
    return Recording(nodes, tape.tensors)


def _renumber(value: Any, order: Mapping[int, int]) -> Any:
    if isinstance(value, Mapping) and set(value) == {"node"}:
        return {"node": order[value["node"]]}
    if isinstance(value, Mapping):
        return {key: _renumber(item, order) for key, item in value.items()}
    return [_renumber(item, order) for item in value] if isinstance(value, list) else value


def generalize(
    tapes: list[Recording], shapes: Sequence[tuple[int, int]]
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

    def __init__(self, tapes: list[Recording], shapes: Sequence[tuple[int, int]]) -> None:
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
