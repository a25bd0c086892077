import cProfile
import dataclasses
import pstats
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of

from rftjax import policy
from rftjax.devices import sharding
from rftjax.devices.compilation import Program
from rftjax.errors import NotFinite
from rftjax.models import decoder, logical_axes
from rftjax.models.decoder import FULL, Config, Rope
from rftjax.models.distribution import GONE, RowSettings, adjust, draw, uniforms
from rftjax.sampler import device
from rftjax.sampler.engine import Engine, noise_key
from rftjax.sampler.pool import Pool, cache_length
from rftjax.types import SamplingParams

CONFIG = Config(
    family="llama",
    vocab=64,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    channels=4,
    ffn=32,
    max_positions=512,
    norm_eps=1e-6,
    rope=Rope(),
    tied=False,
    qkv_bias=True,
    windows=(10, FULL),
    init_std=0.4,
)
LOGICAL = logical_axes(CONFIG)
STOP = 1


@pytest.fixture(scope="module")
def params():
    return decoder.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def weights(params):
    return device.sampler_params(CONFIG, params)


def new_engine(weights, **settings):
    settings = {"slots": 4, "max_length": 120, "prefill_rows": 2, "prefill_chunk": 8} | settings
    engine = Engine(CONFIG, **settings)
    engine.set_params(weights)
    return engine


def finish(engine):
    """Runs until nothing is left to sample; returns the turns by key, each closed."""
    turns = {}
    while engine.busy:
        for turn in engine.step():
            turns[turn.key] = turn
            engine.close(turn.key)
    return turns


def open_all(engine, prompts, budget=10, *, order=None, **sampling):
    """Opens conversation i of draw i // 2 with prompt i, in the given order."""
    for index in order if order is not None else range(len(prompts)):
        key = divmod(index, 2)
        engine.open(key, prompts[index], budget, noise_key(0, *key), SamplingParams(**sampling))


def random_prompts(count, *, low=2, high=30, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 64, rng.integers(low, high)).tolist() for _ in range(count)]


def gaps(params, tokens, sampled, logprobs, temperature=1.0):
    """Differences of the sampler's log-probabilities from one forward pass over the whole sequence."""
    tokens_BT = np.zeros((1, 128), np.int32)
    tokens_BT[0, : len(tokens)] = tokens
    plain_BT = policy._logprobs(CONFIG, params, jnp.asarray(tokens_BT), temperature)
    plain_T = np.asarray(plain_BT)[0, : len(tokens)]
    return np.abs(plain_T - np.asarray(logprobs))[np.asarray(sampled)]


def converse(engine, prompts, turns, *, budget=12, delay=1):
    """Several turns a conversation; the other side answers what follows from the conversation, some steps late."""
    sequences, taken, late = {}, {}, []
    for index, prompt in enumerate(prompts):
        engine.open(
            (index, 0), prompt, budget, noise_key(0, index, 0), SamplingParams(temperature=0.9)
        )
        sequences[index] = ([*prompt], [False] * len(prompt), [0.0] * len(prompt))
        taken[index] = 0

    def take(index, new, logprobs=None):
        for part, values in zip(
            sequences[index],
            (new, [logprobs is not None] * len(new), logprobs or [0.0] * len(new)),
            strict=True,
        ):
            part.extend(values)

    while engine.busy or late:
        ended = engine.step()
        late = [(wait - 1, index) for wait, index in late]
        for turn in ended:
            index = turn.key[0]
            take(index, turn.tokens, turn.logprobs)
            taken[index] += 1
            if taken[index] == turns:
                engine.close(turn.key)
            else:
                late.append((delay, index))
        for _, index in [entry for entry in late if entry[0] <= 0]:
            rng = np.random.default_rng([index, taken[index]])
            answer = rng.integers(2, 64, rng.integers(1, 14)).tolist()
            take(index, answer)
            engine.extend((index, 0), answer, budget)
        late = [entry for entry in late if entry[0] > 0]
    return sequences


def test_cached_decode_agrees_with_one_forward_pass_over_several_turns(params, weights):
    engine = new_engine(weights, slots=3, parked=3, stops=[STOP])
    found = converse(engine, random_prompts(6), turns=3)
    assert engine.counters.copied_rows > 0  # some waited in parked rows
    gap = np.concatenate([gaps(params, *sequence, 0.9) for sequence in found.values()])
    assert len(gap) > 60
    assert gap.mean() < 1e-5 and gap.max() < 1e-4


