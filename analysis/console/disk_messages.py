"""Prints what `residua du`, `gc` and `pin` found or did, for people."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...cache.format.manifest import SHORT_ID
from .messages import root_option
from .terminal import format_bytes, print_table

if TYPE_CHECKING:
    from ..disk_use.collection import Collected, CollectedItem, CollectionPlan, KeptItem
    from ..disk_use.disk_report import DiskItem, DiskReport
    from ..disk_use.pins import Pin

SHOWN_ITEMS = 20
"""Items of one kind that a table shows; the others are added up."""


def print_disk(report: "DiskReport", savings: dict[str, int]) -> None:
    """Print what lies under a root, and what collection would free (`residua du`)."""
    if not report.items:
        print(f"nothing under {report.root}")
        return
    rows = []
    for kind in dict.fromkeys(item.kind for item in report.items):
        items = report.of_kind(kind)
        rows += [_row_of(report, item) for item in items[:SHOWN_ITEMS]]
        if more := items[SHOWN_ITEMS:]:
            size = format_bytes(sum(item.bytes for item in more))
            rows.append([kind, f"{len(more)} more", size, None, None, None, None])
    columns = ["kind", "name", "size", "alone frees", "last used", "state", "named by"]
    print_table(str(report.root), columns, rows)
    print(f"together {format_bytes(report.bytes)}; files that several share count once")
    if report.of_kind("foreign", "link"):
        print("foreign: not residua's files, and links; never touched")
    for folder in report.unreadable:
        print(f"cannot be looked into: {folder}")
    for category, freed in savings.items():
        if freed:
            at_root = root_option(str(report.root))
            print(f"residua gc --{category}{at_root}  would free {format_bytes(freed)}")


def _row_of(report: "DiskReport", item: "DiskItem") -> list[object]:
    state = f"{item.state} (in use)" if item.in_use else item.state
    if logits := item.contents.get("logits"):
        state += f", of it {format_bytes(logits)} logits"
    users = [user.kind for user in item.users]
    counts = [f"{users.count(kind)} {kind}" for kind in dict.fromkeys(users)]
    named = ", ".join(counts) if counts or item.kind not in ("cache", "probe") else "nothing"
    return [
        item.kind,
        _short_name(item),
        format_bytes(item.bytes),
        format_bytes(item.freed),
        _day(item.last_used) if item.last_used else None,
        state or None,
        named or None,
    ]


def _short_name(item: "DiskItem") -> str:
    """The name of an item, with the ids of caches cut as elsewhere."""
    first, slash, rest = item.name.partition("/")
    return (first[:SHORT_ID] if len(first) == 64 else first) + slash + rest


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(min(max(seconds, 0.0), 1e11)))


def describe_plan(plan: "CollectionPlan") -> Iterator[str]:
    """Lines on what a collection would remove, and what stays."""
    for removal in plan.removals:
        yield _line_of(removal)
    yield from _lines_of_kept(plan.kept)
    yield f"{len(plan.removals)} to remove, {format_bytes(plan.freed)} would be freed"


def print_plan(plan: "CollectionPlan") -> None:
    """Print what a collection would remove (`residua gc --dry-run`)."""
    for line in describe_plan(plan):
        print(line)


def print_collected(collected: "Collected") -> None:
    """Print what a collection removed (`residua gc`)."""
    for removal in collected.removed:
        print(f"removed: {_line_of(removal)}")
    for line in _lines_of_kept(collected.kept):
        print(line)
    print(f"{len(collected.removed)} removed, {format_bytes(collected.freed)} freed")


def _line_of(removal: "CollectedItem") -> str:
    size = sum(item.bytes for item in removal.all_items)
    text = f"{removal.item.kind} {_short_name(removal.item)} ({format_bytes(size)}"
    return f"{text}; {removal.item.state})" if removal.item.state else f"{text})"


def _lines_of_kept(kept: Sequence["KeptItem"]) -> Iterator[str]:
    for entry in kept[:SHOWN_ITEMS]:
        yield f"kept: {entry.item.kind} {_short_name(entry.item)}: {entry.reason}"
    if len(kept) > SHOWN_ITEMS:
        yield f"kept: {len(kept) - SHOWN_ITEMS} more"


def print_pins(root: Path, pins: Sequence["Pin"], verb: str) -> None:
    """Print pins (`residua pin`); `verb` is `pinned` or `no longer pinned`."""
    if not pins:
        print(f"nothing is pinned under {root}")
    for pin in pins:
        name = pin.name[:SHORT_ID] if pin.kind == "cache" else pin.name
        when = f" since {_day(pin.pinned)}" if pin.pinned else ""
        print(f"{verb}: {pin.kind} {name}{when}{f': {pin.reason}' if pin.reason else ''}")
