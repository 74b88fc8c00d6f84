"""Claims about probes on the hub: what is loaded is the probe that left.

The hub is a local folder here, in place of the functions of `huggingface_hub` that are called.
"""

import inspect
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors as hub_errors

import residua
from residua.cache.errors import CorruptError, MismatchError, NotFoundError
from residua.probes.lens.tuned_lens import FutureLens, TunedLens
from residua.probes.saved.hub import CARD_FILE, pull_probe_into
from residua.probes.saved.library import probe_path
from residua.probes.saved.save import save_probe

from ...support.synthetic import make_cache, random_head

REPO = "someone/lens"


class LocalHub:
    """Model repositories as folders; a revision is a folder beside `main`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, repo_id: str, revision: str | None) -> Path:
        path = self.root / repo_id / (revision or "main")
        if not path.is_dir():
            from types import SimpleNamespace

            answer: Any = SimpleNamespace(status_code=404, headers={}, request=None)
            raise hub_errors.RepositoryNotFoundError("404", response=answer)
        return path

    def create_repo(self, repo_id, *, repo_type, private, exist_ok, token):
        assert (repo_type, exist_ok) == ("model", True)
        (self.root / repo_id / "main").mkdir(parents=True, exist_ok=True)
        return f"https://huggingface.co/{repo_id}"

    def create_branch(self, repo_id, *, repo_type, branch, exist_ok, token):
        (self.root / repo_id / branch).mkdir(exist_ok=True)

    def file_exists(self, repo_id, filename, *, repo_type, revision, token):
        return (self.folder(repo_id, revision) / filename).is_file()

    def hf_hub_download(self, repo_id, filename, *, repo_type, revision, token):
        return str(self.folder(repo_id, revision) / filename)

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, repo_type, revision, token):
        (self.folder(repo_id, revision) / path_in_repo).write_bytes(path_or_fileobj)

    def upload_folder(
        self, *, repo_id, folder_path, commit_message, allow_patterns, repo_type, revision, token
    ):
        for file in Path(folder_path).iterdir():
            if any(fnmatchcase(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, self.folder(repo_id, revision) / file.name)

    def dataset_info(self, repo_id, *, revision, files_metadata, token):
        self.folder("no dataset repository", None)

    def snapshot_download(self, repo_id, *, repo_type, revision, allow_patterns, token):
        assert repo_type == "model"
        return str(self.folder(repo_id, revision))


FUNCTIONS = [name for name in vars(LocalHub) if not name.startswith("_") and name != "folder"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    fake = LocalHub(tmp_path / "hub")
    for name in FUNCTIONS:
        monkeypatch.setattr(huggingface_hub, name, getattr(fake, name))
    return fake


def small_cache(root: Path, seed: int = 0) -> residua.ActivationCache:
    rows = np.random.default_rng(0).normal(size=(600, 8)).astype("f4")
    layers = [rows, np.tanh(2 * rows), rows]
    return make_cache(root, layers, [50] * 12, random_head(8, 11, seed))


@pytest.fixture
def lens(tmp_path: Path) -> TunedLens:
    return TunedLens(steps=5, batch=64).fit(small_cache(tmp_path / "here"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_client_has_what_is_called(name: str) -> None:
    real = inspect.signature(getattr(huggingface_hub, name)).parameters
    fake = inspect.signature(getattr(LocalHub, name)).parameters
    for parameter in list(fake.values())[1:]:
        assert parameter.name in real, f"huggingface_hub.{name} has no {parameter.name}"


def test_a_loaded_probe_is_the_one_that_was_pushed(hub: LocalHub, lens: TunedLens) -> None:
    assert residua.push_probe(lens, REPO) == f"https://huggingface.co/{REPO}"
    found = residua.pull_probe(REPO)
    assert found.metrics() == lens.metrics()
    assert np.array_equal(found.map(1).weight, lens.map(1).weight)
    names = {path.name for path in (hub.root / REPO / "main").iterdir()}
    assert names == {"config.json", "probe.safetensors", CARD_FILE}


def test_a_saved_folder_is_pushed_to_a_revision(
    hub: LocalHub, lens: TunedLens, tmp_path: Path
) -> None:
    residua.push_probe(save_probe(lens, tmp_path / "saved"), REPO, revision="small")
    assert residua.pull_probe(REPO, revision="small").metrics() == lens.metrics()
    with pytest.raises(NotFoundError, match="no model repository 'someone/other'"):
        residua.pull_probe("someone/other")


def test_a_pulled_probe_has_the_folder_of_its_fit(
    hub: LocalHub, lens: TunedLens, tmp_path: Path
) -> None:
    residua.push_probe(lens, REPO)
    path, status = pull_probe_into(REPO, tmp_path / "there")
    assert (path, status) == (probe_path(tmp_path / "there", lens), "pulled")
    assert residua.load_probe(path).metrics() == lens.metrics()
    assert lens.cache_id_ is not None
    expect = lens.cache_id_[:6]
    assert pull_probe_into(REPO, tmp_path / "there", expect=expect) == (path, "hit")
    with pytest.raises(MismatchError, match="was fitted on cache .*, not 00000000"):
        pull_probe_into(REPO, tmp_path / "elsewhere", expect="00000000")
    assert not (tmp_path / "elsewhere").exists()
    (hub.root / REPO / "main" / "probe.safetensors").write_bytes(b"changed")
    with pytest.raises(CorruptError):
        pull_probe_into(REPO, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
    (hub.root / REPO / "main" / "config.json").unlink()
    with pytest.raises(NotFoundError, match="is not a probe"):
        pull_probe_into(REPO, tmp_path / "elsewhere")


def test_the_card_says_what_it_is_and_stays_as_it_was_edited(
    hub: LocalHub, lens: TunedLens, tmp_path: Path
) -> None:
    residua.push_probe(
        lens, REPO, cache=residua.ActivationCache(next((tmp_path / "here").iterdir()))
    )
    path = hub.root / REPO / "main" / CARD_FILE
    text = path.read_text()
    assert "# lens probe of synthetic on random" in text
    assert f"`{lens.cache_id_}`" in text
    assert "batch 64" in text
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
    columns = next(line for line in lines if line[0] == "layer")
    found = dict(zip(columns, next(line for line in lines if line[0] == "1"), strict=True))
    assert float(found["kl"]) == pytest.approx(lens.metrics()[1]["kl"], rel=1e-3)
    path.write_text("edited")
    residua.push_probe(lens, REPO)
    assert path.read_text() == "edited"


def test_the_card_of_a_basis_says_how_a_basis_is_used(hub: LocalHub, tmp_path: Path) -> None:
    source = small_cache(tmp_path / "here")
    lens = residua.LogitLens.of(source, 0)
    basis = residua.CausalBasis(k=2, layers=1, method="one-shot").fit(source, lens)
    residua.push_probe(basis, "someone/basis", cache=source)
    assert residua.pull_probe("someone/basis").metrics() == basis.metrics()
    card = (hub.root / "someone/basis" / "main" / CARD_FILE).read_text()
    assert "probe.ablate(rows, k, layer=layer)" in card
    assert "residua.evaluate" not in card
    assert "for the method Belrose et al., Tuned Lens (arXiv 2303.08112), section 4." in card
    assert "{" not in card


def test_a_repository_of_another_probe_is_left_alone(
    hub: LocalHub, lens: TunedLens, tmp_path: Path
) -> None:
    residua.push_probe(lens, REPO)
    other = small_cache(tmp_path / "other", seed=1)
    with pytest.raises(MismatchError, match="holds a probe of head"):
        residua.push_probe(TunedLens(steps=0).fit(other), REPO)
    future = FutureLens(offsets=1, steps=0).fit(small_cache(tmp_path / "here"))
    with pytest.raises(MismatchError, match="holds a probe of kind 'lens'"):
        residua.push_probe(future, REPO)
    assert residua.pull_probe(REPO).metrics() == lens.metrics()


def test_a_damaged_probe_is_neither_pushed_nor_loaded(
    hub: LocalHub, lens: TunedLens, tmp_path: Path
) -> None:
    residua.push_probe(lens, REPO)
    for folder in (save_probe(lens, tmp_path / "saved"), hub.root / REPO / "main"):
        raw = bytearray((folder / "probe.safetensors").read_bytes())
        raw[-1] ^= 1
        (folder / "probe.safetensors").write_bytes(raw)
    with pytest.raises(CorruptError):
        residua.push_probe(tmp_path / "saved", REPO)
    with pytest.raises(CorruptError):
        residua.pull_probe(REPO)
