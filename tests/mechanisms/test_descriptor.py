"""FlashVGGT's attention from its published weights against loops, what it reads, streaming, and the aggregator."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import regard
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms.pooled.descriptor import DescriptorAttention, select_keyframes
from regard.models.vision.flash_vggt import FlashVGGTAggregator

DIM, HEADS, SPECIAL = 16, 2, 2


def published_state(seed: int = 0, bias: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"qkv.weight": (3 * DIM, DIM), "proj.weight": (DIM, DIM), "proj.bias": (DIM,)}
    shapes |= {f"{name}.{kind}": (DIM // HEADS,) for name in ("q_norm", "k_norm") for kind in ("weight", "bias")}
    shapes |= {"qkv.bias": (3 * DIM,)} if bias else {}
    return {name: (torch.randn(shape, generator=generator) / 2).double() for name, shape in shapes.items()}


def layer(state: dict[str, Tensor] | None = None, **kwargs) -> DescriptorAttention:
    config = {"dim": DIM, "num_heads": HEADS, "qk_norm": True, "kv_downfactor": 2} | kwargs
    state = published_state() if state is None else state
    return regard.from_official("flash-vggt", state, **config).double().eval().requires_grad_(False)


def frames(batch: int, count: int, grid: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, count, SPECIAL + grid[0] * grid[1], DIM, generator=generator, dtype=torch.float64)


def places(grid: tuple[int, int]) -> list[tuple[int, int]]:
    return [(0, 0)] * SPECIAL + [(y + 1, x + 1) for y in range(grid[0]) for x in range(grid[1])]


def turned(v: Tensor, place: tuple[int, int]) -> Tensor:
    """The first half of the channels by row, the second by column; rotate-half inside each, base 100."""
    parts = []
    for half, p in zip(v.chunk(2), place, strict=True):
        n = len(half) // 2
        angle = torch.tensor([p * 100 ** (-2 * i / (2 * n)) for i in range(n)], dtype=v.dtype)
        a, b = half[:n], half[n:]
        parts += [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
    return torch.cat(parts)


def published(state: dict[str, Tensor], x: Tensor, x_at: list, z: Tensor, z_at: list) -> Tensor:
    """Attention of tokens x (N, C) at given places to tokens z (M, C), head by head."""
    d = DIM // HEADS

    def project(t: Tensor, part: int, h: int) -> Tensor:
        rows = slice(part * DIM + h * d, part * DIM + (h + 1) * d)
        return t @ state["qkv.weight"][rows].T + state["qkv.bias"][rows]

    heads = []
    for h in range(HEADS):
        q, k, v = project(x, 0, h), project(z, 1, h), project(z, 2, h)
        q = F.layer_norm(q, (d,), state["q_norm.weight"], state["q_norm.bias"])
        k = F.layer_norm(k, (d,), state["k_norm.weight"], state["k_norm.bias"])
        q = torch.stack([turned(row, at) for row, at in zip(q, x_at, strict=True)])
        k = torch.stack([turned(row, at) for row, at in zip(k, z_at, strict=True)])
        heads.append((q @ k.T / d**0.5).softmax(-1) @ v)
    return torch.cat(heads, -1) @ state["proj.weight"].T + state["proj.bias"]


def resized(patches: Tensor, r: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """(h, w, C) sampled at the centres of a grid of ⌊h/r⌋ × ⌊w/r⌋ cells, and each cell's place."""
    h, w = patches.shape[:2]
    rows, columns = h // r, w // r

    def taps(i: int, size: int, count: int) -> list[tuple[int, float]]:
        at = (i + 0.5) * size / count - 0.5
        low = math.floor(at)
        return [(min(max(low + t, 0), size - 1), (1 - (at - low)) if t == 0 else at - low) for t in (0, 1)]

    values, at = [], []
    for i in range(rows):
        for j in range(columns):
            values.append(sum(a * b * patches[y, x] for y, a in taps(i, h, rows) for x, b in taps(j, w, columns)))
            at.append((i * h // rows + 1, j * w // columns + 1))
    return torch.stack(values), at


def read(x: Tensor, grid: tuple[int, int], r: int, keyframes: list[int]) -> tuple[Tensor, list[tuple[int, int]]]:
    """What the queries of one scene (S, P, C) read."""
    tokens = [x[f, SPECIAL:] for f in keyframes]
    at = places(grid)[SPECIAL:] * len(keyframes)
    for frame in x:
        small, where = resized(frame[SPECIAL:].unflatten(0, grid), r)
        tokens += [frame[:SPECIAL], small]
        at = at + [(0, 0)] * SPECIAL + where
    return torch.cat(tokens), at


@pytest.mark.parametrize(
    ("grid", "r", "keyframes"), [((4, 6), 2, [0, 0, 2]), ((5, 7), 2, []), ((3, 6), 3, [1]), ((4, 9), 4, [2, 1])]
)
def test_tokens_read_key_frames_and_descriptors(grid, r: int, keyframes: list[int]) -> None:
    state = published_state()
    module, x = layer(state, kv_downfactor=r), frames(2, 3, grid)
    indices = torch.tensor([keyframes, keyframes[::-1]]) if keyframes else None
    got = module(x, grid, keyframes=indices)
    for b, order in enumerate((keyframes, keyframes[::-1])):
        z, z_at = read(x[b], grid, r, order)
        want = published(state, x[b].flatten(0, 1), places(grid) * 3, z, z_at)
        torch.testing.assert_close(got[b].flatten(0, 1), want, atol=1e-6, rtol=1e-5)  # the angles are float32


def test_without_pooling_it_is_dense_attention() -> None:
    state = published_state()
    module, x = layer(state, kv_downfactor=1), frames(1, 3, (2, 3))
    flat = x[0].flatten(0, 1)
    want = published(state, flat, places((2, 3)) * 3, flat, places((2, 3)) * 3)
    torch.testing.assert_close(module(x, (2, 3))[0].flatten(0, 1), want, atol=1e-6, rtol=1e-5)
    keyed = module(x, (2, 3), keyframes=torch.tensor([[0]]))
    torch.testing.assert_close(keyed, module(x, (2, 3)), atol=0, rtol=0)


def test_what_bilinear_pooling_reads() -> None:
    """The 2×2 mean for r = 2, the middle pixel for r = 3, the middle 2×2 for r = 4; "dwconv" starts as the mean."""
    for r, inner in ((2, slice(0, 2)), (3, slice(1, 2)), (4, slice(1, 3))):
        x = frames(1, 1, (2 * r, r))
        got, _ = layer(kv_downfactor=r).descriptors(x, (2 * r, r), torch.zeros(1, 1, x.shape[2], 2))
        cells = x[0, 0, SPECIAL:].unflatten(0, (2, r, r))
        torch.testing.assert_close(got[0, SPECIAL:], cells[:, inner, inner].mean((1, 2)))
        learned = DescriptorAttention(DIM, HEADS, r, compressor="dwconv").double()
        got, _ = learned.descriptors(x, (2 * r, r), torch.zeros(1, 1, x.shape[2], 2))
        torch.testing.assert_close(got[0, SPECIAL:], cells.mean((1, 2)))


def test_learned_pooling_loads() -> None:
    weight = torch.randn(DIM, 1, 2, 2)
    state = published_state() | {"spatial_compressor.compressor.weight": weight}
    module, x = layer(state, compressor_type="dwconv"), frames(1, 1, (2, 4))
    got, at = module.descriptors(x, (2, 4), torch.tensor(places((2, 4)))[None, None])
    cells = x[0, 0, SPECIAL:].unflatten(0, (2, 4))
    want = [(cells[:, 2 * j : 2 * j + 2] * weight.double()[:, 0].permute(1, 2, 0)).sum((0, 1)) for j in range(2)]
    torch.testing.assert_close(got[0, SPECIAL:], torch.stack(want))
    assert at[0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 3]]


@pytest.mark.parametrize("splits", [[1, 1, 2], [4], [3, 1]])
@pytest.mark.parametrize("drop_rate", [1, 2])
def test_a_stream_reads_itself_and_the_past(splits: list[int], drop_rate: int) -> None:
    state, grid = published_state(), (4, 4)
    module, x = layer(state), frames(1, 4, grid)
    memory, z, z_at = None, x[0, 0, SPECIAL:], places(grid)[SPECIAL:]
    for chunk in x.split(splits, 1):
        got, memory = module.stream(chunk, grid, memory, drop_rate=drop_rate)
        new, new_at = read(chunk[0, ::drop_rate], grid, 2, [])
        z, z_at = torch.cat([z, new]), z_at + new_at
        want = published(state, chunk[0].flatten(0, 1), places(grid) * chunk.shape[1], z, z_at)
        torch.testing.assert_close(got[0].flatten(0, 1), want, atol=1e-6, rtol=1e-5)
        assert memory.tokens.shape == (1, len(z), DIM)


def test_one_chunk_is_the_offline_form_with_the_first_frame_as_key() -> None:
    module, x = layer(), frames(2, 3, (4, 4))
    offline = module(x, (4, 4), keyframes=torch.zeros(2, 1, dtype=torch.long))
    torch.testing.assert_close(module.stream(x, (4, 4))[0], offline, atol=0, rtol=0)


def test_given_positions_replace_those_of_the_grid() -> None:
    module, x = layer(), frames(1, 2, (4, 4))
    positions = torch.tensor(places((4, 4))).expand(1, 2, -1, 2)
    torch.testing.assert_close(module(x, (4, 4), positions=positions), module(x, (4, 4)), atol=0, rtol=0)
    assert not torch.allclose(module(x, (4, 4), positions=2 * positions), module(x, (4, 4)))


def test_how_much_is_read() -> None:
    module, count = layer(kv_downfactor=4), 10
    x = torch.randn(1, count, 5 + 37 * 28, DIM, dtype=torch.float64)
    at = module._positions(x, (37, 28), None)
    tokens, _ = module.descriptors(x, (37, 28), at, torch.zeros(1, 1, dtype=torch.long))
    assert tokens.shape[1] == count * (5 + 9 * 7) + 37 * 28
    without, _ = module.descriptors(x, (37, 28), at)
    assert without.shape[1] / (count * x.shape[2]) == pytest.approx(0.065, abs=5e-4)


def test_gradients() -> None:
    module, x = layer(kv_downfactor=2), frames(1, 2, (2, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module(x, (2, 2), keyframes=torch.tensor([[1]])), (x,))


def test_key_frames_are_one_of_each_scene() -> None:
    """With two scenes far apart k-means finds both, whatever it starts from."""
    generator = torch.Generator().manual_seed(1)
    scene = torch.tensor([0, 0, 1, 0, 1, 1, 0, 1])
    far = torch.tensor([0.0, 100.0])[scene][None, :, None, None]
    tokens = far + torch.randn(3, 8, 4, 5, generator=generator)
    for seed in range(5):
        chosen = select_keyframes(tokens, every=4, seed=seed)
        assert chosen.shape == (3, 3)
        for b in range(3):
            assert chosen[b, 0] == 0
            assert sorted(scene[chosen[b, 1:]].tolist()) == [0, 1]
            for f in chosen[b, 1:]:  # the most typical of its scene
                mean = tokens[b].mean(1)
                off = (mean - mean[scene == scene[f]].mean(0)).norm(dim=-1)
                assert off.argmin() == f
        assert torch.equal(chosen, select_keyframes(tokens, every=4, seed=seed))
    assert select_keyframes(tokens, every=5).tolist() == [[0], [0], [0]]


def network_state(depth: int) -> dict[str, Tensor]:
    """Weights under the names of the published aggregator."""
    generator = torch.Generator().manual_seed(4)
    shapes = {"patch_embed.proj.weight": (DIM, 3, 2, 2), "patch_embed.proj.bias": (DIM,)}
    shapes |= {"camera_token": (1, 2, 1, DIM), "register_token": (1, 2, SPECIAL - 1, DIM)}
    for block in (f"{kind}_blocks.{i}." for kind in ("frame", "global") for i in range(depth)):
        shapes |= {f"{block}attn.{name}": tensor.shape for name, tensor in published_state().items()}
        shapes |= {f"{block}{norm}.{kind}": (DIM,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        shapes |= {f"{block}ls1.gamma": (DIM,), f"{block}ls2.gamma": (DIM,)}
        shapes |= {f"{block}mlp.fc1.weight": (4 * DIM, DIM), f"{block}mlp.fc1.bias": (4 * DIM,)}
        shapes |= {f"{block}mlp.fc2.weight": (DIM, 4 * DIM), f"{block}mlp.fc2.bias": (DIM,)}
    return {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}


def block_by_definition(state: dict[str, Tensor], name: str, x: Tensor, x_at: list, reads) -> Tensor:
    w = {key.removeprefix(f"{name}."): t for key, t in state.items() if key.startswith(f"{name}.")}
    attention = {key.removeprefix("attn."): t for key, t in w.items()}
    h = F.layer_norm(x, (DIM,), w["norm1.weight"], w["norm1.bias"])
    x = x + w["ls1.gamma"] * published(attention, h, x_at, *reads(h))
    h = F.layer_norm(x, (DIM,), w["norm2.weight"], w["norm2.bias"])
    h = F.gelu(h @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
    return x + w["ls2.gamma"] * h


def aggregator(state: dict[str, Tensor], depth: int = 2, **kwargs) -> FlashVGGTAggregator:
    config = {"patch_size": 2, "embed_dim": DIM, "depth": depth, "num_heads": HEADS, "patch_embed": "conv"}
    config |= {"num_register_tokens": SPECIAL - 1, "intermediate_layer_idx": [0], "kv_downfactor": 2}
    return regard.from_official("flash-vggt", state, variant="model", **config | kwargs).eval()


def test_the_aggregator_with_published_weights() -> None:
    state, grid, count = network_state(2), (2, 4), 3
    images = torch.rand(1, count, 3, 4, 8, generator=torch.Generator().manual_seed(2))
    got = aggregator(state)(images)
    assert len(got) == 2
    shift, scale = (torch.tensor(c).view(3, 1, 1) for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    patches = F.conv2d((images[0] - shift) / scale, kernel, bias, stride=2).flatten(2).mT
    special = torch.cat([state["camera_token"], state["register_token"]], 2)[0]
    x = torch.stack([torch.cat([special[min(f, 1)], patches[f]]) for f in range(count)])
    for i in range(2):
        inside = torch.stack(
            [block_by_definition(state, f"frame_blocks.{i}", f, places(grid), lambda h: (h, places(grid))) for f in x]
        )
        flat = block_by_definition(
            state,
            f"global_blocks.{i}",
            inside.flatten(0, 1),
            places(grid) * count,
            lambda h: read(h.unflatten(0, (count, -1)), grid, 2, [0]),
        )
        x = flat.view_as(inside)
        torch.testing.assert_close(got[i][0], torch.cat([inside, x], -1), atol=1e-4, rtol=1e-4)


def test_the_aggregator_streams(tmp_path) -> None:
    model = aggregator(network_state(1), depth=1)
    images = torch.rand(1, 3, 3, 4, 8)
    once, state = model.stream(images)
    torch.testing.assert_close(once[0], model(images)[0], atol=0, rtol=0)  # three frames have one key frame, the first
    first, state = model.stream(images[:, :2])
    torch.testing.assert_close(first[0], model(images[:, :2])[0], atol=0, rtol=0)
    last, state = model.stream(images[:, 2:], state)
    torch.testing.assert_close(last[0], once[0][:, 2:], atol=1e-5, rtol=1e-5)  # it sees all frames either way
    fresh = FlashVGGTAggregator(DIM, 1, HEADS, 2, 1, kv_downfactor=2)
    fresh.save_pretrained(tmp_path)
    torch.testing.assert_close(
        FlashVGGTAggregator.from_pretrained(tmp_path)(images)[0], fresh(images)[0], atol=0, rtol=0
    )


def test_refusals() -> None:
    for config, message in (
        ({"num_heads": 3}, "num_heads"),
        ({"num_heads": 8}, "heads of 4n channels"),
        ({"kv_downfactor": 0}, "kv_downfactor"),
        ({"compressor": "max"}, "compressor"),
    ):
        with pytest.raises(ArgumentError, match=message):
            DescriptorAttention(**{"dim": DIM, "num_heads": 2} | config)
    module, x = layer(), frames(1, 2, (2, 2))
    with pytest.raises(ShapeError, match="x: expected"):
        module(x[0], (2, 2))
    with pytest.raises(ArgumentError, match="grid"):
        module(x, (1, 4))
    with pytest.raises(ArgumentError, match="grid"):
        module(x, (3, 3))
    with pytest.raises(ShapeError, match="positions"):
        module(x, (2, 2), positions=torch.zeros(1, 2, 2))
    with pytest.raises(ShapeError, match="keyframes"):
        module(x, (2, 2), keyframes=torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ArgumentError, match="drop_rate"):
        module.stream(x, (2, 2), drop_rate=0)
    with pytest.raises(ArgumentError, match="every"):
        select_keyframes(x, 0)
    with pytest.raises(ShapeError, match="tokens"):
        select_keyframes(x[0])
    with pytest.raises(Unsupported, match="patch_embed"):
        FlashVGGTAggregator.from_official({})
    with pytest.raises(ShapeError, match="images"):
        FlashVGGTAggregator(DIM, 1, HEADS, 2, 1)(torch.rand(1, 2, 3, 5, 4))
