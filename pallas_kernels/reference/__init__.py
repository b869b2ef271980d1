"""Every op in plain jnp: the oracle of the other backends, and the engine's backend on CPU."""

from pallas_kernels.ops import Ops
from pallas_kernels.reference.attention import paged_attention
from pallas_kernels.reference.cache import write_kv
from pallas_kernels.reference.matmul import grouped_matmul, quantized_matmul
from pallas_kernels.reference.sampling import sample


def supported(device) -> None:
    """Runs wherever XLA does."""
    return None


def make(device, interpret: bool) -> Ops:
    return Ops("reference", paged_attention, write_kv, sample, grouped_matmul, quantized_matmul)
