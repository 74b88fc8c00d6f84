"""`Manifest` of a cache: model, tokens and capture settings, whose hash is the cache's id.

`manifest.json` is written first and never rewritten. Extraction looks for an existing cache by the
identity that a request would have (`cache/extraction/resolve.py`); `ActivationCache` reads layout
and sizes from the manifest. cache/README.md says how every hash is computed.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CorruptError
from ..files.json_files import json_digest, read_json, write_json
from .layout import Layout

FORMAT = 2
"""Version of the format of new caches (cache/README.md)."""
FORMATS = (1, 2)
"""Versions that residua reads, verifies, repairs and extends."""
CODEC = "codec"
"""Key of `Manifest.extra`: codec of the chunks; absent for raw chunks."""
BATCH, ALONE = "batch", "alone"
"""Key of `Manifest.extra`, and the value for models that run every sequence alone; else absent."""
DOCUMENT, SEQUENCE = "document", "sequence"
"""Values of `TokenIdentity.split_by`."""
SHORT_ID = 12
"""Characters of an id that messages show."""


@dataclass(frozen=True)
class ModelIdentity:
    """The frozen model, identified by weights and configuration, not by a path."""

    weights: str
    """sha256 over the names and digests of the tensors (in format 1: of the weight files)."""
    config: str
    """sha256 of the configuration without paths and versions."""
    architecture: str
    """Class name of the model."""
    code: str | None = None
    """sha256 over the model's own code, if such code runs; absent in format 1."""


@dataclass(frozen=True)
class TokenIdentity:
    """The token stream that the model read, in the order of the cache."""

    digest: str
    """sha256 over every sequence: token ids, borders of documents, split, kept positions."""
    positions: int
    """Number of positions, the rows of every residual array."""
    sequences: int
    """Number of sequences."""
    tokenizer: str
    """sha256 of the tokenizer with its settings."""
    context: int
    """Largest allowed length of a sequence, in tokens."""
    packed: bool
    """True if documents were packed to the context length, False for one sequence per document."""
    seed: int
    """Seed of the permutation of the documents."""
    split_by: str = DOCUMENT
    """Unit of the splits: each `document`, or each `sequence` if fewer than three documents were
    packed, lies whole in one split. Absent in format 1, in which the unit is the sequence."""
    bos: str = "auto"
    """Token before each document. `auto`: the one that the tokenizer adds, else, for packed
    documents, its BOS or EOS token. Absent in format 1."""
    chat_template: str | None = None
    """sha256 of the template that renders conversations as text, or None. Absent in format 1."""


@dataclass(frozen=True)
class CaptureIdentity:
    """Settings of the extraction that determine the stored values."""

    compute_dtype: str
    """dtype of the forward pass."""
    dtype: str
    """Policy for the stored dtype: `auto`, or one dtype for all layers."""
    attention: str
    """Attention kernel of the model's configuration."""
    positions: str = "all"
    """Stored positions of a sequence."""
    site: str = "residual"
    """Point of the model; fixed."""
    norm: str = "pre"
    """Fixed: layer L is the last block's output before the final norm."""
    logits: str = "recompute"
    """Stored logits, one of `logits_arrays.MODES`."""


LATER_FIELDS = {"model": ("code",), "tokens": ("split_by", "bos", "chat_template")}
"""Fields that an identity of format 1 lacks."""


def identity_of(
    version: int, model: ModelIdentity, tokens: TokenIdentity, capture: CaptureIdentity
) -> dict[str, Any]:
    """The JSON object whose hash is the id, in the format `version`."""
    parts = {"model": asdict(model), "tokens": asdict(tokens), "capture": asdict(capture)}
    if version == 1:
        for part, names in LATER_FIELDS.items():
            for name in names:
                del parts[part][name]
    return {"format": version, **parts}


@dataclass(frozen=True)
class Manifest:
    """Content of `manifest.json`; `model`, `tokens` and `capture` alone determine the id."""

    model: ModelIdentity
    tokens: TokenIdentity
    capture: CaptureIdentity
    layout: Layout
    d_model: int
    vocab: int
    depth: int
    """Number L of blocks; layers run from 0 (embedding output) to L."""
    batch_tokens: int
    """Most tokens of a forward batch; a resumed run forms the same batches, hence equal bytes."""
    model_name: str
    """Hub id of the model, or the name of its folder; for display only."""
    data_name: str
    """Hub id of the data, or the name of their file or folder; for display only."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further facts outside the identity, such as `CODEC`, `BATCH`, `pad` and `extends`."""
    format: int = FORMAT
    """Version of the format, one of `FORMATS`."""

    @property
    def codec(self) -> str:
        """Codec of residual and logits chunks, one of `compression.CODECS`."""
        return self.extra.get(CODEC, "raw")

    @property
    def pad(self) -> bool:
        """Whether sequences of different lengths share a batch."""
        return bool(self.extra.get("pad", True))

    @property
    def alone(self) -> bool:
        """Whether each sequence runs through the model alone."""
        return self.extra.get(BATCH) == ALONE

    @property
    def identity(self) -> dict[str, Any]:
        """The JSON object whose hash is the id."""
        return identity_of(self.format, self.model, self.tokens, self.capture)

    @property
    def id(self) -> str:
        """Hex sha256 of the identity."""
        return json_digest(self.identity)

    def write(self, path: Path) -> None:
        """Write `manifest.json` at `path`."""
        value = asdict(self)
        for name in ("format", "model", "tokens", "capture"):
            del value[name]
        write_json(path, {"id": self.id, "identity": self.identity, **value})

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read `manifest.json`; raises `CorruptError` if changed or of an unknown format."""
        value = read_json(path)
        try:
            identity = value.pop("identity")
            recorded = value.pop("id")
            if type(version := identity["format"]) is not int or version not in FORMATS:
                raise CorruptError(
                    f"{path} has format {version}, this version reads "
                    f"{', '.join(map(str, FORMATS))}; install the version of residua that wrote it"
                )
            value["layout"] = Layout(**value["layout"])
            tokens = dict(identity["tokens"])
            if version == 1:
                tokens["split_by"] = SEQUENCE
            manifest = cls(
                ModelIdentity(**identity["model"]),
                TokenIdentity(**tokens),
                CaptureIdentity(**identity["capture"]),
                **value,
                format=version,
            )
        except (KeyError, TypeError) as error:
            raise CorruptError(f"{path} is not a manifest of this format: {error}") from None
        if manifest.id != recorded:
            raise CorruptError(f"{path}: the id does not match the identity")
        return manifest
