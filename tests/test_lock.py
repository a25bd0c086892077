import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from rftjax.errors import UserError
from rftjax.run import lock

HOLDER = """
import pathlib, sys, time
from rftjax.run import lock
with lock.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_with_host_and_process_of_the_first(tmp_path, holder):
    with pytest.raises(UserError) as caught, lock.held(tmp_path):
        pass
    assert f"process {holder.pid} on host {socket.gethostname()}, since 2" in str(caught.value)
    assert f"--workdir={tmp_path}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_lock_left_by_a_killed_process_does_not_block(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / lock.NAME).read_text()
    with lock.held(tmp_path):
        assert str(os.getpid()) in (tmp_path / lock.NAME).read_text()


def test_a_lock_ends_with_its_run_even_where_that_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.held(tmp_path):
        raise ZeroDivisionError
    assert (tmp_path / lock.NAME).read_text() == ""
    with lock.held(tmp_path):
        pass


@pytest.fixture
def no_kernel_locks(monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_where_a_file_system_has_no_locks_a_living_process_blocks_and_a_dead_one_does_not(
    tmp_path, no_kernel_locks
):
    (tmp_path / lock.NAME).write_text(f"{socket.gethostname()} {os.getppid()} 2026-01-01 00:00:00")
    with pytest.raises(UserError, match=f"process {os.getppid()} on host"), lock.held(tmp_path):
        pass
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / lock.NAME).write_text(f"{socket.gethostname()} {gone.pid} 2026-01-01 00:00:00")
    with lock.held(tmp_path):
        pass


def test_where_a_file_system_has_no_locks_a_process_of_another_user_counts_as_alive(
    tmp_path, no_kernel_locks, monkeypatch
):
    def refuse(pid, signal):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)
    (tmp_path / lock.NAME).write_text(f"{socket.gethostname()} 17 2026-01-01 00:00:00")
    with pytest.raises(UserError, match="process 17 on host"), lock.held(tmp_path):
        pass


def test_where_a_file_system_has_no_locks_the_file_of_another_host_blocks_until_it_is_deleted(
    tmp_path, no_kernel_locks
):
    path = tmp_path / lock.NAME
    path.write_text("elsewhere 17 2026-01-01 00:00:00")
    with pytest.raises(UserError, match=f"if it has ended, delete {path}"), lock.held(tmp_path):
        pass
    path.unlink()
    with lock.held(tmp_path):
        pass


def test_a_folder_of_the_same_name_elsewhere_is_not_that_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SHARED_S", 0.5)
    with lock.held(tmp_path) as text:
        lock.check_shared(tmp_path, text)
        other = tmp_path / "other"
        other.mkdir()
        with pytest.raises(UserError, match="is another folder than that of process 0"):
            lock.check_shared(other, text)
        (other / lock.NAME).write_text("another run's\n")
        with pytest.raises(UserError, match=f"--workdir={other}: on host"):
            lock.check_shared(other, text)
