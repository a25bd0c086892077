import contextlib
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import rftjax
from rftjax import sandbox
from rftjax.errors import UserError
from rftjax.sandbox import running

WAY, REASON = sandbox.support()
pytestmark = pytest.mark.skipif(not WAY, reason=REASON)
SMALL = sandbox.Limits(wall_s=30.0, cpu_s=20, memory_bytes=256 << 20, files_bytes=4 << 20)


NAME = f"of_{os.getpid()}.py"  # by which these programs are known from those of tests beside


def python(code: str, limits: sandbox.Limits = SMALL, **settings) -> sandbox.Result:
    files = {NAME: textwrap.dedent(code)}
    command = [sys.executable, "-s", f"/code/{NAME}"]
    return sandbox.run(
        command, limits=limits, files=files, environment={"LANG": "C.UTF-8"}, **settings
    )


def test_a_program_gets_its_input_and_gives_its_output_and_status():
    result = python(
        "import sys; print(input()[::-1]); print('note', file=sys.stderr); sys.exit(3)", stdin="abc"
    )
    assert result == sandbox.Result(3, "exit", "cba\n", "note\n")
    assert sandbox.run_python("import os; os.abort()", limits=SMALL).status == -6
    assert (
        python("import sys; print(len(sys.stdin.read()))", stdin="x" * 300_000).output == "300000\n"
    )
    assert python("print('\\N{SNOWMAN}')").output == "\N{SNOWMAN}\n"