def fifth(tokens, start):
    """Finds the first token that 5 divides, as a stop string would be found."""
    return next((at + 1 for at in range(start, len(tokens)) if tokens[at] % 5 == 0), 0)


def test_what_was_sampled_behind_a_stop_string_leaves_nothing_behind(params, weights):
    found = {}
    # With a row for each and no delay, the next turn begins while the device samples behind the string.
    for steps, bridge, parked, slots, delay in (
        (1, 0, 6, 3, 1),
        (16, 0, 3, 3, 1),
        (16, 4, 0, 3, 1),
        (8, 0, 0, 6, 0),
    ):
        engine = new_engine(
            weights,
            slots=slots,
            parked=parked,
            stops=[STOP],
            find_stop=fifth,
            dispatch_steps=steps,
            bridge_steps=bridge,
        )
        found[steps, bridge] = converse(engine, random_prompts(6), turns=4, delay=delay)
    first, *others = found.values()
    assert all(
        {i: s[0] for i, s in one.items()} == {i: s[0] for i, s in first.items()} for one in others
    )
    for sequences in found.values():
        gap = np.concatenate([gaps(params, *sequence, 0.9) for sequence in sequences.values()])
        assert len(gap) > 60 and gap.max() < 1e-4


def test_a_conversation_may_have_a_stop_of_its_own_and_tells_what_it_has_so_far(weights):
    def at_five(tokens, start):
        return 5 if len(tokens) >= 5 else 0

    prompts, so_far = random_prompts(2, seed=5), []
    engine = new_engine(weights, dispatch_steps=2)
    engine.open((0, 0), prompts[0], 9, noise_key(0, 0, 0), find_stop=at_five)
    engine.open((1, 0), prompts[1], 9, noise_key(0, 1, 0))
    turns = {}
    while engine.busy:
        found = engine.step()
        turns |= {turn.key: turn for turn in found}
        so_far.append(engine.sampled((1, 0), 1))
    assert [len(turns[index, 0].tokens) for index in (0, 1)] == [5, 9]
    assert turns[0, 0].stopped and not turns[1, 0].stopped
    whole = turns[1, 0].tokens[1:], turns[1, 0].logprobs[1:]
    assert so_far[0] == (whole[0][:1], whole[1][:1]) and so_far[-1] == whole


def test_conversations_of_a_lower_rank_get_slots_first(weights):
    engine = new_engine(weights, slots=1)
    for index, (rank, budget) in enumerate([(2, 9), (1, 3), (1, 5), (0, 1)]):
        key = (index, 0)
        engine.open(key, [2, 3, index + 4], budget, noise_key(0, *key), rank=rank)
    assert [index for index, _ in finish(engine)] == [3, 2, 1, 0]


def test_a_sequence_that_starts_over_draws_noise_of_its_own(weights):
    prompt, sampled = random_prompts(1)[0], []
    for sequence in (0, 1, 0, 2):
        engine = new_engine(weights)
        engine.open((0, 0), prompt, 12, noise_key(0, 0, 3, sequence=sequence))
        sampled.append(finish(engine)[0, 0].tokens)
    assert sampled[0] == sampled[2]
    engine = new_engine(weights)  # nor is it another sample's
    engine.open((0, 0), prompt, 12, noise_key(0, 0, 4))
    sampled.append(finish(engine)[0, 0].tokens)
    assert len({tuple(tokens) for tokens in sampled}) == 4


def test_rows_that_begin_alike_are_those_that_a_comparison_finds():
    pool = Pool(CONFIG, slots=6, parked=0, rows=2, chunk=4)
    rng = np.random.default_rng(3)
    base = rng.integers(0, 3, 40).tolist()
    texts = [base[: rng.integers(1, 40)] + rng.integers(0, 3, 9).tolist() for _ in range(40)]
    held = {}
    for index, text in enumerate(texts):
        prompt, avoid = pool.prompt(text), {index % 6, (index + 1) % 6}
        shared = {}
        for row, other in held.items():
            most = min(len(other), len(text)) - 1
            whole = (n for n in range(0, most + 1, 4) if other[:n] == text[:n])
            shared[row] = max(whole)
        count, near = pool.nearest(prompt, 2, avoid)
        assert count == max(shared.values(), default=0)
        if count:
            best = [row for row, found in shared.items() if found == count]
            assert near == min(best, key=lambda row: (row in avoid, row != 2, row))
        assert pool.origin(prompt) == next((r for r, t in held.items() if t == text), -1)
        pool.hold(index % 6, prompt)
        held[index % 6] = text
    assert {start for held in pool._holds for start in held.starts} == set(pool._starting)


