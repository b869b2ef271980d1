"""Block sizes of the Hopper attention kernels: what may be set, what fits into an SM, and what was measured to be good."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

SHARED_MEMORY = 232_448  # bytes that a block may have on Hopper
M = 64  # rows of a wgmma: the heads of a group, or packed queries, are padded to it
OUT_COLUMNS = 64  # the decode kernel hands its accumulator to memory in pieces of so many columns
_OVERHEAD = 5120  # bytes: barriers, log-sum-exps and what Mosaic reserves for reductions and alignment


def _refuse(name: str, rules: dict[str, bool]) -> None:
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ValueError(f"{name}: " + "; ".join(broken) + ".")


@dataclass(frozen=True)
class DecodeConfig:
    """tile: tokens a step of the walk. stages: tiles of keys and of values in shared memory, a pair. split_size: tokens an
    item of work (the kernel raises it where a sequence would have too many). pairs: of a producer and a consumer warpgroup
    in a CTA. num_ctas: of the persistent grid; one fits on an SM."""

    tile: int = 64
    stages: int = 2
    split_size: int = 512
    pairs: int = 2
    num_ctas: int = 132

    def __post_init__(self) -> None:
        _refuse("DecodeConfig", {
            f"tile must be 64, 128 or 256, is {self.tile}": self.tile in (64, 128, 256),
            f"stages must be >= 2, is {self.stages}": self.stages >= 2,
            f"split_size {self.split_size} must be a multiple of tile {self.tile}": self.split_size > 0
            and self.split_size % self.tile == 0,
            f"pairs must be 1 or 2, is {self.pairs}": self.pairs in (1, 2),
            f"num_ctas must be >= 1, is {self.num_ctas}": self.num_ctas >= 1,
        })  # fmt: skip


@dataclass(frozen=True)
class PrefillConfig:
    """block_q: rows (queries times heads of a group) a compute warpgroup; block_kv: tokens a step; stages: such blocks of keys
    and of values in shared memory; num_ctas: of the persistent grid; one fits on an SM."""

    block_q: int = 64
    block_kv: int = 128
    stages: int = 2
    num_ctas: int = 132

    def __post_init__(self) -> None:
        _refuse("PrefillConfig", {
            f"block_q must be {M}, is {self.block_q}": self.block_q == M,
            f"block_kv must be 64, 128 or 256, is {self.block_kv}": self.block_kv in (64, 128, 256),
            f"stages must be >= 2, is {self.stages}": self.stages >= 2,
            f"num_ctas must be >= 1, is {self.num_ctas}": self.num_ctas >= 1,
        })  # fmt: skip


@dataclass(frozen=True)
class TuningConfig:
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    prefill: PrefillConfig = field(default_factory=PrefillConfig)


class Shape(NamedTuple):
    """What a measurement is of. dtype: its name."""

    H: int
    G: int
    D: int
    page_size: int
    dtype: str


# jax.Device.device_kind -> shape -> configuration. A row gets in only with a measurement on that device, which the commit
# that adds it shows. Nothing has been measured so far: every shape takes `default`, which was reasoned, not timed.
CONFIGURATIONS: dict[str, dict[Shape, TuningConfig]] = {}


def configuration(device_kind: str, H: int, G: int, D: int, page_size: int, dtype: DTypeLike) -> TuningConfig:
    """The measured configuration of a shape, else the default of its head dim.

    device_kind "cpu" is JAX's interpreter, which takes seconds a CTA, whatever the CTA has to do: there one does everything.
    Raises: NotImplementedError if it needs more shared memory than there is."""
    shape = Shape(H, G, D, page_size, jnp.dtype(dtype).name)
    config = CONFIGURATIONS.get(device_kind, {}).get(shape) or default(D)
    if device_kind == "cpu":
        config = TuningConfig(replace(config.decode, pairs=1, num_ctas=1), replace(config.prefill, num_ctas=1))
    check_shared_memory("decode", decode_shared_memory(config.decode, D))
    check_shared_memory("prefill", prefill_shared_memory(config.prefill, D))
    return config


def default(D: int) -> TuningConfig:
    """What fits, with enough on the way.

    Decode: at 4.3 TB/s over 132 SMs and about 1 us of latency an SM must have 33 KB under way at all times, better 64, also
    while a consumer holds one of its stages: the rings hold 128 to 144 KB. Two pairs as long as both have two stages.
    Prefill: FlashAttention-3's blocks where they fit."""
    decode = {
        64: DecodeConfig(tile=128, stages=2, pairs=2),
        128: DecodeConfig(tile=64, stages=2, pairs=2),
        192: DecodeConfig(tile=64, stages=3, pairs=1),
    }
    prefill = PrefillConfig(block_kv=128 if D <= 128 else 64)
    return TuningConfig(decode.get(D) or DecodeConfig(tile=64, stages=2, pairs=1), prefill)


def decode_shared_memory(config: DecodeConfig, D: int) -> int:
    """Bytes a CTA of the decode kernel needs, for a 16-bit cache of head dim D."""
    ring = config.stages * 2 * config.tile * D * 2
    return config.pairs * (ring + M * D * 2 + M * OUT_COLUMNS * 4) + _OVERHEAD


def prefill_shared_memory(config: PrefillConfig, D: int) -> int:
    """Bytes a CTA of the prefill kernel needs: two compute warpgroups' queries (whose place the outputs take) and the ring."""
    return 2 * config.block_q * D * 2 + config.stages * 2 * config.block_kv * D * 2 + _OVERHEAD


def check_shared_memory(kernel: str, needed: int) -> None:
    if needed > SHARED_MEMORY:
        raise NotImplementedError(
            f"mosaic_gpu's {kernel} kernel needs {needed:,} bytes of shared memory with this configuration, an SM has "
            f"{SHARED_MEMORY:,}: take smaller tiles or fewer stages, or triton"
        )
