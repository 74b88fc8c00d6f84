"""The public function that runs a model on texts and returns the cache."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.paths import as_path
from ..progress import StageProgress
from ..store.activation_cache import ActivationCache
from .answer_request import answer_request
from .request import ExtractionRequest

if TYPE_CHECKING:
    from distributed import Client


def extract(
    model: str | Path,
    data: str | Path,
    *,
    client: "Client | None" = None,
    progress: StageProgress | None = None,
    **options: Any,
) -> ActivationCache:
    """Run `model` on the texts of `data` once and return the cache of its residual streams.

    A cache that holds what is asked, or more, is returned at once; an unfinished one is finished,
    one that lacks layers or tokens is extended. Options are the fields of `Request`; all workers
    of `client`, of `dask.distributed`, share the work if they see the same files. Raises
    `ModelError`, `DataError`, `HeadMismatchError` or `NoSpaceError` before anything is written.
    """
    if options.get("root") is not None:
        options["root"] = as_path(options["root"])
    request = ExtractionRequest(str(model), str(data), **options)
    if client is not None:
        from .distributed import answer_on_cluster

        return answer_on_cluster(client, request, progress).cache
    return answer_request(request, progress).cache