def calls_of(run):
    """Returns how many calls of each function of the sampler `run` makes, and all together."""
    profile = cProfile.Profile()
    profile.runcall(run)
    found = {
        key[2]: value[0]
        for key, value in pstats.Stats(profile).stats.items()
        if "sampler" in key[0]
    }
    return found, pstats.Stats(profile).total_calls


def test_a_long_prompt_is_hashed_once_and_opening_and_closing_are_not_quadratic():
    prompt = [index % CONFIG.vocab for index in range(8000)]

    def run(count):
        engine = Engine(CONFIG, slots=4, max_length=9000)
        for sample in range(count):
            engine.open((0, sample), prompt, 8, noise_key(0, 0, sample))
        for sample in range(count):
            engine.close((0, sample))

    found, few = calls_of(lambda: run(100))
    _, many = calls_of(lambda: run(1000))
    assert found["prompt"] == 1
    assert many < 15 * few


def test_each_token_is_prefilled_once_over_several_turns(weights):
    engine = new_engine(weights, slots=6, stops=[STOP])
    found = converse(engine, random_prompts(6), turns=3)
    # A turn's last sampled token enters with the answer, and an answer's last with the next sampled one.
    new = sum(flags.count(False) for _, flags, _ in found.values())
    assert engine.counters.prefilled_tokens == new - 6
    assert engine.counters.sampled_tokens == sum(
        flags.count(True) for _, flags, _ in found.values()
    )


def test_a_groups_prompt_is_computed_once(params, weights):
    prompt = random_prompts(1, low=25)[0]
    for slots, samples in ((8, 8), (3, 8), (12, 12)):
        engine = new_engine(weights, slots=slots)
        for sample in range(samples):
            engine.open((0, sample), prompt, 6, noise_key(0, 0, sample))
        turns = finish(engine)
        assert engine.counters.prefilled_tokens == len(prompt) - 1
        for turn in turns.values():
            tokens = [*prompt, *turn.tokens]
            sampled = [False] * len(prompt) + [True] * len(turn.tokens)
            logprobs = [0.0] * len(prompt) + turn.logprobs
            assert gaps(params, tokens, sampled, logprobs).max() < 1e-4
        assert len({tuple(turn.tokens) for turn in turns.values()}) == samples


def test_the_order_of_opening_and_the_slot_change_no_bit(weights):
    prompts = random_prompts(10)
    wanted = {}
    for order in (range(10), reversed(range(10)), [3, 9, 0, 1, 7, 2, 8, 6, 4, 5]):
        engine = new_engine(weights, stops=[STOP])
        open_all(engine, prompts, order=order)
        found = finish(engine)
        wanted = wanted or found
        assert found == wanted
    engine = new_engine(weights, stops=[STOP])
    found = {}
    for index in (7, 2, 9, 0, 4, 1, 3, 8, 6, 5):  # one after the other, in an engine long in use
        key = divmod(index, 2)
        engine.open(key, prompts[index], 10, noise_key(0, *key))
        found |= finish(engine)
    assert found == wanted


def test_parking_changes_no_bit(weights):
    prompts = random_prompts(6)
    wanted = None
    for parked, delay, evicted in ((6, 1, False), (3, 2, True), (1, 2, True), (0, 0, False)):
        engine = new_engine(weights, slots=3, parked=parked, stops=[STOP])
        found = converse(engine, prompts, turns=3, delay=delay)
        assert (engine.counters.copied_rows > 0) == (parked > 0)
        assert (engine.counters.evicted_rows > 0) == evicted
        wanted = wanted or found
        assert found == wanted
    alone = {}
    engine = new_engine(weights, slots=3, stops=[STOP])
    for index, prompt in enumerate(prompts):
        engine.open((index, 0), prompt, 12, noise_key(0, index, 0), SamplingParams(temperature=0.9))
        alone[index] = finish(engine)[(index, 0)].tokens
    for index, (tokens, _, _) in wanted.items():
        start = len(prompts[index])
        assert tokens[start : start + len(alone[index])] == alone[index]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 2, 1, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_comes_back_from_the_hosts_memory_as_it_was(params, shape, dtype):
    prompts = random_prompts(12)
    config = dataclasses.replace(CONFIG, dtype=dtype)
    found = []
    for parked in (12, 0):
        mesh = mesh_of(*shape[:3], context=(*shape, 1)[3])
        engine = engine_on(mesh, params, config, slots=4, parked=parked, stops=[STOP])
        found.append(converse(engine, prompts, turns=3, delay=2))
        assert (engine.counters.evicted_rows > 0) == (parked == 0)
    assert found[0] == found[1]