def test_a_program_sees_no_variable_no_file_of_the_user_and_no_other_process(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    (tmp_path / "private").write_text("hidden")
    result = python(
        f"""
        import os
        print(sorted(name for name in os.environ if "TOKEN" in name))
        print(os.path.exists({str(tmp_path / "private")!r}), os.path.exists({str(Path.cwd() / "README.md")!r}))
        print(os.path.exists("/etc/passwd"), os.path.exists("/sys"), os.getcwd())
        print([name for name in os.listdir() if not {sys.prefix!r}.startswith("/tmp/" + name)])
        print(all(int(name) < 10 for name in os.listdir("/proc") if name.isdigit()))
        print(sorted(os.listdir("/proc/self/fd"))[:3], len(os.listdir("/proc/self/fd")))
        """
    )
    assert result.output.splitlines() == [
        "[]", "False False", "False False /tmp", "[]", "True", "['0', '1', '2'] 4",
    ]  # fmt: skip


def test_a_program_reads_what_it_is_given_and_changes_nothing(tmp_path):
    (tmp_path / "data").write_text("given")
    (tmp_path / "data").chmod(0o666)
    result = python(
        f"""
        print(open({str(tmp_path / "data")!r}).read())
        for path in ({str(tmp_path / "data")!r}, "/code/{NAME}", "/usr/new", {sys.prefix!r} + "/new", "/new"):
            try:
                open(path, "a")
                print("opened", path)
            except OSError as error:
                pass
        open("/tmp/own", "w").write("kept for its own time")
        """,
        readable=[tmp_path / "data"],
    )
    assert (result.output, result.errors) == ("given\n", "")
    assert not Path("/tmp/own").exists() and (tmp_path / "data").read_text() == "given"


def test_links_lead_nowhere():
    result = python(
        """
        import os
        for number, target in enumerate(("/proc/1/root", "/proc/1/cwd", "../../../..")):
            os.symlink(target, f"/tmp/{number}")
            try:
                print("etc" in os.listdir(f"/tmp/{number}") and os.path.exists(f"/tmp/{number}/etc/passwd"))
            except OSError:
                print(False)
        """
    )
    assert result.output == "False\n" * 3


def test_nothing_can_be_reached_by_network():
    result = python(
        """
        import socket
        for family, address in ((2, ("127.0.0.1", 22)), (2, ("10.0.0.1", 80)), (10, ("::1", 22)), (40, (2, 22))):
            try:
                with socket.socket(family) as one:
                    one.connect(address)
                print("connected", address)
            except OSError as error:
                print(error.errno)
        """
    )
    assert "connected" not in result.output and result.output.splitlines()[-1] == "1"


def test_ctypes_opens_no_way_out():
    result = python(
        """
        import ctypes
        libc = ctypes.CDLL(None)
        calls = [libc.unshare(0x10000000), libc.mount(b"x", b"/tmp", b"tmpfs", 0, None), libc.setuid(0),
                 libc.ptrace(0, 0, 0, 0), libc.chroot(b"/tmp"), libc.umount(b"/tmp"), libc.sethostname(b"x", 1)]
        print(set(calls))
        """
    )
    assert result.output == "{-1}\n"


def test_killing_all_it_can_ends_the_program_alone():
    result = python(
        """
        import os
        for pid in (os.getppid(), 1, -1):
            try:
                os.kill(pid, 9)
            except OSError:
                pass
        """
    )
    assert result.reason == "exit" and python("print('next')").output == "next\n"


def test_processes_left_behind_end_with_the_program():
    code = """
        import os, time
        for _ in range(5):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    open("/tmp/there", "a").write("x")
                    time.sleep(1000)
                os._exit(0)
        while not os.path.exists("/tmp/there") or len(open("/tmp/there").read()) < 5:
            time.sleep(0.01)
        print(len([name for name in os.listdir("/proc") if name.isdigit()]) > 5)
        """
    assert python(code).output == "True\n"
    all_end()


def running_sandboxes() -> int:
    """Returns how many processes have a command line with a sandboxed program."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                count += f"/code/{NAME}".encode() in Path("/proc", name, "cmdline").read_bytes()
    return count


def all_end() -> None:
    """Waits until none of these programs is left."""
    end = time.monotonic() + 30.0
    while running_sandboxes():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_program_that_is_too_large_gets_a_memory_error_and_many_together_are_ended():
    assert "MemoryError" in python("bytearray(10 << 30)").errors
    many = """
        import os, time
        for _ in range(4):
            if os.fork() == 0:
                kept = b"1" * (100 << 20)
                time.sleep(1000)
        time.sleep(1000)
        """
    assert python(many).reason == "memory"


def test_limits_of_time_output_files_and_processes_end_a_program():
    short = sandbox.Limits(wall_s=0.5)
    assert python("import time; time.sleep(1000)", short).reason == "time"
    assert python("while True: pass", sandbox.Limits(wall_s=60.0, cpu_s=1)).reason == "cpu"
    flood = python("while True: print('x' * 10000)")
    assert flood.reason == "output" and len(flood.output) == SMALL.output_bytes
    assert "File too large" in python("open('/tmp/a', 'wb').write(bytes(8 << 20))").errors
    full = python("for n in range(3): open(f'/tmp/{n}', 'wb').write(bytes(3 << 20))")
    assert "No space left" in full.errors
    bomb = """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """
    few = sandbox.Limits(wall_s=2.0, processes=8)
    assert python(bomb, few).reason in ("time", "processes")
    all_end()


def test_a_program_dies_with_the_process_that_started_it_and_leaves_no_file(tmp_path):
    program = f"""
        import sys
        from rftjax import sandbox
        files = {{{NAME!r}: "import time; time.sleep(1000)"}}
        sandbox.run([sys.executable, "/code/{NAME}"], files=files, limits=sandbox.Limits(1000.0))
        """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=Path(rftjax.__file__).parent.parent,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    end = time.monotonic() + 60.0
    while running_sandboxes() < 2:  # the one at its command line, and those inside
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.wait()
    all_end()
    assert list(tmp_path.iterdir()) == []


def test_a_program_has_its_files_whole_by_either_way(monkeypatch):
    files = {"main.py": "print(len(open('/code/long').read()), open('/code/b').read())"}
    files |= {"long": "x" * 3_000_000, "b": "\N{SNOWMAN}"}
    for way in ("namespaces", "bubblewrap") if shutil.which("bwrap") else ("namespaces",):
        monkeypatch.setattr(running, "support", lambda way=way: (way, ""))
        result = sandbox.run([sys.executable, "/code/main.py"], files=files, limits=SMALL)
        assert (result.output, result.errors) == ("3000000 \N{SNOWMAN}\n", ""), way


def test_where_no_boundary_can_be_drawn_nothing_runs(monkeypatch):
    monkeypatch.setattr(running, "support", lambda: ("", "no boundary here: install one"))
    with pytest.raises(UserError, match="no boundary here: install one"):
        python("print(1)")
    with pytest.raises(UserError, match="^evaluator=x: no boundary here"):
        sandbox.require("evaluator=x")


def test_a_boundary_that_fails_is_an_error_and_no_result(monkeypatch):
    monkeypatch.setattr(running, "SYSTEM", ())  # without libraries no interpreter starts
    monkeypatch.setattr(running, "_readable", lambda paths: ["/nowhere"])
    with pytest.raises(UserError, match="the sandbox could not start: .*nowhere"):
        python("print(1)")
