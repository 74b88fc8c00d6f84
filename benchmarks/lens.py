"""A tuned lens from the cache against the recipe of the tuned-lens package, model forward included.

    python benchmarks/lens.py --quick
    python benchmarks/lens.py --rows rows.json --png lens.png    # 20 minutes of CPU time
    python benchmarks/lens.py --tokens 400000 --final 300 --no-muon --no-curve --json FILE

Both baselines are plain torch: 250 steps of 4096 tokens, every layer in turn, gradients clipped to
norm 1 over all layers together, rates that fall to 0 linearly; SGD with Nesterov momentum .9 (rate
.1, weight decay 1e-3, the package's default), and Muon (rate .01, weight decay .01, AdamW for
biases, its pull request 141). They run under bfloat16 autocast where the processor multiplies
bfloat16; elsewhere that takes 6 to 9 times as long as float32, which is taken instead. They train
on the train split of the cache, residua fits the same rows; all are measured on the same positions
of the test split. CPU seconds of one process and one thread, without imports; a lens begins without
kept moments. Targets: the KL of the SGD recipe in at most 1/20 of its CPU, once cached, and a final
KL at least 5 % below Muon's.
"""

import argparse
import copy
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Figure, write_results

import residua
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.base.resources import one_blas_thread
from residua.probes.lens.tuned_lens import TunedLens
from residua.probes.training.softmax_loss import fast_products
from residua.sample import MODEL_DIR

TARGET_CPU, TARGET_KL = 1 / 20, 0.95
BUDGETS = (0, 20, 40, 100, 300)
"""Steps of the fits that show how KL falls with CPU time."""
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
"""Cached train tokens of the data-efficiency curve."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(MODEL_DIR), help="folder or hub id")
    parser.add_argument("--texts", help="texts to cache; default: the Python library's sources")
    parser.add_argument("--root", type=Path, help="folder of caches; default: a temporary one")
    parser.add_argument("--tokens", type=int, default=1_310_720, help="tokens to cache")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=250, help="steps of the baselines")
    parser.add_argument("--batch", type=int, default=4096, help="tokens of a baseline's step")
    parser.add_argument("--final", type=int, default=1000, help="steps of residua's longest fit")
    parser.add_argument("--positions", type=int, default=16384, help="test positions to measure on")
    parser.add_argument("--baselines", type=Path, help="take them from an earlier --rows")
    parser.add_argument("--no-muon", action="store_true", help="SGD is the only baseline")
    parser.add_argument("--no-curve", action="store_true", help="leave out the curve over tokens")
    parser.add_argument("--rows", type=Path, help="file to write all fits to")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--png", type=Path, help="file to draw both curves in")
    parser.add_argument("--quick", action="store_true", help="half a minute; says little")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.steps, args.final, args.positions = 20_480, 3, 20, 2048
    return args


def library(folder: Path) -> str:
    """The sources and docstrings of the running Python's library, as .jsonl."""
    from residua.sample.corpus import stdlib_texts

    path = folder / "library.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in stdlib_texts()[0]))
    return str(path)


class Held:
    """Positions of the test split, and the KL of translators there."""

    def __init__(self, cache: ActivationCache, positions: int) -> None:
        self.cache = cache
        rows = cache.positions_of(cache.sequences("test"))[:positions]
        self.hidden = [
            torch.from_numpy(cache.residual_array(la)[rows]) for la in range(cache.n_blocks)
        ]
        self.last = torch.from_numpy(cache.residual_array(cache.n_blocks)[rows])
        self.head = cache.head.torch()

    @torch.no_grad()
    def kl(self, maps: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
        """Mean KL(model || lens) in nats of maps `h @ weight + bias`, one per layer."""
        sums = np.zeros(len(maps))
        for start in range(0, len(self.last), 2048):
            log_p = self.head(self.last[start : start + 2048]).log_softmax(-1)
            for layer, (weight, bias) in enumerate(maps):
                rows = self.hidden[layer][start : start + 2048]
                log_q = self.head(rows @ weight + bias).log_softmax(-1)
                sums[layer] += (log_p.exp() * (log_p - log_q)).sum().item()
        return (sums / len(self.last)).tolist()

    def of(self, lens: TunedLens) -> list[float]:
        found = [lens.map(layer, 0) for layer in range(self.cache.n_blocks)]
        return self.kl([(torch.from_numpy(m.weight), torch.from_numpy(m.bias)) for m in found])

    def logit(self) -> list[float]:
        one, none = torch.eye(self.cache.d_model), torch.zeros(self.cache.d_model)
        return self.kl([(one, none)] * self.cache.n_blocks)


class Recipe:
    """The reference training of one lens, in plain torch."""

    def __init__(self, name: str, model: Any, depth: int, width: int, steps: int) -> None:
        self.name, self.cpu = name, 0.0
        self.bfloat16 = fast_products() == "bfloat16"
        base = model.base_model
        norm = next(n for n in ("final_layer_norm", "norm", "ln_f") if hasattr(base, n))
        self.norm = copy.deepcopy(getattr(base, norm))
        self.unembed = copy.deepcopy(model.get_output_embeddings())
        self.lens = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(depth))
        parameters = list(self.lens.parameters())
        for parameter in parameters:
            torch.nn.init.zeros_(parameter)
        if name == "sgd":
            self.optimisers: list[Any] = [
                torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
            ]
        else:
            matrices = [p for p in parameters if p.ndim == 2]
            biases = [p for p in parameters if p.ndim == 1]
            self.optimisers = [
                torch.optim.Muon(matrices, 0.01, 0.01, 0.9, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(biases, 0.01, (0.9, 0.999), weight_decay=0.01),
            ]
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(o, lambda step: max(0.0, 1 - step / steps))
            for o in self.optimisers
        ]

    def step(self, hidden: Sequence[torch.Tensor], logits: torch.Tensor) -> None:
        start = time.process_time()
        labels = logits.float().log_softmax(-1)
        for translator, h in zip(self.lens, hidden, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                found = self.unembed(self.norm(h + translator(h)))
                loss = (labels.exp() * (labels - found.log_softmax(-1))).sum(-1).mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.lens.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=False)
        for schedule in self.schedules:
            schedule.step()
        self.cpu += time.process_time() - start

    def kl(self, held: Held) -> list[float]:
        one = torch.eye(held.cache.d_model)
        return held.kl([(one + t.weight.T, t.bias) for t in self.lens])  # pyright: ignore


