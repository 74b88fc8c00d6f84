"""Softmax losses over the vocabulary with exact gradients, computed in tiles of rows.

`affine_losses` is the loss of logits = x W' + b (vocabulary probes), `head_losses` that of
logits = head(u) (lenses); targets are tokens or the distributions of `ModelDistribution`. Memory:
one tile of logits for each thread, used again for every tile, never a `(batch, vocab)` autograd
graph. Tensors of any device: on the CPU, passes over the logits take the rows of a tile in blocks
that stay in the processor's cache.

For logits z and a target distribution p, with q = softmax(z):

    cross-entropy  -log q[y]                  gradient  q - onehot(y)
    KL(p || q)     sum p (log p - log q)      gradient  q - p

A tile holds whole rows, so that its softmax is done in place and each logit is computed once;
tiles over the vocabulary, with a running logsumexp, compute every logit twice and took 1.6 times
as long. Float32; gradients are those of plain autograd to rounding.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache.devices import TileRows
from ...cache.errors import UsageError
from ...cache.head.head import TorchHead
from ...cache.head.row_buffers import reused_rows
from .head_tile import HeadTile, cache_blocks

TILE_BYTES = 16 << 20
"""Size of the float32 logits of a tile, in bytes; a tile has `TILE_ROWS` rows at least."""
TILE_ROWS = 256
"""Fewest rows of a tile: the weights are read once per tile, so few rows waste time.

