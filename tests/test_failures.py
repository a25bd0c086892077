import errno
import os
import re
import subprocess
import sys

import jax
import pytest

from rftjax.config.stored import may_change
from rftjax.errors import UserError
from rftjax.run import failures
from rftjax.run.interruption import Interrupted


def caught(action):
    with pytest.raises(Exception) as found:
        action()
    return found.value


def test_errors_of_files_are_the_user_s_and_say_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    missing = caught(lambda: (tmp_path / "none").read_bytes())
    assert failures.explain(missing) == (
        f"{tmp_path / 'none'}: No such file or directory; correct the path, or put the file back"
    )
    assert "is a directory" in failures.explain(caught(lambda: tmp_path.read_bytes()))
    assert "a part of it is a file" in failures.explain(
        caught(lambda: (tmp_path / "file/x").read_bytes())
    )
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "free some space" in failures.explain(full)


def test_a_message_that_has_a_way_out_is_left_as_it_is():
    error = OSError(errno.ENOSPC, "cannot record the run; free some", "/there")
    assert failures.explain(error) == "/there: cannot record the run; free some"
    assert failures.explain(UserError("x: y")) == "x: y"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("shapes differ"),
        AssertionError(),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        OSError("no number"),
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)),
    ],
)
def test_everything_else_is_a_fault_and_keeps_its_traceback(error):
    assert failures.explain(error) == ""


def test_a_reader_that_has_ended_is_told_in_one_line(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    code = (
        "import sys\nfrom rftjax.run import failures\n"
        "try:\n    print('x', flush=True)\nexcept OSError as error:\n    sys.exit(failures.unread(error))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    told = "the program that read the output has ended; send the output to a file\n"
    assert (ended.returncode, ended.stderr) == (1, told)
    assert failures.unread(BrokenPipeError(errno.EPIPE, "Broken pipe")) == ""


def test_a_fault_is_kept_in_the_workdir_with_step_and_versions(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    error = caught([].pop)
    path = failures.record(tmp_path, error)
    failures.record(tmp_path, error)
    text = path.read_text()
    assert text.count("IndexError: pop from empty list") == 2
    assert "after step 3" in text and "jax 0" in text and "rftjax" in text
    assert 'File "' in text


def test_where_nothing_can_be_written_the_screen_must_do(tmp_path):
    assert failures.record(tmp_path / "none", ValueError()) is None


def test_too_little_memory_names_what_may_be_lowered_in_a_resume():
    error = jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"
    )
    text = failures.explain(error)
    named = set(re.findall(r"\b(?:sampler|batch|model|mesh)\.\w+", text))
    assert {"sampler.slots", "model.remat"} <= named and all(map(may_change, named))
    assert "\n" not in text


@pytest.fixture
def program(tmp_path, tiny_dir):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1 w2"}\n')
    (tmp_path / "reward.py").write_text("def evaluate(task, trajectory):\n    return 0.0\n")

    def call(*arguments, **environment):
        command = [sys.executable, "-m", "rftjax.main", "--config=rft:debug", "--workdir=run"]
        command += [f"--config.model.path={tiny_dir}", "--config.tasks.train=rows.jsonl"]
        command += ["--config.evaluator=reward.py:evaluate", "--config.rollout.max_length=64"]
        process = subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        return process.returncode, process.stderr

    return call


def test_a_platform_that_is_not_there_is_said_in_one_line(program):
    code, error = program(JAX_PLATFORMS="cuda")
    assert code == 1 and "Traceback" not in error
    assert error.splitlines()[-1].startswith(
        "error: JAX_PLATFORMS='cuda': JAX finds no such device"
    )


def test_a_fault_is_on_the_screen_and_in_the_workdir(program, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'rftjax.main' in ' '.join(sys.orig_argv) and '--workdir=run' in sys.orig_argv:\n"
        "    import rftjax.train\n    rftjax.train.task_stream = None\n"
    )
    code, error = program(PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    kept = (tmp_path / "run" / "errors.txt").read_text()
    assert code == 1
    for text in (error, kept):
        assert "Traceback" in text and "'NoneType' object is not callable" in text
    assert f"it is in {tmp_path / 'run' / 'errors.txt'}" in error


def test_ctrl_c_while_libraries_are_imported_is_not_lost(program, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in a background
        "class Catching:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        try:\n"
        "            if name == 'rftjax.modes':\n"
        "                signal.raise_signal(signal.SIGINT)\n"
        "        except BaseException:\n"
        "            pass\n"
        "sys.meta_path.insert(0, Catching())\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    assert program("--stop_after=0", PYTHONPATH=path) == (130, "interrupted\n")


def test_an_interrupted_run_says_how_it_goes_on():
    assert failures.interrupted(KeyboardInterrupt(), False) == (
        "interrupted; the same command goes on"
    )
    assert failures.interrupted(Interrupted(3, 9), True) == (
        "interrupted at 3/9; the same command without --restart_from goes on"
    )
