"""Orbax checkpoints: everything that a resume needs, written while training goes on.

A step's directory holds four items: `trainable` and `frozen` (parameters), `optimizer` (step
counter and Optax state) and `host` (one JSON object that the caller chooses). An export or an
evaluation reads the parameters alone.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, SupportsFloat

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from rftjax.devices import memories, processes
from rftjax.errors import NotFinite, UserError
from rftjax.types import Params, TrainState

NO_METRICS: Mapping[str, float] = MappingProxyType({})
MEETING_S = 20  # that a process whose run has failed waits for the others, to save together
_TREES = ("trainable", "frozen", "optimizer", "reference")
_OPTIONAL = ("frozen", "reference")  # empty in some runs, and then not written
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_DISK_WORDS = ("no space left", "quota exceeded", "file too large")


class CorruptCheckpoint(UserError):
    """A checkpoint that cannot be read back; `step` says which, an earlier one may be whole."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Checkpoints:
    """The checkpoints of one workdir: the newest `keep` (-1: all) and the best by `best_metric`.

    `every` (steps, 0: never) only answers `due`; `save` saves whenever it is called. With
    `read_only` nothing is written or cleaned up, so that an export can look into the workdir of a
    job that is running. Trees in `fixed` ("frozen", "reference") are what the run starts from and never
    changes: they are not written, and `restore` takes them from its example.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every: int = 1,
        keep: int = 3,
        best_metric: str = "eval/reward",
        read_only: bool = False,
        fixed: Sequence[str] = (),
    ) -> None:
        if keep < 1 and keep != -1:
            raise UserError(
                f"checkpoint.keep={keep}: at least one checkpoint must stay to resume from; "
                "give 1 or more, or -1 to keep all"
            )
        if every < 0:
            raise UserError(f"checkpoint.every={every}: a number of steps, or 0 for none")
        self.directory = Path(directory).absolute()
        self.every = every
        self.best_metric = best_metric
        self._read_only = read_only
        self.fixed = fixed
        _silence_orbax()
        if read_only and not self.directory.is_dir():
            raise UserError(f"{self.directory} holds no checkpoints: no such directory")
        here = processes.index()
        together = ocp.options.MultiprocessingOptions()
        if read_only and processes.count() > 1:  # whoever reads does so without the others
            together = ocp.options.MultiprocessingOptions(
                primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"reader{here}"
            )
        with self._writing():
            self._manager = ocp.CheckpointManager(
                self.directory,
                item_handlers={
                    **{
                        name: ocp.PyTreeCheckpointHandler(multiprocessing_options=together)
                        for name in _TREES
                    },
                    "host": ocp.JsonCheckpointHandler(multiprocessing_options=together),
                },
                options=ocp.CheckpointManagerOptions(
                    # `best_fn` makes Orbax store the metric; the policy alone decides what stays:
                    # `best_fn` with `max_to_keep` deletes the newest checkpoint if it is worst.
                    best_fn=lambda metrics: metrics[best_metric],
                    preservation_policy=_preservation(keep, best_metric),
                    cleanup_tmp_directories=not read_only,
                    read_only=read_only,
                    multiprocessing_options=together,
                ),
            )

    def due(self, step: int) -> bool:
        """Whether a periodic save falls on this step."""
        return self.every > 0 and step > 0 and step % self.every == 0

    def save(
        self,
        step: int,
        state: TrainState,
        host: Mapping[str, Any] = MappingProxyType({}),
        metrics: Mapping[str, SupportsFloat] = NO_METRICS,
    ) -> bool:
        """Starts writing a checkpoint, false where this step already has one.

        The arrays are copied off the devices (on CPU: held, so that JAX copies instead of reusing
        them) before it returns, so that the caller may donate them at once; the files are written
        in the background. `host` is anything that JSON can say (tuples come back as lists). Waits
        for the save before it, and raises what went wrong there. Raises NotFinite for a state with
        numbers that are not finite.
        """
        _check_json(host)
        best = float(metrics.get(self.best_metric, math.nan))
        with self._writing():
            self._manager.wait_until_finished()
            if step in self._manager.all_steps():
                return False
            trees = {
                name: tree
                for name, tree in _as_trees(state).items()
                if jax.tree.leaves(tree) and name not in self.fixed
            }
            self._check_finite(step, trees)
            items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
            args = ocp.args.Composite(**items, host=ocp.args.JsonSave(dict(host)))
            ranked = {self.best_metric: best} if math.isfinite(best) else None
            return self._manager.save(step, args=args, metrics=ranked, force=True)

    def rank(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Adds the metric of an evaluation that came after the save; nothing where there is one, or no such step."""
        best = float(metrics.get(self.best_metric, math.nan))
        wanted = math.isfinite(best) and step in self.steps() and math.isnan(self.metric(step))
        if not processes.agree(wanted):
            return
        with self._writing():
            # Orbax keeps metrics as an item of that name, with a file of that name. A kill leaves what it cleans up.
            partial = self.directory / f"{step}.metrics.orbax-checkpoint-tmp-0"
            if processes.first():
                partial.mkdir(exist_ok=True)
                (partial / "metrics").write_text(json.dumps({self.best_metric: best}))
                partial.rename(self.directory / str(step) / "metrics")
            processes.gather(None)  # nobody looks before it is there
            self._manager.reload()

    def wait(self) -> None:
        """Returns when the save under way is whole on disk; raises what went wrong in it."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save under way and lets go of Orbax's threads."""
        with self._writing():
            self._manager.close()

    def steps(self) -> list[int]:
        """Steps with a whole checkpoint, ascending."""
        self.wait()
        return sorted(self._manager.all_steps(read=True))

    def latest_step(self) -> int | None:
        """The newest step with a whole checkpoint, None where there is none."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the best metric (the newest of equals), None where none has one."""
        metrics = {step: self.metric(step) for step in self.steps()}
        ranked = [(value, step) for step, value in metrics.items() if not math.isnan(value)]
        return max(ranked)[1] if ranked else None

    def metric(self, step: int) -> float:
        """The value by which a checkpoint was ranked, NaN where it came without one."""
        return float((self._manager.metrics(step) or {}).get(self.best_metric, math.nan))

    def restore(self, step: int, example: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads a state with the structure and the shardings of `example`, and the `host` object.

        `example` holds arrays or `jax.ShapeDtypeStruct`s; its mesh need not be the one that saved.
        Raises ValueError where a leaf differs in name, shape or dtype, CorruptCheckpoint where
        files are missing or damaged.
        """
        self.wait()
        trees: dict[str, Any] = {}
        for name, wanted in _as_trees(example).items():
            if name in self.fixed:
                trees[name] = wanted
                continue
            found = self._metadata(step, name)
            self._compare(step, name, found, wanted)
            trees[name] = self._read(step, name, wanted) if jax.tree.leaves(wanted) else wanted
        optimizer = trees["optimizer"]
        state = TrainState(
            optimizer["step"],
            trees["trainable"],
            trees["frozen"],
            optimizer["opt_state"],
            trees["reference"],
        )
        return state, self.restore_host(step)

    def restore_params(self, step: int) -> tuple[Params, Params]:
        """Reads (trainable, frozen) as NumPy arrays, without the optimizer's state."""
        self.wait()
        trainable = self._read(step, "trainable", self._metadata(step, "trainable"))
        frozen = self._metadata(step, "frozen")
        return trainable, self._read(step, "frozen", frozen) if frozen else {}

    def restore_host(self, step: int) -> dict[str, Any]:
        """Reads the JSON object alone."""
        self.wait()
        with self._reading(step, "host"):
            args = ocp.args.Composite(host=ocp.args.JsonRestore())
            return dict(self._manager.restore(step, args=args)["host"])

    def delete_after(self, step: int) -> None:
        """Deletes what is newer than `step`: a run that goes on from there writes it anew."""
        newer = [found for found in self.steps() if found > step]
        with self._writing():
            for found in newer:
                self._manager.delete(found)

    def _check_finite(self, step: int, trees: Mapping[str, Any]) -> None:
        """Raises NotFinite where a state holds numbers that are not finite, so that no good checkpoint goes for it."""
        leaves = jax.tree_util.tree_flatten_with_path(trees)[0]
        held = [
            ("/".join(map(_key, path)), leaf)
            for path, leaf in leaves
            if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
        ]
        here = [leaf for _, leaf in held if not memories.on_host(leaf)]
        # Of arrays that lie in the host's memory no more than one comes to the devices at once.
        found = iter(jax.device_get(_all_finite(here)))
        finite = [
            jax.device_get(_all_finite([leaf]))[0] if memories.on_host(leaf) else next(found)
            for _, leaf in held
        ]
        broken = [name for (name, _), good in zip(held, finite, strict=True) if not good]
        if broken:
            more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
            raise NotFinite(
                f"step {step} is not saved: {', '.join(broken[:3])}{more} hold numbers that are not finite. The same"
                " command with a lower --config.optim.lr goes on from the last checkpoint,"
                f" of step {max(self._manager.all_steps(), default=0)}"
            )

    def _metadata(self, step: int, name: str) -> Any:
        """An item's structure with Orbax's array metadata as leaves; {} for an empty item."""
        path = self.directory / str(step) / name
        if name in _OPTIONAL and path.parent.is_dir() and not path.exists():
            return {}
        with self._reading(step, name):
            return ocp.PyTreeCheckpointHandler().metadata(epath.Path(path)).tree

    def _read(self, step: int, name: str, wanted: Any) -> Any:
        """Reads one item as the arrays that `wanted` describes (host memory for metadata)."""
        restore_args = jax.tree.map(_restore_args, wanted)
        with self._reading(step, name):
            args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args)
            return self._manager.restore(step, args=ocp.args.Composite(**{name: args}))[name]

    def _compare(self, step: int, name: str, found: Any, wanted: Any) -> None:
        """Raises ValueError naming the leaves in which a checkpoint differs from `wanted`."""
        found_leaves, wanted_leaves = _describe(found), _describe(wanted)
        differences = [
            f"{name}/{path}: {found_leaves.get(path, 'absent')} in the checkpoint, "
            f"{wanted_leaves.get(path, 'absent')} in this run"
            for path in sorted({*found_leaves, *wanted_leaves})
            if found_leaves.get(path) != wanted_leaves.get(path)
        ]
        if differences:
            more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
            raise UserError(
                f"checkpoint {self.directory / str(step)} was saved by a run with another model or "
                f"optimizer: {'; '.join(differences[:3])}{more}. Start with the config that the "
                "workdir was made with, or give another --workdir"
            )

    @contextmanager
    def _reading(self, step: int, name: str) -> Iterator[None]:
        """Turns what fails while an item is read into CorruptCheckpoint, or says what is there."""
        directory = self.directory / str(step)
        if not directory.is_dir():
            raise UserError(
                f"{self.directory} holds no checkpoint of step {step}; "
                f"it has {self.steps() or 'none'}"
            )
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise a dozen types for damaged files
            raise CorruptCheckpoint(
                f"checkpoint {directory / name} cannot be read ({_first_line(error)}). Files are "
                f"missing or damaged; delete {directory} to go on from an earlier checkpoint",
                step,
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns a failed write into an OSError that says where and what to do."""
        try:
            yield
        except Exception as error:
            text = " ".join(str(cause) for cause in _causes(error)).lower()
            numbers = [cause.errno for cause in _causes(error) if isinstance(cause, OSError)]
            full = any(number in _FULL_DISK for number in numbers) or any(
                words in text for words in _FULL_DISK_WORDS
            )
            if not full and not numbers:
                raise
            self._clear_failed_save()
            free = shutil.disk_usage(_existing(self.directory)).free
            reason, way_out = _first_line(error), "Make it writable"
            if full:
                reason = f"the disk is full ({free / 2**30:.1f} GiB free)"
                way_out = "Free some space, lower checkpoint.keep"
            raise OSError(
                numbers[0] if numbers else errno.ENOSPC,
                f"cannot write a checkpoint: {reason}. {way_out} or give another --workdir; "
                "the same command goes on from the last whole checkpoint",
                str(self.directory),
            ) from error

    def _clear_failed_save(self) -> None:
        if hasattr(self, "_manager") and not self._read_only:
            self._manager.reload()  # Orbax thinks that it deleted what this save was to replace
            for partial in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(partial, ignore_errors=True)  # it holds space that is needed


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    def finite(leaf: jax.Array) -> jax.Array:
        if not memories.on_host(leaf) or leaf.ndim < 3:
            return jax.numpy.isfinite(memories.to_device(leaf)).all()

        def part(index: jax.Array) -> jax.Array:
            return jax.numpy.isfinite(memories.to_device(memories.entry(leaf, index))).all()

        return jax.lax.map(part, jax.numpy.arange(leaf.shape[0])).all()

    return [finite(leaf) for leaf in leaves]


def meet(name: str, *, seconds: int = MEETING_S) -> bool:
    """Whether all processes call this with the same name, used once only, within so many seconds."""
    try:
        ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * seconds)
    except Exception as error:  # of types that JAX does not publish
        logging.error("not all processes came to %s: %s", name, _first_line(error))
        return False
    return True


def exists(directory: Path) -> bool:
    """Whether a folder of checkpoints has one, whole or not."""
    return any(path.name.isdigit() for path in directory.glob("*"))


def step_directories(directory: Path) -> list[Path]:
    """Returns the checkpoints of completed steps in a folder, ascending, without opening them."""
    found = [path for path in directory.glob("*") if path.name.isdigit() and int(path.name) > 0]
    return sorted(found, key=lambda path: int(path.name))


def _as_trees(state: TrainState) -> dict[str, Any]:
    return {
        "trainable": state.trainable,
        "frozen": state.frozen,
        "reference": state.reference,
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
    }


def _preservation(keep: int, best_metric: str) -> checkpoint_managers.PreservationPolicy:
    """The newest `keep` whatever their metric, and the best of those that have one."""
    latest = checkpoint_managers.LatestN(None if keep == -1 else keep)
    best = checkpoint_managers.BestN(
        get_metric_fn=lambda metrics: metrics[best_metric],
        n=1,
        keep_checkpoints_without_metrics=False,
    )
    return checkpoint_managers.AnyPreservationPolicy([latest, best])


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    """How Orbax restores a leaf: onto its sharding, or as NumPy for metadata and NumPy arrays."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _describe(tree: Any) -> dict[str, str]:
    """Maps leaf paths to dtype and shape; named tuples give the paths of their stored form."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        "/".join(_key(key) for key in path): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def _key(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _check_json(host: Mapping[str, Any]) -> None:
    for name, value in host.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"host[{name!r}] of a checkpoint is not JSON: {error}; "
                "convert it to lists, dicts, numbers and text"
            ) from error


def _causes(error: BaseException) -> list[BaseException]:
    """An exception and those that it was raised from."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _silence_orbax() -> None:
    """Drops Orbax's lines (dozens a save) from absl's log: what goes wrong is raised as well."""
    logger = logging.getLogger("absl")
    if _is_worth_showing not in logger.filters:
        logger.addFilter(_is_worth_showing)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.CRITICAL or "/orbax/" not in record.pathname
