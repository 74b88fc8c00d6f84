"""What each command says to people when it is done; `--json` prints the same as an object."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache.number_ranges import format_ranges
from .terminal import bandwidths, format_bytes, print_evaluation, print_table, short

if TYPE_CHECKING:
    from ...cache.extraction.repair import Repair
    from ...cache.sharing.hub import PushedCache
    from ...cache.store.verify import Verification
    from ..evaluation.result import Evaluation


def extracted(value: dict[str, Any]) -> None:
    """What `residua extract` did."""
    print(f"{value['status']}: cache {value['cache'][:12]}")
    print(f"  {_contents(value)}, head error {value['head_error']:.1e}")
    if speeds := bandwidths(value["stages"]):
        print(f"  {speeds}")
    print(f"  {value['path']}")
    _tell_cut(value["cut"])
    if value["split_by"] == "sequence":
        print(
            "  fewer than three documents: train, validation and test are parts of the same text, "
            "so that intervals are too narrow"
        )
    _tell_reading(value["reading"])
    if value["quarantined"]:
        print(
            f"  {value['quarantined']:,} sequences have values that are not finite, or too large "
            "for their stored dtype (--dtype); they are left out of all splits"
        )
    if value["complete"]:
        print(f"next: residua fit ridge {value['cache'][:12]} --offsets 0-3")
    else:
        done, parts = value["parts"]
        print(f"{done} of {parts} parts are there; the other shares are still to be run")


def _tell_cut(cut: dict[str, int]) -> None:
    """Say how much text was left out, if any."""
    if cut["sequences"]:
        print(
            f"  {cut['sequences']:,} documents are longer than the context: {cut['tokens']:,} of "
            "their tokens are left out (--context, or --pack)"
        )


def _tell_reading(reading: dict[str, Any]) -> None:
    """Say what was guessed, and which documents were left out."""
    column, found = reading["text_column"], reading["found"]
    if found is not None and column != "text":
        print(f"  the texts are those of the column {column!r}, {found} (--text-column)")
    for reason, dropped in reading["dropped"].items():
        rows = ", ".join(map(str, dropped["rows"]))
        more = ", ..." if len(dropped["rows"]) < dropped["documents"] else ""
        print(
            f"  {dropped['documents']:,} documents are left out: {reason} (rows {rows}{more}, "
            "counted from 0)"
        )
    for note in reading["notes"]:
        print(f"  {note}")


def _contents(value: dict[str, Any]) -> str:
    layers = format_ranges(value["layers"])
    return f"{value['positions']:,} positions, layers {layers}, {format_bytes(value['bytes'])}"


def estimated(value: dict[str, Any]) -> None:
    """What `residua extract --dry-run` found."""
    rows = [(name, format_bytes(count)) for name, count in value["arrays"].items()]
    print_table(
        f"{value['positions']:,} positions, {value['files']:,} shard files",
        ("array", "bytes"),
        rows,
    )
    fits = "fits" if value["fits"] else "does NOT fit"
    print(f"{format_bytes(value['bytes'])} in all, largest {value['largest']}")
    if value["slack"]:
        print(
            "compression is measured on the first rows; "
            f"{format_bytes(value['slack'])} more are allowed"
        )
    if value["free"] is not None:  # an object store has no end
        print(f"{fits} into {format_bytes(value['free'])} free")
    _tell_cut(value["cut"])
    _tell_reading(value["reading"])


def differing(one: str, other: str, found: Sequence[dict[str, Any]]) -> None:
    """The fields in which two caches differ."""
    if found:
        print_table("", ("field", one[:12], other[:12]), [list(row.values()) for row in found])
    else:
        print("the caches have the same identity")


def listed(root: Path, caches: Sequence[dict[str, Any]]) -> None:
    """The caches under a root, one line each."""
    if not caches:
        print(f"no caches under {root}; make one with residua extract MODEL DATA")
        return
    rows = [
        (c["cache"][:12], short(c["model"]), short(c["data"]), c["positions"],
         format_ranges(c["layers"]),
         c["d_model"], format_bytes(c["bytes"]), c["state"])
        for c in caches
    ]  # fmt: skip
    columns = ("cache", "model", "data", "positions", "layers", "d_model", "size", "state")
    print_table(str(root), columns, rows)


def details(value: dict[str, Any]) -> None:
    """What `residua info` found."""
    identity, canary = value["identity"], value["provenance"]["canary"]
    model, tokens, capture = identity["model"], identity["tokens"], identity["capture"]
    rows = [
        ("cache", value["cache"]),
        ("path", value["path"]),
        ("state", value["state"]),
        ("size", f"{format_bytes(value['bytes'])}, {value['codec']}"),
        ("model", f"{value['model']}  ({model['architecture']}, weights {model['weights'][:12]})"),
        ("data", value["data"]),
        *((f"{name} is at", place) for name, place in value["origin"].items()),
        ("positions", f"{value['positions']:,} in {value['sequences']:,} sequences"),
        ("tokens", f"{'packed to' if tokens['packed'] else 'rows of at most'} {tokens['context']}"),
        ("splits", ", ".join(f"{k} {v:,}" for k, v in value["splits"].items()) + " sequences"),
        ("shape", f"L={value['depth']}, d_model {value['d_model']}, vocab {value['vocab']:,}"),
        ("head", ", ".join(f"{k} {v}" for k, v in value["head"].items() if k != "geometry")),
        ("ran in", f"{capture['compute_dtype']}, attention {capture['attention']}"),
        (
            "head error",
            f"{canary['head_error']:.1e} of the largest logit, head on layer L vs model",
        ),
        ("stored KL", f"{canary['stored_kl']:.1e} nats per position, layer L as stored"),
        ("padding", f"{canary['padding_error']:.1e} largest change of a residual by padding"),
        ("batches", "one sequence alone" if value["alone"] else "of several sequences"),
        ("causal", "yes" if canary["causal"] else "NO: later tokens change earlier residuals"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, shown in rows:
        print(f"{name:<{width}}  {shown}")
    layers = value["layer_arrays"]
    body = [(int(k), v["dtype"], v["absmax"], v["nonfinite"]) for k, v in layers.items()]
    print_table("", ("layer", "dtype", "absmax", "non-finite"), body)
    if "logits" in canary:  # older caches have not measured them
        logits_errors(capture["logits"], canary["logits"])


def logits_errors(mode: str, measured: dict[str, Any]) -> None:
    """What each logits mode costs; the cache's own is marked."""
    rows = [
        (
            f"{name} *" if name == mode else name, error["dtype"], error["bytes"],
            error["kl_mean"], error["kl_max"], f"{error['flips']} of {measured['rows']}",
            error["relative_error"], error["tail_mass"],
        )
        for name, error in measured["modes"].items()
    ]  # fmt: skip
    columns = ("logits", "dtype", "bytes", "KL mean", "KL max", "flips", "rel. error", "tail mass")
    print_table(f"logits against the model's, KL in nats (* this cache: {mode})", columns, rows)


