"""The files of a model: where they are, what they are (by content), and its tokenizer.

Needs no torch and no transformers, so that a request for a cache that exists is answered fast.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .digests import known_digests
from .errors import ModelError
from .jsonfile import digest
from .manifest import ModelIdentity
from .safetensors_header import RUNNING_DTYPES, read_header

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.py"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
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
    loaded_dtype: str | None = None
    """dtype that the loaded model was found to run in; None before it is loaded."""

    @classmethod
    def locate(cls, name: str, revision: str | None = None) -> "ModelSource":
        """A local folder, or a hub id whose files are fetched into the hub's own cache."""
        folder = Path(name).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ModelError(
                    f"{folder} holds no config.json; expected a model saved by transformers"
                )
            return cls(name, folder.resolve())
        if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ModelError(
                f"{name} is not a model folder; give a folder or a hub id like org/name"
            )
        return cls._from_hub(name, revision)

    @classmethod
    def _from_hub(cls, name: str, revision: str | None) -> "ModelSource":
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
        return cls(name, folder, commit)

    @cached_property
    def config(self) -> dict[str, Any]:
        try:
            value = json.loads((self.folder / "config.json").read_bytes())
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.folder}/config.json cannot be read: {error}") from None
        if not isinstance(value, dict):
            raise ModelError(f"{self.folder}/config.json is not a JSON object")
        return value

    def constant(self, name: str) -> Any:
        """A value of the configuration, also from the text part of a composite model."""
        return self.config.get(name, (self.config.get("text_config") or {}).get(name))

    @cached_property
    def compute_dtype(self) -> str:
        """dtype in which the model runs: the loaded one's, else as transformers' `auto` takes it.

        That is the configuration's, else the index's, else the first floating-point tensor's.
        """
        if self.loaded_dtype is not None:
            return self.loaded_dtype
        found = self.constant("dtype") or self.constant("torch_dtype")
        found = found.get("") if isinstance(found, dict) else found
        return str(found or self._checkpoint_dtype()).removeprefix("torch.")

    def _checkpoint_dtype(self) -> str:
        """dtype of the first tensor of the first file, by name, that a model can run in."""
        index = self._weight_index()
        metadata = index.get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("dtype"), str):
            return metadata["dtype"]
        files = index.get("weight_map")
        names = sorted(set(files.values())) if isinstance(files, dict) else []
        paths = [self.folder / str(name) for name in names] or self.weight_files
        entries = read_header(paths[0]) if paths else {}
        for name in sorted(entries):
            if (dtype := RUNNING_DTYPES.get(entries[name].dtype)) is not None:
                return dtype
        return "float32"

    def _weight_index(self) -> dict[str, Any]:
        """The index of a checkpoint in several files; empty for one in a single file."""
        path = self.folder / "model.safetensors.index.json"
        if not path.is_file() or (self.folder / "model.safetensors").exists():
            return {}
        try:
            value = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from None
        return value if isinstance(value, dict) else {}

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files of the folder, by name."""
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def context(self) -> int | None:
        """Longest context of the model, if its configuration says so."""
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
            if isinstance(value := self.constant(name), int) and value > 0:
                return max(1, value - self._reserved_positions())
        return None

    def _reserved_positions(self) -> int:
        """Rows of the position embedding that no token of a text gets.

        Models of this family count positions from the padding token's number on.
        """
        if self.config.get("model_type") not in POSITIONS_AFTER_PADDING:
            return 0
        padding = self.constant("pad_token_id")
        return 2 if padding is None else int(padding) + 1

    @cached_property
    def identity(self) -> ModelIdentity:
        """Content hashes; the folder's name and place do not matter."""
        weights = self.weight_files
        if not weights:
            raise ModelError(
                f"{self.folder} holds no *.safetensors weights; pickled weights are not read, "
                "save the model with save_pretrained(..., safe_serialization=True)"
            )
        for path in weights:
            read_header(path)  # a file that is no safetensors file is refused before it is hashed
        hashes = known_digests(weights)
        config = {k: v for k, v in self.config.items() if k not in _VOLATILE}
        names = self.config.get("architectures") or [self.config.get("model_type", "unknown")]
        return ModelIdentity(digest(hashes), digest(config), str(names[0]))

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The fast tokenizer exactly as `tokenizer.json` has it."""
        from tokenizers import Tokenizer

        path = self.folder / "tokenizer.json"
        if path.is_file():
            try:
                tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:  # tokenizers raises bare Exception
                raise ModelError(f"{path} is not a tokenizer: {error}") from None
        else:
            from .model import convert_tokenizer

            tokenizer = convert_tokenizer(self.folder)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def tokenizer_digest(self) -> str:
        """sha256 of the tokenizer itself, as its canonical JSON."""
        return digest(json.loads(self.tokenizer.to_str()))

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
            value = self.constant(name)
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int) and 0 <= value < (self.constant("vocab_size") or 1 << 62):
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
