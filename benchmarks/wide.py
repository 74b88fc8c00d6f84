"""Fits and evaluation of a wide model, per row, against the products that they are made of.

    python benchmarks/wide.py --json benchmarks/wide.json    # some 20 minutes of one thread
    python benchmarks/wide.py --quick
    python benchmarks/wide.py --device cuda --batch 4096 --rows 16384

Synthetic residual streams (d_model 4,096) and a bfloat16 head (vocabulary 128,256), the sizes of an
8 B model. Every part is a process of its own:

    rates       products of large matrices: float64, float32, bfloat16
    moments     second moments of one (layer, offset), float64 and float32; a whole ridge fit
    lens        one step of a translator: the model's distribution, loss, gradient, new map
    vocabulary  one step of a vocabulary probe of the default form
    evaluation  ridge and the logit lens at one layer and offset, with all measures
    basis       the set-up of a causal basis, and one loss with gradient in one direction

The cost of a row leaves out what is done once (two sizes are measured where that is needed).
*Share* is the part of the measured rate of products, in the dtype that a part uses, at which the
products that the part cannot do without would have run: all else that is done counts against it.
CPU seconds of one thread (on a GPU: seconds). Peak is the growth of anonymous memory over the open
cache; a part that uses the head's weights loads them.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import describe_machine

from residua.analysis.evaluation.probe_evaluation import evaluate
from residua.cache.devices import choose_device
from residua.cache.head.head import TENSORS, Head
from residua.cache.head.row_buffers import reused_rows
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.base.readout import ReadoutBatch
from residua.probes.base.resources import default_memory, one_blas_thread
from residua.probes.basis.ablation_objective import AblationObjective, ObjectiveSpec
from residua.probes.basis.basis_rows import BasisRows
from residua.probes.lens.natural_gradient import InputWhitening, NaturalGradientMap
from residua.probes.moments.moment_collection import collect_moments
from residua.probes.ridge.ridge_probe import RidgeProbe
from residua.probes.ridge.solver import AffineMap
from residua.probes.training.softmax_loss import (
    Gradients,
    ModelDistribution,
    Target,
    add_head_gradients,
    fast_products,
    head_losses,
    row_tiles,
)
from residua.probes.vocabulary.descent import Trainer
from residua.probes.vocabulary.parametrizations import (
    FullMatrix,
    LowRank,
    PrincipalAxes,
    default_rank,
)
from residua.tests.support.synthetic import make_cache

PARTS = ("rates", "moments", "lens", "vocabulary", "evaluation", "basis")
EPS = 1e-5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--rows", type=int, default=3072, help="positions of the cache")
    parser.add_argument("--batch", type=int, default=512, help="rows of a step, an evaluation")
    parser.add_argument("--rounds", type=int, default=2, help="of a step; the best counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--quick", action="store_true", help="under a minute; says little")
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.d_model, args.vocab, args.rows, args.batch = 256, 8192, 1536, 256
    return args


class BfloatHead(Head):
    """A head that is saved in bfloat16, as that of a large model is."""

    def save(self, folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> None:
        super().save(folder, {n: torch.from_numpy(getattr(self, n)).bfloat16() for n in TENSORS})


def make_wide_cache(root: Path, args: argparse.Namespace) -> ActivationCache:
    """A cache of two layers of bfloat16 rows whose variances fall like 1 / axis."""
    rng, d = np.random.default_rng(0), args.d_model
    deviations = (1 + np.arange(d, dtype=np.float32)) ** np.float32(-0.5)
    first = rng.standard_normal((args.rows, d), np.float32) * deviations
    last = first + rng.standard_normal((args.rows, d), np.float32) * deviations
    unembedding = rng.standard_normal((args.vocab, d), np.float32)
    unembedding *= np.float32(3 / d**0.5)
    ones, zeros = np.ones(d, np.float32), np.zeros(d, np.float32)
    head = BfloatHead("rmsnorm", EPS, ones, zeros, unembedding, np.zeros(args.vocab, np.float32))
    lengths = [256] * (args.rows // 256)
    return make_cache(root, [first, last], lengths, head, dtype="bfloat16", chunk_rows=256)


# What is measured


class Peak:
    """Growth of the peak of anonymous memory of this process while the context is entered."""

    def __enter__(self) -> "Peak":
        self.base = self.peak = _anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        return self.peak - self.base

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, _anonymous_bytes())


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


class Bench:
    """The open cache, its head on the device, and a clock."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = choose_device(args.device)
        self.cache = ActivationCache(args.cache)
        self.d, self.vocab = self.cache.d_model, self.cache.vocab
        self.head = self.cache.head
        """Its weights are loaded where a part first needs them: peaks hold them, then."""

    def seconds(self, run: Callable[[], Any], rounds: int | None = None) -> float:
        """The least seconds of `rounds` runs: CPU seconds, or on a GPU seconds until it is done."""
        times = []
        for _ in range(rounds or self.args.rounds):
            clock = time.process_time if self.device.type == "cpu" else time.perf_counter
            begin = clock()
            result = run()
            if isinstance(result, torch.Tensor):
                result.flatten()[:1].tolist()
            times.append(clock() - begin)
        return min(times)

    def rows(self, layer: int, n: int) -> torch.Tensor:
        """The first `n` rows of `layer`, float32, on the device."""
        return torch.from_numpy(self.cache.residual_array(layer)[:n]).to(self.device)

    def affine(self) -> AffineMap:
        """A map near the identity, float32."""
        noise = np.random.default_rng(1).standard_normal((self.d, self.d), np.float32)
        weight = np.eye(self.d, dtype=np.float32) + noise * np.float32(0.1 / self.d**0.5)
        return AffineMap(weight, np.zeros(self.d, np.float32))


