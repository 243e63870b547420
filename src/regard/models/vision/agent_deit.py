"""Agent-DeiT (arXiv:2312.08874): a vision transformer whose blocks, or the first of them, have agent attention."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import MLP, load_strictly
from regard.layers.grid import Conv2d, DropPath, drop_path_rates
from regard.mechanisms.linear.agent import AgentAttention, own_names
from regard.mechanisms.softmax import SoftmaxAttention
from regard.models.vision.backbone import Backbone


class AgentBlock(nn.Module):
    """``x + attn(LN x)``, then ``x + MLP(LN x)``, on whatever attn takes."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float, norm_eps: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, norm_eps), nn.LayerNorm(dim, norm_eps)
        self.attn, self.mlp, self.drop_path = attn, MLP(dim, int(dim * mlp_ratio)), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def init_linear(model: nn.Module) -> None:
    """Truncated normals of 0.02 for all linear layers, and no biases, as vision transformers are published."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class AgentDeiT(Backbone):
    """Images (B, in_chans, S, S) of one size S to logits (B, num_classes), which a class token gives.

    The features are the tokens of the patches, one map of stride ``patch_size``.

    Args:
        num_classes: outputs; 0 for the class token's features.
        in_chans: channels of the image.
        img_size: S; positions and the biases of agents belong to it.
        patch_size: side of a patch.
        dim, depth, num_heads: C, the number of blocks and their heads.
        num_agents: of all blocks, or one for each that has them; square numbers.
        agent_blocks: how many of the blocks, the first, have agent attention; the others have softmax. None: all.
        mlp_ratio: width of the MLPs.
        qkv_bias: of the attentions.
        drop_path_rate: of the last block; rises linearly from 0.
        norm_eps: of all norms.
        features_only: give the feature map, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "agent-deit-tiny": {"dim": 192, "num_heads": 3},
        "agent-deit-small": {"dim": 384, "num_heads": 6, "drop_path_rate": 0.1},
        "agent-deit-base": {
            "dim": 768,
            "num_heads": 12,
            "num_agents": 81,
            "agent_blocks": 4,
            "drop_path_rate": 0.3,
        },
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int = 224,
        patch_size: int = 16,
        dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        num_agents: int | Sequence[int] = 49,
        agent_blocks: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        features_only: bool = False,
    ):
        if patch_size < 1 or img_size < patch_size or img_size % patch_size:
            raise ArgumentError(f"img_size: expected a multiple of patch_size {patch_size}, got {img_size}")
        count = depth if agent_blocks is None else agent_blocks
        if not 0 <= count <= depth:
            raise ArgumentError(f"agent_blocks: expected 0 to {depth}, got {count}")
        agents = [num_agents] * count if isinstance(num_agents, int) else list(num_agents)
        if len(agents) != count:
            raise ArgumentError(f"num_agents: expected one for each of {count} blocks, got {len(agents)}")
        if count < depth and not qkv_bias:
            raise Unsupported("qkv_bias: blocks with softmax always have it, got False")
        super().__init__()
        self.num_classes, self.in_chans, self.features_only = num_classes, in_chans, features_only
        self.num_features, self.channels, self.strides = dim, (dim,), (patch_size,)
        self.img_size, side = img_size, img_size // patch_size
        self.stem = Conv2d(in_chans, dim, patch_size, patch_size, padding=0)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + side * side, dim), std=0.02))
        blocks = []
        for i, rate in enumerate(drop_path_rates(drop_path_rate, (depth,))[0]):
            attn = (
                AgentAttention(dim, num_heads, agents[i], (side, side), class_token=True, bias=qkv_bias)
                if i < count
                else SoftmaxAttention(dim, num_heads, bias=True, causal=False)
            )
            blocks.append(AgentBlock(dim, attn, mlp_ratio, rate, norm_eps))
        self.stages = nn.ModuleList([nn.Sequential(*blocks)])
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        init_linear(self)

    def tokens(self, images: Tensor) -> Tensor:
        """The class token and those of the patches after all blocks, (B, 1 + N, C).

        Raises:
            ShapeError: images of another size.
        """
        if images.dim() != 4 or images.shape[1:] != (self.in_chans, self.img_size, self.img_size):
            size = f"{self.in_chans}, {self.img_size}, {self.img_size}"
            raise ShapeError(f"images: expected (B, {size}), got {tuple(images.shape)}")
        patches = self.stem(images.movedim(1, -1)).flatten(1, 2)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1)
        return self.stages[0](x + self.pos_embed)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        side = self.img_size // self.strides[0]
        return [self.tokens(images)[:, 1:].unflatten(1, (side, side))]

    def forward_head(self, x: Tensor) -> Tensor:
        """`tokens` to logits; only the first counts."""
        return self.head(self.norm(x[:, 0]))

    def forward(self, images: Tensor) -> Any:
        return super().forward(images) if self.features_only else self.forward_head(self.tokens(images))

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        representation_size: int | None = None,
        distilled: bool = False,
        drop_path_rate: float = 0.0,
        agent_num: Sequence[int | str] = (49, 49, 49, 49),
        agent_layer: int = -1,
        norm_eps: float = 1e-6,
        **_: Any,
    ) -> "AgentDeiT":
        """Weights and arguments of the published ``VisionTransformer``.

        Its four numbers of agents are for the first two blocks, the next two, the next six and the last two of twelve.
        """
        if distilled or representation_size is not None:
            raise Unsupported("distilled, representation_size: not with agents, expected False and None")
        count = agent_layer if agent_layer > 0 else depth
        if count > 12:
            raise ArgumentError(f"depth: expected at most 12 blocks with agents, got {count}")
        quarters = (0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3)
        model = cls(
            num_classes,
            in_chans,
            img_size,
            patch_size,
            embed_dim,
            depth,
            num_heads,
            [int(agent_num[quarters[i]]) for i in range(min(count, depth))],
            min(count, depth),
            mlp_ratio,
            qkv_bias,
            drop_path_rate,
            norm_eps,
        )
        state, rename = dict(state_dict), {"patch_embed.proj": "stem"}
        for i in range(depth):
            old, new = f"blocks.{i}", f"stages.0.{i}"
            rename |= {old: new} | own_names(state, f"{old}.attn.", f"{new}.attn.")
        load_strictly(model, state, rename)
        return model
