"""The records of Eval Protocol: a row with its conversation, and the result of its evaluation."""

from __future__ import annotations

import datetime
import enum
import os
import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

CompletionParams = dict[str, Any]


class _ByKey(BaseModel):
    """A record whose fields can be read by key, too."""

    def __getitem__(self, key: str) -> Any:
        if key not in type(self).model_fields:
            raise KeyError(key)
        return getattr(self, key)

    def __contains__(self, key: str) -> bool:
        return key in type(self).model_fields

    def get(self, key: str, default: Any = None) -> Any:
        """Returns a field, or `default` where there is none."""
        return getattr(self, key, default)

    def keys(self) -> Any:
        """Returns the names of the fields."""
        return type(self).model_fields.keys()


class ChatCompletionContentPartTextParam(BaseModel):
    """A part of a message that is text."""

    text: str
    type: str = "text"


class ChatCompletionContentPartImageParam(BaseModel):
    """A part of a message that is an image."""

    image_url: dict[str, Any]
    type: str = "image_url"


ChatCompletionContentPartParam = (
    ChatCompletionContentPartTextParam | ChatCompletionContentPartImageParam
)


class FunctionCall(BaseModel):
    """Name and arguments (JSON text) of a call."""

    name: str
    arguments: str


class ChatCompletionMessageToolCall(BaseModel):
    """A tool call in OpenAI's form."""

    id: str = Field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")
    function: FunctionCall
    type: str = "function"


class Message(BaseModel):
    """One message of a conversation."""

    role: str
    content: str | list[ChatCompletionContentPartParam] | None = ""
    reasoning_content: str | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ChatCompletionMessageToolCall] | None = None
    function_call: FunctionCall | None = None
    control_plane_step: dict[str, Any] | None = None
    weight: int | None = None
    logprobs: Any = None


class MetricResult(_ByKey):
    """One component of an evaluation."""

    is_score_valid: bool = True
    score: float
    reason: str
    data: dict[str, Any] = Field(default_factory=dict)


class StepOutput(BaseModel):
    """The reward of one step of a rollout."""

    step_index: int | str
    base_reward: float
    terminated: bool = False
    control_plane_info: dict[str, Any] | None = None
    metrics: dict[str, Any] = Field(default_factory=dict)
    reason: str | None = None


class EvaluateResult(_ByKey):
    """What an evaluator says of a row."""

    score: float
    is_score_valid: bool = True
    reason: str | None = None
    metrics: dict[str, MetricResult] = Field(default_factory=dict)
    step_outputs: list[StepOutput] | None = None
    error: str | None = None
    trajectory_info: dict[str, Any] | None = None
    final_control_plane_info: dict[str, Any] | None = None
    agg_score: float | None = None
    standard_error: float | None = None


class InputMetadata(BaseModel):
    """Where a row comes from."""

    model_config = ConfigDict(extra="allow")

    row_id: str | None = None
    completion_params: CompletionParams = Field(default_factory=dict)
    dataset_info: dict[str, Any] | None = None
    session_data: dict[str, Any] | None = None


