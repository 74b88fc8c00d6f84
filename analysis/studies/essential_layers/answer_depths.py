"""At which layers a lens reads the answer: first-correct and final layer of each answer.

An answer is the token that follows the first kept position of a sequence, in a cache that was made
with `--positions answer`. With c_l = 1 where the top token of the lens at layer l is the answer
(l = 1..L; layer 0 is the embedding), the first-correct layer is F = min {l: c_l = 1}, the final
layer S = min {l: c_k = 1 for all k >= l}, and the gap G = S - F (Kongmanee, 2501.15054).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ....cache.devices import copy_to_device
from ....cache.errors import NotFoundError, UsageError
from ....cache.number_ranges import format_ranges
from ....cache.progress import Progress
from ....probes.base.readout import Readout, ReadoutBatch

if TYPE_CHECKING:
    import torch

    from ....cache.head.head import TorchHead
    from ....cache.store.activation_cache import ActivationCache

BLOCK_BYTES = 64 << 20
"""Size of a float32 matrix of logits, `(rows, vocab)`."""
HALF = float(np.log(0.5))


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers of a cache: one for each sequence that has one, in the order of sequences."""

    sequences: np.ndarray
    """Numbers of the sequences, `(n,)` int64."""
    rows: np.ndarray
    """Kept position that predicts the answer's first token, `(n,)` int64."""
    tokens: np.ndarray
    """First token of the answer, `(n,)` int64."""


@dataclass(frozen=True, eq=False)
class AnswerDepths:
    """What one lens reads of the answers at each layer; arrays are `(n, layers)`."""

    lens: str
    layers: tuple[int, ...]
    """Layers 1 to L that the lens reads, ascending; L is the model itself."""
    correct: np.ndarray
    """Whether the answer is the top token; of equal logits that of the smallest id counts."""
    rank: np.ndarray
    """Rank of the answer, 1 for the top token; int64."""
    log_probability: np.ndarray
    """log p of the answer in nats, float64; NaN where the logits are no distribution."""

    @property
    def first(self) -> np.ndarray:
        """First-correct layer F of each answer, `(n,)` float64; NaN where no layer is correct."""
        layers = np.array(self.layers, np.float64)
        return np.where(self.correct.any(1), layers[self.correct.argmax(1)], np.nan)

    @property
    def final(self) -> np.ndarray:
        """Final layer S of each answer, `(n,)` float64; NaN where the last layer is wrong."""
        layers = np.array(self.layers, np.float64)
        # The run of correct layers that ends at the last one.
        run = np.cumprod(self.correct[:, ::-1], axis=1).sum(1)
        return np.where(run > 0, layers[np.maximum(len(layers) - run, 0) % len(layers)], np.nan)

    @property
    def flips(self) -> np.ndarray:
        """How often neighbouring layers disagree on whether the answer is on top, `(n,)` int64."""
        return (self.correct[:, 1:] != self.correct[:, :-1]).sum(1)

    @property
    def stay(self) -> np.ndarray:
        """Share of the layers from F on that are correct, `(n,)` float64; NaN without F."""
        count = self.correct.sum(1)
        after = len(self.layers) - self.correct.argmax(1)
        return np.where(count > 0, count / after, np.nan)

    @property
    def halfway(self) -> np.ndarray:
        """First layer that gives the answer more than half of the probability; NaN for none."""
        above = self.log_probability > HALF
        layers = np.array(self.layers, np.float64)
        return np.where(above.any(1), layers[above.argmax(1)], np.nan)


def find_answers(cache: "ActivationCache", split: str = "all") -> Answers:
    """The answers of the sequences of `split`; raises `UsageError` for a cache without answers."""
    mode = cache.manifest.capture.positions
    if mode != "answer":
        raise UsageError(
            f"this cache keeps the positions {mode!r}; answers are known in one made by `residua "
            "extract ... --no-pack --positions answer`, from texts with a column `answer`"
        )
    sequences = cache.sequences(split)
    sequences = sequences[cache.sequence_length[sequences] > 0]
    rows = cache.sequence_start[sequences].astype(np.int64)
    tokens = np.asarray(cache.following_tokens(rows), np.int64)
    has_answer = tokens >= 0
    if not has_answer.any():
        raise UsageError(f"no sequence of the split {split!r} of this cache has an answer")
    return Answers(sequences[has_answer], rows[has_answer], tokens[has_answer])


