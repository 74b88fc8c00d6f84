"""Peak memory does not grow with the tokens while a cache is made and filled."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from residua.cache.files.disk_columns import BLOCK

MAKE = """
import re, sys
from pathlib import Path
from residua.cache.extraction.answer import answer_request
from residua.cache.extraction.request import ExtractionRequest

model, data, root, pack, filled = sys.argv[1:]
# A share without any part: the cache is made, with all its tables, and left empty.
part = None if filled == "True" else "999999/999999"
request = ExtractionRequest(model, data, Path(root), context=128, pack=pack == "True", part=part,
                            part_positions=1 << 16, batch_tokens=4096)
done = answer_request(request)
assert done.cache.complete == (filled == "True")
# Not ru_maxrss, which begins with what the parent had.
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(done.cache.positions, peak)
"""


LOAD = """
import re, sys
from pathlib import Path
import numpy as np
import pyarrow.parquet
from residua.cache.documents.document_loading import load_documents

documents = load_documents(sys.argv[1], scratch=Path(sys.argv[2]))
numbers = np.random.default_rng(0).permutation(len(documents))
size = sum(len(t) for some in documents.batches(numbers) for t in documents.texts(some))
labels = documents.labels(numbers[:1000])
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(size, len(labels.values), peak)
"""


def run_python(code: str, *args: object) -> str:
    """What `code` prints in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def write_texts(path: Path, documents: int) -> Path:
    """Texts of about 250 tokens with a label each."""
    rng = np.random.default_rng(0)
    words = "the a cat dog sat ran on under mat tree and then it was big red blue house".split()
    with path.open("w") as file:
        for number in range(documents):
            text = " ".join(rng.choice(words, 100))
            file.write(json.dumps({"text": text, "grade": number, "kind": text[:3]}) + "\n")
    return path


def positions_and_peak(
    model_folder: Path, folder: Path, documents: int, pack: bool, filled: bool
) -> tuple[int, int]:
    """Positions of a cache of so many documents, and the peak memory in kB that it took."""
    data = write_texts(folder / f"{documents}.jsonl", documents)
    root = folder / f"root-{documents}"  # one of its own: nothing to extend
    positions, peak = run_python(MAKE, model_folder, data, root, pack, filled).split()
    return int(positions), int(peak)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("pack", [True, False])
def test_ten_times_the_tokens_take_no_more_memory(
    model_folder: Path, tmp_path: Path, pack: bool
) -> None:
    few, small = positions_and_peak(model_folder, tmp_path, 4000, pack, filled=False)
    many, large = positions_and_peak(model_folder, tmp_path, 40_000, pack, filled=False)
    assert many > 9.5 * few
    assert few > 1.5 * BLOCK
    assert large < 1.05 * small, f"{small} kB for {few} tokens, {large} kB for {many}"


@pytest.mark.slow
@pytest.mark.long
def test_four_times_the_rows_of_the_model_take_no_more_memory(
    model_folder: Path, tmp_path: Path
) -> None:
    """With the model's batches, the writer behind them and all commits."""
    few, small = positions_and_peak(model_folder, tmp_path, 2400, pack=False, filled=True)
    many, large = positions_and_peak(model_folder, tmp_path, 9600, pack=False, filled=True)
    assert many > 3.9 * few
    assert few > BLOCK
    assert large < 1.05 * small, f"{small} kB for {few} tokens, {large} kB for {many}"


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"])
def test_ten_times_the_texts_take_no_more_memory_to_read(tmp_path: Path, ending: str) -> None:
    import pyarrow
    import pyarrow.parquet

    def read(count: int) -> tuple[int, int]:
        path = tmp_path / f"{count}{ending}"
        rows = [{"text": f"{n} the cat sat " * 150, "number": n} for n in range(count)]
        if ending == ".parquet":
            table = pyarrow.Table.from_pylist(rows)
            pyarrow.parquet.write_table(table, path, row_group_size=1000)
        elif ending in (".csv", ".tsv"):
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0], delimiter="," if ending == ".csv" else "\t")
                writer.writeheader()
                writer.writerows(rows)
        elif ending == ".json":
            path.write_text(json.dumps(rows))
        else:
            lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(lines) if ending[-1] == "z" else lines)
        size, labels, peak = run_python(LOAD, path, tmp_path).split()
        assert labels == "1"
        return int(size), int(peak)

    few, small = read(3000)
    many, large = read(30_000)
    assert few > 5 << 20
    assert many > 10 * few
    assert large < small + (12 << 10), f"{small} kB for {few} characters, {large} kB for {many}"
