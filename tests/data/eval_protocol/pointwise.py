"""Evaluators as users of Eval Protocol write them; scripts/reference runs them with the package, tests without it."""

import asyncio
import re
from typing import Any

from eval_protocol.models import EvaluateResult, EvaluationRow, Message, MetricResult, StepOutput
from eval_protocol.pytest import SingleTurnRolloutProcessor, evaluation_test


def sums_to_evaluation_rows(rows: list[dict[str, Any]]) -> list[EvaluationRow]:
    return [
        EvaluationRow(
            messages=[Message(role="user", content=f"{row['question']} Answer in <answer> tags.")],
            ground_truth=row["truth"],
        )
        for row in rows
    ]


@evaluation_test(
    input_dataset=["sums.jsonl"],
    dataset_adapter=sums_to_evaluation_rows,
    completion_params=[{"model": "accounts/fireworks/models/a-model", "temperature": 1.0}],
    rollout_processor=SingleTurnRolloutProcessor(),
    passed_threshold=0.5,
    num_runs=1,
    mode="pointwise",
)
async def test_sums(row: EvaluationRow) -> EvaluationRow:
    await asyncio.sleep(0)
    content = row.messages[-1].content
    assert isinstance(content, str)
    tagged = re.search(r"<answer>(.*?)</answer>", content)
    if "refuse" in content:
        row.evaluation_result = EvaluateResult(
            score=0.0, is_score_valid=False, reason="the answer is a refusal"
        )
        return row
    right = bool(tagged) and tagged[1].strip() == row.ground_truth
    row.evaluation_result = EvaluateResult(
        score=0.8 * right + 0.2 * bool(tagged),
        reason=f"{row.input_metadata.completion_params['model'][-7:]}: {row.ground_truth}",
        metrics={
            "answer": MetricResult(score=float(right), is_score_valid=True, reason="equal"),
            "format": MetricResult(score=float(bool(tagged)), is_score_valid=True, reason="tags"),
        },
        step_outputs=[StepOutput(step_index=0, base_reward=0.5)],
    )
    return row


@evaluation_test(
    input_messages=[[[Message(role="user", content="Say a word.")]]],
    completion_params=[{"model": "gpt-4o"}],
    evaluation_test_kwargs=[{"wanted": 3}],
)
def test_words(row: EvaluationRow, wanted: int = 1) -> EvaluationRow:
    """Plain rows, a plain function, and an argument of the test."""
    last = row.last_assistant_message()
    assert last is not None and row.get_conversation_length() > 1
    count = len(str(last.content).split())
    row.evaluation_result = EvaluateResult(score=max(0.0, 1.0 - abs(count - wanted) / wanted))
    return row