MESHES = [(1, 1, 1), (8, 1, 1), (2, 4, 1), (1, 1, 2), (2, 2, 2), (1, 2, 4)]
PARTS = [(1, 1, 1, 4), (1, 2, 2, 2), (1, 1, 1, 3)]  # with the axis context


def engine_on(mesh, params, config=CONFIG, **settings):
    settings = {"slots": 6, "parked": 6, "max_length": 120, "prefill_chunk": 8} | settings
    engine = Engine(config, mesh=mesh, **settings)
    engine.set_params(
        device.sampler_params(config, sharding.shard_tree(mesh, LOGICAL, params), mesh=mesh)
    )
    return engine


def test_the_calls_of_a_longer_cache_are_compiled_before_it_is_needed(weights):
    engine, asked, late = new_engine(weights, max_length=400), [], []

    def compile_now(programs):
        asked.append(device.cache_length(engine._pool.cache))
        for program in programs:
            program.lower().compile()

    def note(event, _, **facts):
        if event.endswith("backend_compile_duration"):
            longer = asked and device.cache_length(engine._pool.cache) > asked[0]
            late.extend([facts.get("fun_name", "")] if longer else [])

    engine.compile_behind = compile_now
    engine.open((0, 0), [3, 4, 5], 100, noise_key(0, 0, 0))
    finish(engine)
    assert not asked  # no turn needs a longer one
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        engine.open((1, 0), list(range(2, 40)) * 3, 200, noise_key(0, 1, 0))
        engine.open((2, 0), [6, 4, 5], 300, noise_key(0, 2, 0))
        turns = finish(engine)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert asked and len(turns[2, 0].tokens) == 300
    assert asked == [256] and device.cache_length(engine._pool.cache) == 384
    names = ("decode", "grow", "prefill", "copy_rows")
    assert not [name for name in late if any(one in name for one in names)]


