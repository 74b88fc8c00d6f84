"""Recording of a model's tail (last block's output to logits) as a head program.

For models whose head is no norm, linear map, scale and softcap (`identify_head.py`); called by
`cache/checks/model_checks.py`. The tail runs eagerly under a `TorchDispatchMode` on three batches
of different shapes and tokens (`record_program`). From each recording only the operations between
the residual stream and the logits remain. `merge_recordings` makes one `Program` (`program.py`) of
the three: a number that differs becomes a function of batch and length; a tensor that differs
depends on the tokens, and the model is refused with a `ModelError`.
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
NAMES = {
    "view": "reshape",
    "_unsafe_view": "reshape",
    "reshape": "reshape",
    "_reshape_alias": "reshape",
    "_softmax": "softmax",
    "native_layer_norm": "layer_norm",
    "_fused_rms_norm": "rms_norm",
    "constant_pad_nd": "pad",
}
"""aten operator -> operation of a program, where the names differ."""
IDENTITIES = {"detach", "alias", "clone", "_to_copy", "contiguous", "lift_fresh"}
"""Operators that change no value; casts between floats count, as programs run in float32."""
IGNORED_ARGUMENTS = {
    "half_to_float",
    "dtype",
    "memory_format",
    "rounding_mode",
    "implicit",
    "layout",
}
"""Arguments of aten operators that a program leaves out."""


def record_head(
    blocks: DecoderBlocks, ids: torch.Tensor, other_ids: torch.Tensor
) -> tuple[Program, dict[str, torch.Tensor]]:
    """Record the tail of `blocks` as a program and its tensors.

    `ids` and `other_ids` are two batches of token ids of one shape, at least as large as `SHAPES`.
    Raises `ModelError` if the tail is no function of the last block's output alone, or uses an
    operation that programs lack.
    """
    recordings = []
    for shift, (batch, length) in enumerate(SHAPES):
        # Each recording reads different tokens, and residuals of yet different tokens, so that a
        # constant that follows either differs between the recordings.
        residual_ids, tail_ids = (
            torch.roll(tokens, (shift, shift), (0, 1))[:batch, :length].clone()
            for tokens in (ids, other_ids)
        )
        recordings.append(
            record_program(
                lambda hidden, tail_ids=tail_ids: blocks.run_tail(hidden, tail_ids),
                blocks.residuals(residual_ids)[-1],
            )
        )
    return merge_recordings(recordings, SHAPES)


@dataclass
class Recording:
    """Operations of one run of the tail, with the tensors that they read."""

    nodes: list[Node] = field(default_factory=list)
    """Operations in order of execution; a tensor argument is `{"tensor": index into tensors}`."""
    tensors: list[torch.Tensor] = field(default_factory=list)
    """Constants: parameters, buffers, and tensors made without the residual stream."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Number of a node that no program can express (the first node is 1) -> reason."""


