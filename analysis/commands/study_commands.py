"""`residua study`: what the probes of a cache say about one question."""

from typing import Any

import click

from ..console.options import WHOLE_NUMBER, JsonErrorGroup
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
