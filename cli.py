"""The command line `residua`: parses arguments, calls one function, prints its result.

Options that several commands share are in analysis/console/options.py, printed messages in
analysis/console/messages.py. Every command imports what it needs when it runs, so that
`residua --help` loads nothing heavy.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from residua import __version__
from residua.analysis.commands.data_commands import data
from residua.analysis.commands.prompt_commands import fit_jacobian, fit_prompt, intervene
from residua.analysis.commands.study_commands import study
from residua.analysis.console.options import (
    BYTE_COUNT,
    CONTEXT,
    DURATION,
    LAYERS,
    MASKS,
    MODE_WITH_COUNT,
    NUMBER,
    NUMBERS,
    WHOLE_NUMBER,
    JsonErrorGroup,
    across_documents_option,
    cache_argument,
    checkpoint_option,
    complete_names,
    confirm,
    device_option,
    drop_first_option,
    is_given,
    layers_option,
    memory_option,
    out_option,
    probe_options,
    residua_command,
    scheduler_option,
    server_of_command,
)

BASIS_METHODS = ("joint", "greedy", "one-shot", "fisher")
BASIS_METRICS = ("covariance", "euclidean")
BASIS_REFERENCES = ("mean", "zero", "resample")
MAP_MEASURES = ("probability", "entropy", "kl", "rank")
BASELINES = ("unigram", "bigram", "trigram", "lagged", "chain", "marginal")


@click.group(cls=JsonErrorGroup, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="residua")
def main() -> None:
    """Run a language model once, keep its residual streams, fit every probe from the cache.

    A cache holds the residual stream of every layer for every token of some texts, and the head
    (final norm and unembedding). A probe reads a layer and predicts the model's tokens.

    \b
    residua quickstart                          the whole flow on a small model, in minutes
    residua extract MODEL texts.jsonl           model + texts -> cache
    residua fit ridge CACHE --offsets 0-3       cache -> probe, without the model
    residua evaluate CACHE PROBE --html r.html  measures layer by layer, on held-out text
    """


@main.command()
@click.argument("model")
@click.argument("data")
@click.option(
    "--context",
    type=WHOLE_NUMBER,
    help="Longest sequence in tokens.  [default: the model's, at most 1024]",
)
@click.option(
    "--pack/--no-pack",
    default=True,
    help="Pack documents to the context length, or keep one sequence per document.",
)
@click.option(
    "--text-column",
    help="Column that holds the text, a conversation, or a list of token ids.  [default: the "
    "obvious one, whose name is printed]",
)
@click.option(
    "--separator",
    metavar="CHARACTER",
    help="Separator of columns in .csv and .tsv files, one character or `tab`.  [default: , and "
    "tab]",
)
@click.option("--split", help="Split of a data set that has several.  [default: train]")
@click.option(
    "--data-format",
    metavar="FORMAT",
    help="Format of standard input, or of files whose names do not tell it: txt, jsonl, json, csv, "
    "tsv, parquet.",
)
@click.option(
    "--bos",
    metavar="POLICY",
    default="auto",
    show_default=True,
    help="Special tokens: auto (those that the tokenizer adds to a text; if it adds none, BOS or "
    "EOS before each packed document), none, document (BOS before each document), context (also at "
    "the start of every packed context), bos-eos (BOS before and EOS after each document).",
)
@click.option(
    "--generation-prompt",
    is_flag=True,
    help="End each conversation with the beginning of a turn of the assistant.",
)
@click.option(
    "--layers",
    type=LAYERS,
    help="Layers to keep; the last layer, which the logits come from, is always kept.  "
    "[default: all]",
)
@click.option(
    "--positions",
    type=MODE_WITH_COUNT,
    default="all",
    show_default=True,
    help="Positions to keep: all, last, sample:K, answer or explicit (columns `answer`, "
    "`positions` of the data); of images all, cls (the class token) or sample:K.",
)
@click.option(
    "--logits",
    type=MODE_WITH_COUNT,
    default="recompute",
    show_default=True,
    help="Logits to keep: recompute (none: the last layer and the head give them), topk:K or full.",
)
@click.option(
    "--max-tokens",
    type=WHOLE_NUMBER,
    help="Read at most this many tokens of text. Only whole sequences count, so there may be up to "
    "a context less; such as 1000000, 1e6 or 1M.",
)
@click.option(
    "--max-bytes",
    type=BYTE_COUNT,
    help="Make a cache of at most this many bytes, such as 50GB; stops at the end of a sequence.",
)
@click.option(
    "--codec",
    default="raw",
    show_default=True,
    help="Encoding of chunks: raw, which reads fastest, or compact, compressed for cold storage.",
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="Stored dtype: auto (the model's), float16, bfloat16 or float32.",
)
@click.option(
    "--seed",
    type=WHOLE_NUMBER,
    default=0,
    show_default=True,
    help="Seed of the order of documents.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Device of the model: auto, cpu, cuda, cuda:1, mps.",
)
@click.option(
    "--device-map",
    metavar="MAP",
    help="For a model larger than one device: auto spreads it over all GPUs, the host's memory and "
    "the disk (by accelerate); also balanced, sequential.",
)
@click.option(
    "--batch-tokens",
    type=WHOLE_NUMBER,
    help="Tokens of one forward batch.  [default: 4096 on CPU, on GPU what fits, at most 32768]",
)
@click.option(
    "--part-positions",
    type=WHOLE_NUMBER,
    help="Positions of a part, the unit of commit and resume.  [default: 24-48 MiB per layer]",
)
@click.option("--part", metavar="I/N", help="Share of the parts to write, I of N, for job arrays.")
@click.option(
    "--on-error",
    type=click.Choice(["quarantine", "raise"]),
    default="quarantine",
    show_default=True,
    help="Treatment of a sequence whose activations are not finite: left out of all splits, or "
    "an error.",
)
@click.option(
    "--attention",
    default="default",
    show_default=True,
    help="Attention kernel: default, eager, sdpa, flash_attention_2.",
)
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option(
    "--format",
    type=int,
    default=2,
    show_default=True,
    help="Format of the cache; 1 finds, finishes and extends caches of the first version.",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Address of a dask scheduler, like tcp://host:8786, whose workers share the work.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the size of the cache and the first tokens of three sequences; write nothing.",
)
@click.option(
    "--find",
    is_flag=True,
    help="Say which cache answers the request, and what it lacks; load no weights, write nothing.",
)
@click.option(
    "--no-tty",
    is_flag=True,
    help="Print progress as lines with rate and time left, every half minute, as is done for long "
    "work without a terminal; with --json, too.",
)
@residua_command
def extract(
    root: Path,
    quiet: bool,
    scheduler: str | None,
    dry_run: bool,
    find: bool,
    no_tty: bool,
    **options: Any,
) -> Any:
    """Run MODEL on the texts of DATA and keep every layer.

    The cache holds the residual stream of every layer at every token, and the model's head.

    MODEL is a folder saved by transformers or a hub id. DATA is a .txt, .jsonl, .json, .csv, .tsv
    or .parquet file (or .gz of one), a quoted pattern or a folder of such files, - for standard
    input, a folder saved by datasets, or a hub id (name or name:config). The same command again
    finds the finished cache; after an interruption, the same command goes on where the extraction
    stopped. More layers or tokens extend a cache.

    \b
    Documents. docs/data.md says more.
      .txt     pieces between <|endoftext|> marks; without any, the whole file, or with --no-pack
               each line
      others   one per row, line or item
      text     the column text, content, document, sentence, story or prompt; else the only one
      chat     columns of turns (messages: role, content), rendered with the model's chat template
      tokens   the column input_ids, without what attention_mask masks; no special token is added
      answer   the answer's words in the text; answer_start is its first character, else the last
               occurrence counts: --positions answer keeps the tokens before each of its tokens
      positions  a list of token numbers of the row, -1 the last, for --positions explicit
    Documents are shuffled (--seed); a tenth of them is test, a tenth validation, by the hash of
    their content. Packed contexts hold documents of one split.

    \b
    residua extract gpt2 texts.jsonl --max-tokens 1000000
    residua extract ./my-model books.txt --context 512 --root caches
    residua extract ./my-model prompts.csv --text-column prompt --no-pack
    residua extract gpt2 'shards/*.jsonl.gz' --dry-run
    zcat texts.jsonl.gz | residua extract gpt2 - --max-tokens 1000000
    residua extract gpt2 texts.jsonl --layers 0,6 --max-bytes 50000000000 --dry-run
    residua extract gpt2 texts.jsonl --find
    residua extract gpt2 texts.jsonl --logits topk:64
    residua extract gpt2 texts.jsonl --codec compact --dtype bfloat16
    """
    from residua.analysis.console.messages import print_estimate, print_extraction, print_match
    from residua.analysis.console.terminal import Meter, bandwidths
    from residua.analysis.console.token_preview import with_token_labels
    from residua.cache.extraction.answer import answer_request, estimate_request, find_match
    from residua.cache.extraction.distributed import answer_at_address
    from residua.cache.extraction.request import ExtractionRequest
    from residua.cache.forward.stage_times import StageTimes

    request = ExtractionRequest(root=root, **options)
    stages = StageTimes()
    with Meter(quiet and not no_tty, lines=no_tty) as meter:
        meter.note("extract", lambda: bandwidths(stages.to_dict()))
        if dry_run:
            estimate = with_token_labels(request, estimate_request(request, meter.stage))
            return estimate, lambda: print_estimate(estimate)
        if find:
            match = find_match(request, meter.stage).to_dict()
            return match, lambda: print_match(match)
        if scheduler is None:
            value = answer_request(request, meter.stage, stages).to_dict()
        else:
            value = answer_at_address(scheduler, request, meter.stage, stages).to_dict()
    return value, lambda: print_extraction(value, request.max_tokens)


@main.command()
@click.argument("first")
@click.argument("second")
@residua_command
def diff(root: Path, quiet: bool, first: str, second: str) -> Any:
    """Name the fields in which the caches FIRST and SECOND differ.

    \b
    residua diff 3f2a 81d9
    """
    from residua.analysis.console.messages import print_differences
    from residua.cache.extraction.resolve import named_differences
    from residua.cache.store.catalog import find_cache

    caches = [find_cache(name, root) for name in (first, second)]
    first_id, second_id = (cache.id for cache in caches)
    differences = named_differences(*(cache.manifest.identity for cache in caches))
    return (
        {"differences": differences},
        lambda: print_differences(first_id, second_id, differences),
    )


@main.command("ls")
@residua_command
def list_(root: Path, quiet: bool) -> Any:
    """List the caches under the root.

    \b
    residua ls
    residua ls --root caches --json
    """
    from residua.analysis.console.messages import print_caches
    from residua.cache.store.catalog import list_caches

    caches = list_caches(root)
    return {"root": str(root), "caches": caches}, lambda: print_caches(root, caches)


@main.command()
@residua_command
def probes(root: Path, quiet: bool) -> Any:
    """List the probes under the root.

    Kind, layers, offsets N, the cache of the fit, and what the fit measured by itself: the KL to
    the model (lenses), R2 (ridge), the loss (vocabulary probes).

    \b
    residua probes
    residua probes --root caches --json
    """
    from residua.analysis.console.saved_messages import print_probes
    from residua.probes.saved.probe_list import list_probes

    saved = list_probes(root)
    return {"root": str(root), "probes": saved}, lambda: print_probes(root, saved)


@main.command()
@click.argument("name", metavar="CACHE|PROBE", shell_complete=complete_names)
@residua_command
def info(root: Path, quiet: bool, name: str) -> Any:
    """Show the contents of a cache and its measured errors, or a probe and its measures.

    Contents of a cache are model, tokens, layers, dtypes and splits; of a probe its cache, its
    parameters and a line per layer and offset. CACHE is any unique prefix of an id, PROBE one of a
    name; or a path.

    \b
    residua info 3f2a
    residua info ridge-3f2a
    residua info caches/3f2a... --json
    """
    from residua.analysis.console.messages import print_cache
    from residua.analysis.console.saved_actions import find_saved
    from residua.analysis.console.saved_messages import print_probe
    from residua.cache.store.activation_cache import ActivationCache
    from residua.cache.store.catalog import describe_cache
    from residua.probes.saved.probe_list import describe_probe

    item = find_saved(name, root)
    if item.kind == "probe":
        probe = describe_probe(item.path)
        return probe, lambda: print_probe(probe)
    value = describe_cache(ActivationCache(item.path))
    return value, lambda: print_cache(value)


@main.command("rm")
@click.argument(
    "names", nargs=-1, required=True, metavar="CACHE|PROBE...", shell_complete=complete_names
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--force",
    is_flag=True,
    help="Remove also what a probe, an extending cache, a job or a pin still names.",
)
@residua_command
def remove(root: Path, quiet: bool, names: tuple[str, ...], yes: bool, force: bool) -> Any:
    """Remove caches and probes, after asking.

    A cache that a probe, an extending cache, a job or a pin still names is left alone (exit code
    2), unless that is removed in the same command, or with --force; so is, always, one that
    another process writes. Caches that extend a removed cache, or were copied from it on the same
    disk, keep the files that they share with it. Probes of a removed cache stay.

    \b
    residua rm 3f2a ridge-3f2a
    residua rm ridge-3f2a lens-3f2a --yes
    residua rm 3f2a --force
    """
    from residua.analysis.console.saved_actions import plan_removals, remove_saved
    from residua.analysis.console.saved_messages import describe_removal, print_removals
    from residua.cache.errors import UsageError

    removals = plan_removals(names, root, force)
    if not yes:
        if quiet:
            raise UsageError("rm asks before it removes, and --json cannot: give --yes too")
        for removal in removals:
            click.echo(describe_removal(removal), err=True)
        yes = confirm("Remove?")
    for removal in removals if yes else ():
        remove_saved(removal, force)
    value = {"removed": [removal.to_dict() for removal in removals if yes]}
    return value, lambda: print_removals(removals, yes)


@main.command()
@residua_command
def du(root: Path, quiet: bool) -> Any:
    """Show what takes the disk under the root, what names it, and what could go.

    Caches, moments, probes, checkpoints, jobs, and leftovers of killed work, each with its bytes,
    and those that go free when it goes alone: files that caches share (hard links) count once.
    Nothing is written or removed; `residua gc` and `residua rm` do that.

    \b
    residua du
    residua du --root caches --json
    """
    from residua.analysis.console.disk_messages import print_disk
    from residua.analysis.disk_use.collection import possible_savings
    from residua.analysis.disk_use.disk_report import measure_disk

    report = measure_disk(root)
    savings = possible_savings(report)
    value = {**report.to_dict(), "would_free": savings}
    return value, lambda: print_disk(report, savings)


@main.command()
@click.option(
    "--leftovers",
    is_flag=True,
    help="What killed work left: unfinished files and folders, checkpoints of saved probes.  "
    "[default, if no other category is given]",
)
@click.option(
    "--unused-caches",
    is_flag=True,
    help="Caches that no probe, job, pin or kept cache names, finished or not.",
)
@click.option(
    "--checkpoints",
    is_flag=True,
    help="Checkpoints of unfinished fits, from which the same command would go on.",
)
@click.option("--moments", is_flag=True, help="Moments kept with caches; fits sum them again.")
@click.option("--jobs", is_flag=True, help="Folders of jobs of the service that have ended.")
@click.option(
    "--lost-parts",
    is_flag=True,
    help="Shards that no record names, which `residua repair` may still save.",
)
@click.option(
    "--older-than",
    type=DURATION,
    help="Leave alone what was used since, such as 12h, 30d, 2w.  [default: 1w for copies and "
    "pulls that can go on, else 0]",
)
@click.option("--dry-run", is_flag=True, help="Show what would go; remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@residua_command
def gc(
    root: Path,
    quiet: bool,
    older_than: float | None,
    dry_run: bool,
    yes: bool,
    **chosen: bool,
) -> Any:
    """Remove what is not needed under the root, by category, after showing it and asking.

    What a probe, an extending cache, a job or a pin names stays, and so does what a process works
    at; both are asked for again at the moment of removal. Files that are not residua's are never
    touched.

    \b
    residua gc
    residua gc --unused-caches --older-than 30d --dry-run
    residua gc --leftovers --checkpoints --moments --yes
    """
    from residua.analysis.console.disk_messages import describe_plan, print_collected, print_plan
    from residua.analysis.console.terminal import Meter, visible_text
    from residua.analysis.disk_use.collection import LEFTOVERS, collect, plan_collection
    from residua.cache.errors import UsageError

    categories = [name.replace("_", "-") for name, given in chosen.items() if given]
    plan = plan_collection(root, categories or [LEFTOVERS], older_than)
    if dry_run:
        return {**plan.to_dict(), "removed": False}, lambda: print_plan(plan)
    if plan.removals and not yes:
        if quiet:
            raise UsageError(
                "gc asks before it removes, and --json cannot: give --yes or --dry-run too"
            )
        for line in describe_plan(plan):
            click.echo(visible_text(line), err=True)
        if not confirm("Remove?"):
            return {**plan.to_dict(), "removed": False}, lambda: print("nothing was removed")
    with Meter(quiet) as meter:
        collected = collect(plan, meter.progress_of("remove"))
    return {**collected.to_dict(), "removed": True}, lambda: print_collected(collected)


@main.command()
@click.argument("names", nargs=-1, metavar="[CACHE|PROBE]...", shell_complete=complete_names)
@click.option("--reason", default="", help="Why, for whoever finds the pin.")
@click.option("--remove", is_flag=True, help="Take the pins of these names away.")
@residua_command
def pin(root: Path, quiet: bool, names: tuple[str, ...], reason: str, remove: bool) -> Any:
    """Keep caches and probes from `gc` and `rm`, or list what is pinned.

    A pin is a small file under the root, with the reason and the date; everybody who uses the root
    sees it. Without a name, the pins are listed.

    \b
    residua pin 3f2a --reason "figures of the paper"
    residua pin
    residua pin --remove 3f2a
    """
    from residua.analysis.console.disk_messages import print_pins
    from residua.analysis.console.saved_actions import pin_item
    from residua.analysis.disk_use.pins import list_pins, unpin_saved
    from residua.cache.errors import UsageError

    if not names:
        if remove or reason:
            raise UsageError("name a cache or probe; without a name, pins are listed")
        pins = list_pins(root)
        return (
            {"root": str(root), "pins": [pin.to_dict() for pin in pins]},
            lambda: print_pins(root, pins, "pinned"),
        )
    if remove:
        changed, verb = [unpin_saved(root, name) for name in names], "no longer pinned"
    else:
        changed, verb = [pin_item(name, root, reason) for name in names], "pinned"
    return (
        {"root": str(root), "pins": [pin.to_dict() for pin in changed], "removed": remove},
        lambda: print_pins(root, changed, verb),
    )


@main.command()
@cache_argument()
@residua_command
def verify(root: Path, quiet: bool, cache: str) -> Any:
    """Re-read every byte of CACHE and name damaged files.

    The exit code is 4 if a file is damaged; then the last line is the command that mends it.

    \b
    residua verify 3f2a
    """
    from residua.analysis.console.messages import print_verification, repair_command
    from residua.analysis.console.terminal import Meter
    from residua.cache.store.catalog import find_path
    from residua.cache.store.verification import verify as verify_cache

    path = find_path(cache, root)
    with Meter(quiet) as meter:
        verification = verify_cache(path, meter.progress_of("verify"))
    exit_code = 0 if verification.ok else 4
    remedy = repair_command(path, verification)
    value = {"path": str(path), **verification.to_dict(), "next": remedy, "exit_code": exit_code}
    return value, lambda: print_verification(verification, remedy)


@main.command()
@cache_argument()
@click.option("--model", help="Folder or hub id of the model.  [default: where it was]")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, auto.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@residua_command
def repair(
    root: Path, quiet: bool, cache: str, model: str | None, device: str, trust_remote_code: bool
) -> Any:
    """Extract the damaged parts of CACHE again.

    Verifies CACHE first; whole parts are left alone.

    \b
    residua repair 3f2a
    residua repair 3f2a --model /new/place/of/the/model
    """
    from residua.analysis.console.messages import print_repair
    from residua.analysis.console.terminal import Meter
    from residua.cache.extraction.damage_repair import repair as repair_cache
    from residua.cache.store.catalog import find_path

    path = find_path(cache, root)
    with Meter(quiet) as meter:
        repaired = repair_cache(path, model, device, meter.stage, trust_remote_code)
    value = {"path": str(path), **repaired.to_dict(), "exit_code": 0 if repaired.ok else 4}
    return value, lambda: print_repair(repaired)


@main.command()
@cache_argument()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--format",
    type=click.Choice(["safetensors", "numpy"]),
    default="safetensors",
    show_default=True,
    help="One .safetensors file per layer, or .npy files to memory-map.",
)
@click.option("--layers", type=LAYERS, help="Layers to write.  [default: all]")
@click.option(
    "--split",
    default="all",
    show_default=True,
    help="Split to write: train, validation, test or all.",
)
@click.option("--dtype", help="float16, bfloat16 or float32.  [default: as stored]")
@click.option("--logits/--no-logits", default=True, help="Write the logits that the cache keeps.")
@residua_command
def export(root: Path, quiet: bool, cache: str, folder: Path, **options: Any) -> Any:
    """Write CACHE as plain safetensors or .npy files into FOLDER.

    FOLDER must be new. One file per layer, `(positions, d_model)`, beside files of tokens,
    sequences, head and tokenizer; index.json has the digests. Rows stream: memory stays small.

    \b
    residua export 3f2a layers/
    residua export 3f2a layers/ --format numpy --layers 6,12 --split train
    """
    from residua.analysis.console.messages import print_export
    from residua.analysis.console.terminal import Meter
    from residua.cache.number_ranges import absolute_numbers
    from residua.cache.sharing.flat_export import export as export_cache
    from residua.cache.store.catalog import find_cache

    source = find_cache(cache, root)
    options["layers"] = absolute_numbers(options["layers"], source.n_blocks)
    with Meter(quiet) as meter:
        index = export_cache(source, folder, progress=meter.progress_of("export"), **options)
    return {"folder": str(folder), **index}, lambda: print_export(folder, index)


@main.command()
@click.argument("name", metavar="CACHE|PROBE", shell_complete=complete_names)
@click.argument("target", metavar="USER/NAME|ROOT")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", help="Branch to push to, created if needed.  [default: main]")
@click.option("--verify/--no-verify", default=True, help="Re-read every byte of a cache.")
@residua_command
def push(root: Path, quiet: bool, name: str, target: str, **options: Any) -> Any:
    """Share a cache or probe: upload it to the Hugging Face hub, or copy it to another root.

    USER/NAME is a repository of the hub (data sets for caches, models for probes), created if
    needed and given a card. Log in first (`hf auth login`, or set HF_TOKEN). A card that the
    repository already has is not changed. Any other target, and a folder that exists, is a ROOT: a
    folder that others see too, or a URL such as s3://bucket/caches. On one disk the copy shares the
    files. An interrupted push goes on where it stopped.

    \b
    residua push 3f2a me/gpt2-residuals
    residua push 3f2a me/gpt2-residuals --private --revision pile-1m
    residua push 3f2a /shared/caches
    residua push ridge-3f2a /shared/caches
    """
    from residua.analysis.console.messages import root_option
    from residua.analysis.console.saved_actions import push_saved
    from residua.analysis.console.saved_messages import print_push
    from residua.analysis.console.terminal import Meter

    with Meter(quiet) as meter:
        value = push_saved(name, target, root, meter.stage, **options)
    return value, lambda: print_push(value, root_option(target))


@main.command()
@click.argument("source", metavar="USER/NAME|PATH")
@click.option(
    "--kind",
    type=click.Choice(["cache", "probe"]),
    help="What to fetch where USER/NAME is both.  [default: the cache, else the probe]",
)
@click.option(
    "--expect",
    help="Beginning of the id of the cache, or of the cache that a probe was fitted on; others are "
    "refused.",
)
@click.option("--revision", help="Branch, tag or commit.  [default: main]")
@residua_command
def pull(root: Path, quiet: bool, source: str, **options: Any) -> Any:
    """Fetch a cache or probe from the Hugging Face hub, or from a path.

    USER/NAME is a repository that `residua push` made: a dataset repository of a cache, or a model
    repository of a probe. PATH is the folder of a cache or probe under another root; the last part
    may be the beginning of its name. Every byte is checked before the cache or probe appears under
    the root; a cache that is already there is not fetched. An interrupted pull goes on where it
    stopped.

    \b
    residua pull someone/gpt2-residuals
    residua pull someone/gpt2-residuals --expect 3f2a --root caches
    residua pull someone/gpt2-lens --revision small
    residua pull /shared/caches/3f2a
    residua pull /shared/caches/probes/ridge-3f2a
    """
    from residua.analysis.console.messages import root_option
    from residua.analysis.console.saved_actions import pull_saved
    from residua.analysis.console.saved_messages import print_shared
    from residua.analysis.console.terminal import Meter

    with Meter(quiet) as meter:
        value = pull_saved(source, root, meter.stage, **options)
    return value, lambda: print_shared(value, root_option(str(root)))


@main.group()
def fit() -> None:
    """Fit a probe from a cache, out of core, without the model.

    \b
    residua fit ridge 3f2a --offsets 0-3   ridge regression to the last layer
    residua fit lens 3f2a                  tuned lens; with --offsets 0-8 a future lens
    residua fit vocab 3f2a --offsets 0-3   softmax regression to the token
    residua fit mlp 3f2a --offsets 1-3     MLP in front of the head, a control
    residua fit basis 3f2a --lens NAME     causal bases: directions that matter to a lens
    residua fit baseline 3f2a              baselines that count tokens
    residua fit prompt 3f2a                learned prompts, with the model
    residua fit jacobian 3f2a              mean Jacobians, with the model
    """


fit.add_command(fit_prompt)
fit.add_command(fit_jacobian)


@fit.command()
@probe_options
@click.option(
    "--alpha",
    type=NUMBER,
    help="Fixed penalty, as in scikit-learn's Ridge.  [default: the best of a path by "
    "cross-validation]",
)
@click.option(
    "--folds",
    type=WHOLE_NUMBER,
    default=5,
    show_default=True,
    help="Folds of the cross-validation.",
)
@click.option(
    "--products",
    type=click.Choice(["float64", "float32"]),
    default="float64",
    show_default=True,
    help="dtype of the products of blocks of rows; float32 is twice as fast, exact to 1e-6.",
)
@click.option("--target", type=LAYERS, help="Layers to predict.  [default: the last]")
@click.option(
    "--keep-moments/--no-keep-moments",
    "keep",
    default=None,
    help="Keep the second moments with the cache, for later fits.  [default: kept if they take at "
    "most a quarter of the residual streams' bytes, or 1 GiB and a tenth of the free disk]",
)
@device_option
@residua_command
def ridge(
    root: Path,
    quiet: bool,
    cache: str,
    offsets: tuple[int, ...],
    layers: tuple[int, ...] | None,
    across_documents: bool,
    drop_first: int,
    alpha: float | None,
    folds: int,
    products: str,
    target: tuple[int, ...] | None,
    **options: Any,
) -> Any:
    """Fit ridge maps from every layer to the last layer.

    All maps, to the last layer N tokens later, come from one pass over CACHE. The penalty of
    each (layer, offset) is chosen by exact cross-validation. Read through the model's head, the
    map is a lens. Second moments that are kept with the cache, or with a smaller cache that it
    extends, are not collected again.

    \b
    residua fit ridge 3f2a --offsets 0-3
    residua fit ridge 3f2a --offsets 1 --layers 4-8 --out my-probe
    residua fit ridge 3f2a --layers 0-3 --target 6,9 --memory 4 --keep-moments
    residua fit ridge 3f2a --offsets 0-3 --control shuffled
    """
    from residua.analysis.console.actions import fit_and_save
    from residua.analysis.console.messages import print_fit
    from residua.probes.ridge.ridge_probe import RidgeProbe

    ridge = RidgeProbe(
        offsets=offsets,
        layers=layers,
        alpha=alpha,
        folds=folds,
        products=products,
        target=target,
        across_documents=across_documents,
        drop_first=drop_first,
    )
    source, probe, path = fit_and_save(
        ridge, cache, root, quiet, stage="moments", resumes=False, **options
    )
    metrics = probe.metrics()
    moments = getattr(probe, "probe_", probe).moments_
    value = {"probe": str(path), "cache": source.id, "metrics": metrics, "moments": moments}
    return value, lambda: print_fit(
        probe.kind,
        source.id,
        path,
        metrics,
        root,
        moments=moments,
        can_be_evaluated=target is None or source.n_blocks in target,
    )


@fit.command()
@cache_argument()
@click.argument("kinds", nargs=-1, metavar="[KIND]...", type=click.Choice(BASELINES))
@click.option(
    "--offsets",
    type=NUMBERS,
    default="0-3",
    show_default=True,
    help="Offsets N: predict the token after t+N; offsets that a kind cannot predict are left out.",
)
@across_documents_option
@scheduler_option
@residua_command
def baseline(
    root: Path,
    quiet: bool,
    cache: str,
    kinds: tuple[str, ...],
    offsets: tuple[int, ...],
    across_documents: bool,
    scheduler: str | None,
) -> Any:
    """Fit baselines that count tokens and read no layer.

    Tokens are those of the train split of CACHE. KIND is unigram (reads nothing), bigram (reads
    x[t+N]), trigram (x[t+N-1] too), lagged (x[t] alone, counted at this distance), chain (x[t]
    alone, by bigram steps) or marginal (the model's distribution at t, then N bigram steps); by
    default all of them.

    \b
    residua fit baseline 3f2a
    residua fit baseline 3f2a trigram lagged --offsets 1-8
    """
    from residua.analysis.console.messages import print_fit
    from residua.analysis.console.terminal import Meter
    from residua.cache.cluster import connected
    from residua.cache.store.catalog import find_cache
    from residua.probes.baselines.token_counts import unfitted_baselines
    from residua.probes.saved.library import new_probe_path
    from residua.probes.saved.save import save_probe

    source, fits = find_cache(cache, root), []
    with Meter(quiet) as meter, connected(scheduler) as client:
        for probe in unfitted_baselines(kinds or BASELINES, offsets, across_documents):
            path = new_probe_path(root, probe, source.id)
            probe.fit(source, client=client, progress=meter.progress_of("count"))
            save_probe(probe, path)
            fits.append({"kind": probe.kind, "probe": str(path), "metrics": probe.metrics()})

    def print_fits() -> None:
        for fit in fits:
            print_fit(fit["kind"], source.id, Path(fit["probe"]), fit["metrics"], root)

    return {"cache": source.id, "probes": fits}, print_fits


@fit.command()
@probe_options
@click.option(
    "--steps",
    type=WHOLE_NUMBER,
    default=400,
    show_default=True,
    help="Most natural-gradient steps of a translator; it stops where its KL no longer falls.",
)
@click.option(
    "--batch", type=WHOLE_NUMBER, default=1024, show_default=True, help="Positions of one step."
)
@click.option(
    "--lr",
    type=NUMBER,
    help="Share of the natural gradient's full step.  [default: the best of a short sweep]",
)
@click.option(
    "--seed",
    type=WHOLE_NUMBER,
    default=0,
    show_default=True,
    help="Seed of the order of positions.",
)
@click.option(
    "--products",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="dtype of the head's products in steps; auto is what is multiplied faster.",
)
@device_option
@checkpoint_option
@residua_command
def lens(
    root: Path,
    quiet: bool,
    cache: str,
    offsets: tuple[int, ...],
    layers: tuple[int, ...] | None,
    across_documents: bool,
    drop_first: int,
    steps: int,
    batch: int,
    lr: float | None,
    seed: int,
    products: str,
    **options: Any,
) -> Any:
    """Fit a tuned lens: affine maps by KL to the model.

    One map, a translator, per layer. The fit starts from ridge, minimises KL(model || lens) by
    natural-gradient steps, and keeps the translator that is best on the validation split. With
    offsets above 0 the probe is a future lens. After an interruption, the same command goes on
    where the fit stopped.

    \b
    residua fit lens 3f2a
    residua fit lens 3f2a --offsets 0-8 --layers 4-8
    """
    from residua.analysis.console.actions import fit_and_save
    from residua.analysis.console.messages import print_fit
    from residua.probes.lens.tuned_lens import FutureLens, TunedLens

    lens_class = TunedLens if offsets == (0,) else FutureLens
    lens = lens_class(
        offsets=offsets,
        layers=layers,
        lr=lr,
        steps=steps,
        batch=batch,
        seed=seed,
        across_documents=across_documents,
        drop_first=drop_first,
        products=products,
    )
    source, probe, path = fit_and_save(lens, cache, root, quiet, **options)
    metrics = probe.metrics()
    value = {"probe": str(path), "cache": source.id, "metrics": metrics}
    return value, lambda: print_fit(probe.kind, source.id, path, metrics, root)


@fit.command()
@probe_options
@click.option(
    "--loss",
    type=click.Choice(["model", "text", "kl"]),
    default="model",
    show_default=True,
    help="Loss: cross-entropy to the model's top token (model) or to the text's next token "
    "(text), or KL to the model's distribution (kl).",
)
@click.option(
    "--form",
    type=click.Choice(["auto", "full", "head"]),
    default="auto",
    show_default=True,
    help="Parametrization: a matrix to the vocabulary (full; auto: of lower rank above 100 million "
    "weights), or a map in front of the head (head).",
)
@click.option("--rank", type=WHOLE_NUMBER, help="Rank of the matrix.  [default: that of --form]")
@click.option("--lr", type=NUMBER, help="Learning rate.  [default: the best of a short sweep]")
@click.option(
    "--epochs",
    type=WHOLE_NUMBER,
    default=3,
    show_default=True,
    help="Largest number of passes over the train split.",
)
@click.option(
    "--checkpoint-seconds",
    type=NUMBER,
    default=60.0,
    show_default=True,
    help="Time between two checkpoints, in seconds; a killed fit goes on from the last one.",
)
@device_option
@checkpoint_option
@residua_command
def vocab(
    root: Path,
    quiet: bool,
    cache: str,
    offsets: tuple[int, ...],
    layers: tuple[int, ...] | None,
    across_documents: bool,
    drop_first: int,
    loss: str,
    form: str,
    rank: int | None,
    lr: float | None,
    epochs: int,
    **options: Any,
) -> Any:
    """Fit softmax regressions from every layer to the token.

    All regressions, to the token N later, come from one stream over CACHE. A regression stops
    when its loss on the validation split no longer falls. Losses are in nats per position.
    After an interruption, the same command goes on where the fit stopped.

    \b
    residua fit vocab 3f2a --offsets 0-3
    residua fit vocab 3f2a --offsets 1 --layers 4-8 --loss kl --rank 64
    """
    from residua.analysis.console.actions import fit_and_save
    from residua.analysis.console.messages import print_fit
    from residua.probes.vocabulary.vocab_probe import VocabProbe

    vocab = VocabProbe(
        offsets=offsets,
        layers=layers,
        loss=loss,
        form=form,
        rank=rank,
        lr=lr,
        epochs=epochs,
        across_documents=across_documents,
        drop_first=drop_first,
    )
    source, probe, path = fit_and_save(vocab, cache, root, quiet, stage="positions", **options)
    metrics, sweep = probe.metrics(), getattr(probe, "probe_", probe).sweep_
    value = {"probe": str(path), "cache": source.id, "metrics": metrics, "sweep": sweep}
    return value, lambda: print_fit(probe.kind, source.id, path, metrics, root)


@fit.command()
@probe_options
@click.option(
    "--loss",
    type=click.Choice(["kl", "model", "text"]),
    default="kl",
    show_default=True,
    help="Loss: KL to the model's distribution (kl), or cross-entropy to the model's top token "
    "(model) or to the text's next token (text).",
)
@click.option(
    "--hidden", type=WHOLE_NUMBER, default=256, show_default=True, help="Units of the hidden layer."
)
@click.option("--lr", type=NUMBER, help="Learning rate.  [default: the best of a short sweep]")
@click.option(
    "--epochs",
    type=WHOLE_NUMBER,
    default=3,
    show_default=True,
    help="Largest number of passes over the train split.",
)
@click.option(
    "--seed", type=WHOLE_NUMBER, default=0, show_default=True, help="Seed of start and batches."
)
@click.option(
    "--checkpoint-seconds",
    type=NUMBER,
    default=60.0,
    show_default=True,
    help="Time between two checkpoints, in seconds; a killed fit goes on from the last one.",
)
@device_option
@checkpoint_option
@residua_command
def mlp(
    root: Path,
    quiet: bool,
    cache: str,
    offsets: tuple[int, ...],
    layers: tuple[int, ...] | None,
    across_documents: bool,
    drop_first: int,
    loss: str,
    hidden: int,
    lr: float | None,
    epochs: int,
    seed: int,
    **options: Any,
) -> Any:
    """Fit an MLP in front of the head: a non-linear control.

    From the state at t to the model's token after t+N. Its linear twin is `fit vocab --form head
    --loss kl`: what the MLP says beyond that, no affine map reads from the state. After an
    interruption, the same command goes on where the fit stopped.

    \b
    residua fit mlp 3f2a --offsets 1-3
    residua fit vocab 3f2a --offsets 1-3 --form head --loss kl
    """
    from residua.analysis.console.actions import fit_and_save
    from residua.analysis.console.messages import print_fit
    from residua.probes.vocabulary.mlp_probe import MlpProbe

    mlp = MlpProbe(
        offsets=offsets,
        layers=layers,
        loss=loss,
        hidden=hidden,
        lr=lr,
        epochs=epochs,
        seed=seed,
        across_documents=across_documents,
        drop_first=drop_first,
    )
    source, probe, path = fit_and_save(mlp, cache, root, quiet, stage="positions", **options)
    metrics, sweep = probe.metrics(), getattr(probe, "probe_", probe).sweep_
    value = {"probe": str(path), "cache": source.id, "metrics": metrics, "sweep": sweep}
    return value, lambda: print_fit(probe.kind, source.id, path, metrics, root)


@fit.command()
@cache_argument()
@click.option(
    "--lens",
    required=True,
    help="Saved tuned lens or ridge probe: its path, or the beginning of its name; or logit.",
)
@layers_option
@click.option("-k", type=WHOLE_NUMBER, default=8, show_default=True, help="Number of directions.")
@click.option(
    "--method",
    type=click.Choice(BASIS_METHODS),
    default="joint",
    show_default=True,
    help="The span with the largest KL (joint), the paper's sequence (greedy), or closed forms.",
)
@click.option(
    "--metric",
    type=click.Choice(BASIS_METRICS),
    default="covariance",
    show_default=True,
    help="Remove a direction with all that predicts it (covariance), or orthogonally, as the "
    "paper (euclidean): that leaves the data, and finds directions of the lens alone.",
)
@click.option(
    "--reference",
    type=click.Choice(BASIS_REFERENCES),
    default="mean",
    show_default=True,
    help="What ablated coordinates become: the mean's, zero, or those of another position.",
)
@click.option(
    "--offset", type=WHOLE_NUMBER, default=0, show_default=True, help="Offset N of the lens."
)
@click.option(
    "--positions",
    type=WHOLE_NUMBER,
    default=16384,
    show_default=True,
    help="Train positions to fit on.",
)
@click.option(
    "--test-positions",
    type=WHOLE_NUMBER,
    default=8192,
    show_default=True,
    help="Test positions to measure on.",
)
@click.option(
    "--seed", type=WHOLE_NUMBER, default=0, show_default=True, help="Seed of the draw of positions."
)
@drop_first_option
@memory_option
@click.option(
    "--scratch",
    type=click.Path(path_type=Path),
    help="Folder for a file of the products that do not fit the memory.  [default: compute them "
    "again]",
)
@scheduler_option
@device_option
@click.option("--model", help="Folder or hub id of the model: ablate the directions there, too.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("--html", type=click.Path(path_type=Path), help="Page on the directions to write.")
@click.option("--png", type=click.Path(path_type=Path), help="Folder of pictures to write.")
@out_option
@checkpoint_option
@residua_command
def basis(
    root: Path,
    quiet: bool,
    cache: str,
    lens: str,
    model: str | None,
    device: str,
    trust_remote_code: bool,
    html: Path | None,
    png: Path | None,
    out: Path | None,
    checkpoint: Path | None,
    scheduler: str | None,
    scratch: Path | None,
    memory: int | None,
    **parameters: Any,
) -> Any:
    """Extract causal bases: directions whose ablation changes a lens most.

    For every layer, k directions of the residual stream; the KL of ablating their span is measured
    on held-out text, beside PCA and random directions. With --model the same ablations run in the
    model. After an interruption, the same command goes on where the fit stopped.

    \b
    residua fit basis 3f2a --lens lens-3f2a
    residua fit basis 3f2a --lens lens-3f2a --layers 1,3-5 -k 16 --html basis.html
    residua fit basis 3f2a --lens logit --method greedy --metric euclidean
    residua fit basis 3f2a --lens lens-3f2a --model MODEL --json
    """
    from residua.analysis.console.basis_actions import (
        BasisOutputs,
        ModelChoice,
        fit_and_save_basis,
    )
    from residua.analysis.console.messages import print_basis
    from residua.probes.basis.causal_basis import CausalBasis

    result = fit_and_save_basis(
        CausalBasis(**parameters),
        cache,
        lens,
        root,
        quiet,
        outputs=BasisOutputs(
            out, html, png, " ".join(["residua", *sys.argv[1:]]), checkpoint=checkpoint
        ),
        model=None if model is None else ModelChoice(model, device, trust_remote_code),
        scheduler=scheduler,
        scratch=scratch,
        memory=memory,
        device=device,
    )
    value = {
        "probe": str(result.path),
        "cache": result.cache.id,
        "metrics": result.basis.metrics(),
        "written": result.written,
    }
    return value, lambda: print_basis(result)


@main.command()
@cache_argument()
@click.argument("probes", nargs=-1, metavar="[NAME=]PROBE...", shell_complete=complete_names)
@click.option(
    "--offsets",
    type=NUMBERS,
    help="Offsets N to measure.  [default: those of the probes, else 0-3]",
)
@click.option("--layers", type=LAYERS, help="Layers to measure.  [default: all]")
@click.option(
    "--split",
    default="test",
    show_default=True,
    help="Split to measure: train, validation, test or all.",
)
@click.option(
    "--max-positions",
    type=WHOLE_NUMBER,
    default=16384,
    show_default=True,
    help="Largest number of positions to measure.",
)
@across_documents_option
@drop_first_option
@click.option(
    "--seed",
    type=WHOLE_NUMBER,
    default=0,
    show_default=True,
    help="Seed of the choice of sequences.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, auto.")
@click.option(
    "--products",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Precision of the head's products for probes; auto is bfloat16 for a vocabulary of 32,768 "
    "and more, where the device multiplies it faster.",
)
@click.option(
    "--where",
    type=click.Choice(MASKS),
    help="Targets to count: only those inside words (continued) or inside capitalised words "
    "(names) of several tokens; of images the patches.  [default: all, of images the class token]",
)
@click.option("--force", is_flag=True, help="Evaluate probes of another model, too.")
@click.option(
    "--html", type=click.Path(path_type=Path), help="File to write a self-contained report to."
)
@click.option("--png", type=click.Path(path_type=Path), help="Folder to write pictures to.")
@residua_command
def evaluate(
    root: Path,
    quiet: bool,
    cache: str,
    probes: Sequence[str],
    where: str | None,
    force: bool,
    html: Path | None,
    png: Path | None,
    **options: Any,
) -> Any:
    """Measure PROBEs on held-out text of CACHE.

    The logit lens and a bigram are measured beside them. PROBE is a folder, or a name (or
    unique prefix) under the root; with NAME= before it, tables and pictures call it NAME. kl is
    KL(model || probe) in nats per position, kl_reverse is KL(probe || model); precision@k, nll and
    surprisal compare the probe with the model's own top token. Buckets are the same measures by
    the model's largest probability.

    \b
    residua evaluate 3f2a ridge-3f2a
    residua evaluate 3f2a ridge-3f2a --html report.html --png pictures
    residua evaluate 3f2a long=ridge-3f2a short=ridge-81d9
    """
    from residua.analysis.console.actions import check_outputs, write_outputs

    check_outputs(html, png)
    from residua.analysis.console.messages import print_evaluation
    from residua.analysis.console.probe_names import load_named_probes
    from residua.analysis.console.terminal import Meter
    from residua.analysis.evaluation.probe_evaluation import evaluate as evaluate_probes
    from residua.analysis.token_texts.position_masks import MASKS as MASK_FUNCTIONS
    from residua.cache.number_ranges import absolute_numbers
    from residua.cache.store.catalog import find_cache

    source = find_cache(cache, root)
    options["layers"] = absolute_numbers(options["layers"], source.n_blocks)
    loaded_probes = load_named_probes(source, probes, root, force)
    with Meter(quiet) as meter:
        mask = None if where is None else MASK_FUNCTIONS[where](source)
        evaluation = evaluate_probes(
            source,
            loaded_probes,
            where=mask,
            force=force,
            progress=meter.progress_of("evaluate"),
            **options,
        )
    written = write_outputs(evaluation, html, png, " ".join(["residua", *sys.argv[1:]]))
    value = {
        "cache": source.id,
        "where": where,
        **evaluation.about(),
        "rows": evaluation.to_dicts(),
        "buckets": evaluation.bucket_dicts(),
        "files": written,
    }
    return value, lambda: print_evaluation(evaluation, written)


@main.command()
@cache_argument()
@click.argument("probes", nargs=-1, metavar="[NAME=]PROBE...", shell_complete=complete_names)
@click.option("--text", help="Text of your own; the model reads it.  [default: a passage of CACHE]")
@click.option("--model", help="Folder or hub id of the model.  [default: where it was]")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option(
    "--sequence",
    type=WHOLE_NUMBER,
    help="Sequence of CACHE to read.  [default: one where much is decided in the upper layers]",
)
@click.option("--first", type=WHOLE_NUMBER, help="First token of the sequence.  [default: 0]")
@click.option("--tokens", type=WHOLE_NUMBER, help="Most tokens of the passage.  [default: 24]")
@click.option("--split", help="Split in which to search for a passage.  [default: test]")
@click.option(
    "--offsets",
    type=NUMBERS,
    help="Offsets N, a map each.  [default: the smallest of each probe]",
)
@click.option("--layers", type=LAYERS, help="Layers to show.  [default: all that a probe reads]")
@click.option(
    "--measure",
    type=click.Choice(MAP_MEASURES),
    default="probability",
    show_default=True,
    help="Colour of the cells: probability of the likeliest token, entropy, KL to the model (kl), "
    "or rank of the model's token.",
)
@click.option(
    "--track",
    metavar="TOKEN",
    help='Token whose probability and rank are shown instead, such as " Paris".',
)
@click.option(
    "--difference", is_flag=True, help="Show the first of two probes less the second, cell by cell."
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, auto.")
@click.option("--force", is_flag=True, help="Read with probes of another model, too.")
@click.option("--html", type=click.Path(path_type=Path), help="File to write a page to explore to.")
@click.option("--png", type=click.Path(path_type=Path), help="File to write a picture to.")
@residua_command
def heatmap(
    root: Path,
    quiet: bool,
    cache: str,
    probes: Sequence[str],
    text: str | None,
    model: str | None,
    trust_remote_code: bool,
    sequence: int | None,
    first: int | None,
    tokens: int | None,
    split: str | None,
    html: Path | None,
    png: Path | None,
    **options: Any,
) -> Any:
    """Show what PROBEs read in a passage, layer by layer and token by token.

    A passage of CACHE needs no model; a --text of your own is read by the model of CACHE. PROBE is
    any that reads layers, or logit, the logit lens, which is the default. A cell is the likeliest
    token; those that say what the last layer says are marked, in a --difference those where both
    probes say the same (in pictures: where they disagree).

    \b
    residua heatmap 3f2a ridge-3f2a --html map.html
    residua heatmap 3f2a ridge-3f2a --sequence 20 --first 100 --tokens 18 --png map.png
    residua heatmap 3f2a tuned=lens-3f2a logit --layers 4-8 --difference --measure kl
    residua heatmap 3f2a lens-3f2a --text "The Louvre is in the city of" --track " Paris"
    """
    from residua.analysis.console.heatmap_actions import (
        PassageChoice,
        check_heatmap_outputs,
        print_heatmaps,
        read_heatmaps,
        write_heatmaps,
    )
    from residua.cache.store.catalog import find_cache

    passage = PassageChoice(text, model, trust_remote_code, sequence, first, tokens, split=split)
    passage.check()
    check_heatmap_outputs(html, png)
    source = find_cache(cache, root)
    maps = read_heatmaps(source, probes, root, passage, **options)
    written = write_heatmaps(maps, html, png)
    value = {
        "cache": source.id,
        "passage": maps.passage,
        "measure": maps.measure,
        "tracked": maps.tracked,
        "maps": maps.to_dicts(),
        "files": written,
    }
    return value, lambda: print_heatmaps(maps, written)


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8470,
    show_default=True,
    help="Port to listen at; 0 takes a free one.",
)
@click.option(
    "--public", is_flag=True, help="Other machines may reach the service; it must have a token."
)
@click.option("--private", is_flag=True, help="Reading needs a token, too.")
@click.option(
    "--models",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder under which the models of jobs lie; several times for several.  [default: none]",
)
@click.option(
    "--texts",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder under which the texts of jobs lie, beside those that clients send; several times "
    "for several.  [default: none]",
)
@click.option("--hub", is_flag=True, help="Jobs may name models and data sets of the hub.")
@click.option(
    "--trust-remote-code", is_flag=True, help="Jobs may run code that comes with a model."
)
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Worker processes of the service, each of which runs one job at a time.",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Address of a dask scheduler, like tcp://host:8786, whose workers run the jobs; they must "
    "see the root.  [default: workers of the service]",
)
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="Name by which clients may call the service, such as that of a proxy; several times for "
    "several.",
)
@click.option(
    "--allow-origin",
    multiple=True,
    metavar="ORIGIN",
    help="Origin of web pages that may read, such as https://viewer.example.org, or * for any; "
    "several times for several.  [default: pages of this machine]",
)
@click.option(
    "--accel",
    metavar="PREFIX",
    help="Path under which the proxy in front gives the files of the root, such as /_files/: it "
    "then sends committed shards itself (X-Accel-Redirect).",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for tokens, jobs and sent texts.  [default: .service under the root]",
)
@click.option(
    "--demo",
    is_flag=True,
    help="Make a cache of the bundled model first, probes of it and their evaluation, as jobs.",
)
@click.option(
    "--access-log", is_flag=True, help="Log every request, a JSON object a line, on stderr."
)
@residua_command
def serve(
    root: Path,
    quiet: bool,
    public: bool,
    demo: bool,
    access_log: bool,
    state: Path | None,
    **options: Any,
) -> Any:
    """Serve the caches, probes and results of the root to the network, and do jobs.

    Prints the address and, at its first start, the token that writing needs: with it, clients start
    jobs (extractions, fits, evaluations) and remove things. Clients are browsers, `residua COMMAND
    --server URL`, `residua.connect(URL)`, and whatever reads zarr over HTTP. Only this machine
    reaches the service, unless it is --public.

    \b
    residua serve --demo --root demo            a full dashboard in two minutes
    residua serve --root caches
    residua serve --root caches --models ./models --texts ./texts
    RESIDUA_TOKEN=... residua serve --public --host 0.0.0.0 --private
    """
    from residua.cache.optional_libraries import require_extra

    require_extra("serve", "the service")
    if demo:
        require_extra("all", "the demo")
    from residua.analysis.service.server import log_to_stderr, run_service
    from residua.analysis.service.start_message import print_service_start
    from residua.analysis.web.service_settings import default_state, make_settings

    settings = make_settings(root, state or default_state(root), **options)
    log_to_stderr(access_log)
    value = run_service(settings, public, None if quiet else print_service_start, demo=demo)
    return value, lambda: None


@main.command()
@click.argument("job", required=False, metavar="[JOB]")
@click.option("--cancel", is_flag=True, help="End the job; what it did is kept.")
@click.option("--follow", is_flag=True, help="Show progress until the job ends.")
@residua_command
def jobs(root: Path, quiet: bool, job: str | None, cancel: bool, follow: bool) -> Any:
    """List the jobs of a service, or show, follow or cancel JOB.

    JOB is the beginning of a job's id. The service is that of --server or $RESIDUA_SERVER.

    \b
    residua jobs --server http://host:8470
    residua jobs 3f2a --follow --server http://host:8470
    residua jobs 3f2a --cancel --server http://host:8470
    """
    from residua.analysis.service_client.job_messages import jobs_command
    from residua.cache.errors import UsageError

    if job is None and (cancel or follow):
        raise UsageError("--cancel and --follow are for one job: name it")
    return jobs_command(server_of_command(), job, cancel=cancel, follow=follow, quiet=quiet)


main.add_command(data)
main.add_command(intervene)
main.add_command(study)


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("quickstart"),
    show_default=True,
    help="Folder for the report, the pictures and the cache.",
)
@click.option(
    "--max-tokens",
    type=WHOLE_NUMBER,
    help="Read at most this many tokens of text, in whole sequences.  [default: all of the sample]",
)
@residua_command
def quickstart(root: Path, quiet: bool, out: Path, max_tokens: int | None) -> Any:
    """Run the whole flow on a bundled small model and text.

    About two minutes. Extracts every layer, fits ridge probes for offsets 0 to 3, measures the
    probes on held-out text, and writes a report with pictures.

    \b
    residua quickstart
    residua quickstart --out /tmp/residua --json
    """
    from residua.cache.optional_libraries import require_extra

    require_extra("all", "the quickstart")
    from residua.analysis.console.messages import print_quickstart
    from residua.analysis.console.quickstart import run_quickstart
    from residua.analysis.console.terminal import Meter

    with Meter(quiet) as meter:
        value, evaluation = run_quickstart(
            out, root if is_given("root") else None, max_tokens, meter
        )
    return value, lambda: print_quickstart(value, evaluation)


def find_command(words: Sequence[str]) -> click.Command:
    """The command of these words, such as `fit ridge`; raises `UsageError` for any other."""
    from residua.cache.errors import UsageError

    command: click.Command = main
    for word in words:
        following = command.commands.get(word) if isinstance(command, click.Group) else None
        if following is None:
            raise UsageError(f"there is no command {' '.join(words)!r}; see residua --help")
        command = following
    return command


if __name__ == "__main__":
    main()