def verified(found: "Verification") -> None:
    """What `residua verify` found."""
    for damage in found.damages:
        rows = f" rows {damage.start}-{damage.stop - 1}" if damage.stop else ""
        print(f"damaged: {damage.file}{rows}: {damage.message}")
    state = "ok" if found.ok else f"{len(found.damages)} damaged"
    count = len(found.missing_parts)
    missing = f", {count} parts not extracted yet" if count else ""
    print(f"{state}: {found.shards} shards, {format_bytes(found.bytes)} read{missing}")


def repaired(found: "Repair") -> None:
    """What `residua repair` did."""
    for name in found.mended:
        print(f"mended: {name}")
    for name in found.changed:
        print(f"written anew, not byte for byte the same: {name}")
    for damage in found.left:
        print(f"cannot be mended: {damage.file}: {damage.message}; extract again")
    print("ok" if found.ok else f"{len(found.left)} damaged")


def exported(folder: Path, index: dict[str, Any]) -> None:
    """What `residua export` wrote."""
    total = sum(entry["bytes"] for entry in index["files"].values())
    print(f"{index['positions']:,} positions, {len(index['layers'])} layers, {format_bytes(total)}")
    print(f"  {folder} (README.md says how to open it)")


def pushed(done: "PushedCache") -> None:
    """What `residua push` sent."""
    from ...cache.sharing.dataset_card import NO_LICENCE

    print(f"pushed: {done.files:,} files, {format_bytes(done.bytes)}")
    print(f"  {done.url}")
    if done.card:
        print(f"{NO_LICENCE}: set `license:` in the card (README.md) there")
    print(f"next: residua pull {done.repo_id} --root another-root")


