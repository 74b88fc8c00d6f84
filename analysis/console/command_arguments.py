"""Arguments of commands as JSON objects: checked by the command's own types, turned into words.

A job of the service, or a client of it, names a command (`fit ridge`) and an object of arguments
(`{"cache": "3f2a", "offsets": "0-3"}`). The keys are the names of the command's arguments, and of
its options without dashes (`max_tokens` for --max-tokens). `parse_arguments` gives the values that
the command itself would get, `command_words` the words of the command line, `arguments_schema` a
JSON schema of the arguments.
"""

from collections.abc import Mapping, Sequence
from inspect import cleandoc
from typing import Any

import click

from ...cache.errors import UsageError
from ...cache.files.json_fields import shown
from ...cache.function_above import call_above

SHARED = ("root", "as_json", "server", "token")
"""Parameters of every command that are not arguments of its work."""
MAX_LETTERS = 4096
"""Most characters of one value."""
MAX_VALUES = 1024
"""Most values of one argument."""


def find_command(words: Sequence[str]) -> click.Command:
    """The command of these words, such as `["fit", "ridge"]`; raises `UsageError` for others."""
    return call_above("cli", "find_command", words)


def list_parameters(command: click.Command) -> dict[str, click.Parameter]:
    """Name of an argument in JSON -> parameter of the command, in the order of --help."""
    return {
        _json_name(parameter): parameter
        for parameter in command.params
        if parameter.name not in SHARED
    }


def _json_name(parameter: click.Parameter) -> str:
    """`cache` for CACHE, `max_tokens` for --max-tokens, `k` for -k."""
    if isinstance(parameter, click.Argument):
        return str(parameter.name)
    return max(parameter.opts, key=len).lstrip("-").replace("-", "_")


def command_words(command: click.Command, arguments: Mapping[str, Any]) -> list[str]:
    """Words of the command line for `arguments`: options first, then `--` and the arguments.

    Raises `UsageError` for a name that the command does not have, or a value that is no text,
    number, truth value or list of these.
    """
    parameters = list_parameters(command)
    for name in arguments:
        if name not in parameters:
            raise UsageError(
                f"{command.name} has no argument {shown(name)}; it has {', '.join(parameters)}"
            )
    options: list[str] = []
    positional: list[str] = []
    for name, parameter in parameters.items():
        value = arguments.get(name)
        if value is None:
            continue
        if isinstance(parameter, click.Argument):
            values = value if isinstance(value, list) else [value]
            if len(values) > MAX_VALUES:
                raise UsageError(f"{name} has {len(values)} values; at most {MAX_VALUES} are taken")
            positional += [_as_word(name, item) for item in values]
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            options += _flag_words(name, parameter, value)
        else:
            word = max(parameter.opts, key=len)
            is_repeated = isinstance(parameter, click.Option) and parameter.multiple
            for item in value if is_repeated and isinstance(value, list) else [value]:
                options.append(f"{word}{'=' * word.startswith('--')}{_as_word(name, item)}")
            if len(options) > MAX_VALUES:
                raise UsageError(f"{name} has more than {MAX_VALUES} values")
    return [*options, "--", *positional]


def _flag_words(name: str, option: click.Option, value: Any) -> list[str]:
    """`--pack`, `--no-pack` or nothing for a true or false `value`."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false, not {shown(value)}")
    if value:
        return [option.opts[0]]
    return list(option.secondary_opts[:1])


def _as_word(name: str, value: Any) -> str:
    """A value as one word of the command line: texts, numbers, lists of whole numbers."""
    if isinstance(value, list) and 0 < len(value) <= MAX_VALUES:
        value = ",".join(map(str, value)) if all(type(item) is int for item in value) else None
    if type(value) in (int, float):
        return str(value)
    if not isinstance(value, str) or not value or "\0" in value or len(value) > MAX_LETTERS:
        raise UsageError(
            f"{name} must be a text of 1 to {MAX_LETTERS} characters, a number, or a list of whole "
            f"numbers, not {shown(value)}"
        )
    return value


def parse_arguments(command: click.Command, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Values that `command` would get, as JSON: defaults filled in, `1k` read as 1000.

    Raises `UsageError` with the message of the command line for a value of a wrong type.
    """
    from ...cache.files.json_files import plain_value  # imports numpy

    words = command_words(command, arguments)
    try:
        with command.make_context(command.name, words) as context:
            values = context.params
    except click.ClickException as error:
        raise UsageError(error.format_message()) from None
    parameters = list_parameters(command)
    return {
        name: plain_value(values.get(str(parameter.name))) for name, parameter in parameters.items()
    }


def raw_arguments(command: click.Command, words: Sequence[str]) -> dict[str, Any]:
    """The JSON object of the words of a command line that `command` has parsed without error.

    Values are the texts that were given; what was not given is left out.
    """
    context = click.Context(command, info_name=command.name, resilient_parsing=True)
    values = command.make_parser(context).parse_args(list(words))[0]
    arguments: dict[str, Any] = {}
    for name, parameter in list_parameters(command).items():
        value = values.get(str(parameter.name))
        if isinstance(parameter, click.Argument) and parameter.nargs == -1:
            arguments[name] = list(value) if isinstance(value, list | tuple) else []
        elif isinstance(parameter, click.Option) and parameter.multiple:
            arguments[name] = list(value or ())
        elif isinstance(value, str | bool | int | float):
            arguments[name] = value
    return {name: value for name, value in arguments.items() if value != []}


def arguments_schema(command: click.Command, refused: Sequence[str] = ()) -> dict[str, Any]:
    """JSON schema of the arguments of `command`, with its help; without those `refused`."""
    properties: dict[str, Any] = {}
    required: list[str] = []
    for name, parameter in list_parameters(command).items():
        if name in refused:
            continue
        properties[name] = _parameter_schema(parameter)
        if parameter.required:
            required.append(name)
    return {
        "type": "object",
        "title": " ".join((command.help or "").partition("\n\n")[0].split()),
        "description": cleandoc(command.help or "").replace("\b\n", ""),
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _parameter_schema(parameter: click.Parameter) -> dict[str, Any]:
    """JSON schema of one parameter: type, choices, default and help."""
    choices = list(parameter.type.choices) if isinstance(parameter.type, click.Choice) else None
    if isinstance(parameter, click.Option) and parameter.is_flag:
        schema: dict[str, Any] = {"type": "boolean"}
    elif choices is not None:
        schema = {"type": "string", "enum": choices}
    elif parameter.type.name in ("INTEGER", "integer", "NUMBER", "BYTES", "GIB"):
        schema = {"type": ["string", "number"]}
    elif parameter.type.name in ("NUMBERS", "LAYERS"):
        schema = {"anyOf": [{"type": ["string", "integer"]}]}
        schema["anyOf"].append({"type": "array", "items": {"type": "integer"}})
    else:
        schema = {"type": "string"}
    schema["x-type"] = parameter.type.name
    is_repeated = isinstance(parameter, click.Option) and parameter.multiple
    if parameter.nargs == -1 or is_repeated:
        schema = {"type": "array", "items": schema}
    if isinstance(parameter, click.Option):
        schema["description"] = " ".join((parameter.help or "").split())
        default = parameter.to_info_dict()["default"]
        if isinstance(default, str | int | float):
            schema["default"] = default
    elif parameter.metavar:
        schema["description"] = parameter.metavar
    return schema
