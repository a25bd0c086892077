"""Measures what reading a checkpoint takes beside its arrays, and prints one JSON line.

    python scripts/bench/load.py [--layers=28 --dtype=bfloat16 --fsdp=1]

Makes random weights in the shape of Qwen2.5-1.5B in four files, and reads them in another process. `beyond_mb` is
the peak of what that process holds (RssAnon of Linux: pages of the files are the system's) less what it held before and
the arrays that it made; `bound_mb` is 1.3 times the largest tensor as it is stored. `load_s` stands beside `read_s`,
the time of reading the same files into nothing, whose pages both find in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from rftjax.devices import sharding
from rftjax.policy import load
from rftjax.weights.shards import INDEX, open_directory, write_safetensors

FIELDS = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
    "num_attention_heads": 12, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "tie_word_embeddings": True, "max_position_embeddings": 32768,
}  # fmt: skip
FILES = 4


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Returns the tensors of a checkpoint."""
    width, ffn, heads = FIELDS["hidden_size"], FIELDS["intermediate_size"], 128
    keys = heads * FIELDS["num_key_value_heads"]
    found = {
        "model.embed_tokens.weight": (FIELDS["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    for at in range(layers):
        stem = f"model.layers.{at}."
        for name, rows in (("q", width), ("k", keys), ("v", keys)):
            found[f"{stem}self_attn.{name}_proj.weight"] = (rows, width)
            found[f"{stem}self_attn.{name}_proj.bias"] = (rows,)
        found[f"{stem}self_attn.o_proj.weight"] = (width, width)
        found |= {f"{stem}mlp.{name}_proj.weight": (ffn, width) for name in ("gate", "up")}
        found[f"{stem}mlp.down_proj.weight"] = (width, ffn)
        found[f"{stem}input_layernorm.weight"] = (width,)
        found[f"{stem}post_attention_layernorm.weight"] = (width,)
    return found


def write(folder: Path, layers: int) -> None:
    """Writes the checkpoint, a file at a time."""
    names = [*shapes(layers).items()]
    numbers = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    numbers, places = numbers.astype(ml_dtypes.bfloat16), {}
    for at in range(FILES):
        file = f"model-{at + 1:05d}-of-{FILES:05d}.safetensors"
        own = dict(names[at * len(names) // FILES : (at + 1) * len(names) // FILES])
        made = {name: np.resize(numbers, shape) for name, shape in own.items()}
        write_safetensors(folder / file, made)
        places |= dict.fromkeys(made, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    fields = FIELDS | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(fields))


def held_bytes() -> int:
    """Returns the bytes of this process that are of no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(folder: Path, dtype: str, fsdp: int) -> dict[str, Any]:
    """Returns the numbers of one load in this process."""
    start = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as source:
            buffer = bytearray(1 << 24)
            while source.readinto(buffer):
                pass
    read_s = time.perf_counter() - start
    largest = max(2 * np.prod(one.shape) for one in open_directory(folder).values())
    mesh = sharding.make_mesh(data=1, fsdp=fsdp, tensor=1)
    jax.block_until_ready(jax.device_put(np.zeros(8)))
    before, peak, done = held_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, held_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, spent = time.perf_counter(), time.process_time()
    params = jax.block_until_ready(
        load(str(folder), dtype=dtype, mesh=mesh, masters=dtype == "float32").params
    )
    load_s, cpu_s = time.perf_counter() - start, time.process_time() - spent
    done.set()
    watcher.join()
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {
        "arrays_mb": round(arrays / 1e6),
        "beyond_mb": round((peak - before - arrays) / 1e6),
        "bound_mb": round(1.3 * largest / 1e6),
        "read_s": round(read_s, 2),
        "load_s": round(load_s, 2),
        "load_cpu_s": round(cpu_s, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--fsdp", type=int, default=1, help="that many devices, of a CPU too")
    parser.add_argument("--folder", type=Path, help="of an earlier call; measures in this process")
    flags = parser.parse_args()
    if flags.folder:
        print(json.dumps(measure(flags.folder, flags.dtype, flags.fsdp)))
        return
    with tempfile.TemporaryDirectory() as made:
        write(Path(made), flags.layers)
        own = [f"--folder={made}", f"--dtype={flags.dtype}", f"--fsdp={flags.fsdp}"]
        devices = f"--xla_force_host_platform_device_count={flags.fsdp}"
        environ = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}"}
        subprocess.run([sys.executable, __file__, *own], check=True, env=environ)


if __name__ == "__main__":
    main()
