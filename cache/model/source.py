"""`ModelSource`: a model's folder (local, or fetched from the hub), its identity and its tokenizer.

`extraction/resolve.py` locates the source and compares its `identity` (digests of weights,
configuration and code) with that of existing caches; `load_model` loads its weights. No torch is
needed, and transformers only for a tokenizer that was not loaded before, so a request that an
existing cache answers takes little time.
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
from ..optional_libraries import require_extra
from .safetensors_header import RUNNING_DTYPES, read_header
from .weight_digests import remembered_file_digests, remembered_tensor_digests

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.py", "*.jinja"]
"""Files that are fetched from the hub."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Weights of a folder: one file, or the files that the index names."""
POSITIONS_AFTER_PADDING = frozenset(
    "roberta camembert xlm-roberta xlm-roberta-xl roberta-prelayernorm data2vec-text xmod "
    "longformer ibert".split()
)
"""Model types whose first token has position `pad_token_id` + 1."""
NO_IDENTITY = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Keys of config.json outside the model's identity."""


@dataclass(frozen=True)
class ModelSource:
    """A folder with `config.json`, safetensors weights and tokenizer files."""

    name: str
    """Name that the user gave: a path or a hub id."""
    folder: Path
    revision: str | None = None
    """Commit of the hub repository; None for a local folder."""
    trust_remote_code: bool = False
    """Whether Python code in the folder may run."""
    loaded_dtype: str | None = None
    """dtype of the loaded model; None before loading."""

    @classmethod
    def locate(
        cls, name: str, revision: str | None = None, trust_remote_code: bool = False
    ) -> "ModelSource":
        """The source of a local folder, or of a hub id, whose files are fetched if needed.

        Raises `ModelError` if `name` is neither.
        """
        require_extra("extract", "running a model")
        folder = Path(name).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                if (folder / "adapter_config.json").is_file():
                    raise _adapter_error(folder)
                raise ModelError(
                    f"{folder} holds no config.json; expected a model saved by transformers"
                )
            return cls(name, folder.resolve(), None, trust_remote_code)
        if folder.is_symlink() and not folder.exists():
            raise ModelError(
                f"{name} is a link to {os.readlink(folder)}, which does not exist; give a model "
                "folder or a hub id like org/name"
            )
        if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ModelError(
                f"{name} is not a model folder; give a folder or a hub id like org/name"
            )
        return cls._from_hub(name, revision, trust_remote_code)

    @classmethod
    def downloaded(cls, name: str, revision: str | None = None) -> "ModelSource":
        """The source of a hub id whose files are on this machine; raises `ModelError` without."""
        return cls._from_hub(name, revision, False, local_files_only=True)

    @classmethod
    def _from_hub(
        cls,
        name: str,
        revision: str | None,
        trust_remote_code: bool,
        local_files_only: bool = False,
    ) -> "ModelSource":
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            folder = Path(
                snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=HUB_FILES,
                    local_files_only=local_files_only,
                )
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(
                f"{name} is neither a folder here nor a model that can be fetched: {reason}"
            ) from None
        commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
        return cls(name, folder, commit, trust_remote_code)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Contents of config.json; raises `ModelError` if the file cannot be read."""
        try:
            value = json.loads((self.folder / "config.json").read_bytes())
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.folder}/config.json cannot be read: {error}") from None
        if not isinstance(value, dict):
            raise ModelError(f"{self.folder}/config.json is not a JSON object")
        return value

    def config_value(self, name: str) -> Any:
        """A value of config.json or, in a composite model, of its `text_config`; None if absent."""
        return self.config.get(name, (self.config.get("text_config") or {}).get(name))

    @cached_property
    def compute_dtype(self) -> str:
        """dtype of the running model: the loaded model's, or the choice of transformers' `auto`.

        `auto` takes the dtype of the configuration, else of the index, else of the first
        floating-point tensor.
        """
        if self.loaded_dtype is not None:
            return self.loaded_dtype
        dtype = self.config_value("dtype") or self.config_value("torch_dtype")
        dtype = dtype.get("") if isinstance(dtype, dict) else dtype
        return str(dtype or self._checkpoint_dtype()).removeprefix("torch.")

    def _checkpoint_dtype(self) -> str:
        """dtype of the index, else of the first tensor (by name) in `RUNNING_DTYPES`."""
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
        """The index of a checkpoint of several files; empty for a single file."""
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
        """Longest context of the model, in tokens; None if absent from the configuration."""
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
            if isinstance(value := self.config_value(name), int) and value > 0:
                return max(1, value - self._reserved_positions())
        return None

    def _reserved_positions(self) -> int:
        """Rows of the position embedding not used by any token of a text.

        The model types `POSITIONS_AFTER_PADDING` count positions from the padding token's id on.
        """
        if self.config.get("model_type") not in POSITIONS_AFTER_PADDING:
            return 0
        padding = self.config_value("pad_token_id")
        return 2 if padding is None else int(padding) + 1

    @cached_property
    def identity(self) -> ModelIdentity:
        """Digests of the weights, configuration and code, which decide all activations.

        Raises `ModelError` if the weights are not safetensors, if the folder is an adapter of
        another model, or if its code lies in another repository.
        """
        for path in self.weight_files:
            read_header(path)  # damaged files are reported before any file is hashed
        tensors: dict[str, str] = {}
        for file, digests in remembered_tensor_digests(self.weight_files).items():
            if shared := sorted(tensors.keys() & digests.keys()):
                raise ModelError(f"{file} holds tensor {shared[0]!r}, which another file holds too")
            tensors |= digests
        return ModelIdentity(
            json_digest(tensors), self._config_digest, self._architecture, self._code_digest
        )

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files of the model, sorted by name."""
        if (self.folder / "adapter_config.json").is_file():
            raise _adapter_error(self.folder)
        # Names: from the configuration, else one file, else the files of the index.
        name = self.config.get("transformers_weights")
        if name is None:
            name = WEIGHTS if os.path.lexists(self.folder / WEIGHTS) else INDEX
        names = [str(name)]
        if names[0].endswith(".index.json") and (self.folder / names[0]).is_file():
            names = self._indexed_names(self.folder / names[0])

        # Each file must exist, be of safetensors, and lie in the folder.
        for name in names:
            is_safetensors = name.endswith(".safetensors")
            if not is_safetensors or not os.path.lexists(self.folder / name):
                problem = "is missing" if is_safetensors or name == INDEX else "is not read"
                path = self.folder / (WEIGHTS if name == INDEX else name)
                raise ModelError(
                    f"{path} {problem}; expected the model's "
                    "weights as *.safetensors (pickled weights are not read), save the model with "
                    "save_pretrained"
                )
            if self.folder not in (self.folder / name).absolute().parents or ".." in name:
                raise ModelError(f"{name!r} in {names[0]} lies outside {self.folder}")
        return [self.folder / name for name in names]

    def _indexed_names(self, index: Path) -> list[str]:
        """Names of the weight files that an index lists, sorted."""
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
            names = sorted({str(name) for name in weight_map.values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{index} is not an index of weights: {error}") from None
        if not names:
            raise ModelError(f"{index} names no file of weights")
        return names

    @property
    def _config_digest(self) -> str:
        """sha256 of config.json without the keys `NO_IDENTITY`."""
        return json_digest(
            {key: value for key, value in self.config.items() if key not in NO_IDENTITY}
        )

    @property
    def _architecture(self) -> str:
        names = self.config.get("architectures") or [self.config.get("model_type", "unknown")]
        return str(names[0])

    @property
    def _code_digest(self) -> str | None:
        """sha256 over the folder's *.py files; None if no code of the folder runs."""
        if not self.trust_remote_code or not (classes := self.config.get("auto_map")):
            return None
        class_names = [name for value in classes.values() for name in _strings(value)]
        if remote_names := [name for name in class_names if "--" in name]:
            raise ModelError(
                f"{self.folder}/config.json takes code from another repository "
                f"({remote_names[0]}), which may change; copy that repository's *.py into the "
                "folder, and name them in auto_map"
            )
        files = sorted(self.folder.rglob("*.py"))
        return json_digest(
            {path.relative_to(self.folder).as_posix(): file_digest(path) for path in files}
        )

    @cached_property
    def format1_identity(self) -> ModelIdentity:
        """The identity in format 1, which digests whole weight files instead of tensors."""
        weights = sorted(self.folder.glob("*.safetensors"))
        if not weights:
            raise ModelError(f"{self.folder} holds no *.safetensors weights")
        for path in weights:
            read_header(path)
        return ModelIdentity(
            json_digest(remembered_file_digests(weights)), self._config_digest, self._architecture
        )

    def identity_for_format(self, version: int) -> ModelIdentity:
        """The identity recorded by caches of the format `version`."""
        return self.format1_identity if version == 1 else self.identity

    @cached_property
    def tokenizer_files_digest(self) -> str:
        """Digest of all that decides the tokenizer, known without loading it."""
        from .tokenizer import tokenizer_files_digest

        return tokenizer_files_digest(self.folder, self.trust_remote_code)

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The model's tokenizer with all its settings, as `AutoTokenizer` loads it."""
        from .tokenizer import load_tokenizer

        return load_tokenizer(self.folder, self.trust_remote_code)

    @cached_property
    def format1_tokenizer(self) -> "Tokenizer":
        """The tokenizer of format 1, which read tokenizer.json alone."""
        from .tokenizer import read_tokenizer_file

        path = self.folder / "tokenizer.json"
        return read_tokenizer_file(path) if path.is_file() else self.tokenizer

    def tokenizer_for_format(self, version: int) -> "Tokenizer":
        """The tokenizer for caches of the format `version`."""
        return self.format1_tokenizer if version == 1 else self.tokenizer

    @cached_property
    def separator(self) -> int | None:
        """Token id to put before each packed document: bos, else eos; None without both."""
        return self._special_token("bos_token", "eos_token")

    @cached_property
    def eos(self) -> int | None:
        """Token id of the end of a text; None if the model's files name none."""
        return self._special_token("eos_token")

    def _special_token(self, *names: str) -> int | None:
        """Id of the first of the special tokens `names` that exists, by the tokenizer's files.

        If these name none, by the configuration.
        """
        settings = self._tokenizer_settings()
        for name in names:
            token = settings.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and (number := self.tokenizer.token_to_id(token)) is not None:
                return number
        for name in names:
            value = self.config_value(f"{name}_id")
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int) and 0 <= value < (self.config_value("vocab_size") or 1 << 62):
                return value
        return None

    @cached_property
    def has_chat_template(self) -> bool:
        """Whether the model's files have a template for conversations."""
        has_file = (self.folder / "chat_template.jinja").is_file()
        return has_file or bool(self._tokenizer_settings().get("chat_template"))

    def _tokenizer_settings(self) -> dict[str, Any]:
        """special_tokens_map.json, overridden by tokenizer_config.json."""
        merged: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            try:
                merged |= json.loads((self.folder / name).read_bytes())
            except (OSError, ValueError, TypeError):
                continue
        return merged


def _adapter_error(folder: Path) -> ModelError:
    return ModelError(
        f"{folder} holds an adapter of another model (adapter_config.json); merge it into its base "
        "model (merge_and_unload) and save the whole"
    )


def _strings(value: Any) -> list[str]:
    """The strings in a value of `auto_map`: a string, or a list of strings and nulls."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, str)]
