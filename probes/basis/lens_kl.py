"""KL between a lens on rows and on the same rows with k directions ablated, with gradients.

For a lens u = h W + b (a translated row), read by the head, and an ablation h - C decoder:

    KL_n = KL( softmax(head(u_n)) || softmax(head(u_n - C_n B)) ),    B = decoder W

with the coordinates C `(n, k)` and the output directions B `(k, d)`. `ExplicitLensKL` computes the
sum of KL_n and its gradients in C and B for heads by formula, `ProgramLensKL` for heads that are
programs. `objective.py` calls both, group of rows by group of rows.

For a head by formula, with E = W_U gamma (rows centred for LayerNorm), Pu the (centred) translated
row, s its norm's divisor and a = scale / s, the ablated logits are affine in C B E':

    logits = a (A - C Bv) + const,    A = Pu E' (n, vocab),    Bv = B E' (k, vocab)

The side of the clean distribution p needs only M_n = sum_v p_v E_v `(d,)` and log Z_n, so that one
exponential per (row, token) is left. With q the ablated distribution:

    KL_n        = (a0 - a) Pu.M + a C.(M B') + log sum exp(logits) - log Z
    dKL/dC      = a (M B' - E_q[Bv]) + norm term
    dKL/dB      = (a C)' (M - E_q[E]) + norm term
    dKL/da      = E_q[A - C Bv] - Pu.M + C.(M B'),    a = scale / sqrt(mean square + eps)

All tensors are on one device. Sums are float64 where the device has it, else float32 (within a
group of rows alone: groups are added up in float64).

A softcap makes the logits nonlinear: p is computed again, two tanh and two exp per (row, token).
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...cache.devices import copy_to_device, wide_dtype
from ...cache.head.head import Head, TorchHead, as_head_tensor
from ...cache.head.row_buffers import reused_rows
from ..training.softmax_loss import (
    Gradients,
    ModelDistribution,
    Target,
    cache_blocks,
    head_losses,
)
from ..training.threads import CPU

BLOCK_BYTES = 12 << 20
"""Most bytes of the logits of a block of rows: they stay in the processor's shared cache."""
BLOCK_ROWS = 64
"""Most rows of a block."""
PRODUCT_ROWS = 256
"""Rows, or nearly, of a product with the unembedding on the CPU.

At d_model 4,096 and vocabulary 128,256, products of 64 and 256 rows run at 103 and 151 GFLOP/s,
those with the transpose at 66 and 151 (one core with AVX-512)."""
TILE_BYTES = 1 << 20
"""Bytes of the logits that are worked on at a time.

Smaller tiles stay in one core's own cache, but need more calls: at d_model 768 and vocabulary
50,257 a loss with gradient takes .8 of the time of 256 KiB with one direction, .93 with eight."""
DEVICE_BLOCK_BYTES, DEVICE_BLOCK_ROWS = 256 << 20, 2048
"""Most bytes and rows of a block on other devices than the CPU: each operation costs a start."""
LOG2_E = 1 / math.log(2)
"""exp(x) is computed as exp2(x log2 e): torch's exp2 takes half the time of its exp."""
LEAST_SUM = 1e-30
"""Sums of exponentials below this are computed again, shifted by the largest logit."""


@dataclass(frozen=True)
class CleanRows:
    """What a KL needs of rows that are not ablated."""

    output: Tensor
    """Translated rows u `(n, d)`; centred where the head's norm is a LayerNorm."""
    expected: Tensor
    """M = sum_v p_v E_v, `(n, d)`; without columns where the head does not need it."""
    log_z: Tensor
    """Log of the sum of the exponentials of the clean logits, `(n,)` float64."""

    def __getitem__(self, rows: slice) -> "CleanRows":
        return CleanRows(self.output[rows], self.expected[rows], self.log_z[rows])


