"""Grid masks against NATTEN's own masks and outputs, and against each other."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from regard import masks

GOLDEN = Path(__file__).parent / "golden" / "natten.safetensors"


def golden_cases(name: str) -> list[tuple[str, dict]]:
    with safe_open(GOLDEN, "pt") as file:
        return list(json.loads(file.metadata()[name]).items())


@pytest.mark.parametrize(("case", "kwargs"), golden_cases("generalized"))
def test_neighborhood_is_nattens_mask(case: str, kwargs: dict) -> None:
    with safe_open(GOLDEN, "pt") as file:
        expected = file.get_tensor(f"out/{case}.mask").bool()
    mask = masks.neighborhood(
        kwargs["shape"], kwargs["window_size"], kwargs["dilation"], kwargs["stride"], kwargs["is_causal"]
    )
    assert torch.equal(mask.dense(len(expected)), expected)


@pytest.mark.parametrize(("case", "kwargs"), golden_cases("fused"))
def test_attention_in_a_neighborhood_is_nattens(case: str, kwargs: dict) -> None:
    with safe_open(GOLDEN, "pt") as file:
        q, k, v = (file.get_tensor(f"in/{case}.{name}") for name in ("query", "key", "value"))
        expected = file.get_tensor(f"out/{case}.y")
    grid = q.shape[2:-1]
    mask = masks.neighborhood(tuple(grid), kwargs["kernel_size"], kwargs["dilation"], causal=kwargs["is_causal"])
    allowed = mask.dense(grid.numel())
    out = torch.nn.functional.scaled_dot_product_attention(*(x.flatten(2, -2) for x in (q, k, v)), attn_mask=allowed)
    torch.testing.assert_close(out.view_as(expected), expected, atol=1e-5, rtol=0)


def test_special_cases_of_neighborhoods() -> None:
    n = 6 * 8
    assert torch.equal(
        masks.neighborhood((6, 8), (3, 4), stride=(3, 4)).dense(n), masks.windows((6, 8), (3, 4)).dense(n)
    )
    assert masks.neighborhood((6, 8), (6, 8)).dense(n).all()
    assert torch.equal(masks.neighborhood((20,), 5, causal=True).dense(20), masks.sliding_window(5, True).dense(20))
    assert (masks.neighborhood((9, 7), (4, 3), (2, 2)).dense(63).sum(-1) == 12).all()


def test_special_cases_of_windows() -> None:
    assert torch.equal(masks.halo((6, 8), (3, 4), 0).dense(48), masks.windows((6, 8), (3, 4)).dense(48))
    assert torch.equal(masks.halo((20,), 1, 3).dense(20), masks.sliding_window(4).dense(20))
    assert masks.shifted_windows((6, 8), 4) == masks.shifted_windows((6, 8), 4, 2)
    assert torch.equal(masks.shifted_windows((6, 8), 4, 0).dense(48), masks.windows((6, 8), 4).dense(48))


def test_rows_and_columns_of_an_image() -> None:
    rows = masks.product((3, 4), [masks.band(0, 0), masks.full()])
    assert rows.dense(12)[5].nonzero().flatten().tolist() == [4, 5, 6, 7]
    columns = masks.product((3, 4), [masks.full(), masks.band(0, 0)])
    assert columns.dense(12)[5].nonzero().flatten().tolist() == [1, 5, 9]
    assert (rows | columns).density(12) == 6 / 12
