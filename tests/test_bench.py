"""The benchmarks run at the smallest size; no time is asserted."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rftjax.models import decoder
from rftjax.weights import hf

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "scripts" / "bench"
MODEL = f"--model={ROOT / 'tests' / 'data' / 'tiny'}"
SMALL = ("--prompts=2", "--group=2", "--prompt_tokens=6", "--new_tokens=5")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a benchmark in this process as its command line does; returns what its last line says."""
    monkeypatch.syspath_prepend(BENCH)

    def run(name: str, *flags: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *flags])
        runpy.run_path(str(BENCH / f"{name}.py"), run_name="__main__")
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.syspath_prepend(BENCH)
    import arithmetic
    import workload

    return arithmetic, workload


def test_a_whole_step_is_measured_and_compiles_in_its_first_step_only(bench):
    said = bench("step", MODEL, *SMALL, "--slots=4", "--steps=3")
    assert {"s_per_step", "sample_s", "update_s", "peak_bytes", "versions", "device"} <= set(said)
    assert len(said["steps_s"]) == 3
    assert said["programs"] > 0 and said["programs_after_first_step"] == 0
    assert 0 <= said["logprob_diff_max"] < 1e-4
    assert said["versions"]["jax"] == jax.__version__
    assert said["settings"]["new_tokens"] == 5


