"""Build heldout.jsonl: text written in this project plus fresh task documents."""

import argparse
import ast
import json
import random
from collections.abc import Iterator
from pathlib import Path

from . import TEXT_PATH, tasks

ROOT = Path(__file__).resolve().parents[1]
SKIP = {"build", "dist", "node_modules", "sample-neox", "__pycache__"}
SHORTEST, LONGEST = 500, 3000
SEED = 70_000


def join_pieces(pieces: list[str]) -> list[str]:
    """Return documents of about 500 to 3000 characters made of neighbouring pieces."""
    documents: list[str] = []
    for piece in (p for p in pieces if p.strip()):
        room = documents and len(documents[-1]) + len(piece) <= LONGEST
        if room and min(len(documents[-1]), len(piece)) < SHORTEST:
            documents[-1] += piece
        else:
            lines = piece.splitlines(keepends=True)
            documents.append("")
            for line in lines:
                if len(documents[-1]) + len(line) > LONGEST:
                    documents.append("")
                documents[-1] += line
    return [d.strip("\n") + "\n" for d in documents if len(d.strip()) >= SHORTEST // 2]


def split_source(text: str) -> list[str]:
    """Return a Python file cut before each top-level function and class."""
    lines = text.splitlines(keepends=True)
    starts = [0]
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            starts.append(min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1)
    ends = [*starts[1:], len(lines)]
    return ["".join(lines[a:b]) for a, b in zip(starts, ends, strict=True)]


def split_page(text: str) -> list[str]:
    """Return a Markdown page cut before each heading outside code fences."""
    pieces, fenced = [""], False
    for line in text.splitlines(keepends=True):
        fenced ^= line.lstrip().startswith("```")
        if line.startswith("#") and not fenced:
            pieces.append("")
        pieces[-1] += line
    return pieces


def project_documents(root: Path) -> Iterator[dict[str, str]]:
    """Yield the project's own Python and Markdown files as documents, in the order of paths."""
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.md")]):
        parts = path.relative_to(root).parts
        if any(part.startswith(".") or part in SKIP or "venv" in part for part in parts):
            continue
        text = path.read_text(encoding="utf-8")
        kind = "source" if path.suffix == ".py" else "page"
        if path.name == "prose.md":
            kind = "prose"
        for piece in join_pieces(split_source(text) if kind == "source" else split_page(text)):
            yield {"text": piece, "kind": kind}


def task_documents(kind: str, seed: int) -> Iterator[dict[str, str]]:
    """Yield documents of several held-out examples of one kind, without end."""
    rng = random.Random(seed)
    while True:
        examples = tasks.documents(kind, rng.randint(3, 8), rng.randrange(2**31))
        yield {"text": "\n\n".join(e.text.strip("\n") for e in examples) + "\n", "kind": kind}


def build(root: Path, size: int, natural: float = 0.6) -> list[dict[str, str]]:
    """Return documents of about ``size`` characters, at most ``natural`` of them project text."""
    found = list(project_documents(root))
    rng = random.Random(SEED)
    rng.shuffle(found)
    found.sort(key=lambda d: d["kind"] != "prose")  # prose is little and always taken
    chosen: list[dict[str, str]] = []
    used = 0
    for document in found:
        if used + len(document["text"]) <= natural * size:
            chosen.append(document)
            used += len(document["text"])
    streams = [task_documents(kind, SEED + i) for i, kind in enumerate(tasks.KINDS)]
    while used < size:
        for stream in streams:
            chosen.append(next(stream))
            used += len(chosen[-1]["text"])
    rng.shuffle(chosen)
    return chosen


def main() -> None:
    """Write the documents, one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's checkout")
    parser.add_argument("--out", type=Path, default=TEXT_PATH)
    parser.add_argument("--size", type=int, default=390_000, help="characters of text in all")
    chosen = parser.parse_args()
    documents = build(chosen.root, chosen.size)
    lines = (
        json.dumps(document, allow_nan=False, ensure_ascii=False) + "\n" for document in documents
    )
    chosen.out.write_text("".join(lines), encoding="utf-8")
    print(f"{len(documents)} documents, {chosen.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
