"""Evaluators of many rows, as users of Eval Protocol write them."""

from eval_protocol.models import EvaluateResult, EvaluationRow, Message, Status
from eval_protocol.pytest import SingleTurnRolloutProcessor, evaluation_test

MESSAGES = [[[Message(role="user", content="Say a word.")]]]
PARAMS = [{"model": "gpt-4o"}, {"model": "gpt-4.1"}]


def length(row: EvaluationRow) -> int:
    return 1 + len(str(row.messages[-1].content))


@evaluation_test(
    input_messages=MESSAGES,
    completion_params=PARAMS,
    rollout_processor=SingleTurnRolloutProcessor(),
    mode="groupwise",
)
def test_shortest(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    least = min(map(length, rows))
    for row in rows:
        assert row.rollout_status.code != Status.Code.RUNNING
        row.evaluation_result = EvaluateResult(score=least / length(row))
    return sorted(rows, key=length)


@evaluation_test(input_messages=MESSAGES, completion_params=PARAMS, mode="all")
async def test_against_the_mean(rows: list[EvaluationRow]) -> list[EvaluationRow]:
    mean = sum(map(length, rows)) / len(rows)
    for row in rows:
        row.evaluation_result = EvaluateResult(score=float(length(row) < mean))
    return rows
