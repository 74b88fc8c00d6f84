"""`residua.connect`: a service with the verbs of the library, extract, fit, evaluate, open.

    service = residua.connect("http://host:8470")
    cache = service.extract("gpt2", "texts.jsonl", context=256)
    probe = service.fit(residua.RidgeProbe(offsets=[0, 1]), cache)
    evaluation = service.evaluate(cache, [probe])

The work is done by jobs of the service. Asking the same again, also after a lost connection, finds
the same job.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache.errors import Interrupted, UsageError
from ...cache.files.json_files import plain_value
from ...cache.files.paths import as_path
from ...cache.progress import Auto, StageProgress, show_stages
from ...cache.store.activation_cache import ActivationCache
from ...cache.store.catalog import open as open_cache
from ...probes.saved.save import load_probe
from .job_following import ENDED, follow_job
from .probe_commands import command_of_probe
from .remote_commands import result_of, still_running
from .remote_evaluation import evaluation_of
from .sent_texts import send_data, send_rows
from .server_connection import ServerConnection, quoted

if TYPE_CHECKING:
    from ..evaluation.result import Evaluation


def connect(url: str, token: str | None = None) -> "RemoteService":
    """The service at `url`, such as `http://host:8470`.

    Args:
        url: Address that `residua serve` prints.
        token: Token of the service, for all that writes. Default $RESIDUA_TOKEN.

    Raises `UsageError` for what is no address, `UnreachableError` if no service answers there.
    """
    connection = ServerConnection(url, token)
    try:
        connection.get("/healthz")
    except BaseException:
        connection.close()
        raise
    return RemoteService(connection)


class RemoteService:
    """A service elsewhere; `connect` makes one. A context manager, or `close` it."""

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection

    def __repr__(self) -> str:
        return f"<service of residua at {self.url}>"

    def __enter__(self) -> "RemoteService":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; jobs go on."""
        self._connection.close()

    @property
    def url(self) -> str:
        """Address of the service."""
        return self._connection.url

    # Caches and probes.

    def caches(self) -> list[dict[str, Any]]:
        """The caches of the service, as `residua ls --json` lists them."""
        return self._connection.get("/v1/caches")["caches"]

    def probes(self) -> list[dict[str, Any]]:
        """The saved probes of the service, as `residua probes --json` lists them."""
        return self._connection.get("/v1/probes")["probes"]

    def open(self, name: str) -> ActivationCache:
        """The cache whose id begins with `name`, read over HTTP; raises `NotFoundError`."""
        cache = self._connection.get(f"/v1/caches/{quoted(name)}")["cache"]
        return open_cache(f"{self.url}/caches/{cache}")

    def load_probe(self, name: str) -> Any:
        """The saved probe whose name begins with `name`; raises `NotFoundError`."""
        probe = self._connection.get(f"/v1/probes/{quoted(name)}")["probe"]
        return load_probe(as_path(f"{self.url}/probes/{probe}"))

    # Work.

    def extract(
        self,
        model: str | Path,
        data: str | Path | Iterable[str | Mapping[str, Any]],
        *,
        progress: StageProgress | Auto | None = "auto",
        **options: Any,
    ) -> ActivationCache:
        """Run `model` on texts, on the server, and return the cache, which is read over HTTP.

        Args:
            model: Name of a model below the folders of the server, or a hub id if it allows these.
            data: File of this machine, which is sent; texts in Python; or a name below the folders
                of the server.
            progress: As for `residua.extract`.
            options: Keywords of `residua.extract` that the command `residua extract` has.
        """
        if isinstance(data, str | Path):
            texts = send_data(self._connection, str(data), options.get("data_format"))
        else:
            texts = send_rows(self._connection, data)
        arguments = {"model": str(model), "data": texts, **options}
        value = self.run("extract", arguments, progress=progress)
        return self.open(str(value["cache"]))

    def fit(
        self,
        probe: Any,
        cache: ActivationCache | str,
        *,
        progress: StageProgress | Auto | None = "auto",
        **options: Any,
    ) -> Any:
        """Fit `probe` on a cache of the server, on the server; returns the fitted probe.

        Args:
            probe: A probe with its parameters, not fitted; it stays as it is.
            cache: A cache of the server, or the beginning of its id.
            progress: As for `fit` of probes.
            options: Further options of the command: `lens` of a basis, `device`, `memory`.

        Raises `UsageError` for a probe, or a parameter, that no command fits.
        """
        command, arguments = command_of_probe(probe)
        given = {**arguments, "cache": _cache_id(cache), **options}
        if hasattr(given.get("lens"), "kind"):
            given["lens"] = self._name_of(given["lens"])
        value = self.run(command, given, progress=progress)
        path = value["probes"][0]["probe"] if "probes" in value else value["probe"]
        return self.load_probe(str(path).rpartition("/")[2])

    def evaluate(
        self,
        cache: ActivationCache | str,
        probes: Sequence[Any] = (),
        *,
        progress: StageProgress | Auto | None = "auto",
        **options: Any,
    ) -> "Evaluation":
        """Measure probes of the server on held-out text of a cache, on the server.

        Args:
            cache: A cache of the server, or the beginning of its id.
            probes: Probes that `fit` returned, or names of saved probes of the server.
            progress: As for `residua.evaluate`.
            options: Options of the command `residua evaluate`.
        """
        names = [name if isinstance(name, str) else self._name_of(name) for name in probes]
        arguments = {"cache": _cache_id(cache), "probes": names, **options}
        value = self.run("evaluate", arguments, progress=progress)
        return evaluation_of(value, self.open(str(value["cache"])))

    def run(
        self,
        command: str,
        arguments: Mapping[str, Any],
        *,
        progress: StageProgress | Auto | None = "auto",
    ) -> dict[str, Any]:
        """Run a command, such as `fit ridge`, as a job; returns what it prints with --json.

        `arguments` as GET /v1/commands of the service describes them; None is left out. Raises the
        error of the command.
        """
        job = self.submit(command, arguments)
        try:
            with show_stages(progress) as stage:
                job = follow_job(self._connection, job, stage=stage)
        except KeyboardInterrupt:
            raise Interrupted(still_running(self.url, job["id"])) from None
        return result_of(job)[0]

    # Jobs.

    def submit(
        self, command: str, arguments: Mapping[str, Any], key: str | None = None
    ) -> dict[str, Any]:
        """Ask for a job and return at once; equal requests are one job.

        `key`, an Idempotency-Key, makes another job of equal arguments.
        """
        plain = {name: plain_value(value) for name, value in arguments.items()}
        return self._connection.request(
            "POST",
            "/v1/jobs",
            body={
                "command": command,
                "arguments": {name: value for name, value in plain.items() if value is not None},
            },
            headers={} if key is None else {"Idempotency-Key": key},
        )

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs of the service, the latest first, without their values."""
        return self._connection.get("/v1/jobs")["jobs"]

    def job(self, name: str) -> dict[str, Any]:
        """The job whose id begins with `name`, with its value; raises `NotFoundError`."""
        return self._connection.get(f"/v1/jobs/{quoted(name)}")

    def wait(self, name: str, *, progress: StageProgress | Auto | None = "auto") -> dict[str, Any]:
        """Wait for the end of a job; returns the job."""
        job = self.job(name)
        if job["state"] in ENDED:
            return job
        with show_stages(progress) as stage:
            return follow_job(self._connection, job, stage=stage)

    def cancel(self, name: str) -> dict[str, Any]:
        """Ask for the end of a job; returns the job. What it did is kept."""
        return self._connection.request("POST", f"/v1/jobs/{quoted(name)}/cancel")

    def log(self, name: str) -> str:
        """What the process of a job printed, in its latest attempt."""
        pieces = self._connection.download(f"/v1/jobs/{quoted(name)}/log")
        return b"".join(pieces).decode("utf-8", "replace")

    def _name_of(self, probe: Any) -> str:
        """Name of a saved probe of the server that has the parameters and the cache of `probe`."""
        from ...probes.saved.library import probe_path

        name = probe_path(Path(), probe).name
        known = [entry["probe"] for entry in self.probes()]
        matches = [found for found in known if found == name or found.startswith(f"{name}-")]
        if not matches:
            raise UsageError(
                f"{probe!r} is no probe of {self.url}; fit it there, or give the name of one"
            )
        return matches[0]


def _cache_id(cache: ActivationCache | str) -> str:
    return cache if isinstance(cache, str) else cache.id
