"""Jobs: commands in processes of their own, queued in files and spread over dask workers."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .job_queue import JobQueue as JobQueue
    from .job_settings import JobSettings as JobSettings
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
