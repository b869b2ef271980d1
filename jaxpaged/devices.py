"""GPUs on paper: what their data sheets say, what of it is reached, and the description that XLA compiles for.

`device("h200")` is one that is known here; `device("mine.toml")` one that is described in a file, TOML or JSON: values for the
fields of `Device`, and `base`, a known one that has the others.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from jaxpaged.request import RequestError, refuse_unknown

LEAST, MOST = 1e-30, 1e30  # of any number: within them no time or rate that is worked out becomes infinite
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {d.shared_memory_core} threads_per_core_limit: {d.threads_core} core_count: {d.cores}
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {d.bandwidth:.0f} l2_cache_size: {d.l2} clock_rate_ghz: {d.clock} device_memory_size: {d.memory}
  shared_memory_per_block_optin: {d.shared_memory_block} cuda_compute_capability {{ {capability} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability {d.capability}" device_address_bits: 64
  ecc_enabled: true name: "{d.name}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{d.name}"
"""


@dataclass(frozen=True)
class Device:
    """One GPU. Rates are the data sheet's, dense (without sparsity); the efficiencies say how much of them is counted on.

    name: the driver's. memory: bytes, as the driver counts them. bandwidth: bytes a second of that memory. bfloat16, float32,
    float8, int8: FLOP/s (float8 0: it has none). link: bytes a second, one way, to the other devices of its host, and
    link_latency: seconds that a small message of all devices takes. cores: SMs. capability: as in "9.0a". l2 bytes, clock GHz,
    shared_memory_core and shared_memory_block bytes, threads_core: for the compiler.
    memory_efficiency, compute_efficiency: of an H200, measured: a copy reads and writes 4.3 of 4.8 TB/s, a product of bfloat16
    matrices of 8192 x 8192 reaches 790 of 989 TFLOP/s. Other devices: assumed to be as good. link_efficiency, link_latency and
    kernel_seconds (from one kernel to the next): assumed.
    """

    name: str
    memory: int
    bandwidth: float
    bfloat16: float
    float32: float
    float8: float
    int8: float
    link: float
    cores: int
    capability: str
    l2: int
    clock: float
    shared_memory_core: int
    shared_memory_block: int
    threads_core: int = 2048
    link_latency: float = 10e-6
    memory_efficiency: float = 4.3 / 4.8
    compute_efficiency: float = 790 / 989
    link_efficiency: float = 0.8
    kernel_seconds: float = 2e-6

    @property
    def architecture(self) -> str:
        """As ptxas calls it."""
        return "sm_" + self.capability.replace(".", "")

    @property
    def target_config(self) -> str:
        """The text that XLA takes for a device that is not here."""
        major, _, minor = self.capability.rstrip("a").partition(".")
        parts = [f"major: {major}", *([f"minor: {minor}"] if minor != "0" else []),
                 *(["feature_extension: ACCELERATED_FEATURES"] if self.capability.endswith("a") else [])]  # fmt: skip
        return _TARGET.format(d=self, capability=" ".join(parts))

    def flops(self, dtype: str) -> float:
        """FLOP/s that products of `dtype` reach."""
        return (self.float32 if dtype == "float32" else self.bfloat16) * self.compute_efficiency

    @property
    def stream(self) -> float:
        """Bytes a second that memory reaches."""
        return self.bandwidth * self.memory_efficiency

    @property
    def send(self) -> float:
        """Bytes a second that the link reaches."""
        return self.link * self.link_efficiency


# Rates: NVIDIA's data sheets of H100 SXM, H200 SXM, HGX B200, A100 80GB SXM and L40S; NVLink's are both ways together there
# (900, 900, 1800, 600 GB/s; L40S: PCIe 4.0 x16, 64 GB/s). Memory sizes and what the compiler wants: openxla/xla,
# xla/backends/gpu/target_config/specs; L40S, which is not there: nvidia-smi's size.
DEVICES = {
    "h100": Device("NVIDIA H100 80GB HBM3", 84_942_979_072, 3.35e12, 989e12, 67e12, 1979e12, 1979e12, 450e9, 132, "9.0a",
                   52_428_800, 1.98, 233_472, 232_448),
    "h200": Device("NVIDIA H200", 151_397_597_184, 4.8e12, 989e12, 67e12, 1979e12, 1979e12, 450e9, 132, "9.0a",
                   52_428_800, 1.98, 233_472, 232_448),
    "b200": Device("NVIDIA B200", 191_514_411_008, 7.7e12, 2250e12, 75e12, 4500e12, 4500e12, 900e9, 148, "10.0a",
                   132_644_864, 1.965, 233_472, 232_448),
    "a100": Device("NVIDIA A100-SXM4-80GB", 85_100_068_864, 2.039e12, 312e12, 19.5e12, 0.0, 624e12, 300e9, 108, "8.0",
                   41_943_040, 1.41, 167_936, 166_912),
    "l40s": Device("NVIDIA L40S", 48_305_799_168, 864e9, 362e12, 91.6e12, 733e12, 733e12, 32e9, 142, "8.9",
                   100_663_296, 2.52, 102_400, 101_376, threads_core=1536, link_latency=30e-6),
}  # fmt: skip


def device(name: str) -> Device:
    """One of DEVICES, or of a file. RequestError says which there are."""
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    path = Path(name)
    if path.suffix in (".toml", ".json"):
        return _described(path, _read(path))
    raise RequestError(
        f"device must be one of {', '.join(DEVICES)}, or a .toml or .json file of one's own; got {name!r}.", "device"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read as a device: {error}", "device") from None
    if not isinstance(found, dict):
        raise RequestError(f"{path} must hold names and values of a device, not a {type(found).__name__}.", "device")
    return found


def _described(path: Path, values: dict[str, Any]) -> Device:
    base = values.pop("base", None)
    if base is not None and base not in list(DEVICES):  # a list: whatever the file has there can be looked for
        raise RequestError(f"{path}: base must be one of {', '.join(DEVICES)}; got {base!r}.", "device")
    refuse_unknown(f"{path}: a device", values, ["base", *(f.name for f in fields(Device))])
    given = {f.name: _checked(path, f, values[f.name]) for f in fields(Device) if f.name in values}
    if base is not None:
        return replace(DEVICES[base], **given)
    lacking = [f.name for f in fields(Device) if f.default is MISSING and f.name not in given]
    if lacking:
        raise RequestError(
            f"{path} lacks {', '.join(lacking)}; give them, or a base that has them: {', '.join(DEVICES)}.", "device"
        )
    return Device(**given)


def _checked(path: Path, field: Any, value: Any) -> Any:
    """A value of the field's type; numbers are above 0, efficiencies at most 1, sizes whole."""
    if field.type == "str":
        if isinstance(value, str):
            return value
        raise RequestError(f"{path}: {field.name} must be a text, got {value!r}.", "device")
    if not _is_number(field, value):
        kind = "a whole number" if field.type == "int" else "a number"
        most = 1 if field.name.endswith("_efficiency") else f"{MOST:g}"
        raise RequestError(f"{path}: {field.name} must be {kind} above 0 and at most {most}, got {value!r}.", "device")
    return int(value) if field.type == "int" else float(value)


def _is_number(field: Any, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if value == 0:
        return field.name in ("float8", "kernel_seconds", "link_latency")
    most = 1.0 if field.name.endswith("_efficiency") else MOST
    return LEAST <= value <= most and (field.type != "int" or value % 1 == 0)
