"""`Toy`, a causal model of a few lines, and variants with one unusual property each.

Tests of the search for blocks check which variants are handled and which are refused.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from .models import VOCAB


class Block(torch.nn.Linear):
    """A block that adds a function of the mean of all tokens so far."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(1, input.shape[1] + 1)[:, None]
        return input + super().forward(input.cumsum(1) / steps).tanh()


class Toy(torch.nn.Module):
    """A causal model of two mixing blocks; subclasses override `blocks_of` or `tail`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(VOCAB, 16)
        self.blocks = torch.nn.ModuleList(Block(16, 16) for _ in range(2))
        self.norm = torch.nn.LayerNorm(16)
        self.unembed = torch.nn.Linear(16, VOCAB)
        self.requires_grad_(False)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.unembed

    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Output of the last block for embeddings `hidden`."""
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the output of the last block."""
        return self.unembed(self.norm(hidden))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False, **_: Any) -> Any:
        hidden = self.blocks_of(self.embed(input_ids))
        return SimpleNamespace(logits=self.tail(hidden, input_ids))


class MixingTail(Toy):
    """The tail mixes positions."""

    def tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unembed(self.norm(hidden + hidden.flip(1).roll(1, 1)))


class PositionTail(Toy):
    """The tail depends on the position."""

    def tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unembed(self.norm(hidden + torch.arange(ids.shape[1])[:, None]))


class TokenTail(Toy):
    """The tail reads the token embedding again."""

    def tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unembed(self.norm(hidden + 0.1 * self.embed(ids)))


class EarlierBlock(Toy):
    """The tail reads the output of the first block again."""

    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        first = self.blocks[0](hidden)
        return self.blocks[1](first) + first


class Crowd(Toy):
    """Blocks depend on the other sequences of the batch."""

    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden - hidden.mean(0, keepdim=True))
        return hidden


class Random(Toy):
    """Blocks add noise to sequences of more than 48 tokens."""

    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(hidden.shape) if hidden.shape[1] > 48 else 0.0  # hash buckets, say
        return super().blocks_of(hidden + 0.1 * noise)


class Infinite(Toy):
    """Logits are infinite."""

    def tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return super().tail(hidden, ids) * float("inf")


class Stepped(Toy):
    """The tail rounds the normed stream to steps of 0.1."""

    def tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unembed(self.norm(hidden).round(decimals=1))


class FilledInPlace(Toy):
    """The tail writes the logits into a tensor of zeros."""

    def tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(*ids.shape, VOCAB)
        out[:] = self.unembed(self.norm(hidden).exp())
        return out


class Pooled(Toy):
    """One row of logits per sequence."""

    def tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return super().tail(hidden, ids).mean(1)


class Wrapped(Toy):
    """Blocks with the stream in another layout or container, given by `wrap` and `unwrap`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(WrappedBlock(self) for _ in range(2))
        self.requires_grad_(False)

    def wrap(self, hidden: torch.Tensor) -> Any:
        return hidden

    def unwrap(self, value: Any) -> torch.Tensor:
        return value

    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        value = self.wrap(hidden)
        for block in self.blocks:
            value = block(value)
        return self.unwrap(value)


class WrappedBlock(torch.nn.Module):
    def __init__(self, model: Wrapped) -> None:
        super().__init__()
        self.inner = Block(16, 16)
        self.functions = (model.wrap, model.unwrap)

    def forward(self, value: Any) -> Any:
        wrap, unwrap = self.functions
        return wrap(self.inner(unwrap(value)))


class InDictionary(Wrapped):
    """Blocks return a dictionary."""

    def wrap(self, hidden: torch.Tensor) -> Any:
        return {"weights": hidden[..., :3], "hidden": hidden}

    def unwrap(self, value: Any) -> torch.Tensor:
        return value["hidden"]


@dataclass
class Output:
    """Output of a block as a dataclass."""

    hidden: torch.Tensor
    count: int = 0


class InDataclass(Wrapped):
    """Blocks return a dataclass."""

    def wrap(self, hidden: torch.Tensor) -> Any:
        return Output(hidden)

    def unwrap(self, value: Any) -> torch.Tensor:
        return value.hidden


class SecondOfTwo(Wrapped):
    """Blocks return a tuple whose second tensor is the stream."""

    def wrap(self, hidden: torch.Tensor) -> Any:
        return hidden.abs(), hidden

    def unwrap(self, value: Any) -> torch.Tensor:
        return value[1]


class PositionFirst(Wrapped):
    """Layout `(length, batch, d_model)`."""

    def wrap(self, hidden: torch.Tensor) -> Any:
        return hidden.transpose(0, 1)

    def unwrap(self, value: Any) -> torch.Tensor:
        return value.transpose(0, 1)


class StreamsInside(Wrapped):
    """Layout `(batch, length, 4, d_model / 4)`."""

    def wrap(self, hidden: torch.Tensor) -> Any:
        return hidden.unflatten(-1, (4, 4))

    def unwrap(self, value: Any) -> torch.Tensor:
        return value.flatten(2)


class StreamsFirst(Wrapped):
    """Layout `(4, batch, length, d_model / 4)`."""

    def wrap(self, hidden: torch.Tensor) -> Any:
        return hidden.unflatten(-1, (4, 4)).permute(2, 0, 1, 3)

    def unwrap(self, value: Any) -> torch.Tensor:
        return value.permute(1, 2, 0, 3).flatten(2)


class Prompted(Wrapped):
    """Three positions of a prompt before the first token."""

    def wrap(self, hidden: torch.Tensor) -> Any:
        return torch.cat([hidden[:, :1].expand(-1, 3, -1) * 0, hidden], 1)

    def unwrap(self, value: Any) -> torch.Tensor:
        return value[:, 3:]


class Repeated(Wrapped):
    """Three scaled copies of the sequence along the position axis."""

    def wrap(self, hidden: torch.Tensor) -> Any:
        return torch.cat([hidden * 0.5, hidden, hidden * 2], 1)

    def unwrap(self, value: Any) -> torch.Tensor:
        first, second, _ = value.unflatten(1, (3, -1)).unbind(1)
        return first + 0.5 * second


class TwoStreams(Toy):
    """Reversible blocks: two tensors carry the stream."""

    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        first = second = hidden
        for block in self.pairs:
            first, second = block(first, second)
        return first + second

    def __init__(self) -> None:
        super().__init__()
        self.pairs = torch.nn.ModuleList(Pair() for _ in range(2))
        self.requires_grad_(False)


class Pair(torch.nn.Module):
    """A reversible block of two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.ModuleList(Block(16, 16) for _ in range(2))

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> Any:
        first = first + self.inner[0](second)
        return first, second + self.inner[1](first)


class KeywordBlock(Block):
    """A block with a keyword-only argument."""

    def forward(self, *, hidden: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(hidden)


class ByKeyword(Toy):
    """Blocks are called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(KeywordBlock(16, 16) for _ in range(2))
        self.requires_grad_(False)

    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden=hidden)
        return hidden


class OtherClasses(Toy):
    """Blocks of two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(16, 16), torch.nn.Linear(16, 16)])
        self.requires_grad_(False)


class SkippedBlock(Toy):
    """The second of three blocks never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(16, 16) for _ in range(3))
        self.requires_grad_(False)

    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.blocks[2](self.blocks[0](hidden))


class Looped(Toy):
    """The blocks run twice."""

    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in [*self.blocks, *self.blocks]:
            hidden = block(hidden)
        return hidden
