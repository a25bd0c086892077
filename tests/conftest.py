"""Eight fake CPU devices for every test, and strictness where JAX is lenient by default.

The environment is set before anything imports JAX; worker processes inherit it.
"""

import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
# Compiling takes most of the time here. What a program computes is the same without XLA's costlier passes.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
# All that takes a while to compile goes into the cache that `pytest_configure` makes.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Nothing here may wait for a network that a test machine does not have.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import jax
import pytest
import shapes

# An array that is broadcast along axes it does not have is a mistake more often than not.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config):
    """Makes a cache of compiled programs for the processes of this run; one that outlived it would hide what a fresh
    machine does."""
    # pytest-xdist gives the processes that it starts a `workerinput`.
    if not hasattr(config, "workerinput"):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rftjax-tests-")
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    # What another process writes at this moment, or was killed in, is compiled again.
    torn = "ignore:Error reading persistent compilation cache entry:UserWarning"
    config.addinivalue_line("filterwarnings", torn)


def pytest_unconfigure(config: pytest.Config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def watch():
    """Looks at the array names of every function of rftjax that the tests run."""
    watch = shapes.Watch()
    watch.start()
    yield watch
    watch.stop()


@pytest.fixture(autouse=True)
def array_names_tell_shapes(watch: shapes.Watch):
    watch.take()
    yield
    faults = watch.take()
    assert not faults, "array names and shapes differ:\n" + "\n".join(faults)


@pytest.fixture
def splash_on_cpu(monkeypatch: pytest.MonkeyPatch):
    """Runs the attention kernel for TPUs step by step on the CPU, where it cannot be compiled."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    whole = kernels.SplashAttentionKernel

    def stepwise(*infos: object, **settings: object) -> object:
        return whole(*infos, **(settings | {"interpret": True}))

    monkeypatch.setattr(kernels, "SplashAttentionKernel", stepwise)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def tiny_dir(data_dir: Path) -> Path:
    """A two-layer random Qwen2 checkpoint in Hugging Face format (see its NOTE.md)."""
    return data_dir / "tiny"
