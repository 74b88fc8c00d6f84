"""Prints the results of commands for people; `--json` prints the same results as an object.

Each command of cli.py has one public function here, which takes what the command returns and prints
tables and sentences on stdout.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache.format.manifest import SHORT_ID
from ...cache.number_ranges import format_ranges
from ...cache.store.catalog import cache_root
from ...probes.saved.library import FOLDER as PROBES_FOLDER
from .terminal import bandwidths, format_bytes, print_table, short_source_name

if TYPE_CHECKING:
    from ...cache.extraction.damage_repair import Repair
    from ...cache.store.verification import Verification
    from ..evaluation.result import Evaluation
    from .basis_actions import BasisResult


def print_extraction(value: dict[str, Any], max_tokens: int | None = None) -> None:
    """Print what `residua extract` did, from the dictionary of its result.

    `max_tokens` is the limit of the request, which a cache of fewer positions mentions.
    """
    print(f"{value['status']}: cache {value['cache'][:12]}")
    print(f"  {_format_contents(value)}, head error {value['head_error']:.1e}")
    if max_tokens is not None and value["positions"] < max_tokens:
        print(f"  --max-tokens {max_tokens:,} is at most: whole sequences are read")
    if speeds := bandwidths(value["stages"]):
        print(f"  {speeds}")
    print(f"  {value['path']}")
    _print_cut_text(value["cut"])
    if value["split_by"] == "sequence":
        print(
            "  fewer than three documents: train, validation and test are parts of the same text, "
            "so that intervals are too narrow"
        )
    _print_reading(value["reading"])
    if value["quarantined"]:
        print(
            f"  {value['quarantined']:,} sequences have values that are not finite, or too large "
            "for their stored dtype (--dtype); they are left out of all splits"
        )
    if value["complete"]:
        root = root_option(value["path"].rpartition("/")[0])
        print(f"next: residua fit ridge {value['cache'][:12]} --offsets 0-3{root}")
    else:
        committed, parts = value["parts"]
        print(f"{committed} of {parts} parts are there; the other shares are still to be run")


def print_estimate(value: dict[str, Any]) -> None:
    """Print the estimate of `residua extract --dry-run`."""
    print_table(
        f"{value['positions']:,} positions, {value['files']:,} shard files",
        ("array", "bytes"),
        [(name, format_bytes(count)) for name, count in value["arrays"].items()],
    )
    print(f"{format_bytes(value['bytes'])} in all, largest {value['largest']}")
    if value["slack"]:
        print(
            "compression is measured on the first rows; "
            f"{format_bytes(value['slack'])} more are allowed"
        )
    if value["free"] is not None:  # an object store has no size
        fits = "fits" if value["fits"] else "does NOT fit"
        print(f"{fits} into {format_bytes(value['free'])} free")
    _print_cut_text(value["cut"])
    _print_reading(value["reading"])
    _print_beginnings(value)


def print_match(value: dict[str, Any]) -> None:
    """Print the match of `residua extract --find`."""
    cache = value["cache"]
    if value["answer"] == "miss":
        print("miss: no cache answers the request")
        for difference in value["differences"]:
            asked, found = difference["asked"], difference["found"]
            print(f"  {difference['field']}: asked {asked}, {cache[:SHORT_ID]} has {found}")
        return
    more = " and more" if value["answer"] == "covers" else ""
    if value["answer"] in ("hit", "covers"):
        print(f"{value['answer']}: cache {cache[:SHORT_ID]} has what is asked{more}")
        return
    missing = []
    if value["missing_layers"]:
        missing.append(f"layers {format_ranges(value['missing_layers'])}")
    if value["missing_sequences"]:
        missing.append(f"{value['missing_sequences']:,} sequences")
    if value["unfinished"]:
        missing.append("the rest of an interrupted extraction")
    print(f"partial: cache {cache[:SHORT_ID]} lacks {', '.join(missing)}; extract adds it")


def _print_beginnings(value: dict[str, Any]) -> None:
    """Print how many sequences each split has, and the first tokens of some."""
    counts = ", ".join(f"{count:,} {split}" for split, count in value["splits"].items())
    print(f"{sum(value['splits'].values()):,} sequences that the model reads: {counts}")
    for beginning in value["beginnings"]:
        print(
            f"sequence {beginning['sequence']} ({beginning['split']}, {beginning['length']:,} "
            f"tokens, begins in document {beginning['document']}):"
        )
        ellipsis = " ..." if len(beginning["tokens"]) < beginning["length"] else ""
        print(f"  {' '.join(beginning['tokens'])}{ellipsis}")


def _format_contents(value: dict[str, Any]) -> str:
    """Positions, layers and bytes of a cache as text."""
    layers = format_ranges(value["layers"])
    return f"{value['positions']:,} positions, layers {layers}, {format_bytes(value['bytes'])}"


def _print_cut_text(cut: dict[str, int]) -> None:
    """Print how much text was cut off at the context length, if any."""
    if cut["sequences"]:
        print(
            f"  {cut['sequences']:,} documents are longer than the context: {cut['tokens']:,} of "
            "their tokens are left out (--context, or --pack)"
        )


def _print_reading(reading: dict[str, Any]) -> None:
    """Print which text column was guessed, and which documents were left out."""
    column, guess = reading["text_column"], reading["found"]
    if guess is not None and column != "text":
        print(f"  the texts are those of the column {column!r}, {guess} (--text-column)")
    for reason, dropped in reading["dropped"].items():
        rows = ", ".join(map(str, dropped["rows"]))
        ellipsis = ", ..." if len(dropped["rows"]) < dropped["documents"] else ""
        print(
            f"  {dropped['documents']:,} documents are left out: {reason} (rows {rows}{ellipsis}, "
            "counted from 0)"
        )
    for note in reading["notes"]:
        print(f"  {note}")


def print_differences(first_id: str, second_id: str, differences: Sequence[dict[str, Any]]) -> None:
    """Print the fields in which two caches differ (`residua diff`)."""
    if differences:
        rows = [list(difference.values()) for difference in differences]
        print_table("", ("field", first_id[:12], second_id[:12]), rows)
    else:
        print("the caches have the same identity")


def print_caches(root: Path, caches: Sequence[dict[str, Any]]) -> None:
    """Print the caches under a root, one line each (`residua ls`)."""
    if not caches:
        print(
            f"no caches under {root}; make one with residua extract MODEL DATA"
            f"{root_option(str(root))}"
        )
        return
    rows = [
        (
            cache["cache"][:12],
            short_source_name(cache["model"]),
            short_source_name(cache["data"]),
            cache["positions"],
            format_ranges(cache["layers"]),
            cache["d_model"],
            format_bytes(cache["bytes"]),
            cache["state"],
        )
        for cache in caches
    ]
    columns = ("cache", "model", "data", "positions", "layers", "d_model", "size", "state")
    print_table(str(root), columns, rows)


def print_cache(value: dict[str, Any]) -> None:
    """Print the contents and the measured errors of a cache (`residua info`)."""
    # The measurements on the model lie under `canary` in provenance.json.
    identity, measured = value["identity"], value["provenance"]["canary"]
    model, tokens, capture = identity["model"], identity["tokens"], identity["capture"]
    of_images = tokens["split_by"] == "image"
    causal = "yes" if measured["causal"] else "NO: later tokens change earlier residuals"
    facts = [
        ("cache", value["cache"]),
        ("path", value["path"]),
        ("state", value["state"]),
        ("size", f"{format_bytes(value['bytes'])}, {value['codec']}"),
        ("model", f"{value['model']}  ({model['architecture']}, weights {model['weights'][:12]})"),
        ("data", value["data"]),
        *((f"{name} is at", path) for name, path in value["origin"].items()),
        ("positions", f"{value['positions']:,} in {value['sequences']:,} sequences"),
        (
            "images" if of_images else "tokens",
            f"{tokens['context']} positions each, position 0 the class token"
            if of_images
            else f"{'packed to' if tokens['packed'] else 'rows of at most'} {tokens['context']}",
        ),
        ("splits", ", ".join(f"{k} {v:,}" for k, v in value["splits"].items()) + " sequences"),
        ("shape", f"L={value['depth']}, d_model {value['d_model']}, vocab {value['vocab']:,}"),
        ("head", ", ".join(f"{k} {v}" for k, v in value["head"].items() if k != "geometry")),
        ("ran in", f"{capture['compute_dtype']}, attention {capture['attention']}"),
        (
            "head error",
            f"{measured['head_error']:.1e} of the largest logit, head on layer L vs model",
        ),
        ("stored KL", f"{measured['stored_kl']:.1e} nats per position, layer L as stored"),
        *(
            [("padding", f"{measured[name]:.1e} largest change of a residual by padding")]
            if (name := "padding_error") in measured
            else []
        ),
        ("batches", "one sequence alone" if value["alone"] else "of several sequences"),
        ("causal", "no: a position reads all of its image" if of_images else causal),
    ]
    width = max(len(name) for name, _ in facts)
    for name, fact in facts:
        print(f"{name:<{width}}  {fact}")
    print_table(
        "",
        ("layer", "dtype", "absmax", "non-finite"),
        [
            (int(layer), array["dtype"], array["absmax"], array["nonfinite"])
            for layer, array in value["layer_arrays"].items()
        ],
    )
    if "logits" in measured:  # older caches have no such measurement
        _print_logits_errors(capture["logits"], measured["logits"])


def _print_logits_errors(cache_mode: str, measured: dict[str, Any]) -> None:
    """Print the error of each way to keep logits; the cache's own mode is marked."""
    rows = [
        (
            f"{mode} *" if mode == cache_mode else mode,
            error["dtype"],
            error["bytes"],
            error["kl_mean"],
            error["kl_max"],
            f"{error['flips']} of {measured['rows']}",
            error["relative_error"],
            error["tail_mass"],
        )
        for mode, error in measured["modes"].items()
    ]
    title = f"logits against the model's, KL in nats (* this cache: {cache_mode})"
    columns = ("logits", "dtype", "bytes", "KL mean", "KL max", "flips", "rel. error", "tail mass")
    print_table(title, columns, rows)


