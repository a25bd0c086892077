"""What XLA's own compilers say of a job's update and decode steps on devices that are not here.

They need no weights: arrays are abstract, on the described devices of `targets`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rftjax import grpo
from rftjax.devices import sharding
from rftjax.learning import row_length, update
from rftjax.learning.batching import make_batch
from rftjax.models import attention, logical_axes
from rftjax.models.config import Config
from rftjax.policy import Policy
from rftjax.run.build import lora_scale
from rftjax.run.sampling import sampling_params
from rftjax.run.start import StateBuilder
from rftjax.sampler import device

PROGRAMS = ("update", "decode")
ROUNDS = {"update": "a micro-batch", "decode": "a step"}
GIB = 2**30
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "f64": 8}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program on one device of the target: bytes by XLA's own count, bytes that collectives bring to it by kind,
    the program's text, and the seconds that tracing and compiling took."""

    sizes: dict[str, int]
    collectives: dict[str, int]
    text: str
    traced_s: float
    compiled_s: float

    @property
    def peak(self) -> int:
        """Bytes of arguments, temporaries and results that are not the arguments' own memory."""
        s = self.sizes
        return s["argument"] + s["temp"] + s["output"] - s["alias"]


def report(config: ConfigDict, model: Policy, mesh: Mesh, expected: dict[str, float]) -> list[str]:
    """Returns what the compiler says of each program of a complete config, beside the bytes that were expected of it,
    in words; what does not compile is told and passed by."""
    lines = []
    for program, planned in expected.items():
        try:
            found = compiled(config, model, mesh, program)
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0][:300]
            lines.append(f"compiler    {program} DOES NOT COMPILE: {reason}")
            continue
        lines.append(
            f"compiler    {found.peak / GIB:8.2f} GiB a device  {program} by XLA's count, {planned / GIB:.2f} by the"
            f" lines above ({planned / found.peak:.2f} of it); compiled in {found.compiled_s:.0f} s"
        )
        lines += [
            f"moved       {size / GIB:8.2f} GiB into a device  {kind}, {program}, {ROUNDS[program]}"
            for kind, size in sorted(found.collectives.items(), key=lambda one: -one[1])
        ]
    return lines


def compiled(config: ConfigDict, model: Policy, mesh: Mesh, program: str) -> Compiled:
    """Compiles the update or the decode of a complete config for a mesh; raises what the compiler does."""
    state = StateBuilder(config, model, mesh).abstract_state
    begun = time.perf_counter()
    lower = {"update": _update, "decode": _decode}[program]
    # Kernels in Pallas for Triton ask the mesh what device they are for; it chooses nothing else.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = lower(config, model, state, mesh)
    traced_s = time.perf_counter() - begun
    found = lowered.compile()
    analysis = found.memory_analysis()
    names = ("argument", "output", "temp", "alias", "host_argument", "host_temp")
    sizes = {name: int(getattr(analysis, f"{name}_size_in_bytes")) for name in names}
    compiled_s = time.perf_counter() - begun - traced_s
    text = found.as_text() or ""
    return Compiled(sizes, moved(text), text, traced_s, compiled_s)


