"""Libraries of the extras: which extra brings which library, and the error where one is missing.

The base install reads, verifies and exports caches and fits ridge and baselines. All else needs
libraries that an extra of pyproject.toml brings; they are imported where they are used. Once
`name_extras` was called, such an import statement of this package raises `MissingLibraryError`,
which names the extra. `require_extra` looks before the work instead of in its middle.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import FrameType, ModuleType

from .errors import MissingLibraryError

EXTRA_OF = {
    "PIL": "vision",
    "accelerate": "accelerate",
    "datasets": "extract",
    "pyarrow": "extract",
    "tokenizers": "extract",
    "tqdm": "extract",
    "transformers": "extract",
    "torch": "fit",
    "cryptography": "serve",
    "httptools": "serve",
    "huggingface_hub": "hub",
    "matplotlib": "report",
    "pandas": "report",
    "plotly": "report",
    "google": "sentencepiece",  # google.protobuf
    "s3fs": "s3",
    "upath": "s3",
    "prometheus_client": "serve",
    "sentencepiece": "sentencepiece",
    "starlette": "serve",
    "uvicorn": "serve",
}
"""Top module of a library -> the extra that brings it; the smallest, where several do."""
LIBRARIES_OF: dict[str, tuple[str, ...]] = {
    "all": ("torch", "transformers", "matplotlib", "plotly"),
    "extract": ("torch", "transformers"),
    "fit": ("torch",),
    "report": ("torch", "matplotlib", "plotly", "tokenizers"),
    "serve": ("cryptography", "httptools", "prometheus_client", "starlette", "uvicorn"),
    "vision": ("torch", "transformers", "PIL"),
}
"""Extra -> top modules that work in need of the extra uses, for `require_extra`."""
PROJECT = __name__.partition(".")[0]
"""Package whose imports name the extra."""
IMPORT_MACHINERY = {"importlib", "importlib._bootstrap", "_frozen_importlib"}
"""Modules between an import statement, or `import_module`, and the finders."""


def missing_library(library: str, work: str = "", extra: str | None = None) -> MissingLibraryError:
    """The error for a missing `library`, a top module; `work` says who needs it.

    `extra` is the extra to name, by default the smallest that brings the library.
    """
    needed = f"{work} needs {library}, which" if work else library
    name = extra or EXTRA_OF[library]
    return MissingLibraryError(
        f"{needed} is not installed: pip install 'residua[{name}]' brings it (in a checkout: "
        f"pip install -e '.[{name}]')",
        library,
    )


def require_extra(extra: str, work: str) -> None:
    """Raise `MissingLibraryError` unless all libraries of `extra` that `work` uses are installed.

    Nothing is imported.
    """
    for library in LIBRARIES_OF[extra]:
        if not is_installed(library):
            raise missing_library(library, work, extra)


def require_library(library: str, work: str) -> None:
    """Raise `MissingLibraryError` unless `library`, a top module that `work` uses, is installed.

    Nothing is imported.
    """
    if not is_installed(library):
        raise missing_library(library, work)


def is_installed(library: str) -> bool:
    """Whether the top module `library` can be found; it is not imported."""
    try:
        return find_spec(library) is not None
    except ValueError:  # put into sys.modules by hand, without a spec
        return sys.modules.get(library) is not None


class ExtraFinder(MetaPathFinder):
    """Comes after all finders of modules: what it is asked for is not installed.

    It finds nothing. For an import by this package of a library of `EXTRA_OF` it raises
    `MissingLibraryError`; other packages, and `find_spec`, get the usual answer.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if fullname in EXTRA_OF and _importer(sys._getframe(1)).startswith(f"{PROJECT}."):
            raise missing_library(fullname)


def _importer(frame: FrameType | None) -> str:
    """Name of the module whose code runs an import; `frame` is one inside the import."""
    while frame is not None and frame.f_globals.get("__name__") in IMPORT_MACHINERY:
        frame = frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def name_extras() -> None:
    """Let imports of libraries that are not installed say which extra brings them."""
    if not any(isinstance(finder, ExtraFinder) for finder in sys.meta_path):
        sys.meta_path.append(ExtraFinder())
