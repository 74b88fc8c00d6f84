"""`LoadedModel`: a causal language model that the caller has loaded, as the source of a cache.

`hold_loaded_model` checks a model of transformers and its tokenizer, and gives a `ModelSource` for
them. The identity is that of the model's tensors: where they and the configuration are those of the
folder (or hub repository, if its files are here) that the model was loaded from, it is the identity
of that folder, so that either finds the caches of the other. Otherwise it is what the folder would
have that `save_pretrained` writes.
"""

import copy
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, ResiduaError, UsageError
from ..files.json_files import json_digest
from ..files.staging import temporary_folder
from ..format.manifest import ModelIdentity
from .checkpoint_comparison import COMPUTED
from .model_loading import checkpoint_tensors
from .safetensors_header import read_header
from .source import NO_IDENTITY, ModelSource
from .tokenizer import SAMPLE_TEXTS, load_tokenizer, tokenizer_digest, without_length_limits
from .transformers_guard import guard_transformers
from .weight_digests import remembered_tensor_digests

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

DTYPE_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""dtype of torch -> its name in safetensors files, which digests of tensors contain."""
BLOCK_BYTES = 64 << 20
"""Bytes of a tensor that are copied to the host and hashed at once."""
LIBRARIES = ("transformers", "accelerate")
"""Packages whose hooks of modules move or record tensors, and change none."""


@dataclass(frozen=True)
class LoadedModel(ModelSource):
    """A model in memory; `folder` holds its configuration, and its weights unless `weights`."""

    module: Any = None
    """The model, of transformers."""
    weights: str | None = None
    """Digest of the tensors; None if they are those of `folder`."""
    given_tokenizer: Any = None
    """The caller's tokenizer, of transformers or tokenizers; None for the one of `folder`."""

    @property
    def is_in_folder(self) -> bool:
        """Whether the folder that the model came from has the same tensors and configuration."""
        return self.weights is None

    @cached_property
    def identity(self) -> ModelIdentity:
        if self.weights is None:
            return super().identity
        return ModelIdentity(
            self.weights, self._config_digest, self._architecture, self._code_digest
        )

    @cached_property
    def format1_identity(self) -> ModelIdentity:
        if self.weights is None:
            return super().format1_identity
        raise UsageError(
            "a cache of format 1 names the files of its model; save the model with save_pretrained "
            "and give the folder, or leave format out"
        )

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        if self.given_tokenizer is None:
            return super().tokenizer
        return _as_tokenizer(self.given_tokenizer)

    @cached_property
    def format1_tokenizer(self) -> "Tokenizer":
        return super().format1_tokenizer if self.given_tokenizer is None else self.tokenizer

    @cached_property
    def tokenizer_files_digest(self) -> str:
        """Digest of all that decides the token stream but the texts."""
        return json_digest(
            {
                "tokenizer": tokenizer_digest(self.tokenizer),
                "settings": self._tokenizer_settings(),
                "config": self._config_digest,
            }
        )

    def _tokenizer_settings(self) -> dict[str, Any]:
        """The first and last token of a text as the given tokenizer names them."""
        if self.given_tokenizer is None:
            return super()._tokenizer_settings()
        names = ("bos_token", "eos_token")
        return {name: getattr(self.given_tokenizer, name, None) for name in names}

    @property
    def _code_digest(self) -> str | None:
        """sha256 of what the tensors do not say: a class outside transformers, changed modules."""
        package = type(self.module).__module__.partition(".")[0]
        if self.weights is None or (package == "transformers" and _is_built_as_usual(self.module)):
            return super()._code_digest
        try:
            source = inspect.getsource(inspect.getmodule(type(self.module)) or type(self.module))
        except (OSError, TypeError):
            source = type(self.module).__qualname__
        code = source if package != "transformers" else ""
        return hashlib.sha256(f"{code}\n{self.module!r}".encode()).hexdigest()


