"""`residua intervene`: the model of a cache, run on from changed layers."""

from pathlib import Path
from typing import Any

import click

from ..console.options import (
    LAYERS,
    WHOLE_NUMBER,
    CommandT,
    JsonErrorGroup,
)
from .study_calls import StudyCall, run_study, study_command

MOST_POSITIONS = 4096
"""Default of --max-positions: every change is a run of the model."""


@click.group(cls=JsonErrorGroup)
def intervene() -> None:
    """Change layers in the model of a cache, and measure what it then says.

    Rows come from the cache, and the model runs on from the changed layer. The model is the one of
    the extraction, or that of --model; exit reads the cache alone.
    """


def model_options(command: CommandT) -> CommandT:
    """Add --model, --layers and --trust-remote-code."""
    for option in (
        click.option(
            "--trust-remote-code", is_flag=True, help="Run code that comes with the model."
        ),
        click.option("--layers", type=LAYERS, help="Layers to change.  [default: see above]"),
        click.option(
            "--model",
            metavar="MODEL",
            help="Folder or hub id where the model of the cache is now.",
        ),
    ):
        command = option(command)
    return command


def spacing_options(command: CommandT) -> CommandT:
    """Add --spacing and --offsets."""
    for option in (
        click.option(
            "--offsets",
            type=WHOLE_NUMBER,
            default=3,
            show_default=True,
            help="Predictions are read at the changed position and this many after it.",
        ),
        click.option(
            "--spacing",
            type=WHOLE_NUMBER,
            default=16,
            show_default=True,
            help="One position in this many of each sequence is changed.",
        ),
    ):
        command = option(command)
    return command


class Words(click.ParamType):
    """Two or more words between commas; the command gets a tuple."""

    name = "WORDS"

    def __init__(self, count: int | None = None) -> None:
        self.count = count

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        words = tuple(word.strip() for word in str(value).split(",") if word.strip())
        if not words or (self.count is not None and len(words) != self.count):
            number = "words" if self.count is None else f"{self.count} words"
            self.fail(f"{value!r} is not {number} between commas", param, ctx)
        return words


class Amounts(click.ParamType):
    """Numbers between commas, such as -1,0,0.5,1; the command gets a tuple."""

    name = "NUMBERS"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers; write it like 0,0.5,1", param, ctx)


@intervene.command("patch")
@click.option(
    "--kinds",
    type=Words(),
    default="zero,mean,resample",
    show_default=True,
    help="What a row becomes: zero, mean, resample (another position's), constant (the one with "
    "the least effect, fitted).",
)
@click.option("--passage", type=WHOLE_NUMBER, help="Number of the sequence whose map is drawn.")
@click.option(
    "--source",
    type=WHOLE_NUMBER,
    help="Number of the sequence whose rows are put into the passage.  [default: the mean row]",
)
@click.option(
    "--tokens",
    type=Words(2),
    help="Two words of one token each: the map shows their log-odds, such as he,she.",
)
@spacing_options
@model_options
@study_command(max_positions=MOST_POSITIONS)
def patch(call: StudyCall, **options: Any) -> Any:
    """Ablate rows of a layer, leave out blocks, and map one passage.

    Changes single positions of all layers below the last one, and reads the predictions there and
    after. PROBE is a causal basis whose span is ablated beside.

    \b
    residua intervene patch 3f2a --html patch.html
    residua intervene patch 3f2a --layers 2-4 --kinds mean,constant --max-positions 1k
    residua intervene patch 3f2a --passage 12 --source 14 --tokens he,she
    """
    from ..interventions.patch_study import study_patching

    return run_study(study_patching, call, **options)


@intervene.command("erase")
@click.option(
    "--k",
    type=WHOLE_NUMBER,
    default=4,
    show_default=True,
    help="Directions of each subspace.",
)
@spacing_options
@model_options
@study_command(max_positions=MOST_POSITIONS)
def erase(call: StudyCall, **options: Any) -> Any:
    """Erase what a layer tells of later predictions, beside controls.

    The subspaces come from the rows of the train split, without what tells of the next prediction;
    all layers below the last one by default. No PROBE is needed.

    \b
    residua intervene erase 3f2a --html erase.html
    residua intervene erase 3f2a --layers 3 --k 8 --offsets 5 --spacing 24
    """
    from ..interventions.erase_study import study_erasure

    return run_study(study_erasure, call, **options)


@intervene.command("edit")
@click.option(
    "--sentences",
    type=click.Path(path_type=Path),
    required=True,
    help="File of sentences with either word: .tsv, .csv, .jsonl with a column sentence, or .txt.",
)
@click.option(
    "--words",
    type=Words(2),
    default="he,she",
    show_default=True,
    help="The two words whose probabilities are compared.",
)
@click.option(
    "--directions",
    type=Words(),
    default="mean-difference,erasure,token,random",
    show_default=True,
    help="Directions to take away.",
)
@click.option(
    "--amounts",
    type=Amounts(),
    default="-1,0,0.5,1,1.5,2",
    show_default=True,
    help="Times the component that is taken away: 0 changes nothing, 1 removes it, less than 0 "
    "amplifies it.",
)
@model_options
@study_command(max_positions=MOST_POSITIONS)
def edit(call: StudyCall, **options: Any) -> Any:
    """Take a direction away: the gain between two words against the harm elsewhere.

    The direction is taken away at every position of the middle layer by default. PROBE adds one: a
    causal basis its first direction, a lens the direction of the words through it.

    \b
    residua intervene edit 3f2a --sentences winogender.tsv --html edit.html
    residua intervene edit 3f2a --sentences winogender.tsv --directions token --layers 3-5
    """
    from ..interventions.edit_study import study_edits

    return run_study(study_edits, call, **options)


@intervene.command("exit")
@click.option(
    "--thresholds",
    type=Amounts(),
    default="0.3,0.5,0.7,0.8,0.9,0.95,0.99",
    show_default=True,
    help="Probabilities of the lens's top token from which it speaks for the model.",
)
@study_command()
def early_exit(call: StudyCall, **options: Any) -> Any:
    """Stop at the first layer where a lens is confident: blocks saved, and agreement.

    The logit lens is always read; PROBE is a tuned lens or ridge probe. The model does not run.

    \b
    residua intervene exit 3f2a
    residua intervene exit 3f2a lens-81d9 --thresholds 0.8,0.9 --html exit.html
    """
    from ..interventions.exit_study import study_early_exit

    return run_study(study_early_exit, call, **options)
