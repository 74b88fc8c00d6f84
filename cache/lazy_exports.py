"""Public names of a package, imported on first use: `import residua` loads nothing heavy.

Called by the `__init__.py` of every folder. Its names are written once, as imports under
`if TYPE_CHECKING:`, where type checkers and editors read them too.
"""

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy_exports(
    package: str, file: str, outside_all: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of `package`, whose `__init__.py` is `file`.

    The names are those that `file` imports from modules of the package under
    `if TYPE_CHECKING:`; a module is imported when one of its names is first asked for. The names
    `outside_all` are left out of `__all__`: `from package import *` would hide names of Python.
    """
    module_of = {
        alias.name: f".{node.module}"
        for statement in ast.parse(Path(file).read_text("utf-8")).body
        if isinstance(statement, ast.If)
        for node in statement.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def import_name(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(module_of[name], package), name)

    def list_names() -> list[str]:
        return sorted(module_of)

    return import_name, list_names, [name for name in list_names() if name not in outside_all]
