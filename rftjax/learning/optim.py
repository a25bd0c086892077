"""The one Optax chain: global-norm clipping, AdamW, a learning rate schedule with warm-up."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

from rftjax.errors import UserError
from rftjax.types import Params

SCHEDULES = ("constant", "linear", "cosine")
# By name: stacked over layers, a norm's gain has two axes.
UNDECAYED = ("bias", "scale", "correction", "router_bias", "sinks")


def make_optimizer(
    *,
    lr: float,
    steps: int,
    schedule: str = "constant",
    warmup_steps: int = 0,
    clip: float = 1.0,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    final_lr_share: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Builds AdamW behind a clip of the gradient's global norm (0.0: none); biases and norm gains
    do not decay.

    `steps` is the schedule's horizon in updates. The optimizer state has the same tree whatever the
    settings. Whoever updates a part of the tree gives `norm`, the whole gradient's.
    """
    rate = make_schedule(
        lr=lr,
        steps=steps,
        schedule=schedule,
        warmup_steps=warmup_steps,
        final_lr_share=final_lr_share,
    )
    for name, value in (("clip", clip), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise UserError(f"optim.{name}={value!r}: must be at least 0 (0.0 switches it off)")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise UserError(f"optim.{name}={value!r}: must be at least 0 and below 1")
    if not 0 < eps < math.inf:
        raise UserError(f"optim.eps={eps!r}: must be above 0")
    chain = optax.chain(
        clip_by_norm(clip) if clip > 0 else optax.identity(),
        optax.adamw(rate, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay, mask=decay_mask),
    )
    return optax.with_extra_args_support(chain)


def clip_by_norm(most: float) -> optax.GradientTransformationExtraArgs:
    """Scales a gradient whose norm is above `most` down to it: by its own norm, or by `norm`, that of a whole of which
    it is a part.
    """

    def clipped(
        grads: Params, state: Any, params: Any = None, *, norm: Any = None, **_: Any
    ) -> tuple[Params, Any]:
        norm = optax.tree.norm(grads) if norm is None else norm
        return jax.tree.map(
            lambda leaf: jax.lax.select(norm < most, leaf, (leaf / norm) * most), grads
        ), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, clipped)


def make_schedule(
    *,
    lr: float,
    steps: int,
    schedule: str = "constant",
    warmup_steps: int = 0,
    final_lr_share: float = 0.0,
) -> optax.Schedule:
    """Builds the learning rate by update count: lr from count `warmup_steps` on, then the decay to
    its end at `steps`.

    Warm-up rises in equal parts from lr / (warmup_steps + 1) at count 0, so that no update is spent
    on a rate of 0. `linear` and `cosine` end at lr * final_lr_share and stay there; `constant` does
    not read it.
    """
    if not 0 < lr < math.inf:
        raise UserError(f"optim.lr={lr!r}: must be above 0")
    if steps < 1:
        raise UserError(f"steps={steps!r}: must be at least 1")
    if schedule not in SCHEDULES:
        raise UserError(f"optim.schedule={schedule!r}: must be one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup_steps < steps:
        raise UserError(
            f"optim.warmup_steps={warmup_steps!r}: must be at least 0 and below the {steps} steps of the schedule"
        )
    if not 0 <= final_lr_share <= 1:
        raise UserError(
            f"optim.final_lr_share={final_lr_share!r}: a share of optim.lr, must lie in 0 to 1"
        )
    decay_steps = steps - warmup_steps
    if schedule == "linear":
        body = optax.linear_schedule(lr, lr * final_lr_share, decay_steps)
    elif schedule == "cosine":
        body = optax.cosine_decay_schedule(lr, decay_steps, alpha=final_lr_share)
    else:
        body = optax.constant_schedule(lr)
    if warmup_steps == 0:
        return body
    warmup = optax.linear_schedule(lr / (warmup_steps + 1), lr, warmup_steps)
    return optax.join_schedules([warmup, body], [warmup_steps])


def decay_mask(params: Params) -> Params:
    """Returns a tree of booleans, true where weight decay applies: not to biases, norm gains or
    single axes.
    """

    def decays(path: tuple, leaf: jax.Array) -> bool:
        name = str(getattr(path[-1], "key", "")) if path else ""
        return leaf.ndim > 1 and name not in UNDECAYED

    return jax.tree_util.tree_map_with_path(decays, params)
