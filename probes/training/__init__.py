"""Shared by stochastic fits: minibatches, softmax losses, threads, checkpoints."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .checkpoint import Checkpoint as Checkpoint
    from .minibatches import BUFFER_BYTES as BUFFER_BYTES
    from .minibatches import Minibatch as Minibatch
    from .minibatches import MinibatchStream as MinibatchStream
    from .minibatches import copy_minibatch as copy_minibatch
    from .scratch_file import ScratchFile as ScratchFile
    from .shuffled_batches import ShuffledBatches as ShuffledBatches
    from .softmax_loss import PRODUCTS as PRODUCTS
    from .softmax_loss import Gradients as Gradients
    from .softmax_loss import ModelDistribution as ModelDistribution
    from .softmax_loss import ParameterTensors as ParameterTensors
    from .softmax_loss import Target as Target
    from .softmax_loss import add_head_gradients as add_head_gradients
    from .softmax_loss import affine_losses as affine_losses
    from .softmax_loss import fast_products as fast_products
    from .softmax_loss import head_losses as head_losses
    from .softmax_loss import row_tiles as row_tiles
    from .softmax_loss import softmax_in_place as softmax_in_place
    from .threads import ThreadCrew as ThreadCrew
    from .threads import thread_pool as thread_pool
    from .top_tokens import find_top_tokens as find_top_tokens
    from .top_tokens import tokens_at as tokens_at
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
