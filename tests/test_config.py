import json
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import config_dict

from rftjax import config as config_lib
from rftjax.config import fields, ranges
from rftjax.config.fields import field_type, flatten, suggest

ROOT = Path(__file__).parent.parent


def complete(**fields):
    """A config that passes the check, with `fields` (double underscores for dots) on top."""
    config = config_lib.base_config()
    config.model.path = "owner/name"
    config.evaluator = "package.module:evaluate"
    config.tasks.train = "owner/dataset"
    config.tasks.heldout = "owner/heldout"
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


def complaint(config, **options):
    with pytest.raises(ValueError) as caught:
        config_lib.check(config, **options)
    return str(caught.value)


def test_the_defaults_pass_once_the_required_fields_are_given():
    config_lib.check(complete())
    config_lib.check(complete(), devices=8)


def test_all_required_fields_are_named_at_once():
    text = complaint(config_lib.base_config())
    for field in ("model.path", "tasks.train", "evaluator"):
        assert f"{field}=''" in text
        assert f"--config.{field}=" in text


def test_a_misspelt_field_is_refused_where_it_is_written():
    config = config_lib.base_config()
    with pytest.raises(AttributeError):
        config.sampler.max_tokens = 3
    with pytest.raises((AttributeError, KeyError)):
        config.smapler = 3


def test_an_unknown_field_of_a_known_section_is_refused_with_a_suggestion():
    config = complete()
    with config.unlocked():
        config.sampler.max_new_token = 3
        config.mine = config_dict.ConfigDict({"whatever": 1})
    text = complaint(config)
    assert "sampler.max_new_token=3" in text
    assert "did you mean sampler.max_new_tokens" in text
    assert "mine" not in text


@pytest.mark.parametrize("missing", ["seed", "batch.group_size", "eval"])
def test_a_missing_field_is_named(missing):
    config = complete()
    with config.unlocked():
        section, _, name = missing.rpartition(".")
        del (config[section] if section else config)[name]
    assert f"{missing}" in complaint(config)
    assert "base_config" in complaint(config)


def test_every_numeric_field_has_a_range():
    ranged = {field for *_, fields in ranges.RANGES for field in fields.split()}
    base = config_lib.base_config()
    numeric = {
        field
        for field, value in flatten(base).items()
        if value is not None and field_type(base, field) in (int, float)
    }
    assert ranged == numeric


def test_every_number_is_refused_when_it_is_far_too_small():
    for *_, ranged in ranges.RANGES:
        for field in ranged.split():
            config = complete()
            config.update_from_flattened_dict({field: -7})
            text = complaint(config)
            assert f"{field}=-7" in text


def test_every_problem_is_listed_in_one_error():
    text = complaint(
        complete(sampler__top_p=1.5, optim__lr=0.0, model__dtype="float8", eval__samples=0)
    )
    assert "4 problems" in text
    assert "sampler.top_p=1.5: must be above 0.0 and at most 1.0" in text
    assert "optim.lr=0.0" in text
    assert "model.dtype='float8': must be one of float32, bfloat16" in text
    assert "eval.samples=0" in text


def test_nan_and_infinity_are_refused():
    assert "optim.lr=nan: must be finite" in complaint(complete(optim__lr=float("nan")))
    assert "optim.clip=inf: must be finite" in complaint(complete(optim__clip=float("inf")))


def test_a_wrong_type_is_named_with_the_right_one():
    config = complete()
    with config.unlocked():
        config.batch = config_dict.ConfigDict({**config.batch.to_dict(), "prompts": "many"})
    assert "batch.prompts='many': must be a whole number, is of type str" in complaint(config)


def test_relations_between_fields_are_checked():
    assert "rollout.max_length=64" in complaint(
        complete(sampler__max_new_tokens=64, rollout__max_length=64)
    )
    assert "sampler.slots=64" in complaint(complete(sampler__pool=8))
    assert "must be below steps=100" in complaint(complete(optim__warmup_steps=100))
    assert "optim.schedule='constant'" in complaint(complete(optim__final_lr_share=0.1))
    config_lib.check(complete(optim__final_lr_share=0.1, optim__schedule="cosine"))
    assert "optim.beta2=1.0: must be at least 0.0 and" in complaint(complete(optim__beta2=1.0))
    assert "tasks.heldout_count=5" in complaint(complete(tasks__heldout_count=5))
    config_lib.check(complete(tasks__heldout="", tasks__heldout_count=5))
    config_lib.check(complete(tasks__heldout=""))  # nothing to evaluate is no fault