@contextmanager
def hold_loaded_model(module: Any, tokenizer: Any = None) -> Iterator[LoadedModel]:
    """Context with the source of a loaded model and its `tokenizer`.

    `tokenizer` is a fast tokenizer of transformers or a `tokenizers.Tokenizer`; default that of the
    folder that the model was loaded from. Nothing of the model is changed. Raises `ModelError` for
    a model in training mode, with hooks, or with tensors that are elsewhere; `UsageError` without a
    tokenizer.
    """
    check_loaded_module(module)
    dtype = _running_dtype(module)
    origin = _origin_folder(module)
    name = str(getattr(module.config, "_name_or_path", "") or type(module).__name__)
    if origin is not None and _is_in_folder(module, origin):
        code = type(module).__module__.partition(".")[0] == "transformers_modules"
        yield LoadedModel(
            name,
            origin.folder,
            origin.revision,
            trust_remote_code=code,
            loaded_dtype=dtype,
            module=module,
            given_tokenizer=tokenizer,
        )
        return
    if tokenizer is None:
        if origin is None:
            raise UsageError(
                f"the loaded {type(module).__name__} has no folder with a tokenizer; give the "
                "model's tokenizer, too: tokenizer=..."
            )
        tokenizer = load_tokenizer(origin.folder)
    saved = checkpoint_tensors(module, _without_tied(module, _tensors_in_memory(module)))
    weights = json_digest(tensor_digests_of(saved))
    with temporary_folder() as folder:
        _write_config(module, folder)
        if hasattr(tokenizer, "save_pretrained"):
            with guard_transformers():
                tokenizer.save_pretrained(str(folder))
        yield LoadedModel(
            name,
            folder,
            loaded_dtype=dtype,
            module=module,
            weights=weights,
            given_tokenizer=tokenizer,
        )


def is_loaded_model(value: Any) -> bool:
    """Whether `value` is a model in memory: a module of torch, which is not imported here."""
    return callable(getattr(value, "named_modules", None)) and hasattr(value, "state_dict")


def attention_of(module: Any, requested: str = "default") -> str:
    """The attention kernel of a loaded model as a cache's identity names it.

    `default` for the kernel that transformers chooses by itself. Raises `UsageError` if another one
    is `requested`.
    """
    actual = getattr(module.config, "_attn_implementation", None)
    choose = getattr(module, "get_correct_attn_implementation", None)
    default = None
    if callable(choose):
        with suppress(Exception):  # a class without the kernel that transformers tries first
            default = choose(None)
    name = "default" if actual in (None, default) else str(actual)
    if requested not in ("default", name, actual):
        raise UsageError(
            f"the loaded model runs with attention {actual!r}, not {requested!r}; load it with "
            f"attn_implementation={requested!r}"
        )
    return name


def tensor_digests_of(tensors: "Mapping[str, torch.Tensor]") -> dict[str, str]:
    """Name -> digest of each tensor, as `tensor_digests` has it of a safetensors file."""
    digests: dict[str, str] = {}
    by_storage: dict[Any, str] = {}
    for name, tensor in tensors.items():
        key = _storage_key(tensor)
        if key not in by_storage:
            by_storage[key] = _tensor_digest(name, tensor)
        digests[name] = by_storage[key]
    return digests


def _tensors_in_memory(module: Any) -> "dict[str, torch.Tensor]":
    """The tensors of the state dict; raises `ModelError` for one whose numbers are elsewhere."""
    tensors = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if hasattr(tensor, "data_ptr")  # else settings of a module, such as of a quantization
    }
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ModelError(
                f"tensor {name!r} of the loaded model is not in memory (device meta: offloaded?); "
                "give the model's folder, and device_map if it is larger than the memory"
            )
    return tensors


