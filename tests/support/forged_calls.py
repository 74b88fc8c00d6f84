"""Makes forged caches and probes and calls all readers on them; a script, for a process of its own.

    python forged_calls.py <folder> <seed> <mutants>

prints a JSON object: `calls`, how many were made, and `failures`, one text per place in the code.
A fresh process forks safely: no thread pool has been started in it.
"""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import datasets  # noqa: E402, F401
import numcodecs.zstd  # noqa: E402, F401
import numpy as np  # noqa: E402
import scipy.special  # noqa: E402, F401
import sklearn.linear_model  # noqa: E402, F401
import tokenizers  # noqa: E402, F401
import torch  # noqa: E402
import zarr  # noqa: E402, F401
from forging import (  # noqa: E402
    copy_by_links,
    failure_place,
    forge_cache,
    forge_probe,
    run_bounded,
)

from residua.analysis.evaluation.probe_evaluation import evaluate  # noqa: E402
from residua.analysis.report.html_report import write_report  # noqa: E402
from residua.cache.extraction.damage_repair import repair  # noqa: E402
from residua.cache.head.program import Program  # noqa: E402
from residua.cache.head.program_head import ProgramHead  # noqa: E402
from residua.cache.sharing.flat_export import export  # noqa: E402
from residua.cache.store.activation_cache import ActivationCache  # noqa: E402
from residua.cache.store.catalog import describe_cache, list_caches  # noqa: E402
from residua.cache.store.lineage import cache_lineage  # noqa: E402
from residua.cache.store.row_loader import RowLoader  # noqa: E402
from residua.cache.store.verification import verify  # noqa: E402
from residua.probes.basis.causal_basis import CausalBasis  # noqa: E402
from residua.probes.lens.tuned_lens import TunedLens  # noqa: E402
from residua.probes.moments.kept_moments import moment_entries, sweep_moments  # noqa: E402
from residua.probes.ridge.ridge_probe import RidgeProbe  # noqa: E402
from residua.probes.saved.hub import probe_card  # noqa: E402
from residua.probes.saved.save import check_belongs, load_probe, save_probe  # noqa: E402
from residua.probes.vocabulary.vocab_probe import VocabProbe  # noqa: E402

TESTS = Path(__file__).parents[1]
HEAVY_CALLS = 2
"""Fits, evaluations and exports of each forged cache, drawn by chance."""
PROBES_SHARE = 0.35
"""Share of the mutants that are probes."""

torch.set_num_threads(1)


# What is forged


def make_sources(folder: Path) -> None:
    """Caches with kept moments, and probes of every kind, under `folder`."""
    for version in ("format1", "format2"):
        for cache in sorted((TESTS / version / "root").iterdir()):
            target = shutil.copytree(cache, folder / "caches" / f"{version}-{cache.name[:8]}")
            for name in ("leases", "moments"):
                (target / name).mkdir(exist_ok=True)
            layers = ActivationCache(target).layers[:1]
            RidgeProbe(offsets=[0, 1], layers=layers).fit(ActivationCache(target), keep=True)
        for probe in sorted((TESTS / version / "probes").iterdir()):
            shutil.copytree(probe, folder / "probes" / f"{version}-{probe.name}")
    basis_cache = ActivationCache(sorted((folder / "caches").glob("format2-*"))[1])
    last = basis_cache.layers[-1]
    lens = RidgeProbe(offsets=[0], layers=[last]).fit(basis_cache)
    basis = CausalBasis(layers=[last], k=2, positions=200, test_positions=100)
    save_probe(basis.fit(basis_cache, lens), folder / "probes" / "basis")
    save_probe(RidgeProbe(offsets=[1], layers=[last]).fit(basis_cache), folder / "probes" / "ridge")
    # A head that is a program, in place of one by formula.
    target = shutil.copytree(basis_cache.path, folder / "caches" / "program")
    set_program_head(target, basis_cache)


def set_program_head(path: Path, cache: ActivationCache) -> None:
    """Give the cache at `path` the head of `cache` as a program."""
    from forging import seal_base_records

    head = cache.head
    nodes = [
        {"op": "mul", "args": {"self": {"node": 0}, "other": 2.0}},
        {"op": "rms_norm", "args": {
            "input": {"node": 1}, "normalized_shape": [head.d_model],
            "weight": {"tensor": "gain"}, "eps": 1e-5}},
        {"op": "reshape", "args": {
            "self": {"node": 2}, "size": [{"size": [1, 1, 1, 0]}, head.d_model]}},
        {"op": "t", "args": {"self": {"tensor": "w"}}},
        {"op": "mm", "args": {"self": {"node": 3}, "mat2": {"node": 4}}},
        {"op": "reshape", "args": {"self": {"node": 5}, "size": [
            {"size": [1, 1, 0, 0]}, {"size": [1, 0, 1, 0]}, head.vocab]}},
        {"op": "softmax", "args": {"self": {"node": 6}, "dim": -1}},
        {"op": "clamp", "args": {"self": {"node": 7}, "min": 1e-9}},
        {"op": "log", "args": {"self": {"node": 8}}},
    ]  # fmt: skip
    tensors = {"gain": head.norm_weight, "w": head.unembedding}
    program = Program.from_json(nodes, set(tensors))
    for name in ("head.json", "head.safetensors"):
        (path / "head" / name).unlink()
    ProgramHead(program, tensors, head.d_model, head.vocab).save(path / "head")
    seal_base_records(path)


# What is called


