"""Causal bases against the plain torch that a careful user would write, on the same rows.

    python benchmarks/basis.py --quick
    python benchmarks/basis.py                            # half an hour of CPU time
    python benchmarks/basis.py --part step --recompute
    python benchmarks/basis.py --part fit --whole         # the plain fit to its end: ten minutes
    python benchmarks/basis.py --part sample --cache PATH --lens PATH
    python benchmarks/basis.py --part memory --rows 16384

Four parts; the first, second and last on synthetic states (d_model 768, vocabulary 50,257):

step     one loss with gradient: ours, with the products of the rows kept as in a fit, against
         autograd through map, head and log-softmax; plain torch too keeps the clean distribution.
fit      8 directions of 512 rows: our joint fit, set-up included, against the greedy sequence of
         the tuned-lens package (LBFGS, strong Wolfe, one vector after the other), in the euclidean
         metric; KL of ablating the span on 256 other rows. The plain sequence takes minutes: by
         default plain torch searches `--plain-directions` vectors, the search goes on with our
         values and gradients (equal to 1e-4, as `step` prints), and those evaluations count as
         plain ones do.
sample   the package's sample model: four methods, held-out KL of spans, CPU and evaluations.
memory   peak memory of a process that sets up and evaluates a joint fit within `--memory`: with a
         scratch file, and with products computed again in each evaluation.

CPU seconds of one process and one thread. Targets are in `TARGETS`; the last table names them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

import residua
from residua.cache.head.head import Head
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.base.resources import one_blas_thread
from residua.probes.basis.ablation_objective import (
    AblationObjective,
    Directions,
    ObjectiveSpec,
    bytes_beyond_memory,
)
from residua.probes.basis.basis_methods import BasisFinder, top_eigenvectors
from residua.probes.basis.basis_rows import BasisRows
from residua.probes.basis.causal_basis import kept_bytes
from residua.probes.basis.coordinates import AblationCoordinates
from residua.probes.moments.moments import Moments
from residua.probes.ridge.solver import AffineMap
from residua.sample import MODEL_DIR

PARTS = ("step", "fit", "sample", "memory")
METHODS = ("joint", "greedy", "one-shot", "fisher")
TARGETS: dict[str, tuple[str, float]] = {
    "step, k = 1: plain / ours": (">=", 20.0),
    "step, k = 8: plain / ours": (">=", 15.0),
    "fit: CPU of plain greedy / our joint": (">=", 30.0),
    "fit: held-out KL of our joint / plain greedy": (">=", 1.0),
    "sample: held-out KL of joint / one-shot": (">=", 1.15),
    "sample: held-out KL of joint / PCA": (">=", 1.25),
    "sample: held-out KL of joint / greedy": (">=", 1.05),
    "sample: CPU of joint / greedy": ("<=", 0.5),
    "sample: evaluations of joint": ("<=", 30.0),
    "memory: MiB with scratch file": ("<", 2048.0),
    "memory: MiB, computed again": ("<", 2048.0),
}
"""Figure -> comparison and value that it should reach, at the default sizes."""
PLAIN_EVALUATIONS = 100
"""After so many evaluations the plain sequence goes on to its next vector."""
PLAIN_TOLERANCE = 1e-4
"""A relative change of the last evaluation below this ends the search for a vector."""

Evaluate = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""Orthonormal columns `(d, k)` -> mean KL in nats and its gradient `(d, k)`."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50_257)
    parser.add_argument("--step-rows", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=512, help="rows of a plain forward pass")
    parser.add_argument("--rounds", type=int, default=3, help="of a step; the best counts")
    parser.add_argument("--recompute", action="store_true", help="time steps without kept products")
    parser.add_argument("--fit-rows", type=int, default=512)
    parser.add_argument("--plain-directions", type=int, default=2, help="searched by plain torch")
    parser.add_argument("--whole", action="store_true", help="plain torch searches all directions")
    parser.add_argument("--cache", type=Path, help="of the sample part; default: extracted now")
    parser.add_argument("--lens", type=Path, help="folder of a tuned lens of that cache")
    parser.add_argument("--tokens", type=int, default=400_000, help="of the sample model's cache")
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 2, 3, 4])
    parser.add_argument("--positions", type=int, default=16_384, help="of fits in the sample part")
    parser.add_argument("--rows", type=int, default=16_384, help="of the memory part")
    parser.add_argument("--memory", type=int, default=2 << 30, help="bytes, of the memory part")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--quick", action="store_true", help="under a minute; says little")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.d_model, args.vocab, args.rounds = 128, 8192, 2
        args.step_rows, args.batch, args.fit_rows, args.rows = 512, 256, 128, 4096
        args.tokens, args.layers, args.positions, args.memory = 10_240, [3], 512, 160 << 20
    return args


# Synthetic states and their lens.


@dataclass(frozen=True, eq=False)
class Problem:
    """States with a decaying spectrum, and a lens whose gains do not follow it."""

    head: Head
    map: AffineMap
    axes: np.ndarray
    """Axes of the states' variance, one a row, `(d, d)` float32."""
    deviations: np.ndarray
    """Standard deviation along each axis, `(d,)` float32."""

    @classmethod
    def of(cls, d_model: int, vocab: int) -> "Problem":
        rng = np.random.default_rng(0)

        def normal(mean: float, deviation: float, *shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32) * np.float32(deviation) + np.float32(mean)

        axes = np.linalg.qr(normal(0, 1, d_model, d_model))[0]
        deviations = (1 + np.arange(d_model, dtype=np.float32)) ** np.float32(-0.5)
        gains = np.exp(normal(0, 0.7, d_model))
        head = Head(
            norm="layernorm",
            eps=1e-5,
            norm_weight=normal(1, 0.1, d_model),
            norm_bias=normal(0, 0.1, d_model),
            unembedding=normal(0, 4 / d_model**0.5, vocab, d_model),
            bias=normal(0, 0.3, vocab),
        )
        affine = AffineMap((axes.T * gains) @ axes, normal(0, 0.02, d_model))
        return cls(head, affine, axes, deviations)

    def states(self, n: int, seed: int) -> np.ndarray:
        """`(n, d_model)` float32."""
        draw = np.random.default_rng(seed).standard_normal((n, len(self.axes)), np.float32)
        return (draw * self.deviations) @ self.axes


