"""Run a TensorFlow.js graph model (a .json of nodes, .bin files of weights) in torch: data in, tensors out, no code.

Convolutional networks of one picture, as pose detectors are published: OPS is the table of what is understood. Tensors
are (1, H, W, C) between nodes, as in the file. Everything is evaluated in the order the file lists it.
"""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

Value = Tensor | list[Tensor]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"Relu": nnf.relu, "Relu6": nnf.relu6}


def _text(attribute: Any) -> str:
    return base64.b64decode(attribute).decode()


def _numbers(attributes: dict[str, Any], name: str, default: tuple[int, ...]) -> list[int]:
    return [int(v) for v in attributes.get(name, {}).get("list", {}).get("i", default)]


def _convolution(x: Tensor, weight: Tensor, *others: Tensor, attributes: dict[str, Any], depthwise: bool) -> Tensor:
    """Convolve (1, H, W, C) with (h, w, in, out), or (h, w, C, n) depthwise; then what is fused: bias, activation."""
    strides = _numbers(attributes, "strides", (1, 1, 1, 1))[1:3]
    dilations = _numbers(attributes, "dilations", (1, 1, 1, 1))[1:3]
    kernel = weight.permute(2, 3, 0, 1).reshape(-1, 1, *weight.shape[:2]) if depthwise else weight.permute(3, 2, 0, 1)
    x = x.permute(0, 3, 1, 2)
    if _text(attributes["padding"]["s"]) == "SAME":  # more behind than in front where it does not come out even
        sides = []
        for axis in (1, 0):
            length, reach = x.shape[2 + axis], (weight.shape[axis] - 1) * dilations[axis] + 1
            total = max((-(-length // strides[axis]) - 1) * strides[axis] + reach - length, 0)
            sides += [total // 2, total - total // 2]
        x = nnf.pad(x, sides)
    y = nnf.conv2d(x, kernel, stride=strides, dilation=dilations, groups=x.shape[1] if depthwise else 1)
    y, rest = y.permute(0, 2, 3, 1), list(others)
    for fused in map(_text, attributes.get("fused_ops", {}).get("list", {}).get("s", [])):
        y = y + rest.pop(0) if fused == "BiasAdd" else _ACTIVATIONS[fused](y)
    return y


def _resized(x: Tensor, size: Tensor, attributes: dict[str, Any]) -> Tensor:
    """Bilinear; the corners are aligned, the pixels' centres are, or neither, which is TensorFlow's old way."""
    corners = bool(attributes.get("align_corners", {}).get("b"))
    if not corners and not attributes.get("half_pixel_centers", {}).get("b"):
        raise ValueError("a bilinear resize that aligns neither corners nor centres is not understood")
    height, width = (int(v) for v in size)
    y = nnf.interpolate(x.permute(0, 3, 1, 2), (height, width), mode="bilinear", align_corners=corners)
    return y.permute(0, 2, 3, 1)


def _squeezed(x: Tensor, attributes: dict[str, Any]) -> Tensor:
    axes = _numbers(attributes, "squeeze_dims", ())
    return x.squeeze(tuple(axes)) if axes else x.squeeze()


def _axis(attributes: dict[str, Any]) -> int:
    return int(attributes.get("axis", {}).get("i", 0))


def _cast(x: Tensor, attributes: dict[str, Any]) -> Tensor:
    return x.to({"DT_FLOAT": torch.float32, "DT_INT32": torch.int64}[attributes["DstT"]["type"]])


# Each is called as (*inputs, attributes).
OPS: dict[str, Callable[..., Value]] = {
    "_FusedConv2D": lambda x, w, *rest: _convolution(x, w, *rest[:-1], attributes=rest[-1], depthwise=False),
    "FusedDepthwiseConv2dNative": lambda x, w, *r: _convolution(x, w, *r[:-1], attributes=r[-1], depthwise=True),
    "DepthwiseConv2dNative": lambda x, w, a: _convolution(x, w, attributes=a, depthwise=True),
    "AddV2": lambda x, y, a: x + y,
    "Sub": lambda x, y, a: x - y,
    "Mul": lambda x, y, a: x * y,
    "RealDiv": lambda x, y, a: x / y,
    "FloorDiv": lambda x, y, a: torch.div(x, y, rounding_mode="floor"),
    "SquaredDifference": lambda x, y, a: (x - y).square(),
    "Sqrt": lambda x, a: x.sqrt(),
    "Sigmoid": lambda x, a: x.sigmoid(),
    "Identity": lambda x, a: x,
    "Cast": _cast,
    "ExpandDims": lambda x, axis, a: x.unsqueeze(int(axis)),
    "Squeeze": _squeezed,
    "Reshape": lambda x, shape, a: x.reshape([int(v) for v in shape]),
    "ConcatV2": lambda *v: torch.cat([x.to(v[0].dtype) for x in v[:-2]], int(v[-2])),
    "Pack": lambda *v: torch.stack(v[:-1], _axis(v[-1])),
    "Unpack": lambda x, a: list(x.unbind(_axis(a))),
    "ArgMax": lambda x, axis, a: x.argmax(int(axis)),
    "GatherNd": lambda x, indices, a: x[tuple(indices.long().unbind(-1))],
    "ResizeBilinear": _resized,
}


def _weights(manifest: list[dict[str, Any]], folder: Path) -> dict[str, Tensor]:
    """Read the weights that a manifest lists, those kept in half precision as floats."""
    found = {}
    for group in manifest:
        data, offset = b"".join((folder / Path(p).name).read_bytes() for p in group["paths"]), 0
        for entry in group["weights"]:
            kept = entry.get("quantization", {}).get("dtype", entry["dtype"])
            if kept not in ("float32", "float16", "int32"):
                raise ValueError(f"weight {entry['name']} is kept as {kept!r}: only floats and int32 are understood")
            count = int(np.prod(entry["shape"]))
            array = np.frombuffer(data, np.dtype(kept), count, offset).reshape(entry["shape"])
            offset += array.nbytes
            found[entry["name"]] = torch.from_numpy(array.astype(np.float32 if "float" in kept else np.int64))
    return found


class GraphModel:
    """A graph model as a function of one tensor, the list of its outputs.

    ValueError for a node that OPS does not list.
    """

    def __init__(self, path: Path) -> None:
        model = json.loads(path.read_text())
        self._nodes = model["modelTopology"]["node"]
        if unknown := sorted({n["op"] for n in self._nodes} - {*OPS, "Const", "Placeholder"}):
            raise ValueError(f"{path} has nodes {unknown}: choose a model of {sorted(OPS)}")
        self._weights = _weights(model["weightsManifest"], path.parent)
        self._outputs = [output["name"] for output in model["signature"]["outputs"].values()]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> list[Tensor]:
        values: dict[str, Value] = {}

        def value(reference: str) -> Tensor:
            name, _, place = reference.partition(":")
            found = values[name]
            return found[int(place or 0)] if isinstance(found, list) else found

        for node in self._nodes:
            if node["op"] == "Const":
                values[node["name"]] = self._weights[node["name"]]
            elif node["op"] == "Placeholder":
                values[node["name"]] = x
            else:
                inputs = [value(r) for r in node.get("input", []) if not r.startswith("^")]
                values[node["name"]] = OPS[node["op"]](*inputs, node.get("attr", {}))
        return [value(name) for name in self._outputs]
