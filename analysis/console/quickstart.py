"""The whole flow on the sample model: extract, fit, evaluate, report."""

import time
from pathlib import Path
from typing import Any

from ...cache.extraction.answer_request import answer_request as extract
from ...cache.extraction.request import ExtractionRequest
from ...probes.ridge.ridge_probe import RidgeProbe
from ...probes.saved.library import probe_path
from ...probes.saved.save import save_probe
from ...sample import MODEL_DIR, TEXT_PATH
from ..evaluation.evaluate import evaluate
from ..evaluation.result import Evaluation
from .actions import write_outputs
from .terminal import Meter, format_bytes

OFFSETS = (0, 1, 2, 3)
CONTEXT = 256


def run_quickstart(
    out: Path, root: Path | None, max_tokens: int | None, shown: Meter
) -> tuple[dict[str, Any], Evaluation]:
    """Run the flow with everything under `out`; returns the JSON object and the evaluation.

    The caches go to `root`, by default `out/caches`.
    """
    began = time.perf_counter()
    root = root or out / "caches"
    request = ExtractionRequest(
        str(MODEL_DIR), str(TEXT_PATH), root, context=CONTEXT, max_tokens=max_tokens
    )
    done = extract(request, shown.stage)
    cache = done.cache
    probe = RidgeProbe(offsets=OFFSETS).fit(cache, progress=shown.of("moments"))
    path = save_probe(probe, probe_path(root, probe))
    found = evaluate(cache, [probe], progress=shown.of("evaluate"))
    files = write_outputs(found, out / "report.html", out / "pictures", "residua quickstart")
    seconds = time.perf_counter() - began
    value = {
        **done.to_dict(),
        "probe": str(path),
        "rows": found.to_dicts(),
        "report": files[0],
        "pictures": files[1:],
        "seconds": round(seconds, 1),
    }
    value["text"] = _text(value, root)
    return value, found


def _text(value: dict[str, Any], root: Path) -> str:
    """Where things are and what to try next."""
    short = value["cache"][:12]
    return "\n".join(
        [
            f"done in {value['seconds']:.0f} s",
            f"  report    {value['report']}   (open it in a browser)",
            f"  pictures  {Path(value['pictures'][0]).parent}",
            f"  cache     {value['path']}  ({format_bytes(value['bytes'])})",
            f"  probe     {value['probe']}",
            "next:",
            f"  residua info {short} --root {root}",
            "  residua extract YOUR_MODEL YOUR_TEXTS.jsonl --max-tokens 200000",
            "  residua fit ridge CACHE --offsets 0-3",
            "  residua evaluate CACHE PROBE --html report.html",
        ]
    )