@pytest.mark.parametrize("shape", MESHES + PARTS)
def test_devices_share_out_the_rows_and_each_call_compiles_once(params, weights, shape):
    *shape, parts = (*shape, 1)[:4]
    prompts = random_prompts(12)
    prompts[7] = prompts[2]  # a row that another device copies
    expected = converse(new_engine(weights, slots=6, parked=6, stops=[STOP]), prompts, turns=3)
    calls = (device.prefill, device.decode, device.copy_rows)  # the last within and between caches
    before = [call._cache_size() for call in calls]
    engine = engine_on(mesh_of(*shape, context=parts), params, stops=[STOP])
    found = converse(engine, prompts, turns=3)
    compiled = [call._cache_size() - size for call, size in zip(calls, before, strict=True)]
    assert compiled == [1, 1, 2]
    assert engine.slots == -(-6 // (shape[0] * shape[1])) * shape[0] * shape[1]
    assert {key: parts[0] for key, parts in found.items()} == {
        key: parts[0] for key, parts in expected.items()
    }
    gap = np.concatenate([gaps(params, *sequence, 0.9) for sequence in found.values()])
    assert gap.mean() < 1e-5 and gap.max() < 1e-4
    keys = engine._pool.cache[0]["keys"]
    heads = CONFIG.kv_heads // 2 if shape[2] == 2 else CONFIG.kv_heads
    here = engine.slots // (shape[0] * shape[1])
    assert keys.sharding.shard_shape(keys.shape)[:3] == (here, heads, -(-128 // parts))


def test_bfloat16_rows_are_copied_between_devices(params):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    engine = engine_on(mesh_of(2, 2, 2), params, config, slots=4, parked=4)
    open_all(engine, [[5, 6, 7, 8]] * 4)
    assert len(finish(engine)) == 4 and engine.counters.copied_rows == 3


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
@pytest.mark.parametrize("form", ["cudnn", "triton"])
def test_heads_that_devices_share_out_are_decoded_without_a_kernel(form):
    config = dataclasses.replace(CONFIG, attention=form, channels=16)

    def lowered(**sizes):
        mesh = mesh_of(**sizes)
        engine = Engine(config, slots=8, max_length=64, mesh=mesh)
        params = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
        params = sharding.abstract_tree(mesh, LOGICAL, params)
        read = jax.jit(device.sampler_params, static_argnums=0, static_argnames="mesh")
        weights = Program(read, (config, params), {"mesh": mesh}).abstract_output()
        return engine.programs(weights, 8, 8)[0].lower().as_text()

    assert "dot_general" in lowered(data=4, tensor=2)
    with pytest.raises(ValueError, match="interpret mode"):  # a kernel for GPUs, on a CPU
        lowered(data=8)


def test_no_device_computes_or_fetches_the_rows_of_others(params):
    def decode_of(mesh):
        engine = engine_on(mesh, params, slots=32, parked=0)
        rows = device.idle_rows(32, mesh)
        given_B9, stops_E = np.zeros((32, 9), np.int32), np.zeros(16, np.int32)
        bounds_2 = np.array([16, 0], np.int32)
        cache = device.new_cache(CONFIG, 32, 256, mesh)
        return device.decode.lower(
            CONFIG, engine._params, cache, rows, given_B9, stops_E, np.uint32(0), bounds_2,
            steps=16, filtered=False, limit=0, mesh=mesh,
        ).compile()  # fmt: skip

    alone, shared = decode_of(mesh_of(1, 1, 1)), decode_of(mesh_of(4, 2, 1))
    assert shared.cost_analysis()["flops"] < alone.cost_analysis()["flops"] / 6
    text = shared.as_text()
    assert "all-gather" not in text and "all-to-all" not in text and "permute" not in text
    # How many rows are active is all that the devices tell each other.
    assert set(re.findall(r"= (\S+) all-reduce", text)) == {"s32[]"}


def test_rows_reach_the_device_in_one_array_without_losing_a_bit():
    settings = RowSettings(
        np.array([0.7, 0.0], np.float32), np.array([0.95, 1.0], np.float32), np.array([0, 2**30])
    )
    noise_B3 = np.array([[1, 2**31 - 1, 3], [4, 5, 6 + (7 << 16)]])
    rows = device.Rows(np.array([5, 63]), np.array([8, 9]), np.array([-1, 12]), noise_B3, settings)
    found = device.unpack_rows(jnp.asarray(device.pack_rows(rows)))
    jax.tree.map(np.testing.assert_array_equal, found, rows)


@pytest.mark.parametrize("prompt", [[5], [5, 6, 7]])
def test_a_transfer_that_the_code_does_not_ask_for_is_refused_in_a_dispatch(weights, prompt):
    # A prompt of one token is decoded without a prefill.
    engine = new_engine(jax.device_get(weights))
    engine.open((0, 0), prompt, 4, noise_key(0, 0, 0))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        engine.step()


def test_noise_differs_by_seed_stream_draw_and_sample(weights):
    def sampled(noise, seed=0):
        engine = new_engine(weights, seed=seed)
        engine.open((0, 0), [5, 6, 7], 12, noise)
        return tuple(finish(engine)[(0, 0)].tokens)

    noises = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({*map(sampled, noises), sampled((0, 0, 0), seed=1)}) == 5
    assert sampled((0, 0, 0)) == sampled((0, 0, 0))


def test_every_weight_reaches_the_sampler_and_none_is_remembered(params):
    engine = Engine(CONFIG, slots=4, max_length=120, prefill_rows=2, prefill_chunk=8)
    prompts = random_prompts(4)

    def sampled(tree, engine=engine):
        engine.set_params(device.sampler_params(CONFIG, tree))
        open_all(engine, prompts)
        return {key: (turn.tokens, turn.logprobs) for key, turn in finish(engine).items()}

    before = sampled(params)
    leaves, structure = jax.tree.flatten(params)
    for index, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        noise = jax.random.normal(jax.random.key(index), leaf.shape)
        changed = [*leaves[:index], leaf + 0.3 * noise, *leaves[index + 1 :]]
        assert sampled(jax.tree.unflatten(structure, changed)) != before, path
    assert sampled(params) == before
    louder = jax.tree.map(lambda leaf: leaf * 1.2, params)
    fresh = Engine(CONFIG, slots=4, max_length=120, prefill_rows=2, prefill_chunk=8)
    assert sampled(louder) == sampled(louder, fresh)  # nothing of the cache stays either


def test_weights_do_not_change_under_an_open_conversation(weights):
    engine = new_engine(weights)
    engine.open((0, 0), [5, 6], 4, noise_key(0, 0, 0))
    with pytest.raises(ValueError, match="weights cannot change while conversations are open"):
        engine.set_params(weights)


def test_a_turn_ends_with_its_stop_token_or_its_budget(weights):
    stops = list(range(1, 9))
    engine = new_engine(weights, stops=stops)
    open_all(engine, random_prompts(10), budget=7)
    turns = finish(engine)
    for turn in turns.values():
        assert not set(turn.tokens[:-1]) & set(stops)
        assert turn.stopped == (turn.tokens[-1] in stops)
        assert turn.stopped or len(turn.tokens) == 7
        assert len(turn.logprobs) == len(turn.tokens) and max(turn.logprobs) < 0
    assert {turn.stopped for turn in turns.values()} == {True, False}


def test_ids_beyond_the_tokenizer_are_never_sampled(params):
    kernel_DV = params["head"]["kernel"].at[:, 50:].multiply(100.0)
    tree = device.sampler_params(CONFIG, params | {"head": {"kernel": kernel_DV}})
    for settings in ({}, {"temperature": 0.0}, {"top_k": 20, "top_p": 0.9}):
        engine = new_engine(tree, limit=50)
        open_all(engine, random_prompts(6), **settings)
        assert max(max(turn.tokens) for turn in finish(engine).values()) < 50
    engine = new_engine(tree)
    open_all(engine, random_prompts(6))
    assert max(max(turn.tokens) for turn in finish(engine).values()) >= 50


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_logits_that_are_not_numbers_are_an_error(params, temperature):
    broken = params | {"final_norm": {"scale": params["final_norm"]["scale"].at[0].set(jnp.nan)}}
    engine = new_engine(device.sampler_params(CONFIG, broken))
    open_all(engine, random_prompts(2), temperature=temperature)
    with pytest.raises(NotFinite, match="not finite after .* tokens of conversation"):
        finish(engine)


def test_greedy_takes_the_likeliest_token_and_so_does_a_filter_of_one(params, weights):
    prompts = random_prompts(4)
    found = []
    for settings in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}):
        engine = new_engine(weights)
        open_all(engine, prompts, **settings)
        turns = finish(engine)
        assert all(max(map(abs, turn.logprobs)) < 1e-6 for turn in turns.values())
        found.append({key: turn.tokens for key, turn in turns.items()})
    assert found[0] == found[1] == found[2]
    tokens = prompts[0]
    for token in found[0][(0, 0)]:
        logits_BTV = policy._logits(
            CONFIG, params, jnp.asarray([tokens + [0] * (60 - len(tokens))])
        )
        assert int(jnp.argmax(logits_BTV[0, len(tokens) - 1])) == token
        tokens = [*tokens, token]


def test_rows_with_and_without_a_filter_decode_together(weights):
    prompts = random_prompts(2)

    def sampled(*settings):
        engine = new_engine(weights)
        for index, chosen in enumerate(settings):
            engine.open(
                (index, 0), prompts[index], 10, noise_key(0, index, 0), SamplingParams(**chosen)
            )
        turns = finish(engine)
        return [turns[index, 0].tokens for index in range(2)]

    mixed = sampled({"top_k": 1}, {})
    assert mixed == [sampled({"temperature": 0.0}, {})[0], sampled({}, {})[1]]


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [(1.0, 0, 4), (0.45, 0, 1), (0.7, 0, 2), (0.85, 0, 3), (1.0, 3, 3), (0.9, 2, 2), (0.6, 2, 1)],
)
def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_it_among_the_top_k(top_p, top_k, kept):
    probabilities_V = np.asarray([0.05, 0.5, 0.15, 0.3])
    settings = RowSettings(jnp.ones(1), jnp.full(1, top_p), jnp.full(1, top_k))
    logits_BV = jnp.log(jnp.asarray(probabilities_V, jnp.float32))[None]
    adjusted_BV = np.asarray(adjust(logits_BV, settings, filtered=True))
    likeliest = np.argsort(-probabilities_V)[:kept]
    assert set(np.flatnonzero(adjusted_BV[0] > GONE)) == set(likeliest)
    np.testing.assert_array_equal(adjusted_BV[0, likeliest], logits_BV[0, likeliest])


