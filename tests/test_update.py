import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from meshes import mesh_of

from rftjax import grpo, policy
from rftjax.devices import sharding
from rftjax.learning import optim, update
from rftjax.learning.batching import make_batch
from rftjax.models import decoder, head, logical_axes
from rftjax.models.decoder import Config, Rope
from rftjax.sampler import device
from rftjax.sampler.engine import Engine, noise_key
from rftjax.types import SamplingParams, Score, Sequence, Task, TrainState, Trajectory

LENGTH = 128  # tokens of a packed row at least
CONFIG = Config(
    family="llama",
    vocab=64,
    width=16,
    layers=1,  # one is enough here, and compiles in half the time
    heads=4,
    kv_heads=2,
    channels=4,
    ffn=32,
    max_positions=LENGTH,
    norm_eps=1e-6,
    rope=Rope(),
    tied=True,
    windows=(24,),
    init_std=0.3,
)
LOGICAL = logical_axes(CONFIG)
LOSS = grpo.LossSettings.of(grpo.preset_fields("dapo"))


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


def gradient(
    params, batch, *, loss=LOSS, mesh=None, config=CONFIG, unroll=False, settings=None, old=None
):
    """The gradient as an update with plain descent at a rate of 1 applies it, its metrics too."""
    mesh = mesh or mesh_of()
    optimizer = optax.sgd(1.0)
    placed = sharding.shard_tree(mesh, LOGICAL, jax.tree.map(jnp.array, params))
    step = sharding.shard_tree(mesh, LOGICAL, jnp.zeros((), jnp.int32))
    state = TrainState(step, placed, {}, optimizer.init(placed))
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    apply = update.make_update(
        config, optimizer, loss, shardings=where, unroll=unroll, mesh=mesh, **(settings or {})
    )
    after, metrics = apply(state, sharding.put_batch(mesh, batch), old)
    jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted or pytest.fail(), after, where)
    changes = jax.tree.map(
        lambda old, new: np.asarray(old) - np.asarray(new), params, after.trainable
    )
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


@pytest.mark.parametrize(
    (
        "sizes",
        "positions",
        "vocab",
    ),  # the axes that divide the vocabulary, where a device scores so many
    [
        ({"data": 2}, 0, ()),
        ({"fsdp": 2, "expert": 2}, 0, ("fsdp", "expert")),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 0, ("tensor", "fsdp")),
        ({"data": 2, "fsdp": 2, "expert": 2}, 10, ("fsdp",)),
        ({"tensor": 8}, 2048, ("tensor",)),
        ({"context": 2}, 2048, ()),
        ({"context": 8}, 0, ("context",)),
        ({"fsdp": 2, "context": 2, "tensor": 2}, 10, ("tensor", "fsdp")),
    ],
)
def test_the_mesh_does_not_change_the_gradient(
    params, uneven, expected, sizes, positions, vocab, monkeypatch
):
    mesh = mesh_of(**sizes)
    monkeypatch.setattr(head, "POSITIONS", positions)
    over = head.shares(mesh, CONFIG.vocab, context="context" in sizes, whole=False)
    assert over and over.vocab == vocab
    # One row a device: the last of eight holds nothing but padding.
    batch = batch_of(
        uneven,
        pack_rows=sharding.row_multiple(mesh),
        pack_unit=sharding.context_shards(mesh),
        mask_truncated=True,
    )
    found, _ = gradient(params, batch, mesh=mesh)
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("aggregate", "expected"), [("token_mean", 3), ("sequence_mean", 2), ("constant", 20)]
)
def test_the_denominator_counts_what_the_whole_step_trains_on(aggregate, expected):
    batch = batch_of(trajectories(1, 1, 70, LENGTH))
    sampled_BT = np.zeros(batch.sampled_BT.shape, bool)  # two of the rows are trained on
    sampled_BT[0, 1:3] = sampled_BT[2, 4] = True
    B = len(sampled_BT)
    for shares_B, trajectories_found in (
        (None, 2),
        (np.ones(B), 2),
        (np.array([2, 0, 1] + [0] * (B - 3)) / 3, 1),
    ):
        changed = batch._replace(sampled_BT=sampled_BT, shares_B=shares_B)
        found = update.normalizers(changed, aggregate, 10)
        wanted = expected if aggregate == "token_mean" else expected * trajectories_found / 2
        assert [float(value) for value in found] == [wanted, 3]