def figure(name: str, seconds: float, rows: int, flops: float, peak: int, **more: Any) -> Any:
    """One measurement: `seconds` for `rows` rows, with `flops` floating point operations a row."""
    return {
        "name": name,
        "ms_per_row": 1e3 * seconds / rows,
        "gflop_per_row": flops / 1e9,
        "gflops": flops * rows / seconds / 1e9,
        "peak_bytes": peak,
        **more,
    }


def measure_rates(bench: Bench) -> list[Any]:
    """GFLOP/s of a product `(1024, d) (d, 8192)` in each dtype."""
    rates = []
    names = ["float64", "float32"]
    if bench.device.type != "cpu" or fast_products() == "bfloat16":
        # A processor without such products takes a hundred times as long for them.
        names.append("bfloat16")
    for name in names:
        dtype = getattr(torch, name)
        a = torch.randn(1024, bench.d, device=bench.device).to(dtype)
        b = torch.randn(bench.d, 8192, device=bench.device).to(dtype)
        out = a @ b
        seconds = bench.seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 5)
        rates.append(figure(name, seconds, 1024, 2 * bench.d * 8192, 0, dtype=name))
    return rates


def measure_moments(bench: Bench) -> list[Any]:
    """The pass over rows at one (layer, offset), and the solution of ridge."""
    figures = []
    # The first pass also makes what later ones find.
    collect_moments(bench.cache, [0], [0], folds=2, split="validation")
    for products in ("float64", "float32"):
        times = {}
        with Peak() as peak:
            for split in ("validation", "all"):
                rows = int(bench.cache.sequence_length[bench.cache.sequences(split)].sum())

                def collect(split: str = split, products: str = products) -> Any:
                    options = {"folds": 2, "split": split, "products": products}
                    return collect_moments(bench.cache, [0], [0], **options)

                times[rows] = bench.seconds(collect, 1)
        (few, short), (many, long) = times.items()
        rows = many - few
        # x'x and y'y are symmetric: half of their products are enough.
        flops = 4 * bench.d**2
        figures.append(
            figure(f"moments {products}", long - short, rows, flops, peak.bytes, dtype=products)
        )
    with Peak() as peak:
        probe = RidgeProbe(offsets=[0], layers=[0], folds=2)
        seconds = bench.seconds(lambda: probe.fit(bench.cache, keep=False), 1)
    figures.append({"name": "ridge, whole fit", "seconds": seconds, "peak_bytes": peak.bytes})
    return figures


