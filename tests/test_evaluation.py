import itertools
import json
import math
import statistics

import pytest

from rftjax import config as configs
from rftjax import job, train
from rftjax.checkpoint import Checkpoints
from rftjax.evaluation import mean_and_stderr, pass_at_k


@pytest.mark.parametrize("samples", [1, 3, 6])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_sample(samples):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations(range(samples), k))
        share = sum(any(one < right for one in subset) for subset in subsets) / len(subsets)
        assert pass_at_k(samples, right, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_is_unbiased_where_the_plain_formula_is_not():
    chance, samples, k = 0.3, 5, 3
    exact = 1 - (1 - chance) ** k
    weights = [
        math.comb(samples, c) * chance**c * (1 - chance) ** (samples - c)
        for c in range(samples + 1)
    ]
    ours = math.fsum(w * pass_at_k(samples, c, k) for c, w in enumerate(weights))
    plain = math.fsum(w * (1 - (1 - c / samples) ** k) for c, w in enumerate(weights))
    assert ours == pytest.approx(exact, abs=1e-12)
    assert abs(plain - exact) > 0.05


def test_more_samples_than_there_are_are_refused():
    with pytest.raises(ValueError, match="eval.pass_k: 4 must be between 1 and the 3 samples"):
        pass_at_k(3, 1, 4)


def test_standard_errors_are_those_of_a_mean():
    values = [0.0, 0.5, 1.0, 1.0]
    mean, stderr = mean_and_stderr(values)
    assert mean == statistics.mean(values)
    assert stderr == pytest.approx(statistics.stdev(values) / 2)
    assert mean_and_stderr([0.5]) == (0.5, 0.0)
    assert math.isnan(mean_and_stderr([])[0])


EVALUATOR = """
def evaluate(task, trajectory):
    return float("w7" in trajectory.completion.split())
"""


def test_a_run_reports_pass_at_k_and_ends_where_its_metric_stays(tiny_dir, tmp_path):
    for name, first in (("train", 0), ("heldout", 20)):
        rows = [{"prompt": f"w{i} w{i + 7} w{i % 5}"} for i in range(first, first + 6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "evaluator.py").write_text(EVALUATOR)
    config = configs.base_config()
    config.steps, config.export = 20, False
    config.model.path = str(tiny_dir)
    config.tasks.train = str(tmp_path / "train.jsonl")
    config.tasks.heldout = str(tmp_path / "heldout.jsonl")
    config.evaluator = f"{tmp_path / 'evaluator.py'}:evaluate"
    config.batch.prompts, config.batch.group_size, config.batch.pack_tokens = 2, 2, 128
    config.sampler.max_new_tokens, config.sampler.slots = 6, 8
    config.rollout.max_length = 16
    config.scoring.workers = 1
    config.optim.lr = 1e-12  # nothing changes, so nothing becomes better
    config.eval.every, config.checkpoint.every = 1, 0
    config.eval.samples, config.eval.pass_k, config.eval.patience = 4, (1, 4), 2
    config.checkpoint.best_metric = "eval/pass_at_4"
    state, done = train.train(job.open_config(tmp_path / "run", config, {}), tmp_path / "run")
    assert done and int(state.step) == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert line["eval/pass_at_1"] == pytest.approx(line["eval/reward"])
        assert line["eval/pass_at_4"] > line["eval/pass_at_1"] > 0
        assert line["eval/pass_at_4_stderr"] > 0
    checkpoints = Checkpoints(
        tmp_path / "run" / "checkpoints", read_only=True, best_metric="eval/pass_at_4"
    )
    assert checkpoints.metric(2) == json.loads(lines[-1])["eval/pass_at_4"]
    checkpoints.close()
