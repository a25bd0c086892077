"""First and second start with a cache of compiled programs: seconds until the first training step begins, and ends.

    python scripts/bench/startup.py --model=PATH                                 # step.py's workload
    python scripts/bench/startup.py --config=experiments/quickstart.py [FLAG ...]   # a job, flags as rftjax.main takes

Both starts share one empty cache folder and nothing else: each job has a workdir of its own. A job's first step begins
when everything is loaded and compiled; step.py compiles in its first step, so only its end is known.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
POLL_S = 0.05  # between two looks at a job's metrics


def environment(cache: Path) -> dict[str, str]:
    """Returns this environment with JAX's cache of compiled programs in `cache`, for programs of every size."""
    return os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def first_step(metrics: Path) -> dict[str, Any]:
    """Returns the first training step of a job's metrics.jsonl, empty where there is none yet."""
    if not metrics.exists():
        return {}
    # A line that is being written has no end yet.
    whole = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    steps = (json.loads(line) for line in whole)
    return next((step for step in steps if step.get("step", 0) >= 1), {})


def start_job(config: str, rest: list[str], cache: Path, workdir: Path) -> dict[str, Any]:
    """Returns the seconds until a job's first step begins, until it is recorded, and until the job has ended."""
    command = [sys.executable, "-m", "rftjax.main", f"--config={config}", f"--workdir={workdir}"]
    begin = time.perf_counter()
    with subprocess.Popen(
        [*command, "--stop_after=1", *rest], env=environment(cache), stdout=subprocess.DEVNULL
    ) as process:
        while not (step := first_step(workdir / "metrics.jsonl")):
            if process.poll() is not None:
                sys.exit(f"startup: {' '.join(command)} ended with {process.returncode}")
            time.sleep(POLL_S)
        first_step_s = time.perf_counter() - begin
    kept = ("time/startup_s", "time/step_s", "compile/programs")
    return {
        "reached_s": first_step_s - step["time/step_s"],
        "first_step_s": first_step_s,
        "whole_s": time.perf_counter() - begin,
    } | {name: step[name] for name in kept if name in step}


def start_step(flags: list[str], cache: Path) -> dict[str, Any]:
    """Returns the seconds until step.py has done its first step, and what it says of itself."""
    command = [sys.executable, str(HERE / "step.py"), "--steps=1", *flags]
    begin = time.perf_counter()
    first_step_s, last = 0.0, ""
    with subprocess.Popen(
        command, env=environment(cache), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 1:"):
                first_step_s = time.perf_counter() - begin
            last = line
    if process.returncode or not first_step_s:
        sys.exit(f"startup: {' '.join(command)} ended with {process.returncode}")
    own = json.loads(last)
    kept = ("s_per_step", "load_s", "compile_s", "programs", "device", "versions")
    return {"first_step_s": first_step_s} | {name: own[name] for name in kept}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", default="", help="a spec; left out: step.py with the flags given"
    )
    flags, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        cache, starts = Path(folder) / "cache", []
        for number in (1, 2):
            if flags.config:
                starts.append(start_job(flags.config, rest, cache, Path(folder) / f"run{number}"))
            else:
                starts.append(start_step(rest, cache))
            print(f"start {number}: {starts[-1]['first_step_s']:.2f} s", flush=True)
        entries = [path for path in cache.rglob("*") if path.is_file()]
        key = "reached_s" if flags.config else "first_step_s"
        first, second = (start[key] for start in starts)
        results = {
            "first_s": round(first, 3),
            "second_s": round(second, 3),
            "second_over_first": round(second / first, 4),
            "cache_files": len(entries),
            "cache_bytes": sum(path.stat().st_size for path in entries),
            "starts": starts,
            "settings": {"config": flags.config, "flags": rest},
        }
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