@dataclass(frozen=True)
class OutputDirections:
    """Directions of the translated rows along which an ablation moves them."""

    directions: Tensor
    """B `(k, d)`; centred where the head's norm is a LayerNorm."""
    tokens: list[Tensor]
    """`(k + 2, columns)` for each tile of tokens: B E', constant part of the logits, and ones."""


@dataclass
class AblationGradient:
    """Sum of the KL over rows, in nats, and the gradients of the sum."""

    coordinates: Tensor
    """In the coordinates C of each row, `(n, k)`."""
    directions: Tensor
    """In the output directions B, summed over the rows, `(k, d)` float64."""


class ExplicitLensKL:
    """KL of ablations for a head by formula, in tiles of rows and tokens.

    `dtype` is that of all products, float32 or float64; sums over the vocabulary are continued in
    `wide`, float64 if the device has it, from tile to tile.
    """

    def __init__(
        self,
        head: Head,
        dtype: torch.dtype = torch.float32,
        block_rows: int | None = None,
        tile_columns: int | None = None,
        device: torch.device = CPU,
    ) -> None:
        def tensor(array: object) -> Tensor:
            return copy_to_device(torch.tensor(array).to(dtype), device)

        self.wide: torch.dtype = wide_dtype(device)
        """dtype of sums."""

        self.norm: str = head.norm
        self.eps: float = head.eps
        self.scale: float = head.scale
        self.softcap: float | None = head.softcap
        self.dtype = dtype
        self.unembedding: Tensor = as_head_tensor(head.unembedding, device).to(dtype)
        """W_U `(vocab, d)`, in float32 the head's own: E is not made, see `_unembedded`."""
        self.gain: Tensor = tensor(head.norm_weight)
        """gamma, `(d,)`."""
        constant = self.unembedding @ tensor(head.norm_bias) + tensor(head.bias)
        self.constant: Tensor = constant.mul_(self.scale)
        """Part of the logits that is the same for all rows, `(vocab,)`."""
        vocab = head.vocab
        self.vocab: int = vocab
        self.width: int = head.d_model
        self._on_cpu = device.type == "cpu"
        element = torch.finfo(dtype).bits // 8
        self.block_rows: int = block_rows or rows_of_block(element * vocab, device)
        """Rows of a block."""
        step = tile_columns or max(256, TILE_BYTES // (element * self.block_rows))
        if device.type != "cpu":
            step = tile_columns or vocab
        self._tiles = [slice(i, min(vocab, i + step)) for i in range(0, vocab, step)]
        self._local = threading.local()

    def clean_rows(
        self, translated: Tensor, keep_tokens: Callable[[slice, Tensor], None] | None = None
    ) -> CleanRows:
        """The clean side of translated rows u `(n, d)`: one product with E', one with E.

        `keep_tokens` is called with each part of the rows (`parts`) and its `clean_token_part`.
        """
        output = self.centred(translated.to(self.dtype))
        needs_expected = self.softcap is None
        expected = output.new_zeros(len(output), self.width if needs_expected else 0)
        log_z = output.new_zeros(len(output), dtype=self.wide)
        for rows in self.parts(len(output)):
            token_part = self.clean_token_part(output[rows])
            if keep_tokens is not None:
                keep_tokens(rows, token_part)
            inverse = self._inverse_norm(output[rows]).to(self.dtype)[:, None]
            exponentials = reused_rows("exponentials", *token_part.shape, like=token_part)
            total = torch.empty_like(inverse)
            for block in cache_blocks(token_part):
                logits = torch.mul(token_part[block], inverse[block], out=exponentials[block])
                logits = self._capped(logits.add_(self.constant))
                largest = logits.amax(1, keepdim=True)
                logits.sub_(largest).exp_()
                torch.sum(logits, 1, keepdim=True, out=total[block])
                log_z[rows][block] = (largest.to(self.wide) + total[block].to(self.wide).log())[
                    :, 0
                ]
            if needs_expected:
                expected[rows] = self._unembedded(exponentials).div_(total)
        return CleanRows(output, expected, log_z)

    def clean_token_part(self, output: Tensor, out: Tensor | None = None) -> Tensor:
        """A = Pu E' of clean rows `output` `(n, d)`, `(n, vocab)`; the products of an evaluation
        that do not depend on the directions."""
        return torch.mm(output * self.gain, self.unembedding.T, out=out)

    def _unembedded(self, weights: Tensor, columns: slice = slice(None)) -> Tensor:
        """Sums of rows of E with `weights` `(n, tokens)` of the tokens `columns`, `(n, d)`.

        E = W_U gamma, its rows centred for LayerNorm, is never made: it would take as much memory
        as the head. Rows that are multiplied with E' are centred themselves.
        """
        return self.centred(torch.mm(weights, self.unembedding[columns]).mul_(self.gain))

    @property
    def product_rows(self) -> int:
        """Rows of a part: some blocks on the CPU, one on other devices."""
        return self.block_rows * max(1, PRODUCT_ROWS // self.block_rows if self._on_cpu else 1)

    def parts(self, n: int) -> list[slice]:
        """Parts of `n` rows, each of some blocks, that are multiplied with the unembedding."""
        return [slice(i, min(n, i + self.product_rows)) for i in range(0, n, self.product_rows)]

    def blocks(self, n: int) -> list[slice]:
        """Blocks of at most `block_rows` of `n` rows."""
        return [slice(i, min(n, i + self.block_rows)) for i in range(0, n, self.block_rows)]

    def output_directions(self, directions: Tensor) -> OutputDirections:
        """Prepare B `(k, d)` for the blocks of one evaluation."""
        directions = self.centred(directions.to(self.dtype))
        scaled, tokens = directions * self.gain, []
        for columns in self._tiles:
            tile = directions.new_ones(len(directions) + 2, columns.stop - columns.start)
            tile[:-2] = torch.mm(self.unembedding[columns], scaled.T).T
            tile[-2] = self.constant[columns]
            tokens.append(tile)
        return OutputDirections(directions, tokens)

    def zero_token_gradient(self, k: int) -> Tensor:
        """Zeros for `losses_and_gradient` to add to, `(k vocab,)`, tile by tile of tokens."""
        return self.constant.new_zeros(k * self.vocab)

    def losses(
        self, clean: CleanRows, token_part: Tensor, coordinates: Tensor, along: OutputDirections
    ) -> Tensor:
        """KL `(n,)` float64 of the rows of a block, with `coordinates` `(n, k)` ablated."""
        return self._evaluate(clean, token_part, coordinates, along, None)[0]

    def losses_and_gradient(
        self,
        clean: CleanRows,
        token_part: Tensor,
        coordinates: Tensor,
        along: OutputDirections,
        token_gradient: Tensor,
    ) -> tuple[Tensor, AblationGradient]:
        """KL `(n,)` float64 of the rows of a block, and the gradient of their sum.

        The part of the gradient in B that goes through the tokens is added to `token_gradient`,
        from `zero_token_gradient`; `finish_directions` turns the sum of all blocks into `(k, d)`.
        """
        losses, gradient = self._evaluate(clean, token_part, coordinates, along, token_gradient)
        assert gradient is not None
        return losses, gradient

    def finish_directions(self, token_gradient: Tensor) -> Tensor:
        """Gradient in B `(k, d)` float64 of the sum `token_gradient`."""
        k = len(token_gradient) // self.vocab
        gradient = token_gradient.new_zeros(k, self.width, dtype=self.wide)
        for columns in self._tiles:
            tile = _tile_of(token_gradient, k, columns)
            gradient += self._unembedded(tile, columns)
        return gradient

    def reference_gradients(self, clean: CleanRows, reference_output: Tensor) -> Tensor:
        """Gradient of each KL in u where all rows become the row `reference_output` `(d,)`.

        All rows then have one distribution q, so that E_q[E] is one row. Shape `(n, d)`; for heads
        without a softcap, see `gradients_at` for others.
        """
        reference = self.clean_rows(reference_output[None])
        divisor = self._inverse_norm(reference.output).to(self.dtype)[:, None]
        slopes = (reference.expected - clean.expected) * divisor
        if self.norm == "none":
            return slopes
        # Through the norm: less the component along the row itself.
        row, width = reference.output[0], self.width
        factor = (divisor[0, 0] / self.scale) ** 2 / width
        return slopes - torch.outer(slopes @ row, row) * factor

    def centred(self, rows: Tensor) -> Tensor:
        """`rows` less their means over d_model, where the norm is a LayerNorm."""
        return rows - rows.mean(1, keepdim=True) if self.norm == "layernorm" else rows

    def _inverse_norm(self, output: Tensor) -> Tensor:
        """a = scale / s of centred rows `output`, `(n,)` float64."""
        if self.norm == "none":
            return output.new_full((len(output),), self.scale, dtype=self.wide)
        return self.scale * self._mean_squares(output).rsqrt()

    def _mean_squares(self, output: Tensor) -> Tensor:
        """s^2 = mean square + eps of rows `(n, d)`, `(n,)` float64."""
        return torch.linalg.vecdot(output, output).to(self.wide) / self.width + self.eps

    def _capped(self, logits: Tensor) -> Tensor:
        """`logits` under the head's softcap, in place."""
        if self.softcap is None:
            return logits
        return logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def _evaluate(
        self,
        clean: CleanRows,
        token_part: Tensor,
        coordinates: Tensor,
        along: OutputDirections,
        token_gradient: Tensor | None,
    ) -> tuple[Tensor, AblationGradient | None]:
        """KL of a block and, with `token_gradient`, its gradients; formulae above."""
        directions = along.directions
        # Norms of the ablated rows: from the rows themselves, where nothing cancels.
        ablated = torch.addmm(clean.output, coordinates, directions, alpha=-1)
        if self.norm == "none":
            inverse = clean_inverse = self._inverse_norm(ablated)
        else:
            mean_squares = self._mean_squares(ablated)
            inverse, clean_inverse = (
                self.scale * mean_squares.rsqrt(),
                self._inverse_norm(clean.output),
            )
        scaled = coordinates * inverse.to(self.dtype)[:, None]

        # Sums over the vocabulary: of the loss, and of the gradient in the logits.
        evaluate = self._sum_over_tokens if self.softcap is None else self._sum_over_capped_tokens
        losses, slopes = evaluate(
            clean, token_part, scaled, (inverse, clean_inverse), along, token_gradient
        )
        if slopes is None:
            return losses, None

        # Chain rule: coordinates and directions enter the logits, and the norm.
        direction_slopes, row_slopes = slopes
        gradient = -inverse[:, None] * direction_slopes
        directions_gradient = directions.new_zeros(directions.shape, dtype=self.wide)
        if clean.expected.shape[1]:
            directions_gradient += (scaled.T @ clean.expected).to(self.wide)
        if self.norm != "none":
            wide_coordinates = coordinates.to(self.wide)
            inverse_slopes = row_slopes - (wide_coordinates * direction_slopes).sum(1)
            square_slopes = inverse_slopes * -0.5 * inverse / mean_squares  # pyright: ignore
            weights = (square_slopes * (-2 / self.width))[:, None]
            gradient += weights * (ablated @ directions.T).to(self.wide)
            weighted = (wide_coordinates * weights).to(self.dtype)
            directions_gradient += (weighted.T @ ablated).to(self.wide)
        return losses, AblationGradient(gradient.to(self.dtype), directions_gradient)

    def _sum_over_tokens(
        self,
        clean: CleanRows,
        token_part: Tensor,
        scaled: Tensor,
        inverses: tuple[Tensor, Tensor],
        along: OutputDirections,
        token_gradient: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """KL `(n,)`, and sums of the gradient in the logits times B E' `(n, k)` and A `(n,)`.

        float64. The gradient's part in `token_gradient` `(k, vocab)` is that of q alone.
        """
        inverse, clean_inverse = inverses
        with_gradient = token_gradient is not None
        factor = inverse.to(self.dtype)[:, None]
        n = len(token_part)
        exponentials = self._buffer(token_part.numel()) if with_gradient else None

        def sums_shifted_by(shift: Tensor) -> tuple[Tensor, Tensor]:
            """Sums of exp(logits - shift) times each row of `along.tokens`, and times A."""
            left = torch.cat(
                [-scaled, torch.ones_like(factor), -shift[:, None].to(self.dtype)], dim=1
            ).mul_(LOG2_E)
            sums = left.new_zeros(left.shape, dtype=self.wide)
            row_sums = left.new_zeros(len(left), dtype=self.wide)
            for columns, tokens in zip(self._tiles, along.tokens, strict=True):
                part = token_part[:, columns]
                tile = torch.mm(left, tokens).addcmul_(part, factor, value=LOG2_E)
                if exponentials is None:
                    sums[:, -1] += tile.exp2_().sum(1)
                    continue
                tile = torch.exp2(tile, out=_tile_of(exponentials, n, columns))
                sums += torch.mm(tokens, tile.T).T
                row_sums += row_products(tile, part)
            return sums, row_sums

        shift = clean.log_z
        sums, row_sums = sums_shifted_by(shift)
        total = sums[:, -1]
        if not bool(((total > LEAST_SUM) & total.isfinite()).all()):
            shift = self._largest_logits(token_part, scaled, factor, along)
            sums, row_sums = sums_shifted_by(shift)
            total = sums[:, -1]

        # KL from the clean side's few numbers.
        expected = clean.expected
        expected_directions = (expected @ along.directions.T).to(self.wide)
        expected_rows = torch.linalg.vecdot(expected, clean.output).to(self.wide)
        losses = (clean_inverse - inverse) * expected_rows
        losses += (scaled.to(self.wide) * expected_directions).sum(1)
        losses += total.log() + shift - clean.log_z
        if token_gradient is None or exponentials is None:
            return losses, None

        # Gradients: q less p, without p where M stands for it.
        weights = (scaled / total[:, None].to(self.dtype)).T.contiguous()
        for columns in self._tiles:
            tile = _tile_of(exponentials, n, columns)
            _tile_of(token_gradient, len(weights), columns).addmm_(weights, tile, alpha=-1)
        direction_slopes = sums[:, :-2] / total[:, None] - expected_directions
        return losses, (direction_slopes, row_sums / total - expected_rows)

    def _largest_logits(
        self, token_part: Tensor, scaled: Tensor, factor: Tensor, along: OutputDirections
    ) -> Tensor:
        """The largest ablated logit of each row, `(n,)` float64."""
        left = torch.cat([-scaled, torch.ones_like(factor)], dim=1)
        largest = left.new_full((len(left),), -torch.inf, dtype=self.wide)
        for columns, tokens in zip(self._tiles, along.tokens, strict=True):
            logits = torch.mm(left, tokens[:-1])
            logits.addcmul_(token_part[:, columns], factor)
            largest = torch.maximum(largest, logits.amax(1).to(self.wide))
        return largest

    def _sum_over_capped_tokens(
        self,
        clean: CleanRows,
        token_part: Tensor,
        scaled: Tensor,
        inverses: tuple[Tensor, Tensor],
        along: OutputDirections,
        token_gradient: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """`_sum_over_tokens` for logits c tanh(x / c); the gradient is in x, with p inside.

        The logits lie within +-c of 0, so that exponentials are shifted by log Z alone.
        """
        assert self.softcap is not None
        cap = self.softcap
        factor, clean_factor = (inverse.to(self.dtype)[:, None] for inverse in inverses)
        shift = (clean.log_z[:, None] * LOG2_E).to(self.dtype)
        left = torch.cat([-scaled, torch.ones_like(factor), torch.zeros_like(factor)], dim=1)
        p, q, tanh = (torch.empty_like(token_part) for _ in range(3))
        total = left.new_zeros(len(left), dtype=self.wide)
        losses = left.new_zeros(len(left), dtype=self.wide)
        for columns, tokens in zip(self._tiles, along.tokens, strict=True):
            part = token_part[:, columns]
            clean_tanh = (part * clean_factor).add_(self.constant[columns]).div_(cap).tanh_()
            p[:, columns] = (clean_tanh * (cap * LOG2_E)).sub_(shift).exp2_()
            tile = torch.mm(left, tokens)
            tile.addcmul_(part, factor).div_(cap).tanh_()
            q[:, columns] = (tile * (cap * LOG2_E)).sub_(shift).exp2_()
            tanh[:, columns] = tile
            total += q[:, columns].sum(1)
            products = torch.linalg.vecdot(p[:, columns], clean_tanh.sub_(tile))
            losses += products.to(self.wide) * cap
        losses += total.log()
        if token_gradient is None:
            return losses, None
        direction_slopes = scaled.new_zeros(scaled.shape, dtype=self.wide)
        row_slopes = left.new_zeros(len(left), dtype=self.wide)
        inverse_total = total.reciprocal().to(self.dtype)[:, None]
        weights = scaled.T.contiguous()
        for columns, tokens in zip(self._tiles, along.tokens, strict=True):
            # (q - p) times the derivative of the softcap.
            slope = (q[:, columns] * inverse_total).sub_(p[:, columns])
            slope.mul_(1 - tanh[:, columns].square())
            direction_slopes += torch.mm(slope, tokens[:-2].T)
            row_slopes += torch.linalg.vecdot(slope, token_part[:, columns])
            _tile_of(token_gradient, len(weights), columns).addmm_(weights, slope, alpha=-1)
        return losses, (direction_slopes, row_slopes)

    def _buffer(self, size: int) -> Tensor:
        """An uninitialised tensor `(size,)` that this thread uses again and again."""
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.buffer = self.constant.new_empty(size)
        return buffer


class ProgramLensKL:
    """KL of ablations for a head that is a program: autograd through the head, tile by tile."""

    def __init__(self, head: Head, device: torch.device = CPU) -> None:
        self.head: TorchHead = head.torch(device)
        self.wide: torch.dtype = wide_dtype(device)
        self._device = device
        self.width: int = head.d_model
        self.vocab: int = head.vocab
        self.dtype: torch.dtype = torch.float32
        self.block_rows: int = rows_of_block(4 * head.vocab, device)

    def clean_rows(
        self, translated: Tensor, keep_tokens: Callable[[slice, Tensor], None] | None = None
    ) -> CleanRows:
        """Translated rows alone: the clean distribution is computed again in each evaluation."""
        output = translated.float()
        empty = output.new_zeros(len(output), 0)
        return CleanRows(output, empty, output.new_zeros(len(output), dtype=self.wide))

    def clean_token_part(self, output: Tensor, out: Tensor | None = None) -> Tensor:
        """Nothing, `(n, 0)`."""
        return output.new_zeros(len(output), 0)

    def blocks(self, n: int) -> list[slice]:
        """Blocks of at most `block_rows` of `n` rows."""
        return [slice(i, min(n, i + self.block_rows)) for i in range(0, n, self.block_rows)]

    def parts(self, n: int) -> list[slice]:
        """The same blocks: a program multiplies rows block by block."""
        return self.blocks(n)

    def output_directions(self, directions: Tensor) -> OutputDirections:
        """B `(k, d)` without a part by tokens."""
        directions = directions.float()
        return OutputDirections(directions, [])

    def zero_token_gradient(self, k: int) -> Tensor:
        """Nothing, `(0,)`: gradients do not go through the tokens' own directions."""
        return torch.zeros(0, device=self._device)

    def losses(
        self, clean: CleanRows, token_part: Tensor, coordinates: Tensor, along: OutputDirections
    ) -> Tensor:
        """KL `(n,)` float64 of the rows of a block, with `coordinates` `(n, k)` ablated."""
        ablated = torch.addmm(clean.output, coordinates, along.directions, alpha=-1)
        return head_losses(ablated, self.head, self._target(clean.output)).to(self.wide)

    def losses_and_gradient(
        self,
        clean: CleanRows,
        token_part: Tensor,
        coordinates: Tensor,
        along: OutputDirections,
        token_gradient: Tensor,
    ) -> tuple[Tensor, AblationGradient]:
        """KL `(n,)` float64 of the rows of a block, and the gradient of their sum."""
        ablated = torch.addmm(clean.output, coordinates, along.directions, alpha=-1)
        slopes = torch.zeros_like(ablated)
        target = self._target(clean.output)
        losses = head_losses(ablated, self.head, target, Gradients(x=slopes)).to(self.wide)
        directions = -(coordinates.T @ slopes).to(self.wide)
        return losses, AblationGradient(-(slopes @ along.directions.T), directions)

    def finish_directions(self, token_gradient: Tensor) -> Tensor:
        """Nothing to add, zero: the gradient in B is complete after each block."""
        return torch.zeros((), dtype=self.wide, device=self._device)

    def centred(self, rows: Tensor) -> Tensor:
        """`rows` unchanged: the head centres them itself."""
        return rows

    def _target(self, output: Tensor) -> Target:
        return ModelDistribution(self.head).distribution(output)


LensKL = ExplicitLensKL | ProgramLensKL
"""KL of ablations for either kind of head."""


def make_lens_kl(
    head: Head, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> LensKL:
    """The KL of ablations for `head` on `device`; heads that are programs are float32 always."""
    if head.kind == "program":
        return ProgramLensKL(head, device)
    return ExplicitLensKL(head, dtype, device=device)


def rows_of_block(row_bytes: int, device: torch.device) -> int:
    """Rows of a block, for logits of `row_bytes` a row."""
    if device.type == "cpu":
        return max(8, min(BLOCK_ROWS, BLOCK_BYTES // row_bytes))
    return max(8, min(DEVICE_BLOCK_ROWS, DEVICE_BLOCK_BYTES // row_bytes))


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """Sums of products of the rows of two matrices `(n, columns)`, `(n,)`."""
    if a.device.type == "cpu":
        # numpy's takes half the time of torch's.
        return torch.from_numpy(np.einsum("ij,ij->i", a.numpy(), b.numpy()))
    return torch.linalg.vecdot(a, b)


def _tile_of(flat: Tensor, rows: int, columns: slice) -> Tensor:
    """Tile `columns` of tokens of a matrix of `rows` rows that is kept tile by tile; contiguous."""
    return flat[rows * columns.start : rows * columns.stop].view(rows, -1)


def gradients_at(output: Tensor, ablated: Tensor, head: TorchHead) -> Tensor:
    """Gradient in u of KL(lens(output) || lens(u)) at u = `ablated`; all `(n, d)`, float32.

    For any head, with two products over the vocabulary a row.
    """
    slopes = output.new_zeros(output.shape, dtype=torch.float32)
    ablated = ablated.float().contiguous()
    rows_per_block = rows_of_block(4 * head.head.vocab, output.device)
    for start in range(0, len(output), rows_per_block):
        rows = slice(start, start + rows_per_block)
        target = ModelDistribution(head).distribution(output[rows].float())
        head_losses(ablated[rows], head, target, Gradients(x=slopes[rows]))
    return slopes
