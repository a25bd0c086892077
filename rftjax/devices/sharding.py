"""The device mesh and the rules from logical axes, which each model family declares, to axes of the mesh."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rftjax.errors import UserError
from rftjax.types import Batch, Pack, Params

# For `jax.transfer_guard` around device work: an implicit transfer between host and devices would wait for them.
GUARD = "disallow"
AXES = ("data", "fsdp", "expert", "context", "tensor")
# The axes that share out rows: of a micro-batch, and of the sampler's cache.
ROWS = ("data", "fsdp", "expert")
# The axis that shares out the tokens of a packed row, and the positions of the sampler's cache.
CONTEXT = "context"

# What a family's file declares: the logical axes of each parameter, by the last two names of its path.
LogicalAxes = Mapping[tuple[str, str], tuple[str, ...]]
# The factors of a LoRA product: replicated, for they are small but for those of experts.
ADAPTERS = ("a", "b")

Rules = Mapping[str, tuple[str, ...]]
RULES: Rules = {
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    # Devices of one context need the same weights, so they hold a part of them each, as those of fsdp do; devices of
    # other experts too, of all that is not an expert's.
    "width": ("fsdp", CONTEXT, "expert"),
    "rank": ("fsdp", CONTEXT, "expert"),
    "channels": (),
    # By expert, not by width: what is gathered then lies together, and XLA for GPUs need not turn all experts over.
    "experts": ("expert", "fsdp", CONTEXT),
    "routes": (),  # of a router, to experts that lie anywhere
    "gain": (),  # of a norm
}
# Decoding reads every weight in each of its steps: too often to gather them from other devices.
DECODE_RULES: Rules = {**RULES, "width": (), "rank": (), "experts": ("expert",)}


def make_mesh(
    devices: Sequence[Any] = (),
    *,
    data: int = -1,
    fsdp: int = 1,
    expert: int = 1,
    context: int = 1,
    tensor: int = 1,
) -> Mesh:
    """Returns a mesh of the devices (none: all), those of a process side by side; one axis may be -1 and takes what the
    others leave."""
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
    found = sorted(devices or jax.devices(), key=lambda one: one.process_index)
    _check_even(found)
    count = len(found)
    rest = [name for name, size in sizes.items() if size == -1]
    wrong = [name for name, size in sizes.items() if size != -1 and size < 1]
    if wrong or len(rest) > 1:
        raise UserError(
            f"mesh.{(wrong or rest)[0]}={sizes[(wrong or rest)[0]]}: sizes are positive, and one of them may be -1"
            " (the rest)"
        )
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if rest and count % known == 0:
        sizes[rest[0]] = count // known
    if int(np.prod(list(sizes.values()))) != count:
        raise UserError(
            f"{', '.join(f'mesh.{name}={size}' for name, size in sizes.items())}: their product must be the number of"
            f" devices, {count}; set one axis to -1 to let it take the rest"
        )
    return Mesh(np.asarray(found).reshape(tuple(sizes.values())), AXES)


def _check_even(devices: Sequence[Any]) -> None:
    """Raises UserError where processes have different numbers of devices: their parts of a mesh would differ."""
    of_process = collections.Counter(one.process_index for one in devices)
    if len(set(of_process.values())) > 1:
        counts = ", ".join(f"{of_process[one]} in process {one}" for one in sorted(of_process))
        raise UserError(
            f"mesh: the processes have different numbers of devices ({counts}); give each of them as many"
            " (CUDA_VISIBLE_DEVICES chooses those of a process)"
        )


def decode_mesh(mesh: Mesh) -> Mesh:
    """Returns the mesh on which the sampler's weights are made: the same devices, no group of `tensor`, `context` or
    `expert` in two processes."""
    if jax.process_count() == 1:
        return mesh
    left, sizes = jax.local_device_count(), []
    for axis in ("tensor", CONTEXT, "expert"):  # the innermost first
        sizes.insert(0, math.gcd(mesh.shape[axis], left))
        left //= sizes[0]
    return Mesh(mesh.devices.reshape(-1, 1, *sizes), AXES)


def local_mesh(mesh: Mesh | None) -> Mesh | None:
    """Returns this process's part of `decode_mesh`, on which it samples; the mesh itself where there is one process."""
    if mesh is None or jax.process_count() == 1:
        return mesh
    groups = [
        group
        for group in decode_mesh(mesh).devices
        if group.flat[0].process_index == jax.process_index()
    ]
    return Mesh(np.asarray(groups), AXES)


def to_local(mesh: Mesh, tree: Any) -> Any:
    """Returns arrays that lie on `decode_mesh` as arrays on `local_mesh`, without a copy; they may be abstract."""
    if jax.process_count() == 1:
        return tree
    here = local_mesh(mesh)
    assert here is not None

    def one(leaf: Any) -> Any:
        place = NamedSharding(here, leaf.sharding.spec)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        parts = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, place, parts)

    return jax.tree.map(one, tree)


