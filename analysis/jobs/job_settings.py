"""Settings of the jobs of a service: root, state, which models and texts, workers, limits."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class JobSettings:
    """Where jobs work, what they may read, and how many run."""

    root: Path
    """Root of caches and probes: a folder or the URL of an object store."""
    state: Path
    """Folder on disk for jobs and uploaded texts, which workers on other machines must see."""
    models: tuple[Path, ...] = ()
    """Folders below which the model of a job must lie."""
    texts: tuple[Path, ...] = ()
    """Folders below which the texts of a job must lie, unless they were uploaded."""
    allow_hub: bool = False
    """Whether jobs may name models and texts of the Hugging Face hub."""
    allow_remote_code: bool = False
    """Whether a job may ask for --trust-remote-code."""
    scheduler: str | None = None
    """Address of a dask scheduler, such as tcp://host:8786; None starts workers here."""
    workers: int = 1
    """Workers without GPU to start here, each with one job at a time."""
    gpus: int | None = None
    """Workers with a GPU to start here; None counts the GPUs that this process sees."""
    threads: int | None = None
    """Threads of one job; None divides the cores of a machine by the workers that started here."""
    grace_seconds: float = 20.0
    """Time between the interruption of a job and its end by force."""
    most_deaths: int = 3
    """Times that the process of a job may die before the job counts as failed."""
    most_waiting: int = 1000
    """Most jobs that wait or run; more are refused."""
    most_upload_bytes: int = 16 << 30
    """Largest text that is taken."""
    most_uploads_bytes: int = 64 << 30
    """Most bytes of all uploaded texts together."""
