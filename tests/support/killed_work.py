"""Work on a root that kills itself at a chosen point: `run_killed(name, cache, root)`.

Run as a script, this file does one piece of work on a cache without torch, and dies by SIGKILL just
before the step that would have made it whole.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

WORK = ("copy", "removal", "probe", "probe file", "moments", "record", "shard", "layers", "pin")
"""Names of the pieces of work."""


def run_killed(work: str, cache: Path, root: Path) -> None:
    """Do `work` on `cache`, a copy of which may go to `root`, in a process that dies of it."""
    command = [sys.executable, __file__, work, str(cache), str(root)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stdout + process.stderr


def _die(*args: Any, **options: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def _copy(cache: Path, root: Path) -> None:
    from residua.cache.sharing import root_transfer
    from residua.cache.store.activation_cache import ActivationCache

    root_transfer.publish_cache = _die
    root_transfer.copy_cache(ActivationCache(cache), root, verify=False)


def _remove(cache: Path, root: Path) -> None:
    from residua.cache.files import removal

    removal.shutil.rmtree = _die  # pyright: ignore[reportAttributeAccessIssue]
    removal.remove_folder(cache, "manifest.json")


def _probe() -> Any:
    from residua.probes.ridge.ridge_probe import RidgeProbe

    return RidgeProbe([0], layers=[1], folds=2, alphas=[1.0])


def _save_probe(cache: Path, root: Path) -> None:
    from residua.cache.store.activation_cache import ActivationCache
    from residua.probes.saved import library, save

    save.publish_folder = _die
    probe = _probe().fit(ActivationCache(cache), keep=False)
    save.save_probe(probe, library.probe_path(root, probe))


def _write_probe_file(cache: Path, root: Path) -> None:
    from residua.cache.files import json_files
    from residua.probes.saved.probe_list import probe_folders

    json_files.os.replace = _die  # pyright: ignore[reportAttributeAccessIssue]
    json_files.write_json(probe_folders(root)[0] / "config.json", {})


def _keep_moments(cache: Path, root: Path) -> None:
    from residua.cache.store.activation_cache import ActivationCache
    from residua.probes.moments import kept_moments

    kept_moments.publish_folder = _die
    _probe().fit(ActivationCache(cache), keep=True)


def _write_record(cache: Path, root: Path) -> None:
    from residua.cache.files import json_files

    json_files.os.replace = _die  # pyright: ignore[reportAttributeAccessIssue]
    json_files.write_json(cache / "journal" / "00000001.1.json", {}, new=True)


def _write_shard(cache: Path, root: Path) -> None:
    import numpy as np

    from residua.cache.files.leases import lease_part
    from residua.cache.format.shard import ShardWriter
    from residua.cache.store.activation_cache import ActivationCache

    opened = ActivationCache(cache)
    layout = opened.residual_array(1).layout
    with lease_part(cache / "leases", 1):
        path = cache / "arrays.zarr/residual/1" / layout.shard_key(1)
        ShardWriter(path, layout, 8).write(0, np.zeros((4, layout.shape[1]), layout.stored_dtype))
        _die()


def _write_metadata(cache: Path, root: Path) -> None:
    from residua.cache.files.leases import hold_lock

    with hold_lock(cache / "leases", "layers"):
        (cache / "arrays.zarr" / f"zarr.{'0' * 32}.partial").write_text("{}")
        _die()


def _write_pin(cache: Path, root: Path) -> None:
    from residua.analysis.disk_use.pins import pin_saved
    from residua.cache.files import json_files

    json_files.os.replace = _die  # pyright: ignore[reportAttributeAccessIssue]
    pin_saved(root, "cache", cache.name)


FUNCTIONS: dict[str, Callable[[Path, Path], None]] = dict(
    zip(
        WORK,
        (
            _copy,
            _remove,
            _save_probe,
            _write_probe_file,
            _keep_moments,
            _write_record,
            _write_shard,
            _write_metadata,
            _write_pin,
        ),
        strict=True,
    )
)

if __name__ == "__main__":
    FUNCTIONS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
