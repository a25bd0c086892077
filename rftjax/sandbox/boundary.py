"""The program between rftjax and sandboxed code: draws the boundary, then runs the code inside.

Started as a script of its own with the standard library alone (Linux). It says on the descriptor `report` how far it
came: one JSON line with an error, or nothing once the code runs. Steps: new namespaces; a root folder in memory with
the interpreter and system libraries mounted read-only; an init process that ends everything with it; limits; no
privileges; a seccomp filter for what namespaces do not cover; the code.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
from typing import Any

# From linux/sched.h, sys/mount.h, linux/prctl.h, linux/seccomp.h.
NEW_NAMESPACES = 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000
NEW_USER = 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 8, 32, 4096, 16384
MS_PRIVATE, MNT_DETACH = 1 << 18, 2
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 24, 38, 22
CAPABILITIES = 64
UIDS = 0x70000000  # a user id of its own for each sandbox that root starts, so that processes can be counted
# Any folder that no program reads from: the new root is mounted over it, for this process and those inside alone.
ROOT = "/sys"
DEVICES = ("null", "zero", "full", "random", "urandom")
LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1"}
# System calls that namespaces and missing privileges do not settle, by machine: those that reach the kernel's larger
# surfaces (new namespaces, bpf, io_uring, keys, ptrace, userfaultfd, perf), and `socket` for VSOCK, which no namespace
# covers.
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
DENIED = {
    "x86_64": (101, 155, 161, 165, 166, 246, 248, 249, 250, 272, 298, 304, 308, 310, 311, 321, 323,
               425, 426, 427, 428, 429, 430, 431, 432, 433, 442),
    "aarch64": (39, 40, 41, 51, 97, 104, 117, 217, 218, 219, 241, 265, 268, 270, 271, 280, 282,
                425, 426, 427, 428, 429, 430, 431, 432, 433, 442),
}  # fmt: skip
SOCKET = {"x86_64": 41, "aarch64": 198}
CLONE = {"x86_64": 56, "aarch64": 220}
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
CLONE3, VSOCK, ENOSYS, EPERM = 435, 40, 38, 1

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    """Calls a function of the C library; raises OSError with its name where it fails."""
    values = [
        ctypes.c_long(value) if isinstance(value, int) else value and os.fsencode(value)
        for value in arguments
    ]
    if getattr(libc, name)(*values) != 0:
        code = ctypes.get_errno()
        words = ", ".join(map(str, arguments))
        raise OSError(code, f"{name}({words}): {os.strerror(code)}")


def main() -> None:
    """Reads the settings from the first argument; ends as the code ended (128 + signal where one ended it)."""
    settings = json.loads(sys.argv[1])
    os.umask(0o022)  # the code runs as another user
    lifeline = -1
    try:
        if settings["namespaces"]:
            call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != settings["parent"]:
                sys.exit(1)  # it ended before it could be watched
            enter_namespaces()
            build_root(settings)
            lifeline, other_end = os.pipe()
            child = os.fork()
            if child:
                os.close(lifeline)
                sys.exit(wait_for(child))
            os.close(other_end)
            enter_root()
        confine(settings)
        if settings["namespaces"]:  # a change of user takes the signal away, so that it is set here
            call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if select.select([lifeline], [], [], 0)[0]:
                sys.exit(1)
    except OSError as error:
        os.write(settings["report"], json.dumps(str(error)).encode())
        sys.exit(1)
    program = os.fork()
    if not program:
        start(settings)
    close_all_but(())
    sys.exit(wait_for(program))


def wait_for(child: int) -> int:
    """Reaps children until this one has ended; returns its exit status, 128 + signal where one ended it."""
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def enter_namespaces() -> None:
    """Unshares mounts, processes, network, IPC and host name: as root itself, else inside a user namespace."""
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        call("unshare", NEW_NAMESPACES)
        return
    call("unshare", NEW_NAMESPACES | NEW_USER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def build_root(settings: dict[str, Any]) -> None:
    """Mounts the root folder: in memory, with the folders that the program reads, and an empty one to write into."""
    call("mount", "none", "/", None, MS_REC | MS_PRIVATE, None)
    call("mount", "tmpfs", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
    os.mkdir(f"{ROOT}/tmp")
    size = f"size={settings['files_bytes']},nr_inodes=16384"
    call("mount", "tmpfs", f"{ROOT}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"{size},mode=1777")
    for path in settings["readable"]:
        place = ROOT + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.symlink(os.readlink(path), place)
        else:
            mount_readable(path, place)
    write_files(settings["files"])
    os.makedirs(f"{ROOT}/dev")
    for name in DEVICES:
        bind(f"/dev/{name}", f"{ROOT}/dev/{name}")
    os.mkdir(f"{ROOT}/dev/shm")
    call("mount", "tmpfs", f"{ROOT}/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, f"{size},mode=1777")
    for name, target in LINKS.items():
        os.symlink(target, f"{ROOT}/dev/{name}")
    os.mkdir(f"{ROOT}/proc")


def bind(path: str, place: str) -> None:
    os.makedirs(place if os.path.isdir(path) else os.path.dirname(place), exist_ok=True)
    if not os.path.isdir(path):
        open(place, "w").close()
    call("mount", path, place, None, MS_BIND | MS_REC, None)


def write_files(files: dict[str, int]) -> None:
    """Writes the descriptors' contents to paths in one folder of the root, in memory and read-only from then on."""
    if not files:
        return
    folder = ROOT + os.path.commonpath(map(os.path.dirname, files))
    room = sum(os.fstat(descriptor).st_size + (8 << 10) for descriptor in files.values())
    os.makedirs(folder, exist_ok=True)
    flags, size = MS_NOSUID | MS_NODEV, f"size={room + (64 << 10)},mode=755"
    call("mount", "tmpfs", folder, "tmpfs", flags, size)
    for path, descriptor in files.items():
        os.makedirs(os.path.dirname(ROOT + path), exist_ok=True)
        with open(descriptor, "rb", closefd=False) as given, open(ROOT + path, "wb") as file:
            file.write(given.read())
    call("mount", "none", folder, None, flags | MS_REMOUNT | MS_BIND | MS_RDONLY, None)