def test_held_out_sets_are_named_texts_and_their_faults_are_all_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ood.jsonl").touch()
    sets = ("ood=ood.jsonl", "hard=package.module:rows#test", "v1.2_b-c=owner/data:en")
    config_lib.check(complete(eval__sets=sets))
    assert [config_lib.heldout_set(text) for text in sets] == [
        ("ood", "ood.jsonl", ""),
        ("hard", "package.module:rows", "test"),
        ("v1.2_b-c", "owner/data:en", ""),
    ]
    bad = {
        "ood.jsonl": "'ood.jsonl' must be a text 'name=source'",
        "=ood.jsonl": "'=ood.jsonl' must be a text",
        "ood=": "'ood=' must be a text",
        "ood=ood.jsonl#": "'ood=ood.jsonl#' must be a text",
        3: "3 must be a text",
        "a/b=ood.jsonl": "'a/b' must be a name of letters",
        "heldout=ood.jsonl": "'heldout' has another meaning",
        "part=ood.jsonl": "'part' has another meaning",
        "gone=gone.jsonl#test": f"gone: there is no {tmp_path / 'gone.jsonl'}",
        "ood=owner/data": "'ood' must name one set only",
    }
    text = complaint(complete(eval__sets=("ood=ood.jsonl", *bad)))
    assert text.count("eval.sets=(") == 1
    for problem in bad.values():
        assert problem in text


@pytest.mark.parametrize(
    "metric",
    [
        "eval/pass_at_4",
        "eval/ood/pass_at_2",
        "eval/ood/strict",
        "eval/lenient",
        "eval/part/a/b",
        "eval/metric/a",
    ],
)
def test_the_best_metric_is_one_of_a_held_out_set(metric):
    config_lib.check(
        complete(
            eval__sets=("ood=owner/ood",),
            eval__samples=4,
            eval__pass_k=(2, 4),
            checkpoint__best_metric=metric,
        )
    )


@pytest.mark.parametrize(
    "metric",
    [
        "",
        "reward/mean",
        "eval/pass_at_8",
        "eval/ode/reward",
        "eval/ood",
        "eval/ood/part/",
        "eval/tasks",
    ],
)
def test_a_best_metric_that_no_evaluation_can_have_is_refused(metric):
    text = complaint(
        complete(
            eval__sets=("ood=owner/ood",),
            eval__samples=4,
            eval__pass_k=(2, 4),
            checkpoint__best_metric=metric,
        )
    )
    assert f"checkpoint.best_metric={metric!r}: must be a metric of a held-out set: " in text
    assert "eval/reward, eval/pass_at_2, " in text and "eval/ood/strict, eval/ood/lenient" in text


def test_an_evaluator_may_be_left_out_where_an_environment_gives_turn_rewards(tmp_path):
    (tmp_path / "game.py").write_text("")
    config_lib.check(complete(evaluator="", environment=f"{tmp_path}/game.py:Game"))
    text = complaint(complete(evaluator=""))
    assert "evaluator='': must be given" in text and "an environment whose turn rewards" in text


def test_the_metric_of_the_main_set_is_refused_where_there_are_only_others():
    config = complete(eval__sets=("ood=owner/ood",), tasks__heldout="")
    text = complaint(config)
    assert "checkpoint.best_metric='eval/reward'" in text and "eval/ood/reward" in text
    config.checkpoint.best_metric = "eval/ood/reward"
    config_lib.check(config)
    config.checkpoint.best_metric = "eval/reward"
    config.tasks.heldout_count = 5
    config_lib.check(config)


def test_the_evaluator_of_held_out_tasks_is_looked_at_like_the_other():
    assert "eval.evaluator='judge': must be 'module:name'" in complaint(
        complete(eval__evaluator="judge")
    )
    assert "eval.evaluator='./no.py:f': there is no file" in complaint(
        complete(eval__evaluator="./no.py:f")
    )


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_a_group_of_one_is_refused_where_every_advantage_would_be_0(baseline):
    text = complaint(complete(batch__group_size=1, grpo__baseline=baseline))
    assert "batch.group_size=1" in text
    assert "grpo.baseline" in text
    config_lib.check(complete(batch__group_size=1, grpo__baseline="batch_mean"))


