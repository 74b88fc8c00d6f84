"""What all commands share: option types, common options, --root and --json, errors, exit codes.

`residua_command` turns a function of cli.py into a command. Only light modules are imported here,
so that `residua --help` answers at once.
"""

import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import click
from click.shell_completion import CompletionItem

from ...cache.errors import Interrupted, ResiduaError, ResiduaWarning, UsageError
from ...cache.function_above import call_above
from .command_arguments import raw_arguments
from .job_report import follow_parent, job_folder, write_error, write_value
from .terminal import VisibleStream, other_output_on_stderr, visible_text

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:  # older versions of click have it without a parameter
    ParamType = click.ParamType

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""Settings of click for all commands."""
JSON = "--json"

CommandT = TypeVar("CommandT", bound=Callable[..., Any] | click.Command)
"""Type of a command, or of the function of one."""


class OptionDecorator(Protocol):
    """A decorator that adds an option to a command or to its function."""

    def __call__(self, command: CommandT, /) -> CommandT: ...


class NumberRanges(ParamType):
    """Whole numbers and ranges of them: `0-3`, `0,2,5`, `4`; the command gets a tuple."""

    name = "NUMBERS"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        from ...cache.number_ranges import MAX_NUMBERS, parse_ranges

        if isinstance(value, tuple):
            return value
        try:
            numbers = parse_ranges(str(value))
        except OverflowError:
            self.fail(f"{value!r} names more than {MAX_NUMBERS:,} numbers", param, ctx)
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers; write it like 0-3 or 0,2,5", param, ctx)
        if not numbers:
            self.fail(f"{value!r} names no number", param, ctx)
        return numbers


NUMBERS = NumberRanges()


class LayerRanges(NumberRanges):
    """Layers, as `NumberRanges`; `all` gives None; -1 is the last layer, -2 the one before it."""

    name = "LAYERS"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value is None or str(value).strip().lower() == "all":
            return None
        if isinstance(value, tuple):
            return value
        pieces = [piece.strip() for piece in str(value).split(",")]
        negative = [int(piece) for piece in pieces if re.fullmatch(r"-[0-9]{1,9}", piece)]
        others = [piece for piece in pieces if not re.fullmatch(r"-[0-9]{1,9}", piece)]
        numbers = super().convert(",".join(others), param, ctx) if others else ()
        return (*dict.fromkeys(negative), *numbers)


LAYERS = LayerRanges()


class WholeNumber(ParamType):
    """A whole number: `1000000`, `1_000_000`, `1e6` or `1M`."""

    name = "INTEGER"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        from ...cache.number_ranges import parse_count

        try:
            return parse_count(str(value))
        except ValueError:
            message = f"{value!r} is no whole number; write it like 1000000, 1e6 or 1M"
            self.fail(message, param, ctx)


WHOLE_NUMBER = WholeNumber()


class ModeWithCount(ParamType):
    """A word, or a word and a count: `all`, `sample:1000`, `sample:1k`, `topk:64`."""

    name = "TEXT"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        mode, colon, count = str(value).partition(":")
        # The count goes into the identity of the cache: 1k and 1000 are one request.
        return f"{mode}:{WHOLE_NUMBER.convert(count, param, ctx)}" if colon else mode


MODE_WITH_COUNT = ModeWithCount()

BYTES_OF_UNIT = {
    unit: base**power
    for power, letter in enumerate("kmgt", 1)
    for unit, base in ((f"{letter}b", 1000), (f"{letter}ib", 1024), (letter, 1024))
} | {"b": 1}
"""Unit in lower case -> bytes; GB is 10^9, GiB and G are 2^30."""


def parse_bytes(text: str, bytes_without_unit: int) -> int:
    """Bytes of `2GB`, `0.5 GiB`, or a number of `bytes_without_unit`; `ValueError` for others."""
    match = re.fullmatch(r"([0-9._]+(?:e[+-]?[0-9]+)?)\s*([kmgt]?i?b?)", text.strip().lower())
    if match is None or (match[2] and match[2] not in BYTES_OF_UNIT):
        raise ValueError(text)
    size = float(match[1]) * (BYTES_OF_UNIT[match[2]] if match[2] else bytes_without_unit)
    if not 1 <= size < 2**63:
        raise ValueError(text)
    return int(size)


class ByteCount(ParamType):
    """A size on the disk: bytes, or with a unit, such as 50GB."""

    name = "BYTES"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            return int(value)
        except ValueError:
            pass
        try:
            return parse_bytes(value, 1)
        except ValueError:
            self.fail(f"{value!r} is no size; write it like 50000000000 or 50GB", param, ctx)


BYTE_COUNT = ByteCount()


SECONDS_OF_UNIT = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
"""Unit of a duration -> seconds."""


def parse_duration(text: str) -> float:
    """Seconds of `30d`, `12h`, `90 m`, `2w`, or `0`; `ValueError` for others."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([smhdw]?)", text.strip().lower())
    if match is None or (not match[2] and float(match[1])):
        raise ValueError(text)
    return float(match[1]) * SECONDS_OF_UNIT[match[2] or "s"]


