"""Convolutions without bias and their batch norm, which inference folds into one convolution."""

import torch
from torch import Tensor, nn

from regard.layers.grid import BatchNorm2d, Conv2d


class ConvBN(nn.Module):
    """A convolution and a batch norm of (B, H, W, C); 1×1 at stride 1 it is a linear layer.

    Args:
        dim_in, dim_out: channels.
        kernel_size, stride, groups, dilation: of the convolution; padding keeps the size at stride 1.
        weight_init: of the norm's weight; 0 starts a residual branch as the identity.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        weight_init: float = 1.0,
    ):
        super().__init__()
        around = {"padding": dilation * (kernel_size // 2), "dilation": dilation, "groups": groups, "bias": False}
        self.conv = (
            nn.Linear(dim_in, dim_out, bias=False)
            if kernel_size == stride == groups == 1
            else Conv2d(dim_in, dim_out, kernel_size, stride, **around)
        )
        self.bn = BatchNorm2d(dim_out)
        nn.init.constant_(self.bn.weight, weight_init)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    @torch.no_grad()
    def fused(self) -> nn.Module:
        """One layer with a bias, equal to this one in evaluation."""
        weight, bias = fold_bn(self.conv.weight, self.bn)
        fused: nn.Linear | Conv2d
        if isinstance(self.conv, nn.Linear):
            fused = nn.Linear(self.conv.in_features, self.conv.out_features, device=weight.device, dtype=weight.dtype)
        else:
            own = self.conv
            around = {"padding": own.padding, "dilation": own.dilation, "groups": own.groups}
            fused = Conv2d(own.in_channels, own.out_channels, own.kernel_size[0], own.stride[0], **around).to(weight)
        fused.weight.copy_(weight)
        assert fused.bias is not None
        fused.bias.copy_(bias)
        return fused


def fold_bn(weight: Tensor, bn: nn.modules.batchnorm._BatchNorm, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weight (C, ...) and bias (C,) of a layer with the batch norm after it: ``w γ/σ`` and ``β + (b - μ) γ/σ``."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    shift = -bn.running_mean if bias is None else bias - bn.running_mean
    return weight * scale.view(-1, *(1,) * (weight.dim() - 1)), bn.bias + shift * scale
