"""Which command fits a probe, and with which arguments: from the parameters of its constructor."""

from inspect import signature
from typing import Any

from ...cache.errors import UsageError
from ...cache.files.json_files import plain_value
from ..console.command_arguments import find_command, list_parameters

COMMANDS = {
    "RidgeProbe": "fit ridge",
    "TunedLens": "fit lens",
    "FutureLens": "fit lens",
    "VocabProbe": "fit vocab",
    "MlpProbe": "fit mlp",
    "CausalBasis": "fit basis",
}
"""Class of a probe -> command that fits it."""
BASELINES = ("Unigram", "Bigram", "Trigram", "LaggedBigram", "BigramChain", "MarginalBigram")
CONTROL = "ControlProbe"


def command_of_probe(probe: Any) -> tuple[str, dict[str, Any]]:
    """Command and arguments that fit `probe`.

    Raises `UsageError` for a class, or a parameter that differs from its default, that no command
    has.
    """
    name = type(probe).__name__
    if name == CONTROL:
        command, arguments = command_of_probe(probe.probe)
        return command, {**arguments, "control": probe.control}
    if name in BASELINES:
        command, arguments = "fit baseline", {"kinds": [probe.kind]}
    elif name in COMMANDS:
        command, arguments = COMMANDS[name], dict[str, Any]()
    else:
        fitted = ", ".join([*COMMANDS, *BASELINES])
        raise UsageError(f"a service does not fit {name}; it fits {fitted}")
    known = list_parameters(find_command(command.split()))
    defaults = signature(type(probe)).parameters
    for parameter, value in probe.get_params(deep=False).items():
        if repr(value) == repr(defaults[parameter].default) and parameter != "offsets":
            continue
        if parameter in known:
            arguments[parameter] = as_argument(value)
        elif parameter == "offset" and "offsets" in known:
            arguments["offsets"] = as_argument(value)
        else:
            raise UsageError(
                f"the command `{command}` has no option for {parameter}={value!r} of {name}; leave "
                "it at its default, or fit here on the cache of the service"
            )
    return command, arguments


def as_argument(value: Any) -> Any:
    """A parameter as an argument of a job: plain numbers, lists of them, texts."""
    plain = plain_value(value)
    if plain is None or isinstance(plain, str | int | float | list):
        return plain
    raise UsageError(f"{value!r} cannot be sent to a service: give numbers, texts or lists")
