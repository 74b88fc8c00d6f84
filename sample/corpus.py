"""The corpus of the sample model: text that every Python carries, and generated tasks."""

import ast
import hashlib
import random
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

from . import tasks

SKIP = {
    "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "ensurepip", "turtledemo",
    "site-packages", "dist-packages", "__phello__", "__pycache__",
}  # fmt: skip
TASK_SHARE = {"names": 0.15, "key_value": 0.5, "maps": 0.35}


def is_held_out(name: str) -> bool:
    """Say whether a standard-library file belongs to the 3 % kept for perplexity."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < 3


def docstrings(source: str) -> str:
    """Return the docstrings of a module, its classes and functions as one text."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes)))


def stdlib_texts() -> tuple[list[str], list[str]]:
    """Return the texts of the running Python's library to train on, and those held out."""
    root = Path(sysconfig.get_path("stdlib"))
    train = [topics[name] for name in sorted(topics)]
    held: list[str] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIP & set(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        source = path.read_text(encoding="utf-8", errors="ignore")
        if is_held_out(name.as_posix()):
            held.append(source)
        else:
            train += [source, docstrings(source)]
    return [text for text in train if text.strip()], held


def repeated_lines(rng: random.Random) -> str:
    """Return lines of random words said again and again, where copying from context is learned."""
    count, width = rng.randint(2, 6), rng.randint(2, 6)
    joint = rng.choice([" ", ": ", " = ", " -> ", " has "])
    lines = [joint.join(rng.sample(tasks.WORDS, width)) + "\n" for _ in range(count)]
    text = ""
    for _ in range(rng.randint(2, 4)):
        text += "".join(lines)
        rng.shuffle(lines)
    return text


def task_document(rng: random.Random, progress: float, kind: str = "") -> str:
    """Return one to three examples of a kind; records grow longer as training goes on."""
    if not kind and rng.random() < 0.6 - progress:
        return repeated_lines(rng)
    kind = kind or rng.choices(list(TASK_SHARE), list(TASK_SHARE.values()))[0]
    hardness: dict[str, int] = {}
    if kind == "key_value":
        most = min(16, 3 + int(30 * max(0.0, progress - 0.1)))
        hardness = {"most": most, "least": 2, "questions": rng.randint(1, 8)}
    examples = [tasks.GENERATORS[kind](rng, **hardness) for _ in range(rng.randint(1, 3))]
    return "\n\n".join(e.text.strip("\n") for e in examples) + "\n"
