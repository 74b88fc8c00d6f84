"""Key-value retrieval (Liu et al., 2307.03172) as texts for the study of essential layers.

A text lists pairs of a key and a value and asks for the value of one key. Every question stands
once at each position of the list, with the other pairs in the same order.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ....cache.errors import UsageError
from ....cache.files.json_files import write_atomically

LAYOUTS = {
    "json": (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        'JSON data:\n{{{pairs}}}\n\nKey: "{key}"\nCorresponding value: ',
        '"{key}": "{value}"',
        ", ",
        '"{value}"',
    ),
    "record": ("Record:\n{pairs}Which {key}?\n{key}: ", "{key}: {value}\n", "", "{value}\n"),
    "assignments": ("{pairs}print {key}\n{key} = ", "{key} = {value}\n", "", "{value}\n"),
    "sentences": (
        "List. {pairs}What has the {key}? The {key} has ",
        "The {key} has {value}. ",
        "",
        "{value}.\n",
    ),
}
"""Name -> text with the place of the pairs, one pair, what joins pairs, the answer with its end.

The last three are those that the bundled model knows."""
LETTERS = "bcdfghjklmnpqrstvwxz"
MOST_PAIRS = 900
"""Most pairs of a text: half of the codes."""


def key_value_rows(
    pairs: Sequence[int], questions: int, layout: str = "json", seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Rows of texts: each of `questions` at every position of lists of `pairs` pairs.

    A row has the columns `text`, `answer` (which the text ends with), `documents` (the number of
    pairs), `gold` (the position of the pair that is asked for, from 0) and `question`. Keys and
    values are codes of a letter and two digits. Raises `UsageError` for counts that cannot be.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"the layout {layout!r} is none of {', '.join(LAYOUTS)}")
    if questions < 1 or not pairs or min(pairs) < 1 or max(pairs) > MOST_PAIRS:
        raise UsageError(f"pairs are 1 to {MOST_PAIRS}, and questions 1 or more")
    text, one_pair, joint, end = LAYOUTS[layout]
    codes = [f"{letter}{number}" for letter in LETTERS for number in range(10, 100)]
    for count in pairs:
        for question in range(questions):
            # Of the seed, the count and the question alone: more questions change no earlier one.
            drawn = random.Random(f"{seed} {count} {question}").sample(codes, 2 * count)
            keys, values = drawn[:count], drawn[count:]
            asked, others = (keys[0], values[0]), list(zip(keys[1:], values[1:], strict=True))
            for gold in range(count):
                listed = [*others[:gold], asked, *others[gold:]]
                joined = joint.join(one_pair.format(key=k, value=v) for k, v in listed)
                answer = end.format(value=asked[1])
                yield {
                    "text": text.format(pairs=joined, key=asked[0]) + answer,
                    "answer": answer.strip("\n.").strip(),
                    "documents": count,
                    "gold": gold,
                    "question": f"{count}-{question}",
                }


def write_key_value_data(
    path: Path, pairs: Sequence[int], questions: int, layout: str = "json", seed: int = 0
) -> dict[str, Any]:
    """Write the rows as .jsonl; returns the number of texts and the longest in characters."""
    if path.suffix != ".jsonl":
        raise UsageError(f"{path} is written as JSON lines: name it {path.with_suffix('.jsonl')}")
    lines, longest = [], 0
    for row in key_value_rows(pairs, questions, layout, seed):
        lines.append(json.dumps(row) + "\n")
        longest = max(longest, len(row["text"]))
    write_atomically(path, "".join(lines).encode())
    return {"path": str(path), "texts": len(lines), "longest": longest}