def partition(
    mesh: Mesh,
    logical: LogicalAxes,
    path: tuple[str, ...],
    shape: tuple[int, ...],
    rules: Rules = RULES,
) -> PartitionSpec:
    """Returns the partition of one parameter; an axis that the mesh does not divide is replicated."""
    return _spec([axis for axis, _ in _axes(mesh, logical, path, shape, rules)])


def _spec(axes: list[tuple[str, ...]]) -> PartitionSpec:
    """Returns the shortest way to say a partition: two ways would compile a function twice."""
    while axes and not axes[-1]:
        axes.pop()
    return PartitionSpec(*(one if len(one) > 1 else one[0] if one else None for one in axes))


def replicated_axes(mesh: Mesh, logical: LogicalAxes, params: Params) -> list[str]:
    """Returns, in words, every axis of the parameters that the mesh should divide and cannot."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = tuple(key.key for key in path)
        problems = [problem for _, problem in _axes(mesh, logical, names, leaf.shape) if problem]
        found += [f"{'/'.join(names)}: {problem}" for problem in problems]
    return found


def _axes(
    mesh: Mesh,
    logical: LogicalAxes,
    path: tuple[str, ...],
    shape: tuple[int, ...],
    rules: Rules = RULES,
) -> list[tuple[tuple[str, ...], str]]:
    """Returns for each axis of a parameter the mesh axes that divide it, and why there are fewer than the rules say."""
    axes, taken = [], set()
    for name, size in zip(_logical(logical, path, shape), shape, strict=True):
        wanted = _present(mesh, [axis for axis in rules[name] if axis not in taken] if name else ())
        found, problem = _dividing(mesh, wanted, size), ""
        if found != wanted:
            over = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in wanted)
            problem = f"{size} {name} do not divide over {over}"
        axes.append((found, set(wanted) - set(found), problem))
        taken |= set(found)
    # What divides another axis of the parameter instead is no problem, but experts that cannot be exchanged are.
    instead = taken - {"expert"}

    def told(found: tuple[str, ...], left: set[str], problem: str) -> str:
        if not left - instead:
            return ""
        kept = " and ".join(f"mesh.{axis}" for axis in found)
        other = "divided by another axis instead" if left & taken else "replicated"
        return f"{problem}; {f'divided over {kept} alone' if kept else other}"

    return [(one[0], told(*one)) for one in axes]


def _present(mesh: Mesh, axes: Sequence[str]) -> tuple[str, ...]:
    """Returns those of the axes that have more than one device."""
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def _dividing(mesh: Mesh, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Returns as many of the axes, from the first one on, as divide the size together."""
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes


def _logical(
    logical: LogicalAxes, path: tuple[str, ...], shape: tuple[int, ...]
) -> tuple[str, ...]:
    """Returns the logical axes of a parameter, "" for one that no rule divides (of layers, of most adapters).

    Raises ValueError where the family declares none, or one without a rule.
    """
    if not shape:
        return ()
    end = path[-2], path[-1]
    names = logical.get(end)
    if path[-1] in ADAPTERS:
        kernel = logical.get((path[-2], "kernel"), ("",))
        if kernel[0] != "experts":
            return ("",) * len(shape)
        inputs, outputs = (kernel[1], "") if path[-1] == "a" else ("", kernel[2])
        names = (kernel[0], inputs, outputs)
    # Parameters of layers are stacked along a leading axis, but for the sampler.
    if names is None or len(shape) - len(names) not in (0, 1):
        raise ValueError(
            f"{'/'.join(path)} of shape {shape}: the model family declares the axes {names} for {end};"
            " LOGICAL_AXES in its file must name one for each"
        )
    if unknown := set(names) - set(RULES) - {""}:
        raise ValueError(
            f"{'/'.join(path)}: no rule says where the axes {sorted(unknown)} lie; must be of {', '.join(RULES)}"
        )
    return ("",) * (len(shape) - len(names)) + names


def of_parameter(
    mesh: Mesh, logical: LogicalAxes, path: tuple[str, ...], shape: tuple[int, ...]
) -> NamedSharding:
    """Returns where one parameter lies on the mesh by the rules."""
    return NamedSharding(mesh, partition(mesh, logical, path, shape))


def put(tree: Any, places: Any) -> Any:
    """Returns arrays, of which each process has the whole, where they are to lie: on devices of other processes too."""
    if jax.process_count() == 1:
        return jax.device_put(tree, places)

    def one(leaf: Any, place: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, place)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, place, whole.__getitem__)

    return jax.tree.map(one, tree, places)


def shard_tree(mesh: Mesh, logical: LogicalAxes, tree: Params) -> Params:
    """Returns the tree with every leaf on the mesh; optimizer state follows the parameters that it mirrors."""
    return put(tree, shardings(mesh, logical, tree))


