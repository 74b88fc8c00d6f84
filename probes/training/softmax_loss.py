"""Softmax losses with exact gradients, in tiles of rows: no `(batch, vocab)` graph is ever kept.

For logits z and a target distribution p, with q = softmax(z):

    cross-entropy  -log q[y]                  gradient  q - onehot(y)
    KL(p || q)     sum p (log p - log q)      gradient  q - p

A tile holds whole rows, so that its softmax is done in place and each logit is computed once;
tiles over the vocabulary, with a running logsumexp, compute every logit twice and took 1.6 times
as long. Float32; gradients are those of plain autograd to rounding.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache.errors import UsageError
from ...cache.head.head import TorchHead

TILE_BYTES = 16 << 20
"""Size of the float32 logits of a tile, where that is not less than `TILE_ROWS` rows."""
TILE_ROWS = 128
"""Fewer rows waste time: the weights are read once per tile."""
PRODUCTS = ("auto", "float32", "bfloat16")
"""dtype of the factors of gradients; `auto` is what the processor multiplies faster."""


@dataclass(frozen=True)
class Target:
    """What a softmax over the vocabulary is to say: a token per row, or a distribution per row."""

    token: Tensor | None = None
    """`(n,)` int64."""
    p: Tensor | None = None
    """`(n, vocab)` float32, rows sum to 1."""
    negentropy: Tensor | None = None
    """sum p log p, `(n,)`."""

    def __getitem__(self, rows: slice | Tensor) -> "Target":
        return Target(*(v if v is None else v[rows] for v in (self.token, self.p, self.negentropy)))

    def __len__(self) -> int:
        found = self.p if self.token is None else self.token
        assert found is not None
        return len(found)

    def losses(self, logits: Tensor) -> Tensor:
        """Cross-entropy or KL per row, `(n,)`; **`logits` become their gradient**, q - target."""
        if self.token is not None:
            column = self.token[:, None]
            picked = logits.gather(1, column)[:, 0]
            out = softmax_in_place(logits) - picked
            logits.scatter_add_(1, column, logits.new_full(column.shape, -1.0))
            return out
        assert self.p is not None
        assert self.negentropy is not None
        expected = expectation(self.p, logits)
        out = softmax_in_place(logits) - expected + self.negentropy
        logits.sub_(self.p)
        return out


def softmax_in_place(logits: Tensor) -> Tensor:
    """Turn `logits` into probabilities in place; the logsumexp of each row, `(n,)`."""
    most = logits.amax(1)
    torch.softmax(logits, 1, out=logits)
    # The largest probability never underflows, and its logarithm is what the sum adds.
    return most - logits.amax(1).log_()


def expectation(p: Tensor, logits: Tensor) -> Tensor:
    """sum p z, `(n,)`; a logit of -inf adds nothing where p is 0."""
    out = torch.linalg.vecdot(p, logits)
    if not bool(out.isfinite().all()):
        out = (p * logits).masked_fill_(p == 0, 0).sum(1)
    return out


def fast_products() -> str:
    """`bfloat16` on a processor that multiplies it in hardware, else `float32`."""
    asked = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in NATIVE]
    return "bfloat16" if any(ask is not None and ask() for ask in asked) else "float32"


NATIVE = ("avx512_bf16", "amx_tile")


def row_tiles(rows: int, vocab: int, tile_rows: int | None = None) -> Iterator[slice]:
    """Cut `rows` rows of `vocab` logits into equal tiles of at most `tile_rows` rows."""
    number = -(-rows // (tile_rows or max(TILE_ROWS, TILE_BYTES // (4 * vocab))))
    edges = [rows * i // number for i in range(number + 1)]
    yield from (slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True))


class ModelDistribution:
    """The model's own distribution at given positions, from its last residual stream."""

    def __init__(self, head: TorchHead, tile_rows: int | None = None) -> None:
        self.head = head
        self.vocab = head.head.vocab
        self.tile_rows = tile_rows

    @torch.no_grad()
    def tokens(self, residual: Tensor) -> Target:
        """The model's top token for rows `(n, d_model)`, the lowest id on ties."""
        out = torch.empty(len(residual), dtype=torch.int64)
        for tile in row_tiles(len(residual), self.vocab, self.tile_rows):
            logits = self.head(residual[tile])
            # numpy's argmax takes the first maximum, and a NaN for one.
            out[tile] = torch.from_numpy(logits.numpy().argmax(1))
            _check_distributions(logits.gather(1, out[tile][:, None]))
        return Target(token=out)

    @torch.no_grad()
    def distribution(self, residual: Tensor) -> Target:
        """The model's probabilities for rows `(n, d_model)`: `(n, vocab)`, one for all layers."""
        p = residual.new_empty(len(residual), self.vocab)
        negentropy = residual.new_empty(len(residual))
        for tile in row_tiles(len(residual), self.vocab, self.tile_rows):
            rows = self.head(residual[tile])
            # From the largest logit on, log p = z - log(sum exp z) needs no logarithm per token.
            most = rows.amax(1, keepdim=True)
            _check_distributions(most)
            rows -= most
            q = torch.softmax(rows, 1, out=p[tile])
            negentropy[tile] = expectation(q, rows) + q.amax(1).log_()
        return Target(p=p, negentropy=negentropy)


