"""Identity of a cache: what was run, on what, and how; its hash is the cache's id."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import CorruptError
from .jsonfile import digest, read_json, write_json
from .layout import Layout

FORMAT = 1
"""Version of the format on disk (cache/README.md)."""
CODEC = "codec"
"""Key of `extra`; absent where nothing is compressed."""
BATCH = "batch"
"""Key of `extra`; absent where sequences share a batch, `ALONE` where each runs by itself."""
ALONE = "alone"
SHORT_ID = 12
"""Characters of an id that are shown to people."""


@dataclass(frozen=True)
class ModelIdentity:
    """The frozen model: its weights decide, not the path they were read from."""

    weights: str
    """sha256 over the names and digests of the weight files."""
    config: str
    """sha256 of the configuration, without the paths and versions it may carry."""
    architecture: str
    """Class name of the model."""


@dataclass(frozen=True)
class TokenIdentity:
    """The token stream: what the model read, in the order of the cache."""

    digest: str
    """sha256 over every sequence's length and token ids, in order."""
    positions: int
    sequences: int
    tokenizer: str
    """sha256 of the tokenizer's files."""
    context: int
    """Longest sequence allowed, in tokens."""
    packed: bool
    """True if documents were packed to the context length, False for one row per sequence."""
    seed: int
    """Seed of the permutation of the documents."""


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
        return {
            "format": FORMAT,
            "model": asdict(self.model),
            "tokens": asdict(self.tokens),
            "capture": asdict(self.capture),
        }

    @property
    def id(self) -> str:
        """Hex sha256 of the identity."""
        return digest(self.identity)

    def write(self, path: Path) -> None:
        value = asdict(self)
        for name in ("model", "tokens", "capture"):
            del value[name]
        write_json(path, {"id": self.id, "identity": self.identity, **value})

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Raises `CorruptError` if the file was changed or is of an unknown format."""
        value = read_json(path)
        try:
            identity = value.pop("identity")
            recorded = value.pop("id")
            if identity["format"] != FORMAT:
                raise CorruptError(
                    f"{path} has format {identity['format']}, this version reads {FORMAT}; "
                    "install the version of residua that wrote it"
                )
            value["layout"] = Layout(**value["layout"])
            manifest = cls(
                ModelIdentity(**identity["model"]),
                TokenIdentity(**identity["tokens"]),
                CaptureIdentity(**identity["capture"]),
                **value,
            )
        except (KeyError, TypeError) as error:
            raise CorruptError(f"{path} is not a manifest of this format: {error}") from None
        if manifest.id != recorded:
            raise CorruptError(f"{path}: the id does not match the identity")
        return manifest
