"""A small configuration and an image size of every backbone, by its name in the catalogue."""

from typing import Any

SMALL: dict[str, tuple[dict[str, Any], int]] = {
    "mala/model": ({"in_chans": 2, "dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}, 64),
    "l2vit/model": ({"in_chans": 1, "dims": (8, 16), "depths": (2, 1), "num_heads": (1, 2), "window_size": 3}, 32),
    "shvit": (
        {"in_chans": 2, "dims": (8, 12), "depths": (1, 2), "partial_dims": (4, 5), "attention": (False, True)},
        64,
    ),
    "maxvit": (
        {
            "in_chans": 2,
            "embed_dims": (8, 16),
            "depths": (1, 1),
            "stem_width": 4,
            "partition_size": 2,
            "head_hidden": 12,
            "attention": {"head_dim": 4},
        },
        32,
    ),
    "cas-vit": ({"in_chans": 2, "dims": (8, 12), "depths": (1, 2), "mlp_ratio": 2, "distillation": False}, 32),
    "spectformer": (
        {"in_chans": 2, "img_size": 32, "patch_size": 8, "dim": 8, "depth": 3, "alpha": 2, "num_heads": 2},
        32,
    ),
    "spectformer/h": (
        {"in_chans": 2, "img_size": 32, "dims": (8, 12), "depths": (1, 2), "num_heads": (1, 2), "spectral_stages": 1},
        32,
    ),
    "gc-vit": (
        {
            "in_chans": 2,
            "dim": 8,
            "depths": (2, 2),
            "num_heads": (1, 2),
            "window_size": (2, 4),
            "resolution": 32,
            "layer_scale": 0.5,
        },
        32,
    ),
    "dinat": (
        {
            "in_chans": 2,
            "embed_dim": 8,
            "depths": (2, 1),
            "num_heads": (1, 2),
            "kernel_size": 3,
            "dilations": ((1, 2), (1,)),
            "layer_scale": 0.5,
        },
        32,
    ),
    "davit": (
        {"in_chans": 2, "embed_dims": (8, 16), "depths": (1, 1), "num_heads": (2, 4), "window_size": 3},
        32,
    ),
    "overlock": (
        {
            "in_chans": 2,
            "dims": (8, 8, 16, 16),
            "depths": (1, 1, 1, 1),
            "sub_depths": (1, 1),
            "kernel_sizes": (5, 5, 5, 5),
            "small_kernel_size": 3,
            "num_heads": (2, 1),
            "projection": 24,
        },
        64,
    ),
    "crossformer": (
        {
            "in_chans": 2,
            "embed_dim": 16,
            "depths": (2, 1),
            "num_heads": (2, 2),
            "group_size": (3, 2),
            "interval": (2, 1),
            "patch_size": (4, 8),
            "merge_size": ((2, 4),),
        },
        32,
    ),
    "halonet": (
        {
            "in_chans": 2,
            "dims": (8, 16),
            "depths": (1, 2),
            "strides": (1, 2),
            "halo": ((True,), (True, False)),
            "num_heads": 2,
            "block_size": 2,
            "halo_size": 1,
            "stem_dim": 8,
            "projection": 12,
        },
        32,
    ),
    "s2aformer": (
        {"in_chans": 2, "dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2), "sr_ratios": (4, 2)},
        32,
    ),
    "favit": (
        {
            "in_chans": 2,
            "embed_dims": (16, 32),
            "num_heads": (1, 2),
            "mlp_ratios": (2, 2),
            "depths": (1, 1),
            "sr_ratios": (2, 1),
            "window_size": 3,
        },
        32,
    ),
    "tic-msa-conv/model": (
        {"in_chans": 2, "dims": (8, 16), "depths": (2, 1), "num_heads": (1, 2)},
        32,
    ),
    "transnext": (
        {
            "in_chans": 2,
            "embed_dims": (8, 16),
            "num_heads": (1, 2),
            "mlp_ratios": (3, 2),
            "depths": (1, 1),
            "sr_ratios": (4, 1),
            "pretrain_size": 32,
        },
        32,
    ),
    "ppma": (
        {
            "in_chans": 2,
            "embed_dims": (8, 16),
            "depths": (1, 1),
            "num_heads": (1, 2),
            "mlp_ratios": (2, 2),
            "forms": ("chunk", "whole"),
            "projection": 24,
            "layer_scale": (None, 0.5),
        },
        32,
    ),
    "duoformer/resnet": ({"in_chans": 2, "dims": (8, 16), "depths": (1, 2), "stem_dim": 8}, 32),
    "segman": (
        {
            "in_chans": 2,
            "image_size": 40,
            "embed_dims": (8, 16),
            "depths": (1, 1),
            "num_heads": (1, 2),
            "kernel_sizes": (5, 3),
            "global_stages": (False, True),
            "mlp_ratios": (2, 2),
            "projection": 24,
            "layer_scale": (None, 0.5),
        },
        32,
    ),
    "dualtoken-vit": (
        {
            "in_chans": 2,
            "embed_dims": (8, 16),
            "depths": (1, 1),
            "num_heads": (1, 2),
            "mlp_ratios": (2, 2),
            "token_grid": (2, 2),
        },
        32,
    ),
}
