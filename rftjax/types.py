"""The few records that travel between modules, and the legend of array shapes.

Shape suffixes, used on every array name in array code:
P prompts a step, G samples a prompt, B sequences, T tokens, S cache positions, V vocabulary, D width,
F feed-forward, H query heads, K key/value heads, C channels a head, O those of its values, I numbers of a latent
vector, L layers, E experts, N micro-batches,
R packed rows, X tokens of a packed row, M scored (sampled) positions, W tokens of a block of the vocabulary,
U experts of a token, J pairs of a token and one of its experts, Z blocks of pairs of one expert,
Y tiles of tokens, Q queries of a part of a packed row.

This module imports neither JAX nor NumPy: worker processes that run user code load it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

Message = dict[str, Any]  # {"role": ..., "content": ..., ...} as in OpenAI's chat format
Params = Any  # a nested dict of arrays
# What begins and what ends a model's thinking, as chat templates mark it; gpt-oss has channels instead of tags.
THINKING_TAGS = {"<think>": "</think>", "[THINK]": "[/THINK]"}
_THINKING = (*THINKING_TAGS, "<|channel|>analysis")
_THOUGHT = (*THINKING_TAGS.values(), "<|channel|>final<|message|>")
THINKS = "begins_thinking"  # true in a message where its prompt, as some templates write it, began the thinking
NOWHERE = 2**31 - 1  # an index beyond every array, which a scatter drops


@dataclasses.dataclass(frozen=True)
class Task:
    """One row of a dataset.

    `prompt` is the plain text of a row without chat template (then `messages` holds it as one user message), else
    None; `data` holds every other field of the row. `weight` scales the task's part of the loss; `temperature` is that
    of its training samples, 0.0 for the spec's.
    """

    id: str
    messages: list[Message]
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    prompt: str | None = None
    weight: float = 1.0
    temperature: float = 0.0


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How turns are sampled: `temperature` (0.0: greedy), `top_p` (1.0: off), `top_k` (0: off), and limits.

    `max_new_tokens` bounds a turn, `max_turns` a trajectory. `truncated_turns` says what becomes of a turn that a token
    limit cut: "environment" hands it over like any other, marked as `truncated`; else the episode ends.
    """

    max_new_tokens: int = 256
    max_turns: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    truncated_turns: str = "environment"

    @property
    def filtered(self) -> bool:
        """Whether top-p or top-k can exclude a token."""
        return self.top_p < 1 or self.top_k > 0


