"""Long documents stay on the disk: their slices, pieces and tokens are those of the whole text."""

import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residua.cache.documents import long_text, row_table, text_file
from residua.cache.documents.document_loading import load_documents
from residua.cache.documents.documents import reason_to_drop
from residua.cache.documents.long_text import LongText
from residua.cache.documents.text_file import SEPARATOR, TextFile
from residua.cache.tokens.splits import text_hash

ALPHABET = "ab \n\u00e9\u00df\u4e1c\U0001f600"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "BLOCK_BYTES", 7)
    monkeypatch.setattr(text_file, "BLOCK_BYTES", 16)
    for module in (text_file, row_table):
        monkeypatch.setattr(module, "LONG_BYTES", 40)


def random_text(characters: int, seed: int, alphabet: str = ALPHABET) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(alphabet) for _ in range(characters))


def long_text_of(text: str, before: str = "\u00e9x", after: str = "\u00e9") -> LongText:
    """`text` in a file, between other texts."""
    encoded = text.encode("utf-8", "surrogatepass")
    file = io.BytesIO(before.encode() + encoded + after.encode())
    return LongText(file, len(before.encode()), len(before.encode()) + len(encoded))


@pytest.mark.parametrize("characters", [0, 1, 6, 7, 8, 50])
@pytest.mark.parametrize("seed", range(3))
def test_every_slice_is_that_of_the_text(characters: int, seed: int) -> None:
    text = random_text(characters, seed)
    stored = long_text_of(text)
    assert len(stored) == len(text)
    assert str(stored) == text
    assert b"".join(stored.encoded_blocks()) == text.encode()
    for start in range(-2, characters + 2):
        for stop in range(-2, characters + 3):
            assert stored[start:stop] == text[start:stop], (start, stop)


@pytest.mark.parametrize("text", ["\U0001f600" * 9, "a" * 30, "\ud800 and " * 5, "\u00e9" * 20])
def test_characters_may_lie_across_blocks(text: str) -> None:
    stored = long_text_of(text)
    assert str(stored) == text
    assert all(stored[n : n + 1] == text[n] for n in range(len(text)))


def test_a_long_text_is_hashed_and_dropped_as_a_short_one() -> None:
    for text in (
        random_text(90, 4),
        " \n" * 30,
        "ab\ud83d" * 9,
        " " * 20 + "\udc00",
        " " * 50 + "a",
    ):
        stored = long_text_of(text)
        assert text_hash(stored) == text_hash(text)
        assert reason_to_drop(stored) == reason_to_drop(text)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("lines", [True, False])
def test_a_text_file_with_long_documents_has_the_same_documents(
    tmp_path: Path, seed: int, lines: bool
) -> None:
    draw = random.Random(seed)
    pieces = [random_text(draw.choice((0, 3, 30, 41, 100)), 100 * seed + n) for n in range(12)]
    pieces += ["\n" * 90, " \n" * 50, "\n\n" + "x" * 99 + "\n\n"]
    draw.shuffle(pieces)
    text = SEPARATOR.join(pieces) if seed % 2 else "\n".join(pieces)
    path = tmp_path / "texts.txt"
    path.write_bytes(text.encode())

    if seed % 2:
        documents = [piece.strip("\n") for piece in pieces]
    else:
        documents = text.split("\n") if lines else [text]
    file = TextFile(path, lines)
    read = [file[number] for number in range(len(file))]
    assert [str(document) for document in read] == [text for text in documents if text.strip()]
    # The documents that take more than 40 bytes, and no others, stay on the disk.
    is_long = [len(str(document).encode()) > 40 for document in read]
    assert [isinstance(document, LongText) for document in read] == is_long
    assert any(is_long) or (seed % 2 == 0 and lines)


def test_long_rows_stay_on_the_disk(tmp_path: Path) -> None:
    texts = [random_text(90, 1), "short", "\ud800" * 30, random_text(80, 2)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents = load_documents(str(path))
    read = documents.texts([0, 1, 2, 3])
    assert [isinstance(text, LongText) for text in read] == [True, False, True, True]
    assert [str(text) for text in read] == list(documents) == texts


TOKENIZE = """
import re, sys
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from residua.cache.documents.document_loading import load_documents
from residua.cache.tokens.tokenization import tokenize

tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "dog": 2}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
documents = load_documents(sys.argv[1])
options = {"max_tokens": int(sys.argv[2])} if len(sys.argv) > 2 else {}
stream = tokenize(documents, tokenizer, context=128, pack=True, separator=None, seed=0, **options)
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(len(documents), stream.positions, peak)
"""


def tokenized_and_peak(path: Path, *max_tokens: int) -> tuple[int, int]:
    """Tokens of the one document in `path`, and the peak memory in MiB."""
    command: list[Any] = [sys.executable, "-c", TOKENIZE, path, *max_tokens]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    documents, tokens, kibibytes = map(int, re.findall(r"\d+", done.stdout))
    assert documents == 1
    return tokens, kibibytes >> 10


def test_memory_does_not_grow_with_the_length_of_a_document(tmp_path: Path) -> None:
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    for path, size in ((short, 8), (long, 64)):
        with path.open("w") as file:
            for _ in range(size):
                file.write("the dog ran \u4e1c " * (np.int64(1 << 20) // 16))
    expected = tokenized_and_peak(short, 2000)
    tokens, peak = tokenized_and_peak(long, 2000)
    assert tokens == expected[0] == 1920  # whole sequences of 128
    assert peak < expected[1] + 16  # the text has 64 MB
