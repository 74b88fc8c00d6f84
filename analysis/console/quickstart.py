"""The whole flow on the sample model, as `residua quickstart`: extract, fit, evaluate, report."""

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...cache.errors import UsageError
from ...cache.extraction.answer import answer_request
from ...cache.extraction.request import ExtractionRequest
from ...probes.ridge.ridge_probe import RidgeProbe
from ...probes.saved.library import probe_path
from ...probes.saved.save import save_probe
from ...sample import MODEL_DIR, TEXT_PATH
from ..evaluation.probe_evaluation import evaluate
from ..evaluation.result import Evaluation
from .actions import write_outputs
from .messages import root_option
from .terminal import Meter, format_bytes

OFFSETS = (0, 1, 2, 3)
CONTEXT = 256
SAMPLE_TRANSFORMERS = (5, 14)
"""First version of transformers that names the tensors of the sample model as its file does."""


def check_transformers(installed: str) -> None:
    """Raise `UsageError` if transformers of the version `installed` cannot load the sample model.

    Others than the sample model are read by earlier versions, too.
    """
    oldest = ".".join(map(str, SAMPLE_TRANSFORMERS))
    if tuple(int(part) for part in installed.split(".")[:2]) < SAMPLE_TRANSFORMERS:
        raise UsageError(
            f"the bundled model is in the format of transformers {oldest}, and {installed} is "
            f"installed: pip install 'transformers>={oldest}' (residua[all] brings it)"
        )


def run_quickstart(
    out: Path, root: Path | None, max_tokens: int | None, meter: Meter
) -> tuple[dict[str, Any], Evaluation]:
    """Run the flow with all files under `out`; return the JSON object and the evaluation.

    Caches go to `root`, by default `out/caches`. `max_tokens` limits the text.
    """
    check_transformers(version("transformers"))
    start = time.perf_counter()
    root = root or out / "caches"

    # Model and text -> cache.
    request = ExtractionRequest(
        str(MODEL_DIR), str(TEXT_PATH), root, context=CONTEXT, max_tokens=max_tokens
    )
    extraction = answer_request(request, meter.stage)
    cache = extraction.cache

    # Cache -> probe, then probe and cache -> report and pictures.
    probe = RidgeProbe(offsets=OFFSETS).fit(cache, progress=meter.progress_of("moments"))
    path = save_probe(probe, probe_path(root, probe))
    evaluation = evaluate(cache, [probe], progress=meter.progress_of("evaluate"))
    files = write_outputs(evaluation, out / "report.html", out / "pictures", "residua quickstart")

    value = {
        **extraction.to_dict(),
        "probe": str(path),
        "rows": evaluation.to_dicts(),
        "report": files[0],
        "pictures": files[1:],
        "seconds": round(time.perf_counter() - start, 1),
    }
    value["text"] = _closing_text(value, root)
    return value, evaluation


def _closing_text(value: dict[str, Any], root: Path) -> str:
    """Where the files of the quickstart are, and commands to try next."""
    cache_name, probe_name = value["cache"][:12], Path(value["probe"]).name
    at_root = root_option(str(root))
    return "\n".join(
        [
            f"done in {value['seconds']:.0f} s",
            f"  report    {value['report']}   (open it in a browser)",
            f"  pictures  {Path(value['pictures'][0]).parent}",
            f"  cache     {value['path']}  ({format_bytes(value['bytes'])})",
            f"  probe     {value['probe']}",
            "next:",
            f"  residua info {cache_name}{at_root}",
            "  residua extract YOUR_MODEL YOUR_TEXTS.jsonl --max-tokens 200000",
            f"  residua fit ridge {cache_name} --offsets 0-3{at_root}",
            f"  residua evaluate {cache_name} {probe_name} --html report.html{at_root}",
        ]
    )
