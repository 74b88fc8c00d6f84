"""The only door to transformers: loads a frozen causal language model and its tokenizer."""

import contextlib
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ModelError
from .oom import is_out_of_memory
from .safetensors_header import read_header
from .source import ModelSource
from .tokenizer import read_tokenizer_file
from .weights import compare_with_checkpoint

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

TRANSFORMERS = threading.RLock()
"""Held while transformers builds or loads something: that changes the whole process."""


def choose_device(device: str) -> str:
    """`auto` is the first GPU if there is one, else the CPU."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} cannot be used: {error}") from None
    return device


def load_model(
    source: ModelSource,
    device: str = "cpu",
    attention: str = "default",
    trust_remote_code: bool = False,
) -> "torch.nn.Module":
    """The model in eval mode, without gradients, in the dtype of its checkpoint.

    Only safetensors are read. Code that comes with a model runs only if `trust_remote_code`.
    Raises `ModelError` where a file cannot be read, or the checkpoint does not fill the model;
    what it holds besides is in the attribute `checkpoint_notes` of the model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    for path in source.weight_files:
        read_header(path)
    auto: Any = AutoModelForCausalLM
    kwargs: dict[str, Any] = {} if attention == "default" else {"attn_implementation": attention}
    try:
        with quiet():
            module, info = auto.from_pretrained(
                source.folder,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **kwargs,
            )
    except (
        OSError, ValueError, ImportError, KeyError, RuntimeError, TypeError, AttributeError,
        SafetensorError,
    ) as error:  # fmt: skip
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "CONVERSION" in reason:  # the report that it speaks of is not shown
            reason = (
                "tensors that are packed together, such as those of all experts of a layer, do not "
                "go together: the checkpoint lacks one of them, or its shape differs; save the "
                "whole model anew with save_pretrained"
            )
        raise ModelError(
            f"{source.name} cannot be loaded as a causal language model: {reason}"
        ) from None
    notes = compare_with_checkpoint(module, info, source.name)
    module = module.to(device).eval().requires_grad_(False)
    module.checkpoint_notes = notes
    return module


PROBES = (
    "a",
    " a b",
    "Hello, world!\n\tA second line.  Two spaces",
    "naïve 东京 \U0001f600 <s></s>",
)
"""Texts on which the tokenizer itself must agree with what transformers makes of it."""


def convert_tokenizer(folder: Path, trust_remote_code: bool = False) -> "Tokenizer":
    """The tokenizer of `AutoTokenizer`, as one of the `tokenizers` library.

    A folder without tokenizer_config.json whose type of model transformers does not know has what
    its tokenizer.json says. Raises `ModelError` if a tokenizer cannot be read, or works in Python.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            # Never asked for on the terminal: whoever wants that code to run names it beforehand.
            loaded: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        tokenizer = loaded.backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        with quiet():
            wrong = [t for t in PROBES if loaded(t)["input_ids"] != tokenizer.encode(t).ids]
    except Exception as error:  # of any class: tokenizers raises bare ones
        alone = folder / "tokenizer.json"
        if alone.is_file() and not (folder / "tokenizer_config.json").is_file():
            return read_tokenizer_file(alone)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{folder} has no tokenizer that can be read: {reason}; expected one that "
            "AutoTokenizer loads as a fast tokenizer"
        ) from None
    if wrong:
        raise ModelError(
            f"the tokenizer of {folder} gives other tokens in Python than by itself (for "
            f"{wrong[0]!r}), so that its tokens would not be the model's; save it as a fast "
            "tokenizer without code of its own"
        )
    return tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let one thread at a time use transformers, without progress bars and advice on the screen.

    While transformers builds a model, it replaces methods of its classes (such as `tie_weights`)
    for the whole process; of two threads at once, the second would put back what the first had
    replaced, and no model of the process would be tied from then on.
    """
    from transformers.utils import logging

    with TRANSFORMERS:
        level = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.set_verbosity(level)
            logging.enable_progress_bar()
