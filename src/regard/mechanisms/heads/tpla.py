"""Tensor-parallel latent attention (TPLA): MLA with its latents cut into shards, one softmax per shard."""

from copy import deepcopy
from typing import Any, ClassVar, Literal, Self

import torch
from einops import rearrange
from torch import Tensor

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.masks import Mask
from regard.mechanisms.base import KV, seen, visible
from regard.mechanisms.heads.latent import MultiHeadLatentAttention, Rotary, attend_to_latents


class TensorParallelLatentAttention(MultiHeadLatentAttention):
    """TPLA (arXiv:2508.15881): shard i of g sees r / g of the latent's channels, with all heads.

        c_i = (x W_dkv U)_i        ĉ_i = c_i / √(α_i |c_i|² / r + ε)
        o_i = softmax(scale (μ_i Q_i · ĉ_i + q_pe · k_pe)) ĉ_i        Q = q_nope W_ukᵀ U
        y = Σ_i Σ_h o_i,h (Uᵀ W_uv)_i,h Wo_h

    A shard's rms and logits stand for the whole: α_i |c_i|² ≈ |c|², μ_i Q_i · ĉ_i ≈ Q · ĉ. A device needs only its
    shard, so it caches and loads r / g + d_r numbers per token, and the outputs are summed over the devices once
    (`shard`). Here all shards run in one call, as groups of heads. Approximates MLA for g > 1 (g = 1 is MLA), and well
    only where the latents are compressible, as trained ones are.

    x (B, N, C) to (B, N, C). Cost O(N² H (r + g d_r)). Build it from an MLA layer with `from_mla`; the arguments
    are those of `MultiHeadLatentAttention`, and

    Args:
        shards: g, dividing ``kv_lora_rank``.
        prefill: "mla" makes `forward` and the first call of `stream` exact MLA, as where prefill and decoding run on
            different machines; only later calls are sharded, so `stream` no longer equals `forward`. "tpla" shards
            every token.
    """

    cost: ClassVar[str] = "O(N² H (r + g d_r))"

    shard_norm: Tensor
    shard_logit: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        q_lora_rank: int | None = None,
        kv_lora_rank: int | None = None,
        qk_nope_head_dim: int | None = None,
        qk_rope_head_dim: int | None = None,
        v_head_dim: int | None = None,
        bias: bool = False,
        rope_theta: float | Literal["given"] | None = 10_000.0,
        scale: float | None = None,
        norm_eps: float = 1e-6,
        absorbed: bool = True,
        causal: bool = True,
        shards: int = 2,
        prefill: Literal["tpla", "mla"] = "tpla",
    ):
        super().__init__(
            dim,
            num_heads,
            q_lora_rank,
            kv_lora_rank,
            qk_nope_head_dim,
            qk_rope_head_dim,
            v_head_dim,
            bias,
            rope_theta,
            scale,
            norm_eps,
            absorbed,
            causal,
        )
        if shards < 1 or self.kv_lora_rank % shards:
            raise ArgumentError(f"shards: {shards} shards do not divide kv_lora_rank {self.kv_lora_rank}")
        if prefill not in ("tpla", "mla"):
            raise ArgumentError(f"prefill: expected tpla or mla, got {prefill!r}")
        if not absorbed:
            raise ArgumentError("absorbed: a shard of the latents can only be attended to in absorbed form")
        self.shards, self.prefill = shards, prefill
        self.latent_norm = torch.nn.RMSNorm(self.kv_lora_rank, eps=norm_eps, elementwise_affine=False)  # γ is in W_u
        self.register_buffer("shard_norm", torch.ones(shards))  # α / g, so that it multiplies a mean over the shard
        self.register_buffer("shard_logit", torch.full((shards,), float(shards)))  # μ

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        if self.prefill == "mla":
            return super().forward(x, context, valid=valid, rotary=rotary)
        self._check(x, context, valid, dim=self.dim)
        self._check_rotary(x, context, rotary)
        source = x if context is None else context
        state = KV(self._rope_key(source, 0, rotary), self._sharded(source), valid)
        return self._absorbed(*self._query(x, 0, rotary), state, visible(x.shape[1], self.causal, valid))

    def stream(
        self, x: Tensor, state: KV | None = None, *, valid: Tensor | None = None, rotary: Rotary | None = None
    ) -> tuple[Tensor, KV]:
        """As `Mechanism.stream`; the state's ``value`` are the shards of the latents (B, g, M, r / g)."""
        if self.prefill == "mla" and state is None:
            y, state = super().stream(x, valid=valid, rotary=rotary)
            return y, KV(state.key, self._cut(state.value.squeeze(1)), state.valid)
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        self._check_rotary(x, None, rotary)
        past = seen(state)
        state = KV.append(state, self._rope_key(x, past, rotary), self._sharded(x), valid)
        mask = visible(x.shape[1], True, state.valid, past)
        return self._absorbed(*self._query(x, past, rotary), state, mask), state

    def _absorbed(self, q_nope: Tensor, q_pe: Tensor, state: KV, mask: Mask | None) -> Tensor:
        groups = state.value.shape[1]
        if groups == 1 and self.shards > 1:  # whole latents, in exact prefill
            return super()._absorbed(q_nope, q_pe, state, mask)
        query = rearrange(self._into_latents(q_nope), "b h n (g s) -> b g h n s", g=groups)
        query = query * self.shard_logit.to(query.dtype).view(-1, 1, 1, 1)
        q_pe = q_pe.repeat(1, groups, 1, 1)
        out = attend_to_latents(query.flatten(1, 2), q_pe, state.value, state.key, mask, self.scale)
        return self._out_of_latents(rearrange(out, "b (g h) n s -> b h n (g s)", g=groups))

    def _sharded(self, source: Tensor) -> Tensor:
        """ĉ_i, (B, g, M, r / g)."""
        latent = self._cut(self.latent_proj(source))
        wide = latent.to(torch.promote_types(latent.dtype, torch.float32))
        mean = wide.square().mean(-1, keepdim=True) * self.shard_norm.to(wide.dtype).view(-1, 1, 1)
        return (wide * (mean + self.norm_eps).rsqrt()).to(latent.dtype)

    def _cut(self, latent: Tensor) -> Tensor:
        return rearrange(latent, "b m (g s) -> b g m s", g=self.shards)

    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments(), "shards": self.shards, "prefill": self.prefill}

    def shard(self, rank: int, world_size: int | None = None) -> "TensorParallelLatentAttention":
        """The part of this layer that device ``rank`` of ``world_size`` holds; the devices' outputs sum to ours.

            y = tpla.shard(rank, world_size)(x)
            torch.distributed.all_reduce(y)

        With more devices than shards, the heads of a shard are split among them. Prefill on a shard is sharded, too.
        """
        world_size = self.shards if world_size is None else world_size
        if world_size < 1 or world_size % self.shards or self.num_heads % (world_size // self.shards):
            raise ArgumentError(
                f"world_size: expected a multiple of the {self.shards} shards that splits {self.num_heads} heads, "
                f"got {world_size}"
            )
        if not 0 <= rank < world_size:
            raise ArgumentError(f"rank: expected 0 to {world_size - 1}, got {rank}")
        i, part = divmod(rank, world_size // self.shards)
        size, num_heads = self.kv_lora_rank // self.shards, self.num_heads * self.shards // world_size
        heads = torch.arange(num_heads) + part * num_heads
        channels = torch.arange(size) + i * size
        arguments = {"num_heads": num_heads, "kv_lora_rank": size, "shards": 1, "prefill": "tpla"}
        local = type(self)(**{**self._arguments(), **arguments}).to(self.o_proj.weight)
        state = {}
        for name, tensor in self.state_dict().items():
            module, index = name.rpartition(".")[0], heads.to(tensor.device)
            if name in ("shard_norm", "shard_logit"):
                tensor = tensor[i : i + 1]
            elif module == "latent_proj":
                tensor = tensor[channels]
            elif module in ("k_up_proj", "v_up_proj"):
                tensor = tensor.unflatten(0, (self.num_heads, -1))[index].flatten(0, 1)[:, channels]
            elif module == ("q_proj" if self.q_lora_rank is None else "q_proj.2"):
                tensor = tensor.unflatten(0, (self.num_heads, -1))[index].flatten(0, 1)
            elif name == "o_proj.weight":
                tensor = tensor.unflatten(1, (self.num_heads, -1))[:, index].flatten(1)
            elif name == "o_proj.bias" and rank > 0:
                tensor = torch.zeros_like(tensor)
            state[name] = tensor
        local.load_state_dict(state)
        return local

    @classmethod
    def from_mla(
        cls,
        mla: MultiHeadLatentAttention,
        shards: int = 2,
        rotation: Literal["identity", "hadamard", "pca"] | Tensor = "pca",
        calibration: Tensor | None = None,
        energies: Tensor | None = None,
        logits: Literal["inverse", "proportion"] = "inverse",
        prefill: Literal["tpla", "mla"] = "tpla",
        generator: torch.Generator | None = None,
    ) -> Self:
        """The layer's weights in a rotated basis, sharded.

        Args:
            mla: the trained layer.
            shards: g.
            rotation: which U, or U itself (r, r), orthogonal. It decides how much each shard sees.
            calibration: hidden states (..., C) that enter the layer, for "pca".
            energies: mean squares of the rotated latents (r,); α_i is their total over the shard's part. "pca" finds
                them; without any, α = g.
            logits: whether μ_i is α_i ("inverse") or the shard's part itself, as the paper prints it.
            prefill: see the class.
            generator: of the signs of "hadamard".
        """
        rank = mla.kv_lora_rank
        if isinstance(rotation, Tensor):
            basis = rotation
        elif rotation == "pca":
            if calibration is None:
                raise ArgumentError("calibration: rotation='pca' needs hidden states to find the principal axes")
            if calibration.shape[-1] != mla.dim:
                raise ShapeError(f"calibration: expected (..., {mla.dim}), got {tuple(calibration.shape)}")
            with torch.no_grad():
                basis, energies = pca_rotation(mla.latent_proj(calibration.to(mla.latent_proj.weight)))
        elif rotation == "hadamard":
            basis = hadamard_rotation(rank, generator)
        elif rotation == "identity":
            basis = torch.eye(rank)
        else:
            raise ArgumentError(f"rotation: expected identity, hadamard, pca or a matrix, got {rotation!r}")
        if logits not in ("inverse", "proportion"):
            raise ArgumentError(f"logits: expected inverse or proportion, got {logits!r}")
        rotated = rotate_latent(mla, basis)
        module = cls(**{**mla._arguments(), "absorbed": True, "shards": shards, "prefill": prefill})
        if energies is None:
            energies = torch.ones(rank)
        if tuple(energies.shape) != (rank,):
            raise ShapeError(f"energies: expected ({rank},), got {tuple(energies.shape)}")
        parts = energies.detach().double().unflatten(0, (shards, -1)).sum(-1)
        alpha = parts.sum() / parts.clamp(min=torch.finfo(torch.float32).tiny)
        state = {name: tensor for name, tensor in rotated.state_dict().items() if name != "latent_norm.weight"}
        mu = alpha if logits == "inverse" else 1 / alpha
        module = module.to(mla.o_proj.weight).train(mla.training)
        module.load_state_dict({**state, "shard_norm": alpha / shards, "shard_logit": mu})
        return module

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> Self:
        """The attention of transformers' DeepSeek-V3 in one shard, which is MLA; see there for the arguments.

        To choose shards and rotation: ``from_mla(MultiHeadLatentAttention.from_official(...), ...)``.
        """
        mla = MultiHeadLatentAttention.from_official(state_dict, **official_kwargs)
        return cls.from_mla(mla, shards=1, rotation="identity")


class GroupedLatentAttention(TensorParallelLatentAttention):
    """Grouped latent attention, TPLA's counterpart: group i of the heads sees shard i of the latents and no other.

    The query-latent products across groups are lost, which trained MLA weights do not survive; a device loads as
    little as with TPLA. The arguments are those of `TensorParallelLatentAttention` (arXiv:2508.15881).
    """

    cost: ClassVar[str] = "O(N² H (r / g + d_r))"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.num_heads % self.shards:
            raise ArgumentError(f"shards: {self.shards} groups do not divide {self.num_heads} heads")

    def _absorbed(self, q_nope: Tensor, q_pe: Tensor, state: KV, mask: Mask | None) -> Tensor:
        groups = state.value.shape[1]
        if groups == 1 and self.shards > 1:
            return super()._absorbed(q_nope, q_pe, state, mask)
        # (own group of the head, all groups of the latent): the diagonal remains
        query = rearrange(self._into_latents(q_nope), "b (f h) n (g s) -> b h n s f g", f=groups, g=groups)
        query = query.diagonal(dim1=-2, dim2=-1) * self.shard_logit.to(query.dtype)
        query = rearrange(query, "b h n s g -> b (g h) n s")
        out = attend_to_latents(query, q_pe, state.value, state.key, mask, self.scale)
        spread = torch.diag_embed(rearrange(out, "b (g h) n s -> b h n s g", g=groups))
        return self._out_of_latents(rearrange(spread, "b h n s f g -> b (f h) n (g s)"))

    def shard(self, rank: int, world_size: int | None = None) -> TensorParallelLatentAttention:
        """Not offered: a group of heads with its latents is a layer of its own."""
        raise Unsupported("GroupedLatentAttention: a group of heads with its latents is a layer of its own")


def rotate_latent(mla: MultiHeadLatentAttention, rotation: Tensor) -> MultiHeadLatentAttention:
    """The same layer with latents c U (and γ moved into W_u): an orthogonal U changes nothing that it computes.

    Args:
        rotation: U (r, r).
    """
    rank = mla.kv_lora_rank
    if tuple(rotation.shape) != (rank, rank):
        raise ShapeError(f"rotation: expected ({rank}, {rank}), got {tuple(rotation.shape)}")
    basis = rotation.detach().to(mla.latent_proj.weight.device, torch.float64)
    if (basis.T @ basis - torch.eye(rank, dtype=basis.dtype, device=basis.device)).abs().max() > 1e-3:
        raise ArgumentError("rotation: expected an orthogonal matrix")
    rotated = deepcopy(mla)
    with torch.no_grad():
        gamma = mla.latent_norm.weight.double()
        rotated.latent_proj.weight.copy_(basis.T @ mla.latent_proj.weight.double())
        if mla.latent_proj.bias is not None:
            rotated.latent_proj.bias.copy_(basis.T @ mla.latent_proj.bias.double())
        for new, old in ((rotated.k_up_proj, mla.k_up_proj), (rotated.v_up_proj, mla.v_up_proj)):
            new.weight.copy_(old.weight.double() * gamma @ basis)
        rotated.latent_norm.weight.fill_(1.0)
    return rotated


def hadamard_rotation(rank: int, generator: torch.Generator | None = None) -> Tensor:
    """Sylvester's matrix with rows of random sign, over √r: every channel goes into all shards equally. (r, r)."""
    if rank < 1 or rank & (rank - 1):
        raise ArgumentError(f"rank: a Hadamard matrix needs a power of two, got {rank}")
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < rank:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (rank, 1), generator=generator) * 2 - 1
    return signs * matrix * rank**-0.5


def pca_rotation(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Principal axes of the uncentred latents (..., r) before their norm, largest first.

    Returns:
        U (r, r) with an axis in every column, and the mean squares along them (r,), both float64.
    """
    flat = latents.detach().double().flatten(0, -2)
    energies, axes = torch.linalg.eigh(flat.T @ flat / flat.shape[0])
    return axes.flip(-1), energies.flip(-1).clamp(min=0)
