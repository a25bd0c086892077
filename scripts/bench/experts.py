"""Experts and latent attention alone.

`products`: a layer of experts, gradients included, beside a loop over the experts, each of which computes every token.
`latent`: a decode step of one layer over a latent cache, beside one over expanded keys and values.
`mismatch`: the log-probabilities of sampler and trainer of random models, in nats a sampled token, also where the
trainer replays the sampler's experts.
`replay`: what recording experts costs a decode step, and replaying them an update.

    python scripts/bench/experts.py --forms=products,latent,mismatch,replay
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import workload

from rftjax import grpo
from rftjax.learning import update
from rftjax.learning.batching import make_batch
from rftjax.models import cached, decoder
from rftjax.models.across import keys_and_values
from rftjax.models.config import FULL
from rftjax.models.experts import GATES, Experts, route
from rftjax.models.latent import LatentAttention
from rftjax.models.rotary import rotations
from rftjax.sampler import device
from rftjax.sampler.engine import Engine, noise_key
from rftjax.types import Batch, Sequence, Task, TrainState, Trajectory
from rftjax.weights import hf


def fields(flags: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Returns the Hugging Face config of a small model: qwen3, qwen3_moe or deepseek_v3."""
    shared = {
        "model_type": kind,
        "vocab_size": 4096,
        "hidden_size": flags.width,
        "intermediate_size": flags.ffn * flags.chosen,
        "num_hidden_layers": flags.layers,
        "num_attention_heads": flags.heads,
        "num_key_value_heads": flags.heads,
        "moe_intermediate_size": flags.ffn,
        "num_experts_per_tok": flags.chosen,
        "norm_topk_prob": True,
        "max_position_embeddings": 8192,
        "initializer_range": 0.1,
    }
    if kind == "deepseek_v3":
        groups = {"n_routed_experts": flags.experts, "n_group": 4, "topk_group": 2}
        return shared | groups | {"first_k_dense_replace": 1, "q_lora_rank": flags.width // 2}
    experts = {} if kind == "qwen3" else {"num_experts": flags.experts}
    dense = {name: one for name, one in shared.items() if kind != "qwen3" or name not in SPARSE}
    return dense | experts | {"head_dim": 64}


SPARSE = ("moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob")


def fastest(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Returns the fewest seconds, and those of all cores together, of the calls behind the first."""
    seconds, used = [], []
    for _ in range(repeats + 1):
        start, cores = time.perf_counter(), time.process_time()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
        used.append(time.process_time() - cores)
    return {"s": min(seconds[1:]), "cores_s": min(used[1:])}


def faster(slow: dict[str, float], fast: dict[str, float]) -> dict[str, float]:
    """Returns how many times as fast the second one is, by both counts."""
    return {name: slow[name] / fast[name] for name in slow}


def products(flags: argparse.Namespace) -> dict[str, Any]:
    """Times a layer with its gradients, ours and a loop over experts."""
    config = hf.read_config(fields(flags, "qwen3_moe"), flags.dtype)
    routing, module = config.routing, Experts(config)
    x_BTD = jax.random.normal(jax.random.key(0), (1, flags.tokens, flags.width), config.dtype)
    params: Any = module.init(jax.random.key(1), x_BTD)["params"]

    def ours(params: Any, x_BTD: jax.Array) -> Any:
        return module.apply({"params": params}, x_BTD)

    def loop(params: Any, x_BTD: jax.Array) -> jax.Array:
        x_TD = x_BTD[0]
        logits_TE = x_TD.astype(jnp.float32) @ params["router"]["weight"]
        chosen_TU, weights_TU, _ = route(routing, logits_TE)
        picked = chosen_TU[None] == jnp.arange(routing.experts)[:, None, None]
        shares_ET = jnp.sum(jnp.where(picked, weights_TU[None], 0.0), axis=2).astype(x_TD.dtype)
        kernels = [params[name]["kernel"] for name in GATES]

        @jax.checkpoint
        def add(sum_TD: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
            share_T, (gate, up, down) = inputs
            inner = jax.nn.silu(x_TD @ gate.astype(x_TD.dtype)) * (x_TD @ up.astype(x_TD.dtype))
            return sum_TD + (inner @ down.astype(x_TD.dtype)) * share_T[:, None], None

        return jax.lax.scan(add, jnp.zeros_like(x_TD), (shares_ET, kernels))[0]

    def timed(form: Callable[..., Any]) -> tuple[dict[str, float], Any]:
        step = jax.jit(jax.grad(lambda p, x: jnp.sum(form(p, x).astype(jnp.float32) ** 2), (0, 1)))
        return fastest(lambda: step(params, x_BTD), flags.repeats), step(params, x_BTD)

    found, gradient = timed(ours)
    scan, expected = timed(loop)
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True)
    off = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)
    return {
        "grouped": found, "loop": scan, "times_as_fast": faster(scan, found),
        "largest_relative_difference": off,
    }  # fmt: skip


def latent(flags: argparse.Namespace) -> dict[str, Any]:
    """Times a decode step of one layer of latent attention over both kinds of cache, and counts their bytes."""
    config = hf.read_config(fields(flags, "deepseek_v3"), flags.dtype)
    sizes, B, S = config.latent, flags.rows, flags.positions
    positions_BT = jnp.full((B, 1), S - 1)
    x_BTD = jax.random.normal(jax.random.key(0), (B, 1, flags.width), config.dtype)
    turn = rotations(config, positions_BT)[0]

    def values(q: jax.Array, new: dict[str, jax.Array], expansion: Any = None) -> tuple:
        return keys_and_values(new, expansion)[1], None

    tree = LatentAttention(config).init(jax.random.key(1), x_BTD, turn, values)

    def over_latent(q: jax.Array, seen: dict[str, jax.Array]) -> jax.Array:
        return cached.over("plain", q, seen, positions_BT, FULL)

    def over_expanded(q: jax.Array, seen: dict[str, jax.Array]) -> jax.Array:
        scores = jnp.einsum("BTHC,BHSC->BHTS", q, seen["keys"]) * config.channels**-0.5
        return jnp.einsum("BHTS,BHSC->BTHC", jax.nn.softmax(scores, axis=-1), seen["values"])

    def timed(absorbed: bool, cache: dict[str, jax.Array]) -> tuple[dict[str, float], float]:
        module = LatentAttention(config, absorbed)

        @functools.partial(jax.jit, donate_argnums=1)
        def step(tree: Any, cache: Any) -> Any:
            def attend(q: jax.Array, new: dict[str, jax.Array], expansion: Any = None) -> tuple:
                if absorbed:
                    seen = {
                        name: leaf.at[:, -1].set(new[name][:, 0]) for name, leaf in cache.items()
                    }
                    return over_latent(q, seen), seen
                new = dict(zip(cache, keys_and_values(new, expansion), strict=True))
                seen = {
                    name: leaf.at[:, :, -1].set(new[name][:, 0, :, : leaf.shape[-1]])
                    for name, leaf in cache.items()
                }
                attended = over_expanded(q, seen)
                return jnp.pad(attended, ((0, 0),) * 3 + ((0, q.shape[-1] - sizes.values),)), seen

            return module.apply(tree, x_BTD, turn, attend)

        held = [cache]

        def run() -> Any:
            output, held[0] = step(tree, held[0])
            return output

        size = sum(leaf.nbytes for leaf in cache.values())
        return fastest(run, flags.repeats * 5), size / 2**20

    def zeros(*shape: int) -> jax.Array:
        return jnp.zeros(shape, config.dtype)

    small = {"latent": zeros(B, S, sizes.rank), "rotated": zeros(B, S, sizes.rotated)}
    latent_s, latent_mib = timed(True, small)
    wide = {
        "keys": zeros(B, config.heads, S, config.channels),
        "values": zeros(B, config.heads, S, sizes.values),
    }
    expanded_s, expanded_mib = timed(False, wide)
    return {
        "latent": latent_s, "latent_mib": latent_mib, "expanded": expanded_s,
        "expanded_mib": expanded_mib, "times_as_fast": faster(expanded_s, latent_s),
        "times_as_small": expanded_mib / latent_mib,
    }  # fmt: skip


PROMPT = 32  # tokens


def opened(flags: argparse.Namespace, kind: str, dtype: str, *, record: bool) -> tuple[Engine, Any]:
    """Returns a sampler of a random model, and the model's weights."""
    config = hf.read_config(fields(flags, kind), dtype)
    params = jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0))
    shape = config.recording() if record else config
    engine = Engine(shape, slots=flags.rows, max_length=PROMPT + flags.new)
    engine.set_params(device.sampler_params(config, params))
    return engine, params


