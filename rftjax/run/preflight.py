"""`--mode=check`: shows what the model sees, whether samples can be scored, and what fits in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from rftjax import sandbox
from rftjax.environments.calls import tool_calls
from rftjax.errors import UserError
from rftjax.learning.credit import has_variance, set_advantages
from rftjax.models import remat
from rftjax.monitor import reasons, rollout_files, transcripts
from rftjax.monitor.rollouts import (
    by_draw,
    encode,
    is_valid,
    reward_of,
    to_json,
    trajectory_record,
)
from rftjax.monitor.step_metrics import rollout_metrics
from rftjax.run import arithmetic, judging, memory
from rftjax.run.build import Parts, build, complete_config
from rftjax.run.heldout import MAIN
from rftjax.run.sampling import sampling_params
from rftjax.run.training import chosen_rows
from rftjax.scoring import answered
from rftjax.tasks.curriculum import task_stream
from rftjax.text import chat
from rftjax.types import Message, Task, Trajectory

# Prompts that `check` samples at once from the base model, of training and of each held-out set.
CHECK_PROMPTS = 4
SHOWN_STOPS = 8
SHOWN_METRICS = (
    "reward/mean",
    "reward/std",
    "groups/zero_variance_share",
    "evaluator/error_share",
    "rollout/truncated_share",
    "rollout/completion_tokens_mean",
    "rollout/turns_mean",
)


class Report:
    """Prints what a check finds and keeps it, with every sample, in a folder of its own: a check starts no run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines: list[str] = []
        self._samples: list[str] = []

    def say(self, name: str, text: str) -> None:
        """Prints a finding, its further lines indented below the first."""
        lines = text.splitlines() or [""]
        for label, line in zip([name, *[""] * (len(lines) - 1)], lines, strict=True):
            shown = f"{label:11s} {line}".rstrip()
            print(shown)
            self._lines.append(shown + "\n")

    def keep(self, trajectories: Sequence[Trajectory], stream: str = "train") -> None:
        """Keeps the samples, as lines like those of `rollouts/`."""
        self._samples += [to_json(trajectory_record(0, one, stream)) for one in trajectories]

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        if jax.process_index() or not self._samples:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for name, lines in (("report.txt", self._lines), ("samples.jsonl", self._samples)):
            (self._folder / name).write_bytes(b"".join(map(encode, lines)))
        print(f"kept        {self._folder}")


def check(given: Any, workdir: Path) -> None:
    """Shows that a job will run: rows, prompt, evaluator on real samples, variance of the reward, memory.

    Leaves what it found in the folder `check` of the workdir, and nothing else.
    """
    with build(complete_config(given), workdir) as parts, Report(workdir / "check") as report:
        _say_parts(parts, report)
        _say_prompt(parts, report)
        _say_tools(parts, report)
        trajectories = _sample(parts)
        report.keep(trajectories)
        _say_samples(parts, trajectories, report)
        parts.scorer.check(answered(trajectories))
        if not any(is_valid(one) for one in trajectories):
            raise UserError(
                f"none of {len(trajectories)} samples has a score, for the reasons above: there is nothing to learn"
                " from; correct the evaluator, the environment or the agent"
            )
        if not _vary(trajectories, parts):
            groups, size = len(by_draw(trajectories)), parts.config.batch.group_size
            raise UserError(
                f"the reward is the same within each of {groups} groups of {size}: there is"
                " nothing to learn from; make tasks easier or harder, raise batch.group_size or give partial rewards"
            )
        for text in judging.findings(
            parts.scorer,
            trajectories,
            conversations=bool(parts.config.environment or parts.config.agent),
        ):
            report.say("WARNING", text)
        _check_heldout(parts, report)
        report.say("check", "passed")


def _say_parts(parts: Parts, report: Report) -> None:
    heldout = len(parts.heldout.sets.get(MAIN, ()))
    report.say("tasks", f"{len(parts.train_tasks)} to train on, {heldout} held out")
    for name, found in parts.heldout.sets.items():
        if name != MAIN:
            report.say("", f"{len(found)} in held-out set {name}")
    report.say("evaluator", parts.scorer.form)
    shape = ", ".join(f"{name}={size}" for name, size in parts.mesh.shape.items())
    report.say("mesh", f"{shape} on {jax.device_count()} {jax.devices()[0].platform} devices")
    for name in parts.replicated:
        report.say("", name)
    if parts.config.scoring.sandbox or "rftjax.evaluators.code" in str(parts.config.evaluator):
        report.say("sandbox", f"{sandbox.support()[0]}; docs/sandbox.md says what holds")
    how = "batch.pack_tokens" if parts.config.batch.pack_tokens else "chosen"
    found = chosen_rows(parts)
    again = {remat.PRODUCTS: ", what lies between products", remat.LAYER: ", each layer"}
    again = f"{again[found.remat]} computed again" if found.remat else ""
    report.say("rows", f"of {found.tokens} packed tokens in an update ({how}){again}")
    if parts.config.grpo.routing_replay:
        layers, chosen, _ = parts.policy.config.choices
        size = arithmetic.token_choices(parts.policy.config)
        report.say(
            "replay",
            f"{chosen} experts in each of {layers} layers: {size} bytes a token, in the cache, on the host and in an"
            " update's batch",
        )
    each = " a device" if jax.device_count() > 1 else ""
    for name, size in memory.estimate(parts).items():
        report.say("memory", f"{size / 2**30:7.2f} GiB{each}  {name}")


