"""Edits of a direction of a layer with their side effects: `study_edits`.

A component of the rows is taken away, amount by amount. The gain is the change of the model's
preference between two words in sentences of a file, the harm is what happens to other texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import NotFoundError, UsageError
from ...cache.progress import Auto, StageProgress, show_stages
from ...probes.base.resampling import Interval, bootstrap_interval, resampling_counts
from ...probes.basis.layer_basis import LayerBasis
from ..evaluation.probe_names import name_readouts
from ..studies.results.study_figures import Panel, Series, StudyFigure
from ..studies.results.study_result import StudyResult, StudySubject, StudyTable
from .edit_directions import KINDS, LayerClasses, token_logit_row
from .effects import Effects
from .layer_runs import LayerRuns, choose_layers
from .row_changes import remove_component
from .word_sentences import WordSentences, read_word_sentences

if TYPE_CHECKING:
    import torch

    from ...cache.resuming.resumable_model import ResumableModel
    from ...cache.store.activation_cache import ActivationCache

AMOUNTS = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0)
RARE_SHARE = 0.2
"""Share of the read positions whose next tokens are the rarest ones of the train split."""


@dataclass(frozen=True)
class EditRow:
    """One amount of one direction of one layer: its gain in sentences and its harm elsewhere."""

    layer: int
    direction: str
    amount: float
    """Times the component that is taken away: 0 changes nothing, 1 removes, less than 0 amplifies.
    """
    sentences: int
    preference: float
    """Mean of p(first word) - p(second word) over the sentences."""
    preference_interval: Interval
    bias: float
    """Mean of |p(first word) - p(second word)|."""
    bias_interval: Interval
    log_odds: float | None
    """Mean of log p(first word) - log p(second word)."""
    gain: float
    """Bias of the unchanged model less this one."""
    gain_interval: Interval
    n: int
    """Positions of other text."""
    kl: float | None
    """KL(unchanged || edited) on it, nats."""
    kl_interval: Interval
    loss_change: float | None
    """Change of the cross-entropy of the text, nats."""
    loss_change_interval: Interval
    flips: float | None
    """Share of top tokens that change."""
    rare_loss_change: float | None
    """Change of the cross-entropy of rare tokens."""
    rare_n: int


def study_edits(
    cache: "ActivationCache",
    probes: "Sequence[Any] | Mapping[str, Any]" = (),
    *,
    sentences: str | Path,
    words: tuple[str, str] = ("he", "she"),
    model: "ResumableModel | torch.nn.Module | str | Path | None" = None,
    directions: Sequence[str] = KINDS,
    amounts: Sequence[float] = AMOUNTS,
    layers: Any = None,
    split: str = "test",
    max_positions: int = 4096,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: StageProgress | Auto | None = "auto",
) -> StudyResult:
    """Take components of `layers` away: gain in `sentences`, harm in the texts of `cache`.

    `directions` are of `KINDS`; each of `probes` adds one: a causal basis the span of its first
    direction, a lens the direction of the two words through it. The rows before either word in the
    train split are the classes of `mean-difference` and `erasure`. Edits apply at every position.
    Raises `UsageError` for directions that the cache does not give, `DataError` for a file without
    such sentences.
    """
    import torch

    if unknown := [kind for kind in directions if kind not in KINDS]:
        raise UsageError(f"there is no direction {unknown[0]!r}; they are {', '.join(KINDS)}")
    if not amounts or not np.isfinite(amounts).all():
        raise UsageError(f"amounts must be finite numbers, not {list(amounts)}")
    amounts = sorted({*map(float, amounts), 0.0})
    middle = cache.n_blocks // 2
    chosen = choose_layers(cache, [middle] if layers is None else layers)
    found = read_word_sentences(cache, sentences, words)
    tokens = _common_tokens(found)
    bases = _find_directions(cache, chosen, directions, probes, tokens, seed)
    runs = LayerRuns.prepare(
        cache,
        model,
        split=split,
        max_positions=max_positions,
        seed=seed,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    effects = Effects(runs.sample)
    odds: dict[tuple[int, str, float], np.ndarray] = {}
    edits = [(key, amount) for key in bases for amount in amounts]
    with show_stages(progress) as report, torch.inference_mode():
        for number, (key, amount) in enumerate(edits):
            change = remove_component(bases[key], amount)
            odds[(*key, amount)] = word_probabilities(runs, found, key[0], change)
            if report is not None:
                report("sentences", number + 1, len(edits))
        done, total = 0, runs.sample.count * len(chosen)
        for batch in runs.batches():
            for layer in chosen:
                rows, clean = batch.rows(layer), batch.clean_logits(layer)
                for key, amount in edits:
                    if key[0] == layer:
                        changed = remove_component(bases[key], amount)(rows, batch.numbers)
                        logits = clean if changed is rows else batch.logits(layer, changed)
                        effects.add((*key, amount), batch.numbers, clean, logits)
                done += len(batch.numbers)
                if report is not None:
                    report("other text", done, total)
    rare = rare_positions(runs)
    weights = resampling_counts(len(found.sentences), seed)
    rows_of = [_edit_row(effects, odds, key, amount, rare, weights) for key, amount in edits]
    undefined = effects.undefined(effects.changes, np.ones(runs.sample.count, bool))
    notes = [*found.describe(), *([note] if (note := runs.sample.units.note) else [])]
    if undefined:
        notes.append(f"{undefined} predictions are no distribution and do not count.")
    first, second = found.words
    return StudyResult(
        study="edit",
        title=f"Edited directions of {cache.manifest.model_name}",
        question=(
            f"How far does taking a direction away change the preference for {first!r} or "
            f"{second!r}, and what does it do to other text?"
        ),
        method=(
            "Rows h of a layer become h - amount ((h - reference) e) d at every position, with one "
            "direction d and its encoder e: the difference of class means, LEACE (Belrose et al., "
            "2306.03819), the words' own direction through a lens, a causal basis, or a random one "
            "as control. The gain is the fall of the mean |p(first) - p(second)| after the text "
            "before the word in each sentence (Winogender, Rudinger et al., 1804.09301); the harm "
            "is measured on whole sequences of the cache, from whose layers the model runs on."
        ),
        subject=StudySubject.of(
            cache,
            split,
            n=runs.sample.count,
            n_of="positions of other text",
            units=runs.sample.units.name,
            n_units=runs.sample.units.count,
        ),
        tables=[StudyTable("edits", "Edits by direction and amount", HEADINGS, rows_of)],
        figures=[_gain_figure(rows_of), _amount_figure(rows_of)],
        says=_sentences(rows_of, found),
        does_not_say=[
            "A smaller difference between two words is not a fair model: it is one measure of one "
            "pair of words.",
            "The texts of the cache may hold what the edit changes; their loss is no pure harm.",
        ],
        notes=notes,
        settings={
            "words": list(found.words),
            "directions": sorted({key[1] for key in bases}),
            "amounts": amounts,
            "layers": chosen,
            "seed": seed,
            "max_positions": max_positions,
        },
    )


HEADINGS = {
    "layer": "layer",
    "direction": "direction",
    "amount": "amount",
    "preference": "p(first) - p(second)",
    "bias": "mean |difference|",
    "gain": "gain",
    "gain_interval": "95 %",
    "kl": "KL elsewhere, nats",
    "kl_interval": "95 %",
    "loss_change": "CE change, nats",
    "flips": "top token changes",
    "rare_loss_change": "CE change, rare tokens",
    "sentences": "sentences",
    "n": "positions",
}


def _common_tokens(found: WordSentences) -> tuple[int, int]:
    """The tokens with which both words begin in most sentences."""
    pairs = [(sentence.first, sentence.second) for sentence in found.sentences]
    return max(set(pairs), key=lambda pair: (pairs.count(pair), pair))


def _find_directions(
    cache: "ActivationCache",
    layers: list[int],
    kinds: Sequence[str],
    probes: Any,
    tokens: tuple[int, int],
    seed: int,
) -> dict[tuple[int, str], LayerBasis]:
    """(layer, name) -> direction."""
    named = dict(probes) if isinstance(probes, Mapping) else None
    if named is None:
        named = dict(zip(name_readouts(list(probes)), probes, strict=True)) if probes else {}
    if not kinds and not named:
        raise UsageError(f"give a direction at least: {', '.join(KINDS)}, or a probe")
    found: dict[tuple[int, str], LayerBasis] = {}
    for layer in layers:
        classes = LayerClasses.collect(cache, layer, tokens, seed)
        for kind in kinds:
            row = token_logit_row(cache, tokens) if kind == "token" else None
            found[layer, kind] = classes.direction(kind, logit_row=row, seed=seed)
        for name, probe in named.items():
            found[layer, name] = _probe_direction(cache, classes, name, probe, tokens)
    return found


def _probe_direction(
    cache: "ActivationCache", classes: LayerClasses, name: str, probe: Any, tokens: tuple[int, int]
) -> LayerBasis:
    """The first direction of a causal basis, or the words' direction through a lens."""
    layer = classes.layer
    bases = getattr(probe, "bases_", None)
    if bases is not None:
        if layer not in bases:
            raise NotFoundError(f"{name} has no basis of layer {layer}; give its --layers")
        basis = bases[layer]
        return LayerBasis(basis.encoder[:1], basis.decoder[:1], basis.reference)
    residual_map = getattr(probe, "residual_map", None)
    lens_map = None if residual_map is None else residual_map(layer, 0)
    if lens_map is None:
        raise UsageError(
            f"{name} gives no direction of layer {layer}: expected a causal basis, or a lens that "
            "maps this layer to the last one"
        )
    return classes.direction("token", lens_map=lens_map, logit_row=token_logit_row(cache, tokens))


