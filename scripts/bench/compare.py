"""Two programs in turn on one machine, A B A B: ours and a peer in an environment of its own.

    python scripts/bench/compare.py --peer="PEER_PYTHON trl_grpo.py MODEL_DIR 4" \
        --ours="python scripts/bench/step.py --model=MODEL_DIR" [--rounds=2] [--key=s_per_step]

Each program prints one JSON line as its last; `--key` of it is compared. Peak memory is that of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from typing import Any


def run(name: str, command: str, key: str) -> dict[str, Any]:
    """Runs a command and returns the value of its JSON line, its peak memory in bytes, its seconds and the line."""
    words = shlex.split(command)
    begin = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as stdout:
        lines = [line for line in stdout if line.strip()]
    # wait4 and not wait: it alone tells the resources that this child used.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"compare: {name} ended with {process.returncode}: {command}")
    try:
        said = json.loads(lines[-1])
        value = float(said[key])
    except (IndexError, KeyError, TypeError, ValueError) as error:
        sys.exit(
            f"compare: --{name}: the last line printed must be a JSON object with a number {key!r}"
            f" ({type(error).__name__}: {error})"
        )
    scale = 1 if platform.system() == "Darwin" else 1024
    return {
        key: value,
        "peak_bytes": usage.ru_maxrss * scale,
        "whole_s": round(time.perf_counter() - begin, 2),
        "line": said,
    }


def summary(runs: dict[str, list[dict[str, Any]]], key: str) -> dict[str, Any]:
    """Returns the medians of both and the ratio, peer over ours: how many times as long the peer takes."""
    values = {name: [one[key] for one in of_one] for name, of_one in runs.items()}
    middle = {name: statistics.median(of_one) for name, of_one in values.items()}
    pairs = zip(values["peer"], values["ours"], strict=True)
    return {
        "ratio": round(middle["peer"] / middle["ours"], 4),
        "ratios": [round(peer / ours, 4) for peer, ours in pairs],
        "key": key,
        "ours": middle["ours"],
        "peer": middle["peer"],
        "ours_peak_bytes": max(one["peak_bytes"] for one in runs["ours"]),
        "peer_peak_bytes": max(one["peak_bytes"] for one in runs["peer"]),
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ours", required=True, help="command line of A")
    parser.add_argument("--peer", required=True, help="command line of B")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--key", default="s_per_step")
    flags = parser.parse_args()
    if flags.rounds < 1:
        parser.error("--rounds: at least 1")
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for number in range(flags.rounds):
        for name, command in (("ours", flags.ours), ("peer", flags.peer)):
            runs[name].append(run(name, command, flags.key))
            latest = runs[name][-1]
            print(
                f"round {number + 1}, {name}: {flags.key} {latest[flags.key]:.3f},"
                f" peak {latest['peak_bytes'] / 2**30:.2f} GiB",
                flush=True,
            )
    print(json.dumps(summary(runs, flags.key)), flush=True)


if __name__ == "__main__":
    main()