def repair_command(path: Path, verification: "Verification") -> str | None:
    """The command that mends what `residua verify` found; None for a whole cache.

    A manifest is made again by the extraction alone, whose options only its user knows.
    """
    if verification.ok:
        return None
    if any(damage.file == "manifest.json" for damage in verification.damages):
        return "the same `residua extract` as before, which makes the manifest again"
    return f"residua repair {path.name[:12]}{root_option(str(path.parent))}"


def print_verification(verification: "Verification", remedy: str | None = None) -> None:
    """Print the damage that `residua verify` found, or that the cache is whole.

    `remedy` is the command that mends the damage.
    """
    for damage in verification.damages:
        rows = f" rows {damage.start}-{damage.stop - 1}" if damage.stop else ""
        print(f"damaged: {damage.file}{rows}: {damage.message}")
    for name in verification.lost_records:
        print(
            f"lost: {name}: all shards that it names are there; `residua repair` makes it again "
            "(or the writer was killed before it: the same `residua extract` goes on)"
        )
    counts = {"damaged": len(verification.damages), "lost": len(verification.lost_records)}
    state = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "ok"
    count = len(verification.missing_parts)
    missing = f", {count} parts not extracted yet" if count else ""
    size = format_bytes(verification.bytes)
    print(f"{state}: {verification.shards} shards, {size} read{missing}")
    if remedy is not None:
        print(f"next: {remedy}")