At d 2048 and 50,000 tokens, products of 64, 128, 256 and 512 rows run at 28, 33, 36 and 36 GFLOP/s
forwards, 35, 46, 51 and 59 backwards (one core, AVX2)."""
PRODUCTS = ("auto", "float32", "bfloat16")
"""dtype of the factors of gradients; `auto` is the dtype that the processor multiplies faster."""
FAST_BFLOAT16 = ("avx512_bf16", "amx_tile")
"""Instruction sets that multiply bfloat16 in hardware."""

ParameterTensors = dict[str, Tensor]
"""Parameters of a regression by name, or tensors of their shapes."""


@dataclass(frozen=True)
class Target:
    """Targets of a softmax over the vocabulary: a token or a distribution per row, or a draw."""

    token: Tensor | None = None
    """`(n,)` int64."""
    p: Tensor | None = None
    """`(n, vocab)` float32, rows sum to 1."""
    negentropy: Tensor | None = None
    """sum p log p, `(n,)`."""
    quantile: Tensor | None = None
    """Uniform random numbers in [0, 1), `(n,)`: tokens are drawn from the softmax itself."""

    def __getitem__(self, rows: slice | Tensor) -> "Target":
        fields = self.token, self.p, self.negentropy, self.quantile
        return Target(*(None if field is None else field[rows] for field in fields))

    def __len__(self) -> int:
        rows = next(v for v in (self.token, self.p, self.quantile) if v is not None)
        return len(rows)

    def losses(self, logits: Tensor) -> Tensor:
        """Cross-entropy or KL per row, `(n,)`; **`logits` become their gradient**, q - target."""
        losses = logits.new_empty(len(logits))
        for rows in cache_blocks(logits):
            losses[rows] = self[rows].block_losses(logits[rows])
        return losses

    def block_losses(self, logits: Tensor, gradient: bool = True) -> Tensor:
        """The same for few rows; without `gradient`, `logits` may become anything."""
        if self.p is None:
            return self._token_losses(logits)
        # KL(p || q) = logsumexp(z) - sum p z + sum p log p, gradient q - p.
        assert self.negentropy is not None
        expected_logit = expectation(self.p, logits)
        if not gradient:
            return torch.logsumexp(logits, 1) - expected_logit + self.negentropy
        losses = softmax_in_place(logits) - expected_logit + self.negentropy
        logits.sub_(self.p)
        return losses

    def write_block_gradient(self, logits: Tensor) -> None:
        """Turn the `logits` of few rows into their gradient, q - target, without the losses."""
        torch.softmax(logits, 1, out=logits)
        if self.p is not None:
            logits.sub_(self.p)
            return
        self._subtract_tokens(logits, self._tokens(logits))

    def _token_losses(self, logits: Tensor) -> Tensor:
        """-log q[y] = logsumexp(z) - z[y], gradient q - onehot(y)."""
        if self.token is not None:
            column = self._tokens(logits)
            token_logits = logits.gather(1, column)[:, 0]
            losses = softmax_in_place(logits) - token_logits
        else:
            softmax_in_place(logits)
            column = self._tokens(logits)
            losses = -logits.gather(1, column)[:, 0].log_()
        self._subtract_tokens(logits, column)
        return losses

    def _tokens(self, q: Tensor) -> Tensor:
        """The token of each row, `(n, 1)` int64; with `quantile` it is drawn from `q`."""
        if self.token is not None:
            return self.token[:, None]
        assert self.quantile is not None
        cumulative = reused_rows("cumulative", *q.shape, like=q).copy_(q)
        return draw_tokens(cumulative, self.quantile)[:, None]

    @staticmethod
    def _subtract_tokens(q: Tensor, column: Tensor) -> None:
        """Subtract 1 from the probability of the token of each row."""
        q.scatter_add_(1, column, q.new_full(column.shape, -1.0))


def softmax_in_place(logits: Tensor) -> Tensor:
    """Turn `logits` `(n, vocab)` into probabilities in place; gives the logsumexps, `(n,)`."""
    # logsumexp(z) = max z - log(max q), for max q = exp(max z - logsumexp(z)). The largest
    # probability is 1 / vocab or more, so its logarithm is finite.
    largest_logit = logits.amax(1)
    torch.softmax(logits, 1, out=logits)
    return largest_logit - logits.amax(1).log_()


def draw_tokens(q: Tensor, quantile: Tensor) -> Tensor:
    """The token at a `quantile` `(n,)` in [0, 1) of each distribution `q` `(n, vocab)`; int64.

    `q` is overwritten by its distribution function, whose inverse gives the token: a twentieth of
    the time of `torch.multinomial`.
    """
    cumulative = torch.cumsum(q, 1, out=q)
    threshold = quantile[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return tokens.clamp_max_(q.shape[1] - 1)


def expectation(p: Tensor, logits: Tensor) -> Tensor:
    """sum p z over the vocabulary, `(n,)`; a logit of -inf adds nothing where p is 0."""
    products = reused_rows("expectation", *logits.shape, like=logits)
    expected = torch.mul(p, logits, out=products).sum(1)
    if not math.isfinite(expected.sum().item()):
        expected = (p * logits).masked_fill_(p == 0, 0).sum(1)
    return expected


def first_argmax(logits: Tensor) -> Tensor:
    """Index of the largest logit of each row `(n, vocab)`, `(n,)` int64: the first on ties.

    The first NaN of a row that has any.
    """
    if logits.device.type == "cpu":
        # A tenth of the time of torch's.
        return torch.from_numpy(logits.numpy().argmax(1))
    return logits.argmax(1)


def fast_products(device: torch.device | None = None) -> str:
    """`bfloat16` on a processor that multiplies bfloat16 in hardware, else `float32`.

    `bfloat16` on any other `device`: all that torch knows multiply it at the rate of float32 or
    faster.
    """
    if device is not None and device.type != "cpu":
        return "bfloat16"
    checks = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in FAST_BFLOAT16]
    return "bfloat16" if any(check is not None and check() for check in checks) else "float32"


def most_tile_rows(vocab: int) -> int:
    """Rows of a tile of `vocab` logits: as many as `TILE_BYTES` and `TILE_ROWS` say."""
    return max(TILE_ROWS, TILE_BYTES // (4 * vocab))


def row_tiles(rows: int, vocab: int, tile_rows: int | None = None) -> Iterator[slice]:
    """Cut `rows` rows of `vocab` logits into equal tiles of at most `tile_rows` rows.

    By default those of `most_tile_rows`."""
    number = -(-rows // (tile_rows or most_tile_rows(vocab)))
    edges = [rows * i // number for i in range(number + 1)]
    yield from (slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True))


Tiles = TileRows | int | None
"""Rows of a tile: those of an object that remembers where memory ran out, a number, or by default
those of `most_tile_rows`."""


def run_tiles(tiles: Tiles, x: Tensor, vocab: int, compute: Callable[[slice], None]) -> None:
    """Call `compute(tile)` for tiles of the rows of `x`, halved where the device has no memory."""
    if not isinstance(tiles, TileRows):
        tiles = TileRows(tiles or most_tile_rows(vocab), x.device)
    tiles.run(len(x), compute)


class ModelDistribution:
    """The model's own distribution, as the target of a fit, from its last residual stream."""

    def __init__(self, head: TorchHead, tile_rows: Tiles = None) -> None:
        self.head = head
        self.vocab: int = head.head.vocab
        self.tile_rows = tile_rows

    @torch.no_grad()
    def tokens(self, residual: Tensor) -> Target:
        """The model's top token for rows `(n, d_model)`, the lowest id on ties."""
        tokens = torch.empty(len(residual), dtype=torch.int64, device=residual.device)

        def find_tokens(tile: slice) -> None:
            rows = residual[tile]
            logits = reused_rows("logits", len(rows), self.vocab, self._like(rows))
            self.head.write_logits(rows, logits)
            # The first NaN, if there is any: the check then finds it.
            tokens[tile] = first_argmax(logits)
            _check_largest_logits(logits.gather(1, tokens[tile][:, None]))

        run_tiles(self.tile_rows, residual, self.vocab, find_tokens)
        return Target(token=tokens)

    @torch.no_grad()
    def distribution(
        self,
        residual: Tensor,
        memory: Tensor | None = None,
        *,
        products: str = "float32",
        negentropy: bool = True,
    ) -> Target:
        """The model's probabilities `(n, vocab)` and their sums p log p, for rows `(n, d_model)`.

        All layers share them: they depend on the position t+N alone. The probabilities are written
        into `memory`, `(n or more, vocab)` float32, if given. `products` is the dtype of the
        factors of the product with the unembedding; gradients alone need no `negentropy`.
        """
        like = self._like(residual)
        p = like.new_empty(len(residual), self.vocab) if memory is None else memory[: len(residual)]
        sums = like.new_empty(len(residual)) if negentropy else None

        def write_distribution(tile: slice) -> None:
            largest = like.new_empty(len(p[tile]))
            for rows, logits in self._logit_blocks(residual[tile], p[tile], products):
                torch.amax(logits, 1, out=largest[rows])
                if sums is None:
                    torch.softmax(logits, 1, out=logits)
                else:
                    sums[tile][rows] = _softmax_with_negentropy(logits, largest[rows])
            _check_largest_logits(largest)

        run_tiles(self.tile_rows, residual, self.vocab, write_distribution)
        return Target(p=p, negentropy=sums)

    def _logit_blocks(
        self, residual: Tensor, out: Tensor, products: str
    ) -> Iterator[tuple[slice, Tensor]]:
        """The logits of a tile in blocks of rows, written into `out` `(n, vocab)`.

        A number added to all logits of a row may be left out.
        """
        if self.head.head.kind == "program":
            self.head.write_logits(residual, out)
            yield from ((rows, out[rows]) for rows in cache_blocks(out))
            return
        tile = HeadTile(self.head, self.head.normalize(residual), products, out)
        yield from ((rows, tile.logits(rows)) for rows in tile.blocks())

    def _like(self, rows: Tensor) -> Tensor:
        """An empty float32 tensor on the device of `rows`."""
        return rows.new_empty(0, dtype=torch.float32)