@dataclass(frozen=True)
class HeadAlone:
    """What rows in memory need of a cache."""

    head: Head
    id: str = "synthetic"


@dataclass(frozen=True, eq=False)
class RowsInMemory(BasisRows):
    """Rows of an array in place of a cache's."""

    array: np.ndarray

    @classmethod
    def of(cls, head: Head, array: np.ndarray, reference: np.ndarray) -> "RowsInMemory":
        cache = cast(ActivationCache, HeadAlone(head))
        return cls(cache, 0, np.arange(len(array)), reference, seed=0, array=array)

    def states(self, rows: slice) -> np.ndarray:
        return self.array[rows]


# Ours and plain torch, on the same rows.


def objective_of(
    problem: Problem,
    states: np.ndarray,
    reference: np.ndarray,
    memory: int,
    scratch: Path | None = None,
) -> AblationObjective:
    """Our objective on `states`, ablated to `reference`; `memory` as in a fit."""
    rows = RowsInMemory.of(problem.head, states, reference)
    return AblationObjective(ObjectiveSpec(rows, problem.map, memory, scratch))


def evaluate_with(objective: AblationObjective) -> Evaluate:
    """Our loss and gradient in orthonormal columns, euclidean."""

    def evaluate(columns: np.ndarray) -> tuple[float, np.ndarray]:
        loss, encoder, decoder = objective.evaluate((columns.T, columns.T))
        return loss, (encoder + decoder).T

    return evaluate