def _tensor_digest(name: str, tensor: "torch.Tensor") -> str:
    """sha256 of a line of dtype and shape (`F32 4,3\\n`) and the tensor's bytes."""
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = ",".join(map(str, tensor.shape))
    digest = hashlib.sha256(f"{DTYPE_NAMES.get(dtype, dtype)} {shape}\n".encode())
    try:
        flat = tensor.detach().contiguous().reshape(-1)
        rows = max(1, BLOCK_BYTES // max(1, flat.element_size()))
        for start in range(0, len(flat), rows):
            block = flat[start : start + rows].cpu().contiguous().view(torch.uint8)
            digest.update(block.numpy().data)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"tensor {name!r} of the loaded model cannot be read as plain numbers ({reason}); give "
            "the model's folder instead"
        ) from None
    return digest.hexdigest()


def _storage_key(tensor: "torch.Tensor") -> Any:
    """Equal for two names of one tensor."""
    shape = tuple(tensor.shape), tensor.stride()
    return (str(tensor.device), str(tensor.dtype), tensor.data_ptr(), *shape)


def _without_tied(module: Any, tensors: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """`tensors` without second names of tied ones, which `save_pretrained` leaves out, too."""
    names_of: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            names_of.setdefault(_storage_key(tensor), []).append(name)
    declared = getattr(module, "all_tied_weights_keys", None)
    if declared is None:
        declared = getattr(module, "_tied_weights_keys", None)
    tied: set[str] = set()
    for names in names_of.values():
        if len(names) > 1:
            kept = [name for name in names if name not in (declared or ())]
            tied |= set(names) - {kept[0] if kept else names[0]}
    return {name: tensor for name, tensor in tensors.items() if name not in tied}


def check_loaded_module(module: Any) -> None:
    """Raise `ModelError` for what is no causal model, or would not give the rows of its tensors."""
    if not hasattr(module, "config") or not hasattr(module.config, "to_dict"):
        raise ModelError(
            f"a {type(module).__name__} is no model of transformers; give a causal language model, "
            "such as AutoModelForCausalLM.from_pretrained gives"
        )
    if "ForImageClassification" in type(module).__name__:
        raise ModelError(
            f"a {type(module).__name__} is an image classifier, which is read from its folder with "
            "its image processor: save both there with save_pretrained, and give the folder"
        )
    if getattr(module.config, "is_encoder_decoder", False):
        raise ModelError(
            f"a {type(module).__name__} is an encoder-decoder; expected a causal language model, a "
            "decoder alone"
        )
    for name, part in module.named_modules():
        if part.training:
            raise ModelError(
                "the loaded model is in training mode, in which dropout changes its activations; "
                "call model.eval() first"
            )
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        foreign = [
            hook
            for hook in hooks
            if str(getattr(hook, "__module__", "")).split(".")[0] not in LIBRARIES
        ]
        is_replaced = "forward" in vars(part) and not hasattr(part, "_hf_hook")
        if foreign or is_replaced:
            what = "hooks" if foreign else "a forward method of its own"
            raise ModelError(
                f"module {name!r} of the loaded model has {what}, which may change activations and "
                "is no part of the model's identity; remove it before the extraction"
            )


def _running_dtype(module: Any) -> str:
    """dtype of lowest precision among the weights, as the identity of a cache has it."""
    import torch

    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point() and p.itemsize > 1}
    dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
    return str(dtype).removeprefix("torch.")


def _origin_folder(module: Any) -> ModelSource | None:
    """The folder that the model was loaded from; None if it is not on this machine any more."""
    name = str(getattr(module.config, "_name_or_path", "") or "")
    if not name:
        return None
    with suppress(ResiduaError):
        if Path(name).expanduser().is_dir():
            return ModelSource.locate(name)
        if name.count("/") <= 1 and not name.startswith((".", "/", "~")):
            return ModelSource.downloaded(name, getattr(module.config, "_commit_hash", None))
    return None


