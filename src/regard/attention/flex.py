"""torch's FlexAttention, compiled, on the block structure of the mask."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from regard.attention.blocks import structured
from regard.attention.partial import Partial
from regard.attention.problem import Problem
from regard.errors import Unsupported

BLOCK = 128  # the block size FlexAttention's own templates are tuned for
_RECOMPILE_LIMIT = 256  # every mask is its own kernel; past the limit torch would silently build the N x M matrix


def refuses(p: Problem, return_lse: bool) -> str | None:
    """Why this backend cannot solve the problem, or None."""
    if p.needs_grad and p.device.type == "cpu":
        return "compiled FlexAttention has no backward on the CPU"
    if return_lse and p.device.type == "cpu":
        return "compiled FlexAttention gives no log-sum-exp on the CPU"
    if p.query.dtype == torch.float64:
        return "compiled FlexAttention has no float64 kernel"
    return None


def run(p: Problem, return_lse: bool = False) -> Partial:
    """Attention with compiled FlexAttention; the first call for a mask compiles for seconds to minutes.

    Without ``return_lse`` the lse of the result is meaningless.

    Raises:
        Unsupported: see `refuses`; or the kernel does not compile here, for example for want of a C++ compiler.
    """
    if reason := refuses(p, return_lse):
        raise Unsupported(f"backend 'flex': {reason}; use backend='blocks'")
    tensors: tuple[Tensor, ...] = (p.query, p.key, p.value)
    if not p.needs_grad:  # it looks at requires_grad even where gradients are disabled
        tensors = tuple(t.detach() for t in tensors)
    bias = p.bias if p.bias is None or p.needs_grad else p.bias.detach()
    block_mask = None if p.mask is None else structured(p).to_flex(p.n, p.m, BLOCK, p.device)
    try:
        with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):
            result = _compiled()(
                *tensors,
                score_mod=None if bias is None else _adds(bias),
                block_mask=block_mask,
                scale=p.scale,
                enable_gqa=p.groups > 1,
                return_aux=AuxRequest(lse=True) if return_lse else None,
            )
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError, NotImplementedError) as error:
        summary = str(error).strip().partition("\n")[0]
        raise Unsupported(f"backend 'flex': torch could not compile FlexAttention here: {summary}") from error
    if return_lse:
        return Partial(result[0], result[1].lse)
    return Partial(_without_debris(p, result), p.query.new_empty(0))


def _without_debris(p: Problem, out: Tensor) -> Tensor:
    """Zeros for queries that see nothing: on CPU the kernel multiplies unwritten memory by zero there, perhaps NaN.

    NaNs of queries that do see keys come from the inputs and stay.
    """
    if p.device.type != "cpu" or p.mask is None:
        return out
    batch, head, query = out.isnan().any(-1).nonzero().unbind(1)
    if not len(query):
        return out
    rows = batch[:, None], head[:, None], query[:, None]
    allowed = structured(p)(rows[0], rows[1], rows[2], torch.arange(p.m)).broadcast_to(len(query), p.m)
    unseen = ~allowed.any(1)
    out = out.clone()
    out[batch[unseen], head[unseen], query[unseen]] = 0.0
    return out


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def _adds(bias: Tensor) -> Callable[..., Tensor]:
    """The bias as a ``score_mod``; dimensions of size one are read at 0."""
    keep = tuple(int(size > 1) for size in bias.shape)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        return score + bias[b * keep[0], h * keep[1], q_idx * keep[2], k_idx * keep[3]]

    return score_mod
