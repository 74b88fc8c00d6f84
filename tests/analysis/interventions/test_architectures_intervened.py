"""Interventions run on models of many types, and agree with plain hooks on their blocks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.analysis.interventions.erase_study import study_erasure
from residua.analysis.interventions.layer_runs import LayerRuns
from residua.analysis.interventions.patch_study import study_patching

from ...support import models

FAST = ("gpt2", "gemma2")
KINDS = [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow)
         for kind in models.CONFIGS]  # fmt: skip


def test_there_are_fifteen_types_and_more() -> None:
    assert len(KINDS) >= 15


@pytest.mark.parametrize("kind", KINDS)
def test_a_mean_ablated_row_changes_what_a_hook_says(
    kind: str, texts_file: Path, tmp_path: Path
) -> None:
    folder = models.save_model(tmp_path / "model", kind)
    cache = residua.extract(
        str(folder), str(texts_file), root=tmp_path / "root", context=32, max_tokens=1200
    )
    runs = LayerRuns.prepare(cache, max_positions=64, split="all", device="cpu")
    module: Any = runs.model.blocks.model
    layer = cache.n_blocks - 1
    with torch.inference_mode():
        batch = next(iter(runs.batches()))
        rows = batch.rows(layer)
        changed = rows.clone()
        changed[::5] = rows.mean(0)
        found = batch.logits(layer, changed)

        def overwrite(_: Any, __: Any, output: Any) -> Any:
            hidden = (output if isinstance(output, torch.Tensor) else output[0]).clone()
            hidden[batch.batch.row, batch.batch.column] = changed
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        handle = runs.model.blocks.blocks[layer - 1].register_forward_hook(overwrite)
        try:
            logits = module(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        finally:
            handle.remove()
        expected = logits[batch.batch.row, batch.batch.column]
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 1e-4 * scale
    assert runs.is_resumed(layer)

    options: Any = {"split": "all", "max_positions": 64, "spacing": 6, "progress": None}
    patched = study_patching(cache, model=runs.model, kinds=("mean",), **options)
    erased = study_erasure(cache, model=runs.model, layers=layer, k=2, **options)
    for result in (patched, erased):
        rows_of: Any = result.tables[1].rows
        assert all(np.isfinite(row.kl) for row in rows_of)
        assert any(row.kl > 1e-6 for row in rows_of)