class Status(BaseModel):
    """How far a rollout or an evaluation came; the codes are those of gRPC and a few more."""

    class Code(int, enum.Enum):
        """Codes of a status."""

        OK = 0
        CANCELLED = 1
        UNKNOWN = 2
        INVALID_ARGUMENT = 3
        DEADLINE_EXCEEDED = 4
        NOT_FOUND = 5
        ALREADY_EXISTS = 6
        PERMISSION_DENIED = 7
        RESOURCE_EXHAUSTED = 8
        FAILED_PRECONDITION = 9
        ABORTED = 10
        OUT_OF_RANGE = 11
        UNIMPLEMENTED = 12
        INTERNAL = 13
        UNAVAILABLE = 14
        DATA_LOSS = 15
        UNAUTHENTICATED = 16
        FINISHED = 100
        RUNNING = 101
        SCORE_INVALID = 102
        RESPONSE_QUALITY_ERROR = 103

    code: Code
    message: str
    details: list[dict[str, Any]] = Field(default_factory=list)

    @classmethod
    def finished(cls, message: str, details: list[dict[str, Any]] | None = None) -> Status:
        """Returns the status of what ended well."""
        return cls(code=cls.Code.FINISHED, message=message, details=details or [])

    @classmethod
    def rollout_running(cls) -> Status:
        """Returns the status of a rollout under way."""
        return cls(code=cls.Code.RUNNING, message="Rollout is running")

    @classmethod
    def rollout_finished(
        cls, termination_reason: Any = None, extra_info: dict[str, Any] | None = None
    ) -> Status:
        """Returns the status of a finished rollout, with why it ended."""
        said = {"TERMINATION_REASON": {"termination_reason": termination_reason}}
        said = {} if termination_reason is None else said
        said |= {"EXTRA_INFO": extra_info} if extra_info else {}
        details = [{"reason": reason, "metadata": found} for reason, found in said.items()]
        return cls.finished("Rollout finished", details)

    @classmethod
    def eval_running(cls) -> Status:
        """Returns the status of an evaluation under way."""
        return cls(code=cls.Code.RUNNING, message="Evaluation is running")

    @classmethod
    def eval_finished(cls) -> Status:
        """Returns the status of a finished evaluation."""
        return cls.finished("Evaluation finished")

    @classmethod
    def error(cls, error_message: str, details: list[dict[str, Any]] | None = None) -> Status:
        """Returns the status of a failure."""
        return cls(code=cls.Code.INTERNAL, message=error_message, details=details or [])

    rollout_error = error

    @classmethod
    def score_invalid(
        cls, message: str = "Score is invalid", details: list[dict[str, Any]] | None = None
    ) -> Status:
        """Returns the status of a row without a score."""
        return cls(code=cls.Code.SCORE_INVALID, message=message, details=details or [])

    def is_running(self) -> bool:
        """Says whether it goes on."""
        return self.code == self.Code.RUNNING

    def is_finished(self) -> bool:
        """Says whether it ended well."""
        return self.code == self.Code.FINISHED

    def is_error(self) -> bool:
        """Says whether it failed."""
        return self.code == self.Code.INTERNAL

    def get_termination_reason(self) -> Any:
        """Returns why a rollout ended, None where nothing says so."""
        found = (one["metadata"] for one in self.details if one["reason"] == "TERMINATION_REASON")
        return next(found, {}).get("termination_reason")


def _identity() -> str:
    return uuid.uuid4().hex


class ExecutionMetadata(BaseModel):
    """Which run a row belongs to, and what came of its rollout."""

    model_config = ConfigDict(extra="allow")

    invocation_id: str | None = Field(default_factory=_identity)
    experiment_id: str | None = Field(default_factory=_identity)
    rollout_id: str | None = Field(default_factory=_identity)
    run_id: str | None = None
    usage: Any = None
    extra: dict[str, Any] | None = None
    finish_reason: str | None = None
    tool_call_count: int | None = None


class EvaluationRow(BaseModel):
    """A row of the dataset with the conversation that was sampled for it and its evaluation."""

    model_config = ConfigDict(extra="allow")

    messages: list[Message] = Field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    input_metadata: InputMetadata = Field(default_factory=InputMetadata)
    rollout_status: Status = Field(default_factory=Status.rollout_running)
    ground_truth: Any = None
    evaluation_result: EvaluateResult | None = None
    execution_metadata: ExecutionMetadata = Field(default_factory=ExecutionMetadata)
    created_at: datetime.datetime = Field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC)
    )
    eval_metadata: Any = None
    pid: int | None = Field(default_factory=os.getpid)

    def is_trajectory_evaluation(self) -> bool:
        """Says whether the result has rewards of single steps."""
        return bool(self.evaluation_result and self.evaluation_result.step_outputs)

    def get_conversation_length(self) -> int:
        """Returns the number of messages."""
        return len(self.messages)

    def get_system_message(self) -> Message:
        """Returns the system message, an empty one where there is none."""
        return self._first("system") or Message(role="system", content="")

    def get_assistant_messages(self) -> list[Message]:
        """Returns the messages of the assistant."""
        return [one for one in self.messages if one.role == "assistant"]

    def last_assistant_message(self) -> Message | None:
        """Returns the last message of the assistant."""
        return next(iter(reversed(self.get_assistant_messages())), None)

    def get_user_messages(self) -> list[Message]:
        """Returns the messages of the user."""
        return [one for one in self.messages if one.role == "user"]

    def get_first_user_message(self) -> Message | None:
        """Returns the first message of the user."""
        return self._first("user")

    def get_input_metadata(self, key: str, default: Any = None) -> Any:
        """Returns a field of `input_metadata`."""
        return getattr(self.input_metadata, key, default)

    def _first(self, role: str) -> Message | None:
        return next((one for one in self.messages if one.role == role), None)
