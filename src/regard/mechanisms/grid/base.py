"""`GridMechanism`, what every mixer of the positions of an image promises."""

from typing import Any, ClassVar

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn


class GridMechanism(nn.Module, PyTorchModelHubMixin):
    """Mixes positions of a grid: (B, H, W, C) to (B, H, W, C), or to another size and width where a class says so.

    Attributes:
        cost: of `forward`, in terms of N = H W, C and its own arguments.
        example: what the example of the documentation page needs beside ``dim`` and ``num_heads``.
        example_grid: the H and W of that example.
    """

    cost: ClassVar[str]
    example: ClassVar[dict[str, Any]] = {}
    example_grid: ClassVar[tuple[int, int]] = (14, 14)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the positions of x (B, H, W, C).

        Raises:
            ShapeError: not such a grid, or a size that this mixer cannot take.
        """
        raise NotImplementedError
