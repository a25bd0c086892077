"""User code may do what it likes: the call ends, the pool goes on, and nothing is left running."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rftjax import types
from rftjax.workers import processes
from rftjax.workers.pool import WorkerError, Workers
from rftjax.workers.serving import describe
from rftjax.workers.user_code import load_function

USER_CODE = """
import asyncio, ctypes, os, subprocess, sys, time

def act(what, value=None):
    if what == "echo":
        return value
    if what == "pid":
        return os.getpid()
    if what == "modules":
        return sorted({name.split(".")[0] for name in sys.modules})
    if what == "raise":
        raise KeyError("answer")
    if what == "system_exit":
        sys.exit("bye")
    if what == "loop":
        while True:
            pass
    if what == "exit":
        os._exit(3)
    if what == "crash":
        ctypes.string_at(0)
    if what == "lambda":
        return lambda: 0
    if what == "own_class":
        return Own()
    if what == "large":
        return bytes(value)
    if what == "print":
        block = "x" * 2**20
        for _ in range(value):
            print(block)
    if what == "output_of_others":
        subprocess.run(["head", "-c", str(value), "/dev/zero"])
        for _ in range(value // 2**20):
            os.write(1, bytes(2**20))
            os.write(2, bytes(2**20))
        return "written"
    if what == "leave_children":  # one in the group, one in a session of its own, one forked zombie
        child = subprocess.Popen(["sleep", "1000"])
        daemon = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        forked = os.fork()
        if forked == 0:
            os._exit(0)
        with open(value, "w") as file:
            file.write(f"{child.pid} {daemon.pid} {forked} {os.getpid()}")
        while True:
            pass
    if what == "daemons":
        start = [subprocess.Popen(["sleep", "1000"], start_new_session=own) for own in (0, 1)]
        return [os.getpid()] + [child.pid for child in start]
    if what == "fork_and_return":
        os.fork()
        return "once"

async def act_async(what, value=None):
    if what == "sleep":
        await asyncio.sleep(value)
        return value
    if what == "block":
        with open(value, "a") as file:
            file.write("x")
        await asyncio.sleep(0.05)
        time.sleep(100)
    if what == "clean_up":
        try:
            await asyncio.sleep(30)
        finally:
            open(value, "w").close()
    if what == "stubborn":
        while True:
            try:
                await asyncio.sleep(value)
            except asyncio.CancelledError:
                pass
    return act(what, value)

class Own:
    pass

number = 3
"""


@pytest.fixture(scope="module")
def user_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user") / "user_code.py"
    path.write_text(USER_CODE)
    return path


@pytest.fixture(scope="module")
def pool(user_file: Path):
    """One process, so that each test also shows that the one before left the pool usable."""
    with Workers(f"{user_file}:act", 1, 0.5, limit_field="scoring.timeout_s") as pool:
        yield pool
        assert pool.submit("echo", "still here").result(10) == "still here"


@pytest.fixture(scope="module")
def patient_pool(user_file: Path):
    with Workers(f"{user_file}:act", 1, 20.0) as pool:
        yield pool


@pytest.fixture
def async_pool(user_file: Path):
    with Workers(f"{user_file}:act_async", 1, 0.4) as pool:
        yield pool


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_all_end(pids: list[int]) -> None:
    give_up = time.monotonic() + 5.0
    while any(map(is_running, pids)) and time.monotonic() < give_up:
        time.sleep(0.02)
    assert not [pid for pid in pids if is_running(pid)]


def test_calls_return_their_results_in_any_number(pool: Workers):
    futures = [pool.submit("echo", {"number": number}) for number in range(50)]
    assert [future.result(10) for future in futures] == [{"number": n} for n in range(50)]


def test_a_worker_imports_neither_jax_nor_numpy(pool: Workers):
    assert not {"jax", "numpy", "flax", "transformers"} & set(pool.submit("modules").result(10))


def test_an_exception_names_itself_and_its_place(pool: Workers):
    with pytest.raises(WorkerError, match=r"KeyError: 'answer' \(user_code.py:\d+\)") as caught:
        pool.submit("raise").result(10)
    assert "Traceback" in caught.value.details


def test_system_exit_is_an_error_of_the_call(pool: Workers):
    pid = pool.submit("pid").result(10)
    with pytest.raises(WorkerError, match="SystemExit: bye"):
        pool.submit("system_exit").result(10)
    assert pool.submit("pid").result(10) == pid


def test_an_endless_loop_is_stopped_and_its_process_replaced(pool: Workers):
    pid = pool.submit("pid").result(10)
    hanging = pool.submit("loop")
    behind = pool.submit("pid")
    with pytest.raises(WorkerError, match=r"overran the time limit of 0.5 s \(scoring.timeout_s\)"):
        hanging.result(10)
    assert behind.result(10) != pid
    assert not is_running(pid)


@pytest.mark.parametrize(
    ("what", "status"), [("exit", "exit status 3"), ("crash", "killed by SIGSEGV")]
)
def test_a_death_is_an_error_of_the_call_alone(pool: Workers, what: str, status: str):
    before, dying, behind = pool.submit("echo", 1), pool.submit(what), pool.submit("echo", 2)
    with pytest.raises(WorkerError, match=status):
        dying.result(10)
    assert (before.result(10), behind.result(10)) == (1, 2)


@pytest.mark.parametrize(
    ("what", "value", "reason"),
    [
        ("lambda", None, "cannot be pickled"),
        ("own_class", None, "return plain Python values"),
        ("large", 65 * 2**20, "takes 681574.. bytes"),
    ],
)
def test_a_result_that_cannot_be_sent_is_an_error_of_the_call(
    patient_pool: Workers, what: str, value: object, reason: str
):
    pid = patient_pool.submit("pid").result(10)
    with pytest.raises(WorkerError, match=reason):
        patient_pool.submit(what, value).result(20)
    assert patient_pool.submit("pid").result(10) == pid


def test_arguments_that_cannot_be_pickled_are_an_error_of_the_call(pool: Workers):
    with pytest.raises(WorkerError, match="arguments cannot be pickled"):
        pool.submit("echo", lambda: 0).result(10)


def test_a_gigabyte_of_output_neither_blocks_nor_shows(
    patient_pool: Workers, capfd: pytest.CaptureFixture[str]
):
    gigabyte = 2**30
    assert patient_pool.submit("output_of_others", gigabyte).result(30) == "written"
    assert patient_pool.submit("print", 64).result(30) is None
    assert len("".join(capfd.readouterr())) < 30_000


def test_what_user_code_prints_is_shown_up_to_a_limit(
    user_file: Path, capfd: pytest.CaptureFixture[str]
):
    with Workers(f"{user_file}:act", 1, 5.0) as pool:
        pool.submit("print", 1).result(10)
    shown = capfd.readouterr().err
    assert shown.startswith("[worker] xxx")
    assert "the rest is dropped" in shown
    assert len(shown) < 30_000


def test_an_overrun_kills_children_zombies_and_daemons(pool: Workers, tmp_path: Path):
    pids_file = tmp_path / "pids"
    with pytest.raises(WorkerError, match="overran"):
        pool.submit("leave_children", str(pids_file)).result(10)
    pids = [int(pid) for pid in pids_file.read_text().split()]
    assert len(pids) == 4
    assert_all_end(pids)
    assert not Path(f"/proc/{pids[2]}").exists() or sys.platform != "linux"  # reaped, no zombie


def test_the_end_of_a_session_ends_what_it_started(pool: Workers):
    pids = pool.submit("daemons", session="a").result(10)
    assert all(map(is_running, pids))
    assert pool.submit("echo", 1, session="a", last=True).result(10) == 1
    assert_all_end(pids)


def test_a_forked_child_that_comes_back_answers_nothing(pool: Workers):
    pid = pool.submit("pid").result(10)
    assert pool.submit("fork_and_return").result(10) == "once"
    assert {pool.submit("pid").result(10) for _ in range(50)} == {pid}


def test_processes_end_when_the_main_process_is_killed_even_hung_ones(
    user_file: Path, tmp_path: Path
):
    pids_file = tmp_path / "pids"
    program = f"""
    import time
    from rftjax.workers.pool import Workers
    pool = Workers({f"{user_file}:act"!r}, 2, 1000.0)
    pool.submit("leave_children", {str(pids_file)!r})
    print(pool.submit("pid").result(), flush=True)
    time.sleep(1000)
    """
    main = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert main.stdout is not None
    idle = int(main.stdout.readline())
    give_up = time.monotonic() + 10.0
    while not (pids_file.exists() and len(pids_file.read_text().split()) == 4):
        assert time.monotonic() < give_up
        time.sleep(0.02)
    os.kill(main.pid, signal.SIGKILL)
    main.wait()
    main.stdout.close()
    assert_all_end([idle, *(int(pid) for pid in pids_file.read_text().split())])


def test_close_ends_processes_and_calls_and_can_be_repeated(user_file: Path):
    pool = Workers(f"{user_file}:act", 1, 100.0)
    pid = pool.submit("pid").result(10)
    running, queued = pool.submit("loop"), pool.submit("echo", 1)
    pool.close()
    pool.close()
    for future in (running, queued):
        with pytest.raises(WorkerError, match="closed"):
            future.result(0)
    assert not is_running(pid)
    with pytest.raises(WorkerError, match="closed"):
        pool.submit("pid").result(0)


def test_close_with_calls_in_the_queue_raises_nothing_in_the_pool(
    user_file: Path, caplog: pytest.LogCaptureFixture
):
    pool = Workers(f"{user_file}:act", 1, 100.0)
    pool.submit("pid").result(10)
    futures = [pool.submit("loop"), *(pool.submit("echo", n) for n in range(3))]
    pool.submit("pid", session="c").result(10)  # what came before it is in the queue now
    futures += [pool.submit("loop", session="a"), pool.submit("echo", session="a")]
    futures.append(pool.submit("echo", session="b"))
    futures[-1].cancel()
    pool.close()
    assert all(future.done() for future in futures)
    assert not caplog.records


def test_async_calls_run_at_once_each_with_its_own_limit(async_pool: Workers):
    long = [async_pool.submit("sleep", 30) for _ in range(20)]
    short = [async_pool.submit("sleep", 0.1) for _ in range(20)]
    pid = async_pool.submit("pid").result(10)
    assert [future.result(10) for future in short] == [0.1] * 20
    for future in long:
        with pytest.raises(WorkerError, match="overran the time limit"):
            future.result(10)
    assert async_pool.submit("pid").result(10) == pid  # cancelled, so nothing was killed


def test_system_exit_in_an_async_call_is_an_error_of_that_call(async_pool: Workers):
    with pytest.raises(WorkerError, match=r"^SystemExit: bye \(user_code.py:\d+\)"):
        async_pool.submit("system_exit").result(10)


def test_an_overrun_async_call_is_cancelled(async_pool: Workers, tmp_path: Path):
    with pytest.raises(WorkerError, match="overran"):
        async_pool.submit("clean_up", str(tmp_path / "cleaned")).result(10)
    assert (tmp_path / "cleaned").exists()


def test_an_async_call_that_refuses_to_be_cancelled_still_ends(async_pool: Workers):
    with pytest.raises(WorkerError, match="overran"):
        async_pool.submit("stubborn", 30).result(10)
    assert async_pool.submit("echo", 1).result(10) == 1


def test_a_blocked_event_loop_costs_only_the_call_that_blocks_it(
    async_pool: Workers, tmp_path: Path
):
    others = [async_pool.submit("sleep", 0.3) for _ in range(5)]
    blocking = async_pool.submit("block", str(tmp_path / "runs"))
    with pytest.raises(WorkerError, match="overran the time limit"):
        blocking.result(10)
    assert [future.result(20) for future in others] == [0.3] * 5
    assert (tmp_path / "runs").read_text() == "x"  # the one at fault is known and not run again


def test_a_death_among_async_calls_costs_only_the_call_at_fault(async_pool: Workers):
    others = [async_pool.submit("sleep", 0.1) for _ in range(5)]
    assert async_pool.bystanders == 0
    with pytest.raises(WorkerError, match="exit status 3"):
        async_pool.submit("exit").result(10)
    assert [future.result(20) for future in others] == [0.1] * 5


def test_bad_company_again_and_again_costs_an_asynchronous_call_nothing(
    async_pool: Workers, tmp_path: Path
):
    guilty, innocent = [], []
    for number in range(5):
        guilty.append(async_pool.submit("block", str(tmp_path / f"{number}")))
        innocent += [async_pool.submit("sleep", 0.2) for _ in range(2)]
    for future in guilty:
        with pytest.raises(WorkerError, match="overran the time limit"):
            future.result(60)
    assert [future.result(60) for future in innocent] == [0.2] * 10
    assert async_pool.bystanders > 0


def test_a_session_stays_in_its_process_and_is_lost_with_it(user_file: Path):
    with Workers(f"{user_file}:act", 2, 0.5) as pool:
        pids = {name: pool.submit("pid", session=name).result(10) for name in ("a", "b")}
        assert pids["a"] != pids["b"]
        assert [pool.submit("pid", session="a").result(10) for _ in range(4)] == [pids["a"]] * 4
        lost, queued = pool.submit("loop", session="a"), pool.submit("echo", session="a")
        for future in (lost, queued):
            with pytest.raises(WorkerError, match="overran the time limit"):
                future.result(10)
        with pytest.raises(WorkerError, match="an earlier call of the episode overran"):
            pool.submit("pid", session="a").result(10)
        assert pool.submit("pid", session="b").result(10) == pids["b"]
        with pytest.raises(WorkerError, match="the worker process died|overran"):
            pool.submit("loop", session="a", last=True).result(10)
        assert pool.submit("pid", session="a").result(10) != pids["a"]


def test_each_session_has_a_process_that_starts_as_the_import_left_it(tmp_path: Path):
    path = tmp_path / "counted.py"
    log = tmp_path / "imports"
    path.write_text(
        f"import os, random\nopen({str(log)!r}, 'a').write('x')\nseen = []\n"
        "def act(value):\n    seen.append(value)\n    return seen, random.random()\n"
    )
    with Workers(f"{path}:act", 1, 5.0) as pool:
        path.write_text(
            "this is no longer Python"
        )  # a run goes on with the code that it began with
        answers = [pool.submit(n, session=str(n)).result(10) for n in range(3)]
    assert [seen for seen, _ in answers] == [[0], [1], [2]]
    assert len({drawn for _, drawn in answers}) == 3
    assert log.read_text() == "x"


def test_a_file_that_imports_numpy_is_forked_and_each_worker_draws_its_own(tmp_path: Path):
    path, log = tmp_path / "arrays.py", tmp_path / "imports"
    path.write_text(
        f"import numpy\nopen({str(log)!r}, 'a').write('x')\n"
        "def act():\n    return float(numpy.random.random() + numpy.ones((99, 99)).dot(numpy.ones(99))[0])\n"
    )
    with Workers(f"{path}:act", 1, 20.0) as pool:
        assert len({pool.submit(session=name).result(20) for name in "abc"}) == 3
    assert log.read_text() == "x"


@pytest.mark.parametrize(
    "at_import",
    [
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "import socket\nsocket.socketpair()[0].detach()",
        "import subprocess\nchild = subprocess.Popen(['sleep', '60'])",
        "file = open(__file__)",
    ],
)
def test_code_that_a_fork_would_break_is_imported_by_each_process(tmp_path: Path, at_import: str):
    path, log = tmp_path / "threads.py", tmp_path / "imports"
    path.write_text(
        f"import os, time\nopen({str(log)!r}, 'a').write('x')\n{at_import}\n"
        "def act(what):\n"
        "    if what == 'exit': os._exit(3)\n"
        "    return os.getpid()\n"
    )
    with Workers(f"{path}:act", 1, 5.0) as pool:
        a, b = (pool.submit("pid", session=name).result(20) for name in "ab")
        assert a != b
        with pytest.raises(WorkerError, match="exit status 3"):
            pool.submit("exit", session="a").result(20)
        assert pool.submit("pid", session="b", last=True).result(20) == b
        assert (
            pool.submit("pid", session="c").result(20) == b
        )  # costly to start, so it is used again
    assert log.read_text() == "xx"


def test_a_crash_says_what_was_printed_last(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    path = tmp_path / "loud.py"
    path.write_text(
        "import os, subprocess\n"
        "def act():\n"
        "    print('to stdout')\n"
        "    subprocess.run(['echo', 'of a child'])\n"
        "    os.write(2, b'no licence found\\n')\n"
        "    os._exit(9)\n"
    )
    with (
        Workers(f"{path}:act", 1, 5.0, field="evaluator") as pool,
        pytest.raises(
            WorkerError, match="exit status 9.*it last printed: no licence found"
        ) as caught,
    ):
        pool.submit().result(10)
    assert "of a child" in caught.value.details
    shown = capfd.readouterr().err
    for line in ("to stdout", "of a child", "no licence found"):
        assert f"[evaluator] {line}\n" in shown


def test_an_exception_without_a_text_is_an_error_of_the_call(tmp_path: Path):
    path = tmp_path / "mute.py"
    path.write_text(
        "class Mute(Exception):\n    def __str__(self): raise ValueError\ndef act(): raise Mute\n"
    )
    with Workers(f"{path}:act", 1, 5.0) as pool, pytest.raises(WorkerError, match="^Mute: "):
        pool.submit().result(10)


def test_an_asynchronous_call_does_not_pay_for_one_that_holds_the_loop(tmp_path: Path):
    path = tmp_path / "holding.py"
    path.write_text(
        "import asyncio, time\n"
        "async def act(what):\n"
        "    if what == 'hold':\n        await asyncio.sleep(0.1)\n        time.sleep(0.6)\n"
        "    await asyncio.sleep(0.4)\n"
        "    return what\n"
    )
    with Workers(f"{path}:act", 1, 0.8) as pool:
        futures = [pool.submit(what) for what in ("hold", "a", "b")]
        assert [future.result(10) for future in futures] == ["hold", "a", "b"]


def test_code_that_no_longer_imports_fails_calls_instead_of_hanging(tmp_path: Path):
    path = tmp_path / "changing.py"
    thread = "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
    path.write_text(f"{thread}\nimport os\ndef act(status):\n    os._exit(status)\n")
    with Workers(f"{path}:act", 1, 5.0) as pool:  # code that cannot be forked is imported again
        path.write_text("import not_there_at_all\n")
        for reason in ("exit status 4", "not_there_at_all", "not_there_at_all"):
            with pytest.raises(WorkerError, match=reason):
                pool.submit(4).result(10)


@pytest.mark.parametrize(
    ("code", "spec", "message"),
    [
        ("", "user.act", "must be 'package.module:name' or 'path/to/file.py:name'"),
        ("", "missing.py:act", "the file must exist"),
        ("", "no_such_module:act", "No module named 'no_such_module'"),
        ("def other(): pass", "user.py:act", "does not; it defines other"),
        ("act = 3", "user.py:act", "is of type int"),
        ("1 / 0", "user.py:act", r"user.py\", line 1(.|\n)*ZeroDivisionError"),
        ("def f(:", "user.py:act", "SyntaxError"),
        ("import sys; sys.exit(2)", "user.py:act", "SystemExit"),
        ("import os; os._exit(2)", "user.py:act", "ended its process while it was imported"),
        ("import time; time.sleep(60)", "user.py:act", "was not imported within 0.5 s"),
    ],
)
def test_code_that_does_not_import_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, spec: str, message: str
):
    (tmp_path / "user.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    start_timeout_s = 0.5 if "sleep" in code else 30.0
    with pytest.raises(ValueError, match=message) as caught:
        Workers(spec, 1, 1.0, field="evaluator", start_timeout_s=start_timeout_s)
    assert f"evaluator={spec!r}" in str(caught.value)


def test_a_file_finds_its_neighbours_and_does_not_replace_a_module(tmp_path: Path):
    (tmp_path / "neighbour.py").write_text("value = 5")
    (tmp_path / "json.py").write_text("from neighbour import value\ndef act(): return value")
    import json

    try:
        assert load_function(f"{tmp_path / 'json.py'}:act")() == 5
        assert sys.modules["json"] is json
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["neighbour"]


@pytest.mark.parametrize("name", ["judge.py", "my-judge.v2.py", "json.py"])
def test_functions_and_classes_of_a_file_reach_the_processes_that_it_starts(
    tmp_path: Path, name: str
):
    (tmp_path / name).write_text(
        "import concurrent.futures, dataclasses, multiprocessing\n"
        "class Odd(Exception): pass\n"
        "@dataclasses.dataclass\nclass Case:\n    value: int\n"
        "def check(case):\n"
        "    if case.value < 0: raise Odd('negative')\n"
        "    return Case(case.value + 1)\n"
        "def act(value):\n"
        "    spawn = multiprocessing.get_context('spawn')\n"
        "    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:\n"
        "        return pool.submit(check, Case(value)).result().value\n"
    )
    with Workers(f"{tmp_path / name}:act", 1, 60.0) as pool:
        good, bad = pool.submit(1), pool.submit(-1)
        assert good.result(60) == 2
        with pytest.raises(WorkerError, match="Odd: negative") as caught:
            bad.result(60)
    stem = name.removesuffix(".py").replace("-", "_").replace(".", "_")
    assert f"\n{stem}.Odd: negative" in caught.value.details


def test_a_dotted_name_is_resolved():
    assert load_function("json:loads")("[1]") == [1]
    assert load_function("json:JSONDecoder.decode") is not None


def test_worker_processes_find_the_package_where_it_is_not_installed():
    code = processes.import_path() + "import rftjax; print(sys.path[0])"
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == str(Path(types.__file__).absolute().parents[1])


def test_a_frame_of_the_package_is_not_taken_for_the_users_own():
    try:
        types.Sequence().extend([1], [0.0, 0.0])
    except ValueError as error:
        line, _ = describe(error)
    assert "(test_workers.py:" in line
