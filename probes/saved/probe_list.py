"""Lists the probes under a root and describes one, from `config.json` alone: no tensor is read.

`list_probes` and `describe_probe` give what `residua probes` and `residua info PROBE` print.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...cache.errors import ResiduaError
from ...cache.files.paths import as_path, list_folder, total_bytes
from .config_file import read_config
from .library import FOLDER

UNREADABLE = (ResiduaError, OSError, ValueError, RecursionError)
"""Errors that a damaged or forged probe, or its disk, may cause where its config is read."""


FIT_MEASURES = {
    "kl": "KL to the model, nats per position of the validation split",
    "r2": "R2 of the residual stream that is predicted, cross-validated on the train split; "
    "residua evaluate measures the KL",
    "nll": "-log of the probability of the model's top token, nats per position of the validation "
    "split",
    "nll_text": "-log of the probability of the text's next token, nats per position of the "
    "validation split",
    "loss": "loss of the fit on the rows that it held out",
}
"""What fits measure by themselves, by the names in `measure` of `summarize_probe`."""


def probe_folders(root: Path) -> list[Path]:
    """Folders of the saved probes under `root`, by name; no file is opened."""
    folders = (path for path in list_folder(root / FOLDER) if not path.name.startswith("."))
    return sorted(path for path in folders if (path / "config.json").is_file())


def list_probes(root: str | Path) -> list[dict[str, Any]]:
    """JSON objects of all probes under `root`, by name; the state of a damaged one is the error."""
    return [summarize_probe(path) for path in probe_folders(as_path(root))]


def summarize_probe(path: Path) -> dict[str, Any]:
    """The JSON object of one probe in `residua probes`.

    `measure` is what its fit measured by itself, None for one that measures nothing, such as a
    baseline: a name of `FIT_MEASURES`, and the smallest (`min`) and largest (`max`) value of the
    (layer, offset) pairs. `kl` has the same numbers if they are KL(model || probe), else None: a
    ridge map is fitted to the residual stream, and its KL is not known before an evaluation.
    """
    value: dict[str, Any] = {"probe": path.name, "kind": None, "layers": [], "offsets": []}
    value |= {"targets": [], "cache": None, "split": None, "kl": None, "measure": None, "bytes": 0}
    try:
        config = read_config(path / "config.json")
        rows = config["pairs"]
        measure = fit_measure(rows)
        value |= {
            "kind": config["kind"],
            "layers": sorted({row["layer"] for row in rows if row.get("layer") is not None}),
            "offsets": sorted({row["offset"] for row in rows}),
            "targets": sorted({row["target"] for row in rows if row.get("target") is not None}),
            "cache": config["cache"],
            "split": config["split"],
            "kl": None
            if measure is None or measure["name"] != "kl"
            else {"min": measure["min"], "max": measure["max"]},
            "measure": measure,
            "bytes": total_bytes(path),
            "state": "saved",
        }
    except UNREADABLE as error:
        value["state"] = f"damaged: {error or type(error).__name__}"
    return {**value, "path": str(path)}


def fit_measure(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The measure that the rows of a probe's metrics have, its smallest and its largest value.

    None if the fit measured nothing that can be compared, or nothing that is finite.
    """
    for key in ("kl", "r2", "validation"):
        values = [row[key] for row in rows if _is_finite(row.get(key))]
        if not values:
            continue
        # The validation loss of a vocabulary probe: the KL, or a cross-entropy.
        losses = {row.get("loss") for row in rows}
        name = key
        if key == "validation":
            name = {"kl": "kl", "model": "nll", "text": "nll_text"}.get(str(losses.pop()), "loss")
            name = "loss" if losses else name
        return {"name": name, "min": min(values), "max": max(values)}
    return None


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
