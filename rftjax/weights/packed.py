"""Tensors that a checkpoint stores in another form than the name tables say, read as those: experts that are fused into
one tensor, and weights in 8 or 4 bits with a scale for each block; and fused experts of an export."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from rftjax.errors import UserError
from rftjax.models.config import Config
from rftjax.types import Params
from rftjax.weights.shards import BYTES, FP8, Readers, Stored

SCALE = "_scale_inv"  # behind the name of a weight, of what its blocks are multiplied with
FUSED = re.compile(r"^(?P<experts>.*\.experts)\.(?P<part>gate_up_proj|down_proj)(?P<bias>_bias)?$")
FP8_FIELDS = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None),  # of kernels in 8 bits: here the weights alone are
}
MXFP4_BLOCKS, MXFP4_SCALES = "_blocks", "_scales"
MXFP4_FIELDS = {"quant_method", "modules_to_not_convert", "dequantize"}
# The numbers of 4 bits: a sign, two bits of exponent and one of fraction (OCP Microscaling Formats 1.0).
MAGNITUDES = np.asarray([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
E2M1 = np.concatenate([MAGNITUDES, -MAGNITUDES])
FP8_HARMLESS = {"modules_to_not_convert", "weight_block_size", "scale_fmt", "dequantize"}


def block_of(fields: dict[str, Any]) -> tuple[int, int]:
    """Returns the block (rows, columns) of a config's quantisation, (0, 0) where there is none; refuses other kinds."""
    given = fields.get("quantization_config")
    if given is None or mxfp4(fields):
        return 0, 0
    given = given if isinstance(given, dict) else {}
    block = given.get("weight_block_size")
    known = (
        isinstance(block, list)
        and len(block) == 2
        and all(isinstance(size, int) and size > 0 for size in block)
        and all(given.get(name) in exact for name, exact in FP8_FIELDS.items())
        and not set(given) - set(FP8_FIELDS) - FP8_HARMLESS
    )
    if not isinstance(block, list) or not known:
        raise UserError(
            f"config.json: quantization_config={given!r} is not implemented; rftjax reads fp8 (e4m3) in blocks"
            " (weight_block_size), and mxfp4: use the unquantised checkpoint of this model"
        )
    return block[0], block[1]


