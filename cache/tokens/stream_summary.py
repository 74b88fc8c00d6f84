"""`StreamSummary`: the identity of a token stream, enough to look a cache up without the tokens.

`extraction/resolve.py` makes it of a `TokenStream`, `extraction/stream_memo.py` keeps it between
runs.
"""

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..documents.documents import Dropped, Reading
from ..documents.labels import LABEL_PREFIX
from ..errors import CorruptError
from .token_stream import TokenStream


@dataclass(frozen=True)
class StreamSummary:
    """Digest, hashes and counts of a token stream, and the report on reading its texts."""

    digest: str
    """Hex sha256 of the stream (`TokenStream.digests`)."""
    hashes: np.ndarray
    """64 bits of the sha256 of each sequence of the cache, `(sequences,)` uint64."""
    positions: int
    """Rows of the cache."""
    split_by: str
    """Unit that is never divided between splits: `document` or `sequence`."""
    tokenizer: str
    """Digest of the tokenizer."""
    cut: dict[str, int] = field(default_factory=dict)
    """How many `sequences` lost how many `tokens` to the context."""
    reading: Reading = field(default_factory=Reading)
    """How the texts were read, and which documents were left out."""
    chat_template: str | None = None
    """Digest of the template that rendered conversations; None for other texts."""
    labels: dict[str, str] = field(default_factory=dict)
    """Name of each label of the sequences -> `label_digest` of its values."""

    @classmethod
    def of(cls, stream: TokenStream, tokenizer: str) -> "StreamSummary":
        """The summary of `stream`, whose tokens come from the tokenizer of digest `tokenizer`."""
        digest, hashes = stream.digests()
        if stream.runs is not None:
            # A cache of some positions has a sequence for each run of kept positions.
            hashes = hashes[stream.runs.sequence]
        labels = {
            name: values if stream.runs is None else values[stream.runs.sequence]
            for name, values in stream.sequence_arrays.items()
            if name.startswith(LABEL_PREFIX)
        }
        return cls(
            digest,
            hashes,
            stream.positions,
            stream.split_by,
            tokenizer,
            cut=stream.cut_counts,
            reading=stream.reading,
            chat_template=stream.chat_template,
            labels={
                name.removeprefix(LABEL_PREFIX): label_digest(values, stream.categories.get(name))
                for name, values in labels.items()
            },
        )

    @property
    def sequences(self) -> int:
        """Number of sequences of the cache."""
        return len(self.hashes)

    def to_dict(self) -> dict[str, Any]:
        """The summary as a JSON object; the hashes as base64 of little-endian numbers."""
        return {
            "digest": self.digest,
            "hashes": base64.b64encode(self.hashes.astype("<u8").tobytes()).decode(),
            "positions": self.positions,
            "split_by": self.split_by,
            "tokenizer": self.tokenizer,
            "cut": self.cut,
            "chat_template": self.chat_template,
            "labels": self.labels,
            "reading": {
                "text_column": self.reading.text_column,
                "column_reason": self.reading.column_reason,
                "notes": self.reading.notes,
                "dropped": {name: vars(entry) for name, entry in self.reading.dropped.items()},
            },
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "StreamSummary":
        """The summary of a JSON object of `to_dict`; raises `CorruptError` for any other value."""
        try:
            raw = base64.b64decode(value["hashes"], validate=True)
            reading = value["reading"]
            dropped = {
                str(reason): Dropped(int(entry["documents"]), [int(row) for row in entry["rows"]])
                for reason, entry in reading["dropped"].items()
            }
            column, reason = reading["text_column"], reading["column_reason"]
            template = value["chat_template"]
            return cls(
                digest=str(value["digest"]),
                hashes=np.frombuffer(raw, "<u8").astype(np.uint64),
                positions=int(value["positions"]),
                split_by=str(value["split_by"]),
                tokenizer=str(value["tokenizer"]),
                cut={name: int(value["cut"][name]) for name in ("sequences", "tokens")},
                reading=Reading(
                    None if column is None else str(column),
                    None if reason is None else str(reason),
                    [str(note) for note in reading["notes"]],
                    dropped,
                ),
                chat_template=None if template is None else str(template),
                labels={str(name): str(found) for name, found in value["labels"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
            raise CorruptError(f"this is no summary of a token stream: {error!r}") from None


def label_digest(values: np.ndarray, words: tuple[str, ...] | None) -> str:
    """Hex sha256 of the `(sequences,)` values of a label, numbers or codes of `words`."""
    values = np.asarray(values)
    digest = hashlib.sha256(f"{values.dtype.kind} {json.dumps(words)}".encode())
    # Codes and numbers of any width and byte order that mean the same.
    digest.update(values.astype("<f8" if values.dtype.kind == "f" else "<i8").tobytes())
    return digest.hexdigest()
