"""Measures the memory of a step beside the estimate that `--mode=check` prints.

    python scripts/bench/memory.py --model=tests/data/tiny [--width=512 --layers=8] [--set model.dtype=bfloat16 ...]

Compares both sums of `rftjax.run.memory.estimate` with the peak of each half of the second step, less what the process
still holds once the state is deleted. The first step compiles. What stays is listed too: compiled programs (what
`jax.clear_caches` frees), Python and libraries. An accelerator counts its own bytes; on a CPU it is the resident memory
of the process (VmHWM of Linux, reset before each half). `--width` makes random weights of that width with the model's
tokenizer.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import workload

from rftjax import config as configs
from rftjax.config.fields import field_type
from rftjax.run import build as job
from rftjax.run import memory
from rftjax.run.build import Parts
from rftjax.run.prefetch import make_prefetch
from rftjax.run.training import make_learner
from rftjax.tasks import TaskStream


def held_bytes() -> int:
    """Returns the bytes in use now, after freed ones have gone back to the system."""
    gc.collect()
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_in_use" in stats:
        return int(stats["bytes_in_use"])
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def reset_peak() -> None:
    """Resets the peak of the process; that of an accelerator cannot be reset."""
    held_bytes()
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Returns the peak since the last reset."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats["peak_bytes_in_use"]) if stats else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def spec(flags: argparse.Namespace, folder: Path) -> Any:
    """Returns the config of a job on prompts of 60 words, with answers of up to 64 tokens."""
    config = configs.base_config()
    config.model.path = flags.model
    if flags.width:
        config.model.path, config.model.init = str(folder / "model"), "random"
        shutil.copytree(flags.model, folder / "model")
        for path in (folder / "model").glob("*.safetensors"):
            path.unlink()
        shape = json.loads((folder / "model" / "config.json").read_text())
        shape |= {"hidden_size": flags.width, "intermediate_size": 4 * flags.width}
        shape |= {"num_attention_heads": flags.width // 32, "vocab_size": flags.vocab}
        shape |= {"num_key_value_heads": flags.width // 64, "num_hidden_layers": flags.layers}
        shape |= {"max_position_embeddings": 1024, "layer_types": ["full_attention"] * flags.layers}
        (folder / "model" / "config.json").write_text(json.dumps(shape))
    rows = [{"prompt": " ".join(f"w{(i + j) % 50}" for j in range(60))} for i in range(32)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.tasks.train = str(folder / "train.jsonl")
    config.evaluator = "rftjax.evaluators.random_reward:evaluate"
    config.sampler.max_new_tokens, config.rollout.max_length = 64, 128
    config.eval.every, config.export, config.scoring.workers = 0, False, 1
    given = dict(one.split("=", 1) for one in flags.set)
    with config.unlocked():
        for name, text in given.items():
            kind = field_type(config, name)
            config.update_from_flattened_dict(
                {name: text == "True" if kind is bool else kind(text)}
            )
    return job.complete_config(config)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tests/data/tiny")
    parser.add_argument("--width", type=int, default=0)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--set", nargs="*", default=[], help="fields of the config, name=value")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = spec(flags, Path(folder))
        with job.build(config, Path(folder) / "run") as parts:
            table = memory.estimate(parts)
            measured = measure(parts)
    predicted = {name: table[name] for name in (memory.SAMPLING, memory.UPDATE)}
    results: dict[str, Any] = {"table": table, "measured": measured}
    results["predicted_over_measured"] = {
        name: size / max(measured[name], 1) for name, size in predicted.items()
    }
    workload.report(flags, results)


def measure(parts: Parts) -> dict[str, float]:
    """Returns the peaks of the two halves of the second step above what stays without a state, and what that is."""
    state = parts.state_builder.initial_state()
    learner = make_learner(parts)
    sampling = make_prefetch(parts, TaskStream(parts.train_tasks, seed=0))
    peaks: dict[str, float] = {}
    for step in (1, 2):
        reset_peak()
        trajectories = sampling.take(state, learner.wanted([]))
        parts.scorer.gather(trajectories)
        peaks[memory.SAMPLING] = peak_bytes()
        sampling.begin(state, last=True)
        reset_peak()
        batches, _ = learner.batch(state, trajectories, step)
        state, _ = learner.update(state, batches, step)
        peaks[memory.UPDATE] = peak_bytes()
    sampling.close()
    del state, batches, trajectories
    base = held_bytes()
    jax.clear_caches()
    rest = held_bytes()
    measured = {name: float(peak - base) for name, peak in peaks.items()}
    kept = {"compiled programs": float(base - rest), "Python and libraries": float(rest)}
    return measured | kept


if __name__ == "__main__":
    main()