@dataclasses.dataclass
class Sequence:
    """Token ids as the model saw and sampled them; every list has one entry a token.

    `sampled` is true where the policy sampled the token; `logprobs` (nats) is 0.0 and `policy_version` -1 elsewhere.
    Log-probabilities are those of the distribution sampled from: after temperature, top-k and top-p. `experts`, of
    which NumPy makes an array (tokens, L, U), are those that the sampler chose for the first tokens, in each layer that
    has some; None where they are not recorded.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    sampled: list[bool] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    policy_version: list[int] = dataclasses.field(default_factory=list)
    experts: Any = dataclasses.field(default=None, compare=False, repr=False)

    def extend(
        self,
        tokens: list[int],
        logprobs: list[float] | None = None,
        policy_version: int | list[int] = -1,
    ) -> None:
        """Appends tokens: sampled ones where `logprobs` is given, else ones that the policy was given.

        `policy_version` is that of all sampled tokens, or of each.
        """
        count = len(tokens)
        if logprobs is not None and len(logprobs) != count:
            raise ValueError(f"{count} sampled tokens came with {len(logprobs)} log-probabilities")
        self.tokens += tokens
        self.sampled += [logprobs is not None] * count
        self.logprobs += logprobs if logprobs is not None else [0.0] * count
        versions = policy_version if logprobs is not None else -1
        self.policy_version += versions if isinstance(versions, list) else [versions] * count


@dataclasses.dataclass
class Score:
    """What an evaluator says of one trajectory; an invalid score takes the sample out of its group.

    `parts` are the requirements that an answer meets (1.0) or misses (0.0): strict and lenient held-out scores are made
    of them. `metrics` are further numbers, which are averaged and recorded only. `seconds` is what the call took,
    filled in by the worker. `of_turns` says that there is no evaluator and the reward is the sum of the turn rewards.
    """

    reward: float
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    valid: bool = True
    reason: str = ""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = dataclasses.field(default=0.0, compare=False, repr=False)
    of_turns: bool = dataclasses.field(default=False, compare=False, repr=False)


@dataclasses.dataclass
class Turn:
    """What an environment answers to one assistant message."""

    messages: list[Message] = dataclasses.field(default_factory=list)
    done: bool = False
    reward: float = 0.0
    info: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Trajectory:
    """One finished conversation: draw `draw` of the task stream, sample `sample` of that draw's group.

    `finish_reason` is stop (the model or the environment ended it), length (a token limit ended it or cut its last
    turn), turns (the turn limit) or error (the environment failed, or said what the model cannot be shown; `error`
    says how). A message that a token limit cut has `truncated`, one whose thinking the prompt began has THINKS. `infos`
    holds the environment's `Turn.info`, one a turn; `state` is what its `state()` said at the end. `bystander` is true
    where another call or the machine cost the sample: no fault of the user's code. `score` and `advantage` are filled
    in after scoring.
    """

    task: Task
    draw: int
    sample: int
    messages: list[Message] = dataclasses.field(default_factory=list)
    sequences: list[Sequence] = dataclasses.field(default_factory=list)
    turn_rewards: list[float] = dataclasses.field(default_factory=list)
    infos: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    state: Any = None
    finish_reason: str = ""
    error: str = ""
    bystander: bool = False
    score: Score | None = None
    advantage: float = 0.0
    turn_advantages: list[float] = dataclasses.field(default_factory=list)  # with credit by turn
    sampled_messages: list[int] = dataclasses.field(default_factory=list)  # where in `messages`

    @property
    def completion(self) -> str:
        """Text of the last turn that the policy sampled, empty where there is none.

        In a trajectory made by hand, without `sampled_messages`, it is the last assistant message that the row has not.
        """
        return self._last_turn.get("content") or ""

    @property
    def answer(self) -> str:
        """`completion` without the thinking before it, as `answer_of` finds it."""
        return answer_of(self.completion, begun=bool(self._last_turn.get(THINKS)))

    @property
    def _last_turn(self) -> Message:
        if self.sampled_messages:
            return self.messages[self.sampled_messages[-1]]
        own = (
            0
            if self.messages[: len(self.task.messages)] != self.task.messages
            else len(self.task.messages)
        )
        for message in reversed([] if self.unanswered else self.messages[own:]):
            if message.get("role") == "assistant":
                return message
        return {}

    @property
    def unanswered(self) -> bool:
        """Whether it ended before the policy sampled a token; such a one has no score."""
        return bool(self.sequences) and not any(any(one.sampled) for one in self.sequences)

    @property
    def teaches(self) -> bool:
        """Whether one of its advantages is not 0."""
        return any(self.turn_advantages) or self.advantage != 0

    @property
    def truncated(self) -> bool:
        """Whether a token limit ended it, or cut one of its turns."""
        turns = (self.messages[index] for index in self.sampled_messages)
        return self.finish_reason == "length" or any(turn.get("truncated") for turn in turns)

    @property
    def turns(self) -> int:
        """Number of turns that the policy took."""
        return len(self.turn_rewards)


def answer_of(text: str, *, begun: bool = False) -> str:
    """Returns what a turn says after its thinking, "" where a thinking that the text marks, or that was `begun` before
    it, has not ended."""
    ends = [text.rfind(mark) + len(mark) for mark in _THOUGHT if mark in text]
    if ends:
        return text[max(ends) :]
    return "" if begun or text.lstrip().startswith(_THINKING) else text


def begins_thinking(prompt: str) -> bool:
    """Whether what follows a prompt's text is thinking from its first token on."""
    return prompt.rstrip().endswith(_THINKING)


class TrainState(NamedTuple):
    """Everything that an update changes: `trainable` and `frozen` are nested dicts, `opt_state` is Optax's.

    `step` counts updates. Full fine-tuning has an empty `frozen`; LoRA keeps the adapters in `trainable` and the base
    in `frozen`. `reference` is what a KL is measured against: weights, or adapters on `frozen`; empty where none is.
    """

    step: Any
    trainable: Params
    frozen: Params
    opt_state: Any
    reference: Params = ()


class Pack(NamedTuple):
    """Sequences laid out for the forward pass; a leading N axis stacks micro-batches.

    A row holds packs: a prefix that the sequences of a group share, and behind it what is each one's own.
    tokens_RX, positions_RX (position within the token's own sequence), groups_RX (which pack; 0 is padding) and
    segments_RX (0: the prefix). A token attends to earlier tokens of its pack in its own segment or the prefix.
    Scored positions, M a row: the output at index sources_RM scores targets_RM; the result belongs at index places_RM
    of the flattened (B * T) rows of the loss, NOWHERE where nothing is scored.
    `experts_RXLU` are those that the sampler chose, -1 where the update is to choose; None where it always does.
    """

    tokens_RX: Any
    positions_RX: Any
    groups_RX: Any
    segments_RX: Any
    sources_RM: Any
    targets_RM: Any
    places_RM: Any
    experts_RXLU: Any = None


class Batch(NamedTuple):
    """One step's sequences: `pack` (with a leading N axis, of which `micro_batches` are in use) for the forward pass,
    one row a sequence for the loss. Column t belongs to token t; sampled_BT is true where a token is trained on."""

    pack: Pack
    micro_batches: Any
    sampled_BT: Any
    sampler_logprobs_BT: Any
    advantages_B: Any
    weights_B: Any
    temperatures_B: Any = None  # of sampling; None: all rows have the spec's
    shares_B: Any = None  # a row's share of its trajectory's trained tokens; None: one row each
    advantages_BT: Any = None  # of each token, in place of advantages_B; None: a row has one
