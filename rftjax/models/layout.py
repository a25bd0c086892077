"""Which tokens of a packed row see each other, token by token or tile by tile."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NONE = 1 << 30  # beyond every run, group and position


class Layout(NamedTuple):
    """Groups, segments and positions of packed tokens, as `types.Pack` defines them."""

    groups_BT: Any
    segments_BT: Any
    positions_BT: Any

    def mask(self, window: Any = None) -> jax.Array:
        """Returns mask_BTT, true where a token attends, at most `window` - 1 positions back (None: no limit)."""
        groups_BT, segments_BT, positions_BT = self
        mine_BT1, own_BT1 = groups_BT[:, :, None], segments_BT[:, :, None]
        theirs_B1T, other_B1T = groups_BT[:, None], segments_BT[:, None]
        mask_BTT = (mine_BT1 == theirs_B1T) & (mine_BT1 > 0)
        mask_BTT &= (own_BT1 == other_B1T) | (other_B1T == 0)
        mask_BTT &= jnp.tril(jnp.ones(mask_BTT.shape[1:], bool))[None]
        if window is None:
            return mask_BTT
        return mask_BTT & (positions_BT[:, :, None] - positions_BT[:, None] < window)

    def padded(self, multiple: int) -> Layout:
        """Returns the layout with padding up to a multiple of so many tokens."""
        spare = -self.groups_BT.shape[1] % multiple
        return Layout(*(jnp.pad(array_BT, ((0, 0), (0, spare))) for array_BT in self))

    def tiles(self, tile: int, window: Any = None) -> jax.Array:
        """Returns visible_BYY, true where a tile of queries may see a key of a tile of as many tokens.

        Every pair that `mask` lets see is in a visible pair of tiles. A query's run is the tokens of its own segment,
        which lie side by side; it sees that run and its group's prefix.
        """
        groups_BT, segments_BT, positions_BT = self
        B, T = groups_BT.shape
        used_BT = groups_BT > 0
        runs_BT = _runs(groups_BT, segments_BT)

        def bounds(values_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
            low, high = jnp.where(used_BT, values_BT, NONE), jnp.where(used_BT, values_BT, -1)
            shape = (B, T // tile, tile)
            return low.reshape(shape).min(-1)[..., None], high.reshape(shape).max(-1)[..., None]

        def between(values_BT: jax.Array) -> jax.Array:
            low_BY1, high_BY1 = bounds(values_BT)
            return (values_BT[:, None] >= low_BY1) & (values_BT[:, None] <= high_BY1)

        prefix_B1T = (segments_BT == 0)[:, None]
        seen_BYT = (between(runs_BT) | between(groups_BT) & prefix_B1T) & used_BT[:, None]
        if window is not None:
            seen_BYT &= bounds(positions_BT)[0] - positions_BT[:, None] < window
        visible_BYY = jnp.any(seen_BYT.reshape(B, T // tile, T // tile, tile), axis=-1)
        return visible_BYY & jnp.tril(jnp.ones(visible_BYY.shape[1:], bool))[None]


def _runs(groups_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Returns runs_BT: the number of segments that began in the row so far."""

    def changes(values_BT: jax.Array) -> jax.Array:
        return jnp.pad(jnp.diff(values_BT, axis=1) != 0, ((0, 0), (1, 0)))

    return jnp.cumsum(changes(groups_BT) | changes(segments_BT), axis=1)
