import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from rftjax import grpo, policy, sharding, update
from rftjax.batching import make_batch
from rftjax.models import decoder
from rftjax.models.decoder import FULL, Config, Rope
from rftjax.sampler import device
from rftjax.sampler.engine import Engine, Sampling
from rftjax.types import Score, Sequence, Task, TrainState, Trajectory

LENGTH = 128  # tokens of a packed row at least
CONFIG = Config(
    family="llama",
    vocab=64,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    channels=4,
    ffn=32,
    max_positions=LENGTH,
    norm_eps=1e-6,
    rope=Rope(),
    tied=True,
    windows=(24, FULL),
    init_std=0.3,
)
LOSS = grpo.resolve_preset("dapo")
LOSS = {name: LOSS[name] for name in grpo.LOSS_DEFAULTS}


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def params():
    return decoder.init(CONFIG, jax.random.key(0))


def trajectories(groups: int, samples: int, low: int, high: int, *, seed: int = 0):
    """Groups with a common prompt, completions of uneven length and two sampled turns each."""
    rng = np.random.default_rng(seed)
    made = []
    for draw in range(groups):
        prompt = rng.integers(0, CONFIG.vocab, rng.integers(5, 20)).tolist()
        for sample in range(samples):
            sequence = Sequence()
            sequence.extend(prompt)
            rest = int(rng.integers(low, high)) - len(prompt)
            for part, sampled in ((rest // 2, True), (2, False), (rest - rest // 2 - 2, True)):
                tokens = rng.integers(0, CONFIG.vocab, part).tolist()
                logprobs = rng.normal(-4, 0.1, part).tolist() if sampled else None
                sequence.extend(tokens, logprobs, 0)
            made.append(
                Trajectory(
                    Task(str(draw), []),
                    draw,
                    sample,
                    sequences=[sequence],
                    finish_reason="stop",
                    score=Score(0.0),
                    advantage=float(rng.normal()),
                )
            )
    return made


def batch_of(made, **settings):
    settings = {"pack_tokens": LENGTH, "share_prefix": False} | settings
    return make_batch(made, rows=8, max_length=LENGTH, **settings)


def plain_gradient(params, batch):
    """The gradient of the token mean of advantage times log-probability, with neither packing nor parts."""
    tokens_BT = np.zeros(batch.sampled_BT.shape, np.int32)
    pack = batch.pack
    # Only used with unshared prefixes and one sequence a packed row, from which the tokens are read back.
    used = pack.places_RM < batch.sampled_BT.size
    for n, r in zip(*np.nonzero(used.any(-1)), strict=True):
        row = pack.places_RM[n, r][used[n, r]][0] // LENGTH
        tokens_BT[row] = pack.tokens_RX[n, r]

    def loss(params):
        logprobs_BT = policy._logprobs(CONFIG, params, jnp.asarray(tokens_BT), 1.0)
        gains_BT = batch.advantages_B[:, None] * logprobs_BT
        return -jnp.sum(jnp.where(batch.sampled_BT, gains_BT, 0.0)) / batch.sampled_BT.sum()

    return jax.grad(loss)(params)


def gradient(params, batch, *, loss=LOSS, mesh=None):
    """The gradient as an update with plain descent at a rate of 1 applies it, its metrics too."""
    mesh = mesh or Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)
    optimizer = optax.sgd(1.0)
    placed = sharding.shard_tree(mesh, jax.tree.map(jnp.array, params))
    step = sharding.shard_tree(mesh, jnp.zeros((), jnp.int32))
    state = TrainState(step, placed, {}, optimizer.init(placed))
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    apply = update.make_update(CONFIG, optimizer, loss, shardings=where)
    after, metrics = apply(state, sharding.put_batch(mesh, batch))
    jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted or pytest.fail(), after, where)
    changes = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), params, after.trainable)
    return changes, jax.device_get(metrics)


def assert_close(found, expected, tolerance=1e-6):
    for (path, one), two in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(one, two, atol=tolerance, rtol=0, err_msg=str(path))


@pytest.fixture(scope="module")
def uneven():
    """Seven sequences that fill a packed row each, one of which teaches nothing."""
    made = trajectories(7, 1, 70, LENGTH)
    made[3].finish_reason = "length"
    return made


@pytest.fixture(scope="module")
def expected(params, uneven):
    return plain_gradient(params, batch_of(uneven, mask_truncated=True))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_the_number_of_micro_batches_does_not_change_the_gradient(params, uneven, expected, count):
    batch = batch_of(uneven, pack_rows=8 // count, mask_truncated=True)
    assert batch.pack.tokens_RX.shape[:2] == (count, 8 // count)
    found, _ = gradient(params, batch)
    assert_close(found, expected)