def test_weights_and_shares_of_rows_reach_the_loss(params):
    batch = batch_of(trajectories(3, 1, 30, 60))
    loss = dataclasses.replace(LOSS, aggregate="sequence_mean")
    shares_B = np.zeros(8, np.float32)
    shares_B[:3] = 0.25, 0.75, 1.0  # the first two rows are one trajectory: 2 in all, not 3
    shared, _ = gradient(params, batch._replace(shares_B=shares_B), loss=loss)
    ones_B = np.zeros(8, np.float32)
    ones_B[:3] = 1.0
    weighted = batch._replace(shares_B=ones_B, weights_B=shares_B * np.float32(1.5))
    assert_close(gradient(params, weighted, loss=loss)[0], shared)


@pytest.mark.parametrize(
    ("form", "shape"),  # the heads divide over 2
    [("splash", (1, 1, 1)), ("splash", (2, 2, 2)), ("splash", (1, 1, 4)), ("tiled", (2, 2, 2))],
)
def test_the_form_of_attention_does_not_change_the_gradient(
    params, uneven, expected, form, shape, splash_on_cpu
):
    mesh = mesh_of(*shape)
    batch = batch_of(uneven, pack_rows=sharding.row_multiple(mesh), mask_truncated=True)
    config = dataclasses.replace(CONFIG, attention=form)
    found, _ = gradient(params, batch, mesh=mesh, config=config, unroll=True)
    assert_close(found, expected)


def test_no_device_computes_the_rows_of_others_where_weights_lie_over_fsdp(params, uneven):
    mesh = mesh_of(1, 4, 1)
    placed = sharding.shard_tree(mesh, LOGICAL, jax.tree.map(jnp.array, params))
    batch = sharding.put_batch(mesh, batch_of(uneven, pack_rows=4))
    optimizer = optax.sgd(1.0)
    state = TrainState(jnp.zeros((), jnp.int32), placed, {}, optimizer.init(placed))
    text = (
        update.make_update(CONFIG, optimizer, LOSS, mesh=mesh)
        .lower(state, batch)
        .compile()
        .as_text()
    )
    X = batch.pack.tokens_RX.shape[-1]
    assert f"[1,{X},{CONFIG.ffn}]" in text  # of its own row
    for width in (CONFIG.ffn, CONFIG.width, CONFIG.ffn // 4, CONFIG.width // 4):
        assert f"[4,{X},{width}]" not in text


def test_an_update_on_a_mesh_of_tpus_is_lowered_for_them(params, uneven):
    mesh = mesh_of(2, 2, 2)
    config = dataclasses.replace(CONFIG, attention="splash")
    placed = sharding.shard_tree(mesh, LOGICAL, jax.tree.map(jnp.array, params))
    batch = sharding.put_batch(mesh, batch_of(uneven, pack_rows=4))
    optimizer = optax.sgd(1.0)
    state = TrainState(jnp.zeros((), jnp.int32), placed, {}, optimizer.init(placed))
    apply = update.make_update(config, optimizer, LOSS, mesh=mesh)
    lowered = export.export(apply, platforms=["tpu"])(state, batch)
    assert "tpu_custom_call" in lowered.mlir_module()


def test_shared_prefixes_and_packed_neighbours_do_not_change_the_gradient(params):
    made = trajectories(3, 4, 30, 60)
    packed = batch_of(made, share_prefix=True, pack_tokens=512)
    single = batch_of(made, share_prefix=False, pack_rows=2)
    assert packed.pack.segments_RX.max() == 4 and packed.pack.groups_RX.max() > 1
    loss = dataclasses.replace(LOSS, aggregate="sequence_mean", entropy_weight=0.1)
    one, one_metrics = gradient(params, packed, loss=loss)
    two, two_metrics = gradient(params, single, loss=loss)
    assert_close(one, two)
    for name, value in one_metrics.items():
        np.testing.assert_allclose(value, two_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean", "constant"])
def test_leaving_out_samples_of_advantage_zero_does_not_change_the_gradient(params, aggregate):
    made = trajectories(4, 3, 30, 60)
    for one in made:
        if one.draw in (1, 2) or one.sample == 1:
            one.advantage = 0.0
    settings = {"share_prefix": True, "pack_rows": 1}
    full, lean = batch_of(made, **settings), batch_of(made, skip_zero=True, **settings)
    assert lean.micro_batches < full.micro_batches
    loss = dataclasses.replace(LOSS, aggregate=aggregate, max_tokens=40, tis_cap=2.0)
    one, one_metrics = gradient(params, full, loss=loss)
    two, two_metrics = gradient(params, lean, loss=loss)
    assert_close(one, two)
    np.testing.assert_allclose(one_metrics["loss"], two_metrics["loss"], atol=1e-6)


def test_log_probabilities_do_not_depend_on_padding_or_companions(params):
    made = trajectories(3, 4, 30, 60)
    score = update.make_scorer(CONFIG)

    def scored(chosen, **settings):
        batch = batch_of(chosen, **settings)
        return np.asarray(score(params, None, batch))[: len(chosen)], batch.sampled_BT

    together_BT, sampled_BT = scored(made, share_prefix=True, pack_tokens=256)
    for index in (0, 5, 11):
        (alone_BT, _) = scored(made[index : index + 1])
        np.testing.assert_allclose(alone_BT[0], together_BT[index], atol=1e-5)
        tokens = made[index].sequences[0].tokens
        plain_BT = policy._logprobs(CONFIG, params, jnp.asarray([tokens]), 1.0)
        wanted_T = np.where(sampled_BT[index, : len(tokens)], plain_BT[0], 0.0)
        np.testing.assert_allclose(alone_BT[0, : len(tokens)], wanted_T, atol=1e-5)
        assert not alone_BT[0, len(tokens) :].any()


SAMPLING = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 12, "limit": 50},
]


