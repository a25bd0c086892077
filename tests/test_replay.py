"""Experts that the sampler chose, from its cache into the update."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import seeded
import snippets
from meshes import mesh_of
from test_partial import Sampling
from test_rollout import CONFIG, ambiguous_tokenizer
from test_train import late_compilations

from rftjax import grpo, modes, policy
from rftjax.config.flags import load_spec
from rftjax.devices import sharding
from rftjax.errors import UserError
from rftjax.learning import update
from rftjax.learning.batching import make_batch
from rftjax.models import cache_leaves, decoder, experts, logical_axes
from rftjax.models.config import Config, Routing, Stack
from rftjax.run import checks
from rftjax.run.build import complete_config
from rftjax.sampler import device
from rftjax.sampler.engine import Engine, noise_key
from rftjax.scoring import Scorer
from rftjax.types import SamplingParams, Score, Sequence, Task, TrainState, Trajectory
from rftjax.weights import hf

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3")
SLOW = pytest.mark.skipif(not snippets.SLOW, reason=snippets.WHY)
PLAIN_OR_SLOW = ["plain", *(pytest.param(name, marks=SLOW) for name in FAMILIES)]
SAID = [7, 8, 9]  # by the environment, between two turns
NEW, MOST = 6, 64
# For meshes, where every kind of layer costs a compilation: two layers of one kind.
PLAIN = dataclasses.replace(
    CONFIG, family="qwen3_moe", vocab=48, layers=2, heads=4, kv_heads=2,
    routing=Routing(experts=8, chosen=2, ffn=16), split=(Stack("layers", 0, 2, True),),
)  # fmt: skip


@functools.cache
def model(name: str, folder: Path) -> tuple[Config, Any, dict[tuple[int, int], Sequence]]:
    if name == "plain":
        config, params = PLAIN, decoder.init(PLAIN, jax.random.key(0))
    else:
        config, params, _ = hf.load(seeded.checkpoint(folder / name, name))
    return config, params, converse(config, params, slots=2, parked=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Config, weights and what was sampled from them, by the name of a family, or "plain"."""
    return functools.partial(model, folder=tmp_path_factory.mktemp("models"))


def converse(
    config: Config, params: Any, mesh: Any = None, **rows: int
) -> dict[tuple[int, int], Sequence]:
    """Samples two turns of each of two samples a prompt; the environment answers when nobody samples."""
    engine = Engine(config.recording(), max_length=MOST, prefill_chunk=4, mesh=mesh, **rows)
    engine.set_params(device.sampler_params(config, params, mesh=mesh))
    found: dict[tuple[int, int], Sequence] = {}
    for draw, row in enumerate(seeded.tokens("prompts")):
        for sample in range(2):
            key, prompt = (draw, sample), row[: 9 + 2 * draw].tolist()
            found[key] = Sequence()
            found[key].extend(prompt)
            engine.open(key, prompt, NEW, noise_key(0, *key), SamplingParams(NEW))
    left = dict.fromkeys(found, 1)
    while left:
        ended = []
        while engine.busy:
            ended += engine.step()
        for turn in ended:
            found[turn.key].extend(turn.tokens, turn.logprobs, 0)
            found[turn.key].experts = turn.experts
            if not left[turn.key]:
                engine.close(turn.key)
                del left[turn.key]
                continue
            left[turn.key] -= 1
            found[turn.key].extend(SAID)
            engine.extend(turn.key, SAID, NEW)
    if rows.get("parked"):
        assert engine.counters.evicted_rows and engine.counters.copied_rows
    return found


def routed(config: Config, params: Any, tokens: list[int]) -> np.ndarray:
    """Which experts one forward pass chooses, (tokens, L, U)."""
    tokens_BT = jnp.asarray([tokens + [0] * (MOST - len(tokens))])  # one length, one compilation
    ones_BT, steps_BT = jnp.ones_like(tokens_BT), jnp.arange(MOST)[None]
    _, told = _walk(config, params, tokens_BT, steps_BT, ones_BT, 0 * ones_BT)
    chosen = np.concatenate([one["chosen"][0] for one in told])
    return chosen[:, 0, : len(tokens)].swapaxes(0, 1)


