"""Tries a job before anything costs time: what the model sees, whether it can be scored, what fits in memory."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from rftjax import sharding, update
from rftjax.errors import UserError
from rftjax.evaluation import MAIN
from rftjax.job import Job
from rftjax.learner import has_variance, set_advantages
from rftjax.metrics import rollout_metrics
from rftjax.reports import by_draw
from rftjax.tasks import TaskStream
from rftjax.types import TrainState

# Prompts that `check` samples at once from the base model, of training and of each held-out set.
CHECK_PROMPTS = 4


def check(config: ConfigDict, workdir: Path) -> None:
    """Shows that a job will run: rows, evaluator on real samples, variance of the reward within groups, memory."""
    with Job.build(config, workdir) as parts:
        print(
            f"tasks       {len(parts.train_tasks)} to train on, {len(parts.heldout.get(MAIN, ()))} held out"
        )
        for name, found in parts.heldout.items():
            if name != MAIN:
                print(f"            {len(found)} in held-out set {name}")
        shape = ", ".join(f"{name}={size}" for name, size in parts.mesh.shape.items())
        print(f"mesh        {shape} on {jax.device_count()} {jax.devices()[0].platform} devices")
        for name in parts.replicated:
            print(f"            {name}")
        each = " a device" if jax.device_count() > 1 else ""
        for name, size in memory(parts).items():
            print(f"memory      {size / 2**30:7.2f} GiB{each}  {name}")
        params = parts.policy.params
        parts.set_weights(TrainState(np.int32(0), params, {}, ()))
        stream = TaskStream(parts.train_tasks, seed=config.seed)
        trajectories, scores, left = [], [], min(config.batch.prompts, len(parts.train_tasks))
        # A step's prompts at most: where rewards are rare, a few show no variance.
        while left and not any(map(has_variance, by_draw(trajectories))):
            draws = stream.next(min(CHECK_PROMPTS, left))
            left -= len(draws)
            sampled = parts.rollout(
                draws, config.batch.group_size, parts.limits(), on_finish=parts.scorer.submit
            )
            scores += parts.scorer.gather(sampled)
            trajectories += sampled
        set_advantages(trajectories, config.grpo)
        metrics = rollout_metrics(trajectories)
        best = max(trajectories, key=lambda one: one.score.reward if one.score else -math.inf)
        print(f"sample      task {best.task.id}: {best.completion[:200]!r} -> {best.score}")
        for name in (
            "reward/mean",
            "reward/std",
            "groups/zero_variance_share",
            "evaluator/error_share",
            "rollout/truncated_share",
            "rollout/completion_tokens_mean",
            "rollout/turns_mean",
        ):
            print(f"{name:32s} {float(metrics.get(name, math.nan)):.3f}")
        parts.scorer.check(scores)
        if metrics.get("groups/zero_variance_share", 0.0) == 1.0:
            groups, size = len(by_draw(trajectories)), config.batch.group_size
            raise UserError(
                f"the reward is the same within each of {groups} groups of {size}: there is"
                " nothing to learn from; make tasks easier or harder, raise batch.group_size or give partial rewards"
            )
        check_heldout(parts)
    print("check       passed")


def check_heldout(parts: Job) -> None:
    """Shows that the held-out sets can be sampled and scored, and that `checkpoint.best_metric` will be there."""
    if not (parts.heldout and parts.config.eval.every):
        return
    metrics, trajectories = parts.evaluate(samples=1, tasks_at_most=CHECK_PROMPTS)
    for name, sampled in trajectories.items():
        reward = metrics["eval/reward" if name == MAIN else f"eval/{name}/reward"]
        print(f"held out    {name}: reward {reward:.3f} in {len(sampled)} samples")
    best = parts.config.checkpoint.best_metric
    if best not in metrics:
        raise UserError(
            f"checkpoint.best_metric={best!r}: must be a metric of the evaluation, which has {', '.join(metrics)};"
            " name one of them (a part must be given for some of the first answers)"
        )


def memory(parts: Job) -> dict[str, float]:
    """Returns estimates of what one device holds, in bytes: training state, sampler, the update's largest arrays."""
    config, model, mesh = parts.config, parts.policy.config, parts.mesh
    params, trainable = parts.policy.outline, parts.origin.outline.trainable
    base, count = (
        sharding.device_size(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))
        for tree in (params, trainable)
    )
    sampler = sharding.device_size(params, sharding.decode_shardings(mesh, params))
    item = np.dtype(model.dtype).itemsize
    rows = parts.rollout.engine.rows
    place = sharding.cache_sharding(mesh, model.kv_heads)
    here, heads = place.shard_shape((rows, model.kv_heads))
    cache = 2 * model.layers * heads * model.channels * item * here * config.rollout.max_length
    tokens = config.batch.pack_tokens * config.batch.pack_rows
    width = 8 * model.width + 3 * model.ffn
    if model.attention == "plain":  # the others keep no scores
        width += 2 * model.heads * config.batch.pack_tokens
    kept = 1 if config.model.remat else model.layers
    scored = parts.batch_shape["pack_scored"] * config.batch.pack_rows
    chunk = min(scored, update.HEAD_CHUNK * config.batch.pack_rows)
    everywhere = scored * sharding.row_multiple(mesh)
    whole_logits = not config.model.remat and 4 * model.vocab * everywhere <= update.HEAD_BYTES
    kept_bytes: dict[str, float] = {}
    if config.lora.rank:
        kept_bytes["frozen base"] = float(item * base)
    elif config.grpo.kl_weight > 0:
        kept_bytes["reference"] = float(item * base)
    return kept_bytes | {
        "trained parameters and optimizer (float32)": 12.0 * count,
        "gradient (float32)": 4.0 * count,
        "sampler's weights": float(item * sampler),
        f"cache of {here} rows of {config.rollout.max_length} tokens at most": float(cache),
        f"activations of {tokens} tokens": float(tokens * width * kept * item),
        "logits": 4.0 * model.vocab * (scored if whole_logits else chunk),
    }