def lens_layers(cache: "ActivationCache", name: str, lens: Readout) -> tuple[int, ...]:
    """Layers 1 to L that `lens` reads at offset 0, and L, which is the model itself.

    Raises `NotFoundError` for a lens that reads no layer below the last one at offset 0.
    """
    below = {layer for layer, offset in lens.pairs() if layer is not None and offset == 0}
    layers = sorted((below & set(cache.layers)) - {0, cache.n_blocks})
    if not layers:
        raise NotFoundError(
            f"{name} reads no layer between 1 and {cache.n_blocks - 1} at offset 0; the cache "
            f"holds layers {format_ranges(cache.layers)}"
        )
    return (*layers, cache.n_blocks)


def measure_answer_depths(
    cache: "ActivationCache",
    answers: Answers,
    name: str,
    lens: Readout,
    device: "torch.device",
    progress: Progress | None = None,
) -> AnswerDepths:
    """Read the answers with `lens` at all its layers; `progress` counts answers times layers.

    The last layer is the model itself for every lens. Rows whose logits are not finite are wrong at
    that layer, with the last rank.
    """
    import torch

    layers = lens_layers(cache, name, lens)
    shape = len(answers.rows), len(layers)
    rank, log_p = np.empty(shape, np.int64), np.empty(shape)
    block = max(1, BLOCK_BYTES // (4 * cache.vocab))
    head = cache.head.torch(device)
    view = getattr(lens, "view", None)
    with torch.no_grad():
        for column, layer in enumerate(layers):
            is_model = layer == cache.n_blocks
            source = cache if is_model or view is None else view(cache)
            array = source.residual_array(layer)
            for start in range(0, shape[0], block):
                part = slice(start, start + block)
                rows = answers.rows[part]
                hidden = copy_to_device(torch.from_numpy(np.array(array[rows], np.float32)), device)
                logits = head(hidden) if is_model else _read(lens, hidden, cache, rows, layer, head)
                rank[part, column], log_p[part, column] = _score(logits, answers.tokens[part])
                if progress is not None:
                    done = column * shape[0] + min(start + block, shape[0])
                    progress(done, shape[0] * shape[1])
    return AnswerDepths(name, layers, rank == 1, rank, log_p)


def _read(
    lens: Readout,
    hidden: "torch.Tensor",
    cache: "ActivationCache",
    rows: np.ndarray,
    layer: int,
    head: "TorchHead",
) -> "torch.Tensor":
    """Logits of `lens` at offset 0 for the kept positions `rows`."""
    import torch

    token = torch.from_numpy(np.asarray(cache.tokens[rows], np.int64)).to(hidden.device)
    position = torch.from_numpy(rows).to(hidden.device)
    batch = ReadoutBatch(hidden=hidden, last_token=token, head=head, token=token, position=position)
    return lens.logits(batch, layer, 0)


def _score(logits: "torch.Tensor", tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank and log p of `tokens` `(n,)` under `logits` `(n, vocab)`."""
    import torch

    ids = torch.from_numpy(tokens).to(logits.device)[:, None]
    own = logits.gather(1, ids)
    numbers = torch.arange(logits.shape[1], device=logits.device)
    rank = 1 + (logits > own).sum(1) + ((logits == own) & (numbers < ids)).sum(1)
    log_p = own[:, 0].double() - logits.double().logsumexp(1)
    is_wrong = ~torch.isfinite(log_p)
    rank[is_wrong], log_p[is_wrong] = logits.shape[1], float("nan")
    return rank.cpu().numpy(), log_p.cpu().numpy()


def numeric_label(cache: "ActivationCache", name: str, sequences: np.ndarray) -> np.ndarray:
    """Numbers of the label `name` of `sequences`, `(n,)` float64.

    Raises `UsageError` for a label of words, and where a number is missing.
    """
    values = np.asarray(cache.label(name))[sequences]
    if values.dtype.kind not in "biuf":
        raise UsageError(
            f"the label {name!r} has words, such as {str(values[0])[:40]!r}, not numbers"
        )
    numbers = values.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise UsageError(
            f"the label {name!r} lacks a number for {np.isnan(numbers).sum()} sequences"
        )
    return numbers


def check_labels(cache: "ActivationCache", names: Sequence[str]) -> None:
    """Raise `NotFoundError` unless the cache has all labels `names`."""
    for name in names:
        if name not in cache.label_names:
            labels = ", ".join(cache.label_names) or "none"
            raise NotFoundError(
                f"there is no label {name!r} in this cache (labels: {labels}); labels are columns "
                "of the texts beside the text, which `residua data kv` and `residua data multidoc` "
                "write"
            )