_walk = jax.jit(decoder.walk, static_argnums=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_brings_the_experts_of_all_tokens_but_its_last(models: Any, name: str):
    """Through prompts that are shared, rows that wait, in the cache and in the host's memory, and later prefills."""
    config, params, sampled = models(name)
    for key, sequence in sampled.items():
        found, count = np.asarray(sequence.experts), len(sequence.tokens)
        layers, chosen, dtype = config.choices
        assert found.shape == (count - 1, layers, chosen) and found.dtype == dtype
        expected = routed(config, params, sequence.tokens)[:-1]
        np.testing.assert_array_equal(found, expected, err_msg=str(key))


@pytest.mark.parametrize("name", PLAIN_OR_SLOW)
@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ({"data": 2, "expert": 2, "tensor": 2}, {"slots": 4}),
        ({"expert": 2, "context": 2, "tensor": 2}, {"slots": 4}),
        ({"context": 4}, {"slots": 2, "parked": 1}),  # whose rows go to the host's memory and back
    ],
)
def test_each_device_records_its_own_rows_and_positions(
    models: Any, name: str, sizes: dict[str, int], rows: dict[str, int]
):
    config, params, alone = models(name)
    mesh = mesh_of(**sizes)
    placed = sharding.shard_tree(mesh, logical_axes(config), params)
    shared = converse(config, placed, mesh, **rows)
    for key, one in alone.items():
        assert one.tokens == shared[key].tokens
        np.testing.assert_array_equal(one.experts, shared[key].experts)


def test_without_replay_the_cache_and_the_batch_hold_no_experts(models: Any):
    config, *_ = models("qwen3_moe")
    names = {leaf.name for leaves in cache_leaves(config) for leaf in leaves}
    assert names == {"keys", "values"}
    assert make_batch([], rows=2, max_length=8, pack_tokens=8).pack.experts_RXLU is None
    dense = Routing()
    assert dataclasses.replace(config, routing=dense).choices[1:] == (0, "int8")
    assert Routing(experts=129, chosen=2).dtype == "int16"


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalised", [True, False])
def test_replayed_experts_are_weighted_by_the_scores_of_the_day(scoring: str, normalised: bool):
    rng = np.random.default_rng(0)
    routing = Routing(experts=8, chosen=3, scoring=scoring, normalised=normalised, corrected=True,
                      groups=2, open_groups=1, scale=1.5)  # fmt: skip
    logits_TE = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)
    correction_E = jnp.asarray(rng.normal(size=8), jnp.float32)
    replayed_TU = jnp.asarray([[0, 4, 7]] * 4 + [[-1, -1, -1]])  # of both groups

    def weights(logits_TE: jax.Array) -> jax.Array:
        return experts.route(routing, logits_TE, correction_E, replayed_TU)[1]

    def plain(logits_TE: jax.Array) -> jax.Array:
        score = jax.nn.sigmoid if scoring == "sigmoid" else jax.nn.softmax
        own_TU = experts.route(routing, logits_TE, correction_E)[0]
        chosen_TU = jnp.concatenate([replayed_TU[:4], own_TU[4:]])
        picked_TU = jnp.take_along_axis(score(logits_TE), chosen_TU, axis=1)
        total_T1 = jnp.sum(picked_TU, axis=1, keepdims=True)
        return 1.5 * (picked_TU / total_T1 if normalised else picked_TU)

    assert (experts.route(routing, logits_TE, correction_E)[0][:4] != replayed_TU[:4]).any()
    chosen_TU = experts.route(routing, logits_TE, correction_E, replayed_TU)[0]
    np.testing.assert_array_equal(chosen_TU[:4], replayed_TU[:4])
    np.testing.assert_allclose(weights(logits_TE), plain(logits_TE), rtol=1e-5)
    cotangent_TU = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    found, expected = (jax.vjp(f, logits_TE)[1](cotangent_TU)[0] for f in (weights, plain))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-6)


