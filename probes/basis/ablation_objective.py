"""`AblationObjective`: mean KL of ablating directions of a layer, and its exact gradient.

The rows come in groups (`BasisRows`); `GroupEvaluator` evaluates one group, in this process or on
a worker of a dask cluster, and `AblationObjective` sums the groups in their order. So the sums do
not depend on the number of threads or workers.

A direction has an encoder and a decoder, `(d_model,)` each (`layer_basis.py`); the lens maps a
decoder to an output direction, decoder W. The methods (`methods.py`) change bases of `coordinates`.
"""

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cache.cluster import results, threads_of
from ...cache.devices import copy_to_device, copy_to_host, is_out_of_memory, release_memory
from ...cache.errors import UsageError
from ...cache.head.head import Head, TorchHead
from ..lens.natural_gradient import sampled_slopes
from ..ridge.solver import AffineMap
from ..training.threads import CPU, ThreadCrew, thread_pool
from .basis_rows import BasisRows, divide_rows
from .kept_rows import CLEAN, TOKENS, KeptRows, plan_places
from .lens_kl import (
    CleanRows,
    ExplicitLensKL,
    LensKL,
    OutputDirections,
    gradients_at,
    make_lens_kl,
)

Directions = tuple[np.ndarray, np.ndarray]
"""Encoder and decoder, `(k, d_model)` each."""
ALONG_BYTES = 64 << 20
"""Most bytes of the directions by tokens that are in memory at a time."""
FEWEST_ROWS = 8
"""Rows of the smallest block, where the memory of a device runs out."""
SAMPLES = 4
"""Tokens drawn for each row of the Fisher matrix."""


@dataclass(frozen=True, eq=False)
class ObjectiveSpec:
    """All that a worker needs to evaluate groups of rows."""

    rows: BasisRows
    map: AffineMap
    """The lens's map to the last layer."""
    memory: int
    """Bytes for tensors that are kept between evaluations, on each worker."""
    scratch: Path | None = None
    """Folder of a scratch file for those that do not fit."""
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    """Device of all products, on each worker."""

    @property
    def key(self) -> str:
        """Digest of cache, layer, rows, map and device."""
        rows = self.rows
        names = rows.cache.id, rows.layer, rows.seed, self.dtype, self.device
        hasher = hashlib.sha256(" ".join(map(str, names)).encode())
        for array in (rows.positions, rows.reference, self.map.weight, self.map.bias):
            if array is not None:
                hasher.update(np.ascontiguousarray(array).data)
        return hasher.hexdigest()


@dataclass(frozen=True, eq=False)
class GroupSums:
    """Sums over the rows of a group."""

    loss: float
    """KL in nats."""
    encoder: np.ndarray
    """Gradient in the encoder, `(k, d)` float64."""
    output: np.ndarray
    """Gradient in the output directions, `(k, d)` float64."""
    seconds: float
    """CPU seconds of the thread."""


def tensor_widths(head: Head) -> dict[str, int]:
    """Columns of the tensors that are kept for rows, by name."""
    has_formula = head.kind == "explicit"
    needs_expected = has_formula and head.softcap is None
    return {
        "differences": head.d_model,
        "output": head.d_model,
        "expected": head.d_model if needs_expected else 0,
        "log_z": 1,
        "tokens": head.vocab if has_formula else 0,
    }


def tensor_dtypes(dtype: torch.dtype, wide: torch.dtype = torch.float64) -> dict[str, torch.dtype]:
    """Dtypes of these tensors, for products in `dtype` and sums in `wide`."""
    names = ("differences", "output", "expected", "tokens")
    return {**dict.fromkeys(names, dtype), "log_z": wide}


def bytes_beyond_memory(head: Head, n: int, memory: int) -> int:
    """Bytes of the tensors of `n` rows that do not fit `memory`."""
    return plan_places(
        divide_rows(n), tensor_widths(head), tensor_dtypes(torch.float32), memory
    ).rest_bytes


