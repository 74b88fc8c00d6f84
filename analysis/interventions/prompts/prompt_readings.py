"""What prompts say of cached states, sample by sample: `PromptMeter`.

Each state is read twice, the second time at another sample's tokens (`shuffled`): what is left then
comes from the prompt and from the tokens of the text that it was given.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ....probes.base.readout import Readout, ReadoutBatch
from ....probes.prompts.patched_prompt import PatchedPrompt
from ....probes.prompts.prompt_runner import PromptRunner, batch_rows
from ....probes.prompts.prompt_sample import PromptSample
from ...evaluation.comparison import compare_pairs
from ...evaluation.distributions import Reference, value_at

if TYPE_CHECKING:
    import torch

    from ....cache.resuming.resumable_model import ResumableModel

MEASURES = ("rank", "text_rank", "surprisal", "nll", "kl")
"""All measures of one sample:

- `rank` of the model's top token in what the reading says, 1 for the first; `text_rank` that of
  the text's next token, NaN where the text ends;
- `surprisal`: -log p(top token of the reading), p of the model in the text, nats (2311.04897);
- `nll`: -log q(model's top token); `kl`: KL(p || q), nats.
"""


@dataclass(frozen=True, eq=False)
class PromptEntry:
    """One prompt with the states it reads."""

    name: str
    prompt: PatchedPrompt
    layer: int
    """Layer that the states come from."""
    target_layer: int
    """Layer of the model at which they are put in."""
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class ReadingKey:
    """What was read."""

    name: str
    layer: int | None
    target_layer: int | None
    offset: int
    mode: str
    """`forced`: the text's tokens t+1 to t+N are given; `free`: the prompt's own are; `probe`."""
    is_shuffled: bool = False
    """Whether the states are those of other samples."""


@dataclass(frozen=True, eq=False)
class PromptReading:
    """Measures of all samples, each `(n,)` float32, NaN where undefined."""

    values: dict[str, np.ndarray]
    top: np.ndarray
    """Top token, `(n,)` int64; -1 where undefined."""

    @classmethod
    def empty(cls, count: int) -> "PromptReading":
        """Readings of `count` samples, none of them defined yet."""
        values = {name: np.full(count, np.nan, np.float32) for name in MEASURES}
        return cls(values, np.full(count, -1, np.int64))


@dataclass(eq=False)
class PromptMeter:
    """Reads prompts and probes on one sample, batch by batch."""

    sample: PromptSample
    model: "ResumableModel"
    offsets: tuple[int, ...]
    shuffle: np.ndarray
    """The sample whose state each sample gets for the control, `(n,)` int64."""
    readings: dict[ReadingKey, PromptReading] = field(default_factory=dict)

    def measure(
        self,
        entries: Sequence[PromptEntry],
        probes: Mapping[str, Readout],
        layers: Sequence[int],
        *,
        free: bool,
        report: Callable[[int], None],
    ) -> dict[ReadingKey, PromptReading]:
        """Measure all samples; `report` is called with the samples done.

        `probes` are read at `layers` (those without a layer once). `free` adds readings in which
        prompts continue with their own tokens.
        """
        import torch

        sample = self.sample
        length = max((entry.prompt.length for entry in entries), default=1) + sample.max_offset
        size = batch_rows(sample.cache, len(self.offsets) + 1, length)
        self.head = sample.cache.head.torch(self.model.device)
        needed = sorted({entry.layer for entry in entries})
        states = {layer: sample.states(layer) for layer in needed}
        with torch.inference_mode():
            for start in range(0, sample.count, size):
                rows = np.arange(start, min(sample.count, start + size))
                references = self._references(rows)
                for prompt, members in _by_prompt(entries):
                    self._read_forced(prompt, members, states, rows, references)
                    if free:
                        self._read_free(prompt, members, states, rows, references)
                for name, probe in probes.items():
                    self._read_probe(name, probe, layers, rows, references)
                report(int(rows[-1]) + 1)
        return self.readings

    def _references(self, rows: np.ndarray) -> "dict[int, Reference]":
        """The model's distribution at t+N in the text, for each N."""
        import torch

        references = {}
        for offset in self.offsets:
            last = torch.from_numpy(self._last(offset)[rows]).to(self.model.device)
            text = torch.from_numpy(self._text(offset)[rows]).to(self.model.device)
            references[offset] = Reference.of(self.head(last), text)
        return references

    def _last(self, offset: int) -> np.ndarray:
        return self._once(("last", offset), lambda: self.sample.last_states(offset))

    def _text(self, offset: int) -> np.ndarray:
        return self._once(("text", offset), lambda: self.sample.next_tokens(offset))

    def _once(self, key: tuple[Any, ...], read: Callable[[], np.ndarray]) -> np.ndarray:
        """`read()`, kept for the next batch."""
        kept: dict[Any, np.ndarray] = self.__dict__.setdefault("_kept", {})
        if key not in kept:
            kept[key] = read()
        return kept[key]

    def _read_forced(
        self,
        prompt: PatchedPrompt,
        entries: Sequence[PromptEntry],
        states: Mapping[int, np.ndarray],
        rows: np.ndarray,
        references: "Mapping[int, Reference]",
    ) -> None:
        """Readings of one prompt with the tokens of the text behind it."""
        runner = PromptRunner(self.model, prompt)
        most = max(offset for entry in entries for offset in entry.offsets)
        continuations = self.sample.continuations[rows][:, :most]
        tokens = prompt.tokens(self.sample.tokens[rows], continuations)
        streams = runner.clean_streams(tokens, [entry.target_layer for entry in entries])
        for entry in entries:
            for is_shuffled in (False, True):
                own = self._states(states[entry.layer], rows, is_shuffled)
                stream = streams[entry.target_layer]
                last = runner.read_states(entry.target_layer, own, tokens, stream)
                for offset in entry.offsets:
                    key = ReadingKey(
                        entry.name,
                        entry.layer,
                        entry.target_layer,
                        offset,
                        "forced",
                        is_shuffled,
                    )
                    self._keep(key, rows, references[offset], self.head(last[:, offset]))

    def _read_free(
        self,
        prompt: PatchedPrompt,
        entries: Sequence[PromptEntry],
        states: Mapping[int, np.ndarray],
        rows: np.ndarray,
        references: "Mapping[int, Reference]",
    ) -> None:
        """Readings of one prompt that goes on with its own likeliest tokens."""
        for entry in entries:
            for is_shuffled in (False, True):
                own = self._states(states[entry.layer], rows, is_shuffled)
                generated = generate(
                    PromptRunner(self.model, prompt),
                    entry.target_layer,
                    own,
                    self.sample.tokens[rows],
                    max(entry.offsets) + 1,
                    self.head,
                )
                for offset, logits, _ in generated:
                    if offset in entry.offsets:
                        key = ReadingKey(
                            entry.name,
                            entry.layer,
                            entry.target_layer,
                            offset,
                            "free",
                            is_shuffled,
                        )
                        self._keep(key, rows, references[offset], logits)

    def _states(self, states: np.ndarray, rows: np.ndarray, is_shuffled: bool) -> "torch.Tensor":
        """States of the samples `rows`, or those of other samples."""
        import torch

        chosen = self.shuffle[rows] if is_shuffled else rows
        return torch.from_numpy(states[chosen]).to(self.model.device)

    def _read_probe(
        self,
        name: str,
        probe: Readout,
        layers: Sequence[int],
        rows: np.ndarray,
        references: "Mapping[int, Reference]",
    ) -> None:
        """Readings of a probe at the same samples."""
        import torch

        cache, device = self.sample.cache, self.model.device
        view = getattr(probe, "view", None)
        source = cache if view is None else view(cache)
        tokens = np.concatenate([self.sample.tokens[:, None], self.sample.continuations], 1)[rows]
        for layer, offset in probe.pairs():
            if offset not in references or not (layer is None or layer in layers):
                continue
            positions = self.sample.positions[rows]
            hidden = None
            if layer is not None:
                taken = np.asarray(source.residual_array(layer)[positions], np.float32)
                hidden = torch.from_numpy(taken).to(device)
            last, first, previous, target = (
                torch.from_numpy(np.ascontiguousarray(values)).to(device)
                for values in (
                    tokens[:, offset],
                    tokens[:, 0],
                    tokens[:, offset - 1] if offset else np.full(len(rows), -1),
                    positions + offset,
                )
            )
            batch = ReadoutBatch(hidden, last, self.head, first, previous, target)
            logits = probe.logits(batch, layer, offset).float()
            self._keep(
                ReadingKey(name, layer, None, offset, "probe"), rows, references[offset], logits
            )

    def _keep(
        self, key: ReadingKey, rows: np.ndarray, reference: Reference, logits: "torch.Tensor"
    ) -> None:
        """Measure the logits `(n, vocab)` of the samples `rows`."""
        if key not in self.readings:
            self.readings[key] = PromptReading.empty(self.sample.count)
        compared = compare_pairs(reference, logits.float().contiguous())
        is_known = (compared.defined & reference.defined).cpu().numpy()
        has_text = is_known & (reference.text >= 0).cpu().numpy()
        top = compared.top
        measured = {
            "rank": (compared.ranks[0] + 1, is_known),
            "text_rank": (compared.ranks[1] + 1, has_text),
            "surprisal": (-value_at(reference.log_p, top), is_known),
            "nll": (compared.nll[0], is_known),
            "kl": (compared.kl, is_known),
        }
        reading = self.readings[key]
        for name, (values, known) in measured.items():
            numbers = values.float().cpu().numpy()
            reading.values[name][rows] = np.where(known, numbers, np.nan)
        reading.top[rows] = np.where(is_known, top.cpu().numpy(), -1)


def generate(
    runner: PromptRunner,
    target_layer: int,
    states: "torch.Tensor",
    state_tokens: np.ndarray,
    count: int,
    head: Any,
) -> "Iterator[tuple[int, torch.Tensor, np.ndarray]]":
    """Yield N, logits `(n, vocab)` and top tokens `(n,)` for N = 0 to `count` - 1.

    Each top token is the next one that the model reads behind the prompt.
    """
    import torch

    generated = np.zeros((len(state_tokens), 0), np.int64)
    for offset in range(count):
        tokens = runner.prompt.tokens(state_tokens, generated)
        stream = runner.clean_streams(tokens, [target_layer])[target_layer]
        logits = head(runner.read_states(target_layer, states, tokens, stream)[:, -1])
        top = torch.nan_to_num(logits, nan=-torch.inf).argmax(-1).cpu().numpy()
        yield offset, logits, top
        generated = np.concatenate([generated, top[:, None]], 1)


def other_samples(units: np.ndarray, seed: int) -> np.ndarray:
    """For each sample the number of one of another document, `(n,)` int64: a permutation.

    `units` `(n,)` are numbers of documents. Where one document has more than half of the samples,
    some get a state of their own document, and never their own unless there is one sample alone.
    """
    rng = np.random.default_rng(seed)
    _, numbers, sizes = np.unique(units, return_inverse=True, return_counts=True)
    order_of_unit = rng.permutation(len(sizes))
    order = np.lexsort((rng.random(len(units)), order_of_unit[numbers]))
    shift = min(int(sizes.max()), max(1, len(units) // 2))
    other = np.empty(len(units), np.int64)
    other[order] = np.roll(order, -shift)
    return other


def _by_prompt(
    entries: Sequence[PromptEntry],
) -> list[tuple[PatchedPrompt, list[PromptEntry]]]:
    """The entries of each prompt, which share its pass over the lower blocks."""
    members: dict[int, list[PromptEntry]] = {}
    for entry in entries:
        members.setdefault(id(entry.prompt), []).append(entry)
    return [(group[0].prompt, group) for group in members.values()]