def _softmax_with_negentropy(logits: Tensor, largest: Tensor) -> Tensor:
    """Turn `logits` `(n, vocab)` into probabilities p in place; gives sum p log p, `(n,)`.

    `largest` `(n,)` are the largest logits."""
    # With logits shifted by their maximum, log p = z + log(max p): no logarithm per token.
    shifted = reused_rows("shifted", *logits.shape, like=logits)
    torch.sub(logits, largest[:, None], out=shifted)
    torch.softmax(shifted, 1, out=logits)
    return expectation(logits, shifted) + logits.amax(1).log_()


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

    bfloat16 changes a gradient by some 0.2 %, far less than the draw of the batch does. The logits
    of `affine_losses` stay exact; those of `head_losses` are of the same products, see there."""


NO_GRADIENTS = Gradients()


@torch.no_grad()
def affine_losses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Target,
    grads: Gradients = NO_GRADIENTS,
    tile_rows: Tiles = None,
) -> Tensor:
    """Losses `(n,)` of logits = x weight^T + bias, for `x` `(n, d)` and `weight` `(vocab, d)`."""
    losses = x.new_empty(len(x))
    factor = weight
    if grads.products == "bfloat16" and grads.x is not None:
        factor = weight.bfloat16()

    def add_tile(tile: slice) -> None:
        rows = x[tile]
        z = reused_rows("logits", len(rows), len(weight), x)
        torch.addmm(bias, rows, weight.T, out=z)
        losses[tile] = target[tile].losses(z)
        _add_gradients(grads, tile, z, rows, factor)

    run_tiles(tile_rows, x, len(weight), add_tile)
    return losses


def _add_gradients(grads: Gradients, tile: slice, z: Tensor, rows: Tensor, weight: Tensor) -> None:
    """Add the gradients of one tile: `z` `(n, vocab)` is the gradient in the logits.

    Weight: z' x; bias: z' 1; x: z weight. All memory is allocated before anything is added: a tile
    that did not fit is computed again."""
    products = []
    factor = z
    if grads.products == "bfloat16":
        factor, rows = (
            reused_rows("product", *z.shape, like=z, dtype=torch.bfloat16),
            rows.bfloat16(),
        )
        factor.copy_(z)
        if grads.weight is not None:
            products.append((grads.weight, factor.T @ rows))
        if grads.x is not None:
            products.append((grads.x[tile], factor @ weight))
    ones = z.new_ones(len(z))
    for total, product in products:
        total.add_(product, alpha=grads.scale)
    if grads.bias is not None:
        grads.bias.addmv_(z.T, ones, alpha=grads.scale)
    if grads.products == "bfloat16":
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
    tile_rows: Tiles = None,
) -> Tensor:
    """Losses `(n,)` of logits = head(hidden), `hidden` `(n, d_model)`; the head stays frozen.

    autograd differentiates heads that are programs. Both products with the unembedding, forwards
    and backwards, have the dtype `grads.products` (heads that are programs: always float32). With
    bfloat16 the losses are those of rounded logits.
    """
    losses = hidden.new_empty(len(hidden))
    _run_head(hidden, head, target, grads, tile_rows, losses)
    return losses


def add_head_gradients(
    hidden: Tensor,
    head: TorchHead,
    target: Target,
    grads: Gradients,
    tile_rows: Tiles = None,
) -> None:
    """Add the gradients of `head_losses` to `grads`, without the losses: some passes fewer."""
    _run_head(hidden, head, target, grads, tile_rows, None)


def _run_head(
    hidden: Tensor,
    head: TorchHead,
    target: Target,
    grads: Gradients,
    tile_rows: Tiles,
    losses: Tensor | None,
) -> None:
    """Write the losses into `losses`, if given, and add the gradients to `grads`, tile by tile."""
    run_tile = _program_tile if head.head.kind == "program" else _explicit_tile

    def add_tile(tile: slice) -> None:
        rows = hidden[tile].detach().requires_grad_(grads.x is not None)
        tile_losses = None if losses is None else losses[tile]
        gradient = run_tile(rows, head, target[tile], grads.products, tile_losses)
        if grads.x is not None and gradient is not None:
            grads.x[tile].add_(gradient, alpha=grads.scale)

    run_tiles(tile_rows, hidden, head.head.vocab, add_tile)


def _explicit_tile(
    rows: Tensor, head: TorchHead, target: Target, products: str, losses: Tensor | None
) -> Tensor | None:
    """Write the losses of one tile; gives their gradient in `rows`, None if these need none."""
    with torch.no_grad():
        tile = HeadTile(head, head.normalize(rows), products)
        for block in tile.blocks():
            logits = tile.logits(block, slope=rows.requires_grad)
            # The logits become their gradient, which the chain rule takes back to the rows.
            if losses is None:
                target[block].write_block_gradient(logits)
            else:
                losses[block] = target[block].block_losses(logits, rows.requires_grad)
            if rows.requires_grad:
                tile.take_gradient(block, logits)
        return head.norm_gradient(rows, tile.normed_gradient()) if rows.requires_grad else None


def _program_tile(
    rows: Tensor, head: TorchHead, target: Target, products: str, losses: Tensor | None
) -> Tensor | None:
    """The same for a head that is a program, by autograd through the program; always float32."""
    with torch.set_grad_enabled(rows.requires_grad):
        logits = head(rows)
    # A copy: an operation of the program may need its own output for the gradient.
    gradient = reused_rows("logits", *logits.shape, like=logits).copy_(logits.detach())
    if losses is None:
        for block in cache_blocks(gradient):
            target[block].write_block_gradient(gradient[block])
    else:
        losses.copy_(target.losses(gradient))
    if not rows.requires_grad:
        return None
    return torch.autograd.grad(logits, rows, gradient)[0]