def measure_lens(bench: Bench) -> list[Any]:
    """One step of a translator in tiles of rows, as `LensFitRun` takes it, and its parts."""
    n, d, vocab = bench.args.batch, bench.d, bench.vocab
    products = fast_products(bench.device)
    identity, zeros = torch.eye(d), torch.zeros(d)

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(bench.device, copy=True)

    fit = NaturalGradientMap(InputWhitening(zeros, identity, identity.clone()), 0.1, copy)
    fit.set_map(bench.affine())
    fit.curvature.fill_(1.0)
    x, last = bench.rows(0, n), bench.rows(bench.cache.n_blocks, n)
    tiles = list(row_tiles(n, vocab))

    def distribution(tile: slice, products: str = "float32", negentropy: bool = False) -> Target:
        size = tile.stop - tile.start
        memory = reused_rows("model", size, vocab, last)
        model = ModelDistribution(head, size)
        return model.distribution(last[tile], memory, products=products, negentropy=negentropy)

    def run_teacher() -> torch.Tensor | None:
        return [distribution(tile, products).p for tile in tiles][-1]

    def measure_loss() -> torch.Tensor:
        u, kl = fit.translate_by_mean(fit.inputs(x)), torch.empty(n, device=x.device)
        for tile in tiles:
            target, rows = distribution(tile, negentropy=True), tile.stop - tile.start
            kl[tile] = head_losses(u[tile], head, target, tile_rows=rows)
        return kl

    def take_step() -> torch.Tensor:
        z, gradient = fit.inputs(x), torch.zeros_like(x)
        for tile in tiles:
            options = Gradients(x=gradient[tile], scale=1 / n, products=products)
            u, target = fit.translate(z[tile]), distribution(tile, products)
            add_head_gradients(u, head, target, options, tile.stop - tile.start)
        fit.apply_gradient(z, gradient, rate=1e-3)
        return fit.bias

    head = bench.cache.head.torch(bench.device)
    with Peak() as peak:
        teacher = bench.seconds(run_teacher)
        step = bench.seconds(take_step)
        check = bench.seconds(measure_loss)
    product = 2 * d * vocab
    flops = 3 * product + 12 * d * d
    return [
        figure("lens: the model's distribution", teacher, n, product, peak.bytes, dtype=products),
        figure("lens: one step", step, n, flops, peak.bytes, dtype=products),
        # The model's product is float32 there, that of the translator `products`: measured by the
        # rate of float32, a share may be above 1.
        figure("lens: loss alone", check, n, 2 * product + 4 * d * d, peak.bytes),
    ]


def measure_vocabulary(bench: Bench) -> list[Any]:
    """One step of a vocabulary probe of the default form, and its labels."""
    n, d, vocab = bench.args.batch, bench.d, bench.vocab
    head, last = bench.cache.head.torch(bench.device), bench.rows(bench.cache.n_blocks, n)
    model = ModelDistribution(head)
    with Peak() as label_peak:
        labels = bench.seconds(lambda: model.tokens(last).token)
    target = model.tokens(last)
    rank = default_rank(vocab, d)
    identity = torch.eye(d, device=bench.device)
    axes = PrincipalAxes(torch.zeros(d, device=bench.device), identity, identity.clone())
    with Peak() as peak:
        products = fast_products(bench.device)
        form = LowRank(vocab, d, rank, products) if rank else FullMatrix(vocab, d, products)
        trainer = Trainer(form, axes, form.start(axes, torch.zeros(vocab, device=bench.device)))
        grads = {name: torch.zeros_like(value) for name, value in trainer.parameters.items()}
        x = bench.rows(0, n)
        step = bench.seconds(lambda: trainer.step(x, target, 1e-3, grads))
    width = rank or d
    flops = 4 * width * vocab + (2 * width * vocab + 6 * width * d if rank else 0)
    return [
        figure("vocabulary: label", labels, n, 2 * d * vocab, label_peak.bytes),
        figure(
            "vocabulary: step",
            step,
            n,
            flops,
            peak.bytes,
            weights=form.weights,
            rank=rank,
            dtype=products,
        ),
    ]


class FixedMap:
    """A readout by one affine map in front of the head, as those of ridge probes and lenses."""

    kind = "map"

    def __init__(self, affine: AffineMap, device: torch.device) -> None:
        self.weight = torch.from_numpy(affine.weight).to(device)

    def pairs(self) -> list[tuple[int | None, int]]:
        return [(0, 0)]

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> torch.Tensor:
        assert batch.hidden is not None
        return batch.head(batch.hidden @ self.weight)