def print_repair(repair: "Repair") -> None:
    """Print which files `residua repair` mended, and which damage is left."""
    for name in repair.mended:
        print(f"mended: {name}")
    for name in repair.rebuilt:
        print(f"made again from what is whole: {name}")
    for name in repair.removed:
        print(f"removed, the next fit computes it again: {name}")
    for name in repair.changed:
        print(f"written anew, not byte for byte the same: {name}")
    for damage in repair.left:
        print(f"cannot be mended: {damage.file}: {damage.message}; extract again")
    count = len(repair.missing_parts)
    missing = f", {count} parts not extracted yet: give the same `residua extract`" if count else ""
    print(f"{'ok' if repair.ok else f'{len(repair.left)} damaged'}{missing}")


def print_export(folder: Path, index: dict[str, Any]) -> None:
    """Print what `residua export` wrote, from its index.json."""
    total = sum(entry["bytes"] for entry in index["files"].values())
    print(f"{index['positions']:,} positions, {len(index['layers'])} layers, {format_bytes(total)}")
    print(f"  {folder} (README.md says how to open it)")


def print_fit(
    kind: str,
    cache_id: str,
    path: Path,
    metrics: Sequence[dict[str, Any]],
    root: Path,
    *,
    moments: dict[str, Any] | None = None,
    can_be_evaluated: bool = True,
) -> None:
    """Print the metrics of a probe (`residua fit`) and the folder `path` that holds the probe.

    `moments` says where a ridge probe's moments came from. Only a map to the last layer, which the
    head can read, `can_be_evaluated`.
    """
    columns = [name for name, value in metrics[0].items() if not isinstance(value, dict | list)]
    rows = [[row.get(name) for name in columns] for row in metrics]
    print_table(f"{kind}, cache {cache_id[:12]}", columns, rows)
    if moments is not None:
        print(
            f"moments: {format_bytes(moments['bytes'])}; {moments['kept']} found, "
            f"{moments['extended']} brought up to date, {moments['computed']} computed"
        )
        if moments["why"]:
            print(f"  {moments['why']}")
    if kind == "vocab" and "rank" in metrics[0]:
        print(
            "rank: chosen for the size of the full matrix; --form full fits that, --form head a "
            "map in front of the head"
        )
    if "crossing" in metrics[0]:
        print("crossing: share of the pairs of sequences that join two documents")
    if "top_error" in metrics[0]:
        print(
            "top_target, top_error: shares of the target's variance and of the squared error that "
            "the largest 0.1 % of the pairs make; first_...: the pairs whose source is the first "
            "position of its sequence"
        )
    print(f"probe: {path}")
    if can_be_evaluated:
        # A probe under the root has a name; another one is given by its path.
        name = path.name if path.parent == root / PROBES_FOLDER else shlex.quote(str(path))
        print(
            f"next: residua evaluate {cache_id[:12]} {name} --html report.html"
            f"{root_option(str(root))}"
        )