def trajectories(sampled: dict[tuple[int, int], Sequence]) -> list[Trajectory]:
    return [
        Trajectory(Task(str(draw), []), draw, sample, sequences=[sequence],
                   score=Score(0.0), advantage=1.0 - 2.0 * sample)
        for (draw, sample), sequence in sampled.items()
    ]  # fmt: skip


def perturbed(params: Any) -> Any:
    """Weights whose routers are other ones."""
    rng = np.random.default_rng(1)

    def one(path: tuple, leaf: Any) -> Any:
        noise = rng.normal(size=leaf.shape) if path[-2:][0].key == "router" else 0.0
        return jnp.asarray(leaf + noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(one, params)


@pytest.mark.parametrize(("name", "unroll"), [("qwen3_moe", False), ("deepseek_v3", True)])
def test_an_update_computes_with_the_experts_of_the_sampler_whatever_its_own_router_says(
    models: Any, name: str, unroll: bool
):
    config, params, sampled = models(name)
    other = perturbed(params)
    made = trajectories(sampled)[:4]
    shape = {"rows": 4, "max_length": 64, "pack_tokens": 64, "pack_rows": 1}
    batch = make_batch(made, **shape, experts=config.choices)
    pack = jax.tree.map(lambda leaf: leaf[0], batch.pack)
    tree = decoder.unroll(config, other) if unroll else other

    @functools.partial(jax.jit, static_argnums=0)
    def run(config: Config, tree: Any, pack: Any) -> Any:
        packed = pack.tokens_RX, pack.positions_RX, pack.groups_RX, pack.segments_RX
        return decoder.walk(config, tree, *packed, pack.experts_RXLU)[1]

    own, replayed = (
        np.concatenate([one["chosen"][0] for one in run(config, tree, given)])
        for given in (pack._replace(experts_RXLU=None), pack)
    )
    expected = np.moveaxis(pack.experts_RXLU, 2, 0)
    known = expected >= 0
    assert known.mean() > 0.5
    assert (own[known] != expected[known]).mean() > 0.3
    np.testing.assert_array_equal(replayed[known], expected[known])
    # Behind the first layer of experts the inputs differ, so that there only the first one's own choice is known.
    if config.choices[0] == 1:
        told = jax.jit(update.scores, static_argnums=0)(config, tree, None, pack)[2]
        changed = (own[0, :, :, None] != replayed[0, ..., None]).all(-1).sum(-1)
        share = changed[pack.groups_RX > 0].mean() / config.routing.chosen
        assert told["experts/replay_changed_share"] == pytest.approx(share, abs=1e-6)
        assert share > 0.2


def two_updates(
    config: Config, params: Any, made: list[Trajectory], mesh: Any
) -> tuple[Any, dict[str, float]]:
    axes = logical_axes(config)
    placed = sharding.shard_tree(mesh, axes, jax.tree.map(jnp.array, params))
    optimizer = optax.sgd(0.3)
    state = TrainState(
        sharding.shard_tree(mesh, axes, jnp.zeros((), jnp.int32)),
        placed,
        {},
        sharding.shard_tree(mesh, axes, optimizer.init(placed)),
    )
    apply = update.make_update(
        config,
        optimizer,
        grpo.LossSettings.of(grpo.preset_fields("grpo")),
        shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
        mesh=mesh,
    )
    shape = {"rows": 8, "max_length": 64, "pack_tokens": 64, "pack_rows": 8}
    batch = make_batch(made, **shape, experts=config.choices)
    for _ in range(2):
        state, metrics = apply(state, sharding.put_batch(mesh, batch))
    return jax.device_get(state.trainable), {name: float(one) for name, one in metrics.items()}


@pytest.mark.parametrize("name", PLAIN_OR_SLOW)
def test_updates_with_replay_are_the_same_on_one_device_and_on_eight(models: Any, name: str):
    config, params, sampled = models(name)
    other, made = perturbed(params), trajectories(sampled)
    alone, told = two_updates(config, other, made, mesh_of())
    assert told["experts/replay_changed_share"] > 0.2
    for sizes in ({"data": 2, "tensor": 2}, {"context": 2, "tensor": 2}, {"context": 4}):
        shared, told_shared = two_updates(config, other, made, mesh_of(expert=2, **sizes))
        for metric, one in told.items():
            assert told_shared[metric] == pytest.approx(one, abs=1e-4, rel=1e-4), (sizes, metric)
        for one, two in zip(jax.tree.leaves(alone), jax.tree.leaves(shared), strict=True):
            atol = 2e-5 if name == "plain" else 6e-5  # gpt_oss without context too
            np.testing.assert_allclose(one, two, atol=atol, err_msg=str(sizes))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), alone, other)
    stack = next(stack.name for stack in config.stacks if stack.sparse)
    assert moved[stack]["mlp"]["router"]["weight"] > 1e-5  # the routers learn


