"""A prompt whose last position takes a residual stream of another text: `PatchedPrompt`.

The model reads `prompt, x[t+1], .., x[t+N]` while its layer l at the prompt's last position is the
cached state of t. What it then says at the last token is what that state tells it about t+N+1, with
the tokens in between given (Pal et al., 2311.04897, Future Lens; Ghandeharioun et al., 2401.06102,
Patchscopes). `prompt_runner.py` runs such prompts; `learned_prompt.py` fits them.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import UsageError

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache

FIXED_PROMPTS = (
    'Hello! Could you please tell me more about "',
    'The multi-tokens present here are "',
    "The concepts in this hidden state listed are: (",
    "<|endoftext|> This state is describing about the following concept:",
)
"""The four prompts of the released code of Future Lens, to the letter."""
SIMLENS = "simlens"
"""Name of the prompt of a start token and the state's own token (SimLens, 2507.17618)."""
MAX_TOKENS = 1024
"""Most tokens of a prompt."""


@dataclass(frozen=True, eq=False)
class PatchedPrompt:
    """Token ids of a prompt; the state is put in at the last one."""

    name: str
    ids: tuple[int, ...]
    """Token ids that all samples share; placeholders where there are `embeddings`."""
    embeddings: np.ndarray | None = field(default=None, repr=False)
    """Layer 0 of these tokens, `(tokens, d_model)`, in place of the model's; None keeps it."""
    ends_with_token: bool = False
    """Whether the state's own token follows `ids`, and takes the state."""

    def __post_init__(self) -> None:
        if not 1 <= self.length <= MAX_TOKENS:
            raise UsageError(
                f"the prompt {self.name!r} has {self.length} tokens; expected 1 to {MAX_TOKENS}"
            )
        if self.embeddings is not None and len(self.embeddings) != len(self.ids):
            raise UsageError(
                f"the prompt {self.name!r} has {len(self.ids)} tokens and {len(self.embeddings)} "
                "embeddings; expected one for each token"
            )

    @property
    def length(self) -> int:
        """Number of tokens M; the state is put in at position M - 1."""
        return len(self.ids) + self.ends_with_token

    def tokens(self, state_tokens: np.ndarray, continuations: np.ndarray) -> np.ndarray:
        """Token ids that the model reads, `(n, M + N)` int64.

        `state_tokens` `(n,)` are those at t, `continuations` `(n, N)` those at t+1 to t+N.
        """
        shared = np.broadcast_to(np.array(self.ids, np.int64), (len(state_tokens), len(self.ids)))
        own = [state_tokens[:, None]] if self.ends_with_token else []
        return np.concatenate([shared, *own, continuations], 1).astype(np.int64)


def read_prompt(text: str, cache: "ActivationCache", name: str | None = None) -> PatchedPrompt:
    """The prompt of a text, by the tokenizer of the cache; `simlens` is that prompt.

    Special tokens are those that the text itself names: a start token is not added, as in the
    released code. Raises `UsageError` for a text without a token.
    """
    tokenizer = cache.tokenizer()
    if text == SIMLENS:
        start = start_token(tokenizer)
        return PatchedPrompt(name or SIMLENS, () if start is None else (start,), None, True)
    ids = tuple(tokenizer.encode(text, add_special_tokens=False).ids)
    if not ids:
        raise UsageError(f"the prompt {text!r} has no token; write a text, or {SIMLENS!r}")
    if max(ids) >= cache.vocab:
        raise UsageError(
            f"the prompt {text!r} has the token {max(ids)}, and the model's vocabulary ends at "
            f"{cache.vocab - 1}; leave the special token out"
        )
    return PatchedPrompt(name or text, ids)


def start_token(tokenizer: Any) -> int | None:
    """The token that begins texts: the tokenizer's own mark, else a token named like one."""
    with_own = tokenizer.encode("a").ids
    without = tokenizer.encode("a", add_special_tokens=False).ids
    if with_own[:1] != without[:1] and with_own:
        return int(with_own[0])
    for mark in ("<|endoftext|>", "<s>", "<|begin_of_text|>", "<bos>"):
        if (token := tokenizer.token_to_id(mark)) is not None:
            return int(token)
    return None
