"""Trains a tiny model for 20 steps with each fault of user code in one call of twenty, and prints what came of it.

    .venv/bin/python scripts/fault_table.py --out=DIR [--faults=exception,os_exit] [--steps=20]

A JSON line for each fault and a table at the end; exits with 1 where a run did not end as it should, lost other
samples than the struck ones, scored one of these, or left processes or files behind. The faults are in
`injected_faults.py`; Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import injected_faults as injected

ROOT = Path(__file__).resolve().parent.parent
CODE = ROOT / "scripts" / "injected_faults.py"
PROMPTS, GROUP = 4, 4
SLOW = {"gigabyte_of_output", "fork_bomb", "ten_gigabytes"}  # more than the time that others have
LOSES = ("exception", "not_a_number", "none", "wrong_length", "endless_loop", "os_exit",
         "segmentation_fault", "fork_bomb", "ten_gigabytes")  # fmt: skip
KEEPS = ("nothing", "gigabyte_of_output", "zombie_children")
ENVIRONMENTS = ("slow_server", "dropped_connection", "malformed_call", "ten_thousand_turns")
STOPS = ("interrupted", "killed")  # the run itself, in the middle of a sandboxed call
FAULTS = (*KEEPS, *LOSES, *ENVIRONMENTS, *STOPS)


class Server(http.server.ThreadingHTTPServer):
    """Takes it as it comes that a client is gone."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing."""


class Unreliable(http.server.BaseHTTPRequestHandler):
    """A server that is slow at one path and hangs up at the other."""

    def do_GET(self) -> None:
        """Answers late, or never to the end."""
        if self.path == "/slow":
            time.sleep(30.0)
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"half")

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


def flags_of(fault: str, steps: int, rows: Path, workdir: Path) -> list[str]:
    """Returns the command line of one run."""
    name = {"malformed_call": "MalformedCall", "interrupted": "fork_bomb", "killed": "fork_bomb"}
    function = f"{CODE}:{name.get(fault, fault)}"
    environment = fault in ENVIRONMENTS
    config = {
        "steps": steps,
        "model.path": ROOT / "tests/data/tiny",
        "tasks.train": rows,
        "evaluator": f"{CODE}:nothing" if environment else function,
        "environment": function if environment else "",
        "hooks": f"{CODE}:hook",
        "batch.prompts": PROMPTS,
        "batch.group_size": GROUP,
        "batch.pack_tokens": 128,
        "sampler.max_new_tokens": 4,
        "sampler.slots": PROMPTS * GROUP,
        "rollout.max_turns": 10_000 if fault == "ten_thousand_turns" else 2,
        "rollout.max_length": 64,
        "scoring.workers": 4,
        "scoring.timeout_s": 30.0 if fault in SLOW | {*STOPS} else 2.0,
        "scoring.max_error_share": 1.0,
        "environments.workers": 4,
        "environments.timeout_s": 5.0,
        "eval.every": 0,
        "export": False,
        "optim.lr": 1e-3,
    }
    command = [sys.executable, "-m", "rftjax.main", f"--config={ROOT}/experiments/rft.py"]
    return [*command, f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in config.items())]


def run(fault: str, steps: int, out: Path, address: str) -> dict[str, Any]:
    """Runs one fault; returns what was counted, and under `faults` what is wrong."""
    folder = out / fault
    shutil.rmtree(folder, ignore_errors=True)
    temporary = folder / "tmp"
    temporary.mkdir(parents=True)
    rows, workdir = folder / "rows.jsonl", folder / "run"
    given = [{"prompt": f"w{i} w{i + 7}", "server": address} for i in range(20)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in given))
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            flags_of(fault, steps, rows, workdir),
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env=os.environ | {"TMPDIR": str(temporary)},
        )
        if fault in STOPS:
            stop(process, workdir, fault)
        code = process.wait()
    left = remaining()
    said = {"fault": fault, "exit": code, "processes_left": left}
    said["files_left"] = sorted(path.name for path in temporary.iterdir())
    said |= counted(fault, workdir)
    said["faults"] = wrong(said, steps)
    return said


def stop(process: subprocess.Popen[bytes], workdir: Path, fault: str) -> None:
    """Ends a run once it has made a few steps and a sandbox is open."""
    end = time.monotonic() + 300.0
    while process.poll() is None and time.monotonic() < end:
        made = list((workdir / "rollouts").glob("step_*")) if workdir.exists() else []
        if len(made) >= 3 and any("boundary.py" in name for name in descendants(names=True)):
            process.send_signal(signal.SIGINT if fault == "interrupted" else signal.SIGKILL)
            return
        time.sleep(0.01)


