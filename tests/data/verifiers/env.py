"""An environment as users of verifiers write it; scripts/reference runs its rubric with the package."""

import verifiers as vf
from datasets import Dataset


def right(completion, answer, **kwargs) -> float:
    return 1.0 if answer in completion[-1]["content"] else 0.0


async def short(completion, parser) -> float:
    return 1.0 / (1 + len(parser.parse_answer(completion) or ""))


def words(completion) -> float:
    return float(len(completion[-1]["content"].split()))


def best(completions, answers) -> list[float]:
    lengths = [len(one[-1]["content"]) for one in completions]
    return [float(length == min(lengths)) for length in lengths]


def load_environment(**kwargs):
    rows = [{"question": f"{i} + 7 =", "answer": str(i + 7)} for i in range(4)]
    rubric = vf.Rubric(funcs=[right, short], weights=[1.0, 0.5], parser=vf.Parser())
    rubric.add_reward_func(words, weight=0.0)
    return vf.SingleTurnEnv(dataset=Dataset.from_list(rows), rubric=rubric)


def ranked():
    rubric = vf.Rubric(funcs=[right, best], weights=[0.5, 2.0])
    return vf.SingleTurnEnv(
        dataset=Dataset.from_list([{"question": "?", "answer": "1"}]), rubric=rubric
    )


RANKED = ranked()
