"""Commands with --server: the same output, exit code and messages as without.

A command that works is a job of the server, which is followed here. A command that reads runs here,
with the server as its root. `analysis/console/options.py` calls `place_of_command` and
`run_on_server` for every command that has a server.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ...cache.errors import CorruptError, Interrupted, NotFoundError, UsageError
from ..console.actions import check_outputs
from ..console.options import confirm
from ..console.saved_actions import Removal, SavedItem
from ..console.saved_messages import describe_removal
from ..console.terminal import Meter, print_warning
from ..disk_use.users import User
from ..jobs.job_commands import JOB_COMMANDS, OUTPUTS, SERVER_CHOICES
from ..studies.results.study_files import StudyFiles
from .job_following import follow_job
from .sent_texts import fetch_outputs, send_data
from .server_connection import ServerConnection, named_error, quoted

CommandPlace = Literal["job", "short", "removal", "root", "client", "here"]
READING = ("ls", "probes", "info", "diff", "export", "heatmap")
"""Commands that read caches and probes: they run here, and the server is their root."""
SHORT = ("du", "gc", "pin")
"""Commands that the server runs within the request."""
SHORT_SECONDS = 330.0
"""Time to wait for the answer of one, in seconds."""
REMOVAL = "rm"
CLIENTS = ("jobs",)
"""Commands that ask a server themselves."""


def place_of_command(words: Sequence[str]) -> CommandPlace:
    """Where a command runs that was given a server.

    `job`, `short`: on the server; `removal`: asked of the server; `root`: here, with the server as
    root; `client`: here, it asks the server itself; `here`: here, no server can do it.
    """
    command = " ".join(words)
    if command in JOB_COMMANDS:
        return "job"
    if command in SHORT:
        return "short"
    if command == REMOVAL:
        return "removal"
    if command in CLIENTS:
        return "client"
    return "root" if command in READING else "here"


def run_on_server(
    server: str, words: Sequence[str], arguments: Mapping[str, Any], quiet: bool
) -> tuple[dict[str, Any], str]:
    """Run a command on the server; returns what it prints with --json, and otherwise.

    `arguments` are the words of the command line, as `raw_arguments` gives them. Raises the error
    of the command.
    """
    with ServerConnection(server) as connection:
        place = place_of_command(words)
        if place == "removal":
            return _remove(connection, arguments, quiet)
        if place == "short":
            return _run_short(connection, words[0], dict(arguments), quiet)
        return _run_job(connection, " ".join(words), dict(arguments), quiet)


def _run_job(
    connection: ServerConnection, command: str, arguments: dict[str, Any], quiet: bool
) -> tuple[dict[str, Any], str]:
    """Ask for a job, follow it, fetch what it wrote."""

    for name, reason in SERVER_CHOICES.items():
        if arguments.get(name) and name != "no_tty":
            raise UsageError(f"--{name} and --server exclude each other: {reason}")
    lines = bool(arguments.pop("no_tty", False))
    outputs = {name: Path(arguments[name]) for name in OUTPUTS if arguments.get(name)}
    if command.startswith(("study ", "intervene ")):
        StudyFiles(outputs.get("html"), outputs.get("png"), outputs.get("csv")).check()
    else:
        check_outputs(outputs.get("html"), outputs.get("png"))
    arguments |= {name: OUTPUTS[name] for name in outputs}
    _name_for_server(connection, command, arguments)

    job = connection.request("POST", "/v1/jobs", body={"command": command, "arguments": arguments})
    try:
        with Meter(quiet and not lines, lines=lines) as meter:
            notes: dict[str, str] = {}

            def note(stage: str, text: str) -> None:
                if stage not in notes:
                    meter.note(stage, lambda: notes[stage])
                notes[stage] = text

            job = follow_job(connection, job, stage=meter.stage, note=note, warn=print_warning)
    except KeyboardInterrupt:
        raise Interrupted(still_running(connection.url, job["id"])) from None
    value, text = result_of(job)
    paths = fetch_outputs(connection, job, outputs)
    return _with_paths(value, paths), _with_paths(text, paths)


def _run_short(
    connection: ServerConnection, command: str, arguments: dict[str, Any], quiet: bool
) -> tuple[dict[str, Any], str]:
    """Have the server run du, gc or pin; gc shows what would go, and asks, here."""

    def run(**more: Any) -> tuple[dict[str, Any], str]:
        body = {"command": command, "arguments": {**arguments, **more}}
        answer = connection.request("POST", "/v1/run", body=body, seconds=SHORT_SECONDS)
        try:
            value, text = answer["value"], answer["text"]
        except (KeyError, TypeError):
            raise CorruptError("the server's answer has no value and no text") from None
        return value, text

    if command != "gc" or arguments.get("yes") or arguments.get("dry_run"):
        return run()
    if quiet:
        raise UsageError("gc asks before it removes, and --json cannot: give --yes or --dry-run")
    planned, text = run(dry_run=True)
    if planned.get("items"):
        print_warning(text.rstrip())
        if not confirm("Remove?"):
            return planned, "nothing was removed\n"
    return run(yes=True)


def _name_for_server(connection: ServerConnection, command: str, arguments: dict[str, Any]) -> None:
    """Send the texts, and name model and cache as the server knows them."""
    if "data" in arguments:
        form = arguments.get("data_format")
        arguments["data"] = send_data(connection, arguments["data"], form)
    model = arguments.get("model")
    if model is not None and Path(model).expanduser().is_dir():
        arguments["model"] = str(Path(model).expanduser().resolve())
    for name in ("cache", "lens"):
        if isinstance(arguments.get(name), str):
            arguments[name] = _last_part(connection.url, arguments[name])
    for name in JOB_COMMANDS[command].texts:
        if name in arguments:
            arguments[name] = send_data(connection, arguments[name])
    for name in JOB_COMMANDS[command].caches:
        if name in arguments:
            names = arguments[name] if isinstance(arguments[name], list) else [arguments[name]]
            arguments[name] = [_last_part(connection.url, one) for one in names]
    if "probes" in arguments:
        arguments["probes"] = [_last_part(connection.url, name) for name in arguments["probes"]]


def _last_part(url: str, name: str) -> str:
    """`ID` of `URL/caches/ID`; any other name unchanged."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith(f"{url}/") else name


