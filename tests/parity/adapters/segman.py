"""SegMAN: the three mixers, the encoder with its stages, and the decoder."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

import regard
from tests.parity.harness import Comparison, Golden

ATOL, RTOL = 1e-4, 1e-4


def check(golden: Golden) -> Iterable[Comparison]:
    def compare(name: str, got: Tensor) -> Comparison:
        return golden.compare(name, got, ATOL + RTOL * golden.outputs[name].std().item())

    config, heads = golden.kwargs["encoder"], golden.kwargs["encoder"]["num_heads"]
    model = regard.from_official("segman", golden.state("enc."), **config).eval()
    x = golden.inputs["x"]
    yield compare("logits", model(x))
    for i, stage in enumerate(model.forward_features(x)):
        yield compare(f"stage{i}", stage.movedim(-1, 1))

    def mixer(stage: int) -> Any:
        size = config["image_size"]
        sides = (size, size) if isinstance(size, int) else size
        return regard.from_official(
            "segman",
            golden.state(f"enc.layers.{2 * stage}.blocks.0.token_mixer."),
            variant="lass",
            embed_dim=config["embed_dims"][stage],
            num_heads=heads[stage],
            window_size=config["window_size"][stage],
            window_dilation=config.get("window_dilation", (1,) * 4)[stage],
            global_mode=stage == 3,
            image_size=[side // 2 ** (stage + 2) for side in sides],
            use_rpb=config.get("use_rpb", False),
        ).eval()

    for name, stage in (("local", 1), ("global", 3)):
        yield compare(name, mixer(stage)(golden.inputs[f"{name}_x"].movedim(1, -1)).movedim(-1, 1))
    u = golden.inputs["ssm_x"]
    scan = regard.from_official(
        "segman", golden.state("enc.layers.2.blocks.0.token_mixer.ssm."), variant="scan", d_model=u.shape[1]
    )
    yield compare("ssm", scan(u.movedim(1, -1)).movedim(-1, 1).flatten(2))
    features = [golden.inputs[f"dec_feat{i}"] for i in range(4)]
    decoder = regard.from_official(
        "segman",
        golden.state("dec."),
        variant="decoder",
        in_channels=[c.shape[1] for c in features],
        **golden.kwargs["decoder"],
    )
    yield compare("seg", decoder.eval()(features))
