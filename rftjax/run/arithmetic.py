"""Counts of a job's largest step on any mesh, by the formulas of `docs/planning.md`: bytes, operations, seconds."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rftjax.devices import sharding
from rftjax.devices.accelerators import Accelerator
from rftjax.learning import row_length, update
from rftjax.models import logical_axes, remat
from rftjax.models.config import Config, Stack
from rftjax.weights import hf

REACHED = {
    "products": 0.4,
    "reading": 0.6,
    "links": 0.7,
}  # shares of the table's numbers, as large jobs report them


class Job:
    """Counts of the largest step that a config allows, on a mesh."""

    def __init__(self, config: ConfigDict, model: Config, mesh: Any) -> None:
        self.config, self.model, self.mesh = config, model, mesh
        self.shards = sharding.row_multiple(mesh)
        self.slots = config.sampler.slots
        pool = config.sampler.pool or self.slots * (2 if config.environment else 1)
        self.rows = -(-max(pool, self.slots) // self.shards) * self.shards
        self.length = min(config.rollout.max_length, model.max_positions)
        self.conversations = config.batch.prompts * config.batch.group_size
        new = config.sampler.max_new_tokens * config.rollout.max_turns
        self.new = min(new, self.length - 1)
        self.prompt = self.length - self.new
        self.sampled = self.conversations * self.new
        self.item = np.dtype("float32").itemsize if model.dtype == "float32" else 2
        # Rows whose length a job chooses are at least so long, and longer only where memory is left.
        least = config.batch.pack_tokens or row_length.ENOUGH
        self.row_tokens = max(least, self.length) * config.batch.pack_rows

    @property
    def matrices(self) -> int:
        """Multiplications of one token in all layers, of its own experts alone."""
        return active_entries(self.model) - self.model.vocab * self.model.width

    def activations(self) -> float:
        """Bytes that the backward pass needs of one micro-batch's rows on a device: kept layers, and those at work."""
        c = self.model
        layers = [self._layer(stack) for stack in c.stacks for _ in range(stack.count)]
        again = self.config.model.remat
        if again == remat.PRODUCTS:
            kept = row_length.token_bytes(c, again) / row_length.token_bytes(c, remat.ALL)
            return sum(layers) * kept + 2 * max(layers)
        if again == remat.LAYER:
            return float(self.row_tokens * self.item * c.width * c.layers) + max(layers)
        return sum(layers) + 2 * max(layers)

    def _layer(self, stack: Stack) -> float:
        """Bytes of one layer's activations: what XLA keeps of attention, norms (in float32) and the feed-forward part,
        whose gate and products it keeps in several forms (counted in its programs, `scripts/bench/README.md`)."""
        c, routing, tensor = self.model, self.model.routing, self.mesh.shape["tensor"]
        ffn = routing.chosen * routing.ffn + routing.shared if stack.sparse else c.ffn
        shared = 2 * (2 * c.heads + 2 * c.kv_heads) * c.channels + 8 * ffn
        return self.row_tokens * self.item * (16 * c.width + shared / tensor)

    def head_bytes(self) -> float:
        """Bytes of the float32 logits that exist at once in five forms, and of the head, gathered, and its gradient."""
        scored = min(self.row_tokens, self.config.batch.pack_rows * update.HEAD_CHUNK)
        whole = 4.0 * self.row_tokens * self.model.vocab * self.shards
        chunked = whole > update.HEAD_BYTES or self.config.model.remat == remat.LAYER
        one = 4.0 * (scored if chunked else self.row_tokens) * self.model.vocab
        forms = self.item if self.config.lora.rank else 2 * self.item + 4
        head = self.model.vocab * self.model.width * forms
        return (5 * one + head) / self.mesh.shape["tensor"]

    def seconds(
        self, chip: Accelerator, weights: float, cache: float, *, full: bool
    ) -> dict[str, float]:
        """Seconds of a step's parts, each device at the shares of REACHED."""
        c, devices = self.model, self.mesh.size
        tensor = self.mesh.shape["tensor"]
        rate = chip.operations * REACHED["products"] * (1.0 if c.dtype == "bfloat16" else 0.5)
        reading = chip.bandwidth * REACHED["reading"]
        links = chip.link * REACHED["links"]
        head = c.width * c.vocab
        prompts = self.config.batch.prompts
        pairs = self._pairs()
        prefill = 2 * self.matrices * prompts * self.prompt + 4 * pairs["prompt"] * self._pair_width
        steps = math.ceil(self.sampled / max(min(self.slots, self.conversations), 1))
        read = weights * read_share(c, self.slots / self.shards)
        step_reads = (read + cache * self._used_share()) / reading
        step_computes = 2 * (self.matrices + head) * self.slots / self.shards / tensor / rate
        tokens = prompts * self.prompt + self.sampled
        forward = (
            2 * self.matrices * tokens
            + 2 * head * self.sampled
            + 4 * pairs["all"] * self._pair_width
        )
        passes = 3 * row_length.COSTS[self.config.model.remat]
        found = {
            "prefill": prefill / devices / rate,
            f"decode, {steps:,} steps of {self.slots} rows": steps * max(step_reads, step_computes),
            "update": passes * forward / devices / rate,
        }
        moved = self._moved(tokens, full=full)
        if moved:
            found["links between devices"] = moved / links
        return found

    @property
    def _pair_width(self) -> int:
        return self.model.layers * self.model.heads * self.model.channels

    def _pairs(self) -> dict[str, float]:
        """Pairs of a token and one that it sees, windows left out: in prompts, and in all that is trained on."""
        group, prompts = self.config.batch.group_size, self.config.batch.prompts
        whole, prompt = self.length**2 / 2, self.prompt**2 / 2
        return {"prompt": prompts * prompt, "all": prompts * (prompt + group * (whole - prompt))}

    def _used_share(self) -> float:
        """Share of the cache that a decode step reads in the mean."""
        return (self.prompt + self.new / 2) / self.length * min(1.0, self.slots / self.rows)

    def _moved(self, tokens: int, *, full: bool) -> float:
        """Bytes that each device sends in the update's passes over its micro-batches: weights that are gathered twice,
        gradients that are scattered or summed (of full fine-tuning), sums over `tensor` twice a layer in each pass."""
        fsdp, tensor, data = (self.mesh.shape[axis] for axis in ("fsdp", "tensor", "data"))
        batches = math.ceil(tokens / self.row_tokens / self.shards)
        shard = entries(self.model) * self.item / fsdp / tensor
        moved = batches * shard * (fsdp - 1) * (3 if full else 2)
        if full:
            moved += batches * 2 * shard * (data - 1) / data
        a_token = 4 * self.model.layers * self.model.width * self.item
        return moved + 2 * a_token * (tensor - 1) / tensor * tokens / self.shards


def entries(model: Config) -> int:
    """Returns the number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(hf.abstract_params(model)))


def active_entries(model: Config) -> int:
    """Returns the entries of the matrices that one token is multiplied with, the head's among them."""
    routing = model.routing
    share = routing.chosen / routing.experts if routing.experts else 1.0
    dense, experts = _matrices(model)
    return model.vocab * model.width + dense + round(share * experts)


def _matrices(model: Config) -> tuple[int, int]:
    """Returns the entries of the layers' matrices, those of experts apart."""
    found, axes = [0, 0], logical_axes(model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(hf.abstract_params(model)):
        names = tuple(key.key for key in path)
        if names[0] not in ("embed", "head") and len(axes[names[-2:]]) > 1 and names[-1] != "bias":
            found[axes[names[-2:]][0] == "experts"] += math.prod(leaf.shape)
    return found[0], found[1]


def read_share(model: Config, rows: float) -> float:
    """Returns the share of the sampler's weights that a decode step of so many rows reads, experts chosen evenly."""
    experts = _matrices(model)[1]
    if not experts:
        return 1.0
    seen = 1.0 - (1.0 - model.routing.chosen / model.routing.experts) ** rows
    whole = entries(model)
    return (whole - experts + seen * experts) / whole
