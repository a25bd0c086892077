import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from rftjax.models import attention, cached

FULL = 1 << 30


def inputs(T, heads, C, dtype="float32", S=256):
    """Queries of six rows at the edges of the kernel's tiles, and two key heads."""
    rng = np.random.default_rng(T)
    q = jnp.asarray(rng.normal(size=(6, T, heads, C)), dtype)
    keys, values = (jnp.asarray(rng.normal(size=(6, 2, S, C)), dtype) for _ in range(2))
    first = np.asarray([0, 5, cached.TILE - 1, cached.TILE, S - T, S // 2])
    return q, keys, values, jnp.asarray(first[:, None] + np.arange(T), jnp.int32)


def masked(positions, window, S=256):
    back = positions[:, :, None] - np.arange(S)
    return (back >= 0) & (back < window)


@pytest.mark.parametrize("window", [10, 100, FULL])
@pytest.mark.parametrize(
    ("heads", "dtype", "bound"),
    [(2, "float32", 1e-6), (14, "float32", 1e-6), (6, "bfloat16", 1e-2)],
)
def test_the_decoding_kernel_gives_what_the_plain_form_gives(heads, dtype, bound, window):
    q, keys, values, positions = inputs(1, heads, 32, dtype)
    wanted = cached.attend("plain", q, keys, values, positions, window)
    # What a row does not see is not read into its result.
    seen = jnp.asarray(masked(np.asarray(positions), window))[:, 0, None, :, None]
    spoilt = [jnp.where(seen, x, jnp.asarray(1e4, dtype)) for x in (keys, values)]
    found = cached.single(q[:, 0], *spoilt, positions[:, 0], window, interpret=True)
    assert found.dtype == q.dtype
    np.testing.assert_allclose(
        found.astype(jnp.float32), wanted[:, 0].astype(jnp.float32), atol=bound
    )


@pytest.mark.parametrize("heads", [2, 6])
def test_sinks_are_a_key_without_a_value_in_every_form(heads, monkeypatch):
    monkeypatch.setattr(attention, "CUDNN", "xla")
    q, keys, values, positions = inputs(1, heads, 32)
    sinks = jnp.linspace(-1.0, 8.0, heads)
    wanted = cached.attend("plain", q, keys, values, positions, 100, sinks)
    assert np.abs(wanted - cached.attend("plain", q, keys, values, positions, 100)).max() > 0.1
    alone = cached.single(q[:, 0], keys, values, positions[:, 0], 100, sinks, interpret=True)
    np.testing.assert_allclose(alone, wanted[:, 0], atol=1e-6)
    library = cached.attend("cudnn", q, keys[:, :, :-1], values[:, :, :-1], positions, 100, sinks)
    np.testing.assert_allclose(library[:-2], wanted[:-2], atol=1e-6)
    low = cached.attend(
        "plain", *(x.astype("bfloat16") for x in (q, keys, values)), positions, 100, sinks
    )
    np.testing.assert_allclose(low.astype("float32"), wanted, atol=2e-2)


@pytest.mark.parametrize(
    ("heads", "dtype", "doubled"),
    [(2, "bfloat16", True), (2, "float32", False), (6, "bfloat16", False)],
)
def test_a_query_alone_in_its_product_is_doubled_in_bfloat16_and_changes_no_value(
    heads, dtype, doubled
):
    q, keys, values, positions = inputs(1, heads, 32, dtype)
    mask = jnp.asarray(masked(np.asarray(positions), FULL))
    found = cached.attend("blocked", q, keys, values, positions, FULL)
    wanted = cached.plain(*(x.astype(jnp.float32) for x in (q, keys, values)), mask)
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=2e-2)
    text = (
        jax.jit(lambda *given: cached.attend("blocked", *given, FULL))
        .lower(q, keys, values, positions)
        .as_text()
    )
    assert (f"tensor<6x2x2x1x32x{'bf16' if dtype == 'bfloat16' else 'f32'}>" in text) == doubled


@pytest.mark.parametrize("window", [10, FULL])
def test_a_row_beyond_the_cache_gets_numbers_and_reads_one_tile(window):
    q, *both, positions = inputs(1, 6, 32)
    spoilt = [x.at[:, :, cached.TILE :].set(jnp.nan) for x in both]
    found = cached.single(q[:, 0], *spoilt, positions[:, 0] + 256, window, interpret=True)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("window", [10, FULL])
def test_prompts_are_given_to_the_library_as_the_plain_form_has_them(window, monkeypatch):
    # The same call as on a GPU, computed by what JAX has for any device.
    monkeypatch.setattr(attention, "CUDNN", "xla")
    q, keys, values, positions = inputs(16, 6, 8)
    found = cached.attend("cudnn", q, keys, values, positions, window)
    wanted = cached.attend("blocked", q, keys, values, positions, window)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
@pytest.mark.parametrize(
    ("heads", "C", "sunk"), [(14, 64, False), (12, 128, False), (16, 64, True)]
)
def test_decoding_on_an_nvidia_gpu_is_one_kernel(heads, C, sunk):
    device = AbstractDevice("NVIDIA H100", None, "gpu")
    mesh = AbstractMesh((1,), ("one",), abstract_device=device)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(1, heads, C, "bfloat16")]
    with jax.sharding.use_abstract_mesh(mesh):
        run = jax.jit(lambda sinks, *given: cached.attend("cudnn", *given, FULL, sinks))
        traced = run.trace(jax.ShapeDtypeStruct((heads,), "float32") if sunk else None, *shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton") == 1 and "stablehlo.dot_general" not in text


@pytest.mark.parametrize(
    ("C", "S", "suits"), [(64, 256, True), (80, 256, False), (64, 100, False), (8, 128, False)]
)
def test_the_kernel_is_used_where_its_tiles_fit(C, S, suits):
    assert cached.suits(jnp.zeros((1, 1, S, C))) == suits