class Duration(ParamType):
    """A length of time with its unit, such as 30d; the command gets seconds."""

    name = "TIME"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        try:
            return parse_duration(str(value))
        except ValueError:
            self.fail(f"{value!r} is no time; write it like 12h, 30d or 2w", param, ctx)


DURATION = Duration()


class FiniteNumber(ParamType):
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


class OutputPath(ParamType):
    """A file or folder to write; a URL in an object store."""

    name = "PATH"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        from ...cache.files.paths import as_path

        try:
            return as_path(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


OUTPUT_PATH = OutputPath()


class Gibibytes(ParamType):
    """Memory in GiB, such as 0.5, or with a unit, such as 2GB; the command gets bytes."""

    name = "GIB"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            return parse_bytes(str(value), 2**30)
        except ValueError:
            self.fail(f"{value!r} is no size in GiB; write it like 0.5, 8 or 8GB", param, ctx)


CONTROLS = ("shuffled", "permuted", "next-token")
"""Names of the views in probes/controls/cache_views.py, a module too heavy to import for --help."""

MASKS = ("continued", "names", "patches")
"""Names of `MASKS` in analysis/token_texts/position_masks.py, likewise."""

scheduler_option: OptionDecorator = click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Address of a dask scheduler, like tcp://host:8786, whose workers fit; the workers must "
    "see the root.",
)
"""Adds --scheduler to a fit."""

across_documents_option: OptionDecorator = click.option(
    "--across-documents",
    is_flag=True,
    help="Count also pairs (t, t+N) that join two documents of a packed sequence.",
)
"""Adds --across-documents: see `PairScope`."""

drop_first_option: OptionDecorator = click.option(
    "--drop-first",
    type=WHOLE_NUMBER,
    default=0,
    show_default=True,
    help="Number of first positions of each sequence to leave out as sources t: attention sinks "
    "in many models.",
)
"""Adds --drop-first: see `PairScope`."""


layers_option: OptionDecorator = click.option(
    "--layers", type=LAYERS, help="Layers to read.  [default: all]"
)
"""Adds --layers to a fit."""

memory_option: OptionDecorator = click.option(
    "--memory",
    type=Gibibytes(),
    help="Memory of the fit in GiB, beside that of Python and its libraries.  [default: "
    "2, at most a quarter of the machine's]",
)
"""Adds --memory to a fit."""

out_option: OptionDecorator = click.option(
    "--out", type=OUTPUT_PATH, help="Folder of the probe.  [default: under the root]"
)
"""Adds --out to a fit."""

device_option: OptionDecorator = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Device of the computation: auto (the first GPU, or the CPU), cpu, cuda, cuda:1, mps.",
)
"""Adds --device to a fit."""

checkpoint_option: OptionDecorator = click.option(
    "--checkpoint",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Folder that keeps the state of an unfinished fit, from which the same command goes on.  "
    "[default: `checkpoints` under the root]",
)
"""Adds --checkpoint to a fit that can be resumed."""


