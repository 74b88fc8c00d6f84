"""`residua study`: what the probes of a cache say about one question."""

from pathlib import Path
from typing import Any

import click

from ..console.options import LAYERS, NUMBERS, WHOLE_NUMBER, JsonErrorGroup
from .study_calls import StudyCall, run_every_study, run_study, study_command


@click.group(cls=JsonErrorGroup)
def study() -> None:
    """Study what the probes of a cache say about one question.

    A study reads caches and probes alone, and gives tables, pictures, and a page to read from top
    to bottom.
    """


@study.command("all")
@study_command()
def all_studies(call: StudyCall, **options: Any) -> Any:
    """Make every study that CACHE and its probes allow, and say why not the others.

    Without PROBE, all probes of CACHE under the root are read. Studies of lenses share one sample
    of positions and one pass over its rows. What CACHE cannot answer is named with the reason, and
    with the command that would answer it.

    \b
    residua study all 3f2a
    residua study all 3f2a lens-81d9 --html studies.html --png figures --csv tables
    """
    from ..studies.all_studies import run_all_studies

    return run_every_study(run_all_studies, call, **options)


@study.command("depth")
@click.option(
    "--step",
    multiple=True,
    metavar="ITERATION=CACHE",
    help="Cache of the same texts by the model after so many iterations of training; give at least "
    "two, the last one of the finished model.",
)
@click.option(
    "--learned",
    metavar="LABEL",
    help="Label of sequences with the iteration at which they were learned.",
)
@study_command()
def prediction_depth(call: StudyCall, step: tuple[str, ...], **options: Any) -> Any:
    """Find after how many layers predictions settle, for which tokens, and what goes with it.

    The prediction depth of a position is the smallest layer from which the top token of a lens is
    the model's own to the end. It is given by class and frequency of the next token, with its
    correlations with the loss and, from caches of checkpoints, with the iteration learned. The
    logit lens is always read; PROBE is any lens at offset 0.

    \b
    residua study depth 3f2a lens-81d9 --html depth.html
    residua study depth 3f2a lens-81d9 --step 1000=5a05 --step 2000=3f2a
    """
    from ...cache.store.catalog import find_cache
    from ..studies.prediction_depth.learned_iterations import parse_checkpoints
    from ..studies.prediction_depth.prediction_depth_study import study_prediction_depth

    names = parse_checkpoints(step)
    found = {iteration: find_cache(name, call.root) for iteration, name in names.items()}
    return run_study(study_prediction_depth, call, checkpoints=found or None, **options)


@study.command("essential-layers")
@click.option(
    "--documents",
    default="documents",
    show_default=True,
    help="Label with the number of documents, or pairs, in the context.",
)
@click.option(
    "--gold",
    default="gold",
    show_default=True,
    help="Label with the position of the one with the answer, from 0.",
)
@click.option(
    "--question",
    help="Label of the question, if one stands in several sequences: differences are then within "
    "questions.  [default: question, if there is such a label]",
)
@study_command(split="all", max_positions=None)
def essential_layers(call: StudyCall, **options: Any) -> Any:
    """Find where answers first appear among the layers, and from where they stay.

    CACHE keeps the positions of answers (extract --no-pack --positions answer), with labels for the
    number of documents in the context and the position of the one with the answer. The logit lens
    is always read; PROBE is a tuned lens or ridge probe of this cache or of another one of the
    model.

    \b
    residua study essential-layers 3f2a
    residua study essential-layers 3f2a lens-81d9 --question question --html essential.html
    """
    from ..studies.essential_layers.depth_study import study_essential_layers

    return run_study(study_essential_layers, call, **options)