def _update(config: ConfigDict, model: Policy, state: Any, mesh: Mesh) -> Any:
    """Returns the lowered update of one micro-batch a row of devices, and more."""
    section = config.batch
    batch = make_batch(
        [],
        rows=-(-section.prompts * section.group_size // config.grpo.minibatches),
        max_length=config.rollout.max_length,
        pack_tokens=max(section.pack_tokens or row_length.ENOUGH, config.rollout.max_length),
        pack_rows=section.pack_rows * sharding.row_multiple(mesh),
        pack_unit=attention.row_unit(model.config.attention, mesh),
        experts=model.config.choices if config.grpo.routing_replay else None,
    )
    packed = jax.tree.map(
        lambda leaf, at: _abstract(at, leaf), batch.pack, sharding.pack_shardings(mesh, batch.pack)
    )
    rest = _abstract(NamedSharding(mesh, PartitionSpec()), batch._replace(pack=None))
    step = update.make_update(
        model.config,
        StateBuilder(config, model, mesh).optimizer,
        grpo.LossSettings.of(config.grpo),
        remat=config.model.remat,
        lora_scale=lora_scale(config),
        mesh=mesh,
        top_p=config.sampler.top_p,
        top_k=config.sampler.top_k,
        limit=model.config.vocab,
        shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
    )
    return step.lower(state, rest._replace(pack=packed))


def _decode(config: ConfigDict, model: Policy, state: Any, mesh: Mesh) -> Any:
    """Returns the lowered decode call over a cache of full length."""
    shape = model.config.recording() if config.grpo.routing_replay else model.config
    params = sampler_params(shape, state, mesh)
    slots = config.sampler.slots
    cache = device.abstract_cache(shape, slots, config.rollout.max_length, mesh)
    by_row, same = sharding.row_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    rows = _abstract(by_row, jax.eval_shape(lambda: device.idle_rows(slots)))
    given = _abstract(by_row, np.zeros((slots, 9), np.int32))
    stops, seed, bounds = (_abstract(same, np.zeros(size, np.int32)) for size in ((1,), (), (2,)))
    return device.decode.lower(
        shape, params, cache, rows, given, stops, seed, bounds,
        steps=config.sampler.dispatch_steps, filtered=sampling_params(config).filtered, limit=shape.vocab, mesh=mesh,
    )  # fmt: skip


def sampler_params(model: Config, state: Any, mesh: Any) -> Any:
    """Returns the abstract form of the sampler's weights of an abstract state, where decoding has them."""
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), update.weights(state)
    )
    made = jax.eval_shape(lambda given: device.sampler_params(model, *given, mesh=None), shapes)
    places = sharding.decode_shardings(mesh, logical_axes(model), made)
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), made, places
    )


def _abstract(place: NamedSharding, tree: Any) -> Any:
    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        dtype = getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
        return jax.ShapeDtypeStruct(np.shape(leaf), dtype, sharding=place)

    return jax.tree.map(one, tree)


def moved(text: str) -> dict[str, int]:
    """Returns the bytes of the results of each kind of collective in a compiled program's text.

    A loop whose number of rounds XLA knows counts that often, one of the layers for example; others, those over
    micro-batches and over decode steps, count once.
    """
    bodies = _computations(text)

    @functools.cache
    def count(name: str) -> tuple[tuple[str, int], ...]:
        found: collections.Counter[str] = collections.Counter()
        for line in bodies.get(name, ()):
            if "calls=%all-reduce-scatter" in line:  # as XLA for TPUs writes a reduce-scatter
                found["reduce-scatter"] += _size(line.partition(" fusion(")[0], started=False)
                continue
            if kind := re.search(rf" ({KINDS})(?:-start)?\(", line):
                found[kind[1]] += _size(line[: kind.start()], started="-start(" in kind[0])
            rounds = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            times = int(rounds[1]) if rounds and " while(" in line else 1
            for called in _called(line):
                for one, size in count(called):
                    found[one] += times * size
        return tuple(found.items())

    return {kind: size for kind, size in count("ENTRY") if size}


def _computations(text: str) -> dict[str, list[str]]:
    """Returns the lines of each computation of a module by its name, the first one's under ENTRY."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(" "):
            lines = bodies.setdefault("ENTRY" if head[1] else head[2], [])
        elif line.startswith(" "):
            lines.append(line)
    return bodies


def _called(line: str) -> list[str]:
    """Returns the computations that an instruction runs, but for those that reduce two numbers."""
    names = re.findall(
        r"\b(?:calls|body|called_computation|true_computation|false_computation)=%([\w.\-]+)", line
    )
    for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
        names += re.findall(r"%([\w.\-]+)", group)
    if " call(" in line:
        names += re.findall(r"to_apply=%([\w.\-]+)", line)
    return names


def _size(shapes: str, *, started: bool) -> int:
    """Returns the bytes of a result; where a collective starts, its operands stand first and do not count."""
    sizes = [
        math.prod(int(one) for one in dims.split(",") if one) * SIZES.get(dtype, 4)
        for dtype, dims in re.findall(r"\b([a-z]+\d+)\[([\d,]*)\]", shapes)
    ]
    sizes = [size for size in sizes if size > 8]  # not the flags of a start
    return sum(sizes[len(sizes) // 2 :] if started and len(sizes) > 1 else sizes)
