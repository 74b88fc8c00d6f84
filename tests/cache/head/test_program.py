"""Head programs: recorded from torch, run by numpy and torch, read from disk as untrusted data."""

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from residua.cache.errors import CorruptError, ModelError, UsageError
from residua.cache.files.json_files import DIGEST_KEY, write_json
from residua.cache.head.head_recording import NAMES, SHAPES, merge_recordings, record_program
from residua.cache.head.operations import OPS, NumpyOperations, TorchOperations
from residua.cache.head.program import Node, Program
from residua.cache.head.program_bounds import check_bounds
from residua.cache.head.program_head import ProgramHead
from residua.cache.head.saved_head import describe_head, load_head

WIDTH = 8
GENERATOR = torch.Generator().manual_seed(0)
MATRIX = torch.randn(WIDTH, WIDTH, generator=GENERATOR)
GAIN, SHIFT = torch.randn(2, WIDTH, generator=GENERATOR)
# fmt: off
FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda x: F.linear(x, MATRIX, GAIN),
    "linear without bias": lambda x: x @ MATRIX.T,
    "batched matrix product": lambda x: torch.bmm(x, MATRIX.expand(len(x), WIDTH, WIDTH)),
    "einsum of streams": lambda x: torch.einsum("bts,sv->btv", x.sigmoid(), MATRIX),
    "layer norm": lambda x: F.layer_norm(x, (WIDTH,), GAIN, SHIFT, 1e-3),
    "bare layer norm": lambda x: F.layer_norm(x, (WIDTH,), None, None, 1e-3),
    "rms norm": lambda x: F.rms_norm(x, (WIDTH,), GAIN, 1e-3),
    "rms norm by hand": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-3) * (1 + GAIN),
    "variance": lambda x: x / (x.var(-1, keepdim=True, unbiased=False) + 1e-3).sqrt(),
    "softcap": lambda x: 2.0 * torch.tanh(x / 2.0),
    "activations": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh") + F.silu(x) + F.relu(x),
    "functions": lambda x: x.abs().sqrt() + x.exp() - x.abs().add(1).log() + x.sin() * x.cos(),
    "more functions": lambda x: torch.erf(x) - x.neg() + (x**2 + 1).reciprocal() + x.sigmoid(),
    "scalars": lambda x: 3 - 2 * x + torch.add(x, x, alpha=0.5) - torch.sub(x, GAIN, alpha=2.0),
    "bounds": lambda x: x.clamp(-0.5, 0.7) + torch.maximum(x, GAIN) - torch.minimum(x, SHIFT),
    "reductions": lambda x: x - x.sum(-1, keepdim=True) + x.amax(-1, keepdim=True),
    "softmax": lambda x: torch.softmax(x, -1),
    "streams": lambda x: x.view(*x.shape[:2], 4, 2).transpose(2, 3).flatten(2),
    "weighted streams": lambda x: (x.unflatten(-1, (2, 4)) * GAIN[:2, None]).sum(2),
    "split": lambda x: torch.cat(x.split(3, -1)[::-1], -1) + torch.stack(x.unbind(-1)[::-1], -1),
    "chunk and select": lambda x: x.chunk(2, -1)[1].select(-1, 0).unsqueeze(-1).expand(-1, -1, 8),
    "permuted": lambda x: (x.permute(1, 0, 2) @ MATRIX).movedim(0, 1).unsqueeze(2).squeeze(2),
    "transposed": lambda x: (MATRIX @ x.flatten(0, 1).t()).t().reshape(x.shape),
    "padded": lambda x: F.pad(x, (0, 0, 3, 0), value=0.5)[:, 3:] + F.pad(x, (2, 0))[..., 2:],
    "in place": lambda x: (x * 2).add_(1.0).mul_(GAIN),
    "cast": lambda x: (x.double().float() * GAIN).contiguous().clone().detach(),
    "a mask of ones": lambda x: x * torch.ones(*x.shape[:2], 1),
}
# fmt: on


