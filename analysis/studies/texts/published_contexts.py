"""Rows of Future Lens's published test file as texts that an extraction reads.

The file (Pal et al., 2311.04897) is a .csv with the columns `decoded_prefix`, `prefix_len`,
`gen_len` and `decoded_phrase`, sometimes `teacher_phrase`: a context and the text's, or GPT-J's,
next 11 tokens. The text of a row is the context with the phrase behind it, and the phrase is its
answer: `--positions answer` keeps the last token T of the context and those up to the phrase's end.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ....cache.errors import DataError, NotFoundError, UsageError
from ....cache.files.json_files import write_atomically

PREFIX, PHRASE = "decoded_prefix", "decoded_phrase"
LABELS = ("prefix_len", "gen_len", "pile", "doc", "start_prefix_index")
"""Columns that become labels, those that the file has; lengths are in tokens of GPT-J."""
MAX_CELL = 1 << 24
"""Longest cell, in characters."""


def published_rows(
    path: Path, phrase: str = PHRASE, most_characters: int | None = None
) -> Iterator[dict[str, Any]]:
    """Rows with `text`, `answer`, `answer_start` and labels; rows without a phrase are left out.

    `most_characters` keeps only the end of each context, for models that read less than GPT-J.
    Raises `NotFoundError` and `DataError` for a file that is missing or another.
    """
    limit = csv.field_size_limit(MAX_CELL)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = {PREFIX, phrase} - set(reader.fieldnames or ())
            if missing:
                raise DataError(
                    f"{path} has no column {', '.join(sorted(missing))}; its columns are "
                    f"{', '.join(name for name in reader.fieldnames or () if name) or 'none'}"
                )
            for row in reader:
                prefix, answer = row[PREFIX] or "", row[phrase] or ""
                if most_characters is not None:
                    prefix = prefix[-most_characters:]
                if not prefix or not answer:
                    continue
                labels = {name: _number(row[name]) for name in LABELS if name in row}
                yield {
                    "text": prefix + answer,
                    "answer": answer,
                    "answer_start": len(prefix),
                    **labels,
                }
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist; give the .csv file of Future Lens") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as .csv: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _number(cell: str | None) -> int | str | None:
    try:
        return int(cell or "")
    except ValueError:
        return cell


def write_published_contexts(
    source: Path, out: Path, phrase: str = PHRASE, most_characters: int | None = None
) -> dict[str, Any]:
    """Write the rows as .jsonl; returns their number and the longest text in characters."""
    if out.suffix != ".jsonl":
        raise UsageError(f"{out} is written as JSON lines: name it {out.with_suffix('.jsonl')}")
    if most_characters is not None and most_characters < 1:
        raise UsageError(f"most characters are 1 or more, not {most_characters}")
    lines, longest = [], 0
    for row in published_rows(source, phrase, most_characters):
        lines.append(json.dumps(row) + "\n")
        longest = max(longest, len(row["text"]))
    if not lines:
        raise DataError(f"{source} has no row with a context and a {phrase}")
    write_atomically(out, "".join(lines).encode())
    return {"path": str(out), "texts": len(lines), "longest": longest}
