"""Forged caches and probes: one thing changed, all keyless digests made right again.

A forger can compute every sha256 and crc32c, so a reader meets forged values behind digests that
match. `forge_cache` and `forge_probe` change one place of a folder; `Jail` runs calls on the result
in child processes with bounded time and memory, and tells which raised an error that is no
`ResiduaError`.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from residua.cache.errors import ResiduaError
from residua.cache.files.json_files import canonical_json, json_digest, read_json, write_json
from residua.cache.format.array import CacheArray
from residua.cache.format.array_writer import write_table

CPU_SECONDS = 10
"""Most CPU time of one call."""
WAIT_SECONDS = 120
"""Most time of one call, waiting included."""
MEMORY_GROWTH = 1 << 30
"""Most address space that the calls on one mutant may take beyond that of the parent."""
NUMBERS = (0, 1, -1, 2, 3, 7, 255, 1 << 16, 1 << 31, 1 << 40, 1 << 62, 1 << 63, 1 << 64, 10**13)
ODD_VALUES: tuple[Any, ...] = (
    *NUMBERS, -(1 << 63), 10**300, 10**400, True, False, None, 0.5, -0.0, 1e-320, 1e308, -1e308,
    "", "x", "0", "\x00", "x" * 5000, "../../../etc/passwd", "/etc/passwd", "é\u202e\x1b[31m",
    "0" * 64, "topk:99999999999", "sample:9", "full", "float64", "int8", "complex64", "<M8[ns]",
    [], {}, [[]], [None], [1, 2], [-1], ["x"], {"x": 1}, {"": None}, [[[[1]]]], [0] * 1000,
)  # fmt: skip
"""Values that a reader may not expect at some place."""


# Changes of JSON


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a JSON value, but of no more than some hundred per container."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items)[:300]:
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))
        else:
            yield (*path, key)


def change_json(value: dict[str, Any], rng: random.Random) -> str:
    """Change one place of the object `value`; returns what was done."""
    # Short paths are as likely as long ones: a table of many rows must not hide the fields above.
    by_depth: dict[int, list[tuple[Any, ...]]] = {}
    for path in places(value):
        if path and path[-1] != "sha256":
            by_depth.setdefault(len(path), []).append(path)
    if not by_depth:
        value["x"] = 1
        return "add x"
    path = rng.choice(by_depth[rng.choice(sorted(by_depth))])
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    old = parent[key]
    change = rng.randrange(8)
    if change == 0:
        del parent[key]
    elif change == 1:
        if isinstance(parent, dict):
            parent[rng.choice(["x", "0", "-1", "residual/0", "../x", "9" * 30, ""])] = old
        else:
            parent.append(old)
    elif change in (2, 3) and isinstance(old, int | float):
        parent[key] = rng.choice([old + 1, old - 1, -old, old * 2, old * 1000, old / 3, old + 64])
    elif change == 4 and isinstance(old, str) and old:
        index = rng.randrange(len(old))
        parent[key] = old[:index] + rng.choice(["0", "9", "z", "/", ""]) + old[index + 1 :]
    elif change == 5 and isinstance(old, list) and old:
        parent[key] = rng.choice([old[:-1], old[::-1], old * 2, old[:1] * 50])
    else:
        parent[key] = rng.choice(ODD_VALUES)
    return f"{'.'.join(map(str, path))}: {str(old)[:30]} -> {str(parent_value(parent, key))[:30]}"


def parent_value(parent: Any, key: Any) -> Any:
    """`parent[key]`, or `absent`."""
    try:
        return parent[key]
    except LookupError:
        return "absent"


def change_safetensors(path: Path, rng: random.Random) -> str:
    """Change one place of the header of a safetensors file, or its length."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    if rng.randrange(8) == 0:
        path.write_bytes(raw[: rng.randrange(len(raw))])
        return "cut"
    if rng.randrange(6) == 0:
        # Another shape or dtype of as many bytes.
        name = rng.choice([name for name in header if name != "__metadata__"])
        shape = header[name]["shape"]
        size = int(np.prod(shape))
        choices = [[size], [1, size], [size, 1], [1] * 70 + [size], shape[::-1], []]
        header[name]["shape"] = rng.choice(choices)
        done = f"{name} has shape {header[name]['shape'][:4]}"
    elif rng.randrange(5) == 0:
        name = rng.choice([name for name in header if name != "__metadata__"])
        wide = {"F32": "I32", "F64": "I64", "F16": "BF16", "BF16": "U16", "I64": "F64"}
        header[name]["dtype"] = wide.get(header[name]["dtype"], "U8")
        done = f"{name} has dtype {header[name]['dtype']}"
    elif rng.randrange(4) == 0 and data:
        # Values that are not finite, at the same places.
        data = rng.choice([b"\xff", b"\x00", b"\x7f"]) * len(data)
        done = "all bytes equal"
    else:
        done = change_json(header, rng)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return f"{path.name}: {done}"


