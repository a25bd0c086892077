"""`--mode=plan`: what a job needs of any device and mesh, by arithmetic, without those devices, weights or data.

The formulas are those of `docs/planning.md`. Every conversation is taken to have its full length, prompts what
`rollout.max_length` leaves: the plan is of the largest step that the spec allows.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from rftjax.devices import sharding
from rftjax.devices.accelerators import Accelerator, accelerator
from rftjax.errors import UserError
from rftjax.learning import row_length
from rftjax.models import cache_leaves, remat
from rftjax.policy import Policy
from rftjax.run import checks, compiled, targets
from rftjax.run.arithmetic import REACHED, ROOM, Job, active_entries, entries
from rftjax.run.build import complete_config
from rftjax.run.memory import HOST, held_bytes, shard_bytes
from rftjax.run.start import StateBuilder, keeps_masters
from rftjax.sampler import device
from rftjax.weights import hf

USABLE = 0.92  # of a device's memory: the rest is the runtime's and lost between arrays
MOST_DEVICES = 1 << 13
GIB = 2**30
INNER = ("expert", "context", "tensor")  # axes that a larger mesh.fsdp leaves as they are


@dataclasses.dataclass(frozen=True)
class Plan:
    """One spec on one mesh: bytes a device by purpose, seconds of a step by part, tokens that it samples."""

    mesh: dict[str, int]
    held: dict[str, float]
    offloaded: dict[str, float]  # in the host's memory, for a device
    sampling: dict[str, float]
    updating: dict[str, float]
    seconds: dict[str, float]
    tokens: int

    @property
    def peak(self) -> float:
        """Bytes on one device at most, in the larger half of a step."""
        return sum(self.held.values()) + max(
            sum(self.sampling.values()), sum(self.updating.values())
        )

    @property
    def programs(self) -> dict[str, float]:
        """Bytes on one device while each of the programs runs that `compiled` knows, what only waits left out."""
        return {
            "update": sum(self.held.values()) + sum(self.updating.values()),
            "decode": sum(self.sampling.values()),
        }

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh.values())


def report(
    given: ConfigDict, name: str, devices: int, price: float, *, compiles: bool = False
) -> list[str]:
    """Returns the plan in words; `devices` 0 takes the fewest that hold it, `price` is that of a device hour (0: none).

    `compiles` asks XLA's compiler for such devices too, where they stand in an arrangement that it knows. Raises
    UserError where the mesh does not fit the number of devices, or the compiler is not installed.
    """
    chip = accelerator(name)
    if devices < 0:
        raise UserError(f"--devices={devices}: must be a number of devices, or 0 for the fewest")
    if not 0 <= price < math.inf:
        raise UserError(f"--price={price}: must be the price of a device hour, or 0 for no cost")
    if compiles and (words := targets.missing(name)):
        raise UserError(f"--compile: the compiler for {name} is not installed; {words}")
    config = complete_config(given, devices=devices, needs=("model.path",))
    model = open_shape(config)
    checks.check_replay(config, model)
    found = plan(config, model, chip, devices) if devices else _fewest(config, model, chip)
    lines = [_model_line(config, model), _mesh_line(found, chip, chosen=not devices)]
    for part in (found.held, found.sampling, found.updating):
        lines += [
            f"memory      {size / GIB:8.2f} GiB a device  {title}"
            for title, size in part.items()
            if size
        ]
    lines += [
        f"host        {size / GIB:8.2f} GiB a device  {title}, {HOST}"
        for title, size in found.offloaded.items()
        if size
    ]
    room = chip.memory * USABLE
    fits = found.peak <= room
    words = "fits" if fits else "DOES NOT FIT"
    lines.append(
        f"peak        {found.peak / GIB:8.2f} GiB of {room / GIB:.1f} that can be used: {words}"
    )
    lines += [f"time        {seconds:8.1f} s  {title}" for title, seconds in found.seconds.items()]
    step_s = sum(found.seconds.values())
    lines.append(
        f"step        {step_s:8.1f} s, {found.tokens / step_s:,.0f} sampled tokens a second"
    )
    if price:
        hour = price * found.devices
        cost = hour * step_s / 3600
        lines.append(
            f"cost        {cost:8.2f} a step, {cost * config.steps:,.2f} for {config.steps} steps,"
            f" at {hour:,.2f} an hour"
        )
    lines.append(
        "assumed     every conversation at its full length;"
        + ",".join(f" {share:.0%} of the table's {what}" for what, share in REACHED.items())
        + "; evaluators and environments keep up"
    )
    if not fits:
        lines += [f"helps       {text}" for text in _remedies(config, model, chip, found)]
    if compiles and config.optim.offload and chip.is_gpu:
        return [
            *lines,
            "compiler    not asked: JAX's description of GPUs that are not here has no host's memory",
        ]
    if compiles:
        try:
            mesh = targets.target_mesh(name, found.mesh)
        except UserError as error:  # the plan's own numbers stay of use
            return [*lines, f"compiler    not asked: {error}"]
        return lines + compiled.report(config, model, mesh, found.programs)
    how = targets.missing(name)
    return [
        *lines,
        "compiler    not asked: --compile has XLA compile both halves of a step for these devices"
        + (f"; first {how}" if how else ""),
    ]


def open_shape(config: ConfigDict) -> Policy:
    """Returns the model of the spec without weights: a config.json is enough."""
    opened = hf.open_model(config.model.path, dtype=config.model.dtype, init="random")
    shape = dataclasses.replace(opened.config, attention=config.model.attention)

    def nothing(masters: bool) -> Any:
        raise AssertionError("a plan reads no weights")

    return Policy(config.model.path, shape, nothing, opened.fields, masters=keeps_masters(config))


def _mesh(config: ConfigDict, devices: int) -> AbstractMesh:
    """Returns the spec's mesh over so many devices."""
    sizes = {axis: config.mesh[axis] for axis in sharding.AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    rest = [axis for axis, size in sizes.items() if size == -1]
    if devices % known or (not rest and known != devices):
        raise UserError(
            f"mesh={sizes}: its axes do not multiply to --devices={devices}; set one to -1, the rest"
        )
    sizes |= dict.fromkeys(rest, devices // known)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def _fewest(config: ConfigDict, model: Policy, chip: Accelerator) -> Plan:
    """Returns the plan for the fewest devices, doubled from the smallest mesh of the spec, that hold the job.

    Where the axis of the rest does not shrink what a device holds, the largest number is returned, and does not fit.
    """
    sizes = [size for size in (config.mesh[axis] for axis in sharding.AXES) if size != -1]
    count = least = math.prod(sizes)
    found = plan(config, model, chip, count)
    while (
        found.peak > chip.memory * USABLE
        and 2 * count <= MOST_DEVICES
        and -1 in config.mesh.values()
    ):
        count *= 2
        larger = plan(config, model, chip, count)
        if larger.peak >= found.peak and count > 4 * least:
            return larger
        found = larger
    return found


def plan(config: ConfigDict, model: Policy, chip: Accelerator, devices: int) -> Plan:
    """Returns the plan of a complete config on so many devices of a kind."""
    mesh: Any = _mesh(config, devices)
    state = StateBuilder(config, model, mesh).abstract_state
    held, offloaded = held_bytes(state), held_bytes(state, host=True)
    job = Job(config, model.config, mesh)
    sampler = shard_bytes(compiled.sampler_params(model.config, state, mesh))
    shape = model.config.recording() if config.grpo.routing_replay else model.config
    cache = shard_bytes(device.abstract_cache(shape, job.rows, job.length, mesh))
    sampling = {
        "sampler's weights": sampler,
        f"cache of {job.rows // job.shards} rows of {job.length} tokens": cache,
        "logits of a decode step": 2.0 * 4 * job.slots / job.shards * model.config.vocab,
    }
    if not chip.is_gpu:
        tied = job.item * model.config.vocab * model.config.width / mesh.shape["tensor"]
        copies = {
            "embedding in the head's layout": tied if model.config.tied else 0.0,
            "cache, filled up to whole tiles": job.filled_cache(
                device.abstract_cache(model.config, job.rows, job.length, mesh)
            ),
        }
        larger = max(copies, key=lambda title: copies[title])  # XLA gives both the same memory
        sampling[larger] = copies[larger]
    if filled := 0.0 if chip.is_gpu else job.filled_experts():
        sampling["experts, filled up to whole tiles"] = filled
    if room := job.rooms(job.slots // job.shards):
        sampling[ROOM] = room
    updating = job.updating(_float32_bytes(state.trainable), gpu=chip.is_gpu)
    updating |= job.fetched(state)
    if replayed := job.replayed_bytes():
        updating["experts of the step's tokens, replayed"] = replayed
    seconds = job.seconds(chip, sampler, cache, full=not config.lora.rank)
    return Plan(dict(mesh.shape), held, offloaded, sampling, updating, seconds, job.sampled)


def _float32_bytes(tree: Any) -> float:
    """Returns the bytes on one device of arrays like these in float32, as gradients are."""
    return sum(4 * shard_bytes(leaf) / leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _model_line(config: ConfigDict, model: Policy) -> str:
    a_token = sum(math.prod(leaf.shape) for leaves in cache_leaves(model.config) for leaf in leaves)
    active = active_entries(model.config)
    kind = f"LoRA of rank {config.lora.rank}" if config.lora.rank else "all parameters"
    return (
        f"model       {entries(model.config) / 1e9:.2f} billion parameters, {active / 1e9:.2f} billion used by a token,"
        f" {a_token:,} cached numbers a token; {kind}, {config.model.dtype}"
    )


def _mesh_line(found: Plan, chip: Accelerator, *, chosen: bool) -> str:
    axes = ", ".join(f"{axis}={size}" for axis, size in found.mesh.items())
    why = " (the fewest that hold it)" if chosen else ""
    return f"mesh        {axes}: {found.devices} {chip.name}{why}; the numbers of {chip.source}"


def _remedies(config: ConfigDict, model: Policy, chip: Accelerator, found: Plan) -> list[str]:
    """Returns what single fields would save, the most first, and whether each is enough."""
    section = config.batch
    changes: list[tuple[str, Any]] = [
        ("model.remat", remat.PRODUCTS),
        ("model.remat", remat.LAYER),
        ("model.dtype", "bfloat16"),
        ("lora.rank", 16),
        ("optim.offload", "moments"),
        ("optim.offload", "all"),
        ("sampler.slots", max(config.sampler.slots // 2, 1)),
        ("sampler.pool", config.sampler.slots),
        ("batch.pack_tokens", max((section.pack_tokens or row_length.ENOUGH) // 2, 1)),
        ("batch.pack_rows", 1),
        ("rollout.max_length", max(config.rollout.max_length // 2, 2)),
        ("mesh.fsdp", found.devices // math.prod(found.mesh[axis] for axis in INNER)),
        ("mesh.context", found.devices // (found.mesh["tensor"] * found.mesh["expert"])),
        ("mesh.tensor", min(8, model.config.kv_heads)),
    ]
    room, tried = chip.memory * USABLE, []
    for field, value in changes:
        changed = _changed(config, found.devices, {field: value})
        if changed and (other := _peak(*changed, chip)) < 0.99 * found.peak:
            tried.append((other, field, value, changed[1]))
    tried.sort(key=lambda one: one[0])
    lines = [
        f"{field}={value}{_on(devices, found)}: {peak / GIB:.2f} GiB,"
        f" {'enough' if peak <= room else 'not enough alone'}"
        for peak, field, value, devices in tried
    ]
    if tried and tried[0][0] > room:
        together: dict[str, Any] = {}
        peak, devices = found.peak, found.devices
        for _, field, value, _ in tried:
            changed = _changed(config, found.devices, together | {field: value})
            if changed and (other := _peak(*changed, chip)) < 0.99 * peak:
                together, peak, devices = together | {field: value}, other, changed[1]
            if peak <= room:
                words = ", ".join(f"{field}={value}" for field, value in together.items())
                lines.append(f"together {words}{_on(devices, found)}: {peak / GIB:.2f} GiB, enough")
                break
    return lines or ["no single field; more devices, and mesh.fsdp over all of them"]


def _on(devices: int, found: Plan) -> str:
    return f" on {devices} devices" if devices != found.devices else ""


def _peak(config: ConfigDict, devices: int, chip: Accelerator) -> float:
    return plan(config, open_shape(config), chip, devices).peak


def _changed(
    config: ConfigDict, devices: int, fields: dict[str, Any]
) -> tuple[ConfigDict, int] | None:
    """Returns the config with other fields and the devices that its mesh then takes, None where nothing changes."""
    other = config.copy_and_resolve_references()
    for field, value in fields.items():
        part, name = field.split(".")
        if other[part][name] == value or (field == "lora.rank" and config.lora.rank):
            return None
        other[part][name] = value
    if -1 not in other.mesh.values() and any(field.startswith("mesh.") for field in fields):
        other.mesh.data = -1
    known = math.prod(other.mesh[axis] for axis in sharding.AXES if other.mesh[axis] != -1)
    return other, -(-devices // known) * known
