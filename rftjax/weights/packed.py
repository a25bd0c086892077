"""Tensors that a checkpoint stores in another form than the name tables say, read as those: experts that are fused into
one tensor, and weights in 8 bits with a scale for each block."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from rftjax.errors import UserError
from rftjax.models.config import Config
from rftjax.weights.shards import FP8, Readers, Stored

SCALE = "_scale_inv"  # behind the name of a weight, of what its blocks are multiplied with
FUSED = re.compile(r"^(?P<experts>.*\.experts)\.(?P<part>gate_up_proj|down_proj)$")
FP8_FIELDS = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None),  # of kernels in 8 bits: here the weights alone are
}
FP8_HARMLESS = {"modules_to_not_convert", "weight_block_size", "scale_fmt", "dequantize"}


def block_of(fields: dict[str, Any]) -> tuple[int, int]:
    """Returns the block (rows, columns) of a config's quantisation, (0, 0) where there is none; refuses other kinds."""
    given = fields.get("quantization_config")
    if given is None:
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
            " (weight_block_size): use the unquantised checkpoint of this model"
        )
    return block[0], block[1]


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

    def _product(self, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
        rows, columns = weight.shape[-2:]
        high, wide = self.block
        if scale.shape[-2:] != (-(-rows // high), -(-columns // wide)):
            raise UserError(
                f"model.path: tensor {self.name}{SCALE} has shape {scale.shape}, {self.name} of shape {weight.shape} in"
                f" blocks of {high} x {wide} asks for another; use the config.json that belongs to these weights"
            )
        each = np.repeat(np.repeat(scale.astype(np.float32), high, -2), wide, -1)
        return weight.astype(np.float32) * each[..., :rows, :columns]


@dataclasses.dataclass(frozen=True)
class Expert:
    """One expert's matrix (outputs, inputs) in a fused tensor, from `first` to `last` of its outputs."""

    fused: Stored | Scaled
    index: int
    first: int
    last: int
    turned: bool  # the fused tensor has inputs before outputs

    def __call__(self) -> np.ndarray:
        whole = self.fused.part(self.index)
        return (whole.T if self.turned else whole)[self.first : self.last]


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
    return found


def without_predictors(readers: Readers, config: Config, fields: dict[str, Any]) -> Readers:
    """Returns the readers without layers behind the last one, which predict further tokens and are not trained here."""
    count = fields.get("num_nextn_predict_layers") or fields.get("num_mtp_layers") or 0
    behind = tuple(f"model.layers.{config.layers + at}." for at in range(count))
    return {name: read for name, read in readers.items() if not name.startswith(behind)}


def unfused(readers: Readers, config: Config) -> Readers:
    """Returns readers of single experts: a fused tensor holds all experts, gate_up_proj the two maps one behind the
    other. Inputs may stand first, which the shape tells; where both fit, outputs do, as in transformers."""
    found: Readers = {}
    routing = config.routing
    for name, reader in readers.items():
        match = FUSED.match(name)
        if not match or not isinstance(reader, Stored | Scaled) or not routing.experts:
            found[name] = reader
            continue
        F, D = routing.ffn, config.width
        own = (2 * F, D) if match["part"] == "gate_up_proj" else (D, F)
        if reader.shape not in ((routing.experts, *own), (routing.experts, *own[::-1])):
            raise UserError(
                f"model.path: tensor {name} has shape {reader.shape}, the config asks for"
                f" {(routing.experts, *own)}; use the config.json that belongs to these weights"
            )
        parts = {"down_proj": (0, D)}
        if match["part"] == "gate_up_proj":
            parts = {"gate_proj": (0, F), "up_proj": (F, 2 * F)}
        turned = reader.shape[1:] != own
        for part, (first, last) in parts.items():
            for index in range(routing.experts):
                single = f"{match['experts']}.{index}.{part}.weight"
                found[single] = Expert(reader, index, first, last, turned)
    return found
