"""The files of a model: where they are, what they are (by content), and its tokenizer.

Needs no torch, and transformers only for a tokenizer that was not met before, so that a request for
a cache that exists is answered fast.
"""

import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..files.json_files import file_digest, json_digest
from ..format.manifest import ModelIdentity
from .safetensors_header import RUNNING_DTYPES, read_header
from .weight_digests import remembered_file_digests, remembered_tensor_digests

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.py"]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The weights of a folder: one file, else those that the index names."""
POSITIONS_AFTER_PADDING = frozenset(
    "roberta camembert xlm-roberta xlm-roberta-xl roberta-prelayernorm data2vec-text xmod "
    "longformer ibert".split()
)
"""Model types whose first token has position `pad_token_id` + 1."""
_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


@dataclass(frozen=True)
class ModelSource:
    """A folder with `config.json`, safetensors weights and tokenizer files."""

    name: str
    """What the user called the model."""
    folder: Path
    revision: str | None = None
    """Commit of the hub repository."""
    trust_remote_code: bool = False
    """Whether code that comes with the model runs."""
    loaded_dtype: str | None = None
    """dtype that the loaded model was found to run in; None before it is loaded."""

    @classmethod
    def locate(
        cls, name: str, revision: str | None = None, trust_remote_code: bool = False
    ) -> "ModelSource":
        """A local folder, or a hub id whose files are fetched into the hub's own cache."""
        folder = Path(name).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ModelError(
                    f"{folder} holds no config.json; expected a model saved by transformers"
                )
            return cls(name, folder.resolve(), None, trust_remote_code)
        if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ModelError(
                f"{name} is not a model folder; give a folder or a hub id like org/name"
            )
        return cls._from_hub(name, revision, trust_remote_code)

    @classmethod
    def _from_hub(cls, name: str, revision: str | None, trust_remote_code: bool) -> "ModelSource":
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(
                f"{name} is neither a folder here nor a model that can be fetched: {reason}"
            ) from None
        commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
        return cls(name, folder, commit, trust_remote_code)

    @cached_property
    def config(self) -> dict[str, Any]:
        try:
            value = json.loads((self.folder / "config.json").read_bytes())
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.folder}/config.json cannot be read: {error}") from None
        if not isinstance(value, dict):
            raise ModelError(f"{self.folder}/config.json is not a JSON object")
        return value

    def config_value(self, name: str) -> Any:
        """A value of the configuration, also from the text part of a composite model."""
        return self.config.get(name, (self.config.get("text_config") or {}).get(name))

    @cached_property
    def compute_dtype(self) -> str:
        """dtype in which the model runs: the loaded one's, else as transformers' `auto` takes it.

        That is the configuration's, else the index's, else the first floating-point tensor's.
        """
        if self.loaded_dtype is not None:
            return self.loaded_dtype
        found = self.config_value("dtype") or self.config_value("torch_dtype")
        found = found.get("") if isinstance(found, dict) else found
        return str(found or self._checkpoint_dtype()).removeprefix("torch.")

    def _checkpoint_dtype(self) -> str:
        """dtype of the first tensor of the first file, by name, that a model can run in."""
        index = self._weight_index()
        metadata = index.get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("dtype"), str):
            return metadata["dtype"]
        entries = read_header(self.weight_files[0])
        for name in sorted(entries):
            if (dtype := RUNNING_DTYPES.get(entries[name].dtype)) is not None:
                return dtype
        return "float32"

    def _weight_index(self) -> dict[str, Any]:
        """The index of a checkpoint in several files; empty for one in a single file."""
        path = self.folder / INDEX
        if not path.is_file() or os.path.lexists(self.folder / WEIGHTS):
            return {}
        try:
            value = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from None
        return value if isinstance(value, dict) else {}

    @property
    def context(self) -> int | None:
        """Longest context of the model, if its configuration says so."""
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
            if isinstance(value := self.config_value(name), int) and value > 0:
                return max(1, value - self._reserved_positions())
        return None

    def _reserved_positions(self) -> int:
        """Rows of the position embedding that no token of a text gets.

        Models of this family count positions from the padding token's number on.
        """
        if self.config.get("model_type") not in POSITIONS_AFTER_PADDING:
            return 0
        padding = self.config_value("pad_token_id")
        return 2 if padding is None else int(padding) + 1

    @cached_property
    def identity(self) -> ModelIdentity:
        """Content hashes of all that decides the numbers; the folder's name does not matter.

        Raises `ModelError` if the weights are not safetensors, if the folder is an adapter of
        another model, or if its code lies in another repository.
        """
        for path in self.weight_files:
            read_header(path)  # a file that cannot be read is said before one is hashed
        tensors: dict[str, str] = {}
        for file, digests in remembered_tensor_digests(self.weight_files).items():
            if twice := sorted(tensors.keys() & digests.keys()):
                raise ModelError(f"{file} holds tensor {twice[0]!r}, which another file holds too")
            tensors |= digests
        return ModelIdentity(
            json_digest(tensors), self._config_digest, self._architecture, self._code
        )

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files that the model is loaded from, sorted."""
        if (self.folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{self.folder} holds an adapter of another model (adapter_config.json); merge it "
                "into its base model (merge_and_unload) and save the whole"
            )
        name = self.config.get("transformers_weights")
        if name is None:
            name = WEIGHTS if os.path.lexists(self.folder / WEIGHTS) else INDEX
        names = [str(name)]
        if names[0].endswith(".index.json") and (self.folder / names[0]).is_file():
            names = self._indexed(self.folder / names[0])
        for name in names:
            if not name.endswith(".safetensors") or not os.path.lexists(self.folder / name):
                found = "is missing" if name.endswith(".safetensors") else "is not read"
                where = self.folder / (WEIGHTS if name == INDEX else name)
                raise ModelError(
                    f"{where} {found if name != INDEX else 'is missing'}; expected the model's "
                    "weights as *.safetensors (pickled weights are not read), save the model with "
                    "save_pretrained"
                )
            if self.folder not in (self.folder / name).absolute().parents or ".." in name:
                raise ModelError(f"{name!r} in {names[0]} lies outside {self.folder}")
        return [self.folder / name for name in names]

    def _indexed(self, index: Path) -> list[str]:
        """Names of the files that an index of weights names, sorted."""
        try:
            found = json.loads(index.read_bytes())["weight_map"].values()
            names = sorted({str(name) for name in found})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{index} is not an index of weights: {error}") from None
        if not names:
            raise ModelError(f"{index} names no file of weights")
        return names

    @property
    def _config_digest(self) -> str:
        return json_digest({k: v for k, v in self.config.items() if k not in _VOLATILE})

    @property
    def _architecture(self) -> str:
        names = self.config.get("architectures") or [self.config.get("model_type", "unknown")]
        return str(names[0])

    @property
    def _code(self) -> str | None:
        """sha256 over the folder's *.py, where they run."""
        if not self.trust_remote_code or not (classes := self.config.get("auto_map")):
            return None
        named = [name for value in classes.values() for name in _strings(value)]
        if far := [name for name in named if "--" in name]:
            raise ModelError(
                f"{self.folder}/config.json takes code from another repository ({far[0]}), which "
                "may change; copy that repository's *.py into the folder, and name them in auto_map"
            )
        files = sorted(self.folder.rglob("*.py"))
        return json_digest({p.relative_to(self.folder).as_posix(): file_digest(p) for p in files})

    @cached_property
    def identity_of_files(self) -> ModelIdentity:
        """The identity that format 1 has: of the weight files, whatever the tensors in them."""
        weights = sorted(self.folder.glob("*.safetensors"))
        if not weights:
            raise ModelError(f"{self.folder} holds no *.safetensors weights")
        for path in weights:
            read_header(path)
        return ModelIdentity(
            json_digest(remembered_file_digests(weights)), self._config_digest, self._architecture
        )

    def identity_for_format(self, version: int) -> ModelIdentity:
        """The identity in the format `version`."""
        return self.identity_of_files if version == 1 else self.identity

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The model's own tokenizer with all its settings, as `AutoTokenizer` loads it.

        What was converted once is remembered by the content of its files.
        """
        from .tokenizer import load_tokenizer

        return load_tokenizer(self.folder, self.trust_remote_code)

    @cached_property
    def tokenizer_file(self) -> "Tokenizer":
        """What `tokenizer.json` alone says, which format 1 took for the tokenizer."""
        from .tokenizer import read_tokenizer_file

        path = self.folder / "tokenizer.json"
        return read_tokenizer_file(path) if path.is_file() else self.tokenizer

    def tokenizer_for_format(self, version: int) -> "Tokenizer":
        """The tokenizer that makes the tokens of a cache in the format `version`."""
        return self.tokenizer_file if version == 1 else self.tokenizer

    @cached_property
    def separator(self) -> int | None:
        """Token put before each packed document where the tokenizer adds none by itself."""
        settings = self._tokenizer_settings()
        for name in ("bos_token", "eos_token"):
            token = settings.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and (number := self.tokenizer.token_to_id(token)) is not None:
                return number
        for name in ("bos_token_id", "eos_token_id"):
            value = self.config_value(name)
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int) and 0 <= value < (self.config_value("vocab_size") or 1 << 62):
                return value
        return None

    def _tokenizer_settings(self) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            try:
                merged |= json.loads((self.folder / name).read_bytes())
            except (OSError, ValueError, TypeError):
                continue
        return merged


def _strings(value: Any) -> list[str]:
    """The strings in a value of `auto_map`: one, or a list with nulls."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, str)]