@pytest.mark.parametrize("settings", SAMPLING, ids=str)
def test_the_trainer_scores_tokens_as_the_sampler_drew_them(params, settings):
    limit = settings.get("limit", 0)
    chosen = {name: value for name, value in settings.items() if name != "limit"}
    engine = Engine(CONFIG, slots=8, max_length=48, limit=limit, prefill_chunk=16)
    engine.set_params(device.sampler_params(CONFIG, params))
    prompts = {sample: [3, 9, 4, 1 + sample % 2] for sample in range(8)}
    for sample, prompt in prompts.items():
        engine.open((0, sample), prompt, 40, noise_key(0, 0, sample), SamplingParams(**chosen))
    made = []
    while engine.busy:
        for turn in engine.step():
            sequence = Sequence()
            sequence.extend(prompts[turn.key[1]])
            sequence.extend(turn.tokens, turn.logprobs, 0)
            made.append(Trajectory(Task("0", []), *turn.key, sequences=[sequence]))
    batch = batch_of(made, share_prefix=True)
    scored_BT = update.make_scorer(CONFIG, **settings)(params, None, batch)
    gap_BT = np.abs(scored_BT - batch.sampler_logprobs_BT)[batch.sampled_BT]
    assert gap_BT.mean() < 1e-5 and gap_BT.max() < 1e-4
    unfiltered_BT = update.make_scorer(CONFIG)(params, None, batch)
    assert np.abs(unfiltered_BT - batch.sampler_logprobs_BT).max() > 0.1


def test_each_sequence_is_scored_with_its_tasks_own_temperature(params, monkeypatch):
    made = trajectories(3, 2, 30, 60)
    for one, own in zip(made, (0.5, 0.0, 2.0, 0.5, 0.0, 2.0), strict=True):
        one.task = Task("0", [], temperature=own)
    batch = batch_of(made, share_prefix=True, pack_tokens=256, temperature=0.7)
    assert batch.temperatures_B.tolist() == pytest.approx([0.5, 0.7, 2.0, 0.5, 0.7, 2.0, 0.7, 0.7])
    assert batch_of(made).temperatures_B is None
    for limit in (update.HEAD_BYTES, 0):  # whole and in chunks
        monkeypatch.setattr(update, "HEAD_BYTES", limit)
        mixed_BT = update.make_scorer(CONFIG, temperature=0.7)(params, None, batch)
        for own in (0.5, 0.7, 2.0):
            rows = np.isclose(batch.temperatures_B, own)
            same = batch._replace(temperatures_B=None)
            alone_BT = update.make_scorer(CONFIG, temperature=own)(params, None, same)
            np.testing.assert_allclose(mixed_BT[rows], alone_BT[rows], atol=1e-5)
    # The update scores the same: against what the sampler drew with, nothing differs.
    drawn = batch._replace(sampler_logprobs_BT=np.asarray(mixed_BT))
    _, metrics = gradient(params, drawn, settings={"temperature": 0.7})
    assert metrics["sampler/logprob_diff_max"] < 1e-5
    _, metrics = gradient(params, drawn._replace(temperatures_B=None))
    assert metrics["sampler/logprob_diff_max"] > 0.1


