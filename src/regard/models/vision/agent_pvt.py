"""Agent-PVT (arXiv:2312.08874): a pyramid of four stages of agent attention over the whole image."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly
from regard.layers.grid import Conv2d, drop_path_rates
from regard.mechanisms.grid.agent import GridAgentAttention
from regard.mechanisms.grid.strip import StripAttention
from regard.mechanisms.linear.agent import own_names
from regard.models.vision.agent_deit import AgentBlock, init_linear
from regard.models.vision.backbone import Backbone, check_stages


class AgentPVT(Backbone):
    """Images (B, in_chans, S, S) of one size S to logits (B, num_classes).

    Patches of 4 × 4 pixels, then of 2 × 2 tokens before each further stage, with an embedding per position. Stages
    without agents have PVT's attention to a smaller image, from a strided convolution.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        img_size: S; positions and the biases of agents belong to it.
        patch_size: side of the first patches.
        embed_dims, num_heads, mlp_ratios, depths: of each stage.
        num_agents: of each stage, square numbers; 0 for a stage without.
        sr_ratios: of each stage, by how much the image is smaller from which keys and values are taken.
        qkv_bias: of the attentions.
        drop_path_rate: of the last block; rises linearly from 0.
        norm_eps: of the blocks' norms.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "agent-pvt-tiny": {"drop_path_rate": 0.1},
        "agent-pvt-small": {"depths": (3, 4, 6, 3), "drop_path_rate": 0.1},
        "agent-pvt-medium": {"depths": (3, 4, 18, 3), "drop_path_rate": 0.3},
        "agent-pvt-large": {"depths": (3, 8, 27, 3), "drop_path_rate": 0.3},
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int = 224,
        patch_size: int = 4,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_agents: Sequence[int] = (9, 16, 49, 49),
        sr_ratios: Sequence[int] = (1, 1, 1, 1),
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        features_only: bool = False,
    ):
        super().__init__()
        stages = len(embed_dims)
        check_stages(
            stages,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            depths=depths,
            num_agents=num_agents,
            sr_ratios=sr_ratios,
        )
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, embed_dims[-1]
        self.channels, self.strides = tuple(embed_dims), tuple(patch_size * 2**i for i in range(stages))
        self.img_size, self.features_only = img_size, features_only
        if patch_size < 1 or img_size < self.strides[-1]:
            raise ArgumentError(f"img_size: expected at least {self.strides[-1]}, a last token, got {img_size}")
        self.embeds, self.stages, self.positions = nn.ModuleList(), nn.ModuleList(), nn.ParameterList()
        rates = drop_path_rates(drop_path_rate, depths)
        for i, dim in enumerate(embed_dims):
            side, patch, before = img_size // self.strides[i], (2 if i else patch_size), (embed_dims[i - 1] if i else 0)
            conv = Conv2d(before or in_chans, dim, patch, patch, padding=0)
            self.embeds.append(nn.Sequential(conv, nn.LayerNorm(dim)))
            self.positions.append(nn.Parameter(nn.init.trunc_normal_(torch.empty(1, side * side, dim), std=0.02)))
            blocks = []
            for rate in rates[i]:
                attn: nn.Module
                if num_agents[i]:
                    attn = GridAgentAttention(dim, num_heads[i], side, num_agents[i], sr_ratios[i], qkv_bias)
                else:
                    attn = StripAttention(dim, num_heads[i], sr_ratios[i], dim // num_heads[i], qkv_bias)
                blocks.append(AgentBlock(dim, attn, mlp_ratios[i], rate, norm_eps))
            self.stages.append(nn.Sequential(*blocks))
        self.head = nn.Linear(embed_dims[-1], num_classes) if num_classes else nn.Identity()
        init_linear(self)

    def prepare(self, x: Tensor) -> Tensor:
        if x.shape[1:3] != (self.img_size, self.img_size):
            raise ShapeError(f"images: expected sides of {self.img_size}, got {x.shape[1]} x {x.shape[2]}")
        return x

    def forward_features(self, images: Tensor) -> list[Tensor]:
        x, features = self.prepare(images.movedim(1, -1)), []
        for embed, position, stage in zip(self.embeds, self.positions, self.stages, strict=True):
            x = embed(x)
            x = stage(x + position.view(1, *x.shape[1:]))
            features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x.mean((1, 2)))

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        qkv_bias: bool = False,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (3, 4, 6, 3),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        agent_sr_ratios: str = "1111",
        num_stages: int = 4,
        agent_num: Sequence[int | str] = (9, 16, 49, 49),
        attn_type: str | None = "AAAA",
        norm_eps: float = 1e-5,
        **_: Any,
    ) -> "AgentPVT":
        """Weights and arguments of the published ``PyramidVisionTransformer``.

        Its stages "A" have agents and ``agent_sr_ratios``, those "B" have not; its named sizes have ``norm_eps=1e-6``.
        """
        types = (attn_type or "AAAA")[:num_stages]
        if set(types) - {"A", "B"}:
            raise ArgumentError(f"attn_type: expected A or B for each stage, got {attn_type!r}")
        agents = [kind == "A" for kind in types]
        model = cls(
            num_classes,
            in_chans,
            img_size,
            patch_size,
            embed_dims[:num_stages],
            num_heads[:num_stages],
            mlp_ratios[:num_stages],
            depths[:num_stages],
            [int(n) if on else 0 for n, on in zip(agent_num, agents, strict=False)],
            [int(a) if on else b for a, b, on in zip(agent_sr_ratios, sr_ratios, agents, strict=False)],
            qkv_bias,
            drop_path_rate,
            norm_eps,
        )
        state = dict(state_dict)
        rename: dict[str, str] = {}
        for i in range(num_stages):
            rename |= {f"patch_embed{i + 1}.proj": f"embeds.{i}.0", f"patch_embed{i + 1}.norm": f"embeds.{i}.1"}
            rename |= {f"pos_embed{i + 1}": f"positions.{i}"}
            for j in range(depths[i]):
                old, new = f"block{i + 1}.{j}", f"stages.{i}.{j}"
                inner = f"{new}.attn.agent" if agents[i] else f"{new}.attn"
                rename |= {old: new, f"{old}.attn": inner} | own_names(state, f"{old}.attn.", f"{inner}.")
                if not agents[i]:
                    rename |= {f"{old}.attn.sr": f"{inner}.reduce.0", f"{old}.attn.norm": f"{inner}.reduce.2"}
        load_strictly(model, state, rename)
        return model
