"""Normalisation in half precision, under autocast too.

On a GPU PyTorch's autocast computes norms in float32 and leaves their output, and what is computed from it up to the
next convolution, in float32: twice the memory. PyTorch's half-precision kernels sum in float32 anyway.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm that leaves half precision as it is."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that leaves half precision as it is."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