def sample(engine: Engine, flags: argparse.Namespace) -> list[Trajectory]:
    """Samples a completion of a prompt of its own in each row."""
    rng, sampled = np.random.default_rng(0), []
    for row in range(flags.rows):
        sequence = Sequence()
        sequence.extend(rng.integers(0, 4096, PROMPT).tolist())
        sampled.append(
            Trajectory(Task("", []), row, 0, sequences=[sequence], advantage=1.0 - row % 2)
        )
        engine.open((row, 0), sequence.tokens, flags.new, noise_key(0, row, 0))
    while engine.busy:
        for turn in engine.step():
            engine.close(turn.key)
            sequence = sampled[turn.key[0]].sequences[0]
            sequence.extend(turn.tokens, turn.logprobs, 0)
            sequence.experts = turn.experts
    return sampled


def laid_out(sampled: list[Trajectory], engine: Engine, *, replay: bool) -> Batch:
    """Returns the batch of an update."""
    most = engine.max_length
    return make_batch(
        sampled,
        rows=len(sampled),
        max_length=most,
        pack_tokens=most,
        experts=engine.config.choices if replay else None,
    )


def mismatch(flags: argparse.Namespace) -> dict[str, Any]:
    """Samples from random models and scores what they sampled, in both dtypes."""
    found: dict[str, Any] = {}
    for kind in ("qwen3", "qwen3_moe", "deepseek_v3"):
        for dtype in ("float32", "bfloat16"):
            sparse = kind != "qwen3"
            engine, params = opened(flags, kind, dtype, record=sparse)
            sampled = sample(engine, flags)
            score = update.make_scorer(engine.config)
            for replay in (False, True)[: sparse + 1]:
                batch = laid_out(sampled, engine, replay=replay)
                gap_BT = np.abs(score(params, None, batch) - batch.sampler_logprobs_BT)
                gap = gap_BT[batch.sampled_BT]
                name = f"{kind}_{dtype}{'_replayed' if replay else ''}"
                found[name] = {"mean": float(gap.mean()), "max": float(gap.max())}
    return found