def complete_names(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names that begin like `incomplete`, for the shell: ids of caches, or names of probes."""
    from ...cache.store.catalog import cache_root, list_paths
    from ...probes.saved.probe_list import probe_folders

    try:
        root = cache_root(ctx.params.get("root"))
        kinds = str(param.metavar or param.name).upper()
        names = [path.name[:12] for path in list_paths(root)] if "CACHE" in kinds else []
        names += [path.name for path in probe_folders(root)] if "PROBE" in kinds else []
    except (ResiduaError, OSError):  # no root that can be read: nothing to complete
        return []
    # NAME=PROBE: what comes before the probe stays.
    given, equals, beginning = incomplete.rpartition("=")
    if "PROBE" not in kinds:
        given, equals, beginning = "", "", incomplete
    return [
        CompletionItem(f"{given}{equals}{name}") for name in names if name.startswith(beginning)
    ]


def cache_argument(name: str = "cache") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the argument CACHE, which the shell completes."""
    return click.argument(name, shell_complete=complete_names)


def probe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument CACHE and the options that all fits of probes share."""
    parameters = (
        cache_argument(),
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


WORDS = "residua.words"
"""Key of a context for the words of the command line after the command."""


class WordsCommand(click.Command):
    """A command that remembers its words, to send them to a server."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[WORDS] = list(args)
        return super().parse_args(ctx, args)


class JsonErrorGroup(click.Group):
    """A group of commands that prints mistyped arguments, too, as JSON objects after --json.

    --json, --root and --server may also stand before the command: `residua --json ls`.
    """

    group_class: type[click.Group] | type[type] | None = type
    command_class: type[click.Command] | None = WordsCommand

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Options before the command go behind its own arguments, to the command.
        count = 0
        shared = r"--json|--(root|server)(=.*)?"
        while count < len(args) and re.fullmatch(shared, args[count], re.DOTALL):
            count += 2 if args[count] in ("--root", "--server") else 1
        options, rest = args[:count], args[count:]
        if options and not rest:
            ctx.fail(f"no command follows {' '.join(options)}; residua --help lists the commands")
        end = rest.index("--") if "--" in rest else len(rest)
        return super().parse_args(ctx, [*rest[:end], *options, *rest[end:]])

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
    @click.option(
        "--server",
        metavar="URL",
        help="Service that does the work, such as http://host:8470, or whose caches are read.  "
        "[default: $RESIDUA_SERVER, if set]",
    )
    @wraps(function)
    def run(root: str | None, as_json: bool, server: str | None, **options: Any) -> None:
        from ...cache.files.disk_errors import (
            system_error,
            translate_any_disk_errors,
            translate_store_errors,
        )
        from ...cache.files.json_files import plain_value
        from ...cache.store.catalog import cache_root

        job = job_folder()
        if job is not None:
            follow_parent()
        try:
            try:
                place, server = _place_of_command(server)
                root_path = cache_root(server if place == "root" else root)
                with (
                    translate_any_disk_errors(),
                    translate_store_errors(root_path),
                    warnings_as_lines(),
                    library_logs_off(),
                    other_output_on_stderr(),
                ):
                    if place in ("job", "short", "removal"):
                        value, print_value = _run_on_server(str(server), as_json)
                    else:
                        value, print_value = function(root=root_path, quiet=as_json, **options)
                # What is printed may go to a file on a full disk.
                with translate_any_disk_errors():
                    if job is not None:
                        write_value(job, value, _printed_text(print_value))
                    elif as_json:
                        click.echo(json.dumps(plain_value(value), default=str, allow_nan=False))
                    else:
                        with redirect_stdout(VisibleStream(sys.stdout)):
                            print_value()
                    sys.stdout.flush()
            except KeyboardInterrupt:
                raise Interrupted("interrupted; the same command goes on from here") from None
            except BaseException as error:
                # Libraries in Rust panic where they get no thread; that is no `Exception`.
                if isinstance(error, Exception) or (limit := system_error(error)) is None:
                    raise
                raise limit from error
        except ResiduaError as error:
            if job is not None:
                write_error(job, error)
            _exit_with(error, as_json=as_json)
        sys.exit(value.pop("exit_code", 0) if isinstance(value, dict) else 0)

    return run


def _place_of_command(server: str | None) -> tuple[str, str | None]:
    """Where the running command runs, and its server; see `place_of_command`.

    $RESIDUA_SERVER counts for commands that a server can do, and where no --root is given.
    """
    environment_server = os.environ.get("RESIDUA_SERVER")
    if server is None and (not environment_server or is_given("root")):
        return "here", None
    words = words_of_command()
    place = call_above("analysis.service_client.remote_commands", "place_of_command", words)
    if server is None:
        return (place, environment_server) if place != "here" else ("here", None)
    if is_given("root"):
        raise UsageError("--server and --root exclude each other: the server has a root")
    if place == "here":
        raise UsageError(f"`residua {' '.join(words)}` runs on this machine: leave out --server")
    return place, server


def words_of_command() -> list[str]:
    """Words of the running command, such as `["fit", "ridge"]`."""
    words: list[str] = []
    context: click.Context | None = click.get_current_context()
    while context is not None and context.parent is not None:
        words.insert(0, str(context.info_name))
        context = context.parent
    return words


def server_of_command() -> str:
    """Address of the server of the running command; raises `UsageError` without one."""
    server = click.get_current_context().params.get("server") or os.environ.get("RESIDUA_SERVER")
    if not server:
        raise UsageError("jobs are those of a service: give --server URL, or set RESIDUA_SERVER")
    return str(server)


def _run_on_server(server: str, quiet: bool) -> tuple[Any, Callable[[], None]]:
    """Value and printer of the running command, after the server has run it."""
    context = click.get_current_context()
    arguments = raw_arguments(context.command, context.meta[WORDS])
    value, text = call_above(
        "analysis.service_client.remote_commands",
        "run_on_server",
        server,
        words_of_command(),
        arguments,
        quiet,
    )
    return value, lambda: click.echo(text, nl=False)


def confirm(question: str) -> bool:
    """Ask on the terminal; raises `UsageError` if nobody answers."""
    try:
        return click.confirm(question, err=True)
    except click.Abort:  # the input has ended
        raise UsageError("nobody answered, so nothing was removed: give --yes") from None


def _printed_text(print_value: Callable[[], Any]) -> str:
    """What `print_value` prints, as it would go to a pipe."""
    text = io.StringIO()
    with redirect_stdout(VisibleStream(text)):
        print_value()
    return text.getvalue()


def is_given(name: str) -> bool:
    """Whether the option `name` of the running command stands on the command line."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print every `ResiduaWarning` as one line on stderr, without file and line number.

    Warnings of other libraries are shown only if Python was asked for warnings (-W).
    """
    show_other = warnings.showwarning

    def show_line(
        message: Warning | str, category: type[Warning], *location: Any, **extra: Any
    ) -> None:
        if issubclass(category, ResiduaWarning):
            click.echo(f"Warning: {visible_text(str(message))}", err=True)
        elif sys.warnoptions:
            show_other(message, category, *location, **extra)

    with warnings.catch_warnings():
        warnings.simplefilter("always", ResiduaWarning)
        warnings.showwarning = show_line
        yield


@contextmanager
def library_logs_off() -> Iterator[None]:
    """Context without log lines: the error of the command says what was wrong, once."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(level)


def _exit_with(error: ResiduaError, *, as_json: bool) -> NoReturn:
    """Print `error` as a JSON object on stdout or a message on stderr; exit with its code."""
    if as_json:
        value = {
            "error": type(error).__name__,
            "message": str(error),
            "exit_code": error.exit_code,
        }
        try:
            click.echo(json.dumps(value, allow_nan=False))
            sys.exit(error.exit_code)
        except OSError:  # stdout is a file on a full disk
            pass
    click.echo(f"Error: {visible_text(str(error))}", err=True)
    sys.exit(error.exit_code)
