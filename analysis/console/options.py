"""What all commands share: option types, common options, --root and --json, errors, exit codes.

`residua_command` turns a function of cli.py into a command. Only light modules are imported here,
so that `residua --help` answers at once.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

import click

from ...cache.errors import Interrupted, ResiduaError, ResiduaWarning, UsageError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""Settings of click for all commands."""
JSON = "--json"


class NumberRanges(click.ParamType):
    """Whole numbers and ranges of them: `0-3`, `0,2,5`, `4`; the command gets a tuple."""

    name = "NUMBERS"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        from ...cache.number_ranges import parse_ranges

        if isinstance(value, tuple):
            return value
        try:
            numbers = parse_ranges(str(value))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers; write it like 0-3 or 0,2,5", param, ctx)
        if not numbers:
            self.fail(f"{value!r} names no number", param, ctx)
        return numbers


NUMBERS = NumberRanges()


class FiniteNumber(click.ParamType):
    """A finite number."""

    name = "NUMBER"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not isfinite(number):
            self.fail(f"{value!r} is no finite number", param, ctx)
        return number


NUMBER = FiniteNumber()


class OutputPath(click.ParamType):
    """A file or folder to write; a URL in an object store."""

    name = "PATH"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        from ...cache.files.paths import as_path

        try:
            return as_path(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


OUTPUT_PATH = OutputPath()


class Gibibytes(click.ParamType):
    """Memory in GiB, such as 0.5; the command gets bytes."""

    name = "GIB"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            gibibytes = float(value)
        except ValueError:
            gibibytes = 0.0
        if not 0 < gibibytes < float("inf"):
            self.fail(f"{value!r} is no size in GiB; write it like 0.5 or 8", param, ctx)
        return int(gibibytes * 2**30)


CONTROLS = ("shuffled", "permuted", "next-token")
"""Names of the views in probes/controls/cache_views.py, a module too heavy to import for --help."""

MASKS = ("continued", "names")
"""Names of `MASKS` in analysis/evaluation/position_masks.py, likewise."""

scheduler_option = click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Address of a dask scheduler, like tcp://host:8786, whose workers fit; the workers must "
    "see the root.",
)
"""Adds --scheduler to a fit."""

across_documents_option = click.option(
    "--across-documents",
    is_flag=True,
    help="Count also pairs (t, t+N) that join two documents of a packed sequence.",
)
"""Adds --across-documents: see `PairScope`."""

drop_first_option = click.option(
    "--drop-first",
    type=int,
    default=0,
    show_default=True,
    help="Number of first positions of each sequence to leave out as sources t: attention sinks "
    "in many models.",
)
"""Adds --drop-first: see `PairScope`."""


layers_option = click.option("--layers", type=NUMBERS, help="Layers to read.  [default: all]")
"""Adds --layers to a fit."""

memory_option = click.option(
    "--memory",
    type=Gibibytes(),
    help="Memory of the fit in GiB, beside that of Python and its libraries.  [default: "
    "2, at most a quarter of the machine's]",
)
"""Adds --memory to a fit."""

out_option = click.option(
    "--out", type=OUTPUT_PATH, help="Folder of the probe.  [default: under the root]"
)
"""Adds --out to a fit."""


def probe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument CACHE and the options that all fits of probes share."""
    parameters = (
        click.argument("cache"),
        click.option(
            "--offsets",
            type=NUMBERS,
            default="0",
            show_default=True,
            help="Offsets N: from the state at token t, predict the model at t+N; 0 is the next "
            "token.",
        ),
        layers_option,
        across_documents_option,
        drop_first_option,
        memory_option,
        click.option(
            "--control",
            type=click.Choice(CONTROLS),
            help="Control to fit instead of the probe: states of other positions, targets of "
            "other positions, or the next token's embedding beside the state.",
        ),
        scheduler_option,
        out_option,
    )
    for add_parameter in reversed(parameters):
        function = add_parameter(function)
    return function


class JsonErrorGroup(click.Group):
    """A group of commands that prints mistyped arguments, too, as JSON objects after --json."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        arguments = sys.argv[1:] if args is None else list(args)
        if not standalone_mode or JSON not in arguments:
            return super().main(args, prog_name, complete_var, standalone_mode, **extra)
        try:
            sys.exit(super().main(args, prog_name, complete_var, False, **extra))
        except click.ClickException as error:
            _exit_with(UsageError(error.format_message()), as_json=True)


def residua_command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --root and --json to a command, and turn errors into messages and exit codes.

    `function` gets `root`, `quiet` (no progress) and its own options. It returns the value that
    --json prints as an object, and a callable that prints the same for people.
    """

    @click.option(
        "--root",
        help="Folder or URL (s3://...) of caches.  [default: $RESIDUA_ROOT, else the XDG cache "
        "folder]",
    )
    @click.option(JSON, "as_json", is_flag=True, help="Print one JSON object and nothing else.")
    @wraps(function)
    def run(root: str | None, as_json: bool, **options: Any) -> None:
        from ...cache.files.disk_errors import translate_any_disk_errors, translate_store_errors
        from ...cache.files.json_files import plain_value
        from ...cache.store.catalog import cache_root

        try:
            try:
                root_path = cache_root(root)
                with (
                    translate_any_disk_errors(),
                    translate_store_errors(root_path),
                    warnings_as_lines(),
                ):
                    value, print_value = function(root=root_path, quiet=as_json, **options)
            except KeyboardInterrupt:
                raise Interrupted("interrupted; the same command goes on from here") from None
        except ResiduaError as error:
            _exit_with(error, as_json=as_json)
        if as_json:
            click.echo(json.dumps(plain_value(value), default=str, allow_nan=False))
        else:
            print_value()
        sys.exit(value.pop("exit_code", 0) if isinstance(value, dict) else 0)

    return run


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print every `ResiduaWarning` as one line on stderr, without file and line number."""
    show_other = warnings.showwarning

    def show_line(
        message: Warning | str, category: type[Warning], *location: Any, **extra: Any
    ) -> None:
        if issubclass(category, ResiduaWarning):
            click.echo(f"Warning: {message}", err=True)
        else:
            show_other(message, category, *location, **extra)

    with warnings.catch_warnings():
        warnings.simplefilter("always", ResiduaWarning)
        warnings.showwarning = show_line
        yield


def _exit_with(error: ResiduaError, *, as_json: bool) -> NoReturn:
    """Print `error` as a JSON object on stdout or a message on stderr; exit with its code."""
    if as_json:
        value = {
            "error": type(error).__name__,
            "message": str(error),
            "exit_code": error.exit_code,
        }
        click.echo(json.dumps(value, allow_nan=False))
    else:
        click.echo(f"Error: {error}", err=True)
    sys.exit(error.exit_code)
