"""The devices that share each layer, as a program inside `shard_map` sees them; of one device, nothing is said to anybody.

Megatron's scheme (Shoeybi et al. 2019): each device computes some heads and some of the MLP's width, and what it gets is its
share of a sum. `reduce` adds the shares up. With `sequence` (Korthikanti et al. 2022) each device keeps some tokens of the sum
only, normalises those, and `gather` brings them together again before the next products: as many bytes, less work.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

NAME = "tp"  # of the mesh axis


class Axis(NamedTuple):
    """size: devices, N. sequence: between layers, each has some of the tokens. ragged: where experts are on devices of their
    own, tokens are sent to those that have theirs, if each device has some of the tokens (`sequence`)."""

    size: int = 1
    sequence: bool = False
    ragged: bool = False

    def index(self) -> Array:
        """int32: which of the devices this is."""
        return lax.axis_index(NAME) if self.size > 1 else jnp.int32(0)

    def sum(self, x: Array) -> Array:
        """Of all devices' x."""
        return lax.psum(x, NAME) if self.size > 1 else x

    def once(self, x: Array) -> Array:
        """x on the first device, zeros on the others: what is to be in a sum once."""
        return jnp.where(self.index() == 0, x, jnp.zeros_like(x)) if self.size > 1 else x

    def reduce(self, x: Array) -> Array:
        """Shares of a sum [E, T] -> the sum; with `sequence` this device's tokens of it, [E, T / N]."""
        return lax.psum_scatter(x, NAME, scatter_dimension=1, tiled=True) if self.sequence else self.sum(x)

    def gather(self, x: Array) -> Array:
        """What `reduce` gave -> all tokens of it, [E, T]."""
        return lax.all_gather(x, NAME, axis=1, tiled=True) if self.sequence else x

    def part(self, x: Array, size: int) -> Array:
        """x [N size, ...] -> this device's `size` rows."""
        return lax.dynamic_slice_in_dim(x, self.index() * size, size) if self.size > 1 else x

    # -- rows that are sent to each other ----------------------------------------------------------------------------------

    def tell(self, x: Array) -> Array:
        """x [N, ...], an entry for each device -> the entry of each for this one, [N, ...]."""
        return lax.all_to_all(x, NAME, split_axis=0, concat_axis=0, tiled=True)

    def all(self, x: Array) -> Array:
        """x of every device, [N, ...]."""
        return lax.all_gather(x, NAME)

    def send(self, rows: Array, size: int, counts: Array) -> Array:
        """rows [n, ...]: behind each other those for the first device, the second, ... -> what this device gets, of the first,
        the second, ..., [size, ...]; zeros behind it. counts [N, N]: how many rows device i sends to device j."""
        me = self.index()
        before = lambda x: jnp.cumsum(x, dtype=jnp.int32) - x
        out = jnp.zeros((size, *rows.shape[1:]), rows.dtype)
        at_receivers = (jnp.cumsum(counts, axis=0, dtype=jnp.int32) - counts)[me]  # rows of devices before this one are first
        offsets = before(counts[me]), counts[me], at_receivers, counts[:, me]
        ragged = lambda rows, out: lax.ragged_all_to_all(rows, out, *offsets, axis_name=NAME)
        return lax.platform_dependent(rows, out, cpu=lambda rows, out: self._send_whole(rows, out, counts), default=ragged)

    def _send_whole(self, rows: Array, out: Array, counts: Array) -> Array:
        """The same where there is no such collective: everybody gets everything, and takes what is for it."""
        me, all_rows = self.index(), self.all(rows)
        begin = (jnp.cumsum(counts, axis=1, dtype=jnp.int32) - counts)[:, me]  # in each sender's rows
        ends = jnp.cumsum(counts[:, me], dtype=jnp.int32)
        at = jnp.arange(len(out), dtype=jnp.int32)
        sender = jnp.minimum(jnp.searchsorted(ends, at, side="right").astype(jnp.int32), self.size - 1)
        row = begin[sender] + at - (ends - counts[:, me])[sender]
        got = all_rows[sender, jnp.clip(row, 0, len(rows) - 1)]
        return jnp.where((at < ends[-1]).reshape(-1, *(1,) * (out.ndim - 1)), got, out)

    # -- rows that are each one device's: for the sampler, which needs all words of a row -------------------------------------

    def rows(self, count: int) -> int:
        """How many of `count` rows each device has."""
        return -(-count // self.size)

    def mine(self, x: Array) -> Array:
        """x [R, ...] -> this device's rows, [R / N, ...]; the last device's may be padding (zeros)."""
        return self.part(self._padded(x), self.rows(len(x)))

    def exchange(self, x: Array) -> Array:
        """Columns of each row are spread over the devices, [R, V / N] -> all columns of some rows, [R / N, V]."""
        if self.size == 1:
            return x
        return lax.all_to_all(self._padded(x), NAME, split_axis=0, concat_axis=1, tiled=True)

    def join(self, x: Array, count: int) -> Array:
        """What each device has made of its rows -> that of all `count` rows."""
        return lax.all_gather(x, NAME, tiled=True)[:count] if self.size > 1 else x

    def _padded(self, x: Array) -> Array:
        more = self.rows(len(x)) * self.size - len(x)
        return jnp.pad(x, ((0, more), *((0, 0),) * (x.ndim - 1))) if more else x


ONE = Axis()
