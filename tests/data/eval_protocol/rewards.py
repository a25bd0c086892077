"""Evaluators that add up rewards of the package."""

from eval_protocol.models import EvaluateResult, EvaluationRow, Message
from eval_protocol.pytest import evaluation_test
from eval_protocol.rewards.format import format_reward
from eval_protocol.rewards.function_calling import exact_tool_match_reward
from eval_protocol.rewards.length import length_reward
from eval_protocol.rewards.repetition import repetition_penalty_reward
from eval_protocol.rewards.tag_count import tag_count_reward

CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
REWARDS = {
    "format": lambda messages: format_reward(messages),
    "format_search": lambda messages: format_reward(
        messages, format_regex=r"<answer>\d+</answer>", require_exact_match=False
    ),
    "tags": lambda messages: tag_count_reward(messages, required_tags=["think", "answer"]),
    "loose_tags": lambda messages: tag_count_reward(
        messages, required_tags=["think", "answer"], score_per_tag=0.5, require_balanced=False
    ),
    "repetition": lambda messages: repetition_penalty_reward(messages),
    "pairs": lambda messages: repetition_penalty_reward(messages, ngram_size=2, max_penalty=1.0),
    "length": lambda messages: length_reward(messages),
    "target": lambda messages: length_reward(messages, target_length=5),
    "target_cosine": lambda messages: length_reward(messages, target_length=5, scaling="cosine"),
    "bounds": lambda messages: length_reward(messages, min_length=4, max_length=6),
    "bounds_cosine": lambda messages: length_reward(
        messages, min_length=4, max_length=6, scaling="cosine", reward_range=[-1.0, 1.0]
    ),
    "least": lambda messages: length_reward(messages, min_length=6, token_method="words"),
    "most": lambda messages: length_reward(messages, max_length=6, token_method="character"),
    "no_call": lambda messages: exact_tool_match_reward(messages),
    "call": lambda messages: exact_tool_match_reward(messages, ground_truth={"tool_calls": [CALL]}),
}


@evaluation_test(
    input_messages=[[[Message(role="user", content="?")]]], completion_params=[{"model": "gpt-4o"}]
)
def test_rewards(row: EvaluationRow) -> EvaluationRow:
    found = {name: reward(row.messages) for name, reward in REWARDS.items()}
    metrics = {
        name: {"score": one.score, "is_score_valid": one.is_score_valid, "reason": ""}
        for name, one in found.items()
    }
    score = sum(one.score for one in found.values()) / len(found)
    row.evaluation_result = EvaluateResult(score=score, metrics=metrics)
    return row