def replay(flags: argparse.Namespace) -> dict[str, Any]:
    """Times sampling and an update, with and without the experts of each token."""
    found: dict[str, Any] = {}
    loss, optimizer = grpo.LossSettings.of(grpo.preset_fields("grpo")), optax.sgd(1e-3)
    for record in (False, True):
        engine, params = opened(flags, "qwen3_moe", flags.dtype, record=record)
        sampled = sample(engine, flags)  # compiles
        before = engine.counters.decode_steps
        times = fastest(lambda engine=engine: sample(engine, flags), flags.repeats)
        steps = (engine.counters.decode_steps - before) / (flags.repeats + 1)
        batch = laid_out(sampled, engine, replay=record)
        apply = update.make_update(engine.config, optimizer, loss, unroll=True)
        state = [TrainState(jnp.zeros((), jnp.int32), params, {}, optimizer.init(params))]

        def step(state: list = state, apply: Any = apply, batch: Batch = batch) -> Any:
            state[0], told = apply(state[0], batch)
            return told

        each = {name: one / steps for name, one in times.items()}
        name = "replayed" if record else "plain"
        found[name] = {"decode_step": each, "update": fastest(step, flags.repeats)}
    layers, chosen, dtype = engine.config.choices
    return found | {"bytes_a_token": layers * chosen * np.dtype(dtype).itemsize}


FORMS = {"products": products, "latent": latent, "mismatch": mismatch, "replay": replay}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    for name, value in {
        "tokens": 4096, "experts": 64, "chosen": 8, "width": 256, "ffn": 128, "layers": 4, "heads": 16,
        "rows": 4, "positions": 4096, "new": 32, "repeats": 3,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    flags = parser.parse_args()
    workload.report(flags, {form: FORMS[form](flags) for form in flags.forms.split(",")})


if __name__ == "__main__":
    main()
