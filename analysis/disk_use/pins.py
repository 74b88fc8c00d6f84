"""Pins: caches and probes that nothing removes unasked, each with a reason and a date.

A pin is the file `<root>/.pins/<name>.json`, written atomically; `<name>` is the folder's name of a
cache or probe. `residua rm` and `gc` leave what is pinned alone. A pin that cannot be read still
pins what its name says.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...cache.errors import CorruptError, NotFoundError, ResiduaError, UsageError
from ...cache.files.confined_files import check_folders, is_confined_name, read_confined_json
from ...cache.files.json_fields import checking_fields, choice_field, number_field, text_field
from ...cache.files.json_files import make_folder, write_json
from ...cache.files.paths import check_not_served, list_folder

FOLDER = ".pins"
"""Folder of all pins under a root."""
MAX_REASON = 500
"""Longest reason, in characters."""
MAX_PINS = 100_000
"""Most pins of a root that are read."""


@dataclass(frozen=True)
class Pin:
    """A cache or probe to keep."""

    kind: str
    """`cache` or `probe`."""
    name: str
    """Name of the folder: the id of a cache, the name of a probe."""
    reason: str
    """Why, in the words of whoever pinned it; what is wrong with a pin that cannot be read."""
    pinned: float
    """Time, in seconds since 1970."""

    def to_dict(self) -> dict[str, Any]:
        """An entry of the JSON object of `residua pin`."""
        return asdict(self)


def list_pins(root: Path) -> list[Pin]:
    """The pins of a root, by name."""
    check_not_served(root, "its pins are its own: ask it by --server instead of --root")
    try:
        check_folders(root, (FOLDER,))
    except CorruptError:  # a link or a file of strangers: no pins
        return []
    names = sorted(path.name for path in list_folder(root / FOLDER))
    stems = [name[: -len(".json")] for name in names if name.endswith(".json") and name[0] != "."]
    return [_read_pin(root, stem) for stem in stems[:MAX_PINS]]


def _read_pin(root: Path, name: str) -> Pin:
    """The pin in the file of `name`; one that cannot be read pins `name`, too."""
    file = f"{FOLDER}/{name}.json"
    try:
        value = read_confined_json(root, file)
        with checking_fields(root / file, "a pin"):
            if text_field(value, "name") != name:
                raise CorruptError(f"{root / file} is a pin of another name")
            return Pin(
                choice_field(value, "kind", ("cache", "probe")),
                name,
                text_field(value, "reason", MAX_REASON),
                number_field(value, "pinned", 0),
            )
    except (ResiduaError, OSError, ValueError) as error:
        return Pin("unknown", name, f"a pin that cannot be read: {error}", 0.0)


def pin_saved(root: Path, kind: str, name: str, reason: str = "") -> Pin:
    """Pin the cache or probe in the folder `name` under `root`; an earlier pin is replaced.

    Raises `NotFoundError` if the folder is not, or no longer, there, `UsageError` for a reason that
    is too long.
    """
    if len(reason) > MAX_REASON:
        raise UsageError(f"the reason has {len(reason)} characters, the most is {MAX_REASON}")
    check_pin_name(name)
    check_folders(root, (FOLDER,))
    pin = Pin(kind, name, reason, float(round(time.time())))
    file = root / FOLDER / f"{name}.json"
    make_folder(root / FOLDER)
    write_json(file, pin.to_dict())
    # Removal looks for pins once the folder is out of sight, so one of the two sees the other.
    marker = ("manifest.json", "journal/base.json") if kind == "cache" else ("config.json",)
    folder = root / name if kind == "cache" else root / "probes" / name
    if not any((folder / part).is_file() for part in marker):
        file.unlink(missing_ok=True)
        raise NotFoundError(f"{folder} is not, or no longer, a {kind}; `residua du` lists what is")
    return pin


def unpin_saved(root: Path, name: str) -> Pin:
    """Remove the pin of `name`, or of the only pinned name that begins so; returns it.

    Raises `NotFoundError` if there is none, `UsageError` for several.
    """
    pins = list_pins(root)
    matches = [pin for pin in pins if pin.name == name]
    matches = matches or [pin for pin in pins if name and pin.name.startswith(name)]
    if len(matches) > 1:
        names = ", ".join(pin.name for pin in matches)
        raise UsageError(f"{name!r} begins the names of {len(matches)} pins: {names}")
    if not matches:
        names = ", ".join(pin.name[:40] for pin in pins) or "none"
        raise NotFoundError(f"no pin {name!r} under {root} (there: {names})")
    (root / FOLDER / f"{matches[0].name}.json").unlink(missing_ok=True)
    return matches[0]


def check_pin_name(name: str) -> None:
    """Raise `UsageError` unless `name` can be that of a cache's or probe's folder."""
    if not is_confined_name(name) or "/" in name or name.startswith("."):
        raise UsageError(f"{name[:100]!r} is no name of a cache or probe")
