"""Kills one of a run's processes at random moments until the run is complete, and compares it with one that is not.

    python scripts/kill_processes.py --out=/tmp/kills [--kills=5] [--seed=0] [--against=1]

Two processes with four fake CPU devices each train the debug form of `experiments/quickstart.py` or the spec given; its
state is divided over the eight (other flags follow), as eight copies would take 22 GB.
The kills come, in turn: at any moment; once a new checkpoint is there; while one is being written; and while a step
samples, which is what follows its line in metrics.jsonl. After each the other process must end by itself within
LIMIT_S seconds; then both are started again.
The run that is not killed is of one process, or of two with `--against=2`: which groups a step takes with
`--config.rollout.partial=N` depends on the number of processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

LIMIT_S = 60.0
MOMENTS = ("at any moment", "behind a checkpoint", "in a checkpoint", "in sampling")


def environment(devices: int) -> dict[str, str]:
    """Returns that of a process with so many fake devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def start(arguments: list[str], workdir: Path, processes: int) -> list[subprocess.Popen]:
    """Starts the processes of a run; their output goes to files beside the workdir."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for process in range(processes):
        command = [sys.executable, "-m", "rftjax.main", f"--workdir={workdir}", *arguments]
        if processes > 1:
            command += [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}"]
            command += [f"--process={process}"]
        with open(f"{workdir}.{process}.txt", "a") as output:
            started.append(
                subprocess.Popen(
                    command, stdout=output, stderr=output, env=environment(8 // processes)
                )
            )
    return started


def finish(started: list[subprocess.Popen], limit_s: float) -> list[int | None]:
    """Waits for the processes; returns their exit codes, None for one that had to be killed."""
    until = time.monotonic() + limit_s
    codes: list[int | None] = []
    for process in started:
        try:
            codes.append(process.wait(max(0.1, until - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            codes.append(None)
    return codes


def said(workdir: Path) -> int:
    """Returns how many lines the processes have printed since they met."""
    found = (Path(f"{workdir}.{process}.txt") for process in range(2))
    lines = [line for path in found if path.exists() for line in path.read_text().splitlines()]
    return sum("--coordinator" not in line for line in lines)


def saved(workdir: Path) -> list[int]:
    """Returns the steps with a checkpoint."""
    found = (workdir / "checkpoints").glob("[0-9]*")
    return sorted(int(path.name) for path in found if path.name.isdigit())


def mark(workdir: Path, moment: int) -> object:
    """Returns what changes once a kill's moment is near, by the number of the kill."""
    if moment == 2:  # Orbax renames the folder of a checkpoint that is whole
        return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
    if moment == 3:
        path = workdir / "metrics.jsonl"
        return path.exists() and path.stat().st_size
    return saved(workdir) if moment == 1 else None


def kill_until_done(
    arguments: list[str], workdir: Path, kills: int, chance: random.Random, longest_s: float
) -> list[str]:
    """Runs two processes and kills one again and again; returns what went wrong."""
    faults = []
    for number in range(kills):
        before, moment = said(workdir), number % len(MOMENTS)
        started = start(arguments, workdir, 2)
        longest = (longest_s, longest_s / 5, 0.05, longest_s / 100)[moment]
        after_s = chance.uniform(0, longest)
        victim = chance.randrange(2)

        def running(started: list[subprocess.Popen] = started) -> bool:
            return all(one.poll() is None for one in started)

        # They say something once they have met: before, each waits for the others as long as `processes.START_S`.
        while said(workdir) == before and running():
            time.sleep(0.05)
        passed = mark(workdir, moment)
        while moment and mark(workdir, moment) == passed and running():
            time.sleep(0.002)
        until = time.monotonic() + after_s
        while time.monotonic() < until and running():
            time.sleep(0.002)
        if not running():
            print(f"kill {number}: the run ended before, with {finish(started, LIMIT_S)}")
            continue
        started[victim].send_signal(signal.SIGKILL)
        began_s = time.monotonic()
        writing = mark(workdir, 2)
        codes = finish(started, LIMIT_S)
        print(
            f"kill {number}, {MOMENTS[moment]}: process {victim} after {after_s:.2f} s"
            f"{', a checkpoint half written' if writing else ''}; the other ended after"
            f" {time.monotonic() - began_s:.1f} s with {codes[1 - victim]}; checkpoints {saved(workdir)}",
            flush=True,
        )
        if codes[1 - victim] in (None, 0):
            faults.append(f"kill {number}: the other process ended with {codes[1 - victim]}")
    codes = finish(start(arguments, workdir, 2), 1800)
    return faults if codes == [0, 0] else [*faults, f"the last start ended with {codes}"]


def differences(one: Path, other: Path) -> list[str]:
    """Returns in what two complete runs differ: sampled tokens, and weights by more than float order allows."""
    found = []
    for path in sorted((one / "rollouts").iterdir()):
        tokens = [
            [
                [row["sequences"] and [s["tokens"] for s in row["sequences"]]]
                for row in map(json.loads, file)
            ]
            for file in (path.open(), (other / "rollouts" / path.name).open())
        ]
        if tokens[0] != tokens[1]:
            found.append(f"tokens of {path.name}")
    for path in (one / "export").glob("*.safetensors"):
        left, right = load_file(path), load_file(other / "export" / path.name)
        gap = max(float(np.abs(left[k].astype(np.float64) - right[k]).max()) for k in left)
        print(f"weights of {path.name} differ by at most {gap:.2g}")
        if gap > 1e-5:
            found.append(f"weights of {path.name} by {gap:.2g}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", default="experiments/quickstart.py:debug")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--longest_s", type=float, default=60.0, help="latest moment of a kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--against", type=int, default=1, help="processes of the run not killed")
    known, others = parser.parse_known_args()
    known.out.mkdir(parents=True, exist_ok=True)
    arguments = [
        f"--config={known.config}",
        "--config.mesh.data=1",
        "--config.mesh.fsdp=8",
        *others,
    ]
    codes = finish(start(arguments, known.out / "whole", known.against), 1800)
    if any(codes):
        sys.exit(f"the run that is not killed ended with {codes}: {known.out / 'whole.0.txt'}")
    chance = random.Random(known.seed)
    faults = kill_until_done(arguments, known.out / "killed", known.kills, chance, known.longest_s)
    faults += differences(known.out / "whole", known.out / "killed")
    sys.exit("\n".join(faults) if faults else 0)


if __name__ == "__main__":
    main()