def word_probabilities(
    runs: LayerRuns, found: WordSentences, layer: int, change: Any
) -> np.ndarray:
    """log p of both words after each sentence, edited at `layer`, `(sentences, 2)` float64.

    Sentences of equal length run together; nothing is padded.
    """
    import torch

    model = runs.model
    result = np.empty((len(found.sentences), 2))
    by_length: dict[int, list[int]] = {}
    for number, sentence in enumerate(found.sentences):
        by_length.setdefault(len(sentence.tokens), []).append(number)

    def edit(stream: "torch.Tensor") -> "torch.Tensor":
        rows = stream.float().flatten(0, 1)
        changed = change(rows, np.zeros(len(rows), np.int64))
        return stream if changed is rows else changed.view(stream.shape)

    for length, numbers in by_length.items():
        most = max(1, (64 << 20) // (4 * runs.cache.vocab * length))
        for start in range(0, len(numbers), most):
            part = numbers[start : start + most]
            ids = np.array([found.sentences[number].tokens for number in part], np.int64)
            logits = model.run(ids, changes={layer: edit})[:, -1].double().log_softmax(-1)
            pairs = [[found.sentences[n].first, found.sentences[n].second] for n in part]
            index = torch.tensor(pairs, device=logits.device)
            result[part] = logits.gather(1, index).cpu().numpy()
    return result


def rare_positions(runs: LayerRuns) -> np.ndarray:
    """Bool mask `(n,)`: the next token of the text is among the rarest of the train split.

    Tokens count as rare from the rarest on, up to `RARE_SHARE` of the positions read.
    """
    from ..studies.trajectories.position_sample import choose_positions
    from .layer_runs import MEAN_POSITIONS

    cache, sample = runs.cache, runs.sample
    train = choose_positions(cache, "train", MEAN_POSITIONS, sample.seed)
    counts = np.bincount(train.tokens, minlength=cache.vocab)
    texts = sample.text_tokens
    known = texts >= 0
    of_position = np.where(known, counts[np.maximum(texts, 0)], np.iinfo(np.int64).max)
    limit = np.quantile(of_position[known], RARE_SHARE) if known.any() else -1
    return known & (of_position <= limit)


def _edit_row(
    effects: Effects,
    odds: Mapping[tuple[int, str, float], np.ndarray],
    key: tuple[int, str],
    amount: float,
    rare: np.ndarray,
    weights: np.ndarray,
) -> EditRow:
    log_p = odds[(*key, amount)]
    p = np.exp(log_p)
    difference = p[:, 0] - p[:, 1]
    unchanged = np.exp(odds[(*key, 0.0)])
    gain = np.abs(unchanged[:, 0] - unchanged[:, 1]) - np.abs(difference)
    ones = np.ones(len(p))
    of_text = (*key, amount)
    kl, kl_interval = effects.mean(of_text, "kl")
    loss, loss_interval = effects.mean(of_text, "loss_change")
    of_rare = np.where(rare, effects.values(of_text, "loss_change"), np.nan)
    log_odds = log_p[:, 0] - log_p[:, 1]
    return EditRow(
        layer=key[0],
        direction=key[1],
        amount=amount,
        sentences=len(p),
        preference=float(difference.mean()),
        preference_interval=bootstrap_interval(ones, difference, weights),
        bias=float(np.abs(difference).mean()),
        bias_interval=bootstrap_interval(ones, np.abs(difference), weights),
        log_odds=float(log_odds.mean()) if np.isfinite(log_odds).all() else None,
        gain=float(gain.mean()),
        gain_interval=bootstrap_interval(ones, gain, weights),
        n=effects.count(of_text),
        kl=kl,
        kl_interval=kl_interval,
        loss_change=loss,
        loss_change_interval=loss_interval,
        flips=effects.mean(of_text, "flip")[0],
        rare_loss_change=effects.sample.mean(of_rare)[0],
        rare_n=int(np.isfinite(of_rare).sum()),
    )


def _curves(rows: list[EditRow]) -> dict[str, list[EditRow]]:
    """Name of a curve -> its rows by amount; the layer is named if there are several."""
    several = len({row.layer for row in rows}) > 1
    curves: dict[str, list[EditRow]] = {}
    for row in rows:
        name = f"{row.direction}, layer {row.layer}" if several else row.direction
        curves.setdefault(name, []).append(row)
    return curves


def _gain_figure(rows: list[EditRow]) -> StudyFigure:
    series = []
    for name, curve in _curves(rows).items():
        removing = [row for row in curve if row.amount >= 0 and row.kl is not None]
        series.append(
            Series(
                name,
                [row.kl or 0.0 for row in removing],
                [row.gain for row in removing],
                low=[row.gain_interval[0] for row in removing],
                high=[row.gain_interval[1] for row in removing],
                names=[f"amount {row.amount:g}" for row in removing],
            )
        )
    panel = Panel(
        "Gain against harm",
        "harm: KL on other text, nats",
        "gain",
        series,
        reference=0.0,
        reference_label="unchanged",
    )
    return StudyFigure(
        "gain-harm",
        "Gain, the fall of the mean |p(first) - p(second)|, against harm. Each curve is one "
        "direction, from amount 0 at the left on.",
        [[panel]],
    )


def _amount_figure(rows: list[EditRow]) -> StudyFigure:
    panels = []
    for measure, label in (
        ("preference", "p(first) - p(second)"),
        ("kl", "KL on other text, nats"),
        ("loss_change", "CE change, nats"),
    ):
        series = []
        for name, curve in _curves(rows).items():
            intervals = [getattr(row, f"{measure}_interval") for row in curve]
            series.append(
                Series(
                    name,
                    [row.amount for row in curve],
                    [getattr(row, measure) for row in curve],
                    low=[low for low, _ in intervals],
                    high=[high for _, high in intervals],
                )
            )
        panels.append(Panel(label, "amount taken away", label, series))
    return StudyFigure(
        "amounts", "Preference in the sentences, and harm, by amount; 1 removes.", [panels]
    )


def _sentences(rows: list[EditRow], found: WordSentences) -> list[str]:
    clean = next(row for row in rows if row.amount == 0)
    first, second = found.words
    says = [
        f"Unchanged, p({first}) - p({second}) is {clean.preference:+.3g}"
        f"{_interval(clean.preference_interval)} and its mean size {clean.bias:.3g} "
        f"(n = {clean.sentences} sentences)."
    ]
    for name, curve in _curves(rows).items():
        row = min(curve, key=lambda row: abs(row.amount - 1.0))
        low, high = row.gain_interval
        if low is not None and high is not None and low <= 0 <= high:
            gain = f"no clear gain{_interval(row.gain_interval)}"
        else:
            gain = f"gain {row.gain:+.3g}{_interval(row.gain_interval)}"
        kl = "undefined" if row.kl is None else f"{row.kl:.3g}{_interval(row.kl_interval)}"
        says.append(f"{name}, amount {row.amount:g}: {gain}; KL elsewhere {kl} (n = {row.n}).")
    return says


def _interval(interval: Interval) -> str:
    low, high = interval
    return "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"
