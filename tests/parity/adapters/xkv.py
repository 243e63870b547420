"""xKV: reconstructed and rotated keys, values, one decoding step, and the MiniCache baseline."""

from collections.abc import Iterable

import torch

from regard.cache import GroupedLayer, TrackedLayer, minicache_merge
from regard.methods.language.xkv import XKV
from regard.positions import rotate
from regard.sites import Site, Step
from tests.parity.harness import Comparison, Golden


def check(golden: Golden) -> Iterable[Comparison]:
    kwargs, inputs = golden.kwargs, golden.inputs
    names = ("rank_k", "rank_v", "group_size", "start_layer", "end_layer", "merge_key", "merge_value")
    method = XKV(sink_size=0, **{name: kwargs[name] for name in names if name in kwargs})
    cos, sin = inputs["cos"][:, None], inputs["sin"][:, None]
    tokens = cos.shape[2]

    sites = [Site(i, i, f"layers.{i}", torch.nn.Identity()) for i in range(kwargs["num_layers"])]
    layers = [TrackedLayer(raw_keys=True) for _ in sites]
    acting = [site for site in sites if method.acts_on(site)]
    for site, layer in zip(acting, method.new_layers(acting), strict=True):
        layers[site.index] = layer

    for i, layer in enumerate(layers):
        layer.begin(Step(torch.arange(tokens)[None], cos, sin))
        layer.update(rotate(inputs[f"key.{i}"], cos, sin), inputs[f"value.{i}"])
        if isinstance(layer, GroupedLayer):
            layer.compress(tokens)
    for i, layer in enumerate(layers):
        grouped = isinstance(layer, GroupedLayer)
        key, value = (layer.whole(name) if grouped else getattr(layer, name) for name in ("keys", "values"))
        yield golden.compare(f"key.{i}", rotate(key, cos, sin), atol=1e-4)
        yield golden.compare(f"value.{i}", value, atol=1e-4)

    # the step's key comes rotated already, by an angle the file does not tell: any will do, so none
    one, zero = torch.ones_like(cos[:, :, :1]), torch.zeros_like(sin[:, :, :1])
    layers[0].begin(Step(torch.tensor([[tokens]]), one, zero))
    key, value = layers[0].update(inputs["decode_key_layer0_roped"], inputs["decode_value_layer0"])
    angles = torch.cat((cos, one), dim=2), torch.cat((sin, zero), dim=2)
    yield golden.compare("decode_key_layer0", rotate(key, *angles), atol=1e-4)
    yield golden.compare("decode_value_layer0", value, atol=1e-4)

    merged = minicache_merge(inputs["key.0"], inputs["key.1"], kwargs["slerp_t"], kwargs["slerp_gamma"])
    for i, key in enumerate(merged):
        yield golden.compare(f"slerp_key.{i}", key, atol=1e-4)