class PlainKL:
    """The same loss and gradient by autograd; the clean distribution is computed once."""

    def __init__(
        self, problem: Problem, states: np.ndarray, reference: np.ndarray, batch: int
    ) -> None:
        self.head, self.batch = problem.head.torch(), batch
        self.weight = torch.from_numpy(problem.map.weight)
        self.bias = torch.from_numpy(problem.map.bias)
        self.states, self.reference = torch.from_numpy(states), torch.from_numpy(reference)
        with torch.no_grad():
            clean = [self.log_probabilities(rows) for rows in self.states.split(batch)]
        self.clean = [(log_p.exp(), log_p) for log_p in clean]

    def log_probabilities(self, rows: Tensor) -> Tensor:
        return self.head(rows @ self.weight + self.bias).log_softmax(-1)

    def __call__(self, columns: np.ndarray) -> tuple[float, np.ndarray]:
        vectors = torch.tensor(columns, dtype=torch.float32, requires_grad=True)
        total = 0.0
        for loss in self.batch_losses(vectors):
            loss.backward()
            total += loss.item()
        assert vectors.grad is not None
        return total, vectors.grad.double().numpy()

    @torch.no_grad()
    def loss(self, columns: np.ndarray) -> float:
        vectors = torch.tensor(columns, dtype=torch.float32)
        return sum(loss.item() for loss in self.batch_losses(vectors))

    def batch_losses(self, vectors: Tensor) -> Iterator[Tensor]:
        """Share of each batch in the mean KL of ablating the span of `vectors`."""
        for rows, (p, log_p) in zip(self.states.split(self.batch), self.clean, strict=True):
            ablated = rows - (rows - self.reference) @ vectors @ vectors.T
            log_q = self.log_probabilities(ablated)
            yield (p * (log_p - log_q)).sum() / len(self.states)


def cpu_seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of `work`, and the CPU seconds of this process meanwhile."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


# Part step.


def measure_step(args: argparse.Namespace) -> dict[str, float]:
    """ns per (row, token) of a loss with gradient, and of a loss alone."""
    problem = Problem.of(args.d_model, args.vocab)
    states = problem.states(args.step_rows, 1)
    reference = states.mean(0)
    elements = args.step_rows * args.vocab
    clean_bytes = states.nbytes * 3 + 8 * len(states)
    print(f"\nstep: {args.step_rows} rows x {args.d_model}, vocabulary {args.vocab}", flush=True)

    plain, seconds = cpu_seconds(lambda: PlainKL(problem, states, reference, args.batch))
    print(f"set-up of plain torch {seconds / elements * 1e9:17.1f} ns per (row, token)")
    figures = {}
    with (
        objective_of(problem, states, reference, 1 << 40) as kept,
        objective_of(problem, states, reference, 2 * clean_bytes) as recomputed,
    ):
        ours, again = evaluate_with(kept), evaluate_with(recomputed)
        units = np.zeros(len(states), np.int64)
        first = cpu_seconds(lambda: ours(random_columns(args.d_model, 1)))[1]
        for k in (1, 8):
            columns = random_columns(args.d_model, k)
            directions = [(columns.T, columns.T)]
            works: dict[str, Callable[[], Any]] = {
                "plain": lambda columns=columns: plain(columns),
                "ours": lambda columns=columns: ours(columns),
                "plain, loss alone": lambda columns=columns: plain.loss(columns),
                "ours, loss alone": lambda directions=directions: kept.sum_losses(
                    directions, units, 1
                ),
            }
            if args.recompute:
                again(columns)
                works["ours, computed again"] = lambda columns=columns: again(columns)
            # The first calls are compared; all calls are timed, in turn.
            ((loss, gradient), plain_seconds) = cpu_seconds(works["plain"])
            ((our_loss, our_gradient), our_seconds) = cpu_seconds(works["ours"])
            difference = abs(loss / our_loss - 1)
            gap = np.linalg.norm(gradient - our_gradient) / np.linalg.norm(our_gradient)
            best = {**dict.fromkeys(works, np.inf), "plain": plain_seconds, "ours": our_seconds}
            for _ in range(args.rounds):
                for name, work in works.items():
                    best[name] = min(best[name], cpu_seconds(work)[1])
            if k == 1:
                setup = (first - best["ours"]) / elements * 1e9
                print(f"set-up of ours {setup:24.1f} ns per (row, token)")
                figures["set-up, ns"] = setup
            print(
                f"k = {k}: KL {our_loss:.4f}; differences of loss {difference:.0e}, "
                f"gradient {gap:.0e}"
            )
            for name, seconds in best.items():
                base = best["plain, loss alone" if "alone" in name else "plain"]
                ns = seconds / elements * 1e9
                print(f"  {name:24s} {ns:10.2f} ns per (row, token)   1/{base / seconds:.1f}",
                      flush=True)  # fmt: skip
                figures[f"step, k = {k}: {name}, ns"] = ns
            figures[f"step, k = {k}: plain / ours"] = best["plain"] / best["ours"]
    return figures


