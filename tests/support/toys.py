"""A causal model of a few lines, and what can be odd about one: to be handled, or refused."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from .models import VOCAB


class Block(torch.nn.Linear):
    """Adds a function of the mean of all tokens up to here."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(1, input.shape[1] + 1)[:, None]
        return input + super().forward(input.cumsum(1) / steps).tanh()


class Toy(torch.nn.Module):
    """A causal model of two mixing blocks; subclasses spoil one thing."""

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
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unembed(self.norm(hidden))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False, **_: Any) -> Any:
        hidden = self.blocks_of(self.embed(input_ids))
        return SimpleNamespace(logits=self.tail(hidden, input_ids))


class MixingTail(Toy):
    def tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unembed(self.norm(hidden + hidden.flip(1).roll(1, 1)))


class PositionTail(Toy):
    def tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unembed(self.norm(hidden + torch.arange(ids.shape[1])[:, None]))


class TokenTail(Toy):
    def tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unembed(self.norm(hidden + 0.1 * self.embed(ids)))


class EarlierBlock(Toy):
    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        first = self.blocks[0](hidden)
        return self.blocks[1](first) + first


class Crowd(Toy):
    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden - hidden.mean(0, keepdim=True))
        return hidden


class Random(Toy):
    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(hidden.shape) if hidden.shape[1] > 48 else 0.0  # hash buckets, say
        return super().blocks_of(hidden + 0.1 * noise)


class Infinite(Toy):
    def tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return super().tail(hidden, ids) * float("inf")


class Stepped(Toy):
    def tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unembed(self.norm(hidden).round(decimals=1))


class FilledInPlace(Toy):
    def tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(*ids.shape, VOCAB)
        out[:] = self.unembed(self.norm(hidden).exp())
        return out


class Pooled(Toy):
    def tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return super().tail(hidden, ids).mean(1)


class Wrapped(Toy):
    """Blocks that keep the stream in something else; `wrap` and `unwrap` say in what."""

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
    def wrap(self, hidden: torch.Tensor) -> Any:
        return {"weights": hidden[..., :3], "hidden": hidden}

    def unwrap(self, value: Any) -> torch.Tensor:
        return value["hidden"]


@dataclass
class Output:
    """What a block may return."""

    hidden: torch.Tensor
    count: int = 0


class InDataclass(Wrapped):
    def wrap(self, hidden: torch.Tensor) -> Any:
        return Output(hidden)

    def unwrap(self, value: Any) -> torch.Tensor:
        return value.hidden


class SecondOfTwo(Wrapped):
    def wrap(self, hidden: torch.Tensor) -> Any:
        return hidden.abs(), hidden

    def unwrap(self, value: Any) -> torch.Tensor:
        return value[1]


class PositionFirst(Wrapped):
    def wrap(self, hidden: torch.Tensor) -> Any:
        return hidden.transpose(0, 1)

    def unwrap(self, value: Any) -> torch.Tensor:
        return value.transpose(0, 1)


class StreamsInside(Wrapped):
    def wrap(self, hidden: torch.Tensor) -> Any:
        return hidden.unflatten(-1, (4, 4))

    def unwrap(self, value: Any) -> torch.Tensor:
        return value.flatten(2)


class StreamsFirst(Wrapped):
    def wrap(self, hidden: torch.Tensor) -> Any:
        return hidden.unflatten(-1, (4, 4)).permute(2, 0, 1, 3)

    def unwrap(self, value: Any) -> torch.Tensor:
        return value.permute(1, 2, 0, 3).flatten(2)


class Prompted(Wrapped):
    def wrap(self, hidden: torch.Tensor) -> Any:
        return torch.cat([hidden[:, :1].expand(-1, 3, -1) * 0, hidden], 1)

    def unwrap(self, value: Any) -> torch.Tensor:
        return value[:, 3:]


class Repeated(Wrapped):
    def wrap(self, hidden: torch.Tensor) -> Any:
        return torch.cat([hidden * 0.5, hidden, hidden * 2], 1)

    def unwrap(self, value: Any) -> torch.Tensor:
        first, second, _ = value.unflatten(1, (3, -1)).unbind(1)
        return first + 0.5 * second


class TwoStreams(Toy):
    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        one = two = hidden
        for block in self.pairs:
            one, two = block(one, two)
        return one + two

    def __init__(self) -> None:
        super().__init__()
        self.pairs = torch.nn.ModuleList(Pair() for _ in range(2))
        self.requires_grad_(False)


class Pair(torch.nn.Module):
    """A reversible block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.ModuleList(Block(16, 16) for _ in range(2))

    def forward(self, one: torch.Tensor, two: torch.Tensor) -> Any:
        one = one + self.inner[0](two)
        return one, two + self.inner[1](one)


class KeywordBlock(Block):
    def forward(self, *, hidden: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(hidden)


class ByKeyword(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(KeywordBlock(16, 16) for _ in range(2))
        self.requires_grad_(False)

    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden=hidden)
        return hidden


class OtherClasses(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(16, 16), torch.nn.Linear(16, 16)])
        self.requires_grad_(False)


class SkippedBlock(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(16, 16) for _ in range(3))
        self.requires_grad_(False)

    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.blocks[2](self.blocks[0](hidden))


class Looped(Toy):
    def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in [*self.blocks, *self.blocks]:
            hidden = block(hidden)
        return hidden
