"""Prints what `residua probes`, `info PROBE`, `rm`, `push` and `pull` found or did, for people."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache.number_ranges import format_ranges
from ...probes.saved.probe_list import FIT_MEASURES
from .messages import root_option
from .terminal import format_bytes, print_table

if TYPE_CHECKING:
    from .saved_actions import Removal


MEASURE_HEADS = {"kl": "KL", "r2": "R2", "nll": "NLL", "nll_text": "NLL text", "loss": "loss"}
"""Short names of the measures of fits."""


def print_probes(root: Path, probes: Sequence[dict[str, Any]]) -> None:
    """Print the probes under a root, one line each (`residua probes`)."""
    if not probes:
        print(
            f"no probes under {root}; fit one with residua fit ridge CACHE{root_option(str(root))}"
        )
        return
    rows = [
        (
            probe["probe"],
            probe["kind"],
            format_ranges(probe["layers"]) if probe["layers"] else None,
            format_ranges(probe["offsets"]),
            None if probe["cache"] is None else probe["cache"][:12],
            _measured_range(probe["measure"]),
            format_bytes(probe["bytes"]),
            *([] if all(p["state"] == "saved" for p in probes) else [probe["state"]]),
        )
        for probe in probes
    ]
    columns = ["probe", "kind", "layers", "offsets N", "cache", "measured by the fit", "size"]
    print_table(str(root), [*columns, "state"][: len(rows[0])], rows)
    measured = {probe["measure"]["name"] for probe in probes if probe["measure"]}
    if measured:
        print("measured by the fit: smallest and largest of its (layer, offset) pairs")
    for name, meaning in FIT_MEASURES.items():
        if name in measured:
            print(f"  {MEASURE_HEADS[name]}: {meaning}")
    print(f"next: residua info PROBE{root_option(str(root))}, or residua evaluate CACHE PROBE")


def _measured_range(measure: dict[str, Any] | None) -> str | None:
    if measure is None:
        return None
    return f"{MEASURE_HEADS[measure['name']]} {measure['min']:.3g} to {measure['max']:.3g}"


def print_probe(value: dict[str, Any]) -> None:
    """Print where a probe was fitted, its parameters and measures (`residua info PROBE`)."""
    params = ", ".join(f"{k} {v}" for k, v in value["params"].items() if v is not None)
    facts = [
        ("probe", value["probe"]),
        ("path", value["path"]),
        ("kind", value["kind"]),
        ("size", format_bytes(value["bytes"])),
        ("cache", value["cache"]),
        ("fitted on", f"split {value['split']}"),
        ("layers", format_ranges(value["layers"]) if value["layers"] else "reads no layer"),
        ("offsets N", format_ranges(value["offsets"])),
        ("predicts", f"layers {format_ranges(value['targets'])}" if value["targets"] else None),
        ("width", f"d_model {value['d_model']}"),
        ("parameters", params),
        ("written by", f"residua {value['residua']}"),
    ]
    for name, fact in facts:
        if fact is not None:
            print(f"{name:<10}  {fact}")
    metrics = value["metrics"]
    names = dict.fromkeys(k for row in metrics for k in row if not isinstance(row[k], list | dict))
    columns = sorted(names, key=lambda name: (name != "layer", name != "offset"))
    print_table("", columns, [[row.get(name) for name in columns] for row in metrics])


def describe_removal(removal: "Removal") -> str:
    """One line on what a removal frees, and what keeps its own links."""
    text = f"{removal.item.kind} {removal.item.path} ({format_bytes(removal.freed)}"
    if removal.shared:
        text += f"; {format_bytes(removal.shared)} more are shared with other caches, and stay"
    text += ")"
    if removal.extended_by:
        ids = ", ".join(name[:12] for name in removal.extended_by)
        text += f"; extended by {ids}, which stay whole"
    if others := [str(user) for user in removal.users if user.kind != "cache"]:
        text += f"; named by {'; '.join(others)}"
    return text


def print_removals(removals: Sequence["Removal"], removed: bool) -> None:
    """Print what `residua rm` removed."""
    for removal in removals if removed else ():
        print(f"removed: {describe_removal(removal)}")
    if not removed:
        print("nothing was removed")


def print_push(value: dict[str, Any], at_root: str) -> None:
    """Print what `residua push` sent, and where; `at_root` is the `--root` of a copy by path."""
    from ...cache.sharing.dataset_card import NO_LICENCE

    if value["status"] != "pushed" or value["kind"] == "probe":
        print_shared(value, at_root)
        return
    print(f"pushed: {value['files']:,} files, {format_bytes(value['bytes'])}")
    print(f"  {value['url']}")
    if value["card"]:
        print(f"{NO_LICENCE}: set `license:` in the card (README.md) there")
    print(f"next: residua pull {value['repo_id']} --root another-root")


def print_shared(value: dict[str, Any], at_root: str) -> None:
    """Print which cache or probe was fetched or copied, and where it is.

    `at_root` is the `--root` that the printed command needs.
    """
    if value["kind"] == "probe":
        print(f"{value['status']}: probe {value['probe']}")
        print(f"  {value.get('url', value.get('path'))}")
        if "path" in value:
            print(f"next: residua info {value['probe']}{at_root}")
        return
    layers = format_ranges(value["layers"])
    print(f"{value['status']}: cache {value['cache'][:12]}")
    print(f"  {value['positions']:,} positions, layers {layers}, {format_bytes(value['bytes'])}")
    print(f"  {value['path']}")
    print(f"next: residua info {value['cache'][:12]}{at_root}")