def read_tables(path: Path) -> None:
    """Read everything about sequences, documents, contexts and labels."""
    cache = ActivationCache(path)
    _ = cache.tokens[:10], cache.tokens.take(np.array([0, cache.positions - 1]))
    for split in ("train", "validation", "test", "all"):
        sequences = cache.sequences(split)
        list(cache.blocks(sequences, 50))
        cache.positions_of(sequences[:5])
    cache.sequence_folds(3)
    positions = np.arange(min(40, cache.positions))
    cache.following_tokens(positions)
    if cache.document_numbers is not None:
        cache.spans(positions)
    contexts = cache.contexts
    contexts.ids[:20]
    for name in cache.label_names:
        cache.label(name)
    tokenizer = cache.tokenizer()
    tokenizer.decode(cache.tokens[:20].tolist())


def read_rows(path: Path) -> None:
    """Read rows of all layers, logits, and the head's logits."""
    cache = ActivationCache(path)
    for layer in cache.layers:
        array = cache.residual_array(layer)
        _ = array[:20], array.take(np.array([3, 0, 5]))
    cache.head.logits(cache.residual_array(cache.n_blocks)[:4])
    cache.head.torch()(torch.from_numpy(cache.residual_array(cache.n_blocks)[:4]))
    cache.logits()[:5].compute()
    cache.topk(3).values[:5].compute()
    for layer in cache.target_layers[:1]:
        cache.residual(layer)[-10:].compute()


def describe(path: Path) -> None:
    cache = ActivationCache(path)
    json.dumps(describe_cache(cache)).encode()
    repr(cache)
    list(cache_lineage(cache))


def load_rows(path: Path) -> None:
    cache = ActivationCache(path)
    for layer in cache.target_layers[:1]:
        for number, _ in enumerate(RowLoader(cache, layer, batch_rows=64)):
            if number > 3:
                break


def read_moments(path: Path) -> None:
    cache = ActivationCache(path)
    list(moment_entries(cache))
    RidgeProbe(offsets=[0, 1], layers=cache.layers[:1]).fit(cache)
    sweep_moments(cache)


def heavy_calls(path: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """Fits, evaluations and exports of the cache at `path`, by name."""

    def fit(probe: Any, **options: Any) -> Any:
        cache = ActivationCache(path)
        probe.set_params(layers=cache.layers[:1])
        return probe.fit(cache, **options)

    def evaluate_ridge() -> None:
        cache = ActivationCache(path)
        probe = fit(RidgeProbe(offsets=[0, 1]))
        write_report(evaluate(cache, [probe], max_positions=300), out / "report.html")

    return {
        "ridge": lambda: fit(RidgeProbe(offsets=[0, 2])),
        "lens": lambda: fit(TunedLens(steps=3, batch=64)),
        "vocab": lambda: fit(VocabProbe(offsets=[1], epochs=1, lr=0.01)),
        "evaluate": evaluate_ridge,
        "loader": lambda: load_rows(path),
        "export": lambda: export(ActivationCache(path), out / "export"),
        "export numpy": lambda: export(ActivationCache(path), out / "numpy", format="numpy"),
    }


def calls_on_cache(path: Path, out: Path, rng: random.Random) -> dict[str, Callable[[], Any]]:
    """Calls on the forged cache at `path` by name; results go to the folder `out`."""
    calls: dict[str, Callable[[], Any]] = {
        "info": partial(describe, path),
        "ls": lambda: json.dumps(list_caches(path.parent)).encode(),
        "verify": lambda: json.dumps(verify(path).to_dict()),
        "tables": partial(read_tables, path),
        "rows": partial(read_rows, path),
        "moments": partial(read_moments, path),
    }
    heavy = heavy_calls(path, out)
    calls |= {name: heavy[name] for name in rng.sample(sorted(heavy), HEAVY_CALLS)}
    # Last, as it changes files; the model's folder is absent.
    calls["repair"] = lambda: repair(path)
    return calls


def calls_on_probe(
    folder: Path, caches: list[Path], rng: random.Random
) -> dict[str, Callable[[], Any]]:
    """Calls on the forged probe in `folder` by name."""

    def use() -> None:
        probe = load_probe(folder)
        _ = repr(probe), probe.get_params()
        if hasattr(probe, "pairs"):
            probe.pairs()
        if hasattr(probe, "metrics"):
            json.dumps(probe.metrics(), default=str)
        config = json.loads((folder / "config.json").read_bytes())
        probe_card(config, "user/name").encode()

    def measure(path: Path) -> None:
        cache = ActivationCache(path)
        probe = load_probe(folder)
        check_belongs(probe, cache)
        if hasattr(probe, "logits"):
            evaluate(cache, [probe], max_positions=100, split="all")

    cache = rng.choice(caches)
    return {
        "load": use,
        "evaluate": partial(measure, cache),
    }


def main() -> None:
    folder, seed, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    sources, failures, n_calls = folder / "sources", {}, 0
    if not sources.exists() and (
        errors := run_bounded({"sources": partial(make_sources, sources)}, bounded=False)
    ):
        raise SystemExit(str(errors))
    caches = sorted((sources / "caches").iterdir())
    probes = sorted((sources / "probes").iterdir())
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        work = folder / f"mutant-{os.getpid()}"
        if rng.random() < PROBES_SHARE:
            source = rng.choice(probes)
            target = copy_by_links(source, work / "probe")
            done = forge_probe(target, rng)
            calls = calls_on_probe(target, caches, rng)
        else:
            source = rng.choice(caches)
            target = copy_by_links(source, work / "root" / "cache")
            done = forge_cache(target, rng)
            calls = calls_on_cache(target, work / "out", rng)
        n_calls += len(calls)
        for name, text in run_bounded(calls).items():
            place = failure_place(text)
            report = f"{seed} {number} {source.name} {name}: {done}\n{text}"
            failures.setdefault(place, []).append(report)
            print(f"{number} {place}", file=sys.stderr, flush=True)
        shutil.rmtree(work)
    print(json.dumps({"calls": n_calls, "failures": failures}))


if __name__ == "__main__":
    main()
