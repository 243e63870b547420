"""Large depthwise convolutions that are trained together with small dilated ones (UniRepLKNet)."""

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError
from regard.layers.conv_bn import ConvBN, fold_bn
from regard.layers.grid import Conv2d, DepthwiseConv2d

#: kernel sizes and dilations beside a kernel of each size
BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class LargeKernelConv(nn.Module):
    """``BN(conv(x)) + Σ BN(dilated conv(x))``, all depthwise (arXiv:2311.15599); (B, H, W, C) to the same.

    None of the others reaches beyond the large kernel, so `merge` makes one convolution of them all.

    Args:
        dim: C.
        kernel_size: of the large kernel, odd, 5 to 19.
        merged: begin as one convolution.
    """

    def __init__(self, dim: int, kernel_size: int, merged: bool = False):
        super().__init__()
        if kernel_size not in BRANCHES:
            raise ArgumentError(f"kernel_size: expected one of {', '.join(map(str, BRANCHES))}, got {kernel_size}")
        self.large: nn.Module = (
            DepthwiseConv2d(dim, kernel_size) if merged else ConvBN(dim, dim, kernel_size, groups=dim)
        )
        branches = () if merged else BRANCHES[kernel_size]
        self.branches = nn.ModuleDict(
            {
                f"k{size}_{dilation}": ConvBN(dim, dim, size, groups=dim, dilation=dilation)
                for size, dilation in branches
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x)
        for branch in self.branches.values():
            y = y + branch(x)
        return y

    @torch.no_grad()
    def merge(self) -> None:
        """Become one convolution, equal in evaluation."""
        if not isinstance(self.large, ConvBN):
            return
        merged = self.large.fused()
        assert isinstance(merged, Conv2d)
        for branch in self.branches.values():
            assert isinstance(branch, ConvBN)
            assert isinstance(branch.conv, Conv2d)
            weight, bias = fold_bn(branch.conv.weight, branch.bn)
            step = branch.conv.dilation[0]
            reach = step * (branch.conv.kernel_size[0] // 2)
            middle = merged.kernel_size[0] // 2
            taps = slice(middle - reach, middle + reach + 1, step)
            merged.weight[:, :, taps, taps] += weight
            assert merged.bias is not None
            merged.bias += bias
        self.large, self.branches = merged, nn.ModuleDict()


def published_names(old: str, new: str, kernel_size: int, merged: bool = False) -> dict[str, str]:
    """Prefixes of the weights of a published ``DilatedReparamBlock``, and ours."""
    if merged:
        return {f"{old}.lk_origin": f"{new}.large"}
    names = {f"{old}.lk_origin.weight": f"{new}.large.conv.weight", f"{old}.origin_bn": f"{new}.large.bn"}
    for size, dilation in BRANCHES.get(kernel_size, ()):
        own = f"{new}.branches.k{size}_{dilation}"
        names |= {f"{old}.dil_conv_k{size}_{dilation}": f"{own}.conv", f"{old}.dil_bn_k{size}_{dilation}": f"{own}.bn"}
    return names