def test_a_dispatch_ends_early_only_while_others_wait(weights):
    def steps_of_first_dispatch(conversations):
        engine = new_engine(weights, slots=8, dispatch_steps=16)
        for index in range(conversations):
            budget = 2 if index in (0, 8) else 20  # the longest start first
            engine.open((index, 0), [5, 6, 7], budget, noise_key(0, index, 0))
        turns = engine.step()
        assert [turn.key for turn in turns] == [(0, 0)]
        return engine.counters.decode_steps

    assert steps_of_first_dispatch(8) == 16
    assert steps_of_first_dispatch(9) == 2


def test_the_next_dispatch_is_under_way_before_the_last_one_is_looked_at(weights):
    engine = new_engine(weights, slots=2, dispatch_steps=4)
    open_all(engine, random_prompts(2), budget=10)
    for _ in range(3):
        assert engine.busy
        engine.step()
        assert (engine._flight is not None) == engine.busy
    assert not engine.busy and engine.counters.decode_steps == 10


@pytest.mark.parametrize("parked", [0, 3])
def test_a_bridge_is_under_way_while_slots_are_refilled_and_changes_no_token(weights, parked):
    prompts = random_prompts(9)
    settings = {"stops": [STOP], "dispatch_steps": 8, "parked": parked}
    expected = converse(new_engine(weights, slots=3, **settings), prompts, turns=3)
    engine = new_engine(weights, slots=3, bridge_steps=2, **settings)
    assert converse(engine, prompts, turns=3) == expected

    engine = new_engine(weights, slots=3, bridge_steps=2, **settings)
    open_all(engine, prompts, budget=20)
    flights = []
    while engine._queue or not flights:
        for turn in engine.step():
            engine.close(turn.key)
        assert engine._flight is not None  # the device goes on while the host looks
        flights.append(engine._flight.most)
    assert flights[:3] == [2, 8, 2]


