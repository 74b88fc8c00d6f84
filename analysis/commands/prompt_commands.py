"""`residua intervene prompt`, `residua fit prompt`, `residua fit jacobian`: the model is asked."""

from pathlib import Path
from typing import Any

import click

from ..console.options import (
    LAYERS,
    MASKS,
    NUMBER,
    NUMBERS,
    WHOLE_NUMBER,
    OptionDecorator,
    WordsCommand,
    cache_argument,
    checkpoint_option,
    device_option,
    drop_first_option,
    layers_option,
    out_option,
    residua_command,
)
from .intervention_commands import intervene, model_options
from .study_calls import StudyCall, run_study, study_command

where_option: OptionDecorator = click.option(
    "--where",
    type=click.Choice(MASKS),
    help="Only states whose next token continues a word, or a capitalised word (names).",
)
"""Adds --where."""


@intervene.command("prompt")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="A prompt whose last token takes the state; simlens is a start token and the state's own "
    "token. May be given several times.  [default: the four of Future Lens, and simlens]",
)
@click.option(
    "--offsets",
    type=NUMBERS,
    default="0-3",
    show_default=True,
    help="Offsets N: what the model says after the prompt and the tokens t+1 to t+N.",
)
@click.option(
    "--into",
    "target_layer",
    type=WHOLE_NUMBER,
    help="Layer at which states are put in.  [default: the layer they come from]",
)
@click.option(
    "--free", is_flag=True, help="Also let prompts go on with their own tokens, not the text's."
)
@click.option(
    "--rivals/--no-rivals",
    default=True,
    show_default=True,
    help="Fit a bigram and a vocabulary probe of state and next token to compare with.",
)
@where_option
@click.option(
    "--passage",
    type=WHOLE_NUMBER,
    help="Number of the sequence to draw.  [default: the first of the split]",
)
@click.option(
    "--passage-tokens",
    type=WHOLE_NUMBER,
    default=16,
    show_default=True,
    help="Tokens of the passage to draw; 0 draws none.",
)
@model_options
@study_command(max_positions=1024)
def intervene_prompt(
    call: StudyCall, prompts: tuple[str, ...], where: str | None, **options: Any
) -> Any:
    """Ask the model by a prompt what a cached state says of later tokens.

    The prompt's last token takes the state of t, the tokens t+1 to t+N of the text follow. Beside
    each precision stands that with states of other documents. PROBE is a learned prompt (residua
    fit prompt), or a probe to compare with.

    \b
    residua intervene prompt 3f2a
    residua intervene prompt 3f2a prompt-3f2a --offsets 1 --where names --html prompts.html
    residua intervene prompt 3f2a --prompt simlens --into 4 --free --no-rivals
    """
    from ..interventions.prompts.prompt_study import DEFAULT_PROMPTS, study_prompts

    if where is not None:
        options["where"] = _mask(where, call.cache, call.root)
    return run_study(study_prompts, call, prompts=prompts or DEFAULT_PROMPTS, **options)


def _mask(where: str, cache: str, root: Path) -> Any:
    """The mask of positions that `where` names."""
    from ...cache.store.catalog import find_cache
    from ..token_texts.position_masks import MASKS as MASK_FUNCTIONS

    return MASK_FUNCTIONS[where](find_cache(cache, root))


@click.command("prompt", cls=WordsCommand)
@cache_argument()
@click.option(
    "--offsets",
    type=NUMBERS,
    default="1",
    show_default=True,
    help="Offsets N: after the prompt and the tokens t+1 to t+N, say what the model said at t+N.",
)
@layers_option
@click.option(
    "--tokens", type=WHOLE_NUMBER, default=10, show_default=True, help="Embeddings of a prompt."
)
@click.option(
    "--share",
    type=click.Choice(["none", "offsets", "all"]),
    default="none",
    show_default=True,
    help="One prompt for each layer and offset, for the offsets of a layer, or for all.",
)
@click.option(
    "--steps", type=WHOLE_NUMBER, default=400, show_default=True, help="Most steps of a prompt."
)
@click.option(
    "--batch", type=WHOLE_NUMBER, default=32, show_default=True, help="States of one step."
)
@click.option(
    "--lr",
    type=NUMBER,
    help="Learning rate in units of the embeddings' root mean square.  [default: the best of a "
    "short sweep]",
)
@click.option(
    "--positions",
    type=WHOLE_NUMBER,
    default=8192,
    show_default=True,
    help="Train positions to fit on.",
)
@click.option(
    "--seed", type=WHOLE_NUMBER, default=0, show_default=True, help="Seed of positions and batches."
)
@where_option
@drop_first_option
@click.option("--model", help="Folder or hub id of the model.  [default: where it was]")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@device_option
@out_option
@checkpoint_option
@residua_command
def fit_prompt(
    root: Path,
    quiet: bool,
    cache: str,
    where: str | None,
    model: str | None,
    trust_remote_code: bool,
    device: str,
    out: Path | None,
    checkpoint: Path | None,
    **parameters: Any,
) -> Any:
    """Learn prompts after which the model says what a state knows of later tokens.

    The embeddings of a prompt are fitted by KL to what the model said in the text; the state is put
    in at the prompt's last position. States and targets come from CACHE, the model runs the prompt
    alone. After an interruption, the same command goes on where the fit stopped.

    \b
    residua fit prompt 3f2a --layers 1-3
    residua fit prompt 3f2a --offsets 1-3 --share offsets --where names
    residua intervene prompt 3f2a prompt-3f2a --html prompts.html
    """
    from ...cache.number_ranges import absolute_numbers
    from ...cache.optional_libraries import require_extra
    from ...cache.store.catalog import find_cache
    from ...probes.prompts.learned_prompt import LearnedPrompt, model_of_cache
    from ...probes.saved.library import checkpoint_path, new_probe_path
    from ...probes.saved.save import save_probe
    from ..console.messages import print_fit
    from ..console.terminal import Meter

    require_extra("extract", "running a model")
    source = find_cache(cache, root)
    parameters["layers"] = absolute_numbers(parameters["layers"], source.n_blocks)
    probe = LearnedPrompt(**parameters)
    mark = f"-{where}" if where else ""
    folder = _marked(new_probe_path(root, probe, source.id, out), mark, out)
    kept = checkpoint_path(root, probe, source.id, checkpoint, mark)
    mask = None if where is None else _mask(where, cache, root)
    loaded = model_of_cache(source, model, device, trust_remote_code)
    with Meter(quiet) as meter:
        probe.fit(source, loaded, where=mask, checkpoint=kept, progress=meter.stage)
    path = save_probe(probe, folder)
    metrics = probe.metrics()
    value = {"probe": str(path), "cache": source.id, "metrics": metrics}

    def print_prompt() -> None:
        print_fit(probe.kind, source.id, path, metrics, root, can_be_evaluated=False)
        print(f"next: residua intervene prompt {source.id[:12]} {_name(path, root)}")

    return value, print_prompt


