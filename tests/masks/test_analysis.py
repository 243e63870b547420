"""Density and receptive fields, against counting and matrix powers."""

import pytest
import torch

from regard import masks
from regard.errors import ArgumentError
from regard.masks import Mask

N = 1 << 20


@pytest.mark.parametrize(
    ("mask", "pairs"),
    [
        (masks.full(), N * N),
        (masks.causal(), N * (N + 1) // 2),
        (masks.sliding_window(4096, causal=True), N * 4096 - 4096 * 4095 // 2),
        (masks.strided(1000), sum((1 if d == 0 else 2) * (N - d) for d in range(0, N, 1000))),
        (masks.power(), sum(N - d for d in (0, *(1 << e for e in range(20))))),
        (masks.causal() & ~masks.strided(2), sum(N - d for d in range(1, N, 2))),
        (masks.documents([1000] * 1048 + [576]), 1048 * 1000**2 + 576**2),
        (masks.neighborhood((1024, 1024), (17, 33), dilation=2), N * 17 * 33),
        (masks.windows((1024, 1024), 16), N * 256),
        (~masks.windows((1024, 1024), 16), N * (N - 256)),
    ],
    ids=repr,
)
def test_density_of_a_million_tokens_is_exact(mask: Mask, pairs: int) -> None:
    assert mask.density(N) == pairs / N**2


def test_density_of_mixed_blocks_is_counted_pair_by_pair() -> None:
    mask = masks.per_head([masks.sinks(3), masks.causal() & masks.documents([300, 100, 233])]) & masks.causal()
    assert mask.density(633) == pytest.approx(mask.dense(633).double().mean().item(), abs=1e-12)


@pytest.mark.parametrize(
    "mask",
    [
        masks.power(),
        masks.causal() & masks.dilated(3, 2),
        masks.sliding_window(3) | masks.sinks(2),
        masks.per_head([masks.strided(5), masks.sliding_window(2, causal=True)]),
        ~masks.full(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("n", [1, 63, 64, 100])
def test_receptive_field_is_a_boolean_matrix_power(mask: Mask, n: int) -> None:
    one_layer = mask.dense(n).reshape(-1, n, n).any(0) | torch.eye(n, dtype=torch.bool)
    reach = torch.eye(n)
    for layers in range(5):
        assert torch.equal(mask.receptive_field(layers, n), reach > 0)
        reach = (one_layer.float() @ reach > 0).float()


def test_receptive_fields_of_batch_items_differ() -> None:
    valid = torch.tensor([[True] * 6, [False] * 3 + [True] * 3])
    field = (masks.causal() & masks.padding(valid)).receptive_field(6, 6)
    assert field.shape == (2, 6, 6)
    assert torch.equal(field[0], torch.ones(6, 6).tril().bool())
    assert not field[1, 5, 0]


@pytest.mark.parametrize(("n", "layers", "keys", "window_layers"), [(64, 6, 7, 11), (256, 8, 9, 32)])
def test_power_attention_reaches_everything_in_log_n_layers(n: int, layers: int, keys: int, window_layers: int) -> None:
    assert masks.power().min_layers(n) == layers
    assert masks.power().dense(n).sum(-1).max() == keys
    assert masks.sliding_window(keys, causal=True).min_layers(n) == window_layers
    assert (masks.causal() & masks.dilated(keys, 2)).min_layers(n) is None  # odd distances are never reached


def test_layers_to_hear_everything() -> None:
    assert masks.full().min_layers(1) == 0
    assert masks.causal().min_layers(50) == 1
    assert masks.sliding_window(2).min_layers(50) == 49
    assert (masks.band(0, 0) | masks.sinks(1)).min_layers(50) is None
    with pytest.raises(ArgumentError, match="layers"):
        masks.causal().receptive_field(-1, 8)
