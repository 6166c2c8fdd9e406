"""The cases of wan_step.py: shapes of Wan2.1, ways to train, the order they are measured in, and what is aimed at."""

from dataclasses import dataclass
from typing import Any

from entprog.plan import spread
from entprog.profiling import Profile
from entprog.schedule import at_least_one


@dataclass(frozen=True)
class Shape:
    """A Wan transformer and what it is given."""

    heads: int
    head_dim: int
    layers: int
    ffn: int
    latent: tuple[int, ...] = (1, 16, 21, 60, 104)
    text: tuple[int, ...] = (1, 512, 4096)
    rank: int = 64

    def config(self) -> dict[str, Any]:
        """Arguments of diffusers' WanTransformer3DModel."""
        return {
            "num_attention_heads": self.heads, "attention_head_dim": self.head_dim, "num_layers": self.layers,
            "ffn_dim": self.ffn, "in_channels": self.latent[1], "out_channels": self.latent[1],
            "text_dim": self.text[2], "freq_dim": 256, "cross_attn_norm": True,
        }  # fmt: skip


SHAPES = {"1.3B": Shape(12, 128, 30, 8960), "14B": Shape(40, 128, 40, 13824)}
_SMALL = {"latent": (1, 16, 3, 32, 32), "text": (1, 32, 64), "rank": 8}
TWINS = {"1.3B": Shape(4, 64, 12, 1024, **_SMALL), "14B": Shape(6, 64, 12, 1536, **_SMALL)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    """One way to train. `share` of the blocks trains; the others run in `mode`, their weights kept in `precision`."""

    model: str
    method: str  # full, lora, blocks
    share: float = 1.0
    mode: str = "bypass"
    precision: str = "bf16"
    checkpointing: str = "block"  # or "parts" of it, attention and feed-forward one by one, or "none"
    suffix: bool = False  # the last blocks train; otherwise they are spread evenly
    in_backward: bool = False  # gradients are freed as they come
    optimizer: str = "adamw"

    def name(self) -> str:
        """Return the case in words, which is also its key in the results."""
        parts = [self.model, self.method if self.method != "blocks" else f"m/L {self.share:g} {self.mode}"]
        parts += [self.precision] if self.method == "blocks" else []
        parts += ["last blocks"] if self.suffix else []
        parts += [{"block": "checkpointing", "none": "no checkpointing"}.get(self.checkpointing, "checkpointing parts")]
        parts += ["step in backward"] if self.in_backward else []
        parts += [self.optimizer] if self.optimizer != "adamw" else []
        return ", ".join(parts)


def cases() -> list[Case]:
    """Return every case, the most important first."""
    small, large = "1.3B", "14B"
    rows = [Case(small, "full"), Case(small, "blocks", 0.25), Case(small, "blocks", 0.1)]
    rows += [Case(small, "lora"), Case(small, "blocks", 0.25, "pass")]
    rows += [Case(small, "blocks", 0.25, precision=p, in_backward=True) for p in ("int8", "cpu")]
    rows += [Case(small, "blocks", 0.25, precision="int8", checkpointing="parts", in_backward=True)]
    rows += [Case(small, "blocks", s, checkpointing="none") for s in (0.1, 0.25)]
    rows += [Case(small, "blocks", 0.25, precision=p) for p in ("int8", "fp8", "cpu")]
    rows += [Case(small, "blocks", 0.25, "prefix", suffix=True), Case(small, "blocks", 0.25, "bypass_attn")]
    rows += [Case(large, "blocks", 0.25), Case(large, "blocks", 0.25, precision="int8", in_backward=True)]
    rows += [Case(small, "blocks", 0.1, precision=p) for p in ("int8", "fp8", "cpu")]
    rows += [Case(large, "blocks", 0.1, precision="int8", in_backward=True)]
    rows += [Case(large, "full", in_backward=True, optimizer="sgd")]  # AdamW's state does not fit; time only
    rows += [Case(large, "blocks", 0.25, precision="cpu", in_backward=True), Case(large, "lora")]
    rows += [Case(large, "blocks", 0.25, precision="int8", checkpointing="parts", in_backward=True)]
    rows += [Case(small, "blocks", s, precision=p, checkpointing="none") for s in (0.1, 0.25) for p in ("int8", "fp8", "cpu")]  # fmt: skip  # noqa: E501
    rows += [Case(large, "blocks", 0.1), Case(large, "blocks", 0.1, precision="int8", checkpointing="none")]
    return [*rows, Case(large, "blocks", 0.25, "pass"), Case(small, "full", checkpointing="none")]


# (what, case, kind of figure, at least / at most)
FIT = "1.3B, m/L 0.25 bypass, int8, checkpointing, step in backward"
TARGETS = [
    ("speed-up at m/L .25", "1.3B, m/L 0.25 bypass, bf16, checkpointing", "speedup", 2.3),
    ("speed-up at m/L .10", "1.3B, m/L 0.1 bypass, bf16, checkpointing", "speedup", 3.0),
    ("GB at m/L .25, 1.3B", FIT, "gb", 8.0),
    ("GB at m/L .25, 1.3B", FIT.replace("int8", "cpu"), "gb", 8.0),
    ("GB at m/L .25, 14B", FIT.replace("1.3B", "14B"), "gb", 48.0),
]


def active_of(case: Case, count: int) -> list[int]:
    """Return the indices of the blocks that train."""
    wanted = at_least_one(case.share, count)
    return list(range(count - wanted, count)) if case.suffix else spread(count, wanted)


def bound_of(case: Case, measured: Profile) -> dict[str, Any]:
    """Return the FLOPs of a step and the bytes it should hold, counted on the meta device."""
    names = list(measured.blocks)
    trained = {names[i] for i in active_of(case, len(names))} if case.method == "blocks" else set(names)
    modes = {n: "train" if n in trained else case.mode for n in names}
    outside = {"full": "all", "lora": "none"}.get(case.method, "always")
    cost = measured.step(modes, outside=outside, checkpointing=case.checkpointing, lora=case.method == "lora")
    width = sum(measured.bytes.values()) / sum(measured.blocks.values())
    frozen = [n for n in names if n not in trained]
    frozen = frozen[:2] if case.precision == "cpu" else frozen  # the ring
    stored = {"int8": 1.0, "fp8": 1.0, "bf16": 2.0}.get(case.precision, width)
    weights = measured.outside[1] + sum(measured.bytes[n] for n in trained)
    weights += int(min(stored, width) * sum(measured.blocks[n] for n in frozen))
    outside_bytes = {"all": measured.outside[1], "always": measured.always[1], "none": 0}[outside]
    held = sum(measured.bytes[n] for n in trained) + outside_bytes
    if case.method == "lora":
        held = int(sum(measured.adapters.values()) * width)
        weights += held
    state = 0 if case.optimizer == "sgd" else 2 * held
    gradients = 0 if case.in_backward else held
    total = weights + gradients + state + cost["activations"] + cost["recompute"]
    return {"flops": cost["flops"], "predicted": total}