def mxfp4(fields: dict[str, Any]) -> bool:
    """Whether a config says that experts are stored as MXFP4."""
    given = fields.get("quantization_config")
    if not isinstance(given, dict) or set(given) - MXFP4_FIELDS:
        return False
    return given.get("quant_method") == "mxfp4"


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A weight in 8 bits times the scale of its block, in float32."""

    name: str
    weight: Stored
    scale: Stored
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def __call__(self) -> np.ndarray:
        return self._product(self.weight(), self.scale())

    def part(self, index: int) -> np.ndarray:
        """Returns one entry of the first axis."""
        return self._product(self.weight.part(index), self.scale.part(index))

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Returns some rows of a matrix."""
        high, wide = self.block
        self._check()
        scale = self.scale.rows(start // high, -(-stop // high)).astype(np.float32)
        each = np.repeat(scale[np.arange(start, stop) // high - start // high], wide, -1)
        return self.weight.rows(start, stop).astype(np.float32) * each[:, : self.shape[1]]

    def _check(self) -> None:
        rows, columns = self.weight.shape[-2:]
        high, wide = self.block
        if self.scale.shape[-2:] != (-(-rows // high), -(-columns // wide)):
            raise UserError(
                f"model.path: tensor {self.name}{SCALE} has shape {self.scale.shape}, {self.name} of shape {self.shape}"
                f" in blocks of {high} x {wide} asks for another; use the config.json that belongs to these weights"
            )

    def _product(self, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
        self._check()
        rows, columns = weight.shape[-2:]
        high, wide = self.block
        each = np.repeat(np.repeat(scale.astype(np.float32), high, -2), wide, -1)
        return weight.astype(np.float32) * each[..., :rows, :columns]


@dataclasses.dataclass(frozen=True)
class Mxfp4:
    """Experts (E, inputs, outputs) of 4-bit numbers: blocks (E, outputs, inputs / 32, 16 bytes), the low half of a byte
    first, each block times two to the power of its scale less 127."""

    blocks: Stored
    scales: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        experts, outputs, count, size = self.blocks.shape
        return experts, count * size * 2, outputs

    def __call__(self) -> np.ndarray:
        return np.stack([self.part(index) for index in range(self.shape[0])])

    def part(self, index: int) -> np.ndarray:
        """Returns one expert (inputs, outputs)."""
        packed, scales = self.blocks.part(index), self.scales.part(index)
        values = np.empty((*packed.shape, 2), np.float32)
        values[..., 0], values[..., 1] = E2M1[packed & 15], E2M1[packed >> 4]
        values = values.reshape(*packed.shape[:2], -1)
        values = np.ldexp(values, scales[..., None].astype(np.int32) - 127)
        return values.reshape(packed.shape[0], -1).T


@dataclasses.dataclass(frozen=True)
class Expert:
    """One expert's matrix (outputs, inputs), or bias, in a fused tensor: some of its outputs."""

    fused: Stored | Scaled | Mxfp4
    index: int
    outputs: slice
    turned: bool  # the fused tensor has inputs before outputs

    def __call__(self) -> np.ndarray:
        whole = self.fused.part(self.index)
        return (whole.T if self.turned else whole)[self.outputs]


def dequantised(readers: Readers, fields: dict[str, Any]) -> Readers:
    """Returns readers of the weights that 8-bit ones and their scales stand for; refuses ones without a scale."""
    block, found = block_of(fields), dict(readers)
    for name, reader in readers.items():
        if not isinstance(reader, Stored) or reader.kind != FP8:
            continue
        scale = found.pop(name + SCALE, None)
        if not isinstance(scale, Stored) or not block[0]:
            missing = name + SCALE if block[0] else "quantization_config in config.json"
            raise UserError(
                f"model.path={reader.path}: tensor {name} is stored as {FP8}, and there is no {missing}; rftjax reads"
                " it with the scales of its blocks only: use the checkpoint before quantisation"
            )
        found[name] = Scaled(name, reader, scale, block)
    for name in [name for name in found if name.endswith(MXFP4_BLOCKS)] if mxfp4(fields) else []:
        stem = name.removesuffix(MXFP4_BLOCKS)
        blocks, scales = found.pop(name), found.pop(stem + MXFP4_SCALES, None)
        if (
            not isinstance(blocks, Stored)
            or not isinstance(scales, Stored)
            or {blocks.kind, scales.kind} != {BYTES}
            or len(blocks.shape) != 4
            or scales.shape != blocks.shape[:3]
        ):
            raise UserError(
                f"model.path: {name} has no {stem}{MXFP4_SCALES} of one byte for each of its blocks; download the model"
                " again"
            )
        found[stem] = Mxfp4(blocks, scales)
    if strange := [
        name for name, one in found.items() if isinstance(one, Stored) and one.kind == BYTES
    ]:
        raise UserError(
            f"model.path: tensor {strange[0]} is stored as {BYTES}, which rftjax reads as blocks of mxfp4 only"
            " (quantization_config in config.json): use the checkpoint before quantisation"
        )
    return found


def without_predictors(readers: Readers, config: Config, fields: dict[str, Any]) -> Readers:
    """Returns the readers without layers behind the last one, which predict further tokens and are not trained here."""
    count = fields.get("num_nextn_predict_layers") or fields.get("num_mtp_layers") or 0
    behind = tuple(f"model.layers.{config.layers + at}." for at in range(count))
    return {name: read for name, read in readers.items() if not name.startswith(behind)}


def unfused(readers: Readers, config: Config) -> Readers:
    """Returns readers of single experts: a fused tensor holds all experts, gate_up_proj the two maps one behind the
    other, or their outputs in turn. Inputs may stand first, which the shape tells; where both fit, outputs do, as in
    transformers, but for maps in turn."""
    found: Readers = {}
    routing = config.routing
    for name, reader in readers.items():
        match = FUSED.match(name)
        if not match or not isinstance(reader, Stored | Scaled | Mxfp4) or not routing.experts:
            found[name] = reader
            continue
        F, D, both = routing.ffn, config.width, match["part"] == "gate_up_proj"
        own = (2 * F, D) if both else (D, F)
        forms = [own[:1]] if match["bias"] else [own, own[::-1]][routing.interleaved :]
        if reader.shape not in [(routing.experts, *form) for form in forms]:
            raise UserError(
                f"model.path: tensor {name} has shape {reader.shape}, the config asks for"
                f" {(routing.experts, *forms[0])}; use the config.json that belongs to these weights"
            )
        parts = {"down_proj": slice(None)}
        if both:
            halves = (slice(0, None, 2), slice(1, None, 2)), (slice(F), slice(F, None))
            parts = dict(
                zip(("gate_proj", "up_proj"), halves[not routing.interleaved], strict=True)
            )
        turned = not match["bias"] and (routing.interleaved or reader.shape[1:] != own)
        for part, outputs in parts.items():
            for index in range(routing.experts):
                single = (
                    f"{match['experts']}.{index}.{part}.{'bias' if match['bias'] else 'weight'}"
                )
                found[single] = Expert(reader, index, outputs, turned)
    return found


def is_fused(config: Config, path: tuple[str, ...]) -> bool:
    """Whether an export has the leaf of a path in a fused tensor."""
    return config.routing.interleaved and path[-2].startswith("experts_")


def fused(config: Config, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of an export that hold a layer's experts: inputs first, outputs of gate and up in turn."""
    for stack in config.stacks if config.routing.interleaved else ():
        mlp = params[stack.name]["mlp"]
        for at in range(stack.count):
            stem = f"model.layers.{stack.first + at}.mlp.experts."
            for leaf, ending in (("kernel", ""), ("bias", "_bias")):
                gate, up, down = (
                    np.asarray(mlp[f"experts_{part}"][leaf][at]) for part in ("gate", "up", "down")
                )
                both = np.stack([gate, up], axis=-1).reshape(*gate.shape[:-1], -1)
                yield f"{stem}gate_up_proj{ending}", both
                yield f"{stem}down_proj{ending}", down