def abstract_tree(mesh: Mesh, logical: LogicalAxes, tree: Params) -> Params:
    """Returns the abstract form of what `shard_tree` returns: shapes, dtypes and shardings without data."""
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        tree,
        shardings(mesh, logical, tree),
    )


def shardings(mesh: Mesh, logical: LogicalAxes, tree: Params, rules: Rules = RULES) -> Params:
    """Returns where each leaf lies by the rules; what is around the trees of parameters makes no difference."""

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        return NamedSharding(mesh, partition(mesh, logical, names, leaf.shape, rules))

    return jax.tree_util.tree_map_with_path(place, tree)


def put_rows(mesh: Mesh | None, tree: Any) -> Any:
    """Returns host arrays, whose first axis is one of rows, on the devices that have these rows."""
    return jax.device_put(tree, None if mesh is None else row_sharding(mesh))


def replicate(mesh: Mesh | None, tree: Any) -> Any:
    """Returns host arrays on every device."""
    return jax.device_put(tree, None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def put_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Returns the batch on the mesh: packed rows as `pack_shardings` says, what the loss needs everywhere."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    pack = jax.tree.map(put, batch.pack, pack_shardings(mesh, batch.pack))
    rest = batch._replace(pack=None)
    return jax.tree.map(lambda leaf: put(leaf, everywhere), rest)._replace(pack=pack)


def pack_shardings(mesh: Mesh, pack: Pack) -> Pack:
    """Returns where packed rows with a leading axis of micro-batches lie: over ROWS, and the experts to replay, which
    are many bytes a token, with the tokens over context."""
    rows = NamedSharding(mesh, PartitionSpec(None, ROWS))
    places = jax.tree.map(lambda _: rows, pack)
    if pack.experts_RXLU is None or context_shards(mesh, pack.experts_RXLU.shape[2]) == 1:
        return places
    return places._replace(experts_RXLU=NamedSharding(mesh, PartitionSpec(None, ROWS, CONTEXT)))


def row_multiple(mesh: Mesh | None) -> int:
    """Returns the number of devices that rows are divided over (those of a micro-batch, and the sampler's)."""
    return math.prod(mesh.shape[axis] for axis in ROWS) if mesh is not None else 1


def expert_shards(mesh: Mesh | None, experts: int) -> int:
    """Returns how many devices so many experts are divided over."""
    shards = mesh.shape["expert"] if mesh is not None else 1
    return 1 if experts % shards else shards


def decode_shardings(mesh: Mesh, logical: LogicalAxes, params: Params) -> Params:
    """Returns where decoding has its weights: whole on every device but for the axes `tensor` and `expert`."""
    return shardings(mesh, logical, params, DECODE_RULES)


def context_shards(mesh: Mesh | None, tokens: int = 0) -> int:
    """Returns how many devices so many tokens of a packed row are divided over; those of a cache are filled up."""
    shards = mesh.shape[CONTEXT] if mesh is not None else 1
    return 1 if tokens % shards else shards


def row_sharding(mesh: Mesh, *others: tuple[str, ...]) -> NamedSharding:
    """Returns where an array with a first axis of rows lies, further axes as given."""
    return axes_sharding(mesh, ROWS, *others)


def axes_sharding(mesh: Mesh, *axes: tuple[str, ...]) -> NamedSharding:
    """Returns where an array lies whose axes these of the mesh divide, the ones of an axis together."""
    return NamedSharding(mesh, _spec([_present(mesh, one) for one in axes]))


def keep_rows(mesh: Mesh | None, array: jax.Array, *others: tuple[str, ...]) -> jax.Array:
    """Keeps a first axis of rows over the axes ROWS inside a compiled function, further axes as given.

    Without it the compiler may rather divide the products of weights that lie over fsdp, and has every device compute,
    and keep, all rows.
    """
    if row_multiple(mesh) == 1:
        return array
    assert mesh is not None
    return jax.lax.with_sharding_constraint(array, row_sharding(mesh, *others))


def vocab_axes(mesh: Mesh | None, vocab: int, more: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Returns the axes that divide the vocabulary of logits: those of the head, then `more`; none that do not."""
    wanted = (*RULES["vocab"], *more)
    return _dividing(mesh, _present(mesh, wanted), vocab) if mesh is not None else ()


def keep_tokens(mesh: Mesh | None, x_RXD: jax.Array) -> jax.Array:
    """Does what `keep_rows` does, and keeps the tokens of a row over the axis `context` if it divides them."""
    if mesh is None or context_shards(mesh, x_RXD.shape[1]) == 1:
        return keep_rows(mesh, x_RXD)
    return jax.lax.with_sharding_constraint(x_RXD, row_sharding(mesh, (CONTEXT,)))


def table_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Returns where an embedding (V, D) and its gradient lie."""
    path = ("embed", "embedding")
    return of_parameter(mesh, {path: ("vocab", "width")}, path, shape)


def column_axes(table: NamedSharding) -> tuple[str, ...]:
    """Returns the axes that divide the columns of a table, the outer one first."""
    axes = table.spec[1] if len(table.spec) > 1 else None
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def cache_sharding(mesh: Mesh, shape: tuple[int, ...], axes: tuple[str, ...]) -> NamedSharding:
    """Returns where a leaf of the cache lies, which has a token's `shape` of these logical axes: rows over ROWS, heads
    over tensor if it divides them, positions over context.

    The positions lie before the last axis of the shape.
    """

    def over(size: int, name: str) -> tuple[str, ...]:
        return _dividing(mesh, _present(mesh, DECODE_RULES[name]), size)

    *lead, last = map(over, shape, axes)
    return row_sharding(mesh, *lead, (CONTEXT,), last)


def cache_specs(cache: Any) -> Any:
    """Returns how the leaves of a cache are given to `over_rows`."""
    return jax.tree.map(lambda leaf: PartitionSpec(ROWS, *[None] * (leaf.ndim - 3), CONTEXT), cache)


def over_rows(
    mesh: Mesh | None, function: Callable[..., Any], inputs: Any, outputs: Any
) -> Callable[..., Any]:
    """Returns the function as each device runs it on its own rows; the axis `tensor` stays the compiler's.

    `inputs` and `outputs` say of each argument and result whether its first axis is one of rows; the others are the
    same everywhere, but where a PartitionSpec says how they are divided (see `expert_specs` and `cache_specs`).
    """
    if row_multiple(mesh) * context_shards(mesh) == 1:
        return function
    specs = {True: PartitionSpec(ROWS), False: PartitionSpec()}

    def spec(of: Any) -> PartitionSpec:
        return of if isinstance(of, PartitionSpec) else specs[of]

    def is_spec(of: Any) -> bool:
        return isinstance(of, PartitionSpec)

    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=jax.tree.map(spec, inputs, is_leaf=is_spec),
        out_specs=jax.tree.map(spec, outputs, is_leaf=is_spec),
        axis_names={*ROWS, CONTEXT},
        check_vma=False,
    )


def expert_specs(mesh: Mesh | None, tree: Params, names: Sequence[str], experts: int) -> Params:
    """Returns how the leaves below `names`, with a first axis of experts, and all others are given to `over_rows`."""
    divided = PartitionSpec("expert") if expert_shards(mesh, experts) > 1 else PartitionSpec()

    def spec(path: tuple, _: Any) -> PartitionSpec:
        own = any(getattr(key, "key", None) in names for key in path)
        return divided if own else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, tree)


