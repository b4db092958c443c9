"""AdaLoRA for PyTorch: adapters on any model, the rank allocator beside any optimiser or in one pass with AdamW.

>>> config = AdaLoraConfig(init_r=12, target_r=4, tinit=100, tfinal=300, total_step=1000, target_modules="all-linear")
>>> adapt(model, config)
>>> allocator = RankAllocator(model)
>>> optimizer = AdamW((p for p in model.parameters() if p.requires_grad), allocator, lr=1e-3)
>>> for batch in batches:
...     model(**batch).loss.backward()
...     allocator.orthogonality()
...     optimizer.step()
...     optimizer.zero_grad()
"""

from . import operators  # noqa: F401
from .allocator import RankAllocator
from .checkpoint import export_lora, load_adapter, load_training_state, save_adapter, save_training_state
from .config import AdaLoraConfig
from .convolution import SVDConv1d, SVDConv2d, svd_conv
from .embedding import SVDEmbedding
from .functional import Part, svd_linear
from .layers import SharedInput, SVDLayer, SVDLinear
from .model import (
    adapt,
    delete_adapter,
    disable_adapters,
    get_config,
    merge,
    merge_and_unload,
    named_adapters,
    set_adapter,
    share_input,
    unload,
    unmerge,
)
from .optim import AdamW
from .report import RankReport

__all__ = [
    "AdaLoraConfig",
    "AdamW",
    "Part",
    "RankAllocator",
    "RankReport",
    "SVDConv1d",
    "SVDConv2d",
    "SVDEmbedding",
    "SVDLayer",
    "SVDLinear",
    "SharedInput",
    "adapt",
    "delete_adapter",
    "disable_adapters",
    "export_lora",
    "get_config",
    "load_adapter",
    "load_training_state",
    "merge",
    "merge_and_unload",
    "named_adapters",
    "save_adapter",
    "save_training_state",
    "set_adapter",
    "share_input",
    "svd_conv",
    "svd_linear",
    "unload",
    "unmerge",
]