@study.command("future-lens")
@click.option("--offsets", type=NUMBERS, help="Offsets N.  [default: those of the probes, or 0-3]")
@click.option("--layers", type=LAYERS, help="Layers to read.  [default: those of the probes]")
@click.option(
    "--keep",
    type=click.Choice(["none", "correct", "agree"]),
    default="none",
    show_default=True,
    help="Pairs to keep: all (none); those whose model token after t+N is the text's (correct); "
    "those for which this holds at all of t to t+N (agree).",
)
@click.option(
    "--first-only",
    is_flag=True,
    help="Only pairs from the first kept position of each sequence, such as the end of a context.",
)
@click.option(
    "--names",
    type=click.Choice(["document", "data", "any", "none"]),
    default="document",
    show_default=True,
    help="Where a name of several tokens must occur again to count as one.",
)
@click.option(
    "--names-mask",
    metavar="FILE.npy",
    type=click.Path(path_type=Path),
    help="Instead of --names: a bool array of the positions whose next token continues an entity.",
)
@click.option("--sequence", type=WHOLE_NUMBER, help="Sequence of the picture.  [default: telling]")
@click.option(
    "--start",
    type=WHOLE_NUMBER,
    default=0,
    show_default=True,
    help="First token of the picture in --sequence.",
)
@click.option(
    "--width", type=WHOLE_NUMBER, default=12, show_default=True, help="Tokens of the picture."
)
@study_command()
def future_lens(call: StudyCall, names: str, names_mask: Path | None, **options: Any) -> Any:
    """Find what layers say of the tokens after the next one.

    PROBEs (ridge, lenses, vocabulary probes, their controls) predict the model's token after t+N
    from the state at t. Beside them: the logit lens, the bigram, and the marginalised bigram,
    which like the probes reads no token after t. Precision, surprisal and KL by layer and N, the
    best layers, calibration, names of several tokens, and the Future Lens picture of a passage.

    \b
    residua fit ridge 3f2a --offsets 0-3
    residua study future-lens 3f2a ridge-3f2a --html future.html
    residua study future-lens 3f2a ridge-3f2a --keep agree --sequence 4 --start 20
    """
    from ..studies.future_lens.repeated_names import read_names_mask
    from ..studies.future_lens.study_offsets import study_future_lens

    chosen = None if names == "none" else names
    mask = chosen if names_mask is None else read_names_mask(names_mask)
    return run_study(study_future_lens, call, names=mask, **options)


@study.command("tuned-lens")
@click.option(
    "--label",
    help="Label of sequences with classes that are told from the entropy profiles of lenses.",
)
@click.option(
    "--transfer-positions",
    type=WHOLE_NUMBER,
    default=1024,
    show_default=True,
    help="Positions at which translators are applied to the states of all layers; 0 for none.",
)
@click.option(
    "--sequence",
    type=WHOLE_NUMBER,
    help="Sequence of the passage of the heatmaps.  [default: a telling passage]",
)
@click.option(
    "--start", type=WHOLE_NUMBER, help="Index of its first token in the sequence.  [default: 0]"
)
@click.option(
    "--width",
    type=click.IntRange(min=1),
    default=24,
    show_default=True,
    help="Tokens of the passage.",
)
@click.option(
    "--token", help="Token whose rank is tracked in the passage, such as '␣the' (␣: a space)."
)
@study_command()
def tuned_lens(call: StudyCall, **options: Any) -> Any:
    """Measure lenses layer by layer: perplexity, KL, bias, drift of the basis, early guesses.

    The logit lens is always read; PROBE is any lens at offset 0. Translators of affine lenses
    (tuned lens, ridge) are applied to all layers, and their penalty is set against the similarity
    of the layers' covariances, from moments that fits kept with the cache.

    \b
    residua study tuned-lens 3f2a lens-81d9 ridge-a2 --html lenses.html
    residua study tuned-lens 3f2a lens-81d9 --sequence 12 --start 40 --token '␣the' --png figures
    residua study tuned-lens 3f2a lens-81d9 --label language
    """
    from ..studies.tuned_lens.lens_quality import study_tuned_lens

    return run_study(study_tuned_lens, call, **options)
