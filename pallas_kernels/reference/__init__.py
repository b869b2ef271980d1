"""Every op in plain jnp: the oracle of the other backends, and the engine's backend on CPU."""

from pallas_kernels.ops import Ops
from pallas_kernels.reference.attention import paged_attention
from pallas_kernels.reference.cache import write_kv

OPS = Ops("reference", paged_attention, write_kv)


def supported(device) -> None:
    """Runs wherever XLA does."""
    return None