def test_each_device_of_a_context_gets_the_experts_of_its_tokens_and_none_for_what_fills_a_row():
    made = make_batch([], rows=4, max_length=60, pack_tokens=60, pack_rows=2, pack_unit=8,
                      experts=(3, 2, "int8"))  # fmt: skip
    pack = sharding.put_batch(mesh_of(fsdp=2, context=4), made).pack
    assert pack.experts_RXLU.shape == (2, 2, 64, 3, 2)
    assert pack.experts_RXLU.sharding.shard_shape(pack.experts_RXLU.shape) == (2, 1, 16, 3, 2)
    assert (np.asarray(pack.experts_RXLU) == -1).all()


@pytest.mark.parametrize("share_prefix", [True, False])
def test_every_packed_token_has_the_experts_of_its_sequence_and_padding_none(share_prefix: bool):
    made, known = [], {}
    for draw in range(3):
        prompt = [10 * draw + at for at in range(1, 6)]
        for sample in range(3):
            sequence = Sequence()
            sequence.extend(list(prompt))
            sequence.extend([40 + 10 * sample + draw] * (2 + sample), [-1.0] * (2 + sample), 0)
            # A number of the token and its place, so that equal prompts have equal ones.
            numbers = [17 * token + at for at, token in enumerate(sequence.tokens)]
            whole = np.asarray(numbers)[:, None, None] + np.arange(6).reshape(1, 3, 2)
            whole = (whole % 500).astype(np.int16)
            sequence.experts = whole[:-1] if sample else None
            known[draw, sample] = whole
            made.append(
                Trajectory(Task("", []), draw, sample, sequences=[sequence], score=Score(0.0), advantage=1.0)
            )  # fmt: skip
    made = made[::-1]  # those without a record come last
    batch = make_batch(made, rows=9, max_length=16, pack_tokens=32, pack_rows=2,
                       share_prefix=share_prefix, experts=(3, 2, "int16"))  # fmt: skip
    pack = batch.pack
    assert pack.experts_RXLU.shape == (*pack.tokens_RX.shape, 3, 2)
    assert (pack.experts_RXLU[pack.groups_RX == 0] == -1).all()
    seen = 0
    for at in np.argwhere(pack.groups_RX > 0):
        token, position = pack.tokens_RX[tuple(at)], int(pack.positions_RX[tuple(at)])
        found = pack.experts_RXLU[tuple(at)]
        if (found >= 0).all():
            seen += 1
            expected = 17 * token + position + np.arange(6).reshape(3, 2)
            np.testing.assert_array_equal(found, expected % 500)
        else:
            assert (found == -1).all()
    # Of each draw: the prompt once or twice, and all sampled tokens but the last of two samples.
    assert seen == 3 * ((5 if share_prefix else 10) + 2 + 3)


