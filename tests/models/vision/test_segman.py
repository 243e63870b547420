"""SegMAN: published sizes and cost, the decoder step by step, segmentation networks, what is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.linear import ScanResult
from regard.mechanisms.grid import lass, selective
from regard.models.vision.segman import SegMANEncoder
from regard.models.vision.segman_decoder import SegMAN, SegMANDecoder
from tests.models.vision.counts import millions
from tests.parity.harness import Golden

GOLDEN = Path(__file__).parents[2] / "parity" / "golden" / "segman.safetensors"
TINY = {
    "image_size": 32,
    "embed_dims": (8, 8, 8, 8),
    "depths": (1,) * 4,
    "num_heads": (1, 2, 1, 2),
    "kernel_sizes": (5, 3, 1, 1),
    "mlp_ratios": (2,) * 4,
}


@pytest.mark.parametrize(
    ("name", "parameters", "encoder"),
    [("tiny", 6.4, 3.506), ("small", 29.4, 25.508), ("base", 51.8, 45.021), ("large", 92.6, 80.985)],
)
def test_published_parameters(name: str, parameters: float, encoder: float) -> None:
    """Those of the networks are the paper's, those of the encoders alone follow from the published code."""
    assert millions(f"segman-{name}") == pytest.approx(parameters, rel=0.01)
    assert millions(f"segman-encoder-{name}") == pytest.approx(encoder, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "macs", "tolerance"),
    [("tiny", 6.2, 0.03), ("small", 25.3, 0.01), ("base", 58.1, 0.01), ("large", 97.1, 0.01)],
)
def test_published_multiply_adds(name: str, macs: float, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 512 × 512 by the published rule: windows per visible pair, 10 for a step of a scan, 5 and 2 for norms.

    The paper says 6.2 for the smallest network, where this gives 6.04.
    """
    extra = [0]

    def counted(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, dilation: int, rpb: Tensor) -> Tensor:
        extra[0] += 2 * q.numel() * kernel_size**2
        return v

    def steps(u: Tensor, *_: Tensor) -> ScanResult:
        extra[0] += 10 * u.numel()
        return ScanResult(u, u)

    def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT + bias).softmax(-1) @ v

    monkeypatch.setattr(lass, "neighborhood_attention", counted)
    monkeypatch.setattr(lass, "attention", dense)
    monkeypatch.setattr(selective, "selective_scan", steps)
    with torch.device("meta"):
        model, images = regard.create(f"segman-{name}").eval(), torch.empty(1, 3, 512, 512)

    def norm(module: nn.Module, _: object, out: Tensor) -> None:
        extra[0] += out.numel() * (5 if isinstance(module, nn.LayerNorm) else 2)

    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            module.register_forward_hook(norm)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert (counter.get_total_flops() / 2 + extra[0]) / 1e9 == pytest.approx(macs, rel=tolerance)


def test_the_decoder_is_its_equations() -> None:
    torch.manual_seed(0)
    decoder = SegMANDecoder((3, 4, 5, 6), channels=2, feat_dim=3, num_classes=5).double().eval()
    for part in decoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    features = [torch.randn(2, 3 + i, 16 // 2**i, 24 // 2**i, dtype=torch.float64) for i in range(4)]

    def conv(layer: nn.Sequential, x: Tensor, **around: int) -> Tensor:
        (weight, bn) = layer[0].conv.weight, layer[0].bn
        weight = weight if weight.dim() == 4 else weight[..., None, None]
        x = F.conv2d(x, weight, **around)
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias).relu()

    def wide(x: Tensor) -> Tensor:
        return F.interpolate(x, (8, 12), mode="bilinear")

    f = [
        wide(torch.einsum("bchw,dc->bdhw", c, layer.weight) + layer.bias[:, None, None])
        for c, layer in zip(features[1:], decoder.linear, strict=True)
    ]
    x = conv(decoder.fuse, torch.cat([f[2], f[1], f[0]], 1))
    half = conv(decoder.halve, x, stride=2, padding=1)
    quarter = conv(decoder.shrink, x, stride=4, padding=1)

    def unshuffled(t: Tensor, n: int) -> Tensor:
        pieces = [t[:, c, i::n, j::n] for c in range(t.shape[1]) for i in range(n) for j in range(n)]
        return torch.stack(pieces, 1)

    three = [unshuffled(x, 4), unshuffled(half, 2), quarter]
    m = torch.cat([conv(layer, t) for layer, t in zip(decoder.reduce, three, strict=True)], 1)
    assert m.shape == (2, 6, 2, 3)
    m = wide(decoder.block(m.movedim(1, -1)).movedim(-1, 1))
    g = conv(decoder.scanned, m)
    mean = conv(decoder.pooled, x.mean((2, 3), keepdim=True)).expand(-1, -1, 8, 12)
    y = conv(decoder.join, torch.cat([conv(decoder.short, x), mean, m, *(g + each for each in f)], 1))
    want = torch.einsum("bchw,dc->bdhw", y, decoder.head.weight) + decoder.head.bias[:, None, None]
    torch.testing.assert_close(decoder(features), want)


def test_published_segmentation_networks_load(tmp_path: Path) -> None:
    golden = Golden.read(GOLDEN)
    state = {f"backbone.{k}": t for k, t in golden.state("enc.").items() if not k.startswith("classifier.")}
    state |= {f"decode_head.{k}": t for k, t in golden.state("dec.").items()}
    model = regard.from_official("segman", state, variant="segmenter", **golden.kwargs).eval()
    torch.manual_seed(0)
    images = torch.randn(1, 3, 128, 160)  # the table was made for 96
    encoder = SegMANEncoder.from_official(golden.state("enc."), **golden.kwargs["encoder"]).eval()
    maps = [x.movedim(-1, 1) for x in encoder.forward_features(images)]
    channels = {"in_channels": encoder.channels}
    decoder = SegMANDecoder.from_official(golden.state("dec."), **channels, **golden.kwargs["decoder"]).eval()
    got = model(images)
    assert got.shape == (1, golden.kwargs["decoder"]["num_classes"], 16, 20)
    torch.testing.assert_close(got, decoder(maps))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(SegMAN.from_pretrained(tmp_path).eval()(images), got, atol=0, rtol=0)
    with pytest.raises(ArgumentError, match="auxiliary"):
        SegMAN.from_official(state | {"auxiliary.weight": images}, **golden.kwargs)


def test_segmentation_networks_train_and_compile() -> None:
    torch.manual_seed(0)
    model = SegMAN(num_classes=3, channels=4, feat_dim=4, encoder=TINY)
    images = torch.randn(2, 3, 64, 64)
    model(images).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    want = model(images)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), want, atol=1e-5, rtol=1e-4)


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="kernel_sizes"):
        SegMANEncoder(**TINY | {"kernel_sizes": (3, 3)})
    with pytest.raises(ShapeError, match="images: expected 5 or more tokens a side in stage 0"):
        SegMANEncoder(**TINY)(torch.randn(1, 3, 64, 16))
    with pytest.raises(Unsupported, match="fused_na"):
        SegMANEncoder.from_official({}, fused_na=True)
    with pytest.raises(ShapeError, match="images: expected sides in multiples of 32"):
        SegMAN(channels=4, feat_dim=4, encoder=TINY)(torch.randn(1, 3, 64, 40))
    decoder = SegMANDecoder((4, 4, 4, 4), channels=4, feat_dim=4)
    with pytest.raises(ArgumentError, match="in_channels"):
        SegMANDecoder((4, 4, 4))
    with pytest.raises(ShapeError, match="features: expected"):
        decoder([torch.randn(1, 4, 8, 8)] * 3)
    with pytest.raises(ShapeError, match="multiples of 4"):
        decoder([torch.randn(1, 4, 6, 8)] * 4)
    with pytest.raises(Unsupported, match="align_corners"):
        SegMANDecoder.from_official(
            {}, in_channels=(4,) * 4, channels=4, feat_proj_dim=4, num_classes=2, align_corners=True
        )