def _say_prompt(parts: Parts, report: Report) -> None:
    """Shows the first task as the model will see it, special tokens and all, and what ends the model's turn."""
    tokenizer, task = parts.policy.tokenizer, parts.train_tasks[0]
    ids = chat.prompt(tokenizer, task, tools=parts.environments.tools or None)
    report.say("prompt", f"of task {task.id}, {len(ids)} tokens, as the model sees it")
    report.say("", "\n".join(transcripts.indented(chat.show(tokenizer, ids), by=0)))
    stops = list(parts.rollout.engine.stops)
    names = [f"{tokenizer.convert_ids_to_tokens(stop)!r} ({stop})" for stop in stops[:SHOWN_STOPS]]
    more = f" and {len(stops) - SHOWN_STOPS} more" if len(stops) > SHOWN_STOPS else ""
    texts = "".join(f", the text {text!r}" for text in parts.rollout.stop_strings)
    report.say("stops", ", ".join(names) + more + texts)


def _say_tools(parts: Parts, report: Report) -> None:
    """Shows whether the model sees the environment's tools, and whether a call as its template writes it is read."""
    task = next((task for task in parts.train_tasks if task.prompt is None), None)
    if parts.environments.tools and task is not None:
        tools = chat.tools_of(task, parts.environments.tools)
        report.say(
            "tools", ", ".join(str(tool.get("function", tool).get("name")) for tool in tools)
        )
        for text in tool_findings(parts.policy.tokenizer, task.messages, tools):
            report.say("", text)


def tool_findings(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any]) -> list[str]:
    """Returns what the model is taught of tools: whether a prompt shows them, and whether a call as the template
    renders it, encoded and decoded as a sampled answer would be, or else as the row's examples write it, is read."""
    found = []
    if chat.drops_tools(tokenizer, list(messages), list(tools)):
        found.append(
            "WARNING: the chat template drops the tools: the model never sees them; use a model whose template shows"
            " tools, or describe them in a system message"
        )
    arguments = {"text": 'two words, a "quote"\nand a line'}
    call = chat.rendered_call(tokenizer, list(tools), arguments)
    names = [tool.get("function", tool).get("name") for tool in tools]
    read = tool_calls({"role": "assistant", "content": call}, names)
    if not call:
        found.append(_example_finding(messages, names))
    elif [one.get("arguments") for one in read] != [arguments]:
        found.append(
            f"WARNING: rftjax.environments.tools does not read a call as the chat template writes it, {call.strip()!r}:"
            " write an environment that does, or tell the model in a system message to write"
            ' <tool_call>{"name": ..., "arguments": {...}}</tool_call>'
        )
    else:
        found.append(f"a call, written by the template and read back: {call.strip()!r}")
    return found


def _example_finding(messages: Sequence[Message], names: Sequence[Any]) -> str:
    """Returns whether the calls are read that a row's examples teach where the template writes none."""
    for message in messages:
        calls = tool_calls(message, names) if message["role"] == "assistant" else []
        if problems := [call["problem"] for call in calls if "problem" in call]:
            return (
                f"WARNING: the call of an example is not read, {message['content']!r:.200}: {problems[0]}; write it as"
                ' <tool_call>{"name": ..., "arguments": {...}}</tool_call>'
            )
        if calls:
            return f"a call, written by an example and read: {message['content']!r:.200}"
    return (
        "WARNING: the chat template writes no calls; tell the model in a system message to write"
        ' <tool_call>{"name": ..., "arguments": {...}}</tool_call>'
    )


