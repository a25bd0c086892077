"""Large parameters go to their devices block by block, and are what whole ones are."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seeded
import test_packed
from jax.sharding import NamedSharding, PartitionSpec

from rftjax.devices import sharding
from rftjax.errors import UserError
from rftjax.policy import load
from rftjax.weights import hf, streaming


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes every parameter a large one, of blocks of 1536 bytes at most; returns the bytes of those that were read."""
    monkeypatch.setattr(streaming, "LARGE", 0)
    monkeypatch.setattr(streaming, "BLOCK", 1536)
    read: list[int] = []
    blocks = hf._blocks

    def noted(*given: Any) -> Any:
        for index, reader in blocks(*given):

            def counted(reader: Callable[[], np.ndarray] = reader) -> np.ndarray:
                block = reader()
                read.append(4 * block.size)
                return block

            yield index, counted

    monkeypatch.setattr(hf, "_blocks", noted)
    return read


def assert_same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", ["olmo2", "gpt_oss", "deepseek_v3"])
def test_parameters_read_in_blocks_are_those_read_whole(
    name: str, tmp_path: Path, small_blocks: list[int], monkeypatch: pytest.MonkeyPatch
):
    path = seeded.checkpoint(tmp_path / name, name)
    found = hf.load(path)[1]
    # A head is never cut, and none of these has more.
    assert max(small_blocks) <= 1536 and len(small_blocks) > 100
    with monkeypatch.context() as whole:
        whole.setattr(streaming, "LARGE", 1 << 30)
        assert_same(found, hf.load(path)[1])


def test_each_device_gets_its_own_part_in_the_dtype_that_it_computes_in(
    tmp_path: Path, small_blocks: list[int], monkeypatch: pytest.MonkeyPatch
):
    path = str(seeded.checkpoint(tmp_path / "olmo2", "olmo2"))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    found = load(path, dtype="bfloat16", mesh=mesh, masters=False).params
    assert small_blocks
    with monkeypatch.context() as whole:
        whole.setattr(streaming, "LARGE", 1 << 30)
        wanted = load(path, dtype="bfloat16", mesh=mesh, masters=False).params
    assert_same(found, wanted)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.sharding == two.sharding
    spread = {leaf.sharding.spec for leaf in jax.tree.leaves(found)}
    assert len(spread) > 3


def test_a_device_is_given_no_block_that_it_has_no_part_of(monkeypatch: pytest.MonkeyPatch):
    moved: list[tuple[int, ...]] = []
    written = streaming._written
    monkeypatch.setattr(
        streaming, "_written", lambda *given: moved.append(given[1].shape) or written(*given)
    )
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    where = NamedSharding(mesh, PartitionSpec(("fsdp",), None))
    whole = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
    blocks = [
        ((slice(at, at + 1), slice(0, 6)), functools.partial(whole.__getitem__, slice(at, at + 1)))
        for at in range(8)
    ]
    found = streaming.put(streaming.Large((8, 6), lambda: iter(blocks)), jnp.float32, where)
    np.testing.assert_array_equal(found, whole)
    assert moved == [(1, 6)] * 8 * 2  # twice each, for the two devices along `tensor`


def test_a_block_that_only_other_processes_hold_is_not_read():
    read: list[int] = []
    blocks = [
        ((slice(at, at + 1), slice(0, 6)), lambda at=at: read.append(at) or np.zeros((1, 6)))
        for at in range(8)
    ]
    own = [(slice(0, 2), slice(None)), (slice(6, 7), slice(0, 3))]
    found = streaming._wanted(streaming.Large((8, 6), lambda: iter(blocks)), own)
    assert [index[0].start for index, _ in found] == read == [0, 1, 6]


def test_weights_in_8_bits_read_by_rows_are_those_read_whole(
    tmp_path: Path, small_blocks: list[int], monkeypatch: pytest.MonkeyPatch
):
    stored = json.loads((seeded.DATA / "deepseek_v3.json").read_text())
    made = seeded.tensors({key: tuple(shape) for key, shape in stored.items()}, centred=False)
    packed = test_packed.quantised(made)[0]
    test_packed.write(tmp_path, packed, quantization_config=test_packed.FP8)
    found = hf.load(tmp_path)[1]
    with monkeypatch.context() as whole:
        whole.setattr(streaming, "LARGE", 1 << 30)
        assert_same(found, hf.load(tmp_path)[1])


def test_a_large_tensor_of_another_shape_is_refused(tmp_path: Path, small_blocks: list[int]):
    path = seeded.checkpoint(tmp_path / "olmo2", "olmo2", intermediate_size=44)
    with pytest.raises(UserError, match=r"gate_proj\.weight has shape \(40, 32\).*\(44, 32\)"):
        hf.load(path)