# Digests made right


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by a new file: other links to the old one keep their bytes."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def seal_base_records(cache: Path) -> None:
    """Digests of all plain files that base records name, made right."""
    for record in sorted((cache / "journal").glob("base*.json")):
        try:
            base = json.loads(record.read_bytes())
            for name in base["files"]:
                if (cache / name).is_file():
                    base["files"][name] = hashlib.sha256((cache / name).read_bytes()).hexdigest()
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
        seal(record, base)


def seal(path: Path, value: dict[str, Any]) -> None:
    """Write `value` at `path` as a JSON file whose digest is right."""
    value = {key: item for key, item in value.items() if key != "sha256"}
    digest = json_digest(value)
    write_file(path, canonical_json({**value, "sha256": digest}) + b"\n")


# Forged caches


def forge_json_file(cache: Path, name: str, rng: random.Random) -> str:
    """Change a JSON file of a cache, with its digest, the manifest's id, and the base records."""
    path = cache / name
    value = json.loads(path.read_bytes())
    done = change_json(value, rng)
    if rng.randrange(4) == 0:
        done += "; " + change_json(value, rng)
    if name == "manifest.json" and isinstance(value.get("identity"), dict):
        value["id"] = json_digest(value["identity"])
    if "sha256" in value:
        seal(path, value)
    else:
        write_file(path, json.dumps(value).encode())
    if not name.startswith("journal/base"):
        seal_base_records(cache)
    return f"{name}: {done}"


def forge_tensors(cache: Path, name: str, rng: random.Random) -> str:
    """Change a safetensors file of a cache, with the digests of it."""
    path = cache / name
    write_file(path, path.read_bytes())  # a file of its own, not a link
    done = change_safetensors(path, rng)
    if name == "head/head.safetensors":
        spec = json.loads((cache / "head/head.json").read_bytes())
        spec["tensors"] = hashlib.sha256(path.read_bytes()).hexdigest()
        seal(cache / "head/head.json", spec)
    table = path.parent / "moments.json"
    if table.is_file():
        value = json.loads(table.read_bytes())
        value["tensors"] = tensor_digests(path) or value["tensors"]
        seal(table, value)
    seal_base_records(cache)
    return done


def tensor_digests(path: Path) -> dict[str, str]:
    """sha256 of each tensor of a safetensors file; empty if it is none."""
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(path.read_bytes())
    except SafetensorError:
        return {}
    return {name: hashlib.sha256(entry["data"]).hexdigest() for name, entry in entries}