@pytest.mark.parametrize("bridge", [0, 1])
@pytest.mark.parametrize("steps", [3, 16])
def test_a_conversation_closed_while_it_samples_leaves_nothing_behind(weights, steps, bridge):
    prompts = random_prompts(4)
    alone = new_engine(weights, dispatch_steps=steps)
    open_all(alone, prompts, budget=30)
    expected = finish(alone)
    engine = new_engine(weights, slots=2, dispatch_steps=steps, bridge_steps=bridge)
    noise = [noise_key(0, *divmod(index, 2)) for index in range(4)]
    for index in (0, 1):
        engine.open(divmod(index, 2), prompts[index], 60, noise[index])
    engine.step()
    engine.close((0, 0))
    engine.step()  # its row stays idle
    engine.open((1, 0), prompts[2], 30, noise[2])  # takes it over
    engine.step()
    engine.close((0, 1))
    for index in (0, 1, 3):  # two under keys of closed ones
        engine.open(divmod(index, 2), prompts[index], 30, noise[index])
    found = finish(engine)
    assert {key: turn.tokens for key, turn in found.items()} == {
        key: turn.tokens for key, turn in expected.items()
    }


def test_no_step_is_decoded_for_a_closed_conversation_alone(weights):
    engine = new_engine(weights, slots=2, dispatch_steps=4)
    for index, budget in enumerate((60, 10)):
        engine.open((index, 0), [5, 6, 7], budget, noise_key(0, index, 0))
    engine.step()
    engine.close((0, 0))
    finish(engine)
    assert engine.counters.decode_steps == 10


def test_a_conversation_outgrows_its_first_cache(params, weights):
    engine = new_engine(weights, max_length=200)
    prompt = random_prompts(1, low=100, high=101)[0]
    engine.open((0, 0), prompt, 20, noise_key(0, 0, 0))
    tokens, logprobs = list(prompt), [0.0] * 100
    for answer in (30, 5):
        (turn,) = _until(engine)
        tokens += turn.tokens + [7] * answer
        logprobs += turn.logprobs + [0.0] * answer
        engine.extend((0, 0), [7] * answer, 20)
    tokens_BT = jnp.asarray([tokens])
    plain_T = np.asarray(policy._logprobs(CONFIG, params, tokens_BT, 1.0))[0]
    chosen = np.asarray(logprobs) != 0
    assert chosen.sum() == 40 and np.abs(plain_T - np.asarray(logprobs))[chosen].max() < 1e-4


def test_two_long_dispatches_in_the_air_fit_into_the_cache(params, weights):
    engine = new_engine(weights, max_length=320, dispatch_steps=100)
    prompt = random_prompts(1, low=100, high=101)[0]
    engine.open((0, 0), prompt, 210, noise_key(0, 0, 0))
    (turn,) = _until(engine)
    tokens_BT = jnp.asarray([prompt + turn.tokens])
    plain_T = np.asarray(policy._logprobs(CONFIG, params, tokens_BT, 1.0))[0, 100:]
    assert len(turn.tokens) == 210
    assert np.abs(plain_T - np.asarray(turn.logprobs)).max() < 1e-4


def _until(engine):
    turns = []
    while not turns:
        turns = engine.step()
    return turns


