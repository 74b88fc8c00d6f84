"""A model resumed from a layer gives the logits of a full run whose layer is overwritten."""

from typing import Any

import pytest
import torch

from residua.cache.checks.resume_check import check_resume
from residua.cache.errors import MismatchError, ModelError, UsageError
from residua.cache.model.block_search import find_blocks
from residua.cache.model.blocks import DecoderBlocks, run_model
from residua.cache.model.resume import ResumableRun

from ...support import architectures, models, toys
from ...support.architectures import build_architecture

VOCAB = architectures.VOCAB
KINDS = (
    # blocks that give a tensor, a tuple, several tensors beside the stream
    "llama", "gpt2", "gptj", "bloom", "falcon", "hy_v4", "zaya",
    # sliding and full attention in turn, softcap, experts, recurrences, loops of blocks
    "gemma2", "gemma3_text", "mixtral", "mamba", "recurrent_gemma", "hrm_text",
    # blocks that read the embeddings again, two streams, other axes, a prompt before the text
    "zamba2", "deepseek_v4", "prophetnet", "cpmant",
)  # fmt: skip


def random_ids(seed: int, rows: int = 2, length: int = 24, vocab: int = VOCAB) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab - 1, (rows, length), generator=generator)


def blocks_of(model: torch.nn.Module, vocab: int = VOCAB) -> DecoderBlocks:
    with torch.inference_mode():
        return find_blocks(model, *(random_ids(seed, 4, 48, vocab) for seed in (1, 2)))