def forge_table(cache: Path, name: str, rng: random.Random) -> str:
    """Change numbers of a one-dimensional array, with its checksums and its record."""
    values = np.array(CacheArray(cache / "arrays.zarr" / name)[:])
    info = np.iinfo(values.dtype) if values.dtype.kind in "iu" else None
    change = rng.randrange(6)
    place = slice(None) if rng.randrange(3) == 0 else rng.randrange(len(values))
    with np.errstate(all="ignore"):
        if info is None:
            values[place] = rng.choice([np.nan, np.inf, -1.0, 1e300])
        elif change == 0:
            values[place] = rng.choice([info.max, info.min, info.max // 2, 0])
        elif change == 1:
            values[place] = rng.choice([0, 1, 2, 255, 1 << 20, 1 << 30, 5]) & info.max
        elif change == 2:
            values = values[::-1].copy()
        elif change == 3:
            values = values[: rng.randrange(len(values))] if len(values) > 1 else values[:0]
        elif change == 4:
            values = np.concatenate([values, values[: rng.randrange(1, 9)]])
        else:
            values[place] -= np.array(1, values.dtype)
    attributes = CacheArray(cache / "arrays.zarr" / name).attributes
    if len(values):
        shutil.rmtree(cache / "arrays.zarr" / name)
        table = write_table(cache / "arrays.zarr", name, values, attributes)  # pyright: ignore
        for record in sorted((cache / "journal").glob("base*.json")):
            base = json.loads(record.read_bytes())
            if name in base["arrays"]:
                base["arrays"][name] = table
                seal(record, base)
    seal_base_records(cache)
    return f"{name}: numbers, {change} at {place}"


def forge_sizes(cache: Path, rng: random.Random) -> str:
    """Other sizes in the manifest, and in the metadata of all arrays that have them."""
    manifest = json.loads((cache / "manifest.json").read_bytes())
    tokens = manifest["identity"]["tokens"]
    old = {name: tokens[name] for name in ("positions", "sequences")}
    old |= {name: manifest[name] for name in ("d_model", "vocab")}
    name = rng.choice(sorted(old))
    new = rng.choice([old[name] * 2, old[name] - 1, 1, 1 << 20, 1 << 31, 1 << 40, 1 << 47])
    (tokens if name in tokens else manifest)[name] = new
    if name == "positions" and rng.randrange(2):
        rows = 1 << max(0, new - 1).bit_length()
        manifest["layout"] = {"chunk_rows": min(rows, 1 << 14), "part_rows": min(rows, 1 << 40)}
    manifest["id"] = json_digest(manifest["identity"])
    seal(cache / "manifest.json", manifest)
    for path in sorted((cache / "arrays.zarr").rglob("zarr.json")):
        meta = json.loads(path.read_bytes())
        if old[name] in meta.get("shape", ()):
            meta["shape"] = [new if n == old[name] else n for n in meta["shape"]]
            if name in ("d_model", "vocab"):
                text = json.dumps(meta).replace(f" {old[name]}]", f" {new}]")
                meta = json.loads(text)
            write_file(path, json.dumps(meta).encode())
    seal_base_records(cache)
    return f"{name} is {new}"


def forge_codec(cache: Path, rng: random.Random) -> str:
    """Other codecs, or another layout of chunks, in the metadata of one array."""
    paths = sorted(path for path in (cache / "arrays.zarr").rglob("zarr.json"))
    path = rng.choice([p for p in paths if "shape" in json.loads(p.read_bytes())])
    meta = json.loads(path.read_bytes())
    sharding = meta["codecs"][0]["configuration"]
    change = rng.randrange(6)
    if change == 0:
        sharding["codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    elif change == 1:
        codec = rng.choice(["gzip", "blosc", "zstd", "lzma", "numcodecs.pickle", "transpose", "x"])
        sharding["codecs"].insert(rng.randrange(3), {"name": codec, "configuration": {"level": 1}})
    elif change == 2:
        meta["codecs"] = sharding["codecs"]
    elif change == 3:
        factor = rng.choice([2, 1 << 10, 1 << 30])
        sharding["chunk_shape"][0] *= factor
        meta["chunk_grid"]["configuration"]["chunk_shape"][0] *= factor
    elif change == 4:
        meta["chunk_grid"]["configuration"]["chunk_shape"][0] *= rng.choice([2, 1 << 20, 1 << 40])
    else:
        bits = rng.choice([8, 16, 32, 64])
        meta["data_type"] = rng.choice([f"int{bits}", f"float{bits}", "bool", "string"])
    write_file(path, json.dumps(meta).encode())
    seal_base_records(cache)
    return f"{path.relative_to(cache)}: codecs, {change}"


def forge_folder(cache: Path, rng: random.Random) -> str:
    """A file that is missing, empty, cut, or a folder."""
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    path = rng.choice(files)
    data = path.read_bytes()
    path.unlink()
    change = rng.randrange(4)
    if change == 1:
        path.write_bytes(b"")
    elif change == 2:
        path.write_bytes(data[: rng.randrange(len(data) or 1)])
    elif change == 3:
        path.mkdir()
    return f"{path.relative_to(cache)}: file, {change}"


def forge_cache(cache: Path, rng: random.Random) -> str:
    """Change one thing of the cache in the folder `cache`; returns what was done.

    Files may be hard links to those of another folder, which stay as they are.
    """
    names = [path.relative_to(cache).as_posix() for path in sorted(cache.rglob("*.json"))]
    kinds = {
        "manifest": ["manifest.json"],
        "journal": [name for name in names if name.startswith("journal/")],
        "metadata": [name for name in names if name.endswith("zarr.json")],
        "head": ["head/head.json"],
        "tokenizer": ["head/tokenizer.json"],
        "provenance": ["provenance.json"],
        "moments": [name for name in names if name.endswith("moments.json")],
        "other": [n for n in names if n in ("local.json", "head/config.json")],
    }
    weights = {"manifest": 6, "journal": 6, "metadata": 6, "head": 5, "moments": 4}
    tensors = [p.relative_to(cache).as_posix() for p in sorted(cache.rglob("*.safetensors"))]
    tables = [name.removesuffix("/zarr.json") for name in kinds["metadata"]]
    prefixes = ("arrays.zarr/tokens/", "arrays.zarr/sequences/", "arrays.zarr/context")
    tables = [name for name in tables if name.startswith(prefixes) and name.count("/") > 1]
    tables = [n for n in tables if (cache / n / "c").is_dir()]
    changes: list[tuple[int, Callable[[], str]]] = [
        (weights.get(kind, 2), lambda files=files: forge_json_file(cache, rng.choice(files), rng))
        for kind, files in kinds.items()
        if files
    ]
    changes += [
        (4, lambda: forge_tensors(cache, rng.choice(tensors), rng)),
        (8, lambda: forge_table(cache, rng.choice(tables).removeprefix("arrays.zarr/"), rng)),
        (4, lambda: forge_sizes(cache, rng)),
        (4, lambda: forge_codec(cache, rng)),
        (3, lambda: forge_folder(cache, rng)),
    ]
    [change] = rng.choices([c for _, c in changes], [weight for weight, _ in changes])
    return change()


# Forged probes


def forge_probe(folder: Path, rng: random.Random) -> str:
    """Change `config.json` or `probe.safetensors` of a saved probe, with their digests."""
    config, tensors = folder / "config.json", folder / "probe.safetensors"
    value = read_json(config)
    if rng.randrange(10) < 6:
        done = change_json(value, rng)
        if rng.randrange(4) == 0:
            done += "; " + change_json(value, rng)
    else:
        write_file(tensors, tensors.read_bytes())
        done = change_safetensors(tensors, rng)
        value["tensors"] = hashlib.sha256(tensors.read_bytes()).hexdigest()
    config.unlink()
    write_json(config, value)
    return done


# Calls on a mutant, in a child with bounds


def copy_by_links(source: Path, target: Path) -> Path:
    """A copy of the folder `source` whose files are hard links; `target`."""
    return Path(shutil.copytree(source, target, copy_function=os.link))


class CallTooLong(BaseException):
    """A call took more than `CPU_SECONDS`."""


def run_bounded(calls: dict[str, Callable[[], Any]], bounded: bool = True) -> dict[str, str]:
    """Run `calls` one after another in a child process; name -> traceback of those that fail.

    A `ResiduaError` is no failure; any other error is, and so are `CPU_SECONDS` of CPU time,
    memory beyond `MEMORY_GROWTH`, and the death of the child.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        failures: dict[str, str] = {"the child process": "died"}
        try:
            failures = _run_calls(calls, writing, bounded)
        finally:
            os.write(writing, json.dumps(failures).encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    # What was written before the last complete answer is the name of the running call.
    *names, answer = data.split(b"\0\0")
    if status:
        name = names[-1].decode() if names else "start"
        return {name: f"the process died: {os.waitstatus_to_exitcode(status)}"}
    return json.loads(answer)


def _run_calls(calls: dict[str, Callable[[], Any]], writing: int, bounded: bool) -> dict[str, str]:
    def stop(*_: Any) -> None:
        raise CallTooLong

    signal.signal(signal.SIGPROF, stop)
    signal.signal(signal.SIGALRM, stop)
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    if bounded:
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_GROWTH, -1))
    warnings.simplefilter("ignore")
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    failures = {}
    for name, call in calls.items():
        os.write(writing, name.encode() + b"\0\0")
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS * bounded)
        signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS * bounded)
        try:
            call()
        except ResiduaError as error:
            # A message that cannot be shown is a failure as well.
            str(error).encode()
        except CallTooLong:
            failures[name] = f"more than {CPU_SECONDS} s\n{_traceback_text()}"
        except BaseException:
            failures[name] = _traceback_text()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
    return failures


def _traceback_text() -> str:
    """The traceback of the present error: its frames in the package, and its last lines."""
    text = traceback.format_exc()
    frames = [f for f in text.split("\n  File ") if "residua/" in f.split("\n")[0]]
    return "".join(f"\n  File {frame.rstrip()}" for frame in frames)[-2500:] + "\n" + text[-400:]


def failure_place(text: str) -> str:
    """Last line of the package in a traceback, and the error: one name for equal failures."""
    lines = text.strip().splitlines()
    own = [line for line in lines if "residua/" in line and line.lstrip().startswith("File ")]
    place = own[-1].split("residua/")[-1] if own else "?"
    return f"{place} | {lines[-1][:150]}"
