"""Which tokens of a packed row see each other, token by token or tile by tile."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NONE = 1 << 30  # beyond every run, group and position


class Part(NamedTuple):
    """Tokens that lie side by side in each packed row, from place `first` on."""

    first: Any
    tokens: int

    def of(self, array: Any, axis: int = 1, unit: int = 1) -> jax.Array:
        """Returns these tokens of an array with such an axis, or those tiles of `unit` tokens that they fill."""
        first, tokens = self.first // unit, self.tokens // unit
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(array), first, tokens, axis)


class Layout(NamedTuple):
    """Groups, segments and positions of packed tokens, as `types.Pack` defines them."""

    groups_BT: Any
    segments_BT: Any
    positions_BT: Any

    def mask(self, window: Any = None, part: Part | None = None) -> jax.Array:
        """Returns mask_BTT, true where a token attends, at most `window` - 1 positions back (None: no limit); of a part
        of the queries alone (B, tokens of the part, T)."""
        T = self.groups_BT.shape[1]
        part = part or Part(0, T)
        groups, segments, positions = (part.of(array_BT) for array_BT in self)
        theirs_B1T, other_B1T, far_B1T = (array_BT[:, None] for array_BT in self)
        mask = (groups[:, :, None] == theirs_B1T) & (groups > 0)[:, :, None]
        mask &= (segments[:, :, None] == other_B1T) | (other_B1T == 0)
        places_T = jnp.arange(T)
        mask &= (part.of(places_T, axis=0)[:, None] >= places_T[None])[None]
        if window is None:
            return mask
        return mask & (positions[:, :, None] - far_B1T < window)

    def padded(self, multiple: int) -> Layout:
        """Returns the layout with padding up to a multiple of so many tokens."""
        spare = -self.groups_BT.shape[1] % multiple
        return Layout(*(jnp.pad(array_BT, ((0, 0), (0, spare))) for array_BT in self))

    def tiles(self, tile: int, window: Any = None) -> jax.Array:
        """Returns visible_BYY, true where a tile of queries may see a key of a tile of as many tokens.

        Every pair that `mask` lets see is in a visible pair of tiles.
        """
        own_BYY, prefix_BYY = self.parts(tile, window)
        return own_BYY | prefix_BYY

    def parts(self, tile: int, window: Any = None) -> tuple[jax.Array, jax.Array]:
        """Returns own_BYY and prefix_BYY: what `tiles` does for keys of a query's own run, and of its group's prefix.

        A query's run is the tokens of its own segment, which lie side by side.
        """
        groups_BT, segments_BT, positions_BT = self
        B, T = groups_BT.shape
        used_BT = groups_BT > 0
        shared_BT = used_BT & (segments_BT == 0)
        runs_BT = _runs(groups_BT, segments_BT)

        def bounds(values_BT: jax.Array, of_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
            low, high = jnp.where(of_BT, values_BT, NONE), jnp.where(of_BT, values_BT, -1)
            shape = (B, T // tile, tile)
            return low.reshape(shape).min(-1)[..., None], high.reshape(shape).max(-1)[..., None]

        def between(values_BT: jax.Array, of_BT: jax.Array) -> jax.Array:
            low_BY1, high_BY1 = bounds(values_BT, of_BT)
            return (values_BT[:, None] >= low_BY1) & (values_BT[:, None] <= high_BY1)

        def by_tile(seen_BYT: jax.Array) -> jax.Array:
            if window is not None:
                first_BY1 = bounds(positions_BT, used_BT)[0]
                seen_BYT &= first_BY1 - positions_BT[:, None] < window
            any_BYY = jnp.any(seen_BYT.reshape(B, T // tile, T // tile, tile), axis=-1)
            return any_BYY & jnp.tril(jnp.ones(any_BYY.shape[1:], bool))[None]

        # A prefix sees itself as its own run.
        own_BYT = between(runs_BT, used_BT) & used_BT[:, None]
        prefix_BYT = between(groups_BT, used_BT & ~shared_BT) & shared_BT[:, None]
        return by_tile(own_BYT), by_tile(prefix_BYT)

    def firsts(self) -> jax.Array:
        """Returns firsts_BT: the place of the first token of each token's run."""
        starts_BT = _starts(self.groups_BT, self.segments_BT)
        places_T = jnp.arange(starts_BT.shape[1], dtype=jnp.int32)
        return jax.lax.cummax(jnp.where(starts_BT, places_T[None], 0), axis=1)


def _starts(groups_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Returns starts_BT, true where another group or segment begins than before."""

    def changes(values_BT: jax.Array) -> jax.Array:
        return jnp.pad(jnp.diff(values_BT, axis=1) != 0, ((0, 0), (1, 0)))

    return changes(groups_BT) | changes(segments_BT)


def _runs(groups_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Returns runs_BT: the number of segments that began in the row so far."""
    return jnp.cumsum(_starts(groups_BT, segments_BT), axis=1)
