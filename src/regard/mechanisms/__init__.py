"""Token mixers for sequences, one file each; `create` builds them by name."""

from regard.mechanisms.base import KV, Mechanism, select_batch, state_bytes
from regard.mechanisms.registry import create, from_official
from regard.mechanisms.softmax import SoftmaxAttention

__all__ = ["KV", "Mechanism", "SoftmaxAttention", "create", "from_official", "select_batch", "state_bytes"]
