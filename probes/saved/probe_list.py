"""Lists the probes under a root and describes one, from `config.json` alone: no tensor is read.

`list_probes` and `describe_probe` give what `residua probes` and `residua info PROBE` print.
"""

import math
from pathlib import Path
from typing import Any

from ...cache.errors import ResiduaError
from ...cache.files.paths import as_path, list_folder, total_bytes
from .config_file import read_config
from .library import FOLDER

UNREADABLE = (ResiduaError, OSError, ValueError, RecursionError)
"""Errors that a damaged or forged probe, or its disk, may cause where its config is read."""


def probe_folders(root: Path) -> list[Path]:
    """Folders of the saved probes under `root`, by name; no file is opened."""
    folders = (path for path in list_folder(root / FOLDER) if not path.name.startswith("."))
    return sorted(path for path in folders if (path / "config.json").is_file())


def list_probes(root: str | Path) -> list[dict[str, Any]]:
    """JSON objects of all probes under `root`, by name; the state of a damaged one is the error."""
    return [summarize_probe(path) for path in probe_folders(as_path(root))]


def summarize_probe(path: Path) -> dict[str, Any]:
    """The JSON object of one probe in `residua probes`.

    `kl` is None, or the smallest and the largest KL(model || probe) of its (layer, offset) pairs,
    in nats per position of the validation split, if the fit measured them.
    """
    value: dict[str, Any] = {"probe": path.name, "kind": None, "layers": [], "offsets": []}
    value |= {"targets": [], "cache": None, "split": None, "kl": None, "bytes": 0}
    try:
        config = read_config(path / "config.json")
        rows = config["pairs"]
        kl = [row["kl"] for row in rows if _is_finite(row.get("kl"))]
        value |= {
            "kind": config["kind"],
            "layers": sorted({row["layer"] for row in rows if row.get("layer") is not None}),
            "offsets": sorted({row["offset"] for row in rows}),
            "targets": sorted({row["target"] for row in rows if row.get("target") is not None}),
            "cache": config["cache"],
            "split": config["split"],
            "kl": {"min": min(kl), "max": max(kl)} if kl else None,
            "bytes": total_bytes(path),
            "state": "saved",
        }
    except UNREADABLE as error:
        value["state"] = f"damaged: {error or type(error).__name__}"
    return {**value, "path": str(path)}


def describe_probe(path: Path) -> dict[str, Any]:
    """The JSON object of `residua info PROBE`: where it was fitted, parameters, measures by pair.

    Raises as `read_config` does.
    """
    config = read_config(path / "config.json")
    return {
        **summarize_probe(path),
        "d_model": config["d_model"],
        "geometry": config["geometry"],
        "residua": config["residua"],
        "tensors": config["tensors"],
        "params": config["params"],
        "metrics": config["pairs"],
    }


def is_probe(path: Path) -> bool:
    """Whether `path` is the folder of a saved probe."""
    return all((path / name).is_file() for name in ("config.json", "probe.safetensors"))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
