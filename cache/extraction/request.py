"""Options of an extraction: the keywords of `residua.extract` and the options of `residua extract`.

An `ExtractionRequest` is checked when it is made; `answer_request.py` answers it with a cache.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..documents.data_files import DATA_FORMATS
from ..errors import UsageError
from ..files.json_fields import MAX_INTEGER
from ..format.compression import check_codec
from ..format.dtypes import STORED_DTYPES
from ..format.logits_arrays import check_logits_mode
from ..format.manifest import FORMAT, FORMATS
from ..number_ranges import as_tuple, as_whole_number
from ..tokens.document_marks import BOS_POLICIES
from ..tokens.positions import check_positions
from .given_inputs import GivenInputs

WHOLE_NUMBERS = (
    "context",
    "max_tokens",
    "max_bytes",
    "seed",
    "batch_tokens",
    "part_positions",
    "format",
)
"""Fields of `ExtractionRequest` that are whole numbers, or None."""
DEVICE_MAPS = ("auto", "balanced", "sequential")
"""Names of device maps that accelerate makes."""


@dataclass(frozen=True)
class ExtractionRequest:
    """A model, texts and options of one extraction.

    Field names are the keywords of `residua.extract` and the options of `residua extract`. Raises
    `UsageError` for a value that is unknown or out of range, before any file is read.
    """

    model: str
    """Folder of a model saved by transformers, or a hub id."""
    data: str
    """.txt, .jsonl, .json, .csv, .tsv or .parquet file, a pattern or folder of such files, `-` for
    standard input, a saved `datasets` folder, or a hub id."""
    root: Path | None = None
    """Folder of caches; default $RESIDUA_ROOT, else the XDG cache folder."""
    context: int | None = None
    """Longest sequence in tokens; default the model's, at most 1024."""
    pack: bool = True
    """Pack documents to the context length; else one sequence per document."""
    text_column: str | None = None
    """Column that holds the text."""
    separator: str | None = None
    """Separator of columns in .csv and .tsv files, one character or `tab`; default , and tab."""
    split: str | None = None
    """Split of a data set that has several."""
    data_format: str | None = None
    """Format of standard input, and of files whose names do not tell it, of `DATA_FORMATS`."""
    bos: str = "auto"
    """Special tokens around documents and at the start of contexts, one of `BOS_POLICIES`."""
    generation_prompt: bool = False
    """End conversations with the beginning of a further turn of the assistant."""
    layers: tuple[int, ...] | None = None
    """Layers to keep, -1 the last; layer L, which the logits come from, is always kept. Default
    all."""
    positions: str = "all"
    """Positions to keep: all, last, sample:K, answer or explicit (columns of the data)."""
    logits: str = "recompute"
    """Logits to keep: recompute (none: layer L and the head give them), topk:K or full."""
    max_tokens: int | None = None
    """Stop the token stream after this many tokens, at the end of a sequence."""
    max_bytes: int | None = None
    """Stop the token stream, at the end of a sequence, before the cache exceeds this size."""
    codec: str = "raw"
    """Encoding of chunks: raw, which reads fastest, or compact, compressed for cold storage."""
    dtype: str = "auto"
    """Stored dtype: auto, float16, bfloat16 or float32."""
    seed: int = 0
    """Seed of the permutation of the documents."""
    device: str = "auto"
    """Device of the model: auto, cpu, cuda, cuda:1, mps."""
    device_map: str | dict[str, Any] | None = None
    """Devices of a model that is larger than one: auto, balanced, sequential, or by module."""
    batch_tokens: int | None = None
    """Tokens of one forward batch; default 4096 on CPU, on GPU as many as fit, to 32768."""
    part_positions: int | None = None
    """Positions of a part, the unit of commit and resume; default by size, 24-48 MiB per layer."""
    part: str | None = None
    """Write only share i of n of the parts, as `i/n`, for job arrays; no part is waited for."""
    on_error: str = "quarantine"
    """What to do with a sequence whose activations are not finite: quarantine or raise."""
    attention: str = "default"
    """Attention kernel: default, eager, sdpa, flash_attention_2."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    format: int = FORMAT
    """Format of the cache; 1 finds, finishes and extends caches of the first version."""
    given: GivenInputs = field(default_factory=GivenInputs, repr=False, compare=False)
    """Model and texts in memory; `model` and `data` are then their names."""

    def __post_init__(self) -> None:
        # Plain Python types: numpy's cannot be written as JSON.
        for name in WHOLE_NUMBERS:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_whole_number(value, name))
        for name in ("pack", "trust_remote_code", "generation_prompt"):
            object.__setattr__(self, name, bool(getattr(self, name)))
        if self.layers is not None:
            object.__setattr__(self, "layers", as_tuple(self.layers, "layers"))

        # Values of each option.
        if self.dtype not in ("auto", *STORED_DTYPES):
            choices = ", ".join(("auto", *STORED_DTYPES))
            raise UsageError(f"dtype {self.dtype!r} is unknown; choose one of {choices}")
        if self.on_error not in ("quarantine", "raise"):
            raise UsageError(f"on_error {self.on_error!r} is unknown; choose quarantine or raise")
        for name in ("context", "max_tokens", "max_bytes", "batch_tokens", "part_positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
            if value is not None and value > MAX_INTEGER:
                raise UsageError(f"{name} must be at most {MAX_INTEGER}, got {value}")
        if isinstance(self.device_map, str) and self.device_map not in DEVICE_MAPS:
            raise UsageError(
                f"device_map {self.device_map!r} is unknown; choose one of "
                f"{', '.join(DEVICE_MAPS)}, or give a dict of module name and device"
            )
        if self.given.model is not None and (self.device != "auto" or self.device_map is not None):
            raise UsageError(
                "a loaded model stays on the device where it is; leave device and device_map out, "
                "or give the model's folder"
            )
        if self.device_map is not None and self.device != "auto":
            raise UsageError(
                f"a device map and device {self.device!r} both say where the model goes; give one"
            )
        if self.format not in FORMATS:
            formats = ", ".join(map(str, FORMATS))
            raise UsageError(f"format {self.format!r} is unknown; formats are {formats}")
        if self.data_format is not None and self.data_format not in DATA_FORMATS:
            formats = ", ".join(DATA_FORMATS)
            raise UsageError(
                f"data_format {self.data_format!r} is unknown; choose one of {formats}"
            )
        if self.bos not in BOS_POLICIES:
            policies = ", ".join(BOS_POLICIES)
            raise UsageError(f"bos {self.bos!r} is unknown; choose one of {policies}")
        if self.format == 1 and self.bos != "auto":
            raise UsageError(f"caches of format 1 have no bos {self.bos!r}; choose auto")
        if self.separator is not None:
            object.__setattr__(self, "separator", _separator_character(self.separator))
        check_positions(self.positions, self.pack)
        check_logits_mode(self.logits)
        check_codec(self.codec)
        if self.layers is not None and not self.layers:
            raise UsageError("layers names no layer; give numbers from 0 on, or None for all")
        _ = self.share  # raises `UsageError` if `part` is not of the form i/n

    @property
    def share(self) -> tuple[int, int]:
        """`part` as numbers (i, n); (1, 1), all parts, if `part` is None."""
        if self.part is None:
            return 1, 1
        try:
            number, shares = (int(piece) for piece in self.part.split("/"))
        except ValueError:
            number, shares = 0, 0
        if not 1 <= number <= shares:
            raise UsageError(f"part {self.part!r} is not a share; write it like 2/8")
        return number, shares


def _separator_character(name: str) -> str:
    """The separator's one character; `tab` and `\\t` name a tab."""
    separator = {"tab": "\t", "\\t": "\t"}.get(name, name)
    if len(separator) != 1 or separator in '"\r\n':
        raise UsageError(f"separator {name!r} must be one character, or tab")
    return separator
