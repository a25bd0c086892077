"""One layer of the decoder: attention and a feed-forward layer, each of the kind that its stack has."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rftjax.models.across import Expansion, keys_and_values
from rftjax.models.attention import plain
from rftjax.models.config import Config, Stack
from rftjax.models.experts import ROWS, Experts
from rftjax.models.latent import LatentAttention
from rftjax.models.layers import Attend, Attention, Mlp, Norm
from rftjax.models.rotary import Turn


class Block(nn.Module):
    """One layer of a stack; `cached`: over a cache, of whose leaves there are no keys where attention is latent, and on
    each device of the mesh with its own rows (see `sharding.over_rows`)."""

    config: Config
    stack: Stack
    cached: bool = False
    mesh: Mesh | None = None

    def setup(self) -> None:
        c = self.config
        latent = c.latent.rank > 0
        self.attention = LatentAttention(c, self.cached) if latent else Attention(c)
        self.mlp = self._experts() if self.stack.sparse else Mlp(c)
        if self.stack.sparse and c.routing.shared:
            self.shared = Mlp(c, c.routing.shared)
        if c.norms in ("before", "both"):
            self.attention_norm, self.mlp_norm = Norm(c), Norm(c)
        if c.norms in ("after", "both"):
            self.attention_output_norm, self.mlp_output_norm = Norm(c), Norm(c)

    def _experts(self) -> Experts:
        return Experts(self.config, self.mesh, (ROWS,) if self.cached else ())

    def __call__(
        self, x_BTD: jax.Array, turn: Turn, attend: Attend, experts_BTU: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Returns the layer's output x_BTD and what `attend` kept; `experts_BTU` are replayed (see `Experts`)."""
        before, after = self.config.norms != "after", self.config.norms != "before"
        normed_BTD = self.attention_norm(x_BTD) if before else x_BTD
        added_BTD, kept = self.attention(normed_BTD, turn, attend)
        x_BTD = x_BTD + (self.attention_output_norm(added_BTD) if after else added_BTD)
        normed_BTD = self.mlp_norm(x_BTD) if before else x_BTD
        replayed = (experts_BTU,) if self.stack.sparse else ()
        added_BTD = self.mlp(normed_BTD, *replayed)
        if self.stack.sparse and self.config.routing.shared:
            added_BTD = added_BTD + self.shared(normed_BTD)
        return x_BTD + (self.mlp_output_norm(added_BTD) if after else added_BTD), kept


def causal(
    q_BTHC: jax.Array, new: dict[str, jax.Array], *sinks: Any, expansion: Expansion | None = None
) -> tuple[jax.Array, None]:
    """Attends among the new tokens alone, each to those before it (used to make initial parameters)."""
    T = q_BTHC.shape[1]
    mask_BTT = jnp.tril(jnp.ones((q_BTHC.shape[0], T, T), bool))
    return plain(q_BTHC, *keys_and_values(new, expansion), mask_BTT, *sinks), None