def shares(mesh: Mesh | None, axis: str) -> int:
    """Returns the size of an axis of the mesh, 1 where there is none."""
    return mesh.shape[axis] if mesh is not None else 1


def inner_specs(tree: Params, inner: Mapping[tuple[str, str], int]) -> Params:
    """Returns how the leaves of a tree are given to `over_tensor`: whole, or divided on the axis that `inner` names by
    the last two names of their path."""

    def spec(path: tuple, leaf: Any) -> PartitionSpec:
        at = inner.get((path[-2].key, path[-1].key))
        return (
            PartitionSpec() if at is None else PartitionSpec(*[None] * (leaf.ndim + at), "tensor")
        )

    return jax.tree_util.tree_map_with_path(spec, tree)


def over_tensor(mesh: Mesh | None, function: Callable[..., Any], specs: Any) -> Callable[..., Any]:
    """Returns function(tree, x) as each device of the axis `tensor` runs it on its part of the tree, which lies as
    `specs` say, inside of `over_rows` too; results are the same on all of them."""
    around = jax.sharding.get_abstract_mesh()
    return jax.shard_map(
        function,
        mesh=around if "tensor" in around.axis_names else mesh,
        in_specs=(specs, PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names={"tensor"},
        check_vma=False,
    )


def over_heads(
    mesh: Mesh | None, function: Callable[..., jax.Array], kv_heads: int
) -> Callable[..., jax.Array]:
    """Returns attention (q_BTHC, k_BTKC, v_BTKC, layout, window, sinks_H) as each device runs it on its rows and heads.

    For kernels that the compiler cannot share out. Heads that `tensor` does not divide are computed on each of its
    devices.
    """
    if mesh is None or mesh.size == 1:
        return function
    of_heads = PartitionSpec("tensor" if kv_heads % mesh.shape["tensor"] == 0 else None)
    heads = PartitionSpec(ROWS, None, *of_heads)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(heads, heads, heads, PartitionSpec(ROWS), PartitionSpec(), of_heads),
        out_specs=heads,
        check_vma=False,
    )