def random_columns(d_model: int, k: int) -> np.ndarray:
    """Orthonormal columns `(d_model, k)` float64."""
    return np.linalg.qr(np.random.default_rng(k).normal(size=(d_model, k)))[0]


# Part fit.


@dataclass
class GreedySequence:
    """The search of the tuned-lens package for one direction after the other, by torch's LBFGS."""

    starts: np.ndarray
    """First guess of each direction, `(d, k)`."""
    max_evaluations: int = PLAIN_EVALUATIONS

    def __post_init__(self) -> None:
        self.directions: list[Tensor] = []
        self.evaluations: list[int] = []
        """Of each direction."""

    def search_next(self, evaluate: Evaluate) -> None:
        """Find the next direction, orthogonal to the earlier ones."""
        start = torch.tensor(self.starts[:, len(self.directions)])
        vector = torch.nn.Parameter(self.project(start))
        optimiser = torch.optim.LBFGS(
            [vector], max_iter=self.max_evaluations, line_search_fn="strong_wolfe"
        )
        energies = [0.0]

        def closure() -> Tensor:
            optimiser.zero_grad()
            unit = self.project(vector)
            loss, gradient = evaluate(unit.detach().numpy()[:, None])
            unit.backward(torch.tensor(-gradient[:, 0]))
            energies.append(loss)
            return torch.tensor(-loss)

        while len(energies) <= self.max_evaluations:
            optimiser.step(closure)
            vector.data = self.project(vector.data)
            if abs(energies[-1] - energies[-2]) < PLAIN_TOLERANCE * abs(energies[-1]):
                break
        self.directions.append(vector.detach())
        self.evaluations.append(len(energies) - 1)

    def project(self, vector: Tensor) -> Tensor:
        """`vector` orthogonal to the earlier directions, of norm 1."""
        for direction in self.directions:
            vector = vector - direction * (direction @ vector)
        return vector / vector.norm()


