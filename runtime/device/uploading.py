"""A model on a device whose batches are described on the host."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from morphserve.runtime.kernels import BatchMeta
from morphserve.runtime.model import Model


@dataclass(frozen=True, slots=True)
class Uploading(Model):
    """Copies each batch's tensors to where the weights are, waiting for it."""

    @classmethod
    def of(cls, model: Model) -> "Uploading":
        return cls(*(getattr(model, field.name) for field in fields(model)))

    def forward(self, tokens: Tensor, meta: BatchMeta, rows: Tensor) -> Tensor:
        """Logits on the device."""
        there: torch.device = self.cos_sin.device
        parts = (getattr(meta, field.name).to(there) for field in fields(meta))
        return Model.forward(self, tokens.to(there), BatchMeta(*parts), rows.to(there))
