"""`Manifest` of a cache: model, tokens and capture settings, whose hash is the cache's id.

`manifest.json` is written first and never rewritten. Extraction looks for an existing cache by the
identity that a request would have (`cache/extraction/resolve.py`); `ActivationCache` reads layout
and sizes from the manifest. cache/README.md says how every hash is computed.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import CorruptError
from ..files.json_fields import (
    FieldError,
    boolean_field,
    check_known_fields,
    checking_fields,
    choice_field,
    digest_field,
    integer_field,
    object_field,
    optional_field,
    required_field,
    shown,
    text_field,
)
from ..files.json_files import json_digest, read_json, write_json
from .compression import CODECS
from .layout import MAX_CHUNK_ROWS, MAX_PARTS, Layout

FORMAT = 2
"""Version of the format of new caches (cache/README.md)."""
FORMATS = (1, 2)
"""Versions that residua reads, verifies, repairs and extends."""
CODEC = "codec"
"""Key of `Manifest.extra`: codec of the chunks; absent for raw chunks."""
BATCH, ALONE = "batch", "alone"
"""Key of `Manifest.extra`, and the value for models that run every sequence alone; else absent."""
EXTENDS = "extends"
"""Key of `Manifest.extra`: id of the extended cache, whose rows come first; else absent."""
DOCUMENT, SEQUENCE, IMAGE = "document", "sequence", "image"
"""Values of `TokenIdentity.split_by`; `IMAGE` in caches of images, whose positions are patches."""
GRID = "image"
"""Key of `Manifest.extra`: positions of an image; absent in caches of texts."""
MAX_POSITIONS = 1 << 48
"""Most positions of a cache."""
MAX_WIDTH = 1 << 20
"""Largest width of a residual stream."""
MAX_VOCAB = 1 << 26
"""Most logits of a head."""
MAX_DEPTH = 1 << 16
"""Most blocks of a model."""
MAX_IMAGE_TOKENS = 1 << 20
"""Most positions of an image."""
MAX_SEED = 1 << 512
"""Bound of the seed's absolute value."""
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
    packed, or each `image`, lies whole in one split. Absent in format 1, in which the unit is the
    sequence."""
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


LATER_FIELDS: dict[str, tuple[str, ...]] = {
    "model": ("code",),
    "tokens": ("split_by", "bos", "chat_template"),
}
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
class ImageGrid:
    """Positions of an image: a class token, perhaps further tokens, and patches row by row."""

    tokens: int
    """Positions of an image; the patches are the last ones, position 0 is the class token."""
    rows: int
    """Rows of patches, from the top."""
    columns: int
    """Patches of a row, from the left."""

    @property
    def patches(self) -> int:
        """Number of patches."""
        return self.rows * self.columns

    @property
    def first_patch(self) -> int:
        """Position of the first patch."""
        return self.tokens - self.patches


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
    def image_grid(self) -> ImageGrid | None:
        """Positions of an image; None for a cache of texts."""
        value = self.extra.get(GRID)
        return None if value is None else ImageGrid(**value)

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
        """Read `manifest.json`, with every field checked for type and range.

        Raises `CorruptError` if the file was changed, is of an unknown format, or holds a value
        that no cache has.
        """
        value = read_json(path)
        with checking_fields(path, "a manifest of this format"):
            identity, recorded = object_field(value, "identity"), digest_field(value, "id")
            if type(version := required_field(identity, "format")) is not int or (
                version not in FORMATS
            ):
                raise CorruptError(
                    f"{path} has format {shown(version)}, this version reads "
                    f"{', '.join(map(str, FORMATS))}; install the version of residua that wrote it"
                )
            check_known_fields(value, {"id", "identity", *_OWN_FIELDS}, "the manifest")
            check_known_fields(identity, ("format", "model", "tokens", "capture"), "identity")
            manifest = cls(
                _parse_model(_identity_part(identity, "model", ModelIdentity)),
                _parse_tokens(_identity_part(identity, "tokens", TokenIdentity), version),
                _parse_capture(_identity_part(identity, "capture", CaptureIdentity)),
                _parse_layout(object_field(value, "layout")),
                d_model=integer_field(value, "d_model", 1, MAX_WIDTH),
                vocab=integer_field(value, "vocab", 1, MAX_VOCAB),
                depth=integer_field(value, "depth", 0, MAX_DEPTH),
                batch_tokens=integer_field(value, "batch_tokens", 1),
                model_name=text_field(value, "model_name"),
                data_name=text_field(value, "data_name"),
                extra=_check_extra(object_field(value, "extra"), recorded),
                format=version,
            )
            _check_parts(manifest)
        if manifest.id != recorded:
            raise CorruptError(f"{path}: the id does not match the identity")
        return manifest


_OWN_FIELDS = ("layout", "d_model", "vocab", "depth", "batch_tokens", "model_name", "data_name")
_OWN_FIELDS = (*_OWN_FIELDS, "extra")
"""Fields of `manifest.json` beside `id` and `identity`."""


def _identity_part(identity: dict[str, Any], name: str, part: type) -> dict[str, Any]:
    """The object `name` of an identity, with exactly the fields of the dataclass `part`."""
    value = object_field(identity, name)
    absent = LATER_FIELDS.get(name, ()) if identity["format"] == 1 else ()
    check_known_fields(value, {f.name for f in fields(part)} - set(absent), f"identity.{name}")
    return value


def _parse_model(value: dict[str, Any]) -> ModelIdentity:
    names = ("weights", "config", "architecture")
    code = optional_field(text_field, value, "code")
    return ModelIdentity(*(text_field(value, name) for name in names), code=code)


def _parse_tokens(value: dict[str, Any], version: int) -> TokenIdentity:
    positions = integer_field(value, "positions", 1, MAX_POSITIONS)
    tokens = TokenIdentity(
        digest=text_field(value, "digest"),
        positions=positions,
        sequences=integer_field(value, "sequences", 1, positions),
        tokenizer=text_field(value, "tokenizer"),
        context=integer_field(value, "context", 1),
        packed=boolean_field(value, "packed"),
        seed=integer_field(value, "seed", -MAX_SEED, MAX_SEED),
    )
    if version == 1:
        return replace(tokens, split_by=SEQUENCE)
    return replace(
        tokens,
        split_by=choice_field(value, "split_by", (DOCUMENT, SEQUENCE, IMAGE)),
        bos=text_field(value, "bos"),
        chat_template=optional_field(text_field, value, "chat_template"),
    )


def _parse_capture(value: dict[str, Any]) -> CaptureIdentity:
    names = [field.name for field in fields(CaptureIdentity)]
    return CaptureIdentity(*(text_field(value, name) for name in names))


def _parse_layout(value: dict[str, Any]) -> Layout:
    check_known_fields(value, ("chunk_rows", "part_rows"), "layout")
    chunk_rows = integer_field(value, "chunk_rows", 1, MAX_CHUNK_ROWS)
    part_rows = integer_field(value, "part_rows", 1, MAX_POSITIONS)
    if part_rows % chunk_rows or chunk_rows & (chunk_rows - 1):
        raise FieldError(
            f"layout has chunks of {chunk_rows} rows and parts of {part_rows}; expected a power "
            "of two, and a multiple of it"
        )
    return Layout(chunk_rows, part_rows)


def _check_extra(extra: dict[str, Any], cache_id: str) -> dict[str, Any]:
    """`extra`, if the keys that residua reads have their type; later versions may add others."""
    for name in ("pad", "causal", "embedding"):
        if name in extra:
            boolean_field(extra, name)
    for name, choices in ((BATCH, (ALONE,)), (CODEC, CODECS)):
        if name in extra:
            choice_field(extra, name, choices)
    if GRID in extra:
        _check_grid(object_field(extra, GRID))
    if EXTENDS in extra and digest_field(extra, EXTENDS) == cache_id:
        raise FieldError("extends names the cache itself; expected the id of an earlier cache")
    return extra


def _check_grid(value: dict[str, Any]) -> None:
    """Raise `FieldError` unless `value` is the object of an `ImageGrid` with a class token."""
    names = [field.name for field in fields(ImageGrid)]
    check_known_fields(value, names, "extra.image")
    grid = ImageGrid(*(integer_field(value, name, 1, MAX_IMAGE_TOKENS) for name in names))
    if not grid.patches < grid.tokens:
        raise FieldError(
            f"extra.image has {grid.rows} x {grid.columns} patches in {grid.tokens} positions; "
            "expected a class token beside them"
        )


def _check_parts(manifest: Manifest) -> None:
    """Raise `FieldError` unless the number of parts is one that a journal can hold.

    Positions of images are known where, and only where, images are the unit of the splits.
    """
    if (manifest.tokens.split_by == IMAGE) != (GRID in manifest.extra):
        raise FieldError(
            f"split_by is {manifest.tokens.split_by!r}, extra has "
            f"{'positions' if GRID in manifest.extra else 'no positions'} of images"
        )
    parts = manifest.layout.parts(manifest.tokens.positions)
    if parts > MAX_PARTS:
        raise FieldError(
            f"{manifest.tokens.positions} positions in parts of {manifest.layout.part_rows} are "
            f"{parts} parts; a cache has at most {MAX_PARTS}"
        )
