"""The commands that run as jobs, and the check of their arguments before a job is made.

`check_request` gives a `CheckedRequest`: names completed, models and texts confined to the folders
of the settings, reports redirected into the job's folder, and the identity that makes two requests
one job. `describe_commands` gives the JSON schemas.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...cache.errors import NotFoundError, UsageError
from ...cache.files.json_files import json_digest
from ...cache.files.paths import is_remote
from ...cache.number_ranges import absolute_numbers
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.catalog import find_path
from ...cache.store.local_origin import read_origin
from ...probes.saved.library import FOLDER as PROBES_FOLDER
from ...probes.saved.library import find_probe
from ..console.command_arguments import (
    arguments_schema,
    command_words,
    find_command,
    parse_arguments,
)
from ..studies.study_registry import STUDIES
from .job_files import ID_LETTERS
from .job_inputs import confine_data, confine_model, fingerprint
from .job_settings import JobSettings


@dataclass(frozen=True)
class JobCommand:
    """A command that may run as a job."""

    layers: tuple[str, ...] = ()
    """Arguments that name layers of the cache, which must exist."""
    prefers_gpu: bool = False
    """Whether the work runs the model: on a worker with a GPU, if there is one."""
    caches: tuple[str, ...] = ()
    """Arguments beside `cache` that name caches of the server, each `CACHE` or `NAME=CACHE`."""
    texts: tuple[str, ...] = ()
    """Arguments beside `data` that name files of texts of the server."""
    needs_model: bool = False
    """Whether it runs the model of the cache, which its origin names if no argument does."""
    is_repeated: bool = False
    """Whether asking again after the end runs it again: what it found may not be so any more."""


JOB_COMMANDS = {
    "extract": JobCommand(prefers_gpu=True),
    "repair": JobCommand(prefers_gpu=True, is_repeated=True, needs_model=True),
    "verify": JobCommand(is_repeated=True),
    "fit ridge": JobCommand(layers=("layers", "target")),
    "fit baseline": JobCommand(),
    "fit lens": JobCommand(layers=("layers",)),
    "fit vocab": JobCommand(layers=("layers",)),
    "fit mlp": JobCommand(layers=("layers",)),
    "fit basis": JobCommand(layers=("layers",)),
    "evaluate": JobCommand(),
    "fit jacobian": JobCommand(layers=("layers",), prefers_gpu=True, needs_model=True),
    "fit prompt": JobCommand(layers=("layers",), prefers_gpu=True, needs_model=True),
    "intervene patch": JobCommand(layers=("layers",), prefers_gpu=True, needs_model=True),
    "intervene prompt": JobCommand(layers=("layers",), prefers_gpu=True, needs_model=True),
    "intervene erase": JobCommand(layers=("layers",), prefers_gpu=True, needs_model=True),
    "intervene edit": JobCommand(
        layers=("layers",), prefers_gpu=True, needs_model=True, texts=("sentences",)
    ),
    "intervene exit": JobCommand(),
    "study all": JobCommand(is_repeated=True),
    **{f"study {name}": JobCommand(caches=entry.caches) for name, entry in STUDIES.items()},
}
"""Words of a command -> how it runs. A new command of cli.py joins by one line."""
LOOKS = ("dry_run", "find")
"""Arguments of commands that then only look: asked again, they look again."""
SERVER_CHOICES = {
    "out": "the server saves the probe under its root",
    "checkpoint": "the server keeps checkpoints under its root",
    "scratch": "the server chooses its scratch files",
    "scheduler": "the server has workers of its own",
    "part": "the server's workers write all parts",
    "names_mask": "it is a file of the machine of the command, which the server does not see",
    "no_tty": "the progress of a job is in its events",
}
"""Arguments that no job takes -> the reason."""
OUTPUTS = {"html": "report.html", "png": "pictures", "csv": "tables"}
"""Argument for a file or folder to write -> its name in the folder of the job's files."""
OUTPUT_FOLDER = "files"
LOGIT_LENS = "logit"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")
"""Names of caches and probes, and their beginnings; paths are none."""


@dataclass(frozen=True)
class CheckedRequest:
    """A request that can run: what `check_request` gives."""

    command: str
    arguments: dict[str, Any]
    """As given, with whole names of caches and probes; they can be asked for again."""
    identity: dict[str, Any]
    words: list[str] = field(default_factory=list)
    """Words of the command line, after `residua`."""
    prefers_gpu: bool = False
    uses_hub: bool = False

    @property
    def job_id(self) -> str:
        """Id of the job: equal requests have the same."""
        return json_digest(self.identity)[:ID_LETTERS]