def result_of(job: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Value and text of a job that ended; raises its error."""
    if job["state"] == "cancelled":
        raise Interrupted(f"the job {job['id'][:12]} was cancelled; what it did is kept")
    if job["state"] == "failed":
        raise named_error(job["error"] or {"message": job["message"] or "the job failed"})
    value = job["value"]
    if not isinstance(value, dict) or not isinstance(job["text"], str):
        raise NotFoundError(f"the result of the job {job['id'][:12]} is gone; ask for it again")
    return value, job["text"]


def still_running(url: str, job: str) -> str:
    """What to do about a job that goes on after its client was interrupted."""
    name = job[:12]
    return (
        f"the job {name} goes on at {url}: the same command shows it again, "
        f"`residua jobs {name} --server {url}` how far it is, and with --cancel ends it"
    )


def _with_paths(value: Any, paths: Mapping[str, str]) -> Any:
    """`value` with the paths of this machine in place of those of the job."""
    if isinstance(value, str):
        for name in sorted(paths, key=len, reverse=True):
            value = value.replace(name, paths[name])
        return value
    if isinstance(value, dict):
        written = {"files", "written"} & set(value)
        return {k: _with_paths(v, paths) if k in written else v for k, v in value.items()}
    return [_with_paths(item, paths) for item in value] if isinstance(value, list) else value


def _remove(
    connection: ServerConnection, arguments: Mapping[str, Any], quiet: bool
) -> tuple[dict[str, Any], str]:
    """`residua rm` on a server: finds the names, asks, removes."""
    names = [_last_part(connection.url, name) for name in arguments["names"]]
    items = list(dict.fromkeys(_find_item(connection, name) for name in names))
    if not arguments.get("yes"):
        if quiet:
            raise UsageError("rm asks before it removes, and --json cannot: give --yes too")
        for kind, name in items:
            print_warning(f"{kind} {name} at {connection.url}")
        if not confirm("Remove?"):
            return {"removed": []}, "nothing was removed\n"
    parameters = {"force": "true"} if arguments.get("force") else {}
    removed: list[dict[str, Any]] = []
    # Probes first: a cache that they name may go with them.
    for kind, name in sorted(items, reverse=True):
        path = f"/v1/{kind}s/{quoted(name)}"
        removed.append(connection.request("DELETE", path, parameters=parameters))
    lines = [f"removed: {describe_removal(_removal_of(entry))}\n" for entry in removed]
    return {"removed": removed}, "".join(lines)


def _removal_of(entry: Mapping[str, Any]) -> Removal:
    """What a server says that it removed; raises `CorruptError` for anything else."""
    try:
        users = [User(user["kind"], user["name"], user["note"]) for user in entry["named_by"]]
        item = SavedItem(entry["kind"], Path(entry["path"]))
        return Removal(item, entry["freed"], entry["shared"], tuple(users))
    except (KeyError, TypeError) as error:
        raise CorruptError(f"the server's answer is no removal: {error!r}") from None


def _find_item(connection: ServerConnection, name: str) -> tuple[str, str]:
    """Kind and whole name of the cache or probe that begins with `name`."""
    caches = [entry["cache"] for entry in connection.get("/v1/caches")["caches"]]
    probes = [entry["probe"] for entry in connection.get("/v1/probes")["probes"]]
    matches = [("cache", found) for found in caches if name and found.startswith(name)]
    matches = matches or [("probe", found) for found in probes if name and found.startswith(name)]
    if len(matches) > 1:
        raise UsageError(f"{name!r} begins the names of {len(matches)} things; give more of it")
    if not matches:
        raise NotFoundError(f"no cache and no probe {name!r} at {connection.url}")
    return matches[0]
