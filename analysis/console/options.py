"""How a command runs: --root and --json, errors as messages or objects, exit codes."""

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
JSON = "--json"


class NumberRanges(click.ParamType):
    """Numbers and ranges: `0-3`, `0,2,5`, `4`."""

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


class Number(click.ParamType):
    """A finite number."""

    name = "NUMBER"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        try:
            found = float(value)
        except ValueError:
            found = float("nan")
        if not isfinite(found):
            self.fail(f"{value!r} is no finite number", param, ctx)
        return found


NUMBER = Number()


class Place(click.ParamType):
    """A file or folder to write; a URL for what may lie in an object store."""

    name = "PATH"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        from ...cache.files.paths import as_path

        try:
            return as_path(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


PLACE = Place()


class Gibibytes(click.ParamType):
    """Memory in GiB, such as 0.5; the command gets bytes."""

    name = "GIB"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            found = float(value)
        except ValueError:
            found = 0.0
        if not 0 < found < float("inf"):
            self.fail(f"{value!r} is no size in GiB; write it like 0.5 or 8", param, ctx)
        return int(found * 2**30)


CONTROLS = ("shuffled", "permuted", "next-token")
"""Names of `probes.views`, which takes too long to import for --help."""

SLICES = ("continued", "names")
"""Names of `analysis.slices`, likewise."""


shared = click.option("--scheduler", metavar="ADDRESS", help="Let the workers of this dask "
                      "scheduler, who see the root, fit, like tcp://host:8786.")  # fmt: skip
"""Adds --scheduler to a fit."""


paired = click.option(
    "--across-documents", is_flag=True, help="Count pairs (t, t+N) of two documents of a packed "
    "sequence, too.",
)  # fmt: skip
"""Adds --across-documents: see `PairScope`."""

dropping = click.option(
    "--drop-first", type=int, default=0, show_default=True, help="Leave out the first K positions "
    "of each sequence, which are attention sinks in many models.",
)  # fmt: skip
"""Adds --drop-first: see `PairScope`."""


def probing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what every fit of a probe takes: CACHE, and options that mean the same for all."""
    parameters = (
        click.argument("cache"),
        click.option("--offsets", type=NUMBERS, default="0", show_default=True,
                     help="Predict N tokens further on; 0 is the next token."),
        click.option("--layers", type=NUMBERS, help="Layers to read.  [default: all]"),
        paired,
        dropping,
        click.option("--memory", type=Gibibytes(), help="Memory of the fit, beside what Python "
                     "and its libraries take.  [default: 2, at most a quarter of the machine's]"),
        click.option("--control", type=click.Choice(CONTROLS), help="Fit a control instead: "
                     "states of other positions, targets of other positions, or the next token's "
                     "embedding beside the state."),
        shared,
        click.option("--out", type=PLACE,
                     help="Folder of the probe.  [default: under the root]"),
    )  # fmt: skip
    for add in reversed(parameters):
        function = add(function)
    return function


class Commands(click.Group):
    """Commands whose mistyped arguments, too, are JSON objects where --json stands among them."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        if not standalone_mode or JSON not in given:
            return super().main(args, prog_name, complete_var, standalone_mode, **extra)
        try:
            sys.exit(super().main(args, prog_name, complete_var, False, **extra))
        except click.ClickException as error:
            _fail(UsageError(error.format_message()), as_json=True)


def residua_command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --root and --json, and turns errors into messages and exit codes.

    The function gets `root`, `quiet` (no progress) and its own options; what it returns is the
    JSON object, and the callable beside it prints the same for people.
    """

    @click.option("--root", help="Folder or URL (s3://...) of caches.  [default: $RESIDUA_ROOT, "
                  "else the XDG cache folder]")  # fmt: skip
    @click.option(JSON, "as_json", is_flag=True, help="Print one JSON object and nothing else.")
    @wraps(function)
    def run(root: str | None, as_json: bool, **options: Any) -> None:
        from ...cache.files.disk_errors import any_disk_errors, store_errors
        from ...cache.files.json_files import plain_value
        from ...cache.store.catalog import cache_root

        try:
            try:
                place = cache_root(root)
                with any_disk_errors(), store_errors(place), warnings_as_lines():
                    value, show = function(root=place, quiet=as_json, **options)
            except KeyboardInterrupt:
                raise Interrupted("interrupted; the same command goes on from here") from None
        except ResiduaError as error:
            _fail(error, as_json)
        if as_json:
            click.echo(json.dumps(plain_value(value), default=str, allow_nan=False))
        else:
            show()
        sys.exit(value.pop("exit_code", 0) if isinstance(value, dict) else 0)

    return run


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print every `ResiduaWarning` as one line on stderr, without a place in the code."""
    show = warnings.showwarning

    def show_line(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, ResiduaWarning):
            click.echo(f"Warning: {message}", err=True)
        else:
            show(message, category, *rest, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", ResiduaWarning)
        warnings.showwarning = show_line
        yield


def _fail(error: ResiduaError, as_json: bool) -> NoReturn:
    message = str(error)
    if as_json:
        kind = type(error).__name__
        value = {"error": kind, "message": message, "exit_code": error.exit_code}
        click.echo(json.dumps(value, allow_nan=False))
    else:
        click.echo(f"Error: {message}", err=True)
    sys.exit(error.exit_code)
