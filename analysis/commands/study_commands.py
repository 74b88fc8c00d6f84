"""`residua study`: what the probes of a cache say about one question."""

from pathlib import Path
from typing import Any

import click

from ..console.options import LAYERS, NUMBERS, WHOLE_NUMBER, JsonErrorGroup, complete_names
from .study_calls import StudyCall, finish_study, run_every_study, run_study, study_command


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


@study.command("anomaly")
@click.option(
    "--arm", default="arm", show_default=True, help="Label that tells clean texts from others."
)
@click.option("--clean", default="clean", show_default=True, help="Its value for clean texts.")
@click.option(
    "--benign",
    default="benign",
    show_default=True,
    help="Its value for a control that is no anomaly, if there is one.",
)
@click.option(
    "--question",
    default="question",
    show_default=True,
    help="Label of what texts have in common, if there is one: intervals resample its values.",
)
@click.option(
    "--template",
    default="template",
    show_default=True,
    help="Label of the kind of an anomaly, if there is one: each is left out once.",
)
@click.option(
    "--last",
    type=WHOLE_NUMBER,
    default=1,
    show_default=True,
    help="Number of last positions to average, in a cache of whole texts.",
)
@click.option(
    "--option",
    "options",
    multiple=True,
    help="A possible answer, repeatable; log p of all at every layer makes further features.",
)
@click.option(
    "--splits",
    type=WHOLE_NUMBER,
    default=5,
    show_default=True,
    help="Halves of the questions that are drawn; detectors are fitted on each.",
)
@study_command(split="all")
def anomaly(call: StudyCall, **options: Any) -> Any:
    """Tell anomalous texts, such as prompt injections, from clean ones.

    CACHE holds texts with a label that says which are clean, such as those of `residua data
    injection`. Detectors are fitted on clean texts, on trajectories under the logit lens and each
    PROBE, a tuned lens or ridge probe; the distance of the states is the baseline.

    \b
    residua data injection kv.jsonl injection.jsonl
    residua extract MODEL injection.jsonl --no-pack --positions answer
    residua study anomaly 3f2a lens-81d9 ridge-3f2a --html anomaly.html
    """
    from ..studies.anomaly.anomaly_study import study_anomaly

    return run_study(study_anomaly, call, **options)


@study.command("compare")
@click.option(
    "--by",
    type=click.Choice(["tokens", "depth"]),
    help="Compare two models token by token, or any models by relative depth.  [default: tokens "
    "for two caches, else depth]",
)
@click.option(
    "--beside",
    metavar="CACHE",
    multiple=True,
    shell_complete=complete_names,
    help="Cache to compare with, like one named among the arguments. Can be given again.",
)
@study_command()
def compare(call: StudyCall, beside: tuple[str, ...], **options: Any) -> Any:
    """Compare models on the same tokens, or by relative depth.

    Name two caches or more, and probes of any of their models among them. Two caches of the same
    texts are joined token by token: which tokens differ, by how much, from which layer on, and how
    alike the residual streams are. Other caches are compared by how well lenses read each model
    over relative depth: where the logit lens fails, and where it gives the input token back.

    \b
    residua study compare 3f2a 91bc --html compare.html
    residua study compare 3f2a 91bc ridge-3f2a ridge-91bc
    residua study compare 3f2a 91bc 77d0 --by depth
    """
    from ..console.terminal import Meter
    from ..studies.comparison.model_comparison import study_compare
    from .study_inputs import load_caches_and_probes

    caches, probes = load_caches_and_probes((call.cache, *beside, *call.probes), call.root)
    with Meter(call.quiet) as meter:
        result = study_compare(caches, probes, progress=meter.stage, **options)
    return finish_study([result], call)


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


