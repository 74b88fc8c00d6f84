"""What all commands of studies share: their options, and the call of the study."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console.options import (
    WHOLE_NUMBER,
    cache_argument,
    complete_names,
    device_option,
    residua_command,
)

if TYPE_CHECKING:
    from ..studies.all_studies import AllStudies
    from ..studies.results.study_files import StudyFiles
    from ..studies.results.study_result import StudyResult


@dataclass(frozen=True)
class StudyCall:
    """A command of a study as it was given."""

    root: Path
    quiet: bool
    """Whether no progress is shown."""
    cache: str
    probes: tuple[str, ...]
    """Names of probes, each with a name of its own before `=` or not."""
    files: "StudyFiles"


def study_command(
    *, split: str = "test", max_positions: int | None = 16384
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add CACHE, [PROBE]... and the options of all studies to a command, and run it.

    The function gets a `StudyCall` and its own options, with `split`, `seed`, `device` and, unless
    `max_positions` is None, `max_positions` among them; it returns what `run_study` gives.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(
            root: Path,
            quiet: bool,
            cache: str,
            probes: tuple[str, ...],
            html: Path | None,
            png: Path | None,
            csv: Path | None,
            **options: Any,
        ) -> Any:
            from ...cache.optional_libraries import require_extra
            from ..studies.results.study_files import StudyFiles

            require_extra("fit", "the study")
            files = StudyFiles(html, png, csv)
            files.check()
            return function(StudyCall(root, quiet, cache, probes, files), **options)

        parameters = [
            cache_argument(),
            click.argument("probes", nargs=-1, metavar="[PROBE]...", shell_complete=complete_names),
            click.option(
                "--split",
                default=split,
                show_default=True,
                help="Split to read: train, validation, test or all.",
            ),
        ]
        if max_positions is not None:
            parameters.append(
                click.option(
                    "--max-positions",
                    type=WHOLE_NUMBER,
                    default=max_positions,
                    show_default=True,
                    help="Most positions to read, in whole sequences.",
                )
            )
        parameters += [
            click.option(
                "--seed",
                type=WHOLE_NUMBER,
                default=0,
                show_default=True,
                help="Seed of the sample and of intervals.",
            ),
            device_option,
            click.option(
                "--html", type=click.Path(path_type=Path), help="File to write the page to."
            ),
            click.option(
                "--png",
                metavar="FOLDER",
                type=click.Path(path_type=Path),
                help="Folder to write the pictures to.",
            ),
            click.option(
                "--csv",
                metavar="FOLDER",
                type=click.Path(path_type=Path),
                help="Folder to write the tables to.",
            ),
        ]
        command: Callable[..., Any] = residua_command(call)
        # As decorators above `residua_command`, the first one outermost.
        for parameter in reversed(parameters):
            command = parameter(command)
        return command

    return decorate


def run_study(study: Callable[..., "StudyResult"], call: StudyCall, **options: Any) -> Any:
    """Run `study(cache, lenses, ..., progress=...)`, write its files and print its tables."""
    from ...cache.store.catalog import find_cache
    from ..console.probe_names import load_named_probes
    from ..console.terminal import Meter

    source = find_cache(call.cache, call.root)
    lenses = load_named_probes(source, call.probes, call.root)
    with Meter(call.quiet) as meter:
        result = study(source, lenses, progress=meter.stage, **options)
    return finish_study([result], call)


def run_every_study(study_all: Callable[..., "AllStudies"], call: StudyCall, **options: Any) -> Any:
    """`run_study` of all studies; without given probes, with all of the cache under the root."""
    from ...cache.store.catalog import find_cache
    from ...probes.saved.probe_list import list_probes
    from ..console.probe_names import load_named_probes
    from ..console.terminal import Meter

    source = find_cache(call.cache, call.root)
    arguments = list(call.probes)
    if not arguments:
        arguments = [
            probe["path"]
            for probe in list_probes(call.root)
            if probe["cache"] == source.id and probe["state"] == "saved" and predicts_tokens(probe)
        ]
    probes = load_named_probes(source, arguments, call.root)
    with Meter(call.quiet) as meter:
        found = study_all(source, probes, progress=meter.stage, **options)
    return finish_study(found.results, call, dict(found.skipped))


def predicts_tokens(probe: Mapping[str, Any]) -> bool:
    """Whether a probe of `list_probes` is a readout: bases and prompts are none."""
    return probe["kind"] not in ("basis", "prompt")


def finish_study(
    results: Sequence["StudyResult"], call: StudyCall, skipped: dict[str, str] | None = None
) -> Any:
    """Write the files of `results`; gives the value of --json and what prints it for people."""
    from .study_messages import print_studies

    command = " ".join(["residua", *sys.argv[1:]])
    written = call.files.write(results, command, skipped)
    if len(results) == 1 and skipped is None:
        value = {**results[0].to_dict(), "command": command, "files": written}
    else:
        value = {
            "studies": {result.study: result.to_dict() for result in results},
            "skipped": skipped or {},
            "command": command,
            "files": written,
        }
    return value, lambda: print_studies(results, written, skipped)
