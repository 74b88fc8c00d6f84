"""Fitted probes in model repositories of the Hugging Face hub: push, pull, and the model card.

A repository holds the files of `save_probe` and a README.md with the metrics of the fit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache.errors import MismatchError, NotFoundError
from ...cache.files.json_files import read_json
from ...cache.files.staging import temporary_folder
from ...cache.sharing.hub_errors import translate_hub_errors
from ...cache.store.local_origin import public_name
from .library import probe_path
from .probe_files import copy_probe
from .save import FILES, load_probe, save_probe

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

CARD_FILE = "README.md"
CARD = """---
library_name: residua
tags:
- residua
- interpretability
- residual-stream
- {kind}
{base_model}# license: <- choose one; those of the model and of the texts bind this probe too
---

# {kind} probe{of}

Fitted from cached residual streams, without the model, by residua {residua}.

| | |
|---|---|
| kind | `{kind}` |
| cache | `{cache}` |
| split it was fitted on | {split} |
| reads | residual streams of width {d_model} |
| head (digest) | `{geometry}` |
| parameters | {params} |

```python
import residua

probe = residua.pull_probe("{repo_id}")
{usage}
```

## Measured when it was fitted

{table}

## Citation

Cite the model, the texts, residua {residua}{paper}.
"""
PAPER_OF = {
    "jacobian": "Gurnee et al., Verbalizable Representations Form a Global Workspace (2026)",
    "ridge": "Din et al., Jump to Conclusions (arXiv 2303.09435)",
    "lens": "Belrose et al., Tuned Lens (arXiv 2303.08112)",
    "future": "Pal et al., Future Lens (arXiv 2311.04897)",
    "vocab": "Pal et al., Future Lens (arXiv 2311.04897)",
    "mlp": "Pal et al., Future Lens (arXiv 2311.04897), with a hidden layer",
    "basis": "Belrose et al., Tuned Lens (arXiv 2303.08112), section 4",
}
"""Kind of a probe -> the paper of its method."""
USAGE = (
    "residua.evaluate(cache, [probe]).to_dicts()  # a cache of the same model: others are refused"
)
"""Line of the card that says what a probe is for."""
USAGE_OF_BASIS = "probe.ablate(rows, k, layer=layer)  # rows (n, d_model) of numpy, dask or torch"
"""The same for a causal basis."""


def push_probe(
    probe: Any,
    repo_id: str,
    *,
    cache: "ActivationCache | None" = None,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a fitted `probe`, or a folder of `save_probe`, and return the repository's address.

    The repository is created if needed. With the `cache` of the fit, the card names the model and
    the texts; an existing card is not replaced. Raises `MismatchError` if the repository holds a
    probe of another kind or model.
    """
    with temporary_folder() as temporary:
        is_saved = isinstance(probe, str | Path)
        folder = Path(probe) if is_saved else save_probe(probe, temporary / "probe")
        load_probe(folder)
        config = read_json(folder / "config.json")
        repository = {
            "repo_id": repo_id,
            "repo_type": "model",
            "revision": revision,
            "token": token,
        }
        with translate_hub_errors(repo_id, "model"):
            import huggingface_hub as hub

            # None, not False: an organisation may have private repositories by default.
            url = hub.create_repo(
                repo_id, repo_type="model", private=private or None, exist_ok=True, token=token
            )
            if revision is not None:
                hub.create_branch(
                    repo_id, repo_type="model", branch=revision, exist_ok=True, token=token
                )
            _check_replaces(config, repository)
            hub.upload_folder(
                folder_path=folder,
                commit_message=f"{config['kind']} of cache {str(config['cache'])[:12]}",
                allow_patterns=list(FILES),
                **repository,
            )
            if not hub.file_exists(filename=CARD_FILE, **repository):
                text = probe_card(config, repo_id, cache).encode()
                hub.upload_file(path_or_fileobj=text, path_in_repo=CARD_FILE, **repository)
    return str(url)


def pull_probe(repo_id: str, *, revision: str | None = None, token: str | None = None) -> Any:
    """Download and load a probe that `push_probe` uploaded; bytes are checked, nothing is run."""
    probe = load_probe(_download_probe(repo_id, revision, token))
    probe.folder_ = repo_id  # where a person finds it, in notes of evaluations
    return probe


def pull_probe_into(
    repo_id: str,
    root: Path,
    *,
    expect: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[Path, str]:
    """Download a probe that `push_probe` uploaded to the folder that its fit has under `root`.

    Returns that folder and the status: `pulled`, or `hit` if the probe was there. `expect` is the
    beginning of the id of the cache of the fit: a probe of another cache raises `MismatchError`, as
    does another probe in the folder. The bytes are checked, nothing is run.
    """
    folder = _download_probe(repo_id, revision, token)
    name = probe_path(root, load_probe(folder)).name
    path, status = copy_probe(folder, root, name=name, expect=expect)
    return path, "pulled" if status == "copied" else status


def _download_probe(repo_id: str, revision: str | None, token: str | None) -> Path:
    """The folder in the hub's own cache with the files of a probe; nothing is checked."""
    with translate_hub_errors(repo_id, "model"):
        import huggingface_hub as hub

        folder = hub.snapshot_download(
            repo_id, repo_type="model", revision=revision, allow_patterns=list(FILES), token=token
        )
    if not (Path(folder) / "config.json").is_file():
        raise NotFoundError(f"{repo_id} is not a probe: it has no config.json of residua")
    return Path(folder)


def _check_replaces(config: dict[str, Any], repository: dict[str, Any]) -> None:
    """Raise `MismatchError` if `repository` holds a probe of another kind or head than `config`."""
    import huggingface_hub as hub

    if not hub.file_exists(filename="config.json", **repository):
        return
    existing = read_json(Path(hub.hf_hub_download(filename="config.json", **repository)))
    for name, word in {"kind": "kind", "geometry": "head"}.items():
        if existing.get(name) != config[name]:
            raise MismatchError(
                f"{repository['repo_id']} holds a probe of {word} {existing.get(name)!r}, "
                f"this one has {config[name]!r}; push it to a repository or a revision of its own"
            )


def probe_card(config: dict[str, Any], repo_id: str, cache: "ActivationCache | None" = None) -> str:
    """README.md for `repo_id`, with YAML front matter; the licence is left to the user."""
    base_model = model_and_data = ""
    if cache is not None:
        model, data = cache.manifest.model_name, cache.manifest.data_name
        model_and_data = f" of {public_name(model)} on {public_name(data)}"
        if public_name(model) == model and "/" in model:
            base_model = f"base_model: {model}\n"
    fields = {key: config[key] for key in ("kind", "cache", "split", "d_model", "residua")}
    params = ", ".join(f"{k} {v}" for k, v in config["params"].items() if v is not None)
    method = PAPER_OF.get(config["kind"])
    paper = f", and for the method {method}" if method else ""
    return CARD.format(
        **fields,
        of=model_and_data,
        base_model=base_model,
        repo_id=repo_id,
        params=params,
        geometry=config["geometry"],
        paper=paper,
        usage=USAGE_OF_BASIS if config["kind"] == "basis" else USAGE,
        table=metrics_table(config["pairs"]),
    )


def metrics_table(rows: Sequence[dict[str, Any]]) -> str:
    """`rows` of `metrics()` as a Markdown table, layer and offset first; no lists, no objects."""
    names = dict.fromkeys(k for row in rows for k in row if not isinstance(row[k], list | dict))
    columns = sorted(names, key=lambda name: (name != "layer", name != "offset"))
    lines = [columns, ["---:"] * len(columns)]
    lines += [[_cell(row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