def counted(fault: str, workdir: Path) -> dict[str, Any]:
    """Counts samples of the recorded rollouts: struck and lost ones, and what the others got."""
    found: dict[str, Any] = dict.fromkeys(("samples", "struck", "lost", "other_lost", "zeros"), 0)
    found |= {"wrong_rewards": 0, "told": 0, "steps": 0}
    for path in sorted((workdir / "rollouts").glob("step_*.jsonl")):
        for line in path.read_text().splitlines():
            one = json.loads(line)
            hit = is_struck(fault, one)
            found["samples"] += 1
            found["struck"] += hit
            found["lost"] += hit and not one["valid"]
            found["other_lost"] += not hit and not one["valid"]
            found["zeros"] += one["reward"] == 0 and one["valid"]
            expected = injected.right(one["draw"], one["sample"])
            found["wrong_rewards"] += one["valid"] and abs(one["reward"] - expected) > 1e-9
            found["told"] += hit and any(
                message["role"] == "tool" and "Error" in message["content"]
                for message in one["messages"]
            )
    if (workdir / "metrics.jsonl").exists():
        text = (workdir / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        resident = [one["hook/resident_mib"] for one in lines if "hook/resident_mib" in one]
        found["steps"] = len(resident)
        found["resident_mib"] = [round(value) for value in resident]
        error = [one.get("evaluator/error_share", 0.0) for one in lines]
        found["error_share"] = round(sum(error) / max(len(resident), 1), 4)
    return found


def is_struck(fault: str, one: dict[str, Any]) -> bool:
    """Says from a recorded rollout whether a call of its own was chosen to fail."""
    if fault == "nothing":
        return False
    if fault not in ENVIRONMENTS:
        sample = -1 if fault == "wrong_length" else one["sample"]
        return injected.struck(injected.key_of(one["draw"], sample))
    said = [message["content"] for message in one["messages"] if message["role"] == "assistant"]
    return injected.struck(said[0]) if said else False


def wrong(said: dict[str, Any], steps: int) -> list[str]:
    """Returns what did not go as it should."""
    fault, found = said["fault"], []
    if said["exit"] != {"interrupted": 130, "killed": -signal.SIGKILL}.get(fault, 0):
        found.append(f"the run ended with {said['exit']}")
    if said["processes_left"] or said["files_left"]:
        found.append("something is left behind")
    if said["other_lost"] or said["zeros"] or said["wrong_rewards"]:
        found.append("other samples than the struck ones were touched")
    loses = fault in LOSES or fault in ("slow_server", "dropped_connection")
    if fault not in STOPS:
        if said["steps"] != steps or said["samples"] != steps * PROMPTS * GROUP:
            found.append("steps or samples are missing")
        if said["lost"] != (said["struck"] if loses else 0):
            found.append("lost samples are not the struck ones")
        if fault == "malformed_call" and said["told"] != said["struck"]:
            found.append("a malformed call was not answered")
        resident = said.get("resident_mib", [])
        if len(resident) > 10 and resident[-1] - resident[4] > 64:
            found.append("memory grows")
    return found


def descendants(names: bool = False) -> list[str]:
    """Returns ids, or command lines, of this process's children and theirs; orphans of theirs count."""
    parents: dict[str, list[str]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError):
                stat = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(stat[1], []).append(entry)
    found, waiting = [], [str(os.getpid())]
    while waiting:
        children = parents.get(waiting.pop(), [])
        waiting += children
        for child in children:
            with contextlib.suppress(OSError):
                line = Path("/proc", child, "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found.append(line.strip() or "(ended)" if names else child)
    return found


def remaining() -> list[str]:
    """Returns the processes that are still there some seconds after a run: they end soon where it was killed."""
    end = time.monotonic() + 10.0
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = descendants(names=True)
        if not left or time.monotonic() > end:
            return [line[:200] for line in left]
        time.sleep(0.05)


def table(results: list[dict[str, Any]]) -> str:
    """Returns the results as a Markdown table."""
    text = [
        "| fault | samples | struck | lost | others lost | scored 0 | processes and files left | memory, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        resident = one.get("resident_mib") or [0]
        memory = f"{resident[min(4, len(resident) - 1)]} to {resident[-1]}"
        left = len(one["processes_left"]) + len(one["files_left"])
        cells = [one[key] for key in ("fault", "samples", "struck", "lost", "other_lost", "zeros")]
        text.append("| " + " | ".join(map(str, [*cells, left, memory])) + " |")
    return "\n".join(text)


def main() -> None:
    """Runs the faults one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--steps", type=int, default=20)
    flags = parser.parse_args()
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come to this process
    server = Server(("127.0.0.1", 0), Unreliable)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    results = []
    for fault in flags.faults.split(","):
        address = f"http://127.0.0.1:{server.server_address[1]}"
        results.append(run(fault, flags.steps, flags.out, address))
        print(json.dumps(results[-1]), flush=True)
    print(table(results))
    if any(one["faults"] for one in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
