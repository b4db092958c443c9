"""An embedding with its SVD adapters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .expand import svd_expand
from .functional import param_dtype
from .layers import Refusal, SVDLayer, of_base_layer


class SVDEmbedding(SVDLayer):
    """A frozen embedding and its adapters: `base_layer(ids) + scaling * A^T[ids] diag(E) B^T`.

    A is [r, num_embeddings], B [embedding_dim, r]. With `padding_idx`, that column of A begins as zero and gets no
    gradient, so that the padding's vector stays the base layer's. An element of the adapter's input is a token:
    `lora_dropout` leaves a token's whole product out.

    Args:
        base_layer: a `torch.nn.Embedding` without `max_norm`, `scale_grad_by_freq` and `sparse`.

    """

    base_types = (nn.Embedding,)
    fan_in_fan_out = True
    # Models look at them.
    num_embeddings, embedding_dim, padding_idx = map(of_base_layer, ("num_embeddings", "embedding_dim", "padding_idx"))

    @classmethod
    def refusal(cls, base_layer: nn.Module) -> Refusal | None:
        """Why a layer cannot be adapted; None: it can."""
        refusal = super().refusal(base_layer)
        if refusal is not None:
            return refusal
        if type(base_layer).forward is not nn.Embedding.forward:
            return Refusal("a layer that computes what torch.nn.Embedding does", "has its own forward")
        for name in ("max_norm", "scale_grad_by_freq", "sparse"):
            found = getattr(base_layer, name)
            if found:
                return Refusal(f"an embedding without {name}", f"has {name}={found}")
        return None

    @classmethod
    def _features(cls, base_layer: nn.Module) -> tuple[int, int]:
        return tuple(base_layer.weight.shape)

    def add_adapter(self, adapter_name: str, **options: Any) -> None:
        """Add an adapter's parameters: see `SVDLayer.add_adapter`."""
        super().add_adapter(adapter_name, **options)
        if self.base_layer.padding_idx is not None:
            with torch.no_grad():
                self.lora_A[adapter_name][:, self.base_layer.padding_idx] = 0

    def _add(self, adapter_name: str, x: Tensor, y: Tensor, lora_dropout: float, in_place: bool) -> Tensor:
        A, E, B = self.triplets(adapter_name)
        h = F.embedding(x, A.to(param_dtype(y.dtype, A.dtype)).T, self.base_layer.padding_idx)
        if lora_dropout:
            h = h * F.dropout(h.new_ones(*x.shape, 1), lora_dropout)
        return svd_expand(y, h, E, B, self.scaling(adapter_name), in_place=in_place)
