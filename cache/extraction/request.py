"""What to extract: the options of `residua extract` and of `residua.extract`."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..format.compression import check_codec as check_codec
from ..format.dtypes import STORED_DTYPES
from ..format.logits_arrays import check_logits_mode as check_logits
from ..format.manifest import FORMAT, FORMATS
from ..number_ranges import as_tuple, as_whole_number
from ..tokens.positions import check_positions as check_policy

WHOLE_NUMBERS = (
    "context",
    "max_tokens",
    "max_bytes",
    "seed",
    "batch_tokens",
    "part_positions",
    "format",
)
"""Fields of `Request` that are whole numbers, or None."""


@dataclass(frozen=True)
class ExtractionRequest:
    """What to extract; field names are the options of `residua extract`."""

    model: str
    """Folder of a model saved by transformers, or a hub id."""
    data: str
    """.txt, .jsonl, .json, .csv, .tsv or .parquet file, a saved `datasets` folder, or a hub id."""
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
    layers: tuple[int, ...] | None = None
    """Layers to keep; layer L, which the logits come from, is always kept. Default all."""
    positions: str = "all"
    """Positions to keep: all, last, sample:K, answer or explicit (columns of the data)."""
    logits: str = "recompute"
    """Logits to keep: recompute (none: layer L and the head give them), topk:K or full."""
    max_tokens: int | None = None
    """Stop the token stream after this many tokens, at the end of a sequence."""
    max_bytes: int | None = None
    """Stop the token stream where the cache would have more bytes."""
    codec: str = "raw"
    """How chunks are kept: raw, which reads fastest, or compact, for cold storage and objects."""
    dtype: str = "auto"
    """Stored dtype: auto, float16, bfloat16 or float32."""
    seed: int = 0
    """Seed of the permutation of the documents."""
    device: str = "auto"
    """Where the model runs: auto, cpu, cuda, cuda:1, mps."""
    batch_tokens: int | None = None
    """Tokens of one forward batch; default 4096 on CPU, on GPU what fits, at most 32768."""
    part_positions: int | None = None
    """Positions of a part, the unit of commit and resume; default by size, 24-48 MiB per layer."""
    part: str | None = None
    """Write only share i of n of the parts, as `i/n`, for job arrays; waits for nobody."""
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

    def __post_init__(self) -> None:
        # Numbers of numpy as Python's: they are written as JSON.
        for name in WHOLE_NUMBERS:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_whole_number(value, name))
        for name in ("pack", "trust_remote_code"):
            object.__setattr__(self, name, bool(getattr(self, name)))
        if self.layers is not None:
            object.__setattr__(self, "layers", as_tuple(self.layers, "layers"))
        if self.dtype not in ("auto", *STORED_DTYPES):
            known = ", ".join(("auto", *STORED_DTYPES))
            raise UsageError(f"dtype {self.dtype!r} is unknown; choose one of {known}")
        if self.on_error not in ("quarantine", "raise"):
            raise UsageError(f"on_error {self.on_error!r} is unknown; choose quarantine or raise")
        for name in ("context", "max_tokens", "max_bytes", "batch_tokens", "part_positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if self.format not in FORMATS:
            known = ", ".join(map(str, FORMATS))
            raise UsageError(f"format {self.format!r} is unknown; formats are {known}")
        if self.separator is not None:
            object.__setattr__(self, "separator", _separator(self.separator))
        check_policy(self.positions, self.pack)
        check_logits(self.logits)
        check_codec(self.codec)
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise UsageError(f"layers must be numbers from 0 on, got {self.layers}")
        self.share  # noqa: B018 (raises if it cannot be read)

    @property
    def share(self) -> tuple[int, int]:
        """`part` as numbers (i, n); (1, 1) without."""
        if self.part is None:
            return 1, 1
        try:
            number, shares = (int(piece) for piece in self.part.split("/"))
        except ValueError:
            number, shares = 0, 0
        if not 1 <= number <= shares:
            raise UsageError(f"part {self.part!r} is not a share; write it like 2/8")
        return number, shares


def _separator(name: str) -> str:
    """The separator that is meant: `tab` and `\\t` are a tab."""
    separator = {"tab": "\t", "\\t": "\t"}.get(name, name)
    if len(separator) != 1 or separator in '"\r\n':
        raise UsageError(f"separator {name!r} must be one character, or tab")
    return separator