def root_option(root: str) -> str:
    """` --root ROOT` for a printed command; empty if `root` is the root without the option."""
    return "" if root == str(cache_root()) else f" --root {shlex.quote(root or '.')}"


def print_basis(result: "BasisResult") -> None:
    """Print the bases of `residua fit basis` as a table by layer, and the files written."""
    columns = ["layer", "k", "span KL", "95 % interval", "PCA", "random"]
    columns += ["evaluations", "CPU s"]
    metrics = result.basis.metrics()
    has_model = any("model_span" in row for row in metrics)
    columns += ["in the model", "Spearman"] if has_model else []
    rows = []
    for row in metrics:
        k = row["k"]
        measures = [(row[name] or {}).get(k, {}) for name in ("span", "pca", "random")]
        low, high = measures[0].get("low"), measures[0].get("high")
        interval = None if low is None or high is None else f"{low:.3f}-{high:.3f}"
        span, pca, random = (measure.get("kl") for measure in measures)
        cells = [row["layer"], k, span, interval, pca, random]
        cells += [float(row["evaluations"]), float(row["cpu_seconds"])]
        if has_model:
            model_span = {int(size): kl for size, kl in row.get("model_span", {}).items()}
            cells += [model_span.get(k, {}).get("kl"), row.get("spearman", {}).get("value")]
        rows.append(cells)
    print_table(
        f"causal bases ({result.basis.method}, {result.basis.metric}), "
        f"cache {result.cache.id[:12]}",
        columns,
        rows,
    )
    print(
        "span KL: nats that the lens changes by when the k directions are ablated together, on "
        f"{metrics[0]['n_test']:,} positions of the test split; PCA, random: k other directions"
    )
    print(f"basis: {result.path}")
    for path in result.written:
        print(f"wrote {path}")
    if not result.written:
        print("next: the same command with --html basis.html, to read the directions")


def print_evaluation(evaluation: "Evaluation", written: Sequence[str] = ()) -> None:
    """Print tables by layer and by confidence, and the files that `residua evaluate` wrote."""
    print_layer_tables(evaluation)
    _print_confidence_table(evaluation)
    for path in written:
        print(f"wrote {path}")


def print_layer_tables(evaluation: "Evaluation") -> None:
    """Print KL and precision@1 by layer, one table per offset, then the facts and notes."""
    from ..report.tables import offset_tables

    for table in offset_tables(evaluation):
        print_table(table.caption, table.columns, table.rows)
    for sentence in evaluation.facts():
        print(sentence)


def _print_confidence_table(evaluation: "Evaluation") -> None:
    """Print precision@1 by the model's confidence, at the best layer of each probe and offset."""
    from ..evaluation.confidence_buckets import BUCKETS, bucket_name
    from ..evaluation.metrics import precision_sort_key

    names = [bucket_name(*bucket) for bucket in BUCKETS]
    table: list[Sequence[object]] = []
    for offset in evaluation.offsets:
        for probe in evaluation.probes:
            if not (rows := evaluation.select(probe, offset)):
                continue
            layer = max(rows, key=precision_sort_key).layer
            precision_of = {
                row.bucket: row.precision_at_1
                for row in evaluation.select_buckets(probe, offset)
                if row.layer == layer
            }
            table.append((offset, probe, layer, *(precision_of.get(name) for name in names)))
    title = "precision@1 by the model's confidence at t+N, at the layer where it is best in all"
    print_table(title, ("N", "probe", "layer", *names), table)


def print_quickstart(value: dict[str, Any], evaluation: "Evaluation") -> None:
    """Print the tables of the quickstart, where its files are, and what to try next."""
    print_layer_tables(evaluation)
    print(value["text"])