def mount_readable(path: str, place: str) -> None:
    """Mounts a path read-only, with all that is mounted below it (Linux 5.12)."""
    bind(path, place)
    attributes = struct.pack("QQQQ", ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, place, AT_RECURSIVE, attributes, len(attributes))


def enter_root() -> None:
    """Makes the folder the root of this process and of all that follow; nothing of the old one stays in reach."""
    os.chdir(ROOT)
    # Not allowed inside some containers: programs run without it.
    with contextlib.suppress(OSError):
        call("mount", "proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    call("syscall", PIVOT_ROOT[platform.machine()], ".", ".")
    call("umount2", ".", MNT_DETACH)
    flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV
    call("mount", "none", "/", None, flags, None)
    os.chdir("/tmp")


def confine(settings: dict[str, Any]) -> None:
    """Sets the limits and gives up every privilege."""
    for name, value in (
        ("CORE", 0),
        ("AS", settings["memory_bytes"]),
        ("FSIZE", settings["files_bytes"]),
        ("NOFILE", 256),
        ("NPROC", settings["processes"] + 1),  # and the init process
    ):
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (least, least))
    # The first limit ends the program with SIGXCPU, which tells why; the second one cannot be caught.
    resource.setrlimit(resource.RLIMIT_CPU, (settings["cpu_s"], settings["cpu_s"] + 1))
    if settings["namespaces"]:
        for capability in range(CAPABILITIES):
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if os.geteuid() == 0:
        own = UIDS + settings["number"]
        os.setgroups([])
        os.setresgid(own, own, own)
        os.setresuid(own, own, own)
    else:
        header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
        if libc.capset(header, nothing) != 0:
            raise OSError(ctypes.get_errno(), "capset")
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    filter_calls()


def filter_calls() -> None:
    """Installs the seccomp filter where the machine's numbers are known."""
    machine = platform.machine()
    if machine not in AUDIT_ARCH:
        return
    load, equal, bits, give = 0x20, 0x15, 0x45, 0x06
    deny, allow, unknown = 0x00050000 | EPERM, 0x7FFF0000, 0x00050000 | ENOSYS
    lines = [
        (load, 0, 0, 4),
        (equal, 1, 0, AUDIT_ARCH[machine]),
        (give, 0, 0, deny),
        (load, 0, 0, 0),
    ]
    if machine == "x86_64":  # the x32 calls have numbers from 2^30 on
        lines += [(0x35, 0, 1, 0x40000000), (give, 0, 0, deny)]
    for number in DENIED[machine]:
        lines += [(equal, 0, 1, number), (give, 0, 0, deny)]
    lines += [(equal, 0, 1, CLONE3), (give, 0, 0, unknown)]
    lines += [
        (equal, 0, 3, SOCKET[machine]),
        (load, 0, 0, 16),
        (equal, 0, 1, VSOCK),
        (give, 0, 0, deny),
    ]
    lines += [(load, 0, 0, 0), (equal, 0, 3, CLONE[machine]), (load, 0, 0, 16)]
    lines += [(bits, 0, 1, NEW_USER | NEW_NAMESPACES), (give, 0, 0, deny), (give, 0, 0, allow)]
    code = b"".join(struct.pack("HBBI", *line) for line in lines)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(program)
    if libc.prctl(PR_SET_SECCOMP, 2, ctypes.c_ulong(ctypes.addressof(holder)), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")


def start(settings: dict[str, Any]) -> None:
    """Runs the command; never returns."""
    close_all_but((settings["report"],))
    os.set_inheritable(settings["report"], False)
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
    os.setpgid(0, 0)
    command = settings["command"]
    try:
        os.execve(command[0], command, settings["environment"])
    except OSError as error:
        os.write(settings["report"], json.dumps(f"{command[0]}: {error}").encode())
    os._exit(127)


def close_all_but(kept: tuple[int, ...]) -> None:
    """Closes every descriptor but the standard ones and `kept`."""
    low = 3
    for descriptor in sorted(kept):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, 4096)


if __name__ == "__main__":
    main()