def pulled(value: dict[str, Any]) -> None:
    """What `residua pull` fetched."""
    print(f"{value['status']}: cache {value['cache'][:12]}")
    print(f"  {_contents(value)}")
    print(f"  {value['path']}")
    print(f"next: residua info {value['cache'][:12]}")


def fitted(
    kind: str,
    cache: str,
    probe: Path,
    metrics: Sequence[dict[str, Any]],
    moments: dict[str, Any] | None = None,
    readable: bool = True,
) -> None:
    """The metrics of a probe of some `kind` that was fitted on `cache`, and where it is.

    `moments` says where its moments came from; only what is `readable` by the head is evaluated.
    """
    columns = [name for name, value in metrics[0].items() if not isinstance(value, dict | list)]
    rows = [[row.get(name) for name in columns] for row in metrics]
    print_table(f"{kind}, cache {cache[:12]}", columns, rows)
    if moments is not None:
        print(
            f"moments: {format_bytes(moments['bytes'])}; {moments['kept']} found, "
            f"{moments['extended']} "
            f"brought up to date, {moments['computed']} computed"
        )
        if moments["why"]:
            print(f"  {moments['why']}")
    _tell_shares(metrics)
    print(f"probe: {probe}")
    if readable:
        print(f"next: residua evaluate {cache[:12]} {probe.name} --html report.html")


def _tell_shares(metrics: Sequence[dict[str, Any]]) -> None:
    """Say what the columns of pairs and of squared errors mean, where a fit has them."""
    if "crossing" in metrics[0]:
        print("crossing: share of the pairs of sequences that join two documents")
    if "top_error" in metrics[0]:
        print(
            "top_target, top_error: shares of the target's variance and of the squared error that "
            "the largest 0.1 % of the pairs make; first_...: the pairs whose source is the first "
            "position of its sequence"
        )


def evaluated(found: "Evaluation", written: Sequence[str] = ()) -> None:
    """KL and precision@1 by layer, precision@1 by confidence, and the files that were written."""
    print_evaluation(found)
    _confidences(found)
    for path in written:
        print(f"wrote {path}")


def _confidences(found: "Evaluation") -> None:
    """Precision@1 by the model's confidence, at one layer of each probe and offset."""
    from ..evaluation.confidence_buckets import BUCKETS, bucket_name
    from ..evaluation.metrics import precision

    names = [bucket_name(*bucket) for bucket in BUCKETS]
    rows: list[Sequence[object]] = []
    for offset in found.offsets:
        for probe in found.probes:
            if not (whole := found.select(probe, offset)):
                continue
            layer = max(whole, key=precision).layer
            parts = found.select_buckets(probe, offset)
            shown = {row.bucket: row.precision_at_1 for row in parts if row.layer == layer}
            rows.append((offset, probe, layer, *(shown.get(name) for name in names)))
    title = "precision@1 by the model's confidence at t+N, at the layer where it is best in all"
    print_table(title, ("N", "probe", "layer", *names), rows)


def started(value: dict[str, Any], found: "Evaluation") -> None:
    """What the quickstart found, where things are and what to try next."""
    print_evaluation(found)
    print(value["text"])