def baselines(cache: ActivationCache, args: argparse.Namespace, held: Held) -> list[dict[str, Any]]:
    """Train both recipes on the same batches; the model's forward is added to the CPU of each."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model).eval().requires_grad_(False)
    names = ("sgd",) if args.no_muon else ("sgd", "muon")
    recipes = [Recipe(name, model, cache.n_blocks, cache.d_model, args.steps) for name in names]
    train, length = cache.sequences("train"), cache.sequence_length
    whole = train[length[train] == length.max()]
    each, forward, found = args.batch // int(length.max()), 0.0, []
    for step in range(args.steps):
        chosen = whole[np.arange(step * each, (step + 1) * each) % len(whole)]
        ids = cache.tokens.take(cache.positions_of(chosen)).reshape(each, -1).astype(np.int64)
        start = time.process_time()
        with torch.no_grad():
            out = model(input_ids=torch.from_numpy(ids), output_hidden_states=True)
        forward += time.process_time() - start
        for recipe in recipes:
            recipe.step(out.hidden_states[:-1], out.logits)
        if (step + 1) % 25 == 0 or step + 1 == args.steps:
            for recipe in recipes:
                row = {"fit": recipe.name, "steps": step + 1, "cpu": recipe.cpu + forward}
                found.append({**row, "forward": forward, "layers": recipe.kl(held)})
                show(found[-1])
    return found


def ours(cache: ActivationCache, steps: int, held: Held, **about: Any) -> dict[str, Any]:
    """One fit from the cache: moments, ridge, sweep, steps."""
    # An earlier fit left its moments there.
    shutil.rmtree(cache.path / "moments", ignore_errors=True)
    start = time.process_time()
    lens = TunedLens(layers=range(cache.n_blocks), steps=steps).fit(cache)
    cpu = time.process_time() - start
    row = {"fit": "residua", "steps": steps, "cpu": cpu, **about, "layers": held.of(lens)}
    row["validation"] = lens.metrics()
    show(row)
    return row


class Part(ActivationCache):
    """The first `tokens` tokens of a cache's train split."""

    def __init__(self, path: Path, tokens: int) -> None:
        super().__init__(path)
        self.tokens_taken = tokens

    def sequences(self, name: str) -> np.ndarray:
        found = super().sequences(name)
        if name != "train":
            return found
        return found[: np.searchsorted(self.sequence_length[found].cumsum(), self.tokens_taken) + 1]


def show(row: dict[str, Any]) -> None:
    layers = " ".join(f"{kl:.4f}" for kl in row["layers"])
    name = f"{row['fit']} {row.get('tokens', '')}".strip()
    print(
        f"{name:>16} {row['steps']:>5} steps {row['cpu']:8.1f} CPU s   "
        f"mean {np.mean(row['layers']):.4f}   layers {layers}",
        flush=True,
    )