@study.command("icl")
@click.option(
    "--kind", default="kind", show_default=True, help="Label of the kind of text, if there is one."
)
@click.option(
    "--shots",
    default="shots",
    show_default=True,
    help="Label with the number of examples in the context.",
)
@click.option("--offsets", type=NUMBERS, help="Offsets N to read.  [default: those of the probes]")
@study_command()
def in_context(call: StudyCall, **options: Any) -> Any:
    """Measure how far ahead states foresee what examples in the context determine.

    CACHE holds texts of `residua data icl`. PROBE is a ridge probe, lens or vocabulary probe with
    several offsets. The baseline are bigrams of the train split, or those among PROBE (`residua fit
    baseline OTHER chain marginal`), with which the train split can be read, too.

    \b
    residua data icl icl.jsonl --kind period,map --shots 0-4
    residua extract MODEL icl.jsonl --no-pack --positions answer
    residua fit ridge 3f2a --offsets 0-3
    residua study icl 3f2a ridge-3f2a --html icl.html
    residua study icl 91c0 ridge-3f2a chain-3f2a marginal-3f2a --split all
    """
    from ..studies.in_context.shot_study import study_in_context

    return run_study(study_in_context, call, **options)


@study.command("jacobian")
@click.option("--track", help='A token whose rank is measured, such as " Paris".')
@click.option(
    "--offsets",
    type=NUMBERS,
    default="0-3",
    show_default=True,
    help="Offsets N: precision of the model's token N further ahead.",
)
@study_command()
def jacobian(call: StudyCall, **options: Any) -> Any:
    """Measure a Jacobian lens beside the logit lens and fitted lenses.

    PROBE is a file of a Jacobian lens (.pt in the published format, or .safetensors), a saved
    probe of that kind, or another lens of the model, such as a ridge probe, to stand beside it.
    The lens is read as published, and with the means of the train split corrected.

    \b
    residua study jacobian 3f2a gpt2_jacobian_lens.pt ridge-3f2a --html jacobian.html
    residua study jacobian 3f2a lens.safetensors --track " Paris" --offsets 0,1
    """
    from ...cache.store.catalog import find_cache
    from ..console.terminal import Meter
    from ..studies.jacobian.jacobian_study import study_jacobian
    from .study_inputs import load_lenses

    cache = find_cache(call.cache, call.root)
    lenses = load_lenses(cache, call.probes, call.root)
    with Meter(call.quiet) as meter:
        result = study_jacobian(cache, lenses, progress=meter.stage, **options)
    return finish_study([result], call)


@study.command("transfer")
@click.option(
    "--to",
    metavar="CACHE",
    multiple=True,
    required=True,
    shell_complete=complete_names,
    help="Cache to read the probes on, too: of a fine-tuned model, or of other texts. Can be given "
    "again.",
)
@study_command()
def transfer(call: StudyCall, to: tuple[str, ...], **options: Any) -> Any:
    """Measure what a lens loses on another model, or on other texts, than it was fitted on.

    PROBE was fitted on CACHE, or on one of those of --to: lenses of the same kind that were fitted
    on a cache itself are what the others are compared with.

    \b
    residua study transfer 3f2a lens-3f2a --to 91bc
    residua study transfer 3f2a base=lens-3f2a tuned=lens-91bc --to 91bc --html transfer.html
    """
    from ...cache.store.catalog import find_cache
    from ..console.terminal import Meter
    from ..studies.comparison.lens_transfer import study_transfer
    from .study_inputs import load_probes

    caches = [find_cache(name, call.root) for name in (call.cache, *to)]
    probes = load_probes(call.probes, call.root)
    with Meter(call.quiet) as meter:
        result = study_transfer(caches[0], probes, to=caches[1:], progress=meter.stage, **options)
    return finish_study([result], call)


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


@study.command("vision")
@click.option(
    "--image",
    type=WHOLE_NUMBER,
    help="Number of the image in the cache whose patches are shown.  [default: the first read]",
)
@click.option(
    "--label",
    help="Label that names the class of each image.  [default: label, if the cache has it]",
)
@study_command()
def vision(call: StudyCall, **options: Any) -> Any:
    """Read the class tokens and patches of a cache of images, layer by layer.

    CACHE is one of an image classifier (extract MODEL IMAGES). At the class token of every image,
    the logit lens and PROBEs are compared with the model and with the label; of one image, the
    probability of the model's class is shown on the grid of patches. --max-positions counts images.

    \b
    residua study vision 3f2a
    residua study vision 3f2a lens-81d9 --image 7 --html vision.html
    """
    from ..studies.vision.class_token_study import study_vision

    return run_study(study_vision, call, **options)
