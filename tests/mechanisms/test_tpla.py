"""Latent attention and its shards, against the papers' equations and against stored float64 values."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms import state_bytes
from regard.mechanisms.heads.latent import MultiHeadLatentAttention
from regard.mechanisms.heads.tpla import (
    GroupedLatentAttention,
    TensorParallelLatentAttention,
    hadamard_rotation,
    pca_rotation,
    rotate_latent,
)
from tests.parity.harness import Golden

GOLDEN = Path(__file__).parents[1] / "parity" / "golden" / "tpla.safetensors"
SIZES = {"dim": 10, "num_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 5}


def layer(**changes: object) -> MultiHeadLatentAttention:
    torch.manual_seed(0)
    mla = MultiHeadLatentAttention(**{**SIZES, **changes}).double()
    with torch.no_grad():
        mla.latent_norm.weight.normal_(1.0, 0.3)
        for projection in (mla.k_up_proj, mla.latent_proj, mla.k_rope_proj):
            projection.weight.mul_(3.0)
    return mla


def tokens(n: int = 6, batch: int = 2) -> Tensor:
    return torch.randn(batch, n, SIZES["dim"], generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def turned(pair: Tensor, position: int) -> Tensor:
    angle = torch.tensor(float(position))
    a, b = pair
    return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()])


def naive(mla: MultiHeadLatentAttention, x: Tensor, mode: str = "mla", shards: int = 1) -> Tensor:
    """One batch item, one query, one head and one key at a time; d_r = 2, so the only angle is the position."""
    d_n, d_v, rank = mla.qk_nope_head_dim, mla.v_head_dim, mla.kv_lora_rank
    size = rank // shards
    y = torch.zeros_like(x)
    latent = mla.latent_proj.weight
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for h in range(mla.num_heads):
                q = (mla.q_proj.weight @ x[b, t])[h * (d_n + 2) : (h + 1) * (d_n + 2)]
                q_nope, q_pe = q[:d_n], turned(q[d_n:], t)
                up = mla.k_up_proj.weight[h * d_n : (h + 1) * d_n] * mla.latent_norm.weight
                down = mla.v_up_proj.weight[h * d_v : (h + 1) * d_v] * mla.latent_norm.weight
                for i in range(shards):
                    if mode == "gla" and h // (mla.num_heads // shards) != i:
                        continue
                    own = slice(i * size, (i + 1) * size)
                    factor = 1.0 if mode == "mla" else float(shards)  # alpha = mu = g
                    scores, values = [], []
                    for j in range(t + 1):
                        c = (latent @ x[b, j])[own]
                        c = c / (factor * (c @ c) / rank + mla.norm_eps).sqrt()
                        k_pe = turned(mla.k_rope_proj.weight @ x[b, j], j)
                        scores.append(factor * (up[:, own].T @ q_nope) @ c + q_pe @ k_pe)
                        values.append(down[:, own] @ c)
                    p = torch.stack(scores).mul((d_n + 2) ** -0.5).softmax(0)
                    y[b, t] += mla.o_proj.weight[:, h * d_v : (h + 1) * d_v] @ sum(
                        w * v for w, v in zip(p, values, strict=True)
                    )
    return y


def close(got: Tensor, want: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=0)  # 1e-6: the angles are float32


def test_latent_attention_is_the_equation() -> None:
    mla, x = layer(), tokens()
    want = naive(mla, x)
    close(mla(x), want)
    close(mla.stream(x)[0], want)


@pytest.mark.parametrize(("cls", "mode"), [(TensorParallelLatentAttention, "tpla"), (GroupedLatentAttention, "gla")])
@pytest.mark.parametrize("shards", [2, 4])
def test_shards_are_the_equation(cls: type[TensorParallelLatentAttention], mode: str, shards: int) -> None:
    mla, x = layer(), tokens()
    close(cls.from_mla(mla, shards, "identity")(x), naive(mla, x, mode, shards))


@pytest.mark.parametrize("cls", [TensorParallelLatentAttention, GroupedLatentAttention])
def test_one_shard_is_latent_attention(cls: type[TensorParallelLatentAttention]) -> None:
    mla, x = layer(bias=True), tokens()
    for rotation in ("identity", "hadamard", "pca"):
        sharded = cls.from_mla(mla, 1, rotation, calibration=x)
        close(sharded(x), mla(x))


def test_rotation_changes_nothing() -> None:
    mla, x = layer(bias=True, q_lora_rank=6), tokens()
    basis, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    rotated = rotate_latent(mla, basis)
    close(rotated(x), mla(x))
    assert not torch.allclose(rotated.latent_proj(x), mla.latent_proj(x))


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("changes", [{}, {"bias": True, "q_lora_rank": 6}])
def test_outputs_of_the_devices_sum_to_the_layer(world_size: int, changes: dict[str, object]) -> None:
    x = tokens()
    tpla = TensorParallelLatentAttention.from_mla(layer(**changes), 2, "pca", calibration=tokens(50))
    if changes:
        torch.nn.init.normal_(tpla.o_proj.bias)
    devices = [tpla.shard(rank, world_size) for rank in range(world_size)]
    close(sum(device(x) for device in devices), tpla(x), 1e-10)
    states = [None] * world_size
    for t in range(x.shape[1]):  # decoding: one token, one reduction
        total = torch.zeros_like(x[:, :1])
        for rank, device in enumerate(devices):
            y, states[rank] = device.stream(x[:, t : t + 1], states[rank])
            total += y
    close(total, tpla(x)[:, -1:])


def test_a_device_caches_its_share() -> None:
    """r = 512 and d_r = 64: 576 numbers per token in one place, 320 in two."""
    sizes = {"dim": 8, "num_heads": 2, "kv_lora_rank": 512, "qk_nope_head_dim": 2, "qk_rope_head_dim": 64}
    x = torch.randn(1, 3, 8)
    tpla = TensorParallelLatentAttention(**sizes, shards=2)
    mla = MultiHeadLatentAttention(**sizes)
    assert state_bytes(mla.stream(x)[1]) == 3 * 4 * 576
    assert state_bytes(tpla.shard(1).stream(x)[1]) == 3 * 4 * 320


def test_exact_prefill_then_sharded_decoding() -> None:
    mla, x = layer(), tokens(9)
    tpla = TensorParallelLatentAttention.from_mla(mla, 2, "hadamard", prefill="mla")
    close(tpla(x), mla(x))
    y, state = tpla.stream(x[:, :8])
    close(y, mla(x[:, :8]))
    rotated = tpla.latent_norm(tpla.latent_proj(x[:, :8]))
    close(torch.cat(tuple(state.value.unbind(1)), -1), rotated)
    last, _ = tpla.stream(x[:, 8:], state)
    assert not torch.allclose(last, mla(x)[:, 8:])


def test_published_float64_values() -> None:
    golden, stored = Golden.read(GOLDEN), load_file(GOLDEN)
    mla = MultiHeadLatentAttention.from_official(golden.state(), **golden.kwargs).double()
    inputs = {name: t.double() for name, t in golden.inputs.items()}
    x, rotary = inputs["hidden_states"], (inputs["cos"], inputs["sin"])

    def oracle(name: str, got: Tensor, atol: float) -> None:
        torch.testing.assert_close(got, stored[f"oracle/tpla_{name}"].double(), atol=atol, rtol=0)

    oracle("exact_rotated", rotate_latent(mla, inputs["U_pca"])(x, rotary=rotary), 1e-5)
    for g in (2, 4):
        for name in ("identity", "hadamard"):
            basis = "identity" if name == "identity" else inputs["U_hadamard"]
            oracle(f"{name}_g{g}", TensorParallelLatentAttention.from_mla(mla, g, basis)(x, rotary=rotary), 1e-5)
        pca = TensorParallelLatentAttention.from_mla(mla, g, inputs["U_pca"], energies=inputs["pca_eigenvalues"])
        oracle(f"pca_g{g}", pca(x, rotary=rotary), 1e-4)
        oracle(
            f"pca_g{g}", TensorParallelLatentAttention.from_mla(mla, g, "pca", inputs["calib"])(x, rotary=rotary), 1e-4
        )
    separated = TensorParallelLatentAttention.from_mla(mla, 2, "pca", inputs["calib"], prefill="mla")
    cos, sin = rotary
    _, state = separated.stream(x[:, :-1], rotary=(cos[:, :-1], sin[:, :-1]))
    last, _ = separated.stream(x[:, -1:], state, rotary=(cos[:, -1:], sin[:, -1:]))
    oracle("pca_g2_pd_last", last[:, 0], 1e-4)


def test_own_angles_are_the_given_ones() -> None:
    golden = Golden.read(GOLDEN)
    mla = MultiHeadLatentAttention.from_official(golden.state(), **golden.kwargs)
    x = golden.inputs["hidden_states"]
    close(mla(x), mla(x, rotary=(golden.inputs["cos"], golden.inputs["sin"])), 1e-5)


def test_rotations() -> None:
    basis = hadamard_rotation(16, torch.Generator().manual_seed(3))
    close(basis @ basis.T, torch.eye(16))
    close(basis.abs(), torch.full((16, 16), 0.25))
    latents = torch.randn(100, 6, dtype=torch.float64) * torch.arange(1, 7)
    axes, energies = pca_rotation(latents)
    close(axes.T @ axes, torch.eye(6, dtype=torch.float64))
    close((latents @ axes).square().mean(0), energies)
    assert (energies.diff() <= 0).all()


def test_logits_in_proportion() -> None:
    x = tokens(20)
    inverse, proportion = (
        TensorParallelLatentAttention.from_mla(layer(), 2, "pca", x, logits=kind) for kind in ("inverse", "proportion")
    )
    close(proportion.shard_logit, 1 / inverse.shard_logit)
    close(proportion.shard_logit.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_yarn_scales_scores_and_wants_its_angles() -> None:
    golden = Golden.read(GOLDEN)
    yarn = {"rope_type": "yarn", "factor": 40.0, "mscale_all_dim": 1.0, "rope_theta": 10_000.0}
    mla = MultiHeadLatentAttention.from_official(golden.state(), **{**golden.kwargs, "rope_parameters": yarn})
    plain = MultiHeadLatentAttention.from_official(golden.state(), **golden.kwargs)
    assert mla.scale / plain.scale == pytest.approx((0.1 * 3.6888794541139363 + 1) ** 2)
    with pytest.raises(ArgumentError, match="rotary"):
        mla(golden.inputs["hidden_states"])


@pytest.mark.parametrize("cls", [MultiHeadLatentAttention, TensorParallelLatentAttention])
def test_gradients(cls: type[MultiHeadLatentAttention]) -> None:
    torch.manual_seed(0)
    module = cls(4, 2, kv_lora_rank=4, qk_nope_head_dim=2, qk_rope_head_dim=2).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))


def test_cross_attention() -> None:
    mla = layer(causal=False, rope_theta=None)
    x, context = tokens(3), tokens(7)
    for module in (mla, TensorParallelLatentAttention.from_mla(mla, 2, "identity")):
        close(module(x, context), module(x, context.flip(1)))
        assert module(x, context).shape == x.shape


def test_refusals() -> None:
    mla, x = layer(), tokens()
    with pytest.raises(ArgumentError, match="qk_rope_head_dim"):
        layer(qk_rope_head_dim=3)
    with pytest.raises(ArgumentError, match="shards: 3"):
        TensorParallelLatentAttention.from_mla(mla, 3, "identity")
    with pytest.raises(ArgumentError, match="calibration"):
        TensorParallelLatentAttention.from_mla(mla, 2)
    with pytest.raises(ShapeError, match="calibration"):
        TensorParallelLatentAttention.from_mla(mla, 2, calibration=x[..., :3])
    with pytest.raises(ArgumentError, match="rotation: expected identity"):
        TensorParallelLatentAttention.from_mla(mla, 2, "random")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="rotation"):
        rotate_latent(mla, torch.eye(4))
    with pytest.raises(ArgumentError, match="orthogonal"):
        rotate_latent(mla, 2 * torch.eye(8))
    with pytest.raises(ArgumentError, match="power of two"):
        hadamard_rotation(12)
    with pytest.raises(ArgumentError, match="prefill"):
        TensorParallelLatentAttention(**SIZES, prefill="none")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="absorbed"):
        TensorParallelLatentAttention(**SIZES, absorbed=False)
    with pytest.raises(ShapeError, match="rotary"):
        mla(x, rotary=(torch.ones(2, 2), torch.ones(2, 2)))
    tpla = TensorParallelLatentAttention.from_mla(mla, 2, "identity")
    with pytest.raises(ArgumentError, match="world_size"):
        tpla.shard(0, 3)
    with pytest.raises(ArgumentError, match="rank"):
        tpla.shard(2)
    with pytest.raises(ArgumentError, match="groups"):
        GroupedLatentAttention(**{**SIZES, "kv_lora_rank": 9}, shards=3)
    with pytest.raises(Unsupported, match="Grouped"):
        GroupedLatentAttention(**SIZES).shard(0)