def _check_distributions(largest: Tensor) -> None:
    """Raise `UsageError` unless the model's `largest` logits are finite; they are the targets'."""
    count = len(largest) - int(largest.isfinite().sum())
    if count:
        raise UsageError(
            f"the model's own logits are not finite at {count} of {len(largest)} positions (NaN, "
            "+inf or nothing but -inf): nothing can be fitted to them; extract the cache again, "
            "with dtype='float32'"
        )


@dataclass(frozen=True)
class Gradients:
    """Where the gradients of `scale` times the sum of the losses are added; None: not wanted."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    x: Tensor | None = None
    scale: float = 1.0
    products: str = "float32"
    """`float32`, or `bfloat16`: it changes a gradient by some 0.2 %, far less than the draw of the
    batch does, and leaves losses exact."""


NO_GRADIENTS = Gradients()


@torch.no_grad()
def affine_losses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Target,
    grads: Gradients = NO_GRADIENTS,
    tile_rows: int | None = None,
) -> Tensor:
    """Losses `(n,)` of logits = x weight^T + bias, for `x` `(n, d)` and `weight` `(vocab, d)`."""
    losses = x.new_empty(len(x))
    buffer = x.new_empty(0)
    for tile in row_tiles(len(x), len(weight), tile_rows):
        rows = x[tile]
        if len(buffer) < len(rows):
            buffer = x.new_empty(len(rows) + 1, len(weight))
        z = torch.addmm(bias, rows, weight.T, out=buffer[: len(rows)])
        losses[tile] = target[tile].losses(z)
        _add_gradients(grads, tile, z, rows, weight)
    return losses


def _add_gradients(grads: Gradients, tile: slice, z: Tensor, rows: Tensor, weight: Tensor) -> None:
    """Add what a tile of logits' gradients `z` contributes."""
    if grads.bias is not None:
        grads.bias.addmv_(z.T, z.new_ones(len(z)), alpha=grads.scale)
    if grads.products == "bfloat16":
        z, rows = z.bfloat16(), rows.bfloat16()
        if grads.weight is not None:
            grads.weight.add_(z.T @ rows, alpha=grads.scale)
        if grads.x is not None:
            grads.x[tile].add_(z @ weight.bfloat16(), alpha=grads.scale)
        return
    if grads.weight is not None:
        grads.weight.addmm_(z.T, rows, alpha=grads.scale)
    if grads.x is not None:
        grads.x[tile].addmm_(z, weight, alpha=grads.scale)


def head_losses(
    hidden: Tensor,
    head: TorchHead,
    target: Target,
    grads: Gradients = NO_GRADIENTS,
    tile_rows: int | None = None,
) -> Tensor:
    """Losses `(n,)` of logits = head(hidden), `hidden` `(n, d_model)`; the head stays frozen.

    The graph is that of the final norm alone, except for heads that are programs, where it is that
    of one tile.
    """
    step = _program_tile if head.head.kind == "program" else _explicit_tile
    losses = hidden.new_empty(len(hidden))
    for tile in row_tiles(len(hidden), head.head.vocab, tile_rows):
        rows = hidden[tile].detach().requires_grad_(grads.x is not None)
        losses[tile], gradient = step(rows, head, target[tile])
        if grads.x is not None and gradient is not None:
            grads.x[tile].add_(gradient, alpha=grads.scale)
    return losses


def _explicit_tile(rows: Tensor, head: TorchHead, target: Target) -> tuple[Tensor, Tensor | None]:
    """Losses of one tile, and their gradient with respect to `rows`."""
    spec = head.head
    normed = head.normalize(rows)
    with torch.no_grad():
        z = torch.addmm(head.bias, normed, head.unembedding.T)
        if spec.scale != 1.0:
            z.mul_(spec.scale)
        slope = None
        if spec.softcap is not None:
            z.div_(spec.softcap).tanh_()
            slope = 1 - z.square()
            z.mul_(spec.softcap)
        losses = target.losses(z)
        if not rows.requires_grad:
            return losses, None
        if slope is not None:
            z.mul_(slope)
        inner = (z @ head.unembedding).mul_(spec.scale)
    return losses, torch.autograd.grad(normed, rows, inner)[0]


def _program_tile(rows: Tensor, head: TorchHead, target: Target) -> tuple[Tensor, Tensor | None]:
    with torch.set_grad_enabled(rows.requires_grad):
        logits = head(rows)
    # A copy: an operation of the program may need its own output for the gradient.
    gradient = logits.detach().clone()
    losses = target.losses(gradient)
    if not rows.requires_grad:
        return losses, None
    return losses, torch.autograd.grad(logits, rows, gradient)[0]


ParameterTensors = dict[str, Tensor]
