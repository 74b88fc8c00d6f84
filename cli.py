"""The command line: parses, calls, prints. `residua --help` loads nothing heavy."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from residua import __version__
from residua.analysis.console.options import (
    CONTEXT,
    NUMBER,
    NUMBERS,
    SLICES,
    Commands,
    dropping,
    paired,
    probing,
    residua_command,
    shared,
)

BASELINES = ("unigram", "bigram", "trigram", "lagged", "chain", "marginal")


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="residua")
def main() -> None:
    """Run a language model once, keep its residual streams, fit every probe from the cache.

    \b
    residua quickstart                          the whole flow on a small model, in minutes
    residua extract MODEL texts.jsonl           model + texts -> cache
    residua fit ridge CACHE --offsets 0-3       cache -> probe, without the model
    residua evaluate CACHE PROBE --html r.html  what the probe says, layer by layer
    """


@main.command()
@click.argument("model")
@click.argument("data")
@click.option("--context", type=int, help="Longest sequence in tokens.  [default: the model's, "
              "at most 1024]")  # fmt: skip
@click.option("--pack/--no-pack", default=True, help="Pack documents to the context length, or "
              "keep one sequence per document.")  # fmt: skip
@click.option(
    "--text-column", help="Column that holds the text.  [default: the obvious one, which is said]"
)
@click.option("--separator", metavar="CHARACTER", help="Separator of the columns of .csv and .tsv "
              "files, or `tab`.  [default: , and tab]")  # fmt: skip
@click.option("--split", help="Split of a data set that has several.  [default: train]")
@click.option("--layers", type=NUMBERS, help="Layers to keep; the last one always is.  "
              "[default: all]")  # fmt: skip
@click.option("--positions", default="all", show_default=True, help="Positions to keep: all, "
              "last, sample:K, answer or explicit (columns `answer`, `positions`).")  # fmt: skip
@click.option("--logits", default="recompute", show_default=True, help="Logits to keep: recompute "
              "(none, the head gives them), topk:K or full.")  # fmt: skip
@click.option("--max-tokens", type=int, help="Stop after this many tokens, at a sequence's end.")
@click.option("--max-bytes", type=int, help="Stop where the cache would have more bytes.")
@click.option("--codec", default="raw", show_default=True, help="How chunks are kept: raw, which "
              "reads fastest, or compact, for cold storage.")  # fmt: skip
@click.option("--dtype", default="auto", show_default=True, help="Stored dtype: auto, float16, "
              "bfloat16 or float32.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Seed of the order of documents.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, auto.")
@click.option("--batch-tokens", type=int, help="Tokens of one forward batch.  [default: 4096 on "
              "CPU, on GPU what fits, at most 32768]")  # fmt: skip
@click.option("--part-positions", type=int, help="Positions of a part, the unit of commit and "
              "resume.  [default: 24-48 MiB per layer]")  # fmt: skip
@click.option("--part", metavar="I/N", help="Write only share I of N, for job arrays.")
@click.option("--on-error", type=click.Choice(["quarantine", "raise"]), default="quarantine",
              show_default=True, help="What to do with a sequence that is not finite.")  # fmt: skip
@click.option("--attention", default="default", show_default=True, help="Attention kernel: "
              "default, eager, sdpa, flash_attention_2.")  # fmt: skip
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("--format", type=int, default=2, show_default=True, help="Format of the cache; 1 "
              "finds, finishes and extends those of the first version.")  # fmt: skip
@click.option("--scheduler", metavar="ADDRESS", help="Let the workers of this dask scheduler "
              "share the work, like tcp://host:8786.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what it would take and write nothing.")
@residua_command
def extract(root: Path, quiet: bool, scheduler: str | None, dry_run: bool, **options: Any) -> Any:
    """Run MODEL on the texts of DATA once and keep every layer's residual stream.

    MODEL is a folder saved by transformers or a hub id; DATA a .txt, .jsonl, .csv, .tsv or
    .parquet file, a folder saved by datasets, or a hub id (name or name:config). Asking again
    for what is there is answered at once; an interrupted run goes on where it stopped.

    \b
    residua extract gpt2 texts.jsonl --max-tokens 1000000
    residua extract ./my-model books.txt --context 512 --root caches
    residua extract ./my-model prompts.csv --text-column prompt --no-pack
    residua extract gpt2 texts.jsonl --layers 0,6 --max-bytes 50000000000 --dry-run
    residua extract gpt2 texts.jsonl --logits topk:64
    residua extract gpt2 texts.jsonl --codec compact --dtype bfloat16
    """
    from residua.analysis.console.messages import estimated, extracted
    from residua.analysis.console.terminal import bandwidths, meter
    from residua.cache.extraction.answer_request import answer_request, estimate_request
    from residua.cache.extraction.distributed import answer_at_address
    from residua.cache.extraction.request import ExtractionRequest
    from residua.cache.forward.stage_times import StageTimes

    request = ExtractionRequest(root=root, **options)
    stages = StageTimes()
    with meter(quiet) as shown:
        shown.note("extract", lambda: bandwidths(stages.to_dict()))
        if dry_run:
            wanted = estimate_request(request, shown.stage)
            return wanted.to_dict(), lambda: estimated(wanted.to_dict())
        if scheduler is None:
            value = answer_request(request, shown.stage, stages).to_dict()
        else:
            value = answer_at_address(scheduler, request, shown.stage, stages).to_dict()
    return value, lambda: extracted(value)


@main.command()
@click.argument("one")
@click.argument("other")
@residua_command
def diff(root: Path, quiet: bool, one: str, other: str) -> Any:
    """Name the fields in which the caches ONE and OTHER differ.

    \b
    residua diff 3f2a 81d9
    """
    from residua.analysis.console.messages import differing
    from residua.cache.extraction.resolve import named_differences
    from residua.cache.store.catalog import find_cache

    first, second = find_cache(one, root), find_cache(other, root)
    found = named_differences(first.manifest.identity, second.manifest.identity)
    return {"differences": found}, lambda: differing(first.id, second.id, found)


@main.command("ls")
@residua_command
def list_(root: Path, quiet: bool) -> Any:
    """List the caches under the root.

    \b
    residua ls
    residua ls --root caches --json
    """
    from residua.analysis.console.messages import listed
    from residua.cache.store.catalog import list_caches

    caches = list_caches(root)
    return {"root": str(root), "caches": caches}, lambda: listed(root, caches)


@main.command()
@click.argument("cache")
@residua_command
def info(root: Path, quiet: bool, cache: str) -> Any:
    """Say what CACHE holds: model, tokens, layers, dtypes, measured errors, splits.

    CACHE is any unique prefix of an id, or a path.

    \b
    residua info 3f2a
    residua info caches/3f2a... --json
    """
    from residua.analysis.console.messages import details
    from residua.cache.store.catalog import describe_cache, find_cache

    value = describe_cache(find_cache(cache, root))
    return value, lambda: details(value)


@main.command()
@click.argument("cache")
@residua_command
def verify(root: Path, quiet: bool, cache: str) -> Any:
    """Re-read every byte of CACHE and say what is damaged. Exit code 4 if anything is.

    \b
    residua verify 3f2a
    """
    from residua.analysis.console.messages import verified
    from residua.analysis.console.terminal import meter
    from residua.cache.store.catalog import find_path
    from residua.cache.store.verify import verify as verify_cache

    path = find_path(cache, root)
    with meter(quiet) as shown:
        found = verify_cache(path, shown.of("verify"))
    value = {"path": str(path), **found.to_dict(), "exit_code": 0 if found.ok else 4}
    return value, lambda: verified(found)


@main.command()
@click.argument("cache")
@click.option("--model", help="Where the model is now.  [default: where it was]")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, auto.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@residua_command
def repair(
    root: Path, quiet: bool, cache: str, model: str | None, device: str, trust_remote_code: bool
) -> Any:
    """Verify CACHE and extract its damaged parts again; the rest stays as it is.

    \b
    residua repair 3f2a
    residua repair 3f2a --model /new/place/of/the/model
    """
    from residua.analysis.console.messages import repaired
    from residua.analysis.console.terminal import meter
    from residua.cache.extraction.repair import repair as mend
    from residua.cache.store.catalog import find_path

    path = find_path(cache, root)
    with meter(quiet) as shown:
        found = mend(path, model, device, shown.stage, trust_remote_code)
    value = {"path": str(path), **found.to_dict(), "exit_code": 0 if found.ok else 4}
    return value, lambda: repaired(found)


@main.command()
@click.argument("cache")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--format", type=click.Choice(["safetensors", "numpy"]), default="safetensors",
              show_default=True, help="One .safetensors file per layer, or .npy files to "
              "memory-map.")  # fmt: skip
@click.option("--layers", type=NUMBERS, help="Layers to write.  [default: all]")
@click.option("--split", default="all", show_default=True, help="train, validation, test or all.")
@click.option("--dtype", help="float16, bfloat16 or float32.  [default: as stored]")
@click.option("--logits/--no-logits", default=True, help="Write the logits that the cache keeps.")
@residua_command
def export(root: Path, quiet: bool, cache: str, folder: Path, **options: Any) -> Any:
    """Write CACHE into the new FOLDER as plain safetensors or .npy files, for other tools.

    One file per layer, `(positions, d_model)`, with tokens, sequences, head and tokenizer beside
    it; index.json has the digests. Rows stream: memory stays small.

    \b
    residua export 3f2a layers/
    residua export 3f2a layers/ --format numpy --layers 6,12 --split train
    """
    from residua.analysis.console.messages import exported
    from residua.analysis.console.terminal import meter
    from residua.cache.sharing.export import export as export_cache
    from residua.cache.store.catalog import find_cache

    with meter(quiet) as shown:
        index = export_cache(
            find_cache(cache, root), folder, progress=shown.of("export"), **options
        )
    return {"folder": str(folder), **index}, lambda: exported(folder, index)


@main.command()
@click.argument("cache")
@click.argument("repo", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private, if it is new.")
@click.option("--revision", help="Branch to push to; made if needed.  [default: main]")
@click.option("--verify/--no-verify", default=True, help="Re-read every byte before it is sent.")
@residua_command
def push(root: Path, quiet: bool, cache: str, repo: str, **options: Any) -> Any:
    """Upload CACHE to a dataset repository of the Hugging Face hub, with a card.

    Log in first (`hf auth login`, or set HF_TOKEN). An interrupted push goes on where it
    stopped; a card that is there already is left as it is.

    \b
    residua push 3f2a me/gpt2-residuals
    residua push 3f2a me/gpt2-residuals --private --revision pile-1m
    """
    from residua.analysis.console.messages import pushed
    from residua.analysis.console.terminal import meter
    from residua.cache.sharing.hub import push_cache as upload
    from residua.cache.store.catalog import find_cache

    with meter(quiet) as shown:
        done = upload(find_cache(cache, root), repo, progress=shown.stage, **options)
    return vars(done), lambda: pushed(done)


@main.command()
@click.argument("repo", metavar="USER/NAME")
@click.option("--expect", help="Refuse any cache whose id does not begin so.")
@click.option("--revision", help="Branch, tag or commit.  [default: main]")
@residua_command
def pull(root: Path, quiet: bool, repo: str, expect: str | None, revision: str | None) -> Any:
    """Download the cache of a dataset repository of the Hugging Face hub.

    Every byte is checked before the cache appears under the root; a cache that is there is a
    hit. An interrupted pull goes on where it stopped.

    \b
    residua pull someone/gpt2-residuals
    residua pull someone/gpt2-residuals --expect 3f2a --root caches
    """
    from residua.analysis.console.messages import pulled
    from residua.analysis.console.terminal import meter
    from residua.cache.sharing.hub import pull_cache as download

    with meter(quiet) as shown:
        value = download(
            repo, root, expect=expect, revision=revision, progress=shown.stage
        ).to_dict()
    return value, lambda: pulled(value)


@main.group()
def fit() -> None:
    """Fit a probe from a cache, out of core, without the model."""


@fit.command()
@probing
@click.option("--alpha", type=NUMBER, help="One fixed penalty, scikit-learn's meaning.  [default: "
              "the best of a path by cross-validation]")  # fmt: skip
@click.option("--folds", default=5, show_default=True, help="Folds of the cross-validation.")
@click.option(
    "--products",
    type=click.Choice(["float64", "float32"]),
    default="float64",
    show_default=True,
    help="dtype of block products; float32 is twice as fast, to 1e-6.",
)
@click.option("--target", type=NUMBERS, help="Layers to predict.  [default: the last]")
@click.option("--keep-moments/--no-keep-moments", "keep", default=None, help="Keep the moments "
              "with the cache, for later fits.  [default: where they take at most a quarter of "
              "the residual streams' bytes]")  # fmt: skip
@residua_command
def ridge(
    root: Path, quiet: bool, cache: str, offsets: tuple[int, ...], layers: tuple[int, ...] | None,
    across_documents: bool, drop_first: int, alpha: float | None, folds: int, products: str,
    target: tuple[int, ...] | None, **options: Any,
) -> Any:  # fmt: skip
    """Ridge maps from every layer to the last layer N tokens on, in one pass over CACHE.

    The penalty of each (layer, offset) is chosen by exact cross-validation. Read through the
    model's head, the map is a lens. Moments that were kept with the cache, or with one that it
    extends, are not collected again.

    \b
    residua fit ridge 3f2a --offsets 0-3
    residua fit ridge 3f2a --offsets 1 --layers 4-8 --out my-probe
    residua fit ridge 3f2a --layers 0-3 --target 6,9 --memory 4 --keep-moments
    residua fit ridge 3f2a --offsets 0-3 --control shuffled
    """
    from residua.analysis.console.actions import fit_and_save
    from residua.analysis.console.messages import fitted
    from residua.probes.ridge.ridge_probe import RidgeProbe

    ridge = RidgeProbe(offsets=offsets, layers=layers, alpha=alpha, folds=folds, products=products,
                       target=target, across_documents=across_documents,
                       drop_first=drop_first)  # fmt: skip
    source, probe, path = fit_and_save(
        ridge, cache, root, quiet, stage="moments", resumes=False, **options
    )
    metrics = probe.metrics()
    moments = getattr(probe, "probe_", probe).moments_
    value = {"probe": str(path), "cache": source.id, "metrics": metrics, "moments": moments}
    return value, lambda: fitted(
        probe.kind, source.id, path, metrics, moments, target is None or source.n_blocks in target
    )


@fit.command()
@click.argument("cache")
@click.argument("kinds", nargs=-1, metavar="[KIND]...", type=click.Choice(BASELINES))
@click.option("--offsets", type=NUMBERS, default="0-3", show_default=True, help="Predict N tokens "
              "further on; those at which a kind says nothing are left out.")  # fmt: skip
@paired
@shared
@residua_command
def baseline(
    root: Path, quiet: bool, cache: str, kinds: tuple[str, ...], offsets: tuple[int, ...],
    across_documents: bool, scheduler: str | None,
) -> Any:  # fmt: skip
    """Baselines that count the tokens of the train split of CACHE, and read no layer.

    KIND is unigram (the marginal), bigram (reads x[t+N]), trigram (x[t+N-1] too), lagged (x[t]
    alone, counted at the distance), chain (x[t] alone, by bigram steps) or marginal (the model's
    distribution at t, then bigram steps). Without one, all of them.

    \b
    residua fit baseline 3f2a
    residua fit baseline 3f2a trigram lagged --offsets 1-8
    """
    from residua.analysis.console.messages import fitted
    from residua.cache.cluster import connected
    from residua.cache.store.catalog import find_cache
    from residua.probes.baselines.token_counts import unfitted_baselines
    from residua.probes.saved.library import new_probe_path
    from residua.probes.saved.save import save_probe

    source, found = find_cache(cache, root), []
    with connected(scheduler) as client:
        for probe in unfitted_baselines(kinds or BASELINES, offsets, across_documents):
            path = new_probe_path(root, probe, source.id)
            save_probe(probe.fit(source, client=client), path)
            found.append({"kind": probe.kind, "probe": str(path), "metrics": probe.metrics()})

    def show() -> None:
        for one in found:
            fitted(one["kind"], source.id, Path(one["probe"]), one["metrics"])

    return {"cache": source.id, "probes": found}, show


@fit.command()
@probing
@click.option("--steps", default=400, show_default=True, help="Steps of each translator.")
@click.option("--batch", default=1024, show_default=True, help="Positions of a step.")
@click.option("--lr", type=NUMBER, help="Share of the natural gradient's full step.  [default: the "
              "best of a short sweep]")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Seed of the order of positions.")
@residua_command
def lens(
    root: Path, quiet: bool, cache: str, offsets: tuple[int, ...], layers: tuple[int, ...] | None,
    across_documents: bool, drop_first: int, steps: int, batch: int, lr: float | None, seed: int,
    **options: Any,
) -> Any:  # fmt: skip
    """A tuned lens: translators of every layer, fitted to the model's own distribution.

    Starts from ridge, minimises KL(model || lens) by natural-gradient steps, and keeps the best
    on the validation split. A fit that was interrupted goes on where it was.

    \b
    residua fit lens 3f2a
    residua fit lens 3f2a --offsets 0-8 --layers 4-8
    """
    from residua.analysis.console.actions import fit_and_save
    from residua.analysis.console.messages import fitted
    from residua.probes.lens.tuned_lens import FutureLens, TunedLens

    kind = TunedLens if offsets == (0,) else FutureLens
    lens = kind(offsets=offsets, layers=layers, lr=lr, steps=steps, batch=batch, seed=seed,
                across_documents=across_documents, drop_first=drop_first)  # fmt: skip
    source, probe, path = fit_and_save(lens, cache, root, quiet, **options)
    metrics = probe.metrics()
    value = {"probe": str(path), "cache": source.id, "metrics": metrics}
    return value, lambda: fitted(probe.kind, source.id, path, metrics)


@fit.command()
@probing
@click.option("--loss", type=click.Choice(["model", "text", "kl"]), default="model",
              show_default=True, help="Cross-entropy to the model's top token or to the text's, or "
              "KL to the model's distribution.")  # fmt: skip
@click.option("--form", type=click.Choice(["full", "head"]), default="full", show_default=True,
              help="A matrix to the vocabulary, or a map in front of the head.")  # fmt: skip
@click.option("--rank", type=int, help="Rank of the matrix.  [default: full]")
@click.option("--lr", type=NUMBER, help="Learning rate.  [default: by a short sweep]")
@click.option("--epochs", default=3, show_default=True, help="Most passes over the train split.")
@click.option("--checkpoint-seconds", type=NUMBER, default=60.0, show_default=True, help="Time "
              "between two checkpoints; a killed fit goes on from the last one.")  # fmt: skip
@residua_command
def vocab(
    root: Path, quiet: bool, cache: str, offsets: tuple[int, ...], layers: tuple[int, ...] | None,
    across_documents: bool, drop_first: int, loss: str, form: str, rank: int | None,
    lr: float | None, epochs: int, **options: Any,
) -> Any:  # fmt: skip
    """Softmax regressions from every layer to the token N further on, in one stream over CACHE.

    They stop when their loss on the validation split no longer falls. Losses are in nats per
    position. A fit that was killed goes on when the same command is given again.

    \b
    residua fit vocab 3f2a --offsets 0-3
    residua fit vocab 3f2a --offsets 1 --layers 4-8 --loss kl --rank 64
    """
    from residua.analysis.console.actions import fit_and_save
    from residua.analysis.console.messages import fitted
    from residua.probes.vocabulary.vocab_probe import VocabProbe

    vocab = VocabProbe(offsets=offsets, layers=layers, loss=loss, form=form, rank=rank, lr=lr,
                       epochs=epochs, across_documents=across_documents,
                       drop_first=drop_first)  # fmt: skip
    source, probe, path = fit_and_save(vocab, cache, root, quiet, stage="positions", **options)
    metrics, sweep = probe.metrics(), getattr(probe, "probe_", probe).sweep_
    value = {"probe": str(path), "cache": source.id, "metrics": metrics, "sweep": sweep}
    return value, lambda: fitted(probe.kind, source.id, path, metrics)


@main.command()
@click.argument("cache")
@click.argument("probes", nargs=-1, metavar="PROBE...")
@click.option("--offsets", type=NUMBERS, help="Offsets.  [default: those of the probes, else 0-3]")
@click.option("--layers", type=NUMBERS, help="Layers.  [default: all]")
@click.option("--split", default="test", show_default=True, help="train, validation, test or all.")
@click.option("--max-positions", default=16384, show_default=True, help="Positions to evaluate.")
@paired
@dropping
@click.option("--seed", default=0, show_default=True, help="Seed of the choice of sequences.")
@click.option("--where", type=click.Choice(SLICES), help="Count only what the model says inside "
              "words (continued) or capitalised words (names) of several tokens.")  # fmt: skip
@click.option("--force", is_flag=True, help="Use probes of another model's geometry all the same.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a self-contained report.")
@click.option("--png", type=click.Path(path_type=Path), help="Folder to write pictures to.")
@residua_command
def evaluate(
    root: Path, quiet: bool, cache: str, probes: Sequence[str], where: str | None, force: bool,
    html: Path | None, png: Path | None, **options: Any,
) -> Any:  # fmt: skip
    """Measure PROBEs on the held-out split of CACHE, beside the logit lens and a bigram.

    PROBE is a folder, or a name (or unique prefix) under the root. KL is in nats per position
    from the model to the probe, kl_reverse the other way; precision@k, nll and surprisal are
    against the model's own top token. Buckets are the same by the model's largest probability.

    \b
    residua evaluate 3f2a ridge-3f2a
    residua evaluate 3f2a ridge-3f2a --html report.html --png pictures
    """
    from residua.analysis.console.actions import check_outputs, write_outputs
    from residua.analysis.console.messages import evaluated
    from residua.analysis.console.terminal import meter
    from residua.analysis.evaluation import position_masks as slices
    from residua.analysis.evaluation.evaluate import evaluate as measure
    from residua.cache.store.catalog import find_cache
    from residua.probes.saved.library import find_probe, load_probe_for

    check_outputs(html, png)
    source = find_cache(cache, root)
    loaded = [load_probe_for(source, find_probe(name, root), force) for name in probes]
    with meter(quiet) as shown:
        mask = None if where is None else slices.SLICES[where](source)
        found = measure(
            source, loaded, where=mask, force=force, progress=shown.of("evaluate"), **options
        )
    written = write_outputs(found, html, png, " ".join(["residua", *sys.argv[1:]]))
    value = {"cache": source.id, "where": where, **found.about(),
             "rows": found.to_dicts(), "buckets": found.bucket_dicts()}  # fmt: skip
    return {**value, "files": written}, lambda: evaluated(found, written)


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("quickstart"),
              show_default=True, help="Folder for the report, the pictures and the cache."
              )  # fmt: skip
@click.option("--max-tokens", type=int, help="Use less text.")
@residua_command
def quickstart(root: Path, quiet: bool, out: Path, max_tokens: int | None) -> Any:
    """The whole flow on a small model and text that come along: about two minutes.

    Extracts every layer, fits ridge probes for the next token and three further on, measures
    them on held-out text, and writes a report with pictures.

    \b
    residua quickstart
    residua quickstart --out /tmp/residua --json
    """
    from residua.analysis.console.messages import started
    from residua.analysis.console.quickstart import run_quickstart
    from residua.analysis.console.terminal import meter

    with meter(quiet) as shown:
        value, found = run_quickstart(
            out, root if "--root" in sys.argv else None, max_tokens, shown
        )
    return value, lambda: started(value, found)


if __name__ == "__main__":
    main()
