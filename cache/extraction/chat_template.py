"""`ChatTemplate`: the model's template, which renders conversations as texts.

A template is a program in Jinja that comes with the model; transformers runs it in a sandbox.
`resolve.py` gives it to the reader of documents, which renders a column of conversations.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import DataError, ModelError
from ..model.config_check import describe_error
from ..model.source import ModelSource
from ..model.transformers_guard import guard_transformers

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
}
"""Names of speakers in turns with the keys `from` and `value` -> roles of chat templates."""
GENERATION_PROMPT = "+generation_prompt"
"""Ends the digest of a template that begins a further turn of the assistant."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template of conversations: its identity, and the function that applies it."""

    digest: str
    """sha256 of the template in UTF-8, and `GENERATION_PROMPT` if one is added."""
    apply: Callable[[list[dict[str, Any]]], str]
    """Turns with `role` and `content` -> text with all special tokens."""

    def render(self, turns: Any, place: str) -> str:
        """The text of a conversation; `place` names it in the `DataError` of an unusable one."""
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise DataError(f"{place}: a conversation must be a list of turns, each an object")
        try:
            text = self.apply([_turn_with_role(turn) for turn in turns])
        except Exception as error:  # a template raises any kind
            raise DataError(
                f"{place}: the model's chat template refuses the conversation: "
                f"{describe_error(error)}"
            ) from None
        return text


def load_chat_template(
    folder: Path, trust_remote_code: bool = False, generation_prompt: bool = False
) -> ChatTemplate:
    """The chat template of the model in `folder`.

    With `generation_prompt` every text ends with the beginning of a turn of the assistant. Raises
    `ModelError` if the model has no template, or several without a default.
    """
    from transformers import AutoTokenizer

    try:
        with guard_transformers():
            tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
            template = tokenizer.get_chat_template()
    except Exception as error:  # transformers raises many kinds
        raise ModelError(
            f"the chat template of {folder} cannot be read: {describe_error(error)}"
        ) from None

    def apply(turns: list[dict[str, Any]]) -> str:
        return tokenizer.apply_chat_template(
            turns,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )

    digest = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()
    return ChatTemplate(digest + (GENERATION_PROMPT if generation_prompt else ""), apply)


class LazyChatTemplate:
    """The chat template of a model, loaded when the first conversation is rendered."""

    def __init__(self, source: ModelSource, generation_prompt: bool) -> None:
        self._source = source
        self._generation_prompt = generation_prompt

    @cached_property
    def _template(self) -> ChatTemplate:
        source = self._source
        return load_chat_template(source.folder, source.trust_remote_code, self._generation_prompt)

    @property
    def digest(self) -> str:
        """`ChatTemplate.digest`."""
        return self._template.digest

    def render(self, turns: Any, place: str) -> str:
        """`ChatTemplate.render`."""
        return self._template.render(turns, place)


def _turn_with_role(turn: dict[str, Any]) -> dict[str, Any]:
    """`turn` with the keys `role` and `content`, without keys that hold nothing.

    Tables fill absent keys of a turn with nulls, which templates take for values.
    """
    turn = {key: value for key, value in turn.items() if value is not None}
    if "role" in turn or "from" not in turn:
        return turn
    speaker = turn["from"]
    if speaker not in ROLES:
        raise ValueError(f"the speaker {speaker!r} is unknown; expected {', '.join(ROLES)}")
    return {"role": ROLES[speaker], "content": turn.get("value", "")}
