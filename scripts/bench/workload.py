"""What every benchmark has in common: the model, the fixed workload, one JSON line at the end.

The workload of a step: 8 different prompts of 64 tokens, 8 completions each of exactly 64 tokens (no stop tokens),
Adam over all parameters.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rftjax import types
from rftjax.devices import huge_pages
from rftjax.models import decoder
from rftjax.models.attention import FORMS
from rftjax.models.config import Config
from rftjax.sampler import device
from rftjax.sampler.engine import Engine, NoiseKey, noise_key
from rftjax.types import Params, Score, Task, Trajectory
from rftjax.weights import hf

QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
# Hugging Face config fields of known models, to measure speed with random weights.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    "qwen2.5-0.5b": QWEN
    | {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "qwen2.5-1.5b": QWEN
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "qwen2.5-7b": QWEN
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
}


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the flags of every benchmark; one that is the program runs in huge pages, as a job does."""
    if Path(*sys.orig_argv[1:2]).resolve().parent == Path(__file__).resolve().parent:
        huge_pages.start_again()
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", default="", help="Hugging Face directory or GGUF file")
    source.add_argument("--shape", default="", choices=list(SHAPES), help="random weights")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--attention", default="blocked", choices=FORMS, help="in the update")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="completions a prompt")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the sampler's flags, with the spec's defaults."""
    parser.add_argument("--slots", type=int, default=64, help="rows that decode at once")
    parser.add_argument("--dispatch_steps", type=int, default=16)
    parser.add_argument("--bridge_steps", type=int, default=0, help="0: none")
    parser.add_argument("--prefill_rows", type=int, default=8)
    parser.add_argument("--prefill_chunk", type=int, default=64)


def load(flags: argparse.Namespace) -> tuple[Config, Params]:
    """Returns the config and float32 parameters: those of a path, or random ones made on the device."""
    if flags.model:
        config, params, _ = hf.load(flags.model, dtype=flags.dtype)
        return dataclasses.replace(config, attention=flags.attention), params
    config = hf.read_config(SHAPES[flags.shape], flags.dtype)
    config = dataclasses.replace(config, attention=flags.attention)
    make = jax.jit(decoder.init, static_argnums=0)
    return config, jax.block_until_ready(make(config, jax.random.key(flags.seed)))


def make_engine(
    config: Config, flags: argparse.Namespace, max_length: int, parked: int = 0
) -> Engine:
    """Returns a sampler without stop tokens: every turn takes its whole budget."""
    return Engine(
        config,
        slots=flags.slots,
        parked=parked,
        max_length=max_length,
        seed=flags.seed,
        dispatch_steps=flags.dispatch_steps,
        bridge_steps=flags.bridge_steps,
        prefill_rows=flags.prefill_rows,
        prefill_chunk=flags.prefill_chunk,
    )


@functools.partial(jax.jit, static_argnums=0)
def sampler_params(config: Config, params: Params) -> Params:
    """Returns what decode reads, made on the device."""
    return device.sampler_params(config, params)


def random_tokens(config: Config, rng: np.random.Generator, count: int) -> list[int]:
    """Returns `count` token ids of the vocabulary."""
    return rng.integers(0, config.vocab, count).tolist()


def noise(draw: int, sample: int) -> NoiseKey:
    """Returns the noise key of a training sample."""
    return noise_key(0, draw, sample)


def trajectory(
    prompt: list[int], tokens: list[int], logprobs: list[float], draw: int, sample: int
) -> Trajectory:
    """Returns a one-turn trajectory; its reward is the number of different tokens, which needs no tokenizer."""
    sequence = types.Sequence()
    sequence.extend(prompt)
    sequence.extend(tokens, logprobs, 0)
    score = Score(float(len(set(tokens))))
    return Trajectory(Task(str(draw), []), draw, sample, sequences=[sequence], score=score)


class CompileClock:
    """Counts the programs that JAX compiles (or takes from its cache on disk) and the seconds that it takes."""

    def __init__(self) -> None:
        self.programs, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            self.programs += 1
            self.seconds += duration_secs


def peak_bytes() -> int:
    """Returns the most memory held so far: of the first accelerator, or of this process where there is none."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if platform.system() == "Darwin" else used * 1024


def machine() -> dict[str, Any]:
    """Returns device and versions, as every result carries them."""
    first = jax.local_devices()[0]
    name = first.device_kind
    info = Path("/proc/cpuinfo")
    if first.platform == "cpu" and info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    packages = ("rftjax", "jax", "jaxlib", "flax", "optax")
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {
        "device": {"platform": first.platform, "name": name, "cores": available_cores()},
        "versions": versions | {"python": platform.python_version()},
    }


def available_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def report(flags: argparse.Namespace, results: dict[str, Any]) -> None:
    """Prints the JSON line: what was asked for, the results (floats of 6 digits), machine and versions."""
    settings = {name: value for name, value in vars(flags).items() if value != ""}
    print(json.dumps(rounded(results) | {"settings": settings} | machine()), flush=True)


def rounded(value: Any) -> Any:
    """Returns the value with every float in it cut to six significant digits."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


class Lap:
    """A stopwatch: each call returns the seconds since the one before."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def __call__(self) -> float:
        before, self._last = self._last, time.perf_counter()
        return self._last - before