def test_a_mesh_that_the_devices_do_not_fill_is_refused():
    assert "mesh.fsdp=-1: only one axis" in complaint(complete(mesh__fsdp=-1))
    assert "the 8 devices" in complaint(complete(mesh__tensor=3), devices=8)
    assert "the 8 devices" in complaint(complete(mesh__data=2, mesh__fsdp=2), devices=8)
    config_lib.check(complete(mesh__data=2, mesh__fsdp=2, mesh__tensor=2), devices=8)
    config_lib.check(complete(mesh__data=2, mesh__fsdp=-1, mesh__tensor=2), devices=8)


def test_prompts_that_do_not_divide_over_the_processes_are_refused():
    text = complaint(complete(), devices=3, processes=3)
    assert "batch.prompts=8" in text
    assert "the 3 processes" in text
    config_lib.check(complete(batch__prompts=9), devices=3, processes=3)


def test_missing_files_are_named_by_their_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = complaint(
        complete(
            model__path="./model",
            tasks__train="rows.jsonl",
            evaluator="score.py:evaluate",
            environment="game.py",
        )
    )
    assert f"model.path='./model': there is no {tmp_path / 'model'}" in text
    assert f"there is no {tmp_path / 'rows.jsonl'}" in text
    assert f"there is no file {tmp_path / 'score.py'}" in text
    assert "environment='game.py': must be 'module:name' or 'file.py:name'" in text
    for name in ("rows.jsonl", "score.py"):
        (tmp_path / name).touch()
    (tmp_path / "model").mkdir()
    config_lib.check(
        complete(model__path="./model", tasks__train="rows.jsonl", evaluator="score.py:evaluate")
    )


def test_the_embedded_model_is_missing_with_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RFTJAX_CACHE", str(tmp_path))
    path = config_lib.embedded_model()
    assert Path(path).parent == tmp_path
    assert "python -m rftjax.weights.fetch_model" in complaint(complete(model__path=path))
    Path(path).touch()
    config_lib.check(complete(model__path=path))


def test_json_brings_every_field_back_with_its_type():
    config = complete(optim__lr=1.0, sampler__stop=("###", 7), grpo__clip_low=0.1)
    with config.unlocked():
        config.mine = config_dict.ConfigDict({"words": ("a", "b"), "depth": 3})
    text = config_lib.to_json(config)
    again = config_lib.from_json(text)
    assert flatten(again) == flatten(config)
    assert config_lib.to_json(again) == text
    assert isinstance(again.optim.lr, float)
    assert again.sampler.stop == ("###", 7)
    assert field_type(again, "grpo.kl_weight") is float
    assert again.is_locked


def test_a_broken_config_json_says_what_to_do():
    for text in ("{", "[]", json.dumps({"steps": "many"})):
        with pytest.raises(ValueError, match=r"config\.json.*new workdir"):
            config_lib.from_json(text)


def test_values_that_json_cannot_hold_are_refused():
    config = complete(optim__lr=float("inf"))
    with pytest.raises(ValueError, match="cannot be stored as JSON"):
        config_lib.to_json(config)


PROGRAM = """
import sys
from absl import app, flags
from ml_collections import config_flags
from rftjax import config
from rftjax.config import flags as rft_flags
config_flags.DEFINE_config_file("config")
flags.DEFINE_string("workdir", "", "")
def main(argv):
    values = flags.FLAGS["config"].override_values
    print(sorted(values.items()), flags.FLAGS.config.sampler.stop, flags.FLAGS.config.optim.lr)
app.run(main, flags_parser=rft_flags.parse_flags)
"""

