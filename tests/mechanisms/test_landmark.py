"""Landmark attention against its equations in plain loops."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import regard
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.mechanisms.sparse.landmark import LandmarkAttention, insert_landmarks, landmark_grouped_softmax
from regard.models.language.landmark import LandmarkGPT
from regard.positions import rotary_angles, rotate
from tests.parity.harness import Golden


def module(**config) -> LandmarkAttention:
    torch.manual_seed(0)
    return LandmarkAttention(**{"dim": 16, "num_heads": 4, "num_kv_heads": 2, "block_size": 3, **config}).double()


def naive_weights(scores: Tensor, is_landmark: Tensor, mask: Tensor) -> Tensor:
    """Of one row: scores, is_landmark and mask (M,)."""
    block = [int(is_landmark[:j].sum()) for j in range(len(scores))]
    keys = [j for j in range(len(scores)) if mask[j]]
    own = max(block[j] for j in keys)
    first = [j for j in keys if (block[j] == own) != bool(is_landmark[j])]
    p = dict(zip(first, scores[first].softmax(0), strict=True))
    weights = torch.zeros_like(scores)
    for j in keys:
        if block[j] == own and not is_landmark[j]:
            weights[j] = p[j]
        if block[j] < own and not is_landmark[j]:
            group = [i for i in keys if block[i] == block[j] and not is_landmark[i]]
            landmark = next(i for i in range(len(scores)) if is_landmark[i] and block[i] == block[j])
            weights[j] = p.get(landmark, 0) * scores[group].softmax(0)[group.index(j)]
    return weights


def test_the_grouped_softmax_is_its_definition() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 2, 11, 11, dtype=torch.float64) * 3
    is_landmark = torch.rand(2, 11) > 0.7
    is_landmark[:, 0] = False
    mask = torch.ones(11, 11, dtype=torch.bool).tril()
    got = landmark_grouped_softmax(scores, is_landmark, mask)
    for b in range(2):
        for h in range(2):
            for i in range(11):
                want = naive_weights(scores[b, h, i], is_landmark[b], mask[i])
                torch.testing.assert_close(got[b, h, i], want, atol=1e-14, rtol=0)


def test_rows_sum_to_one_and_landmarks_have_none() -> None:
    is_landmark = torch.arange(23) % 4 == 3
    got = landmark_grouped_softmax(torch.randn(1, 3, 23, 23) * 50, is_landmark, torch.ones(23, 23).tril().bool())
    torch.testing.assert_close(got.sum(-1), torch.ones(1, 3, 23))
    assert got[..., is_landmark].abs().max() == 0


@pytest.mark.parametrize("config", [{}, {"block_size": 1}, {"block_size": 30}, {"bias": True, "rope_theta": None}])
@pytest.mark.parametrize("padded", [False, True])
def test_merged_parts_are_the_grouped_softmax(config, padded: bool) -> None:
    layer = module(**config)
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    side = layer.block_size + 1
    is_landmark = (torch.arange(21) % side == side - 1).expand(2, -1)
    valid = None
    if padded:
        valid = torch.ones(2, 21, dtype=torch.bool)
        valid[1, 17:] = False
    got, want = layer(x, valid=valid), layer(x, valid=valid, is_landmark=is_landmark)
    torch.testing.assert_close(got[0], want[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(got[1, :17], want[1, :17], atol=1e-12, rtol=0)


def test_with_few_blocks_recall_is_full_attention() -> None:
    layer = module(top_k=9, capacity=9)
    x = torch.randn(2, 34, 16, dtype=torch.float64)  # eight blocks and a rest
    state, got = None, []
    for piece in x.split([1, 9, 4, 20], 1):
        y, state = layer.recall(piece, state)
        got.append(y)
    torch.testing.assert_close(torch.cat(got, 1), layer(x), atol=1e-12, rtol=0)
    assert state.length == 34
    assert state.key.shape[2:4] == (8, 4)


@pytest.mark.parametrize("selection", ["token_head", "head_max", "token_max"])
@pytest.mark.parametrize(("capacity", "top_k"), [(3, 2), (20, 2), (20, 1), (5, 5)])
def test_recall_is_its_definition(selection: str, capacity: int, top_k: int) -> None:
    """Twenty-two tokens (five blocks, a rest of two), then seven more."""
    layer = module(selection=selection, capacity=capacity, top_k=top_k)
    x = torch.randn(2, 29, 16, dtype=torch.float64)
    _, state = layer.recall(x[:, :22])
    got, _ = layer.recall(x[:, 22:], state)
    q, k, v = layer.qkv(x)
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))

    def turned(t: Tensor, position: int) -> Tensor:
        cos, sin = rotary_angles(torch.tensor([position]), 4)
        return rotate(t[None], cos, sin)[0]

    held = list(range(5))[-capacity:]
    first = min(5, top_k + 1) * 4
    slot = {b: max(0, i - (len(held) - top_k) + 1) for i, b in enumerate(held)}
    for n in range(2):
        liked = torch.zeros(4, 7, len(held), dtype=torch.float64)
        for h in range(4):
            for i in range(7):
                query = turned(q[n, h, 22 + i], first + 2 + i)
                scores = [query @ turned(k[n, h, 4 * b + 3], slot[b] * 4 + 3) / 2 for b in held]
                liked[h, i] = torch.stack(scores).softmax(0)
        if selection == "head_max":
            liked = liked.amax(0, keepdim=True).expand_as(liked)
        if selection == "token_max":
            liked = liked.amax(1, keepdim=True).expand_as(liked)
        for i in range(7):
            heads = []
            for h in range(4):
                query = turned(q[n, h, 22 + i], first + 2 + i)
                chosen = sorted(liked[h, i].topk(top_k).indices.tolist())
                keys, values, landmarks = [], [], []
                for place, index in enumerate(chosen):
                    b = held[index]
                    for j in range(4):
                        keys.append(turned(k[n, h, 4 * b + j], 4 * (place + (slot[b] > 0)) + j))
                        values.append(v[n, h, 4 * b + j])
                        landmarks.append(j == 3)
                for j in range(20, 22 + i + 1):
                    keys.append(turned(k[n, h, j], first + j - 20))
                    values.append(v[n, h, j])
                    landmarks.append(j % 4 == 3)
                scores = torch.stack(keys) @ query / 2
                weights = naive_weights(scores, torch.tensor(landmarks), torch.ones(len(scores), dtype=torch.bool))
                heads.append(weights @ torch.stack(values))
            torch.testing.assert_close(got[n, i], layer.o_proj(torch.cat(heads)), atol=1e-12, rtol=0)


def test_the_published_stream_while_no_equal_landmarks_compete() -> None:
    """Thirty-six tokens of the golden file's sixty, see the adapter."""
    golden = Golden.read(Path(__file__).parents[1] / "parity/golden/landmark-attention.safetensors")
    model = regard.from_official("landmark-attention", golden.state(), variant="model", **golden.kwargs).eval()
    state, got = None, []
    for chunk in golden.inputs["long_idx"][:, :36].split(golden.kwargs["cache"]["chunk"], 1):
        logits, state = model.recall(chunk, state)
        got.append(logits)
    torch.testing.assert_close(torch.cat(got, 1), golden.outputs["cached_logits"][:, :36], atol=1e-5, rtol=0)


