"""`residua study`: what the probes of a cache say about one question."""

from typing import Any

import click

from .study_calls import StudyCall, run_study, study_command


@click.group()
def study() -> None:
    """Study what the probes of a cache say about one question.

    A study reads caches and probes alone, and gives tables, pictures, and a page to read from top
    to bottom.
    """


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
    "questions.",
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
