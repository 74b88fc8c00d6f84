"""Claims about push and pull: what arrives is the cache that left, or an error says what to do.

The hub is a local folder here, in place of the eight functions of `huggingface_hub` that the
package calls; `test_the_client_has_what_is_called` holds those to the installed client.
"""

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors as hub_errors

import residua
from residua.cache.errors import (
    CorruptError,
    IncompleteError,
    MismatchError,
    NoSpaceError,
    NotFoundError,
    ResiduaError,
    UsageError,
)
from residua.cache.sharing import hub_errors as limits
from residua.cache.sharing.dataset_card import NO_LICENCE, format_dataset_card, size_category
from residua.cache.sharing.hub import pull_cache, push_cache
from residua.cache.store.activation_cache import ActivationCache
from residua.cache.store.verification import verify

from ...support.synthetic import make_cache, random_head

REPO = "someone/activations"


class LocalHub:
    """Dataset repositories as folders; a revision is a folder beside `main`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[str] = []

    def folder(self, repo_id: str, revision: str | None) -> Path:
        if not (self.root / repo_id).is_dir():
            raise hub_errors.RepositoryNotFoundError("404", response=http_response(404))
        path = self.root / repo_id / (revision or "main")
        if not path.is_dir():
            raise hub_errors.RevisionNotFoundError("404", response=http_response(404))
        return path

    def create_repo(self, repo_id, *, repo_type, private, exist_ok, token):
        assert (repo_type, exist_ok) == ("dataset", True)
        self.calls.append("create_repo")
        (self.root / repo_id / "main").mkdir(parents=True, exist_ok=True)
        return f"https://huggingface.co/datasets/{repo_id}"

    def create_branch(self, repo_id, *, repo_type, branch, exist_ok, token):
        (self.root / repo_id / branch).mkdir(exist_ok=True)

    def file_exists(self, repo_id, filename, *, repo_type, revision, token):
        return (self.folder(repo_id, revision) / filename).is_file()

    def hf_hub_download(self, repo_id, filename, *, repo_type, revision, token):
        return str(self.folder(repo_id, revision) / filename)

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, repo_type, revision, token):
        (self.folder(repo_id, revision) / path_in_repo).write_bytes(path_or_fileobj)

    def upload_folder(
        self, *, repo_id, folder_path, commit_message, ignore_patterns, repo_type, revision, token
    ):
        self.calls.append("upload_folder")
        target = self.folder(repo_id, revision)
        for file in Path(folder_path).rglob("*"):
            name = file.relative_to(folder_path).as_posix()
            if file.is_file() and not any(fnmatchcase(name, p) for p in ignore_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target / name)

    def dataset_info(self, repo_id, *, revision, files_metadata, token):
        folder = self.folder(repo_id, revision)
        files = [path for path in folder.rglob("*") if path.is_file()]
        siblings = [
            SimpleNamespace(rfilename=f.relative_to(folder).as_posix(), size=f.stat().st_size)
            for f in files
        ]
        return SimpleNamespace(sha=folder.name, siblings=siblings)

    def snapshot_download(self, repo_id, *, repo_type, revision, local_dir, allow_patterns, token):
        self.calls.append("snapshot_download")
        folder = self.folder(repo_id, revision)
        for file in folder.rglob("*"):
            name = file.relative_to(folder).as_posix()
            if file.is_file() and any(fnmatchcase(name, p) for p in allow_patterns):
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, local_dir / name)
        (local_dir / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        return str(local_dir)


FUNCTIONS = [name for name in vars(LocalHub) if not name.startswith("_") and name != "folder"]


def http_response(code: int) -> Any:
    return SimpleNamespace(status_code=code, headers={}, request=None)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    fake = LocalHub(tmp_path / "hub")
    for name in FUNCTIONS:
        monkeypatch.setattr(huggingface_hub, name, getattr(fake, name))
    return fake


def small_cache(root: Path, seed: int = 0, dtype: str = "float16") -> ActivationCache:
    values = np.random.default_rng(seed).normal(size=(600, 8)).astype(np.float32)
    lengths = [100] * 6
    head = random_head(8, 11)
    return make_cache(root, [values, 2 * values], lengths, head, dtype=dtype, seed=seed)


@pytest.fixture
def cache(tmp_path: Path) -> ActivationCache:
    return small_cache(tmp_path / "here")


def file_contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_client_has_what_is_called(name):
    real = inspect.signature(getattr(huggingface_hub, name)).parameters
    fake = inspect.signature(getattr(LocalHub, name)).parameters
    for parameter in list(fake.values())[1:]:
        assert parameter.name in real, f"huggingface_hub.{name} has no {parameter.name}"
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            assert real[parameter.name].kind is parameter.kind


def test_a_pulled_cache_has_the_bytes_that_were_pushed(hub, cache, tmp_path):
    done = push_cache(cache, REPO)
    assert (done.files, done.card) == (len(file_contents(cache.path)), True)
    pulled = pull_cache(REPO, tmp_path / "there")
    assert (pulled.status, pulled.cache.id) == ("pulled", cache.id)
    assert pulled.cache.path == tmp_path / "there" / cache.id
    assert file_contents(pulled.cache.path) == file_contents(cache.path)
    assert verify(pulled.cache.path).ok
    assert {p.name for p in pulled.cache.path.iterdir() if p.is_dir()} >= {"leases", "moments"}
    assert [p.name for p in (tmp_path / "there").iterdir()] == [cache.id]


def test_an_extracted_cache_travels_too(hub, tiny_cache, tmp_path):
    push_cache(tiny_cache, REPO)
    pulled = pull_cache(REPO, tmp_path / "there").cache
    np.testing.assert_array_equal(
        pulled.residual_array(pulled.n_blocks)[:50], tiny_cache.residual_array(pulled.n_blocks)[:50]
    )
    assert pulled.tokenizer().get_vocab_size() == tiny_cache.tokenizer().get_vocab_size()


def test_leases_temporary_files_and_dead_shards_stay_at_home(hub, cache):
    (cache.path / "leases" / "00000000.lock").write_bytes(b"")
    (cache.path / "head" / ".head.json.7.tmp").write_bytes(b"{")
    (cache.path / "arrays.zarr" / "residual" / "0" / "c" / "9").mkdir()
    (cache.path / "arrays.zarr" / "residual" / "0" / "c" / "9" / "0").write_bytes(b"dead")
    push_cache(cache, REPO)
    pushed = file_contents(hub.root / REPO / "main")
    assert not [n for n in pushed if "lock" in n or "tmp" in n or n.endswith("c/9/0")]
    assert "journal/base.json" in pushed


def test_nothing_that_is_shared_names_a_folder_of_this_machine(
    hub, model_folder, texts_file, tmp_path
):
    home = tmp_path / "home-of-jane-doe"
    model, data = home / "model", home / "texts.jsonl"
    shutil.copytree(model_folder, model)
    shutil.copyfile(texts_file, data)
    for name in ("config.json", "tokenizer_config.json"):
        value = json.loads((model / name).read_text())
        value |= {"_name_or_path": str(model), "notes": {"name_or_path": str(model)}}
        (model / name).write_text(json.dumps(value))
    made = residua.extract(model, data, root=tmp_path / "root", context=64, max_tokens=2000)
    push_cache(made, REPO)
    residua.export(made, tmp_path / "export")
    shared = [*hub.folder(REPO, None).rglob("*"), *(tmp_path / "export").rglob("*")]
    assert len(shared) > 30
    for path in shared:
        assert path.is_dir() or b"jane-doe" not in path.read_bytes(), path
    assert b"jane-doe" in (made.path / "local.json").read_bytes()
    assert verify(made.path).ok


def test_a_cache_that_is_there_is_not_downloaded_again(hub, cache, tmp_path):
    push_cache(cache, REPO)
    pull_cache(REPO, tmp_path / "there")
    hub.calls.clear()
    assert pull_cache(REPO, tmp_path / "there").status == "hit"
    assert hub.calls == ["snapshot_download"]


def test_a_revision_keeps_another_cache(hub, cache, tmp_path):
    other = small_cache(tmp_path / "here", seed=1)
    push_cache(cache, REPO)
    push_cache(other, REPO, revision="second")
    assert pull_cache(REPO, tmp_path / "there", revision="second").cache.id == other.id
    assert pull_cache(REPO, tmp_path / "there").cache.id == cache.id


def test_another_cache_does_not_overwrite_what_a_repository_holds(hub, cache, tmp_path):
    push_cache(cache, REPO)
    before = file_contents(hub.root / REPO)
    with pytest.raises(MismatchError, match=f"holds cache {cache.id[:12]}"):
        push_cache(small_cache(tmp_path / "here", seed=1), REPO)
    assert file_contents(hub.root / REPO) == before


def test_a_card_edited_by_hand_survives_the_next_push(hub, cache):
    push_cache(cache, REPO)
    (hub.root / REPO / "main" / "README.md").write_text("license: mit")
    assert not push_cache(cache, REPO).card
    assert (hub.root / REPO / "main" / "README.md").read_text() == "license: mit"


def test_another_cache_than_the_expected_one_is_refused(hub, cache, tmp_path):
    push_cache(cache, REPO)
    assert pull_cache(REPO, tmp_path / "a", expect=cache.id[:8]).status == "pulled"
    with pytest.raises(MismatchError, match=f"holds cache {cache.id[:12]}, not 123"):
        pull_cache(REPO, tmp_path / "b", expect="123")
    assert list((tmp_path / "b").iterdir()) == []


def damage(folder: Path, name: str) -> None:
    raw = bytearray((folder / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / name).write_bytes(raw)


@pytest.mark.parametrize("name", ["arrays.zarr/residual/1/c/1/0", "head/head.safetensors"])
def test_a_byte_that_changed_on_the_way_is_found_and_nothing_appears(hub, cache, tmp_path, name):
    push_cache(cache, REPO)
    damage(hub.root / REPO / "main", name)
    with pytest.raises(CorruptError, match=name):
        pull_cache(REPO, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_damaged_cache_is_not_pushed(hub, cache):
    damage(cache.path, "arrays.zarr/residual/0/c/0/0")
    with pytest.raises(CorruptError, match="residua verify"):
        push_cache(cache, REPO)
    assert hub.calls == []


def test_an_unfinished_cache_is_not_pushed(hub, cache):
    (cache.path / "journal" / "00000001.json").unlink()
    with pytest.raises(IncompleteError):
        push_cache(ActivationCache(cache.path), REPO)
    assert hub.calls == []


def test_a_repository_with_a_part_missing_is_refused(hub, cache, tmp_path):
    push_cache(cache, REPO)
    (hub.root / REPO / "main" / "journal" / "00000002.json").unlink()
    with pytest.raises(IncompleteError, match="1 parts of this cache are missing"):
        pull_cache(REPO, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_FILES", 5, r"files, the hub takes 5 per repository; .* larger --part-positions"),
        ("MAX_ENTRIES", 2, r"entries, the hub takes 2; .* larger --part-positions"),
        ("MAX_FILE_BYTES", 100, r"per file; .* smaller --part-positions"),
    ],
)
def test_limits_of_the_hub_are_checked_before_anything_is_sent(
    hub, cache, monkeypatch, limit, value, message
):
    monkeypatch.setattr(limits, limit, value)
    with pytest.raises(UsageError, match=message):
        push_cache(cache, REPO)
    assert hub.calls == []


def test_a_repository_that_is_not_there_or_not_a_cache_is_named(hub, tmp_path):
    with pytest.raises(NotFoundError, match="no dataset repository 'someone/activations'"):
        pull_cache(REPO, tmp_path)
    (hub.root / REPO / "main").mkdir(parents=True)
    with pytest.raises(NotFoundError, match=r"is not a cache: it has no manifest\.json"):
        pull_cache(REPO, tmp_path)
    with pytest.raises(NotFoundError, match="no such revision"):
        pull_cache(REPO, tmp_path, revision="v9")


@pytest.mark.parametrize("name", ["head/../../evil", "head//../../../evil", "head/..\\evil"])
def test_names_that_lead_out_of_the_cache_are_refused(hub, cache, tmp_path, monkeypatch, name):
    push_cache(cache, REPO)
    evil = SimpleNamespace(rfilename=name, size=1)
    info = hub.dataset_info(REPO, revision=None, files_metadata=True, token=None)
    info.siblings.append(evil)
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda *_, **__: info)
    with pytest.raises(CorruptError, match="leads out of the cache"):
        pull_cache(REPO, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_files_that_no_record_names_are_dropped(hub, cache, tmp_path):
    push_cache(cache, REPO)
    main = hub.root / REPO / "main"
    (main / "head" / "run_me.py").write_text("print()")
    (main / "notes.txt").write_text("mine")
    assert file_contents(pull_cache(REPO, tmp_path / "there").cache.path) == file_contents(
        cache.path
    )


def test_a_full_disk_is_refused_before_the_download(hub, cache, tmp_path, monkeypatch):
    push_cache(cache, REPO)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(NoSpaceError, match="has 0.00 GB free"):
        pull_cache(REPO, tmp_path / "there")
    assert hub.calls.count("snapshot_download") == 1


def test_an_unfinished_cache_under_the_root_is_left_alone(hub, cache, tmp_path):
    push_cache(cache, REPO)
    there = small_cache(tmp_path / "there")
    (there.path / "journal" / "00000001.json").unlink()
    with pytest.raises(IncompleteError, match="unfinished; finish it"):
        pull_cache(REPO, tmp_path / "there")


def test_an_interrupted_pull_goes_on_in_the_same_folder(hub, cache, tmp_path, monkeypatch):
    push_cache(cache, REPO)
    whole = hub.snapshot_download

    def cut(*args: Any, **kwargs: Any) -> None:
        whole(*args, **kwargs)
        if "head/*" in kwargs["allow_patterns"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cut)
    with pytest.raises(KeyboardInterrupt):
        pull_cache(REPO, tmp_path / "there")
    (left,) = (tmp_path / "there").iterdir()
    assert left.name.startswith(".pull-")
    assert (left / "head" / "head.json").is_file()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", whole)
    pull_cache(REPO, tmp_path / "there")
    assert [p.name for p in (tmp_path / "there").iterdir()] == [cache.id]


def function_that_raises(error: Exception) -> Callable[..., None]:
    def function(*_: Any, **__: Any) -> None:
        raise error

    return function


def client_errors() -> Iterator[Any]:
    http, gone = hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError
    yield http("401 Unauthorized\nlong", response=http_response(401)), UsageError, "hf auth login"
    yield http("500 Server Error", response=http_response(500)), UsageError, "refused: 500"
    yield hub_errors.HFValidationError("Repo id must"), UsageError, "Repo id must"
    yield hub_errors.LocalTokenNotFoundError("Token is required"), UsageError, "Token"
    yield hub_errors.OfflineModeIsEnabled("offline"), ResiduaError, "cannot be reached: offline"
    yield gone("no connection"), ResiduaError, "cannot be reached"
    yield TimeoutError(), ResiduaError, "cannot be reached: TimeoutError"
    yield OSError(28, "No space left on device"), NoSpaceError, "the disk is full"


@pytest.mark.parametrize(
    ("error", "ours", "message"), [*client_errors()], ids=lambda v: str(v)[:30]
)
def test_errors_of_the_client_become_messages(
    hub, cache, tmp_path, monkeypatch, error, ours, message
):
    for name in ("create_repo", "dataset_info"):
        monkeypatch.setattr(huggingface_hub, name, function_that_raises(error))
    for call in (lambda: push_cache(cache, REPO), lambda: pull_cache(REPO, tmp_path / "there")):
        with pytest.raises(ours, match=message):
            call()


def test_without_a_network_both_say_so(cache, tmp_path):
    for call in (lambda: push_cache(cache, REPO), lambda: pull_cache(REPO, tmp_path)):
        with pytest.raises(ResiduaError, match="the hub cannot be reached"):
            call()


def test_the_card_says_what_is_in_the_cache(tiny_cache, model_folder):
    text = format_dataset_card(tiny_cache, REPO)
    front = text.split("---\n")[1]
    assert "license:" not in [line.split(" ")[0] for line in front.splitlines()]
    assert NO_LICENCE in text
    for shown in (
        tiny_cache.id,
        tiny_cache.manifest.model.weights,
        f"{tiny_cache.positions:,}",
        f"residua pull {REPO}",
        f"layer {tiny_cache.n_blocks} is **before** the final norm",
        "zarr.open_group",
        f"its id `{tiny_cache.id}` names the weights",
    ):
        assert shown in text
    assert "not measured" not in text
    assert str(model_folder.parent) not in text


@pytest.mark.parametrize(
    ("rows", "tag"),
    [(5, "n<1K"), (1000, "1K<n<10K"), (9999, "1K<n<10K"), (10**6, "1M<n<10M"), (10**13, "n>1T")],
)
def test_size_categories_are_those_of_the_hub(rows, tag):
    assert size_category(rows) == tag