@click.command("jacobian", cls=WordsCommand)
@cache_argument()
@click.option("--layers", type=LAYERS, help="Layers to read.  [default: all below the last one]")
@click.option(
    "--prompts", type=WHOLE_NUMBER, default=1000, show_default=True, help="Most prompts to average."
)
@click.option(
    "--length",
    type=WHOLE_NUMBER,
    default=128,
    show_default=True,
    help="Most tokens of a prompt, the beginning of a sequence.",
)
@click.option(
    "--offset",
    type=WHOLE_NUMBER,
    help="Only the effect on the position N later, by random signs.  [default: on all later ones]",
)
@click.option(
    "--skip-first",
    type=WHOLE_NUMBER,
    default=16,
    show_default=True,
    help="First positions of a prompt that do not count.",
)
@click.option(
    "--centered/--not-centered",
    default=True,
    show_default=True,
    help="Correct the mean state of each layer: read head(J (h - mean_l) + mean_L).",
)
@click.option(
    "--split", default="train", show_default=True, help="Split of the prompts and the means."
)
@click.option(
    "--batch-tokens",
    type=WHOLE_NUMBER,
    default=512,
    show_default=True,
    help="Positions of the prompts that go backward together.",
)
@click.option(
    "--seed", type=WHOLE_NUMBER, default=0, show_default=True, help="Seed of the draw of prompts."
)
@click.option("--model", help="Folder or hub id of the model.  [default: where it was]")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@device_option
@out_option
@checkpoint_option
@residua_command
def fit_jacobian(
    root: Path,
    quiet: bool,
    cache: str,
    layers: tuple[int, ...] | None,
    model: str | None,
    out: Path | None,
    checkpoint: Path | None,
    **options: Any,
) -> Any:
    """Average the Jacobian of each layer to the last one: a lens.

    The model's blocks above the lowest layer run backward, from states of CACHE, once for each of
    the d_model components of the last layer. After an interruption, the same command goes on where
    the fit stopped.

    \b
    residua fit jacobian 3f2a --prompts 100
    residua fit jacobian 3f2a --layers 2-4 --offset 1 --not-centered
    residua evaluate 3f2a jacobian-3f2a
    """
    from ...cache.files.json_files import json_digest
    from ...cache.number_ranges import absolute_numbers
    from ...cache.optional_libraries import require_extra
    from ...cache.store.catalog import find_cache
    from ...probes.jacobian.jacobian_fit import fit_jacobian_lens
    from ...probes.lens.jacobian_lens import JacobianLens
    from ...probes.saved.library import checkpoint_path, new_probe_path
    from ...probes.saved.save import save_probe
    from ..console.messages import print_fit
    from ..console.terminal import Meter

    require_extra("extract", "running a model")
    source = find_cache(cache, root)
    offset, centered = options["offset"], options["centered"]
    unfitted = JacobianLens(offsets=0 if offset is None else offset, centered=centered)
    read = absolute_numbers(layers, source.n_blocks)
    # What the prompts are decides the lens, and is no parameter of it.
    names = ("prompts", "length", "skip_first", "split", "seed")
    drawn = {"layers": list(read or ()), **{name: options[name] for name in names}}
    mark = f"-{json_digest(drawn)[:8]}"
    folder = _marked(new_probe_path(root, unfitted, source.id, out), mark, out)
    kept = checkpoint_path(root, unfitted, source.id, checkpoint, mark)
    with Meter(quiet) as meter:
        lens = fit_jacobian_lens(
            source,
            model,
            layers=read,
            checkpoint=kept,
            progress=meter.stage,
            **options,
        )
    path = save_probe(lens, folder)
    metrics = [
        {**row, "prompts": lens.n_prompts_, "positions": lens.n_positions_}
        for row in lens.metrics()
    ]
    value = {"probe": str(path), "cache": source.id, "metrics": metrics}
    return value, lambda: print_fit(lens.kind, source.id, path, metrics, root)


def _marked(folder: Path, mark: str, out: Path | None) -> Path:
    """`folder` with `mark` at the end of its name, unless the user named it."""
    return folder if out is not None else folder.with_name(folder.name + mark)


def _name(path: Path, root: Path) -> str:
    """How a printed command names a saved probe."""
    import shlex

    from ...probes.saved.library import FOLDER

    return path.name if path.parent == root / FOLDER else shlex.quote(str(path))