def record_program(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Recording:
    """Record the operations of `function(x)` that its result depends on."""
    # Not under inference mode, in which composite operators stay whole.
    with torch.inference_mode(False), torch.no_grad():
        x = x.clone()
        with Recorder(x) as recorder:
            out = function(x)
        return prune_recording(recorder.recording, recorder.node_of(out))


class Recorder(TorchDispatchMode):
    """Records every operation on values that depend on the tensor `x`, while the mode is active."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.recording: Recording = Recording()
        self._node_by_id: dict[int, int] = {id(x): 0}
        self._constant_by_id: dict[int, int] = {}
        # Identities of objects are unique only while the objects live.
        self._references: list[Any] = [x]
        # Addresses of memory that was filled through a constant or a view, so that tensors other
        # than the operator's result may have changed too.
        self._mutated_storages: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        arguments = _arguments_by_name(func, args, kwargs)
        if any(self._find_node(tensor) is not None for tensor in _tensors_in(arguments)):
            self._references += [arguments, out]
            self._record(func, arguments, out)
        return out

    def node_of(self, tensor: torch.Tensor) -> int:
        """Number of the node that gave `tensor`; raises `ModelError` if none did."""
        node = self._find_node(tensor)
        if node is None:
            raise ModelError("the logits do not come from the last block's output")
        return node

    def _find_node(self, tensor: torch.Tensor) -> int | None:
        """Number of the node that gave `tensor`; None for a constant."""
        node = self._node_by_id.get(id(tensor))
        if node is None and tensor.untyped_storage().data_ptr() in self._mutated_storages:
            return self._refuse("a tensor is filled in place")
        return node

    def _refuse(self, reason: str) -> int:
        """Add a node that no program can express; an error only if the output depends on it."""
        self.recording.nodes.append(Node("refused", {}))
        self.recording.reasons[len(self.recording.nodes)] = reason
        return len(self.recording.nodes)

    def _record(self, func: Any, arguments: dict[str, Any], out: Any) -> None:
        """Add the nodes of one operator call, and note which node gave which tensor of `out`."""
        name = func.overloadpacket.__name__
        first = next(iter(arguments.values()))

        # An in-place operator (`add_`) is recorded as the plain one (`add`). If the filled memory
        # may belong to further tensors, these are refused where the program would read them.
        if name.endswith("_") and not name.startswith("_"):
            if self._node_by_id.get(id(first)) is None or first._is_view():
                self._mutated_storages.add(first.untyped_storage().data_ptr())
            name = name[:-1]

        # Operators that change no value add no node.
        if name in IDENTITIES:
            self._node_by_id[id(out)] = (
                self.node_of(first)
                if out.is_floating_point()
                else self._refuse("a cast to integers")
            )
        # One result: one node.
        elif isinstance(out, torch.Tensor):
            self._node_by_id[id(out)] = self._add_node(name, arguments)
        # Splits: a slice per result.
        elif name in ("split", "split_with_sizes", "unbind", "chunk"):
            for tensor, node in zip(out, self._add_slices(name, arguments, out), strict=True):
                self._node_by_id[id(tensor)] = node
        # Several results (layer norm also gives mean and deviation): programs have the first.
        elif isinstance(out, tuple | list):
            tensors = (tensor for tensor in out if isinstance(tensor, torch.Tensor))
            for position, tensor in enumerate(tensors):
                is_known = position == 0 and NAMES.get(name, name) in OPS
                self._node_by_id[id(tensor)] = (
                    self._add_node(name, arguments)
                    if is_known
                    else self._refuse(f"a result of {name}")
                )

    def _add_slices(self, name: str, arguments: dict[str, Any], out: Any) -> Iterator[int]:
        """Add a `slice` or `select` node per piece of a split tensor; yields their numbers."""
        source, dim, start = arguments["self"], arguments.get("dim", 0), 0
        for number, piece in enumerate(out):
            if name == "unbind":
                yield self._add_node("select", {"self": source, "dim": dim, "index": number})
            else:
                end = start + piece.shape[dim]
                yield self._add_node(
                    "slice", {"self": source, "dim": dim, "start": start, "end": end}
                )
                start = end

    def _add_node(self, name: str, arguments: dict[str, Any]) -> int:
        """Add the node of an aten operator, or a refused one; returns its number."""
        op = NAMES.get(name, name)
        if op not in OPS:
            return self._refuse(f"the operator {name} is not one of a head program")
        if arguments.get("rounding_mode") is not None or arguments.get("half_to_float"):
            return self._refuse(f"the operator {name} rounds")

        # Every argument that changes the result must be one that the program's operation has.
        relevant = {k: v for k, v in arguments.items() if k not in IGNORED_ARGUMENTS}
        accepted = {k: v for k, v in relevant.items() if k in OPS[op].allowed}
        excess = [k for k, v in relevant.items() if k not in accepted and v is not None]
        if excess:
            return self._refuse(f"the operator {name} has {excess[0]}")
        if not all(_is_expressible(value) for value in accepted.values()):
            return self._refuse(f"the operator {name} has an argument that is no number")

        values = {key: self._program_value(value) for key, value in accepted.items()}
        self.recording.nodes.append(Node(op, values))
        return len(self.recording.nodes)

    def _program_value(self, value: Any) -> Any:
        """An argument as programs write it: `{"node": number}`, `{"tensor": number}` or itself."""
        if isinstance(value, torch.Tensor):
            node = self._find_node(value)
            return {"node": node} if node is not None else {"tensor": self._add_constant(value)}
        if isinstance(value, list | tuple):
            return [self._program_value(item) for item in value]
        return value

    def _add_constant(self, tensor: torch.Tensor) -> int:
        """Number of `tensor` among the recording's tensors, added on first use."""
        if id(tensor) not in self._constant_by_id:
            self._constant_by_id[id(tensor)] = len(self.recording.tensors)
            self.recording.tensors.append(tensor)
        return self._constant_by_id[id(tensor)]


def _arguments_by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of an aten operator by name, defaults included."""
    arguments = {}
    for number, argument in enumerate(func._schema.arguments):
        if number < len(args):
            arguments[argument.name] = args[number]
        elif argument.name in kwargs:
            arguments[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            arguments[argument.name] = argument.default_value
    return arguments


def _tensors_in(arguments: Any) -> Iterator[torch.Tensor]:
    """All tensors of a dict or (nested) list of arguments."""
    for value in arguments.values() if isinstance(arguments, dict) else arguments:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)


def _is_expressible(value: Any) -> bool:
    """Whether a program's JSON can hold `value`: finite numbers, strings, tensors, lists, None."""
    if isinstance(value, list | tuple):
        return all(_is_expressible(item) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str | torch.Tensor)


def prune_recording(recording: Recording, output: int) -> Recording:
    """Keep only the nodes that node `output` depends on, renumbered from 1.

    Raises `ModelError` if a needed node is a refused one.
    """
    # Walk back from the output; node 0 is the input.
    needed, pending = set(), [output]
    while pending:
        if (number := pending.pop()) and number not in needed:
            needed.add(number)
            pending += references(dict(recording.nodes[number - 1].args))
    reasons = [recording.reasons[n] for n in sorted(needed) if n in recording.reasons]
    if reasons:
        raise ModelError(f"the tail cannot be kept as a head program: {reasons[0]}")

    new_number = {old: new for new, old in enumerate(sorted(needed), 1)} | {0: 0}
    needed_nodes = [recording.nodes[number - 1] for number in sorted(needed)]
    nodes = [Node(node.op, _renumber_references(node.args, new_number)) for node in needed_nodes]
    return Recording(nodes, recording.tensors)


def _renumber_references(value: Any, new_number: Mapping[int, int]) -> Any:
    """An argument, or a mapping of them, with every `{"node": n}` renumbered."""
    if isinstance(value, Mapping) and set(value) == {"node"}:
        return {"node": new_number[value["node"]]}
    if isinstance(value, Mapping):
        return {key: _renumber_references(item, new_number) for key, item in value.items()}
    if isinstance(value, list):
        return [_renumber_references(item, new_number) for item in value]
    return value


def merge_recordings(
    recordings: list[Recording], shapes: Sequence[tuple[int, int]]
) -> tuple[Program, dict[str, torch.Tensor]]:
    """Make one program, and its tensors by name, from recordings at `shapes` (batch, length).

    Raises `ModelError` if the recordings differ by more than their sizes.
    """
    if len({tuple(node.op for node in recording.nodes) for recording in recordings}) != 1:
        raise ModelError("the tail does other operations on other batches")
    merger = _ValueMerger(recordings, shapes)
    nodes = []
    for versions in zip(*(recording.nodes for recording in recordings), strict=True):
        first = versions[0]
        args = {key: merger.merge([node.args[key] for node in versions]) for key in first.args}
        nodes.append(Node(first.op, args))
    return Program(tuple(nodes)), merger.tensors


class _ValueMerger:
    """Merges the values of one argument in all recordings into one value of the program."""

    def __init__(self, recordings: list[Recording], shapes: Sequence[tuple[int, int]]) -> None:
        self.recordings = recordings
        self.shapes = shapes
        self.tensors: dict[str, torch.Tensor] = {}
        """Tensors of the program by name: `t0`, `t1`, ..."""
        self._names: dict[tuple[int, ...], str] = {}

    def merge(self, values: list[Any]) -> Any:
        """The program's value: a tensor name, a list, a constant, or a function of the sizes."""
        first = values[0]
        if isinstance(first, dict) and "tensor" in first:
            return {"tensor": self._tensor_name(tuple(value["tensor"] for value in values))}
        if isinstance(first, list) and len({len(value) for value in values}) == 1:
            return [self.merge(list(items)) for items in zip(*values, strict=True)]
        if all(value == first and type(value) is type(first) for value in values):
            return first
        return {"size": self._size_formula(values)}

    def _tensor_name(self, numbers: tuple[int, ...]) -> str:
        """Name of the tensor that has number `numbers[i]` in recording i."""
        if numbers not in self._names:
            versions = [
                recording.tensors[number]
                for recording, number in zip(self.recordings, numbers, strict=True)
            ]
            self._names[numbers] = name = f"t{len(self._names)}"
            self.tensors[name] = _common_tensor(versions)
        return self._names[numbers]

    def _size_formula(self, values: list[Any]) -> list[int]:
        """`[k, b, l, o]` with value = k batchᵇ lengthˡ + o for every recording.

        Raises `ModelError` if no such formula gives all values.
        """
        if all(type(value) is int for value in values):
            for batch_power, length_power in ((0, 1), (1, 0), (1, 1)):
                # Two recordings determine k and o, the others must agree.
                units = [batch**batch_power * length**length_power for batch, length in self.shapes]
                factor = (values[0] - values[1]) // (units[0] - units[1])
                offset = values[0] - factor * units[0]
                if values == [factor * unit + offset for unit in units]:
                    return [factor, batch_power, length_power, offset]
        raise ModelError(f"a number in the tail depends on the tokens: {values}")


def _common_tensor(versions: list[torch.Tensor]) -> torch.Tensor:
    """The tensor that all recordings read, with axes that follow the batch's sizes cut to 1.

    Raises `ModelError` if the versions differ, or vary along such an axis.
    """
    if len({tensor.ndim for tensor in versions}) == 1:
        axes = range(versions[0].ndim)
        varying = [axis for axis in axes if len({t.shape[axis] for t in versions}) > 1]
        index = tuple(slice(1) if axis in varying else slice(None) for axis in axes)
        cut = [tensor[index] for tensor in versions]
        is_constant = not varying or all(
            bool((tensor == first).all()) for tensor, first in zip(versions, cut, strict=True)
        )
        if is_constant and all(torch.equal(cut[0], tensor) for tensor in cut[1:]):
            return cut[0].detach()
    raise ModelError("a tensor in the tail depends on the tokens or on the size of the batch")