def changed(hidden: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(hidden.shape, generator=generator)
    return 0.8 * hidden + 0.3 * hidden.std() * noise


def padding_mask(ids: torch.Tensor, padding: int = 7) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[1, -padding:] = 0
    return mask


def logits_with_hook(
    blocks: DecoderBlocks, layer: int, hidden: torch.Tensor, ids: torch.Tensor, mask: Any
) -> torch.Tensor:
    """Logits of a full run; a hook on the block overwrites its plain output (tensor or tuple)."""

    def overwrite(_: Any, __: Any, output: Any) -> Any:
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    handle = blocks.blocks[layer - 1].register_forward_hook(overwrite)
    try:
        kwargs = {} if mask is None else {"attention_mask": mask}
        return blocks.model(input_ids=ids, use_cache=False, **kwargs).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_equals_a_full_run_with_the_layer_overwritten(
    kind: str, padded: bool
) -> None:
    if kind not in architectures.KINDS:
        pytest.skip(f"this transformers has no {kind}")
    blocks = blocks_of(build_architecture(kind))
    ids = random_ids(3)
    mask = padding_mask(ids) if padded else None
    with torch.inference_mode():
        run = ResumableRun(blocks, ids, mask)
        torch.testing.assert_close(
            run.logits, run_model(blocks.model, ids, mask).logits, rtol=0, atol=0
        )
        for layer in range(blocks.depth + 1):
            hidden = changed(run.residual(layer))
            resumed, full = run.resume(layer, hidden), run.overwrite(layer, hidden)
            assert torch.equal(resumed, full)
            assert float((resumed - run.logits).abs().max()) > 1e-3, layer
            assert torch.equal(run.resume(layer, run.residual(layer)), run.logits)


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "bloom", "falcon", "llama", "gemma2"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_resumed_run_equals_a_run_with_a_plain_hook(kind: str, padded: bool) -> None:
    blocks = blocks_of(models.build_model(kind), models.VOCAB)
    ids = random_ids(4, rows=3, length=21)
    mask = padding_mask(ids) if padded else None
    with torch.inference_mode():
        run = ResumableRun(blocks, ids, mask)
        for layer in range(1, blocks.depth + 1):
            hidden = changed(run.residual(layer))
            full = logits_with_hook(blocks, layer, hidden, ids, mask)
            assert torch.equal(run.resume(layer, hidden), full)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_layer_0_is_the_output_of_the_embedding(kind: str) -> None:
    blocks = blocks_of(models.build_model(kind), models.VOCAB)
    model: Any = blocks.model
    ids = random_ids(4)
    with torch.inference_mode():
        run = ResumableRun(blocks, ids)
        hidden = changed(run.residual(0))
        full = model(inputs_embeds=hidden, use_cache=False).logits
        assert torch.equal(run.resume(0, hidden), full)


@pytest.mark.parametrize(
    "toy",
    [
        toys.Looped,
        toys.InDictionary,
        toys.InDataclass,
        toys.SecondOfTwo,
        toys.PositionFirst,
        toys.StreamsInside,
        toys.StreamsFirst,
        toys.Prompted,
        toys.Repeated,
        toys.TwoStreams,
        toys.ByKeyword,
        toys.OtherClasses,
        toys.SkippedBlock,
    ],
)
def test_streams_of_any_layout_and_loops_of_blocks_are_resumed(toy: type[toys.Toy]) -> None:
    blocks = blocks_of(toy(), models.VOCAB)
    ids = random_ids(6)
    with torch.inference_mode():
        run = ResumableRun(blocks, ids)
        for layer in range(blocks.depth + 1):
            hidden = changed(run.residual(layer))
            resumed = run.resume(layer, hidden)
            assert torch.equal(resumed, run.overwrite(layer, hidden))
            assert float((resumed - run.logits).abs().max()) > 1e-3
            assert torch.equal(run.resume(layer, run.residual(layer)), run.logits)


def test_a_looped_block_runs_again_after_its_call_was_skipped() -> None:
    toy = toys.Looped()
    blocks = blocks_of(toy, models.VOCAB)
    ids = random_ids(6)
    with torch.inference_mode():
        run = ResumableRun(blocks, ids)
        for layer in range(5):
            hidden = state = changed(run.residual(layer))
            for block in [*toy.blocks, *toy.blocks][layer:]:
                state = block(state)
            assert torch.equal(run.resume(layer, hidden), toy.tail(state, ids))


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_blocks_up_to_the_layer_do_not_run(kind: str) -> None:
    blocks = blocks_of(models.build_model(kind), models.VOCAB)
    ids = random_ids(7)
    with torch.inference_mode():
        run = ResumableRun(blocks, ids)
        expected = [run.overwrite(la, changed(run.residual(la))) for la in range(4)]
        # Parameters without data: the first block that computes with them fails.
        for layer in range(1, 4):
            blocks.blocks[layer - 1].to("meta")
            hidden = changed(run.residual(layer))
            assert torch.equal(run.resume(layer, hidden), expected[layer])
        with pytest.raises((RuntimeError, NotImplementedError)):
            run.resume(0, run.residual(0))


def module_state(model: torch.nn.Module) -> list[tuple[Any, ...]]:
    return [
        (
            vars(module).keys(),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            vars(module).get("forward"),
        )
        for module in model.modules()
    ]


def test_nothing_stays_on_the_modules_also_after_an_error() -> None:
    blocks = blocks_of(models.build_model("gpt2"), models.VOCAB)
    ids = random_ids(8)

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the last block fails")

    # A library has put a forward of its own on the second block.
    second = blocks.blocks[1]
    own = second.forward
    vars(second)["forward"] = own
    before = module_state(blocks.model)
    with torch.inference_mode():
        run = ResumableRun(blocks, ids)
        run.resume(2, run.residual(2))
        run.resume(0, run.residual(0))
        assert module_state(blocks.model) == before
        handle = blocks.blocks[2].register_forward_pre_hook(fail)
        with_failure = module_state(blocks.model)
        for layer in (0, 1, 2):
            with pytest.raises(RuntimeError, match="the last block fails"):
                run.resume(layer, run.residual(layer))
            assert module_state(blocks.model) == with_failure
        with pytest.raises(RuntimeError, match="the last block fails"):
            ResumableRun(blocks, ids)
        assert module_state(blocks.model) == with_failure
        handle.remove()
        assert torch.equal(run_model(blocks.model, ids).logits, run.logits)


def test_the_given_stream_and_the_kept_outputs_stay_unchanged() -> None:
    class InPlace(toys.Toy):
        """Blocks are followed by a change in place."""

        def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                hidden = block(hidden).mul_(1.5)
            return hidden

    toy = InPlace()
    ids = random_ids(9)
    blocks = DecoderBlocks(
        toy, "blocks", list(toy.blocks), blocks_of(toys.Toy(), models.VOCAB).axes, (0,)
    )
    with torch.inference_mode():
        run = ResumableRun(blocks, ids)
        kept = [run.residual(layer).clone() for layer in range(3)]
        for layer in range(3):
            hidden = changed(kept[layer])
            copy = hidden.clone()
            first = run.resume(layer, hidden)
            assert torch.equal(hidden, copy)
            assert torch.equal(run.resume(layer, hidden), first)
            assert torch.equal(first, run.overwrite(layer, hidden))
        assert all(torch.equal(run.residual(layer), kept[layer]) for layer in range(3))


def test_bfloat16_models_take_float32_streams() -> None:
    blocks = blocks_of(models.build_model("llama", torch.bfloat16), models.VOCAB)
    ids = random_ids(10)
    with torch.inference_mode():
        run = ResumableRun(blocks, ids)
        hidden = changed(run.residual(2).float())
        full = logits_with_hook(blocks, 2, hidden.bfloat16(), ids, None)
        assert torch.equal(run.resume(2, hidden), full)
        reports = check_resume(run, {2: run.residual(2).float()})
        assert reports[2].resume_error == reports[2].cache_error == 0.0


def test_streams_of_another_shape_and_unknown_layers_are_refused() -> None:
    blocks = blocks_of(models.build_model("gpt2"), models.VOCAB)
    with torch.inference_mode():
        run = ResumableRun(blocks, random_ids(10))
        hidden = run.residual(1)
        with pytest.raises(UsageError, match=r"expected a residual stream \(2, 24, 32\)"):
            run.resume(1, hidden[:, :-1])
        for layer in (-1, 4):
            with pytest.raises(UsageError, match=f"0 to 3, there is no layer {layer}"):
                run.resume(layer, hidden)
            with pytest.raises(UsageError, match="there is no layer"):
                run.residual(layer)


# The check


@pytest.mark.parametrize("kind", ["llama", "falcon", "gemma3_text"])
def test_the_check_of_a_right_model_finds_no_difference(kind: str) -> None:
    blocks = blocks_of(build_architecture(kind))
    ids = random_ids(11)
    with torch.inference_mode():
        run = ResumableRun(blocks, ids, padding_mask(ids))
        rows = {layer: run.residual(layer) for layer in range(blocks.depth + 1)}
        for report in check_resume(run, rows).values():
            assert report.resume_error == report.cache_error == 0.0


def test_the_check_refuses_blocks_that_read_what_lower_blocks_left_behind() -> None:
    class Remembering(toys.Toy):
        """The second block adds what the first block has put aside, outside its output."""

        def blocks_of(self, hidden: torch.Tensor) -> torch.Tensor:
            aside: list[torch.Tensor] = []
            inner: Any = self.blocks[0].inner
            handle = inner.register_forward_hook(lambda _, __, output: aside.append(output))
            try:
                hidden = self.blocks[0](hidden)
            finally:
                handle.remove()
            return self.blocks[1](hidden + sum(aside))

    class Inner(toys.Block):
        def __init__(self) -> None:
            super().__init__(16, 16)
            self.inner = torch.nn.Linear(16, 16)
            self.requires_grad_(False)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + self.inner(input)

    toy = Remembering()
    toy.blocks[0] = Inner()
    axes = blocks_of(toys.Toy(), models.VOCAB).axes
    blocks = DecoderBlocks(toy, "blocks", list(toy.blocks), axes, (0,))
    with torch.inference_mode():
        run = ResumableRun(blocks, random_ids(12))
        with pytest.raises(ModelError, match=r"layer 1: .* differ from those of a full run by"):
            check_resume(run, {1: run.residual(1)})
        check_resume(run, {2: run.residual(2)})


@pytest.mark.filterwarnings("ignore")
def test_the_check_refuses_blocks_that_need_keys_of_lower_blocks() -> None:
    if "gemma3n_text" not in architectures.KINDS:
        pytest.skip("this transformers has no gemma3n_text")
    blocks = blocks_of(build_architecture("gemma3n_text"))
    with torch.inference_mode():
        run = ResumableRun(blocks, random_ids(12))
        with pytest.raises(ModelError, match="cannot be resumed from layer 1: the blocks above"):
            check_resume(run, {1: run.residual(1)})


def test_the_check_refuses_rows_of_another_model() -> None:
    blocks, others = (
        blocks_of(models.build_model("llama", seed=seed), models.VOCAB) for seed in (0, 1)
    )
    ids = random_ids(13)
    with torch.inference_mode():
        run, other = ResumableRun(blocks, ids), ResumableRun(others, ids)
        for layer in (0, 2, 3):
            with pytest.raises(MismatchError, match="give the model that the cache was extracted"):
                check_resume(run, {layer: other.residual(layer)}, {layer: "float16"})
        rows = {2: run.residual(2).half()}
        error = check_resume(run, rows, {2: "float16"})[2].cache_error
        assert 0 < error < 3e-2