def first_to_reach(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The shortest fit from the cache whose KL is that of SGD's last step or less."""
    sgd = np.mean([row for row in rows if row["fit"] == "sgd"][-1]["layers"])
    fits = [r for r in rows if r["fit"] == "residua" and "tokens" not in r]
    return next((row for row in fits if np.mean(row["layers"]) <= sgd), None)


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The ratios that the targets are about."""
    names = dict.fromkeys(row["fit"] for row in rows if row["fit"] != "residua")
    last = {name: [r for r in rows if r["fit"] == name][-1] for name in names}
    fits = [r for r in rows if r["fit"] == "residua" and "tokens" not in r]
    reached, best = first_to_reach(rows), min(fits, key=lambda r: np.mean(r["layers"]))
    found: dict[str, Any] = {
        "cpu_ratio": None if reached is None else reached["cpu"] / last["sgd"]["cpu"]
    }
    if reached is None:
        print("the KL of the SGD recipe was not reached")
    else:
        print(f"SGD's final KL with {reached['steps']} steps: {found['cpu_ratio']:.4f} of its CPU "
              f"time (target {TARGET_CPU})")  # fmt: skip
    for name, row in last.items():
        by_layer = np.array(best["layers"]) / row["layers"]
        ratio, cpu = np.mean(best["layers"]) / np.mean(row["layers"]), best["cpu"] / row["cpu"]
        found[f"over_{name}"] = {
            "kl": float(ratio),
            "kl_of_layers": by_layer.tolist(),
            "cpu": cpu,
        }
        target = f" (target {TARGET_KL})" if name == "muon" else ""
        layers = " ".join(f"{number:.3f}" for number in by_layer)
        print(f"final KL over {name}'s: {ratio:.3f}{target}, by layer {layers}, in {cpu:.3f} of "
              "its CPU time")  # fmt: skip
    return found


def figures(
    rows: list[dict[str, Any]], cached: float, train: int, args: argparse.Namespace
) -> list[Figure]:
    """CPU seconds until the final KL of SGD, from the cache, and with the extraction of it."""
    sgd, reached = [row for row in rows if row["fit"] == "sgd"][-1], first_to_reach(rows)
    if reached is None:
        return []
    name = "sample model" if args.model == str(MODEL_DIR) else Path(args.model).name
    what = f"tuned lens of {len(sgd['layers'])} layers, {name}, {train:,} rows"
    baseline = (
        f"recipe of the tuned-lens package: SGD, {args.steps} x {args.batch:,} tokens, forward "
        "passes included"
    )
    note = (
        f"held-out KL {np.mean(reached['layers']):.3f} nats after {reached['steps']} steps, the "
        f"baseline's {np.mean(sgd['layers']):.3f}"
    )
    return [
        Figure("lens_cached", f"{what}, from the cache", baseline, [reached["cpu"]], [sgd["cpu"]],
               note),
        Figure("lens_with_extraction", f"{what}, with its extraction", baseline,
               [reached["cpu"] + cached], [sgd["cpu"]], note),
    ]  # fmt: skip


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for name in dict.fromkeys(r["fit"] for r in rows):
        curve = [r for r in rows if r["fit"] == name and "tokens" not in r]
        left.plot(
            [r["cpu"] for r in curve], [np.mean(r["layers"]) for r in curve], ".-", label=name
        )
    left.set(xscale="log", yscale="log", xlabel="CPU seconds", ylabel="held-out KL, nats")
    left.legend()
    curve = [r for r in rows if "tokens" in r]
    for layer in range(len(rows[-1]["layers"])):
        right.plot([r["tokens"] for r in curve], [r["layers"][layer] for r in curve], ".-",
                   label=f"layer {layer}")  # fmt: skip
    if curve:
        right.set(xscale="log", yscale="log")
    right.set(xlabel="cached train tokens", ylabel="held-out KL, nats")
    if curve:
        right.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, one_blas_thread():
        root, texts = args.root or Path(folder), args.texts or library(Path(folder))
        start = time.process_time()
        cache = residua.extract(
            args.model, texts, root=root, context=args.context, max_tokens=args.tokens
        )
        cached = time.process_time() - start
        train = int(cache.sequence_length[cache.sequences("train")].sum())
        held = Held(cache, args.positions)
        logit = " ".join(f"{kl:.4f}" for kl in held.logit())
        print(f"{cache.positions} positions cached in {cached:.1f} CPU s, {train} to train on; "
              f"logit lens {logit}", flush=True)  # fmt: skip
        rows = [
            ours(cache, n, held)
            for n in sorted({n for n in BUDGETS if n < args.final} | {args.final})
        ]
        if args.baselines:
            earlier = json.loads(args.baselines.read_text())["rows"]
            rows += [row for row in earlier if row["fit"] != "residua"]
        else:
            rows += baselines(cache, args, held)
        if not args.no_curve:
            for tokens in [n for n in SIZES if n < train]:
                part = Part(cache.path, tokens)
                rows.append(ours(part, min(400, args.final), held, tokens=tokens))
    found = verdict(rows)
    if args.rows:
        args.rows.write_text(json.dumps({"cache_cpu": cached, "rows": rows, **found}))
    write_results(args.json, figures(rows, cached, train, args))
    if args.png:
        draw(args.png, rows)


if __name__ == "__main__":
    main()