def test_the_model_inserts_landmarks_and_leaves_them_out() -> None:
    torch.manual_seed(0)
    model = LandmarkGPT(20, dim=16, depth=2, num_heads=2, block_size=3, top_k=20).double()
    ids = torch.randint(19, (2, 17))
    whole = insert_landmarks(ids, 3, model.landmark_id)
    assert torch.equal(whole == 19, (torch.arange(22) % 4 == 3).expand(2, -1))
    assert torch.equal(whole[whole != 19].view(2, 17), ids)
    want = model(whole)[:, torch.arange(22) % 4 != 3]
    state, got = None, []
    for piece in ids.split([2, 1, 8, 6], 1):
        logits, state = model.recall(piece, state)
        got.append(logits)
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-12, rtol=0)
    late = torch.cat([whole[:, 1:], whole[:, :1]], 1)  # landmarks stand one earlier, so not where they are expected
    blocks = model.blocks
    x = model.embedding(late)
    for block in blocks:
        x = block(x, late == 19)
    torch.testing.assert_close(model(late), model.head(model.norm(x)), atol=1e-12, rtol=0)


def test_gradients() -> None:
    layer = module(dim=4, num_heads=2, num_kv_heads=1, block_size=2)
    x = torch.randn(1, 7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    scores = torch.randn(1, 1, 7, 7, dtype=torch.float64, requires_grad=True)
    mask, is_landmark = torch.ones(7, 7, dtype=torch.bool).tril(), torch.arange(7) % 3 == 2
    assert torch.autograd.gradcheck(lambda s: landmark_grouped_softmax(s, is_landmark, mask), scores)


def test_refusals() -> None:
    for wrong in ({"block_size": 0}, {"top_k": 0}, {"top_k": 3, "capacity": 2}, {"selection": "best"}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            module(**wrong)
    with pytest.raises(ShapeError, match="is_landmark"):
        module()(torch.zeros(1, 5, 16, dtype=torch.float64), is_landmark=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ShapeError, match="is_landmark"):
        landmark_grouped_softmax(torch.zeros(1, 1, 3, 3), torch.zeros(4, dtype=torch.bool), torch.ones(3, 3).bool())
    with pytest.raises(ArgumentError, match="rest"):
        insert_landmarks(torch.zeros(1, 3, dtype=torch.long), 4, 9, rest=4)
    with pytest.raises(ArgumentError, match="landmark_id"):
        LandmarkGPT(20, dim=16, depth=1, num_heads=2, landmark_id=20)
    with pytest.raises(Unsupported, match="softmax_func"):
        LandmarkAttention.from_official({}, n_embd=16, n_head=2, softmax_func="nomem")
