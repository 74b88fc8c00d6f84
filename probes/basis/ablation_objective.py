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
from ...cache.errors import UsageError
from ...cache.head.head import Head, TorchHead
from ..lens.natural_gradient import sampled_slopes
from ..ridge.solver import AffineMap
from ..training.threads import ThreadCrew, thread_pool
from .basis_rows import BasisRows, divide_rows
from .kept_rows import CLEAN, TOKENS, KeptRows, plan_places
from .lens_kl import (
    CleanRows,
    ExplicitLensKL,
    OutputDirections,
    gradients_at,
    make_lens_kl,
)

Directions = tuple[np.ndarray, np.ndarray]
"""Encoder and decoder, `(k, d_model)` each."""
ALONG_BYTES = 64 << 20
"""Most bytes of the directions by tokens that are in memory at a time."""
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

    @property
    def key(self) -> str:
        """Digest of cache, layer, rows and map."""
        rows = self.rows
        hasher = hashlib.sha256(f"{rows.cache.id} {rows.layer} {rows.seed} {self.dtype}".encode())
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


def tensor_dtypes(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Dtypes of these tensors, for products in `dtype`."""
    names = ("differences", "output", "expected", "tokens")
    return {**dict.fromkeys(names, dtype), "log_z": torch.float64}


def bytes_beyond_memory(head: Head, n: int, memory: int) -> int:
    """Bytes of the tensors of `n` rows that do not fit `memory`."""
    return plan_places(
        divide_rows(n), tensor_widths(head), tensor_dtypes(torch.float32), memory
    ).rest_bytes


class GroupEvaluator:
    """Evaluates groups of the rows of a spec; keeps what evaluations share (`KeptRows`)."""

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.spec, self.rows = spec, spec.rows
        self.kl = make_lens_kl(spec.rows.cache.head, spec.dtype)
        self.groups = self.rows.groups()
        self.weight = torch.tensor(spec.map.weight, dtype=self.kl.dtype)
        self.bias = torch.tensor(spec.map.bias, dtype=self.kl.dtype)
        widths, dtypes = tensor_widths(spec.rows.cache.head), tensor_dtypes(self.kl.dtype)
        self.kept = KeptRows(self.groups, widths, dtypes, spec.memory, spec.scratch)
        self._along_lock = threading.Lock()
        self._along: tuple[bytes, OutputDirections] | None = None

    @cached_property
    def head(self) -> TorchHead:
        """The head with its own copy of the unembedding, for what needs the full gradient."""
        return self.rows.cache.head.torch()

    def gradient(self, number: int, encoder: np.ndarray, output: np.ndarray) -> GroupSums:
        """KL of group `number` and its gradients, for an encoder and output directions `(k, d)`."""
        start = time.thread_time()
        differences, clean = self._clean(number)
        along = self._output_directions(output)
        encoder_tensor = torch.tensor(encoder, dtype=self.kl.dtype)
        token_gradient = self.kl.zero_token_gradient(len(output))
        loss = 0.0
        encoder_gradient = torch.zeros(encoder.shape, dtype=torch.float64)
        output_gradient = torch.zeros(output.shape, dtype=torch.float64)
        for block in self.kl.blocks(len(differences)):
            rows = differences[block]
            losses, gradient = self.kl.losses_and_gradient(
                clean[block],
                self._tokens(number, block, clean),
                rows @ encoder_tensor.T,
                along,
                token_gradient,
            )
            loss += float(losses.sum())
            encoder_gradient += (gradient.coordinates.T @ rows).double()
            output_gradient += gradient.directions
        output_gradient += self.kl.finish_directions(token_gradient)
        seconds = time.thread_time() - start
        return GroupSums(loss, encoder_gradient.numpy(), output_gradient.numpy(), seconds)

    def losses(
        self, number: int, ablations: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, float]:
        """KL `(ablations, n)` of each row of group `number`, and CPU seconds.

        `ablations` are pairs of an encoder and output directions.
        """
        start = time.thread_time()
        differences, clean = self._clean(number)
        encoders = [torch.tensor(encoder, dtype=self.kl.dtype) for encoder, _ in ablations]
        losses = np.empty((len(ablations), len(differences)))
        for chunk in self._chunks(ablations):
            alongs = [self.kl.output_directions(torch.tensor(ablations[i][1])) for i in chunk]
            for block in self.kl.blocks(len(differences)):
                tokens = self._tokens(number, block, clean)
                for i, along in zip(chunk, alongs, strict=True):
                    coordinates = differences[block] @ encoders[i].T
                    values = self.kl.losses(clean[block], tokens, coordinates, along)
                    losses[i, block] = values.numpy()
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
            reference = torch.tensor(row, dtype=self.kl.dtype)
            output = self.kl.centred((reference @ self.weight + self.bias)[None])[0]
            slopes = self.kl.reference_gradients(clean, output)
        else:
            ablated = clean.output - self.kl.centred(differences @ self.weight)
            slopes = gradients_at(clean.output, ablated, self.head)
        total = torch.zeros(differences.shape[1], slopes.shape[1], dtype=torch.float64)
        total += differences.T @ slopes.to(differences.dtype)
        return total.numpy(), time.thread_time() - start

    def fisher(self, number: int) -> tuple[np.ndarray, float]:
        """Sum over group `number` of the Fisher matrix of the lens's distribution, CPU seconds.

        `(d, d)` float64, in the translated row: E[g g'] with g the gradient of -log q[y], for
        `SAMPLES` tokens y drawn from q.
        """
        start = time.thread_time()
        output = self._clean(number)[1].output.float()
        generator = torch.Generator().manual_seed(self.rows.seed + number)
        total = torch.zeros(output.shape[1], output.shape[1], dtype=torch.float64)
        for _ in range(SAMPLES):
            slopes = sampled_slopes(output, self.head, generator)
            total += slopes.T @ slopes
        return (total / SAMPLES).numpy(), time.thread_time() - start

    def second_moments(self, number: int) -> tuple[np.ndarray, float]:
        """Sum of D D' over group `number`, `(d, d)` float64, and CPU seconds."""
        start = time.thread_time()
        differences = self._clean(number)[0].double()
        return (differences.T @ differences).numpy(), time.thread_time() - start

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
            rows = torch.tensor(states, dtype=self.kl.dtype)
            translated = torch.addmm(self.bias, rows, self.weight)
            clean = self.kl.clean_rows(translated, partial(self._keep_tokens, number))
            kept = torch.tensor(differences, dtype=self.kl.dtype)
            return kept, clean.output, clean.expected, clean.log_z[:, None]

        whole = slice(0, group.stop - group.start)
        differences, output, expected, log_z = self.kept.get(CLEAN, number, whole, make)
        return differences, CleanRows(output, expected, log_z[:, 0])

    def _keep_tokens(self, number: int, block: slice, tokens: Tensor) -> None:
        self.kept.put(TOKENS, number, block, (tokens,))

    def _tokens(self, number: int, block: slice, clean: CleanRows) -> Tensor:
        """The products A of a block of a group, `(n, vocab)`."""

        def make() -> tuple[Tensor, ...]:
            return (self.kl.clean_token_part(clean.output[block]),)

        return self.kept.get(TOKENS, number, block, make)[0]

    def _output_directions(self, output: np.ndarray) -> OutputDirections:
        """The output directions by tokens; those of the last call are kept."""
        key = output.tobytes()
        with self._along_lock:
            if self._along is None or self._along[0] != key:
                self._along = key, self.kl.output_directions(torch.tensor(output))
            return self._along[1]

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
        self.spec, self.client = spec, client
        self.n = spec.rows.n
        self.groups = spec.rows.groups()
        self.seconds = 0.0
        """CPU seconds of all evaluations so far."""
        self.evaluations = 0.0
        """Evaluations with gradient so far; of a part of the rows, that part of one."""
        self.weight = spec.map.weight.astype(np.float64)
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
            threads = min(len(self.groups), torch.get_num_threads())
            self._crew = self._exit.enter_context(ThreadCrew(max(1, threads)))
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
            yield from self._crew.map(lambda i: getattr(evaluator, method)(i, *args), numbers)
            return
        # A group goes to the worker that keeps its rows, or to another where that one is gone.
        calls = [(self._spec_on_workers, self._key, (method, number, args)) for number in numbers]
        yield from results(self.client, evaluate_on_worker, calls, self._workers)


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


def evaluate_on_worker(spec: ObjectiveSpec, key: str, call: tuple[str, int, tuple]) -> Any:
    """Result of a method of the evaluator of `spec` for one group; the evaluator is kept."""
    method, number, args = call
    with _evaluators_lock:
        if key not in _evaluators:
            _evaluators[key] = GroupEvaluator(spec)
        evaluator = _evaluators[key]
        lock = _group_locks.setdefault((key, number), threading.Lock())
    with lock, thread_pool(1) as pool:  # one of torch's threads, as in a single process
        return pool.submit(getattr(evaluator, method), number, *args).result()


def forget_evaluator(key: str) -> None:
    """Free the evaluator of `key` on this worker."""
    with _evaluators_lock:
        evaluator = _evaluators.pop(key, None)
        for group in [group for group in _group_locks if group[0] == key]:
            del _group_locks[group]
    if evaluator is not None:
        evaluator.close()
