import pytest
from ml_collections import config_dict

from rftjax import config as config_lib
from rftjax.config.fields import flatten
from rftjax.config.stored import may_change, merge_resume
from rftjax.errors import UserError


def complete(**fields):
    config = config_lib.base_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


def resume(stored, given=None, **flags):
    flags = {name.replace("__", "."): value for name, value in flags.items()}
    given = complete() if given is None else given
    given.update_from_flattened_dict(flags)
    return merge_resume(config_lib.from_json(config_lib.to_json(stored)), given, flags)


def test_the_same_command_resumes_with_the_same_config():
    stored = complete(optim__lr=3e-4, grpo__clip_high=0.28)
    assert flatten(resume(stored, optim__lr=3e-4)) == flatten(stored)


def test_the_stored_config_wins_over_a_spec_that_changed():
    stored = complete(optim__lr=3e-4, steps=50)
    given = complete(optim__lr=1e-3, batch__prompts=16, steps=100)
    with given.unlocked():
        given.mine = config_dict.ConfigDict({"new": 1})
    merged = resume(stored, given)
    assert (merged.optim.lr, merged.batch.prompts, merged.steps) == (3e-4, 8, 50)
    assert merged.mine.new == 1


def test_flags_that_contradict_the_stored_config_are_all_named():
    with pytest.raises(UserError) as caught:
        resume(complete(), batch__prompts=3, grpo__preset="dapo", steps=7)
    text = str(caught.value)
    assert "--config.batch.prompts=3: the run in this workdir has 8" in text
    assert "--config.grpo.preset='dapo': the run in this workdir has 'grpo'" in text
    assert "new workdir" in text
    assert "--config.steps" not in text


CHANGES = {
    "steps": 200,
    "export": False,
    "eval.every": 5,
    "checkpoint.keep": 7,
    "logging.histograms": False,
    "alarms.window": 2,
    "scoring.max_error_share": 1.0,
    "scoring.timeout_s": 50.0,
    "environments.workers": 5,
    "sampler.slots": 3,
    "sampler.pool": 300,
    "sampler.dispatch_steps": 4,
    "sampler.bridge_steps": 2,
    "sampler.prefill_rows": 3,
    "sampler.prefill_chunk": 3,
    "batch.pack_tokens": 100,
    "batch.pack_rows": 2,
    "model.remat": "products",
    "model.attention": "plain",
    "mesh.fsdp": 2,
    "optim.lr": 1e-3,
    "rollout.max_length": 2000,
    "model.path": "/elsewhere",
    "tasks.train": "moved.jsonl",
    "tasks.heldout": "moved.jsonl",
    "tasks.map": "rows.py:map",
    "evaluator": "moved.py:evaluate",
    "environment": "moved.py:World",
    "lora.path": "/elsewhere",
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_resumed_run_may_change_what_cannot_change_its_results(field):
    value = CHANGES[field]
    assert flatten(resume(complete(), **{field.replace(".", "__"): value}))[field] == value


FIXED = """
seed batch.prompts batch.group_size sampler.max_new_tokens sampler.temperature sampler.top_p sampler.top_k sampler.stop
rollout.max_turns rollout.partial overlap.max_staleness optim.clip optim.schedule lora.rank lora.alpha model.dtype
model.init grpo.preset grpo.kl_weight
"""


@pytest.mark.parametrize("field", FIXED.split())
def test_what_alters_results_may_not_change(field):
    assert field in flatten(complete()) and not may_change(field)


def test_the_length_of_a_conversation_may_grow_and_not_shrink():
    assert resume(complete(), rollout__max_length=2048).rollout.max_length == 2048
    with pytest.raises(UserError, match="may only raise it"):
        resume(complete(), rollout__max_length=512)


def test_an_input_that_has_gone_is_taken_from_where_the_spec_now_says(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    stored = complete(tasks__train="/gone/rows.jsonl", evaluator="/gone/reward.py:evaluate")
    given = complete(tasks__train=str(rows), evaluator=f"{tmp_path}/reward.py:evaluate")
    merged = resume(stored, given)
    assert merged.tasks.train == str(rows)
    assert merged.evaluator == f"{tmp_path}/reward.py:evaluate"
    stored.tasks.train = str(rows)
    assert resume(stored, complete(tasks__train="other.jsonl")).tasks.train == str(rows)