def test_wrong_log_probabilities_of_the_sampler_are_told(params):
    """The run's main health check: the mean over trained tokens and the largest, nats."""
    made = trajectories(3, 2, 30, 60)
    batch = batch_of(made, share_prefix=True, pack_rows=1)
    right_BT = np.asarray(update.make_scorer(CONFIG)(params, None, batch))
    _, metrics = gradient(params, batch._replace(sampler_logprobs_BT=right_BT))
    assert metrics["sampler/logprob_diff_max"] < 1e-5
    rng = np.random.default_rng(2)
    wrong_BT = np.where(batch.sampled_BT, rng.normal(0, 0.3, right_BT.shape), 50.0)
    wrong = batch._replace(sampler_logprobs_BT=(right_BT + wrong_BT).astype(np.float32))
    assert int(wrong.micro_batches) > 1
    gaps = np.abs(wrong_BT[batch.sampled_BT])
    _, metrics = gradient(params, wrong)
    np.testing.assert_allclose(metrics["sampler/logprob_diff_mean"], gaps.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["sampler/logprob_diff_max"], gaps.max(), rtol=1e-4)
    # After further updates the policy that sampled is the old one, not the current one.
    _, metrics = gradient(params, wrong, old=jnp.asarray(wrong.sampler_logprobs_BT))
    assert metrics["sampler/logprob_diff_max"] == 0.0


def test_adapters_score_as_the_sampler_merges_them(params):
    keys = jax.random.split(jax.random.key(1), 4)
    D, F, rank = CONFIG.width, CONFIG.ffn, 3

    def adapter(one, two, inputs, outputs):
        a = jax.random.normal(one, (CONFIG.layers, inputs, rank)) * 0.3
        return {"a": a, "b": jax.random.normal(two, (CONFIG.layers, rank, outputs)) * 0.3}

    layers = {
        "attention": {"query": adapter(keys[0], keys[1], D, CONFIG.heads * CONFIG.channels)},
        "mlp": {"down": adapter(keys[2], keys[3], F, D)},
    }
    state = TrainState(0, {"layers": layers}, params, ())
    base, adapters = update.weights(state, 0.5)
    merged = params | {"layers": device.merge(params["layers"], adapters["layers"])}
    tokens_BT = jax.random.randint(jax.random.key(2), (2, 20), 0, CONFIG.vocab)
    pack = policy._rows(tokens_BT)
    with_adapters_RM, _ = update.logprobs(CONFIG, base, adapters, pack)
    merged_RM, _ = update.logprobs(CONFIG, merged, None, pack)
    plain_RM, _ = update.logprobs(CONFIG, base, None, pack)
    np.testing.assert_allclose(with_adapters_RM, merged_RM, atol=1e-5)
    assert np.abs(plain_RM - merged_RM).max() > 0.01
    # An update scales them in the same way.
    batch, optimizer = batch_of(trajectories(2, 2, 30, 60)), optax.sgd(0.0)
    drawn_BT = np.asarray(update.make_scorer(CONFIG)(merged, None, batch))
    apply = update.make_update(CONFIG, optimizer, LOSS, lora_scale=0.5)
    step = jnp.zeros((), jnp.int32)
    given = TrainState(step, {"layers": layers}, params, optimizer.init({"layers": layers}))
    given = jax.tree.map(jnp.array, given)  # an update gives its state away
    _, metrics = apply(given, batch._replace(sampler_logprobs_BT=drawn_BT))
    assert metrics["sampler/logprob_diff_max"] < 1e-4


