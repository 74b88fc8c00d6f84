"""`residua study`: what the probes of a cache say about one question."""

from typing import Any

import click

from ..console.options import NUMBERS, complete_names
from .study_calls import StudyCall, finish_study, run_study, study_command


@click.group()
def study() -> None:
    """Study what the probes of a cache say about one question.

    A study reads caches and probes alone, and gives tables, pictures, and a page to read from top
    to bottom.
    """


@study.command("compare")
@click.option(
    "--by",
    type=click.Choice(["tokens", "depth"]),
    help="Compare two models token by token, or any models by relative depth.  [default: tokens "
    "for two caches, else depth]",
)
@study_command()
def compare(call: StudyCall, **options: Any) -> Any:
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

    caches, probes = load_caches_and_probes((call.cache, *call.probes), call.root)
    with Meter(call.quiet) as meter:
        result = study_compare(caches, probes, progress=meter.stage, **options)
    return finish_study([result], call)


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