SPEC = """
from rftjax.config import base_config
def get_config(argument=""):
    config = base_config()
    if argument == "bug":
        config.sampler.nothing = 1
    elif argument not in ("", "debug"):
        raise ValueError(f"no form {argument!r}, only debug")
    return config
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "spec.py").write_text(SPEC)

    def call(*arguments):
        process = subprocess.run(
            [sys.executable, "program.py", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "Traceback" not in process.stderr, process.stderr
        return process.returncode, process.stdout, process.stderr

    return call


def test_good_flags_reach_the_config(command):
    code, out, err = command(
        "--config=spec.py:debug", "--config.optim.lr=2", "--config.sampler.stop=('a', 3)"
    )
    assert code == 0, err
    assert out.strip() == "[('optim.lr', 2.0), ('sampler.stop', ('a', 3))] ('a', 3) 2.0"


def test_bad_flags_are_listed_with_what_to_write_instead(command):
    code, out, err = command(
        "--config=spec.py",
        "--config.sampler.max_new_token=3",
        "--config.group_size=4",
        "--config.steps=many",
        "--config.optim.lr=fast",
        "--config.export=perhaps",
        "--config.batch=3",
    )
    assert (code, out) == (2, "")
    lines = err.strip().splitlines()
    assert len(lines) == 6
    assert "did you mean sampler.max_new_tokens" in lines[0]
    assert "did you mean batch.group_size" in lines[1]
    assert lines[2].startswith("error: --config.steps='many': must be a whole number")
    assert "must be a number" in lines[3]
    assert "must be true or false" in lines[4]
    assert "is a section; set its fields one by one: batch.group_size" in lines[5]


def test_a_missing_or_failing_spec_is_told_in_one_line(command):
    cases = {
        ("--workdir=x",): "--config: must be given",
        ("--config=spek.py",): "there is no file spek.py; did you mean spec.py?",
        ("--config=spec.py:fast",): "spec.py, line 8: no form 'fast', only debug",
        ("--config=spec.py:bug",): "spec.py, line 6: AttributeError",
        ("--config=spec.py", "--config", "rft"): "is given 2 times (spec.py, ",
        ("--config=.",): "--config=.: is a folder; give a spec",
        ("--config=spec.py", "--wrkdir=x"): "Unknown command line flag 'wrkdir'",
    }
    for arguments, expected in cases.items():
        code, out, err = command(*arguments)
        assert (code, out) == (2, ""), err
        assert expected in err
        assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flag", "field"),
    [
        ("optim.learning_rate", "optim.lr"),
        ("batch.batch_size", "batch.prompts"),
        ("max_tokens", "sampler.max_new_tokens"),
        ("sampler.temp", "sampler.temperature"),
        ("grpo.num_generations", "batch.group_size"),
        ("grpo.beta", "grpo.kl_weight"),
        ("lora.r", "lora.rank"),
        ("Model.Model_Name_Or_Path", "model.path"),
    ],
)
def test_a_name_that_other_libraries_use_suggests_the_field(flag, field):
    assert f" {field}" in suggest(flag, flatten(config_lib.base_config()))


def test_every_synonym_is_of_a_field_that_exists():
    assert set(fields._SYNONYMS) <= set(flatten(config_lib.base_config()))


def test_home_directories_are_expanded_in_every_text(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = complete(
        model__path="~/model",
        evaluator="~/reward.py:evaluate",
        environment="~/world.py:World",
        tasks__map="~/rows.py:map",
        lora__path="~/run",
        eval__sets=("hard=~/hard.jsonl#test", "sums=~/rows.py:make"),
    )
    found = fields.expand_home(config)
    assert (found.model.path, found.evaluator) == ("/home/me/model", "/home/me/reward.py:evaluate")
    assert (found.environment, found.tasks.map) == (
        "/home/me/world.py:World",
        "/home/me/rows.py:map",
    )
    assert found.lora.path == "/home/me/run"
    assert found.eval.sets == ("hard=/home/me/hard.jsonl#test", "sums=/home/me/rows.py:make")
    assert config.model.path == "~/model" and found.tasks.train == "owner/dataset"


def test_the_cache_may_lie_in_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RFTJAX_CACHE", "~/cache")
    assert fields.cache_folder() == "/home/me/cache"


def test_a_spec_in_the_home_directory_is_found(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command("--config=~/spec.py:debug")[0] == 0


def test_answers_that_go_on_are_weighed_and_not_taken_with_what_no_checkpoint_holds():
    config_lib.check(complete(rollout__partial=2, grpo__tis_cap=2.0))
    text = complaint(complete(rollout__partial=2, grpo__tis_cap=0.0))
    assert "rollout.partial=2: must be 0 where grpo.tis_cap is 0.0" in text
    text = complaint(complete(rollout__partial=2, grpo__tis_cap=2.0, overlap__max_staleness=1))
    assert "rollout.partial=2: must be 0 with overlap.max_staleness=1" in text
    text = complaint(complete(rollout__partial=2, grpo__tis_cap=2.0, environment="json:loads"))
    assert "rollout.partial=2: must be 0 with environment" in text
