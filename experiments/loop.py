"""GRPO on one page, to learn from: sample groups, score them, and make what beat its group more likely.

The same algorithm as rftjax/train.py, whose updates it equals (tests/test_loop.py), without what makes that fast, small
and safe: packing, shared prompts, micro-batches, worker processes, checkpoints, held-out evaluation. Change it freely.

    python experiments/loop.py      # the quickstart's job, a few steps of it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax

import rftjax
from rftjax import grpo
from rftjax.evaluators.forms.form import as_score
from rftjax.policy import Policy
from rftjax.tasks import TaskStream, load
from rftjax.text import chat
from rftjax.types import Task, Trajectory


def train(
    policy: Policy,
    tasks: Sequence[Task],
    evaluate: Callable[[Task, Trajectory], Any],
    *,
    steps: int,
    prompts: int = 8,
    samples: int = 8,
    max_new_tokens: int = 24,
    lr: float = 2e-5,
    seed: int = 0,
) -> Iterator[dict[str, float]]:
    """Trains the policy in place; yields the metrics of each step after it."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lr, weight_decay=0.0))
    opt_state = optimizer.init(policy.params)
    stream = TaskStream(tasks, seed=seed)

    @jax.jit
    def update(params: Any, opt_state: Any, tokens_BT: Any, sampled_BT: Any, advantages_B: Any):
        def loss_of(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            logprobs_BT = policy.logprobs(tokens_BT, params=params)
            return grpo.policy_loss(logprobs_BT, sampled_BT, advantages_B, **LOSS)

        (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        changes, opt_state = optimizer.update(gradient, opt_state, params)
        metrics |= {"loss": loss, "grad_norm": optax.tree.norm(gradient)}
        return optax.apply_updates(params, changes), opt_state, metrics

    for _ in range(steps):
        # Sample a group of answers to each prompt.
        draws = stream.next(prompts)
        asked = [chat.prompt(policy.tokenizer, task) for _, task in draws]
        trajectories = policy.sample(
            asked,
            max_new_tokens=max_new_tokens,
            samples=samples,
            seed=seed,
            stop=policy.stop_tokens(),
            first_draw=draws[0][0],
        )

        # Score them.
        task_of = dict(draws)
        rewards = []
        for one in trajectories:
            conversation = answered(task_of[one.draw], one)
            rewards.append(as_score(evaluate(conversation.task, conversation)).reward)

        # An answer is as good as it is better than the others of its group.
        groups = [one.draw for one in trajectories]
        advantages_B = grpo.advantages(rewards, groups, baseline="mean", scale="group")

        # One step of the optimizer on all of them.
        tokens_BT, sampled_BT = rows(trajectories, max(map(len, asked)) + max_new_tokens)
        policy.params, opt_state, metrics = update(
            policy.params, opt_state, tokens_BT, sampled_BT, np.asarray(advantages_B)
        )
        yield {"reward/mean": float(np.mean(rewards))} | {k: float(v) for k, v in metrics.items()}


LOSS = {name: grpo.preset_fields("grpo")[name] for name in grpo.LOSS_DEFAULTS}


def answered(task: Task, sampled: Trajectory) -> Trajectory:
    """Returns the conversation as an evaluator sees it: the task's messages and the answer's."""
    messages = [*task.messages, *sampled.messages]
    return Trajectory(task, sampled.draw, sampled.sample, messages, sampled.sequences, [0.0])


def rows(trajectories: Sequence[Trajectory], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the token ids of the sequences, one a row, 0 behind them, and where the policy sampled them."""
    tokens_BT = np.zeros((len(trajectories), length), np.int32)
    sampled_BT = np.zeros(tokens_BT.shape, bool)
    for row, trajectory in enumerate(trajectories):
        (sequence,) = trajectory.sequences
        tokens_BT[row, : len(sequence.tokens)] = sequence.tokens
        sampled_BT[row, : len(sequence.tokens)] = sequence.sampled
    return tokens_BT, sampled_BT


if __name__ == "__main__":
    from pathlib import Path

    from rftjax.config.fields import embedded_model
    from rftjax.evaluators.json_record import evaluate

    loaded = load(f"{Path(__file__).absolute().parent}/facts.py:rows")
    model = rftjax.load(embedded_model())
    for step, metrics in enumerate(train(model, loaded, evaluate, steps=4), start=1):
        print(f"step {step}  reward {metrics['reward/mean']:.2f}  loss {metrics['loss']:+.4f}")
    print(f"exported to {model.export('workdir/loop/export')}")
