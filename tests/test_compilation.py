import threading
import types

import jax
import jax.numpy as jnp
import pytest

from rftjax.devices.compilation import BEHIND, Compilations, Program, compiling


@pytest.fixture
def compilations():
    counting = Compilations()
    yield counting
    counting.close()


@pytest.mark.filterwarnings(
    "ignore:Some donated buffers were not usable"
)  # a sum has no room for it
def test_programs_compiled_ahead_are_there_when_they_are_called(compilations):
    one = jax.jit(lambda x_BT, *, power: x_BT**power, static_argnames="power")
    two = jax.jit(lambda x_BT: x_BT.sum() + 3.25, donate_argnums=0)
    x_BT = jnp.ones((3, 5))
    programs = [Program(one, (x_BT,), {"power": 7}), Program(two, (x_BT,))]
    compilations.take()
    with compiling(iter(programs)):
        pass
    found = compilations.take()
    assert found["compile/programs"] == 2 and found["time/compile_s"] > 0
    assert found["compile/cached"] == 0  # no other test has put these into the cache
    assert float(programs[0].run().sum()) == 15.0 and float(programs[1].run()) == 18.25
    # The sum here at most, where no test before it has made it, and neither of them.
    assert compilations.take()["compile/programs"] <= 1


def test_what_is_compiled_beside_the_steps_is_there_later_and_counted_nowhere(compilations):
    one, two, behind = jax.jit(lambda x_B: x_B * 0.375 - 2.5), jax.jit(lambda x_B: x_B @ 3), []

    reached = threading.Event()
    last = types.SimpleNamespace(lower=reached.set)

    def note(event, _, **facts):
        if event.endswith("backend_compile_duration"):
            behind.append(threading.current_thread().name.startswith(BEHIND))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        x_B = jnp.ones(7)
        compilations.take()
        behind.clear()
        # An error in one keeps nobody from the others.
        compilations.behind([Program(two, (x_B,)), Program(one, (x_B,)), Program(last, ())])
        assert reached.wait(60)
        assert behind == [True] and compilations.take()["compile/programs"] == 0
        one(x_B)
        assert behind == [True] and compilations.take()["compile/programs"] == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_an_error_in_one_program_is_not_lost():
    bad = jax.jit(lambda x_B: x_B @ jnp.ones((7, 2)))
    programs = [Program(jax.jit(jnp.sin), (jnp.ones(3),)), Program(bad, (jnp.ones(3),))]
    with pytest.raises(TypeError), compiling(programs):
        pass


def test_programs_compile_beside_what_the_caller_does():
    meanwhile, compiled = threading.Event(), threading.Event()

    def programs():
        assert meanwhile.wait(60)
        yield Program(jax.jit(lambda x_B: x_B - 0.875), (jnp.ones(3),))
        compiled.set()

    with compiling(programs()):
        meanwhile.set()
        assert compiled.wait(60)


def test_nothing_is_waited_for_where_the_caller_fails():
    failed = threading.Event()

    def programs():
        assert failed.wait(60)
        yield Program(jax.jit(jnp.cos), (jnp.ones(3),))

    with pytest.raises(ValueError, match="no weights"), compiling(programs()):
        raise ValueError("no weights")
    failed.set()


def test_compilations_are_counted_until_the_end():
    counting = Compilations()
    counting.close()
    jax.block_until_ready(jax.jit(lambda x_B: x_B * 1.125)(jnp.ones(4)))
    assert counting.take() == {"compile/programs": 0, "compile/cached": 0, "time/compile_s": 0}