def measure_evaluation(bench: Bench) -> list[Any]:
    """All measures of the logit lens and of one map, for each target; the reference included."""
    probe, times = FixedMap(bench.affine(), bench.device), {}
    with Peak() as peak:
        # The first evaluation makes what later ones find: it is not counted.
        for n in (256, bench.args.batch, 2 * bench.args.batch):
            times[n] = bench.seconds(
                lambda n=n: evaluate(
                    bench.cache,
                    [probe],
                    split="all",
                    max_positions=n,
                    offsets=0,
                    device=bench.device,
                ),
                1,
            )
    n = bench.args.batch
    flops = 3 * 2 * bench.d * bench.vocab + 2 * bench.d**2
    return [figure("evaluation: two probes", times[2 * n] - times[n], n, flops, peak.bytes)]


def measure_basis(bench: Bench) -> list[Any]:
    """The products of clean rows, and one loss with gradient in one direction."""
    n, d, vocab = bench.args.batch, bench.d, bench.vocab
    direction = np.random.default_rng(2).standard_normal((1, d)) / d**0.5
    first: dict[int, float] = {}
    later: dict[int, float] = {}
    with Peak() as peak:
        for rows in (n // 2, n):
            positions = BasisRows(bench.cache, 0, np.arange(rows), np.zeros(d, np.float32), seed=0)
            spec = ObjectiveSpec(positions, bench.affine(), default_memory(), device=bench.device)
            with AblationObjective(spec) as objective:
                first[rows] = bench.seconds(lambda: objective.evaluate((direction, direction)), 1)  # noqa: B023
                later[rows] = bench.seconds(lambda: objective.evaluate((direction, direction)))  # noqa: B023
    set_up = (first[n] - later[n]) - (first[n // 2] - later[n // 2])
    return [
        figure("basis: set-up", set_up, n - n // 2, 4 * d * vocab, peak.bytes),
        figure(
            "basis: loss and gradient, one direction", later[n], n, 6 * vocab, peak.bytes,
            ns_per_token=1e9 * later[n] / (n * vocab),
        ),
    ]  # fmt: skip


PART_FUNCTIONS = {
    "rates": measure_rates,
    "moments": measure_moments,
    "lens": measure_lens,
    "vocabulary": measure_vocabulary,
    "evaluation": measure_evaluation,
    "basis": measure_basis,
}


def run_child(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with one_blas_thread():
        print(json.dumps(PART_FUNCTIONS[args.child](Bench(args))))


def add_shares(figures: list[Any]) -> None:
    """Add `share` to each figure: its GFLOP/s over the measured rate of its dtype."""
    rates = {row["name"]: row["gflops"] for row in figures if row["name"] == row.get("dtype")}
    for row in figures:
        if "gflops" in row:
            row.setdefault("dtype", "float32")
            row["share"] = row["gflops"] / rates[row["dtype"]]


def print_figures(figures: list[Any]) -> None:
    """Print the figures as a table."""
    print(f"{'':44}{'ms/row':>10}{'GFLOP/s':>9}{'share':>7}{'peak MiB':>10}")
    for row in figures:
        if "gflops" not in row:
            print(f"{row['name']:44}{row['seconds']:>8.1f} s{row['peak_bytes'] / 2**20:>26.0f}")
            continue
        print(
            f"{row['name']:44}{row['ms_per_row']:10.3f}{row['gflops']:9.1f}{row['share']:7.2f}"
            f"{row['peak_bytes'] / 2**20:10.0f}"
        )


def _arguments_of(args: argparse.Namespace) -> list[str]:
    """The arguments of this command but for --json."""
    return [word for word in sys.argv[1:] if word not in ("--json", str(args.json))]


def main() -> None:
    args = arguments()
    if args.child:
        run_child(args)
        return
    figures: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        cache = make_wide_cache(Path(folder), args)
        for part in ("rates", *(part for part in args.part if part != "rates")):
            command = [sys.executable, __file__, "--child", part, "--cache", str(cache.path)]
            for name in ("batch", "rows", "rounds", "device"):
                command += [f"--{name}", str(getattr(args, name))]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            figures += json.loads(done.stdout.splitlines()[-1])
    add_shares(figures)
    print_figures(figures)
    if args.json:
        command = shlex.join(["python", "benchmarks/wide.py", *_arguments_of(args)])
        if args.json.exists():
            # Figures of parts that were not measured now stay.
            names, earlier = {row["name"] for row in figures}, json.loads(args.json.read_text())
            kept = [row for row in earlier["figures"] if row["name"] not in names]
            figures = [*kept, *figures]
            if kept:
                command = f"{earlier['command']}; {command}"
        value = {"command": command, "machine": describe_machine(), "figures": figures}
        args.json.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
