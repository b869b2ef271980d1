"""Where a model is: stages of layers, one behind the other, each on devices of its own that share each of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxpaged import sharding
from jaxpaged.axis import Axis
from jaxpaged.home import Piece, whole
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.placement import Placement
from jaxpaged.request import RequestError
from jaxpaged.sharding import Sharding

FIRST = ("embed", "positions", "embed_norm")  # what the first stage has beside its layers
LAST = ("norm", "head", "head_bias")


@dataclass(frozen=True)
class Parallel:
    """sharding: how each layer is shared. layers: of each stage; placements: its devices. ragged: see `Axis`."""

    sharding: Sharding
    layers: tuple[range, ...]
    placements: tuple[Placement, ...]
    ragged: bool = False

    @staticmethod
    def over(devices: Sequence[jax.Device], config: DecoderConfig, tensor: int = 1, pipeline: int = 1,
             experts: bool = False, ragged: bool = False) -> Parallel:  # fmt: skip
        """On the first `tensor * pipeline` devices. RequestError, with what would work, if there are too few or the model
        cannot be divided so."""
        sharding.check(config, tensor, experts)
        layers = sharding.stages(len(config.layers), pipeline)
        if tensor * pipeline > len(devices):
            raise RequestError(f"tensor_parallel_size={tensor} times pipeline_parallel_size={pipeline} takes "
                               f"{tensor * pipeline} devices, but there are {len(devices)}; use sizes whose product is at most "
                               "that.", "tensor_parallel_size")  # fmt: skip
        slices = [devices[at : at + tensor] for at in range(0, tensor * pipeline, tensor)]
        return Parallel(Sharding(config, tensor, experts), tuple(layers), tuple(map(Placement, slices)), ragged)

    @property
    def local(self) -> DecoderConfig:
        """The decoder that each device runs (its stage's layers of)."""
        return self.sharding.local

    @property
    def axis(self) -> Axis:
        """As programs see the devices that share a layer."""
        return Axis(self.sharding.size, ragged=self.ragged)

    def holds(self, stage: int, path: str) -> bool:
        """Is a leaf one of a stage's? A tied embedding is two stages'."""
        kind, _, rest = path.partition(".")
        if kind == "layers":
            return int(rest.partition(".")[0]) in self.layers[stage]
        last = stage == len(self.layers) - 1
        tied = kind == "embed" and self.sharding.config.tie and last
        return tied or (last if kind in LAST else stage == 0)

    def home(self, path: str) -> Placement:
        """The devices of the first stage that holds a leaf."""
        return next(place for stage, place in enumerate(self.placements) if self.holds(stage, path))

    def cut_axis(self, path: str, shape: Sequence[int]) -> int | None:
        """Along which a leaf of the whole model is cut."""
        cut = self.sharding.cut(path, tuple(shape))
        return None if cut is None else cut.axis

    # -- as `home.Home` --------------------------------------------------------------------------------------------------

    def pieces(self, path: str, shape: tuple[int, ...], sharding: Any = None) -> list[Piece]:
        place, cut = self.home(path), self.sharding.cut(path, shape)
        if cut is None:
            return [Piece(device, (whole(shape),), 0, shape) for device in place.own]
        at, found = cut.axis, []
        for device in place.own:
            ranges = cut.ranges(place.devices.index(device))
            regions = tuple((*whole(shape[:at]), pair, *whole(shape[at + 1 :])) for pair in ranges)
            found.append(Piece(device, regions, at, (*shape[:at], cut.length, *shape[at + 1 :])))
        return found

    def join(self, path: str, shape: tuple[int, ...], sharding: Any, parts: Sequence[jax.Array]) -> jax.Array:
        return self.home(path).join(parts, self.cut_axis(path, shape))
