"""Softmax losses over the vocabulary with exact gradients, computed in tiles of rows.

`affine_losses` is the loss of logits = x W' + b (vocabulary probes), `head_losses` that of
logits = head(u) (lenses); targets are tokens or the distributions of `ModelDistribution`. Memory:
one tile of logits, never a `(batch, vocab)` autograd graph.

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
"""Size of the float32 logits of a tile, in bytes; a tile has `TILE_ROWS` rows at least."""
TILE_ROWS = 128
"""Fewest rows of a tile: the weights are read once per tile, so few rows waste time."""
PRODUCTS = ("auto", "float32", "bfloat16")
"""dtype of the factors of gradients; `auto` is the dtype that the processor multiplies faster."""
FAST_BFLOAT16 = ("avx512_bf16", "amx_tile")
"""Instruction sets that multiply bfloat16 in hardware."""

ParameterTensors = dict[str, Tensor]
"""Parameters of a regression by name, or tensors of their shapes."""


@dataclass(frozen=True)
class Target:
    """Targets of a softmax over the vocabulary: a token per row, or a distribution per row."""

    token: Tensor | None = None
    """`(n,)` int64."""
    p: Tensor | None = None
    """`(n, vocab)` float32, rows sum to 1."""
    negentropy: Tensor | None = None
    """sum p log p, `(n,)`."""

    def __getitem__(self, rows: slice | Tensor) -> "Target":
        return Target(*(v if v is None else v[rows] for v in (self.token, self.p, self.negentropy)))

    def __len__(self) -> int:
        rows = self.p if self.token is None else self.token
        assert rows is not None
        return len(rows)

    def losses(self, logits: Tensor) -> Tensor:
        """Cross-entropy or KL per row, `(n,)`; **`logits` become their gradient**, q - target."""
        if self.token is not None:
            # -log q[y] = logsumexp(z) - z[y], gradient q - onehot(y).
            column = self.token[:, None]
            token_logits = logits.gather(1, column)[:, 0]
            losses = softmax_in_place(logits) - token_logits
            logits.scatter_add_(1, column, logits.new_full(column.shape, -1.0))
            return losses
        # KL(p || q) = logsumexp(z) - sum p z + sum p log p, gradient q - p.
        assert self.p is not None
        assert self.negentropy is not None
        expected_logit = expectation(self.p, logits)
        losses = softmax_in_place(logits) - expected_logit + self.negentropy
        logits.sub_(self.p)
        return losses


def softmax_in_place(logits: Tensor) -> Tensor:
    """Turn `logits` `(n, vocab)` into probabilities in place; gives the logsumexps, `(n,)`."""
    # logsumexp(z) = max z - log(max q), for max q = exp(max z - logsumexp(z)). The largest
    # probability is 1 / vocab or more, so its logarithm is finite.
    largest_logit = logits.amax(1)
    torch.softmax(logits, 1, out=logits)
    return largest_logit - logits.amax(1).log_()


def expectation(p: Tensor, logits: Tensor) -> Tensor:
    """sum p z over the vocabulary, `(n,)`; a logit of -inf adds nothing where p is 0."""
    expected = torch.linalg.vecdot(p, logits)
    if not bool(expected.isfinite().all()):
        expected = (p * logits).masked_fill_(p == 0, 0).sum(1)
    return expected


def fast_products() -> str:
    """`bfloat16` on a processor that multiplies bfloat16 in hardware, else `float32`."""
    checks = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in FAST_BFLOAT16]
    return "bfloat16" if any(check is not None and check() for check in checks) else "float32"


def row_tiles(rows: int, vocab: int, tile_rows: int | None = None) -> Iterator[slice]:
    """Cut `rows` rows of `vocab` logits into equal tiles of at most `tile_rows` rows.

    By default as many rows as `TILE_BYTES` and `TILE_ROWS` say."""
    number = -(-rows // (tile_rows or max(TILE_ROWS, TILE_BYTES // (4 * vocab))))
    edges = [rows * i // number for i in range(number + 1)]
    yield from (slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True))


class ModelDistribution:
    """The model's own distribution, as the target of a fit, from its last residual stream."""

    def __init__(self, head: TorchHead, tile_rows: int | None = None) -> None:
        self.head = head
        self.vocab = head.head.vocab
        self.tile_rows = tile_rows

    @torch.no_grad()
    def tokens(self, residual: Tensor) -> Target:
        """The model's top token for rows `(n, d_model)`, the lowest id on ties."""
        tokens = torch.empty(len(residual), dtype=torch.int64)
        for tile in row_tiles(len(residual), self.vocab, self.tile_rows):
            logits = self.head(residual[tile])
            # numpy's argmax takes the first maximum, and the first NaN if there is any: the check
            # then finds it.
            tokens[tile] = torch.from_numpy(logits.numpy().argmax(1))
            _check_largest_logits(logits.gather(1, tokens[tile][:, None]))
        return Target(token=tokens)

    @torch.no_grad()
    def distribution(self, residual: Tensor) -> Target:
        """The model's probabilities `(n, vocab)` and their sums p log p, for rows `(n, d_model)`.

        All layers share them: they depend on the position t+N alone."""
        p = residual.new_empty(len(residual), self.vocab)
        negentropy = residual.new_empty(len(residual))
        for tile in row_tiles(len(residual), self.vocab, self.tile_rows):
            logits = self.head(residual[tile])
            # With logits shifted by their maximum, log p = z + log(max p): no logarithm per token.
            largest = logits.amax(1, keepdim=True)
            _check_largest_logits(largest)
            logits -= largest
            probabilities = torch.softmax(logits, 1, out=p[tile])
            negentropy[tile] = expectation(probabilities, logits) + probabilities.amax(1).log_()
        return Target(p=p, negentropy=negentropy)