def test_a_turn_that_does_not_fit_is_refused(weights):
    engine = new_engine(weights)
    with pytest.raises(
        ValueError, match="rollout.max_length=120: a turn of up to 100 tokens after 21"
    ):
        engine.open((0, 0), [5] * 21, 100, noise_key(0, 0, 0))
    with pytest.raises(ValueError, match="sampler.stop: 17 stop tokens, at most 16"):
        new_engine(weights, stops=range(17))


@pytest.mark.parametrize("index", [-1, CONFIG.vocab])
def test_a_token_without_a_row_in_the_embedding_is_refused(weights, index):
    engine = new_engine(weights)
    with pytest.raises(ValueError, match=f"token id {index}, .*vocab_size={CONFIG.vocab}"):
        engine.open((0, 0), [5, index, 6], 4, noise_key(0, 0, 0))
    engine.open((0, 0), [5, 6], 1, noise_key(0, 0, 0))
    _until(engine)
    with pytest.raises(ValueError, match=f"token id {index}, .*vocab_size={CONFIG.vocab}"):
        engine.extend((0, 0), [index], 1)


def test_cache_lengths_are_few_and_at_most_an_eighth_too_long():
    lengths = [cache_length(tokens) for tokens in range(1, 5000)]
    assert all(tokens <= length for tokens, length in enumerate(lengths, start=1))
    assert all(
        length - tokens < max(128, tokens / 8) for tokens, length in enumerate(lengths, start=1)
    )
    assert len(set(lengths)) < 27


@pytest.mark.parametrize("find_stop", [None, lambda tokens, start: 9 if len(tokens) >= 9 else 0])
def test_a_turn_that_goes_on_is_the_turn_in_one_piece(weights, find_stop):
    """With a stop string that is known from all of the turn."""
    prompt, key = random_prompts(1)[0], (0, 0)
    engine = new_engine(weights, find_stop=find_stop)
    engine.open(key, prompt, 14, noise_key(0, 0, 0))
    whole = finish(engine)[key]
    assert len(whole.tokens) == (9 if find_stop else 14)
    engine = new_engine(weights, find_stop=find_stop, dispatch_steps=2)
    engine.open(key, prompt, 14, noise_key(0, 0, 0))
    engine.step()
    assert not engine.settle() and engine.settle() == []  # nothing is in flight any more
    tokens, logprobs = engine.sampled(key)
    assert len(tokens) == 4  # of two dispatches
    engine.close(key)
    engine.set_params(weights)
    again = prompt + tokens, 14 - len(tokens), noise_key(0, 0, 0)
    engine.open(key, *again, turn=(tokens, logprobs))
    turn = finish(engine)[key]
    assert turn.tokens == whole.tokens and turn.stopped == whole.stopped
    assert turn.logprobs == pytest.approx(whole.logprobs, abs=1e-5)


def test_a_draw_inverts_the_running_sum():
    probabilities = np.zeros(300)
    probabilities[[3, 130, 131, 290]] = [0.25, 0.25, 0.4, 0.1]
    with np.errstate(divide="ignore"):
        logits_V = np.maximum(np.log(probabilities), -1e30)
    uniform_B = np.asarray([0.0, 0.2, 0.26, 0.49, 0.51, 0.89, 0.91, 1 - 2**-24], np.float32)
    logits_BV = jnp.asarray(np.tile(logits_V, (8, 1)), jnp.float32)
    ids_B, logprobs_B = draw(logits_BV, jnp.asarray(uniform_B), jnp.ones(8))
    assert ids_B.tolist() == [3, 3, 130, 130, 131, 131, 290, 290]
    np.testing.assert_allclose(logprobs_B, np.log(probabilities[np.asarray(ids_B)]), atol=1e-6)


def test_draws_have_the_distributions_frequencies():
    logits_V = jnp.asarray([0.0, 1.0, -1.0, 2.0])
    noise_B3 = jnp.asarray([(0, d, s) for d in range(100) for s in range(40)], jnp.int32)
    uniform_B = uniforms(7, noise_B3, jnp.full(4000, 5))
    assert len(np.unique(uniform_B)) > 3990 and uniform_B.min() >= 0 and uniform_B.max() < 1
    ids_B, _ = draw(jnp.tile(logits_V[None], (4000, 1)), uniform_B, jnp.ones(4000))
    shares = np.bincount(ids_B, minlength=4) / 4000
    np.testing.assert_allclose(shares, jax.nn.softmax(logits_V), atol=0.025)
