"""Identity of a cache: what was run, on what, and how; its hash is the cache's id."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CorruptError
from ..files.json_files import json_digest, read_json, write_json
from .layout import Layout

FORMAT = 2
"""Version of the format that new caches have (cache/README.md)."""
FORMATS = (1, 2)
"""Versions that are read, verified, repaired and extended."""
CODEC = "codec"
"""Key of `extra`; absent where nothing is compressed."""
DOCUMENT, SEQUENCE = "document", "sequence"
"""What a split holds as a whole."""
BATCH = "batch"
"""Key of `extra`; absent where sequences share a batch, `ALONE` where each runs by itself."""
ALONE = "alone"
SHORT_ID = 12
"""Characters of an id that are shown to people."""


@dataclass(frozen=True)
class ModelIdentity:
    """The frozen model: its weights decide, not the path they were read from."""

    weights: str
    """sha256 over the names and digests of the tensors; in format 1 of the weight files."""
    config: str
    """sha256 of the configuration, without the paths and versions it may carry."""
    architecture: str
    """Class name of the model."""
    code: str | None = None
    """sha256 over the code that comes with the model, where it runs; absent in format 1."""


@dataclass(frozen=True)
class TokenIdentity:
    """The token stream: what the model read, in the order of the cache."""

    digest: str
    """sha256 over every sequence: token ids, borders of documents, split, kept positions."""
    positions: int
    sequences: int
    tokenizer: str
    """sha256 of the tokenizer that made them, with its settings."""
    context: int
    """Longest sequence allowed, in tokens."""
    packed: bool
    """True if documents were packed to the context length, False for one row per sequence."""
    seed: int
    """Seed of the permutation of the documents."""
    split_by: str = DOCUMENT
    """What lies in one split as a whole: each `document`, or each `sequence` of fewer than three
    documents that were packed. Absent in format 1, where it is the sequence."""
    bos: str = "auto"
    """Mark before each document: `auto` is the tokenizer's own, else, where documents are packed,
    its BOS or EOS token. Absent in format 1."""
    chat_template: str | None = None
    """sha256 of the template that made texts of conversations; None without. Absent in format 1."""


@dataclass(frozen=True)
class CaptureIdentity:
    """How the residual streams were taken."""

    compute_dtype: str
    """dtype the model ran in."""
    dtype: str
    """Policy for the stored dtype: `auto`, or one dtype for all layers."""
    attention: str
    """Attention kernel of the model's configuration."""
    positions: str = "all"
    """Which positions of a sequence are kept."""
    site: str = "residual"
    norm: str = "pre"
    """Layer L is the last block's output before the final norm."""
    logits: str = "recompute"
    """Logits that are kept, one of `logits.MODES`; `recompute` keeps none."""


LATER_FIELDS = {"model": ("code",), "tokens": ("split_by", "bos", "chat_template")}
"""Fields that an identity of format 1 lacks."""


def identity_of(
    version: int, model: ModelIdentity, tokens: TokenIdentity, capture: CaptureIdentity
) -> dict[str, Any]:
    """The JSON object that an id is the hash of, in the format `version`."""
    parts = {"model": asdict(model), "tokens": asdict(tokens), "capture": asdict(capture)}
    if version == 1:
        for part, names in LATER_FIELDS.items():
            for name in names:
                del parts[part][name]
    return {"format": version, **parts}


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: written first, never rewritten. Only identity goes into the id."""

    model: ModelIdentity
    tokens: TokenIdentity
    capture: CaptureIdentity
    layout: Layout
    d_model: int
    vocab: int
    depth: int
    """Number L of blocks; layers run from 0 (embedding output) to L."""
    batch_tokens: int
    """Tokens of a forward batch: a resumed run forms the same batches, hence the same bytes."""
    model_name: str
    """Hub id of the model, or the name of its folder; for people only."""
    data_name: str
    """Hub id of the data, or the name of their file or folder; for people only."""
    extra: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    """Version of the format, one of `FORMATS`."""

    @property
    def codec(self) -> str:
        """How the shards of the parts are kept, one of `codec.CODECS`; no part of the identity."""
        return self.extra.get(CODEC, "raw")

    @property
    def pad(self) -> bool:
        """Whether sequences of different lengths share a batch; no part of the identity."""
        return bool(self.extra.get("pad", True))

    @property
    def alone(self) -> bool:
        """Whether each sequence runs through the model alone; no part of the identity."""
        return self.extra.get(BATCH) == ALONE

    @property
    def identity(self) -> dict[str, Any]:
        return identity_of(self.format, self.model, self.tokens, self.capture)

    @property
    def id(self) -> str:
        """Hex sha256 of the identity."""
        return json_digest(self.identity)

    def write(self, path: Path) -> None:
        value = asdict(self)
        for name in ("format", "model", "tokens", "capture"):
            del value[name]
        write_json(path, {"id": self.id, "identity": self.identity, **value})

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Raises `CorruptError` if the file was changed or is of an unknown format."""
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