def _sample(parts: Parts) -> list[Trajectory]:
    """Returns scored samples of the base model, of a few prompts or more until a group's rewards differ."""
    config, scorer = parts.config, parts.scorer
    parts.sampler_weights.load(parts.state_builder.initial_policy())
    stream = task_stream(parts.train_tasks, config.seed, config.tasks.sampling)
    trajectories: list[Trajectory] = []
    left = min(config.batch.prompts, len(parts.train_tasks))
    # A step's prompts at most: where rewards are rare, a few show no variance.
    while left and not _vary(trajectories, parts):
        draws: list[tuple[int, Task]] = stream.next(min(CHECK_PROMPTS, left))
        left -= len(draws)
        size, params = config.batch.group_size, sampling_params(config)
        sampled = parts.rollout(draws, size, params, on_finish=scorer.of_groups(size))
        scorer.gather(sampled)
        trajectories += sampled
    set_advantages(trajectories, config.grpo)
    return trajectories


def _vary(trajectories: list[Trajectory], parts: Parts) -> bool:
    credit = parts.config.grpo.credit
    return any(has_variance(group, credit) for group in by_draw(trajectories))


def _say_samples(parts: Parts, trajectories: list[Trajectory], report: Report) -> None:
    """Shows the best sample, the worst and one of the middle whole, why others have no score, and means."""
    ranked = sorted(trajectories, key=reward_of, reverse=True)
    valid = [one for one in ranked if reward_of(one) > -math.inf] or ranked
    for name, one in (("best", valid[0]), ("worst", valid[-1])):
        report.say(name, transcripts.heading(trajectory_record(0, one)))
        report.say("", "\n".join(transcripts.indented(one.completion, most=400, by=0)))
    middle = trajectory_record(0, valid[len(valid) // 2])
    report.say("example", transcripts.transcript(middle))
    lost = [one.score.reason for one in trajectories if one.score and not one.score.valid]
    if lost:
        lines = [f"{len(lost)} of {len(trajectories)} samples", *reasons.commonest(lost)]
        report.say("no score", "\n".join(lines))
    metrics = rollout_metrics(trajectories)
    for name in SHOWN_METRICS:
        report.say("metrics", f"{name:32s} {float(metrics.get(name, math.nan)):.3f}")
    _say_rollout_size(parts, trajectories, report)
    if warning := all_cut(trajectories, parts.config):
        report.say("WARNING", warning)


def all_cut(trajectories: Sequence[Trajectory], config: Any) -> str:
    """Returns a warning where every answer was cut at its limit, else an empty text."""
    if rollout_metrics(trajectories)["rollout/truncated_share"] < 1.0:
        return ""
    return (
        f"all {len(trajectories)} answers were cut at their limit, none ended with a stop token: raise"
        f" sampler.max_new_tokens={config.sampler.max_new_tokens} or rollout.max_length={config.rollout.max_length},"
        " ask for shorter answers, or name the token that ends an answer in sampler.stop"
    )


def _say_rollout_size(parts: Parts, trajectories: list[Trajectory], report: Report) -> None:
    """Says how much disk the run's rollouts will take, judged by the samples."""
    config = parts.config
    kept = config.logging.keep_rollouts
    if kept == 0:
        report.say("rollouts", "are not kept (logging.keep_rollouts=0)")
        return
    size = rollout_files.size(trajectories, compress=config.logging.compress_rollouts)
    each = size / len(trajectories)
    step = each * config.batch.prompts * config.batch.group_size
    evaluated = each * config.eval.samples * sum(map(len, parts.heldout.sets.values()))
    count = config.steps // config.eval.every + 1 if config.eval.every else 0
    steps = config.steps if kept < 0 else min(config.steps, kept)
    total = step * steps + evaluated * count
    report.say(
        "rollouts",
        f"about {step / 2**20:.2f} MiB a step, {total / 2**30:.3f} GiB in {config.steps} steps on disk"
        " (logging.compress_rollouts and logging.keep_rollouts make it less)",
    )


def _check_heldout(parts: Parts, report: Report) -> None:
    """Shows that the held-out sets can be sampled and scored, and that `checkpoint.best_metric` will be there."""
    if not (parts.heldout.sets and parts.config.eval.every):
        return
    metrics, trajectories = parts.heldout.evaluate(samples=1, tasks_at_most=CHECK_PROMPTS)
    for name, sampled in trajectories.items():
        reward = metrics["eval/reward" if name == MAIN else f"eval/{name}/reward"]
        report.say("held out", f"{name}: reward {reward:.3f} in {len(sampled)} samples")
        report.keep(sampled, name)
        lost = [one.score.reason for one in sampled if one.score and not one.score.valid]
        if lost:
            report.say("no score", "\n".join([f"{len(lost)} samples", *reasons.commonest(lost)]))
    best = parts.config.checkpoint.best_metric
    if best not in metrics:
        raise UserError(
            f"checkpoint.best_metric={best!r}: must be a metric of the evaluation, which has {', '.join(metrics)};"
            " name one of them (a part must be given for some of the first answers)"
        )