def _is_in_folder(module: Any, origin: ModelSource) -> bool:
    """Whether configuration and tensors of the model are those of the folder."""
    try:
        with guard_transformers():
            saved_config = type(module.config).from_pretrained(str(origin.folder))
        if _comparable(saved_config) != _comparable(module.config):
            return False
        # The folder gives the model in this dtype, or not this model.
        if origin.compute_dtype != _running_dtype(module):
            return False
        in_files: dict[str, tuple[str, str]] = {}
        for file, digests in remembered_tensor_digests(origin.weight_files).items():
            header = read_header(file)
            in_files |= {name: (header[name].dtype, digest) for name, digest in digests.items()}
    except (ResiduaError, OSError, ValueError, TypeError):
        return False
    if not _is_built_as_usual(module):
        return False
    tensors = _tensors_in_memory(module)
    in_memory = checkpoint_tensors(module, tensors)
    saved = checkpoint_tensors(module, _without_tied(module, tensors))
    # Tensors that the class computes itself are not read from the files.
    return all(name in in_files or COMPUTED.search(name) for name in saved) and all(
        name in in_memory and _has_digest(in_memory[name], name, dtype, digest)
        for name, (dtype, digest) in in_files.items()
        if not COMPUTED.search(name)
    )


def _has_digest(tensor: "torch.Tensor", name: str, dtype: str, digest: str) -> bool:
    """Whether a tensor holds the numbers of a file's tensor, perhaps loaded in a wider dtype."""
    import torch

    if DTYPE_NAMES.get(str(tensor.dtype).removeprefix("torch.")) != dtype:
        names = [torch_name for torch_name, file_name in DTYPE_NAMES.items() if file_name == dtype]
        if not names or not tensor.is_floating_point():
            return False
        narrow = tensor.detach().to(getattr(torch, names[0]))
        if not torch.equal(narrow.to(tensor.dtype), tensor):
            return False
        tensor = narrow
    return _tensor_digest(name, tensor) == digest


def _is_built_as_usual(module: Any) -> bool:
    """Whether the model's class makes the same modules from its configuration."""
    import torch

    try:
        with torch.device("meta"), guard_transformers():
            fresh = type(module)(copy.deepcopy(module.config))
    except Exception:  # classes with other arguments, such as those of adapters
        return False
    return repr(fresh) == repr(module)


def _comparable(config: Any) -> dict[str, Any]:
    """A configuration without what says nothing about activations, or is in the identity anyway."""
    ignored = (*NO_IDENTITY, "architectures", "attn_implementation", "_attn_implementation")
    return {key: value for key, value in config.to_dict().items() if key not in ignored}


def _write_config(module: Any, folder: Path) -> None:
    """Write `config.json` as `save_pretrained` does; the model's own configuration is unchanged."""
    config = copy.deepcopy(module.config)
    config.architectures = [type(module).__name__]
    with guard_transformers():
        config.save_pretrained(str(folder))


def _as_tokenizer(given: Any) -> "Tokenizer":
    """A copy of the caller's tokenizer as one of the `tokenizers` library, without length limits.

    Raises `ModelError` for a tokenizer in Python, and for one whose Python code changes its tokens.
    """
    from tokenizers import Tokenizer

    backend = given if isinstance(given, Tokenizer) else getattr(given, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(
            f"a {type(given).__name__} is no fast tokenizer; give one of transformers "
            "(AutoTokenizer.from_pretrained) or a tokenizers.Tokenizer"
        )
    tokenizer = without_length_limits(Tokenizer.from_str(backend.to_str()))
    if isinstance(given, Tokenizer):
        return tokenizer
    with guard_transformers():
        for text in SAMPLE_TEXTS:
            if given(text)["input_ids"] != tokenizer.encode(text).ids:
                raise ModelError(
                    f"the given {type(given).__name__} gives other tokens in Python than by itself "
                    f"(for {text!r}); give a fast tokenizer without code of its own"
                )
    return tokenizer
