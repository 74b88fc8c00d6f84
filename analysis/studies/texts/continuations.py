"""The model's own greedy continuations of contexts, as token ids for an extraction.

Future Lens (Pal et al., 2311.04897) asks what a state at the end of a context says of the model's
continuation. A row holds the ids of the context and of its continuation, so that no boundary of
tokens moves, and the positions from the last one of the context on:

    residua data continue MODEL texts.jsonl continued.jsonl
    residua extract MODEL continued.jsonl --no-pack --text-column input_ids --positions explicit
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ....cache.devices import choose_device
from ....cache.errors import DataError, UsageError
from ....cache.extraction.request import ExtractionRequest
from ....cache.extraction.resolve import choose_context, read_stream
from ....cache.files.disk_errors import translate_disk_errors
from ....cache.files.paths import open_new
from ....cache.model.source import ModelSource
from ....cache.progress import Auto, StageProgress, show_stages

if TYPE_CHECKING:
    from ....cache.tokens.token_stream import TokenStream
    from .greedy_tokens import GreedyModel

BATCHES = 8
"""Batches whose prompts are sorted by length together, so that a batch has little padding."""


@dataclass(frozen=True)
class ContextChoice:
    """Which contexts are continued: their number and lengths, in tokens."""

    contexts: int
    """Most contexts; one of a document."""
    least_context: int
    tokens: int
    """Tokens of each continuation."""
    window: int
    """Most tokens of a context with its continuation."""
    seed: int = 0

    def check(self) -> None:
        """Raise `UsageError` for lengths that leave no room."""
        if min(self.contexts, self.least_context, self.tokens) < 1:
            raise UsageError("contexts, least context and tokens are 1 or more")
        if self.least_context + self.tokens > self.window:
            raise UsageError(
                f"a context of {self.least_context} tokens and {self.tokens} more do not fit into "
                f"the {self.window} that the model reads at once; give --least-context "
                f"{max(1, self.window - self.tokens)} or less"
            )


@dataclass(frozen=True, eq=False)
class Prompt:
    """The context that is continued, and the text that follows it."""

    document: int
    """Number of the document in the texts, from 0."""
    ids: np.ndarray
    """Tokens of the context, `(length,)` int64."""
    text: np.ndarray
    """The text's own next tokens, as many as there are, `(0 to tokens,)` int64."""


def choose_prompts(stream: "TokenStream", choice: ContextChoice) -> list[Prompt]:
    """Contexts of the documents of `stream`, which has one sequence for each.

    Documents come in the stream's order, a random one; the length of a context is drawn, by the
    seed and the document, between the least context and what the document and the window allow.
    """
    prompts: list[Prompt] = []
    for number, length in enumerate(stream.lengths.tolist()):
        longest = min(length, choice.window - choice.tokens)
        if longest < choice.least_context:
            continue
        document = int(stream.row_ids[number])
        rng = np.random.default_rng([choice.seed, document])
        size = int(rng.integers(choice.least_context, longest + 1))
        ids = np.asarray(stream.sequence(number), np.int64)
        prompts.append(Prompt(document, ids[:size], ids[size : size + choice.tokens]))
        if len(prompts) == choice.contexts:
            break
    return prompts


def continuation_rows(
    prompts: list[Prompt],
    model: "GreedyModel",
    tokenizer: Any,
    tokens: int,
    batch: int,
    report: StageProgress | None = None,
) -> Iterator[dict[str, Any]]:
    """A row of plain values for each prompt, in their order.

    Columns: `input_ids`, `positions` (the kept token numbers: the last one of the context and all
    but the last one of the continuation), `text`, `continuation`, `document`, `prefix_len` and
    `gen_len` in tokens, and `matches`, how many of the first tokens are the text's own.
    """
    done = 0
    for start in range(0, len(prompts), batch * BATCHES):
        group = prompts[start : start + batch * BATCHES]
        order = np.argsort([len(prompt.ids) for prompt in group], kind="stable")[::-1]
        continued = np.zeros((len(group), tokens), np.int64)
        for first in range(0, len(group), batch):
            chosen = order[first : first + batch]
            continued[chosen] = model.continue_greedily([group[i].ids for i in chosen], tokens)
            done += len(chosen)
            if report is not None:
                report("continue", done, len(prompts))
        for prompt, following in zip(group, continued, strict=True):
            length = len(prompt.ids)
            ids = [*prompt.ids.tolist(), *following.tolist()]
            same = prompt.text == following[: len(prompt.text)]
            yield {
                "input_ids": ids,
                "positions": list(range(length - 1, length + tokens - 1)),
                "text": tokenizer.decode(ids, skip_special_tokens=False),
                "continuation": tokenizer.decode(following.tolist(), skip_special_tokens=False),
                "document": prompt.document,
                "prefix_len": length,
                "gen_len": tokens,
                "matches": int(np.cumprod(same).sum()),
            }


def write_continuations(
    model: str,
    data: str,
    out: Path,
    *,
    root: Path | None = None,
    tokens: int = 11,
    least_context: int = 535,
    contexts: int = 1000,
    context: int | None = None,
    batch: int = 8,
    text_column: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    device: str = "auto",
    progress: StageProgress | Auto | None = "auto",
) -> dict[str, Any]:
    """Write greedy continuations of contexts of `data` by `model` as .jsonl.

    `model` is a folder or hub id, `data` what `residua extract` reads, a document for each context;
    `context` is the most tokens that the model reads at once (default: its own, at most 1,024).
    Returns the number of rows, of documents that were too short, and how the model ran. Raises
    `DataError` where no document is long enough, `UsageError` for lengths that do not fit.
    """
    from ....cache.model.model_loading import load_model
    from .greedy_tokens import GreedyModel

    if out.suffix != ".jsonl":
        raise UsageError(f"{out} is written as JSON lines: name it {out.with_suffix('.jsonl')}")
    if batch < 1:
        raise UsageError(f"batch must be 1 or more, not {batch}")
    source = ModelSource.locate(model, trust_remote_code=trust_remote_code)
    request = ExtractionRequest(
        model=model,
        data=data,
        root=root,
        pack=False,
        context=context,
        text_column=text_column,
        seed=seed,
    )
    choice = ContextChoice(contexts, least_context, tokens, choose_context(request, source), seed)
    choice.check()
    with show_stages(progress) as report:
        stream = read_stream(request, source, report)
        prompts = choose_prompts(stream, choice)
        if not prompts:
            raise DataError(
                f"no document of {data} has {least_context} tokens (the longest has "
                f"{int(stream.lengths.max())}); give a smaller --least-context"
            )
        module = load_model(source, choose_device(device), "default", trust_remote_code)
        greedy = GreedyModel(module)
        rows = continuation_rows(prompts, greedy, source.tokenizer, tokens, batch, report)
        matches = np.zeros(tokens + 1, np.int64)
        temporary = out.with_name(f".{out.name}.tmp")
        with translate_disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open_new(temporary) as file:
                    for row in rows:
                        matches[row["matches"]] += 1
                        file.write((json.dumps(row) + "\n").encode())
                temporary.replace(out)
            finally:
                temporary.unlink(missing_ok=True)
    return {
        "path": str(out),
        "rows": len(prompts),
        "too_short": int((stream.lengths < least_context).sum()),
        "mean_context": float(np.mean([len(prompt.ids) for prompt in prompts])),
        "first_token_is_text": int(matches[1:].sum()),
        "all_tokens_are_text": int(matches[tokens]),
        "way": greedy.way,
    }
