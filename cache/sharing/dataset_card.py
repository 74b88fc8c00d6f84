"""The card (README.md) of a cache's dataset repository on the Hugging Face hub.

`push_cache` uploads `dataset_card(cache, repo_id)` if the repository has no card.
"""

from typing import Any

from ..files.confined_files import read_confined_json
from ..format.manifest import SHORT_ID
from ..number_ranges import format_ranges
from ..store.activation_cache import ActivationCache
from ..store.local_origin import public_name
from ..tokens.splits import SPLITS

SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
"""Bounds of the hub's size categories, from a thousand rows on."""
NO_LICENCE = "No licence chosen yet"
"""First words of the note that a card has until its owner sets a licence."""

CARD = """---
pretty_name: Residual streams of {model} on {data}
tags:
- residua
- interpretability
- activations
- residual-stream
- zarr
size_categories:
- {size_category}
viewer: false
# license: <- choose one; those of the model and of the texts bind these activations too
---

# Residual streams of {model} on {data}

> **{no_licence}.** Whoever pushed this has to set `license:` above: activations and token ids
> come from a model and from texts that have licences of their own.

Activations of a frozen language model, kept by residua as cache `{id}`:
every layer's residual stream at every position, the tokens, and the head that turns the last
layer into logits. Probes and lenses are fitted from it without the model.

| | |
|---|---|
| model | {model}, {architecture} |
| weights (sha256) | `{weights}` |
| revision | {revision} |
| texts | {data} |
| positions (tokens) | {positions:,} in {sequences:,} sequences of at most {context:,} |
| splits (sequences) | {splits} |
| layers | {layers} of 0-{depth}; 0 is the embedding output, {depth} the last block |
| norm | layer {depth} is **before** the final norm |
| width, vocabulary | {d_model:,}, {vocab:,} |
| stored | {codec} chunks; logits: {logits} |
| dtype | {dtypes}; the model ran in {compute_dtype} |
| non-finite values | {nonfinite} |
| size | {gigabytes:.3g} GB |
| head error | {head_error} (largest difference of logits over largest logit) |
| KL of the stored last layer | {stored_kl} (nats per position, model to head on stored rows) |

## Open it

```sh
residua pull {repo_id}          # downloads, checks every byte, and lists it in `residua ls`
residua info {short}
```

```python
from residua.cache.store.catalog import cache_root, find_cache

cache = find_cache("{short}", cache_root())
cache.residual({depth})  # dask array (positions, d_model)
cache.logits()  # dask array (positions, vocab), from the head
```

Without residua: it is plain zarr v3.

```python
import zarr
from huggingface_hub import snapshot_download

folder = snapshot_download("{repo_id}", repo_type="dataset")
layer = zarr.open_group(f"{{folder}}/arrays.zarr", mode="r")["residual/{depth}"]
rows = layer[:1000]  # (1000, d_model){bfloat16}
```

## Citation

Cite the model, the texts, and this cache: its id `{id}` names the weights, the tokens and the
settings.
"""
BFLOAT16 = """
# bfloat16 is kept as uint16, the upper half of a float32
rows = (rows.astype("uint32") << 16).view("float32")"""


def format_dataset_card(cache: ActivationCache, repo_id: str) -> str:
    """Markdown with YAML front matter for the repository `repo_id`; it names no licence.

    Figures come from the cache, its manifest and its provenance.
    """
    manifest = cache.manifest
    dtypes = {layer: cache.residual_array(layer).layout.logical_dtype for layer in cache.layers}
    splits = {name: len(cache.sequences(name)) for name in SPLITS}
    provenance = read_confined_json(cache.path, "provenance.json")
    checks = provenance.get("canary", {})  # measures of the model's checks
    shards = [shard for record in cache.committed.values() for shard in record.arrays.values()]
    return CARD.format(
        no_licence=NO_LICENCE,
        repo_id=repo_id,
        id=cache.id,
        short=cache.id[:SHORT_ID],
        model=public_name(manifest.model_name),
        data=public_name(manifest.data_name),
        architecture=manifest.model.architecture,
        weights=manifest.model.weights,
        revision=provenance.get("revision") or "not from the hub",
        positions=cache.positions,
        sequences=manifest.tokens.sequences,
        context=manifest.tokens.context,
        splits=", ".join(f"{name} {count:,}" for name, count in splits.items()),
        layers=format_ranges(cache.layers),
        depth=cache.n_blocks,
        d_model=cache.d_model,
        vocab=cache.vocab,
        dtypes=_format_dtypes(dtypes),
        codec=manifest.codec,
        logits=manifest.capture.logits,
        compute_dtype=manifest.capture.compute_dtype,
        nonfinite=sum(shard.nonfinite for shard in shards),
        gigabytes=cache.bytes / 1e9,
        head_error=_format_error(checks.get("head_error")),
        stored_kl=_format_error(checks.get("stored_kl")),
        size_category=size_category(cache.positions),
        bfloat16=BFLOAT16 if dtypes.get(cache.n_blocks) == "bfloat16" else "",
    )


def _format_dtypes(dtype_of_layer: dict[int, str]) -> str:
    """Such as `float16`, or `bfloat16 in layers 5-6, float16 in layers 0-4`."""
    layers_of_dtype: dict[str, list[int]] = {}
    for layer, dtype in dtype_of_layer.items():
        layers_of_dtype.setdefault(dtype, []).append(layer)
    if len(layers_of_dtype) == 1:
        return next(iter(layers_of_dtype))
    return ", ".join(
        f"{dtype} in layers {format_ranges(layers)}"
        for dtype, layers in sorted(layers_of_dtype.items())
    )


def _format_error(value: Any) -> str:
    return "not measured" if value is None else f"{float(value):.1e}"


def size_category(rows: int) -> str:
    """The hub's tag for a number of rows, such as `10K<n<100K`."""
    if rows < 1000:
        return "n<1K"
    lower = len(str(rows)) - 4  # SIZES has a bound per digit, from four digits on
    return f"{SIZES[lower]}<n<{SIZES[lower + 1]}" if lower + 1 < len(SIZES) else "n>1T"