def test_what_travels_holds_the_experts_and_an_evaluator_gets_none(models: Any, tmp_path: Path):
    made = trajectories(models("qwen3_moe")[2])
    expected = [np.array(one.sequences[0].experts) for one in made]
    for sent in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        for one, array in zip(sent, expected, strict=True):
            assert type(one.sequences[0].experts) is np.ndarray
            np.testing.assert_array_equal(one.sequences[0].experts, array)
    (tmp_path / "judge.py").write_text(
        "def evaluate(task, trajectory):\n"
        "    return float(trajectory.sequences[0].experts is None and len(trajectory.sequences[0].tokens))\n"
    )
    with Scorer(f"{tmp_path / 'judge.py'}:evaluate", workers=1, timeout_s=120.0) as scorer:
        scores = scorer.gather(made)
    assert [score.reward for score in scores] == [len(one.sequences[0].tokens) for one in made]
    assert all(one.sequences[0].experts is not None for one in made)


def test_answers_that_go_on_have_the_experts_of_the_weights_that_sampled_their_last_token(
    tmp_path: Path,
):
    """Those that ended in an earlier step as well, in a resumed run too."""
    routing = Routing(experts=8, chosen=2, ffn=16)
    config = dataclasses.replace(
        CONFIG, family="qwen3_moe", routing=routing, split=(Stack("layers", 0, 1, True),)
    )
    trees = [decoder.init(config, jax.random.key(seed)) for seed in range(2)]
    weights = [device.sampler_params(config, tree) for tree in trees]
    tokenizer = ambiguous_tokenizer(tmp_path / "tokenizer")
    sampling, apart = Sampling(weights, tokenizer, config=config.recording()), 0
    for step in range(5):
        if step == 2:
            stored = json.loads(json.dumps(sampling.partial.position()))
            ended = [one["ended"] for one in stored["carried"]["turns"] if one["experts"]]
            assert ended and all(ended)
            sampling = Sampling(weights, tokenizer, config=config.recording())
            sampling.partial.restore(stored)
        for one in sampling.take(step):
            (sequence,) = one.sequences
            version, found = sequence.policy_version[-1], np.asarray(sequence.experts)
            apart += version < step
            assert len(found) == len(sequence.tokens) - 1
            expected = routed(config, trees[version % 2], sequence.tokens)[:-1]
            np.testing.assert_array_equal(found, expected)
    assert apart


@pytest.fixture
def job(tmp_path: Path) -> Any:
    """A job of random experts in float32, on all devices."""
    (tmp_path / "judge.py").write_text(
        "def evaluate(task, trajectory):\n    return len(set(trajectory.completion)) / 10\n"
    )
    spec = load_spec(str(EXPERIMENTS / "qwen3_moe.py:full,debug"))
    spec.evaluator = f"{tmp_path / 'judge.py'}:evaluate"
    spec.scoring.workers, spec.scoring.timeout_s = 1, 120.0
    spec.eval.every, spec.export, spec.batch.group_size = 0, False, 2
    spec.sampler.max_new_tokens, spec.sampler.slots = 4, 8
    spec.grpo.routing_replay = True
    return spec


def test_a_job_replays_what_it_sampled_and_compiles_nothing_in_its_steps(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with late_compilations(monkeypatch) as late:
        modes.run("train", job, {}, tmp_path / "run", 0)
    assert not late
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        # The weights are the sampler's, so that a choice differs only where a record is a wrong one.
        assert line["experts/replay_changed_share"] == 0
        assert line["sampler/logprob_diff_max"] < 1e-4
    rollouts = (tmp_path / "run/rollouts/step_000001.jsonl").read_text()
    assert "experts" not in json.loads(rollouts.splitlines()[0])["sequences"][0]


def test_a_dense_model_has_nothing_to_replay(job: Any, tiny_dir: Path):
    config = complete_config(job)
    config.model.path = str(tiny_dir)
    dense = policy.load(str(tiny_dir), init="random", lazy=True)
    with pytest.raises(UserError, match=r"grpo.routing_replay=True: .* is a dense model"):
        checks.check_replay(config, dense)
    config.grpo.routing_replay = False
    checks.check_replay(config, dense)
