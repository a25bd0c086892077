"""Counts of a job's largest step on any mesh, by the formulas of `docs/planning.md`: bytes, operations, seconds."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rftjax.devices import memories, sharding
from rftjax.devices.accelerators import Accelerator
from rftjax.learning import row_length, update
from rftjax.models import attention, cache_leaves, exchange, logical_axes, remat
from rftjax.models.config import Config, Stack
from rftjax.models.head import shares
from rftjax.run.memory import shard_bytes
from rftjax.run.sampling import cache_rows
from rftjax.types import TrainState
from rftjax.weights import hf

REACHED = {
    "products": 0.4,
    "reading": 0.6,
    "links": 0.7,
}  # shares of the table's numbers, as large jobs report them
GRADIENT = "gradient, and that of a micro-batch"
ROOM = "room for rows of experts from other devices"
# Counted in XLA's programs, `scripts/bench/README.md`: forms of the logits that exist at once, and the share of a
# layer's activations that stays for the backward pass beside a whole head, and beside one shared by its vocabulary.
TPU_LOGITS, GPU_LOGITS = 3.0, 2.33
KEPT, KEPT_BESIDE_SHARED = 0.75, 0.42
ROOMS = (
    10  # arrays of room for rows that come from other devices, at once in a layer's backward pass
)
KEYS_FORMS = 4.0  # of the keys and values that a device of a context has of others' tokens, a guess
TPU_LANES = 128


class Job:
    """Counts of the largest step that a config allows, on a mesh."""

    def __init__(self, config: ConfigDict, model: Config, mesh: Any) -> None:
        self.config, self.model, self.mesh = config, model, mesh
        self.shards = sharding.row_multiple(mesh)
        self.context = sharding.context_shards(mesh)
        self.expert_shards = sharding.expert_shards(mesh, model.routing.experts or 1)
        # Devices that hold parts of one expert's weight, and of one of all others, but for those of `tensor`.
        self.of_others = mesh.shape["fsdp"] * self.context * mesh.shape["expert"]
        self.of_expert = self.of_others // self.expert_shards
        self.slots = config.sampler.slots
        pool = config.sampler.pool or cache_rows(config, self.slots)
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
        unit = attention.row_unit(model.attention, mesh)
        self.row_tokens = -(-max(least, self.length) // unit) * unit * config.batch.pack_rows
        # Those of them that one device has.
        self.own_tokens = self.row_tokens // self.context

    @property
    def matrices(self) -> int:
        """Multiplications of one token in all layers, of its own experts alone."""
        return active_entries(self.model) - self.model.vocab * self.model.width

    def updating(self, trained: float, *, gpu: bool) -> dict[str, float]:
        """Bytes of an update by purpose beside the state, of which `trained` are those of the trained parameters."""
        # XLA lets the arrays of the head go before the backward pass makes those of layers.
        over = self._head_over()
        share = KEPT_BESIDE_SHARED if over and over.together else KEPT
        kept = self.kept() * (1.0 if self.config.model.remat == remat.LAYER else share)
        work = max(self._layer(stack) + self._gathered(stack) for stack in self.model.stacks)
        head = self.head_bytes(GPU_LOGITS, 2) - trained if gpu else self.head_bytes(TPU_LOGITS, 1)
        return {
            GRADIENT: 2 * trained,
            "packed rows of the step": self.pack_bytes(),
            f"activations of {self.own_tokens} tokens": kept,
            "keys and values of whole rows": self._keys_gathered(),
            "the frozen head, gathered": self._frozen_head(),
            "logits, or a layer and its gathered weights": max(head, work),
            "experts, as they are gathered": self._experts_again() if gpu else 0.0,
            ROOM: self.rooms(self.own_tokens),
        }

    def rooms(self, tokens: int) -> float:
        """Bytes of the arrays for rows of experts that other devices send, of so many tokens on each."""
        c, shards = self.model, self.expert_shards
        if shards == 1:
            return 0.0
        parts = exchange.parts(c.routing, tokens, shards)
        rows = exchange.room(c.routing, tokens // parts, shards)
        return float(ROOMS * rows * c.width * self.item)

    def fetched(self, state: TrainState) -> dict[str, float]:
        """Bytes of the weights that an update fetches from the host's memory for its passes."""
        leaves = [leaf for leaf in jax.tree.leaves(state.trainable) if memories.on_host(leaf)]
        item = 4 if self.config.lora.rank else self.item
        own = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
        return {"weights from the host's memory, as they are read": float(item * own)}

    def filled_experts(self) -> float:
        """Bytes of the copies that XLA for TPUs makes of gates and ups whose part of the inner width is no multiple of
        its tile's."""
        c, tensor = self.model, self.mesh.shape["tensor"]
        own = c.routing.ffn / tensor if c.routing.ffn % tensor == 0 else c.routing.ffn
        if not c.routing.experts or own % TPU_LANES == 0:
            return 0.0
        sparse = sum(stack.count for stack in c.stacks if stack.sparse)
        filled = -(-own // TPU_LANES) * TPU_LANES
        experts = c.routing.experts / self.expert_shards
        return 2.0 * sparse * experts * c.width * filled * self.item

    def pack_bytes(self) -> float:
        """Bytes of a step's packed rows, as many as samples: 7 numbers a token, on each device of a context alike."""
        tokens = self.conversations * self.row_tokens / self.config.batch.pack_rows
        return 7 * 4 * tokens / self.shards

    def filled_cache(self, cache: Any) -> float:
        """Bytes of the copy that XLA for TPUs makes, for the steps of a call, of what has fewer channels than its tile
        is wide."""

        def one(leaf: Any) -> float:
            filled = -leaf.shape[-1] % TPU_LANES
            return shard_bytes(leaf) * (1 + filled / leaf.shape[-1]) if filled else 0.0

        return sum(map(one, jax.tree.leaves(cache)))

    def replayed_bytes(self) -> float:
        """Bytes of the experts that a step's updates replay: of rows as many as samples."""
        if not self.config.grpo.routing_replay:
            return 0.0
        tokens = self.conversations * self.row_tokens / self.config.batch.pack_rows
        return token_choices(self.model) * tokens / self.shards / self.context

    def kept(self) -> float:
        """Bytes that one micro-batch's rows keep for the backward pass on a device."""
        c, again = self.model, self.config.model.remat
        if again == remat.LAYER:
            return float(self.own_tokens * self.item * c.width * c.layers)
        layers = sum(self._layer(stack) * stack.count for stack in c.stacks)
        if again == remat.PRODUCTS:
            return layers * row_length.token_bytes(c, again) / row_length.token_bytes(c, remat.ALL)
        return layers

    def _gathered(self, stack: Stack) -> float:
        """Bytes of one layer's weights, of which those of the next layer are gathered too, and of their gradient."""
        axes, one = logical_axes(self.model), 0.0
        params = hf.abstract_params(self.model)[stack.name]
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            of_experts = axes[path[-2].key, path[-1].key][0] == "experts"
            if (self.of_expert if of_experts else self.of_others) > 1:
                one += math.prod(leaf.shape[1:]) / (self.expert_shards if of_experts else 1)
        one /= self.mesh.shape["tensor"]
        return one * (2 * self.item + (0 if self.config.lora.rank else 4))

    def _experts_again(self) -> float:
        """Bytes of a device's part of the experts, which XLA for GPUs turns over before it gathers from it where they
        are divided by width."""
        routing, shards = self.model.routing, self.of_expert
        if shards == 1 or (routing.experts or 1) % self.of_others == 0:
            return 0.0
        own = _matrices(self.model)[1] / self.expert_shards / self.mesh.shape["tensor"] / shards
        return own * (self.item if self.config.lora.rank else 4)

    def _layer(self, stack: Stack) -> float:
        """Bytes of one layer's activations: what XLA keeps of attention, norms (in float32) and the feed-forward part,
        whose gate and products it keeps in several forms (counted in its programs, `scripts/bench/README.md`)."""
        c, routing, tensor = self.model, self.model.routing, self.mesh.shape["tensor"]
        ffn = routing.chosen * routing.ffn + routing.shared if stack.sparse else c.ffn
        shared = 2 * (2 * c.heads + 2 * c.kv_heads) * c.channels + 8 * ffn
        return self.own_tokens * self.item * (16 * c.width + shared / tensor)

    def _keys_gathered(self) -> float:
        """Bytes of one layer's keys and values of all tokens of a device's rows, and of their gradients, where these
        tokens lie on several devices."""
        if self.context == 1:
            return 0.0
        numbers = 2 * self.model.kv_heads * self.model.channels / self.mesh.shape["tensor"]
        return KEYS_FORMS * self.row_tokens * self.item * numbers

    def head_bytes(self, logits: float, copies: int) -> float:
        """Bytes of the float32 logits that exist at once in so many forms, and of a trained head, in so many copies if
        one device has all of it, and its gradient."""
        scored = min(self.own_tokens, self.config.batch.pack_rows * update.HEAD_CHUNK)
        whole = 4.0 * self.row_tokens * self.model.vocab * self.shards
        chunked = whole > update.HEAD_BYTES or self.config.model.remat == remat.LAYER
        one = 4.0 * (scored if chunked else self.own_tokens) * self.model.vocab
        forms = (1 if self._head_over() else copies) * self.item + 4
        head = 0.0 if self.config.lora.rank else self._own_head() * forms
        return logits * one / self.mesh.shape["tensor"] + head

    def _head_over(self) -> Any:
        """Returns how devices share out logits."""
        sampler, context = self.config.sampler, self.context > 1
        filtered = sampler.top_p < 1 or sampler.top_k > 0
        return shares(self.mesh, self.model.vocab, context=context, whole=filtered)

    def _own_head(self) -> float:
        """Numbers of the head that a device computes logits with."""
        over = self._head_over()
        return self.model.vocab * self.model.width / (over.count(over.vocab) if over else 1)

    def _frozen_head(self) -> float:
        """Bytes of a head that is not trained, which is gathered once for all chunks of logits."""
        gathered = self.config.lora.rank and self.of_others > 1
        return self._own_head() * self.item if gathered else 0.0

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
        # Devices of a context compute the same products of prompts.
        prefill = 2 * self.matrices * prompts * self.prompt * self.context
        prefill += 4 * pairs["prompt"] * self._pair_width
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
        gradients that are scattered or summed (of full fine-tuning), sums over `tensor` twice a layer in each pass,
        rows of experts that lie on other devices there and back, what keys and values of other devices' tokens are made
        of in two passes, and its gradient."""
        tensor = self.mesh.shape["tensor"]
        batches = math.ceil(tokens / self.row_tokens / self.shards)
        experts, moved = _matrices(self.model)[1], 0.0
        for whole, fsdp, shards in (
            (entries(self.model) - experts, self.of_others, 1),
            (experts, self.of_expert, self.expert_shards),
        ):
            shard = whole * self.item / fsdp / tensor / shards
            copies = self.shards * self.context / fsdp / shards
            moved += batches * shard * (fsdp - 1) * (3 if full else 2)
            if full:
                moved += batches * 2 * shard * (copies - 1) / copies
        own = tokens / self.shards / self.context
        moved += self._exchanged() * own
        cached = sum(math.prod(one.shape) for layer in cache_leaves(self.model) for one in layer)
        moved += 3 * cached * self.item * (self.context - 1) * own
        a_token = 4 * self.model.layers * self.model.width * self.item
        return moved + 2 * a_token * (tensor - 1) / tensor * own

    def _exchanged(self) -> float:
        """Bytes of one token that leave its device for those of its experts, there and back in each pass."""
        c, shards = self.model, self.expert_shards
        sparse = sum(stack.count for stack in c.stacks if stack.sparse)
        ways = 4 if self.config.model.remat == remat.ALL else 6
        return ways * sparse * c.routing.chosen * c.width * self.item * (shards - 1) / shards


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


def token_choices(model: Config) -> int:
    """Returns the bytes of the experts that one token chooses in all layers."""
    layers, chosen, dtype = model.choices
    return layers * chosen * np.dtype(dtype).itemsize


def read_share(model: Config, rows: float) -> float:
    """Returns the share of the sampler's weights that a decode step of so many rows reads, experts chosen evenly."""
    experts = _matrices(model)[1]
    if not experts:
        return 1.0
    seen = 1.0 - (1.0 - model.routing.chosen / model.routing.experts) ** rows
    whole = entries(model)
    return (whole - experts + seen * experts) / whole