@pytest.mark.parametrize("broken", [np.nan, np.inf, 1e25])
def test_an_update_whose_gradient_is_not_finite_leaves_the_state_as_it_was(params, broken):
    made = trajectories(2, 4, 30, 60)
    good = batch_of(made)
    made[3].advantage = broken  # 1e25: finite, but the squares in Adam's second moment would not be
    bad = batch_of(made)
    optimizer = optim.make_optimizer(lr=1e-2, steps=4, clip=0.0, weight_decay=0.1)
    apply = update.make_update(CONFIG, optimizer, LOSS, limit=CONFIG.vocab)
    place = jax.tree.map(jnp.array, params)
    state = TrainState(jnp.zeros((), jnp.int32), place, {}, optimizer.init(place))
    # The third: moments that are not zero stay too.
    for step, batch in enumerate((bad, good, bad)):
        before = jax.device_get(state)
        state, metrics = apply(state, batch)
        skipped = batch is bad
        assert float(metrics["update/nonfinite_share"]) == skipped
        same = jax.tree.map(np.array_equal, before, jax.device_get(state))
        assert all(jax.tree.leaves(same)) == skipped, step
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))
    assert int(state.step) == 1


def test_equal_rewards_change_nothing(params):
    made = trajectories(2, 2, 30, 60)
    for trajectory in made:
        trajectory.advantage = 0.0
    found, metrics = gradient(params, batch_of(made))
    assert not any(leaf.any() for leaf in jax.tree.leaves(found))
    assert metrics["grad_norm"] == 0.0


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("tied", [True, False])
def test_layers_one_by_one_and_a_head_of_its_own_change_no_gradient(tied, shape):
    config = dataclasses.replace(CONFIG, layers=2, windows=(24, 90), tied=tied)
    params = decoder.init(config, jax.random.key(1))
    mesh = mesh_of(*shape)
    batch = batch_of(trajectories(2, 4, 40, 90), share_prefix=True, pack_rows=4)
    scanned, _ = gradient(params, batch, config=config, mesh=mesh)
    unrolled, _ = gradient(params, batch, config=config, mesh=mesh, unroll=True)
    assert_close(unrolled, scanned)
    assert np.abs(unrolled["embed"]["embedding"]).max() > 1e-3


def test_the_form_of_attention_changes_no_gradient(params):
    batch = batch_of(trajectories(2, 4, 40, 90), share_prefix=True, pack_tokens=512)
    blocked, _ = gradient(params, batch)
    plain, _ = gradient(params, batch, config=dataclasses.replace(CONFIG, attention="plain"))
    assert_close(blocked, plain)


def test_log_likelihoods_and_their_gradients_are_those_of_autodiff():
    rng = np.random.default_rng(5)
    logits = jnp.asarray(rng.normal(size=(4, 50)) * 5).at[:, 40:].set(update.GONE)
    targets = jnp.asarray([0, 7, 39, 3])
    weights = jnp.asarray(rng.normal(size=(2, 4)))

    def plain(logits):
        logprobs = jax.nn.log_softmax(logits)
        entropies = -jnp.sum(jnp.where(logits > update.GONE, jnp.exp(logprobs) * logprobs, 0.0), -1)
        return jnp.take_along_axis(logprobs, targets[:, None], 1)[:, 0], entropies

    def total(form):
        return lambda logits: jnp.sum(jnp.stack(form(logits)) * weights)

    def ours(logits):
        return update.log_likelihood(logits, targets)

    for found, wanted in zip(ours(logits), plain(logits), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(
        jax.grad(total(ours))(logits), jax.grad(total(plain))(logits), atol=1e-5
    )


def test_a_micro_batch_in_chunks_gives_what_it_gives_as_a_whole(params, monkeypatch):
    pack = update.micro_batch(batch_of(trajectories(2, 4, 40, 90)).pack, 0)

    def values(params):
        logprobs, entropies = update.logprobs(CONFIG, params, None, pack)
        return jnp.sum(jnp.sin(1.0 + 3.0 * logprobs)) + jnp.sum(entropies**2)

    whole = jax.value_and_grad(values)(params)
    monkeypatch.setattr(update, "HEAD_BYTES", 0)
    monkeypatch.setattr(update, "HEAD_CHUNK", 48)
    chunked = jax.value_and_grad(values)(params)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, atol=1e-4)), whole, chunked)
    )