def check_request(
    settings: JobSettings, command: str, arguments: Mapping[str, Any], salt: str | None = None
) -> CheckedRequest:
    """Check a request, without running anything.

    `salt`, an Idempotency-Key, makes another job of the same arguments. Raises `UsageError` and
    `NotFoundError` with the messages of the command line.
    """
    job_command = JOB_COMMANDS.get(command)
    if job_command is None:
        raise UsageError(f"{command[:100]!r} is no job; jobs are {', '.join(JOB_COMMANDS)}")
    click_command = find_command(command.split())
    given = {name: value for name, value in arguments.items() if value is not None}
    for name, reason in SERVER_CHOICES.items():
        if given.get(name):
            raise UsageError(f"a job takes no {name}: {reason}")
        given.pop(name, None)
    outputs = {name: given.pop(name) for name in OUTPUTS if given.get(name)}
    parse_arguments(click_command, given)
    if given.get("trust_remote_code") and not settings.allow_remote_code:
        raise UsageError(
            "this server runs no code that comes with a model; it would have to be started with "
            "--trust-remote-code"
        )

    # Names become those of one cache, one probe, one file.
    run = dict(given)
    inputs: dict[str, Any] = {}
    uses_hub = _complete_names(settings, command, given, run, inputs)
    values = parse_arguments(click_command, given)
    values.update((name, run[name]) for name in ("model", "data") if name in run)
    values.update(_absolute_layers(settings, job_command, values))
    identity = {"command": command, "arguments": values, "inputs": inputs}
    identity["outputs"] = sorted(outputs)
    if salt:
        identity["salt"] = salt
    for name in outputs:
        run[name] = f"{OUTPUT_FOLDER}/{OUTPUTS[name]}"
    root = settings.root if is_remote(settings.root) else settings.root.resolve()
    words = [*command.split(), *command_words(click_command, run)]
    words.insert(len(command.split()), f"--root={root}")
    return CheckedRequest(
        command=command,
        arguments={**given, **{name: OUTPUTS[name] for name in outputs}},
        identity=identity,
        words=words,
        prefers_gpu=job_command.prefers_gpu or str(values.get("device")).startswith("cuda"),
        uses_hub=uses_hub,
    )


def _complete_names(
    settings: JobSettings,
    command: str,
    given: dict[str, Any],
    run: dict[str, Any],
    inputs: dict[str, Any],
) -> bool:
    """Replace names by whole ones in `given`, and by paths in `run`.

    `inputs` gets the fingerprints of models and texts. Returns whether the hub is used.
    """
    uses_hub = False
    if "cache" in given:
        given["cache"] = run["cache"] = cache_id(settings.root, given["cache"])
    for name in JOB_COMMANDS[command].caches:
        if given.get(name):
            names = given[name] if isinstance(given[name], list) else [given[name]]
            given[name] = run[name] = [named_cache(settings.root, one) for one in names]
    if given.get("probes"):
        names = given["probes"] if isinstance(given["probes"], list) else [given["probes"]]
        given["probes"] = run["probes"] = [named_probe(settings.root, name) for name in names]
    if command == "fit basis" and given.get("lens", LOGIT_LENS) != LOGIT_LENS:
        given["lens"] = run["lens"] = probe_name(settings.root, given["lens"])
    if JOB_COMMANDS[command].needs_model and "model" not in given:
        cache = ActivationCache(find_path(given["cache"], settings.root))
        name = read_origin(cache.path).get("model", cache.manifest.model_name)
        run["model"] = str(confine_model(settings, name))
    if "model" in given:
        model = confine_model(settings, given["model"])
        run["model"] = str(model)
        uses_hub |= isinstance(model, str)
        inputs["model"] = fingerprint(model)
    for name in JOB_COMMANDS[command].texts:
        if name in given:
            texts = confine_data(settings, given[name])
            run[name] = str(texts)
            uses_hub |= isinstance(texts, str)
            inputs[name] = fingerprint(texts)
    if "data" in given:
        data = confine_data(settings, given["data"])
        run["data"] = str(data)
        uses_hub |= isinstance(data, str)
        inputs["data"] = fingerprint(data)
    return uses_hub


def cache_id(root: Path, name: Any) -> str:
    """Id of the cache under `root` that begins with `name`; no path is taken."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise NotFoundError(
            f"no cache {str(name)[:100]!r}; a job names a cache of the server by its id, or the "
            "beginning of it"
        )
    path = find_path(name, root)
    if path.parent != root:
        raise NotFoundError(f"no cache {name!r} under the root of this server")
    return path.name


def named_cache(root: Path, argument: Any) -> str:
    """CACHE or NAME=CACHE with the whole id of the cache; no path is taken."""
    name, equals, cache = str(argument).rpartition("=")
    return f"{name}{equals}{cache_id(root, cache)}"


def named_probe(root: Path, argument: Any) -> str:
    """PROBE or NAME=PROBE with the whole name of the probe; no path is taken."""
    if not isinstance(argument, str):
        return probe_name(root, argument)
    name, equals, probe = argument.rpartition("=")
    if "/" in name or "\\" in name:
        raise NotFoundError(f"no probe {argument[:100]!r}: a job names no paths")
    return f"{name}{equals}{probe_name(root, probe)}"


def probe_name(root: Path, name: Any) -> str:
    """Name of the probe under `root` that begins with `name`; no path is taken."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise NotFoundError(
            f"no probe {str(name)[:100]!r}; a job names a probe of the server by its name, or the "
            "beginning of it"
        )
    path = find_probe(name, root)
    if path.parent != root / PROBES_FOLDER:
        raise NotFoundError(f"no probe {name!r} under the root of this server")
    return path.name


def _absolute_layers(
    settings: JobSettings, command: JobCommand, values: dict[str, Any]
) -> dict[str, Any]:
    """The layers that `values` name, counted from 0; raises `NotFoundError` for a missing one."""
    named = {name: values[name] for name in command.layers if values.get(name)}
    if not named:
        return {}
    cache = ActivationCache(find_path(values["cache"], settings.root))
    layers = {name: absolute_numbers(numbers, cache.n_blocks) for name, numbers in named.items()}
    for numbers in layers.values():
        for layer in numbers or ():
            cache.residual_array(layer)
    return {name: list(numbers or ()) for name, numbers in layers.items()}


def describe_commands(settings: JobSettings) -> dict[str, Any]:
    """Words of each command -> JSON schema of its arguments, for forms and clients."""
    refused = list(SERVER_CHOICES)
    if not settings.allow_remote_code:
        refused.append("trust_remote_code")
    return {name: arguments_schema(find_command(name.split()), refused) for name in JOB_COMMANDS}