class GroupEvaluator:
    """Evaluates groups of the rows of a spec; keeps what evaluations share (`KeptRows`)."""

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.spec = spec
        self.rows: BasisRows = spec.rows
        self.device: torch.device = spec.device
        self.kl: LensKL = make_lens_kl(spec.rows.cache.head, spec.dtype, spec.device)
        self.groups: list[slice] = self.rows.groups()
        self.weight: Tensor = self._tensor(spec.map.weight)
        self.bias: Tensor = self._tensor(spec.map.bias)
        widths = tensor_widths(spec.rows.cache.head)
        dtypes = tensor_dtypes(self.kl.dtype, self.kl.wide)
        self.kept: KeptRows = KeptRows(
            self.groups, widths, dtypes, spec.memory, spec.scratch, device=spec.device
        )
        self._along_lock = threading.Lock()
        self._along: tuple[bytes, OutputDirections] | None = None

    @cached_property
    def head(self) -> TorchHead:
        """The head with its own copy of the unembedding, for what needs the full gradient."""
        return self.rows.cache.head.torch(self.device)

    def call(self, method: str, number: int, *args: Any) -> Any:
        """Result of a `method` for group `number`; with smaller blocks where memory runs out."""
        while True:
            try:
                return getattr(self, method)(number, *args)
            except (RuntimeError, MemoryError) as error:
                is_smallest = self.kl.block_rows <= FEWEST_ROWS
                if self.device.type == "cpu" or is_smallest or not is_out_of_memory(error):
                    raise
            # Outside of `except`: the traceback of the error holds tensors.
            self.kl.block_rows = max(FEWEST_ROWS, self.kl.block_rows // 2)
            self.kept.forget()
            release_memory(self.device)

    def _tensor(self, array: np.ndarray) -> Tensor:
        """A copy of `array` on the device, in the dtype of the products."""
        return copy_to_device(torch.tensor(array, dtype=self.kl.dtype), self.device)

    def _wide_zeros(self, *shape: int) -> Tensor:
        """Zeros on the device in the dtype of sums."""
        return self.weight.new_zeros(shape, dtype=self.kl.wide)

    def gradient(self, number: int, encoder: np.ndarray, output: np.ndarray) -> GroupSums:
        """KL of group `number` and its gradients, for an encoder and output directions `(k, d)`."""
        start = time.thread_time()
        differences, clean = self._clean(number)
        along = self._output_directions(output)
        encoder_tensor = self._tensor(encoder)
        token_gradient = self.kl.zero_token_gradient(len(output))
        loss = 0.0
        encoder_gradient = self._wide_zeros(*encoder.shape)
        output_gradient = self._wide_zeros(*output.shape)
        for block, tokens in self._token_blocks(number, clean):
            rows = differences[block]
            losses, gradient = self.kl.losses_and_gradient(
                clean[block],
                tokens,
                rows @ encoder_tensor.T,
                along,
                token_gradient,
            )
            loss += float(losses.sum())
            encoder_gradient += (gradient.coordinates.T @ rows).to(self.kl.wide)
            output_gradient += gradient.directions
        output_gradient += self.kl.finish_directions(token_gradient)
        seconds = time.thread_time() - start
        return GroupSums(
            loss, float64_array(encoder_gradient), float64_array(output_gradient), seconds
        )

    def losses(
        self, number: int, ablations: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, float]:
        """KL `(ablations, n)` of each row of group `number`, and CPU seconds.

        `ablations` are pairs of an encoder and output directions.
        """
        start = time.thread_time()
        differences, clean = self._clean(number)
        encoders = [self._tensor(encoder) for encoder, _ in ablations]
        losses = np.empty((len(ablations), len(differences)))
        for chunk in self._chunks(ablations):
            alongs = [self._prepare_directions(ablations[i][1]) for i in chunk]
            for block, tokens in self._token_blocks(number, clean):
                for i, along in zip(chunk, alongs, strict=True):
                    coordinates = differences[block] @ encoders[i].T
                    values = self.kl.losses(clean[block], tokens, coordinates, along)
                    losses[i, block] = float64_array(values)
        return losses, time.thread_time() - start

    def full_gradient(self, number: int) -> tuple[np.ndarray, float]:
        """Sum of D' g over group `number`, `(d, d)` float64, and CPU seconds.

        D are the rows less their references, g the gradients of the KL in the translated row where
        the whole row is ablated. The gradient of the mean KL in the projector at full ablation
        follows from it (`methods.py`).
        """
        start = time.thread_time()
        differences, clean = self._clean(number)
        row = self.rows.reference
        if isinstance(self.kl, ExplicitLensKL) and self.kl.softcap is None and row is not None:
            reference = self._tensor(row)
            output = self.kl.centred((reference @ self.weight + self.bias)[None])[0]
            slopes = self.kl.reference_gradients(clean, output)
        else:
            ablated = clean.output - self.kl.centred(differences @ self.weight)
            slopes = gradients_at(clean.output, ablated, self.head)
        total = self._wide_zeros(differences.shape[1], slopes.shape[1])
        total += differences.T @ slopes.to(differences.dtype)
        return float64_array(total), time.thread_time() - start

    def fisher(self, number: int) -> tuple[np.ndarray, float]:
        """Sum over group `number` of the Fisher matrix of the lens's distribution, CPU seconds.

        `(d, d)` float64, in the translated row: E[g g'] with g the gradient of -log q[y], for
        `SAMPLES` tokens y drawn from q.
        """
        start = time.thread_time()
        output = self._clean(number)[1].output.float()
        generator = torch.Generator().manual_seed(self.rows.seed + number)
        total = self._wide_zeros(output.shape[1], output.shape[1])
        for _ in range(SAMPLES):
            slopes = sampled_slopes(output, self.head, generator)
            total += slopes.T @ slopes
        return float64_array(total / SAMPLES), time.thread_time() - start

    def second_moments(self, number: int) -> tuple[np.ndarray, float]:
        """Sum of D D' over group `number`, `(d, d)` float64, and CPU seconds."""
        start = time.thread_time()
        differences = self._clean(number)[0].to(self.kl.wide)
        return float64_array(differences.T @ differences), time.thread_time() - start

    def close(self) -> None:
        """Free what is kept."""
        self.kept.close()

    def _clean(self, number: int) -> tuple[Tensor, CleanRows]:
        """Rows of a group less their references, `(n, d)`, and their clean side."""
        group = self.groups[number]

        def make() -> tuple[Tensor, ...]:
            states = self.rows.states(group)
            if self.kl.dtype == torch.float64:
                states = states.astype(np.float64)
            differences = self.rows.differences(group, states)
            rows = self._tensor(states)
            translated = torch.addmm(self.bias, rows, self.weight)
            clean = self.kl.clean_rows(translated, partial(self._keep_tokens, number))
            kept = self._tensor(differences)
            return kept, clean.output, clean.expected, clean.log_z[:, None]

        whole = slice(0, group.stop - group.start)
        differences, output, expected, log_z = self.kept.get(CLEAN, number, whole, make)
        return differences, CleanRows(output, expected, log_z[:, 0])

    def _keep_tokens(self, number: int, part: slice, tokens: Tensor) -> None:
        self.kept.put(TOKENS, number, part, (tokens,))

    def _token_blocks(self, number: int, clean: CleanRows) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of the rows of a group, and their products A, `(n, vocab)`."""
        for part in self.kl.parts(len(clean.output)):

            def make(part: slice = part) -> tuple[Tensor, ...]:
                return (self.kl.clean_token_part(clean.output[part]),)

            (tokens,) = self.kept.get(TOKENS, number, part, make)
            for block in self.kl.blocks(part.stop - part.start):
                yield slice(part.start + block.start, part.start + block.stop), tokens[block]

    def _output_directions(self, output: np.ndarray) -> OutputDirections:
        """The output directions by tokens; those of the last call are kept."""
        key = output.tobytes()
        with self._along_lock:
            if self._along is None or self._along[0] != key:
                self._along = key, self._prepare_directions(output)
            return self._along[1]

    def _prepare_directions(self, output: np.ndarray) -> OutputDirections:
        """`output_directions` of an array `(k, d)`."""
        # In the dtype of the products at once: the device may lack that of the array.
        return self.kl.output_directions(self._tensor(output))

    def _chunks(self, ablations: Sequence[Directions]) -> list[list[int]]:
        """Numbers of ablations whose directions by tokens fit `ALONG_BYTES` together."""
        chunks: list[list[int]] = [[]]
        size = 0
        for number, (encoder, _) in enumerate(ablations):
            bytes_ = (len(encoder) + 2) * self.kl.vocab * self.kl.dtype.itemsize
            if chunks[-1] and size + bytes_ > ALONG_BYTES:
                chunks.append([])
                size = 0
            chunks[-1].append(number)
            size += bytes_
        return chunks


class AblationObjective:
    """Sums of a `GroupEvaluator` over all groups, by threads or by the workers of `client`."""

    def __init__(self, spec: ObjectiveSpec, client: Any = None) -> None:
        self.spec = spec
        self.client = client
        self.n: int = spec.rows.n
        self.groups: list[slice] = spec.rows.groups()
        self.seconds: float = 0.0
        """CPU seconds of all evaluations so far."""
        self.evaluations: float = 0.0
        """Evaluations with gradient so far; of a part of the rows, that part of one."""
        self.weight: np.ndarray = spec.map.weight.astype(np.float64)
        """The lens's map, `(d, d)` float64."""
        self._key = spec.key
        self._evaluator: GroupEvaluator | None = None
        self._spec_on_workers: Any = None
        self._workers: list[str] = []
        self._exit = ExitStack()

    def __enter__(self) -> "AblationObjective":
        if self.client is None:
            self._evaluator = GroupEvaluator(self.spec)
            # One of torch's threads for each group: bits must not depend on their number.
            threads = ThreadCrew.of(max(1, len(self.groups)), self.spec.device).workers
            self._crew = self._exit.enter_context(ThreadCrew(threads))
            self._exit.callback(self._evaluator.close)
        else:
            self._workers = sorted(threads_of(self.client))
            self._spec_on_workers = self.client.scatter(self.spec, broadcast=True, hash=False)
            self._exit.callback(self.client.run, forget_evaluator, self._key)
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()
        self._evaluator = None

    def evaluate(
        self, directions: Directions, groups: int | None = None
    ) -> tuple[float, np.ndarray, np.ndarray]:
        """Mean KL in nats of ablating `directions`, and its gradients in encoder and decoder.

        Over all rows, or those of the first `groups` groups. Gradients are `(k, d)` float64.
        """
        encoder, decoder = directions
        output = decoder @ self.weight
        numbers = range(len(self.groups) if groups is None else min(groups, len(self.groups)))
        rows = sum(self.groups[i].stop - self.groups[i].start for i in numbers)
        loss, encoder_gradient, output_gradient = (
            0.0,
            np.zeros(encoder.shape),
            np.zeros(output.shape),
        )
        for sums in self._map("gradient", numbers, encoder, output):
            loss += sums.loss
            encoder_gradient += sums.encoder
            output_gradient += sums.output
            self.seconds += sums.seconds
        self.evaluations += rows / self.n
        return loss / rows, encoder_gradient / rows, output_gradient @ self.weight.T / rows

    def sum_losses(
        self, directions: Sequence[Directions], units: np.ndarray, n_units: int
    ) -> np.ndarray:
        """Sums of the KL by unit for each of the ablations `directions`; `(ablations, units)`.

        `units` `(n,)` is the number of the unit (a document) of each row.
        """
        ablations = [(encoder, decoder @ self.weight) for encoder, decoder in directions]
        numbers = range(len(self.groups))
        sums = np.zeros((len(ablations), n_units))
        losses_by_group = self._map("losses", numbers, ablations)
        for group, (losses, seconds) in zip(self.groups, losses_by_group, strict=True):
            for ablation, values in enumerate(losses):
                sums[ablation] += np.bincount(units[group], values, n_units)
            self.seconds += seconds
        return sums

    def mean_matrix(self, name: str) -> np.ndarray:
        """Mean over the rows of a matrix of `GroupEvaluator`: `full_gradient`, `fisher` or
        `second_moments`; `(d, d)` float64."""
        total: Any = 0.0
        for matrix, seconds in self._map(name, range(len(self.groups))):
            total = total + matrix
            self.seconds += seconds
        if not np.isfinite(total).all():
            raise undefined_kl_error(self.spec.rows.layer)
        return total / self.n

    def _map(self, method: str, numbers: Sequence[int], *args: Any) -> Iterator[Any]:
        """Results of `method` of the evaluator for the groups `numbers`, in their order."""
        if self._evaluator is not None:
            evaluator = self._evaluator
            yield from self._crew.map(lambda i: evaluator.call(method, i, *args), numbers)
            return
        # A group goes to the worker that keeps its rows, or to another where that one is gone.
        calls = [(self._spec_on_workers, self._key, (method, number, args)) for number in numbers]
        yield from results(self.client, evaluate_on_worker, calls, self._workers)


def float64_array(tensor: Tensor) -> np.ndarray:
    """A tensor of any device as a numpy array, float64."""
    return copy_to_host(tensor).double().numpy()


def undefined_kl_error(layer: int) -> UsageError:
    """The error for a KL that is NaN or infinite."""
    return UsageError(
        f"the KL of ablating directions of layer {layer} is not finite: the lens or the rows hold "
        "values without a distribution; fit the lens again, or extract the cache with "
        "dtype='float32'"
    )


_evaluators: dict[str, GroupEvaluator] = {}
"""Evaluators of this worker by the key of their spec."""
_evaluators_lock = threading.Lock()
_group_locks: dict[tuple[str, int], threading.Lock] = {}
"""One thread at a time works on a group: `KeptRows` asks for that."""


def evaluate_on_worker(
    spec: ObjectiveSpec, key: str, call: tuple[str, int, tuple[Any, ...]]
) -> Any:
    """Result of a method of the evaluator of `spec` for one group; the evaluator is kept."""
    method, number, args = call
    with _evaluators_lock:
        if key not in _evaluators:
            _evaluators[key] = GroupEvaluator(spec)
        evaluator = _evaluators[key]
        lock = _group_locks.setdefault((key, number), threading.Lock())
    with lock, thread_pool(1) as pool:  # one of torch's threads, as in a single process
        return pool.submit(evaluator.call, method, number, *args).result()


def forget_evaluator(key: str) -> None:
    """Free the evaluator of `key` on this worker."""
    with _evaluators_lock:
        evaluator = _evaluators.pop(key, None)
        for group in [group for group in _group_locks if group[0] == key]:
            del _group_locks[group]
    if evaluator is not None:
        evaluator.close()