def _check_largest_logits(largest: Tensor) -> None:
    """Raise `UsageError` unless the `largest` logit of each position is finite."""
    count = len(largest) - int(largest.isfinite().sum())
    if count:
        raise UsageError(
            f"the model's own logits are not finite at {count} of {len(largest)} positions (NaN, "
            "+inf or nothing but -inf): nothing can be fitted to them; extract the cache again, "
            "with dtype='float32'"
        )


@dataclass(frozen=True)
class Gradients:
    """Tensors to which the gradients of `scale` times the sum of the losses are added.

    A gradient whose tensor is None is not computed."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    x: Tensor | None = None
    scale: float = 1.0
    products: str = "float32"
    """dtype of the factors of gradients, `float32` or `bfloat16`.

    bfloat16 changes a gradient by some 0.2 %, far less than the draw of the batch does; losses
    stay exact."""


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
    """Add the gradients of one tile: `z` `(n, vocab)` is the gradient in the logits.

    Weight: z' x; bias: z' 1; x: z weight."""
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

    autograd differentiates the final norm alone; of heads that are programs, the whole tile.
    """
    tile_losses = _program_tile if head.head.kind == "program" else _explicit_tile
    losses = hidden.new_empty(len(hidden))
    for tile in row_tiles(len(hidden), head.head.vocab, tile_rows):
        rows = hidden[tile].detach().requires_grad_(grads.x is not None)
        losses[tile], gradient = tile_losses(rows, head, target[tile])
        if grads.x is not None and gradient is not None:
            grads.x[tile].add_(gradient, alpha=grads.scale)
    return losses


def _explicit_tile(rows: Tensor, head: TorchHead, target: Target) -> tuple[Tensor, Tensor | None]:
    """Losses of one tile, and their gradient in `rows`; None if `rows` needs no gradient.

    logits = cap(scale (norm(rows) unembedding' + bias)), with cap(z) = softcap tanh(z / softcap).
    """
    spec = head.head
    normed = head.normalize(rows)
    with torch.no_grad():
        z = torch.addmm(head.bias, normed, head.unembedding.T)
        if spec.scale != 1.0:
            z.mul_(spec.scale)
        cap_derivative = None
        if spec.softcap is not None:
            z.div_(spec.softcap).tanh_()
            cap_derivative = 1 - z.square()
            z.mul_(spec.softcap)
        # The logits become their gradient, which the chain rule takes back to the normed rows.
        losses = target.losses(z)
        if not rows.requires_grad:
            return losses, None
        if cap_derivative is not None:
            z.mul_(cap_derivative)
        normed_gradient = (z @ head.unembedding).mul_(spec.scale)
    return losses, torch.autograd.grad(normed, rows, normed_gradient)[0]


def _program_tile(rows: Tensor, head: TorchHead, target: Target) -> tuple[Tensor, Tensor | None]:
    """The same for a head that is a program, by autograd through the program."""
    with torch.set_grad_enabled(rows.requires_grad):
        logits = head(rows)
    # A copy: an operation of the program may need its own output for the gradient.
    gradient = logits.detach().clone()
    losses = target.losses(gradient)
    if not rows.requires_grad:
        return losses, None
    return losses, torch.autograd.grad(logits, rows, gradient)[0]
