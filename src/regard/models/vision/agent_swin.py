"""Agent-Swin (arXiv:2312.08874): Swin whose early stages have agent attention in windows as large as the image."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import load_strictly
from regard.layers.grid import Conv2d, drop_path_rates
from regard.mechanisms.grid.agent import GridAgentAttention
from regard.mechanisms.grid.shifted import ShiftedWindowAttention
from regard.mechanisms.linear.agent import own_names
from regard.models.vision.agent_deit import AgentBlock, init_linear
from regard.models.vision.backbone import Backbone, check_stages
from regard.models.vision.dinat import PatchMerging


class AgentSwin(Backbone):
    """Images (B, in_chans, S, S) of one size S to logits (B, num_classes).

    Of each stage the first blocks have agent attention, the others window attention, every second block of both with
    windows shifted by half. Windows of a stage that is no larger than them are the whole stage, without shift.

    Args:
        num_classes: outputs; 0 for the pooled features.
        in_chans: channels of the image.
        img_size: S, divisible by what patches and stages take together.
        patch_size: side of the patches.
        embed_dim: C of the first stage; doubles from stage to stage.
        depths, num_heads: of each stage.
        num_agents: of each stage, square numbers.
        agent_blocks: how many blocks of each stage have agents.
        window_size: side of the windows with agents; without agents an eighth of it, 7 or more.
        mlp_ratio: width of the MLPs.
        qkv_bias: of the attentions.
        drop_path_rate: of the last block; rises linearly from 0.
        features_only: give the stages' feature maps, see `Backbone`.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "agent-swin-tiny": {"drop_path_rate": 0.2},
        "agent-swin-small": {"depths": (2, 2, 18, 2), "agent_blocks": (2, 2, 0, 0), "drop_path_rate": 0.3},
        "agent-swin-base": {
            "embed_dim": 128,
            "depths": (2, 2, 18, 2),
            "num_heads": (4, 8, 16, 32),
            "agent_blocks": (2, 2, 2, 0),
            "drop_path_rate": 0.5,
        },
    }

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int = 224,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        num_agents: Sequence[int] = (9, 16, 49, 49),
        agent_blocks: Sequence[int] = (2, 2, 6, 0),
        window_size: int = 56,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.1,
        features_only: bool = False,
    ):
        super().__init__()
        stages = len(depths)
        check_stages(stages, num_heads=num_heads, num_agents=num_agents, agent_blocks=agent_blocks)
        self.strides = tuple(patch_size * 2**i for i in range(stages))
        if patch_size < 1 or img_size < 1 or img_size % self.strides[-1]:
            raise ArgumentError(f"img_size: expected a multiple of {self.strides[-1]}, got {img_size}")
        self.channels = tuple(embed_dim * 2**i for i in range(stages))
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, self.channels[-1]
        self.img_size, self.features_only = img_size, features_only
        self.stem = nn.Sequential(
            Conv2d(in_chans, embed_dim, patch_size, patch_size, padding=0), nn.LayerNorm(embed_dim)
        )
        rates = drop_path_rates(drop_path_rate, depths)
        self.downsamples.extend(PatchMerging(dim) for dim in self.channels[:-1])
        self.stages = nn.ModuleList()
        for i, dim in enumerate(self.channels):
            blocks, side = [], img_size // self.strides[i]
            attn: nn.Module
            for j, rate in enumerate(rates[i]):
                agents = j < agent_blocks[i]
                window = window_size if agents else max(7, window_size // 8)
                shift, window = (0, side) if side <= window else (window // 2 * (j % 2), window)
                if side % window:
                    raise ArgumentError(
                        f"window_size: windows of {window} do not divide the {side} tokens of stage {i}"
                    )
                if agents:
                    attn = GridAgentAttention(dim, num_heads[i], window, num_agents[i], qkv_bias=qkv_bias, shift=shift)
                else:
                    attn = ShiftedWindowAttention(dim, num_heads[i], window, shift, qkv_bias)
                blocks.append(AgentBlock(dim, attn, mlp_ratio, rate, 1e-5))
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        init_linear(self)

    def prepare(self, x: Tensor) -> Tensor:
        if x.shape[1:3] != (self.img_size, self.img_size):
            raise ShapeError(f"images: expected sides of {self.img_size}, got {x.shape[1]} x {x.shape[2]}")
        return x

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean((1, 2)))

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        img_size: int = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_path_rate: float = 0.1,
        ape: bool = False,
        patch_norm: bool = True,
        agent_num: Sequence[int | str] = (9, 16, 49, 49),
        attn_type: str = "BBBB",
        **_: Any,
    ) -> "AgentSwin":
        """Weights and arguments of the published ``AgentSwinTransformer``.

        A stage of ``attn_type`` "A" has agents, "B" has not, and of "M" the first blocks have; how many is said after
        the stages, as in "AAMB2".
        """
        if ape or not patch_norm or qk_scale is not None:
            raise Unsupported("ape, patch_norm, qk_scale: expected the published models' False, True and None")
        stages = len(depths)
        kinds, mixed = attn_type[:stages], attn_type[stages:]
        if len(kinds) < stages or set(kinds) - set("ABM") or ("M" in kinds and not mixed.isdigit()):
            raise ArgumentError(f"attn_type: expected A, B or M per stage and how many M have, got {attn_type!r}")
        counts = [{"A": n, "B": 0, "M": min(n, int(mixed or 0))}[kind] for kind, n in zip(kinds, depths, strict=True)]
        model = cls(
            num_classes,
            in_chans,
            img_size,
            patch_size,
            embed_dim,
            depths,
            num_heads,
            [int(n) for n in agent_num],
            counts,
            window_size,
            mlp_ratio,
            qkv_bias,
            drop_path_rate,
        )
        computed = ("relative_position_index", "attn_mask")
        state = {name: t for name, t in state_dict.items() if not name.endswith(computed)}
        rename = {"patch_embed.proj": "stem.0", "patch_embed.norm": "stem.1"}
        for i in range(stages):
            rename |= {f"layers.{i}.downsample": f"downsamples.{i}"}
            for j in range(depths[i]):
                old, new = f"layers.{i}.blocks.{j}", f"stages.{i}.{j}"
                rename |= {old: new}
                if j < counts[i]:
                    inner = f"{new}.attn.agent"
                    rename |= {f"{old}.attn": inner} | own_names(state, f"{old}.attn.", f"{inner}.")
                else:
                    rename |= {f"{old}.attn.relative_position_bias_table": f"{new}.attn.rel_pos.table"}
        load_strictly(model, state, rename)
        return model