def program_of(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[Program, dict[str, torch.Tensor]]:
    inputs = [torch.randn(*shape, WIDTH, generator=GENERATOR) for shape in SHAPES]
    return merge_recordings([record_program(function, x) for x in inputs], SHAPES)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numpy_and_torch_run_what_was_recorded_at_any_shape(name: str) -> None:
    program, tensors = program_of(FUNCTIONS[name])
    program = Program.from_json(json.loads(json.dumps(program.to_json())), set(tensors))
    arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
    for shape in ((5, 9), (1, 1), (1, 40)):
        x = torch.randn(*shape, WIDTH, generator=GENERATOR)
        expected = FUNCTIONS[name](x)
        by_torch = program.run(x, tensors, TorchOperations())
        by_numpy = program.run(x.numpy(), arrays, NumpyOperations())
        assert by_numpy.dtype == np.float32
        torch.testing.assert_close(by_torch, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            torch.from_numpy(np.array(by_numpy)), expected, rtol=1e-5, atol=1e-5
        )


def test_every_operation_is_recorded_by_some_test() -> None:
    recorded_ops = {node.op for f in FUNCTIONS.values() for node in program_of(f)[0].nodes}
    # Where torch has no kernel of its own, its RMS norm is recorded as what it consists of.
    assert set(OPS) - recorded_ops <= {"rms_norm"}
    assert set(NAMES.values()) <= set(OPS)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.cumsum(1), "cumsum"),
        (lambda x: x + torch.arange(x.shape[1])[:, None], "on the size of the batch"),
        (lambda x: x + torch.randn(WIDTH), "depends on the tokens"),
        (lambda x: x * float(torch.randn(())), "a number in the tail depends on the tokens"),
        (lambda x: torch.randn(*x.shape), "do not come from the last block's output"),
        (lambda x: torch.zeros_like(x).copy_(x) * 2, "copy"),
        (lambda x: x.round(), "round"),
        (lambda x: x * x.long(), "a cast to integers"),
        (lambda x: x.clamp(max=float("inf")), "an argument that is no number"),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), "rounds"),
        (lambda x: x.topk(2, -1).values, "topk"),
        (lambda x: x + 1 if x.shape[0] > 2 else x, "other operations on other batches"),
    ],
)
def test_what_is_no_program_is_refused(
    function: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        program_of(function)


def small_program_head() -> ProgramHead:
    def tail(x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.gelu(F.layer_norm(x @ MATRIX, (WIDTH,), GAIN, SHIFT)), MATRIX[:5])

    program, tensors = program_of(tail)
    return ProgramHead(program, {k: t.numpy() for k, t in tensors.items()}, WIDTH, 5)


def test_a_program_head_is_the_same_after_the_disk(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(2, 7, WIDTH)).astype(np.float32)
    small_program_head().save(tmp_path)
    loaded = load_head(tmp_path)
    assert isinstance(loaded, ProgramHead)
    assert describe_head(tmp_path) == loaded.describe()
    assert loaded == small_program_head()
    assert loaded.digest == small_program_head().digest
    assert (loaded.d_model, loaded.vocab, loaded.nbytes) == (WIDTH, 5, small_program_head().nbytes)
    np.testing.assert_allclose(
        loaded.logits(rows), small_program_head().logits(rows), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        loaded.logits(rows[1, 3]), small_program_head().logits(rows)[1, 3], rtol=1e-5
    )
    hidden = torch.from_numpy(rows).requires_grad_()
    out = loaded.torch()(hidden)
    np.testing.assert_allclose(out.detach().numpy(), loaded.logits(rows), rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert hidden.grad is not None


def test_bfloat16_tensors_are_kept_as_they_are(tmp_path: Path) -> None:
    tensors = {k: torch.from_numpy(a).bfloat16() for k, a in small_program_head().tensors.items()}
    small_program_head().save(tmp_path, tensors)
    loaded = load_head(tmp_path)
    assert isinstance(loaded, ProgramHead)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(loaded.tensors[name], tensor.float().numpy())


def test_what_a_program_head_lacks_is_said() -> None:
    for name in ("unembedding", "norm", "eps", "normalize", "scale"):
        with pytest.raises(UsageError, match=f"op program and has no {name}"):
            getattr(small_program_head(), name)
    with pytest.raises(UsageError, match="has no unembedding"):
        _ = small_program_head().torch().unembedding
    assert small_program_head().describe()["kind"] == "program"
    assert "operations" in repr(small_program_head())


def forge_head_json(folder: Path, forge: Callable[[dict[str, Any]], None]) -> None:
    """Change `head.json` and make its digest right again: a forged file, not a damaged one."""
    spec = json.loads((folder / "head.json").read_bytes())
    spec.pop(DIGEST_KEY)
    forge(spec)
    write_json(folder / "head.json", spec)


MEMORY_BOMB = [{"op": "cat", "args": {"tensors": [{"node": n}] * 64, "dim": 2}} for n in range(9)]
"""Would double the memory six times per node."""


def input_with(op: str, **args: Any) -> list[dict[str, Any]]:
    """A program of one node that computes `op` of the input."""
    return [{"op": op, "args": {"self": {"node": 0}, **args}}]


def chain(*ops: dict[str, Any]) -> list[dict[str, Any]]:
    """A program in which each of `ops`, an operation and its arguments, reads the one before."""
    return [
        {"op": op["op"], "args": {"self": {"node": n}} | {k: v for k, v in op.items() if k != "op"}}
        for n, op in enumerate(ops)
    ]


LENGTH = {"size": [1, 0, 1, 0]}
FORGED_PROGRAMS: dict[str, Any] = {
    "a huge power of numbers": [{"op": "pow", "args": {"self": 7, "exponent": 10**9}}],
    "numbers alone": [{"op": "mul", "args": {"self": 2, "other": 3}}],
    "a huge number": input_with("mul", other=10**400),
    "a list repeated": [{"op": "mul", "args": {"self": [{"node": 0}], "other": 10**9}}],
    "a word repeated": [{"op": "mul", "args": {"self": "ab", "other": {"node": 0}}}],
    "a word as an array": [{"op": "neg", "args": {"self": "ab"}}],
    "positions with positions": chain(
        {"op": "mm", "mat2": {"tensor": "t0"}},
        {"op": "reshape", "size": [LENGTH, WIDTH]},
        {"op": "expand", "size": [LENGTH, LENGTH, WIDTH]},
        {"op": "sum", "dim": [0]},
        {"op": "slice", "dim": -1, "start": 0, "end": 5},
        {"op": "reshape", "size": [1, LENGTH, 5]},
    ),
    "attention": chain(
        {"op": "reshape", "size": [LENGTH, WIDTH]},
        {"op": "mm", "mat2": {"node": 0}},
    ),
    "an expansion": input_with("expand", size=[1 << 30, 2, WIDTH]),
    "many copies": [
        {"op": "stack", "args": {"tensors": [{"node": 0}] * 10_000, "dim": n % 3}} for n in range(3)
    ],
    "much work": [{"op": "erf", "args": {"self": {"node": n}}} for n in range(9999)],
    "much padding": chain(*[{"op": "pad", "pad": [1 << 13, 0]}] * 40),
    "many products": chain(*[{"op": "mm", "mat2": {"tensor": "t0"}}] * 9999),
    "axes beyond": input_with("sum", dim=[5]),
    "axes twice": input_with("sum", dim=[0, 0]),
    "too many axes": input_with("reshape", size=[1] * 65),
    "an axis that is an array": input_with("select", dim=0, index={"node": 0}),
    "an empty maximum": chain(
        {"op": "slice", "dim": 2, "start": 3, "end": 3}, {"op": "amax", "dim": [2]}
    ),
    "an array without axes": chain(
        {"op": "sum", "dim": [0, 1, 2]}, {"op": "slice", "dim": 0, "start": 0, "end": 1}
    ),
    "a view of more numbers": input_with("reshape", size=[1 << 40, 1 << 40]),
    "a negative size": input_with("expand", size=[-1, -5, -1]),
    "no axes to join": [{"op": "cat", "args": {"tensors": [], "dim": 0}}],
}
"""What a program of a stranger may ask for; `t0` is a matrix `(WIDTH, WIDTH)`."""
SECONDS, BYTES = 10.0, 256 << 20
"""Most time, which the trace of memory makes tenfold, and memory for the refusal of a program."""


@pytest.mark.parametrize("name", FORGED_PROGRAMS)
def test_a_forged_program_is_refused_before_it_takes_time_or_memory(
    name: str, tmp_path: Path
) -> None:
    small_program_head().save(tmp_path)
    forge_head_json(tmp_path, lambda spec: spec.update(nodes=FORGED_PROGRAMS[name]))
    tracemalloc.start()
    seconds = time.process_time()
    try:
        with pytest.raises(CorruptError, match="head program"):
            load_head(tmp_path)
        assert time.process_time() - seconds < SECONDS
        assert tracemalloc.get_traced_memory()[1] < BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shapes_alone_give_the_shape_that_numpy_gives(name: str) -> None:
    program, tensors = program_of(FUNCTIONS[name])
    arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
    shapes = {key: array.shape for key, array in arrays.items()}
    out = program.run(np.ones((1, 2, WIDTH), np.float32), arrays, NumpyOperations())
    check_bounds(program, shapes, WIDTH, out.shape[-1])
    with pytest.raises(CorruptError, match="head program"):
        check_bounds(program, shapes, WIDTH, out.shape[-1] + 1)


@pytest.mark.parametrize(
    "sizes", [{"vocab": 1 << 27}, {"d_model": 1 << 21}, {"vocab": 0}, {"vocab": 1 << 26}]
)
def test_forged_sizes_of_a_program_are_refused(sizes: dict[str, int], tmp_path: Path) -> None:
    small_program_head().save(tmp_path)
    forge_head_json(tmp_path, lambda spec: spec.update(sizes))
    with pytest.raises(CorruptError, match="is not a head of this format"):
        load_head(tmp_path)


@pytest.mark.parametrize(
    "forge",
    [
        lambda s: s["nodes"][0].update(op="__import__"),
        lambda s: s["nodes"][0].update(op="system"),
        lambda s: s["nodes"][0].update(op=["mm"]),
        lambda s: s["nodes"][0].update(extra=1),
        lambda s: s["nodes"][0]["args"].update(xp={"node": 0}),
        lambda s: s["nodes"][0]["args"].update(out=1),
        lambda s: s["nodes"][-1]["args"].clear(),
        lambda s: s["nodes"][0].update(args={"self": {"node": 9}, "mat2": {"tensor": "t0"}}),
        lambda s: s["nodes"][0].update(args={"self": {"node": -1}, "mat2": {"tensor": "t0"}}),
        lambda s: s["nodes"][0].update(args={"self": {"node": True}, "mat2": {"tensor": "t0"}}),
        lambda s: s["nodes"][0].update(
            op="mm", args={"self": {"node": 0}, "mat2": {"tensor": "x"}}
        ),
        lambda s: s["nodes"][0].update(
            op="expand", args={"self": {"node": 0}, "size": [{"size": [1, 9, 9, 0]}]}
        ),
        lambda s: s["nodes"][0].update(
            op="pad", args={"self": {"node": 0}, "pad": [1 << 50, 0], "value": 0.0}
        ),
        lambda s: s["nodes"][0].update(op="sum", args={"self": {"node": 0}, "dim": "all"}),
        lambda s: s.update(nodes=MEMORY_BOMB),
        lambda s: s.update(nodes=[]),
        lambda s: s.update(nodes="mm"),
        lambda s: s.pop("nodes"),
        lambda s: s.update(vocab=6),
        lambda s: s.update(d_model="8"),
        lambda s: s.update(kind="pickle"),
        lambda s: s.update(tensors="0" * 64),
    ],
)
def test_a_forged_program_is_refused(forge: Callable[[dict], None], tmp_path: Path) -> None:
    small_program_head().save(tmp_path)
    forge_head_json(tmp_path, forge)
    with pytest.raises(CorruptError):
        load_head(tmp_path)


def test_a_program_frees_what_it_no_longer_needs() -> None:
    nodes = [Node("neg", {"self": {"node": n}}) for n in range(20)]
    program = Program(tuple(nodes))
    assert program._last_uses() == {n + 1: [n] for n in range(20)}