def test_the_growth_of_a_step_has_a_process_and_a_floor_for_each_point(bench, parts, monkeypatch):
    arithmetic, _ = parts
    monkeypatch.setattr(arithmetic, "matmul_peak", lambda dtype, size: 1e9)
    flags = ("--prompts=1", "--group=2", "--slots=2", "--steps=1")
    said = bench("growth", MODEL, *flags, "--update_only", "--points=turns")["points"]["turns"]
    assert said["row_tokens"] == 64 * -(-(64 + 2 * 4 * 164) // 64) and said["rows"] == 1
    assert said["floor_s"]["update"] == pytest.approx(said["operations"]["update"] / 1e9)
    assert said["peak_bytes"] > 0 and "sample_s" not in said


def test_a_decode_step_stands_beside_its_floor(bench, parts):
    said = bench(
        "decode", MODEL, "--points=4x40,2x200", "--steps=2", "--rounds=2", "--read_mebibytes=1"
    )
    assert said["4x40"]["cache_length"] == 128 and said["2x200"]["cache_length"] == 256
    config, params, _ = hf.load(str(ROOT / "tests" / "data" / "tiny"))
    arithmetic, _ = parts
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for name, rows, cached in (("4x40", 4, 40), ("2x200", 2, 200)):
        total = arithmetic.decode_bytes(config, rows=rows, cached=cached)
        assert said[name]["bytes"] == {"weights": weights, "cache": total - weights}
        for clock in ("wall", "cpu"):
            found = said[name][clock]
            assert len(found["ratios"]) == 2 and min(found["ratios"]) > 0
            assert set(found["floor_s"]) == {"weights", "cache", "products"}


def test_lognormal_lengths_up_to_4096_take_at_most_1_15_times_the_bound_of_decode_steps(bench):
    flags = ("--answers=128", "--slots=16", "--shared=0.8", "--partial_steps=2", "--seed=1")
    found = bench("host", MODEL, "--forms=tails", *flags)["tails"]["shared_0.8"]
    over = {name: one["over_bound"] for name, one in found.items()}
    assert over["by_earlier_lengths"] <= 1.15 < over["in_order"]
    assert over["partial"] <= 1.15


def test_the_hosts_part_of_a_step_is_told_beside_the_devices(bench):
    flags = ("--conversations=32", "--turns=2", "--turn_tokens=4", "--environment_tokens=6")
    said = bench(
        "host",
        MODEL,
        "--forms=step",
        *flags,
        "--prompt_tokens=9",
        "--slots=8",
        "--s_per_decode_step=0.1",
    )
    assert said["device_s"] == pytest.approx(0.1 * said["step"]["decode_steps"])
    assert said["share"] == pytest.approx(
        said["step"]["host_s"] / (said["step"]["host_s"] + said["device_s"]), rel=1e-4
    )
    assert said["longer"]["tokens"] > 3 * said["fewer"]["tokens"]


def test_a_device_is_busy_while_environments_are_waited_for(bench):
    flags = ("--conversations=8", "--group=4", "--slots=4", "--turns=2", "--turn_tokens=4")
    times = ("--longest_s=0.02", "--s_per_decode_step=0.001", "--workers=1")
    said = bench("waiting", MODEL, *flags, *times, "--prompt_tokens=9")["waiting"]
    assert 0.001 * said["decode_steps"] < said["busy_s"] < said["wall_s"]
    assert said["busy_share"] == pytest.approx(said["busy_s"] / said["wall_s"], rel=1e-4)
    assert said["rows_share"] == pytest.approx(64 / (4 * said["decode_steps"]), rel=1e-4)


def test_the_forms_of_sampling_count_steps_and_tokens(bench):
    flags = ("--slots=4", "--requests=8", "--shortest=2", "--longest=8", "--median_tokens=4")
    turns = ("--turn_tokens=3", "--environment_tokens=7", "--wait_dispatches=2")
    said = bench("sample", MODEL, *SMALL, *flags, *turns, "--copy_mebibytes=1", "--prompts=4")
    fixed, mixed, turned = said["fixed"], said["mixed"], said["turns"]
    assert fixed["bandwidth_share"] == pytest.approx(
        fixed["floor_s_per_decode_step"] / fixed["s_per_decode_step"], rel=1e-4
    )
    assert mixed["lower_bound_steps"] == max(-(-mixed["tokens"] // 4), mixed["longest"])
    assert mixed["lower_bound_steps"] <= mixed["steps_longest_first"] <= mixed["decode_steps"]
    assert mixed["decode_steps"] <= mixed["steps_without_refilling"]
    assert turned["new_tokens"] == 4 * 5 + 4 * 2 * 3 * 7
    assert turned["prefilled_over_new"] == 1.0 and turned["copied_rows"] > 0
    assert turned["sampled_tokens"] == 4 * 2 * 4 * 3


def test_packed_and_unpacked_updates_do_the_same_work(bench):
    said = bench("update", MODEL, *SMALL, "--steps=2", "--peak_size=64")
    packed, unpacked = said["packed"], said["unpacked"]
    assert packed["tokens_in_use"] == 2 * (6 + 2 * 5) and unpacked["tokens_in_use"] == 4 * 11
    assert packed["operations"] < unpacked["operations"]
    assert packed["grad_norm"] == pytest.approx(unpacked["grad_norm"], rel=1e-2)
    assert said["peak_operations_per_s"] > 0 and said["peak_bytes"] > 0


def two_starts(*flags: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCH / "startup.py"), *flags]
    alone = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ran = subprocess.run(command, capture_output=True, text=True, env=alone, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_two_starts_share_nothing_but_the_cache():
    said = two_starts(MODEL, *SMALL, "--slots=4")
    first, second = said["starts"]
    assert first["programs"] == second["programs"] > 0
    assert said["cache_files"] >= said["starts"][0]["programs"]
    assert said["second_s"] == pytest.approx(second["first_step_s"], abs=1e-3)


def test_a_job_reaches_its_first_step_when_all_is_compiled(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1 w2 w3"}\n{"prompt": "w4 w5 w6"}\n')
    fields = {
        "model.path": MODEL.partition("=")[2],
        "tasks.train": tmp_path / "rows.jsonl",
        "evaluator": "rftjax.evaluators.random_reward:evaluate",
        "batch.prompts": 2,
        "batch.group_size": 2,
        "sampler.slots": 4,
        "sampler.max_new_tokens": 4,
        "rollout.max_length": 16,
        "steps": 2,
        "eval.every": 0,
    }
    spec = f"--config={ROOT / 'experiments' / 'rft.py'}"
    said = two_starts(spec, *(f"--config.{name}={value}" for name, value in fields.items()))
    for start in said["starts"]:
        assert 0 < start["time/startup_s"] < start["reached_s"] < start["first_step_s"]
        assert start["first_step_s"] <= start["whole_s"]
    assert said["second_s"] == pytest.approx(said["starts"][1]["reached_s"], abs=1e-3)
    assert said["cache_files"] > 0


def talker(log: Path, name: str, value: float) -> str:
    """A command line that notes its name and prints a JSON line after another one."""
    code = f"open({str(log)!r}, 'a').write({name!r}); print('hello'); print('{{\"s\": {value}}}')"
    return shlex.join([sys.executable, "-I", "-S", "-c", code])


def test_programs_are_compared_in_turn(bench, tmp_path: Path):
    log = tmp_path / "log"
    ours, peer = talker(log, "A", 2.0), talker(log, "B", 5.0)
    said = bench("compare", f"--ours={ours}", f"--peer={peer}", "--rounds=2", "--key=s")
    assert log.read_text() == "ABAB"
    assert said["ratio"] == 2.5 and said["ratios"] == [2.5, 2.5]
    assert said["peer_peak_bytes"] > 1 << 20


@pytest.mark.parametrize(
    ("peer", "fault"),
    [("false", "peer ended with 1"), ("echo no number", "the last line printed must be")],
)
def test_a_comparison_with_a_broken_peer_has_no_result(bench, tmp_path: Path, peer, fault):
    ours = talker(tmp_path / "log", "A", 2.0)
    with pytest.raises(SystemExit, match=fault):
        bench("compare", f"--ours={ours}", f"--peer={peer}", "--key=s")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("smollm2-135m", 134_515_008),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512),
    ],
)
def test_the_shapes_have_their_models_number_of_parameters(parts, name: str, count: int):
    arithmetic, workload = parts
    assert arithmetic.parameters(hf.read_config(workload.SHAPES[name])) == count


def test_counted_operations_are_those_of_the_forward_pass(parts):
    arithmetic, workload = parts
    fields = workload.SHAPES["qwen2.5-0.5b"] | {"num_hidden_layers": 2, "vocab_size": 1000}
    config = hf.read_config(fields)
    rows, tokens = 2, 96

    def forward(params: Any, tokens_BT: jax.Array) -> jax.Array:
        ones_BT = jnp.ones_like(tokens_BT)
        steps_BT = jnp.broadcast_to(jnp.arange(tokens)[None], tokens_BT.shape)
        layers = decoder.unroll(config, params)
        x_BTD = decoder.hidden(config, layers, tokens_BT, steps_BT, ones_BT, ones_BT)
        return decoder.logits(config, params, x_BTD.reshape(-1, config.width))

    params = jax.eval_shape(lambda key: decoder.init(config, key), jax.random.key(0))
    shape = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    found = jax.jit(forward).lower(params, shape).cost_analysis()["flops"]
    # The plain attention computes masked pairs too.
    counted = arithmetic.forward_operations(
        config, tokens=rows * tokens, scored=rows * tokens, pairs=rows * tokens**2
    )
    assert found == pytest.approx(counted, rel=0.03)


def test_pairs_are_those_that_tokens_see(parts):
    arithmetic, _ = parts
    # A prompt of 2 and two completions of 1: tokens see 1 + 2 of the prompt, then 3 each.
    assert arithmetic.group_pairs(2, 1, 2, shared=True) == 1 + 2 + 3 + 3
    assert arithmetic.group_pairs(2, 1, 2, shared=False) == 2 * (1 + 2 + 3)


def test_a_server_gives_its_clients_the_engines_own_answers(bench):
    said = bench(
        "serving",
        MODEL,
        "--clients=5",
        "--rounds=1",
        "--prompt_tokens=6",
        "--new_tokens=5",
        "--slots=2",
        "--long_prompt=20",
    )
    assert said["wrong"] == 0 and said["clients"] == 5
    assert said["ratio"] > 0 and said["first_token_s"] > 0


def test_experts_and_latent_attention_stand_beside_their_plain_forms(bench):
    sizes = ("--tokens=64", "--experts=8", "--chosen=2", "--width=16", "--ffn=8", "--heads=2")
    small = ("--rows=2", "--positions=64", "--repeats=1")
    said = bench("experts", "--forms=products,latent", *sizes, *small)
    assert said["products"]["largest_relative_difference"] < 1e-5
    # 2 heads of 192 and 128 numbers, beside 512 and 64 of the latent vector.
    assert said["latent"]["times_as_small"] == pytest.approx(2 * 320 / 576, rel=1e-4)