def measure_fit(args: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of fits of 8 directions, and held-out KL of ablating their spans."""
    k, problem = 8, Problem.of(args.d_model, args.vocab)
    states, others = problem.states(args.fit_rows, 1), problem.states(256, 2)
    reference = states.mean(0)
    print(f"\nfit: {k} directions of {args.fit_rows} rows x {args.d_model}, "
          f"vocabulary {args.vocab}; held out: {len(others)} rows", flush=True)  # fmt: skip

    # Ours: set-up and second moments included.
    spans: dict[str, np.ndarray] = {}
    cpu, evaluations = {}, {}
    for method in ("joint", "one-shot", "greedy"):
        start = time.process_time()
        coordinates = AblationCoordinates.of(Moments.of(states, states[:, :1]), "euclidean")
        with objective_of(problem, states, reference, 1 << 40) as objective:
            spans[f"ours, {method}"] = BasisFinder(objective, coordinates, k).find(method)
        cpu[f"ours, {method}"] = time.process_time() - start
        evaluations[f"ours, {method}"] = objective.evaluations
    spans["PCA"] = coordinates.axes[:k].T.copy()

    # Plain: starts from the singular vectors of the lens's whole map to logits.
    start = time.process_time()
    plain = PlainKL(problem, states, reference, args.batch)
    through = problem.map.weight @ problem.head.unembedding.T
    starts = top_eigenvectors((through @ through.T).astype(np.float64), k)
    sequence = GreedySequence(starts)
    by_plain = k if args.whole else min(k, args.plain_directions)
    setup = time.process_time() - start
    start = time.process_time()
    for _ in range(by_plain):
        sequence.search_next(plain)
    per_evaluation = (time.process_time() - start) / sum(sequence.evaluations)
    with objective_of(problem, states, reference, 1 << 40) as objective:
        for _ in range(by_plain, k):
            sequence.search_next(evaluate_with(objective))
    name = "plain torch, greedy"
    spans[name] = torch.stack(sequence.directions, 1).double().numpy()
    evaluations[name] = sum(sequence.evaluations)
    cpu[name] = setup + evaluations[name] * per_evaluation
    if by_plain < k:
        measured = sum(sequence.evaluations[:by_plain])
        print(
            f"plain torch ran the first {measured} of its {evaluations[name]} evaluations "
            f"({per_evaluation:.2f} CPU s each); its CPU seconds are EXTRAPOLATED to all of them"
        )

    with objective_of(problem, others, reference, 0) as objective:
        directions: list[Directions] = [(v.T, v.T) for v in spans.values()]
        sums = objective.sum_losses(directions, np.zeros(len(others), np.int64), 1)
    kl = dict(zip(spans, (sums[:, 0] / len(others)).tolist(), strict=True))
    for name, value in kl.items():
        print(f"  {name:20s} held-out KL {value:7.3f}   {cpu.get(name, 0.0):9.2f} CPU s   "
              f"{evaluations.get(name, 0):7.1f} evaluations", flush=True)  # fmt: skip
    plain_cpu, plain_kl = cpu["plain torch, greedy"], kl["plain torch, greedy"]
    return {
        **{f"fit: held-out KL, {name}": value for name, value in kl.items()},
        **{f"fit: CPU s, {name}": value for name, value in cpu.items()},
        "fit: CPU of plain greedy / our joint": plain_cpu / cpu["ours, joint"],
        "fit: held-out KL of our joint / plain greedy": kl["ours, joint"] / plain_kl,
    }


# Part sample.


def measure_sample(args: argparse.Namespace) -> dict[str, float]:
    """Held-out KL of spans of four methods on the sample model, CPU and evaluations."""
    with tempfile.TemporaryDirectory() as folder:
        cache = sample_cache(Path(folder), args)
        if args.lens:
            lens = residua.load_probe(args.lens)
        else:
            lens = residua.TunedLens(steps=5 if args.quick else 400).fit(cache)
        print(f"\nsample: {args.positions} positions of layers {args.layers} x {cache.d_model}, "
              f"vocabulary {cache.vocab}; held-out KL of spans", flush=True)  # fmt: skip
        rows: dict[str, list[dict[str, Any]]] = {}
        for method in METHODS:
            basis = residua.CausalBasis(
                k=8,
                layers=args.layers,
                method=method,
                positions=args.positions,
                test_positions=8192,
            )
            rows[method] = basis.fit(cache, lens).metrics()
            for row in rows[method]:
                show_spans(f"{method}, layer {row['layer']}", row, row["span"])
        for row in rows["joint"]:
            show_spans(f"PCA, layer {row['layer']}", None, row["pca"])

    def kl(method: str, name: str = "span") -> np.ndarray:
        return np.array([row[name][8]["kl"] for row in rows[method]])

    figures = {}
    joint = kl("joint")
    for name, other in (
        ("one-shot", kl("one-shot")),
        ("fisher", kl("fisher")),
        ("PCA", kl("joint", "pca")),
        ("greedy", kl("greedy")),
    ):
        ratios = joint / other
        by_layer = " ".join(f"{ratio:.3f}" for ratio in ratios)
        print(
            f"  held-out KL at k = 8, joint / {name}: by layer {by_layer}, mean {ratios.mean():.3f}"
        )
        figures[f"sample: held-out KL of joint / {name}"] = float(ratios.mean())
        figures[f"sample: held-out KL of joint / {name}, least layer"] = float(ratios.min())
    seconds = {m: sum(row["cpu_seconds"] for row in rows[m]) for m in METHODS}
    figures["sample: CPU of joint / greedy"] = seconds["joint"] / seconds["greedy"]
    figures["sample: evaluations of joint"] = max(row["evaluations"] for row in rows["joint"])
    return figures


def sample_cache(folder: Path, args: argparse.Namespace) -> ActivationCache:
    """The cache that was named, or one of the sample model on the Python library's sources."""
    if args.cache:
        return ActivationCache(args.cache)
    from residua.sample.corpus import stdlib_texts

    path = folder / "library.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in stdlib_texts()[0]))
    return residua.extract(
        str(MODEL_DIR), str(path), root=folder, context=256, max_tokens=args.tokens
    )


def show_spans(name: str, row: dict[str, Any] | None, spans: dict[int, dict[str, Any]]) -> None:
    values = "  ".join(f"k = {k}: {measures['kl']:.3f}" for k, measures in spans.items())
    cost = "" if row is None else (
        f"   {row['cpu_seconds']:7.1f} CPU s {row['evaluations']:6.1f} evaluations"
    )  # fmt: skip
    print(f"  {name:18s} {values}{cost}", flush=True)


# Part memory.


def measure_memory(args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of child processes, and seconds of an evaluation."""
    print(f"\nmemory: {args.rows} rows x {args.d_model}, vocabulary {args.vocab}, "
          f"{args.memory >> 20} MiB given", flush=True)  # fmt: skip
    figures = {}
    for mode, rows in (
        ("with scratch file", args.rows),
        ("computed again", args.rows),
        ("all in memory", args.rows // 4),
    ):
        sizes = {"--rows": rows, "--d-model": args.d_model, "--vocab": args.vocab}
        options = [str(part) for pair in sizes.items() for part in pair]
        command = [sys.executable, __file__, "--child", mode, "--memory", str(args.memory)]
        done = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout)
        print(
            f"  {mode:18s} {rows:6d} rows: {found['mib']:7.0f} MiB; set-up {found['setup']:6.1f}, "
            f"an evaluation {found['cpu']:6.2f} CPU s, {found['wall']:6.2f} s wall, "
            f"{found['cpu'] / rows * 1000:.3f} CPU ms a row; {found['outside'] >> 20} MiB too many",
            flush=True,
        )
        comma = " " if mode.startswith("with") else ", "
        figures[f"memory: MiB{comma}{mode}"] = found["mib"]
        figures[f"memory: CPU s of an evaluation, {mode}"] = found["cpu"]
        figures[f"memory: wall s of an evaluation, {mode}"] = found["wall"]
    return figures


def run_child(args: argparse.Namespace) -> dict[str, float]:
    """Set-up and two evaluations of a joint fit; what the parent prints of it."""
    problem = Problem.of(args.d_model, args.vocab)
    states = problem.states(args.rows, 1)
    reference = states.mean(0)
    budget = kept_bytes(cast(ActivationCache, HeadAlone(problem.head)), args.memory)
    coordinates = AblationCoordinates.of(Moments.of(states, states[:, :1]), "covariance")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) if args.child == "with scratch file" else None
        with objective_of(problem, states, reference, budget, scratch) as objective:
            start = time.process_time()
            finder = BasisFinder(objective, coordinates, 8)
            columns = top_eigenvectors(finder.full_gradient(), 8)
            directions = coordinates.encoder(columns), coordinates.decoder(columns)
            objective.evaluate(directions)
            setup = time.process_time() - start
            wall = time.perf_counter()
            _, cpu = cpu_seconds(lambda: objective.evaluate(directions))
            wall = time.perf_counter() - wall
    return {
        "mib": peak_kib() / 1024,
        "setup": setup,
        "cpu": cpu,
        "wall": wall,
        "outside": bytes_beyond_memory(problem.head, args.rows, budget),
    }


def peak_kib() -> int:
    """Peak resident memory of this process; unlike ru_maxrss without that of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def show_verdicts(figures: dict[str, float]) -> None:
    """Each figure that has a target, and whether it meets the target."""
    print(f"\n{'figure':48s} {'value':>10s}   {'target':>8s}")
    for name, (comparison, target) in TARGETS.items():
        if name not in figures:
            continue
        value = figures[name]
        is_met = {">=": value >= target, "<=": value <= target, "<": value < target}[comparison]
        print(f"{name:48s} {value:10.2f}   {comparison:>2s} {target:<8g} "
              f"{'met' if is_met else 'NOT met'}")  # fmt: skip


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    with one_blas_thread():
        if args.child:
            print(json.dumps(run_child(args)))
            return
        measures: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
            "step": measure_step,
            "fit": measure_fit,
            "sample": measure_sample,
            "memory": measure_memory,
        }
        figures = {}
        for part in args.part:
            figures |= measures[part](args)
    show_verdicts(figures)
    if args.quick:
        print("the targets are for the default sizes, not for these")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
