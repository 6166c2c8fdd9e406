"""docs/models.md is what these checks find on every model of the zoo. `python tests/test_zoo.py --write` renews it."""

import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor
from zoo import ZOO, build, tensors

from entprog.blocks import Block, find_blocks
from entprog.modes import set_active, skip

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
HEADER = (
    "class", "lists of blocks", "blocks", "share", "skip", "bypass forward", "gradients", "step", "saved", "no example"
)  # fmt: skip


def run(model, inputs) -> list[Tensor]:
    return tensors(model(**inputs))


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest absolute difference; infinite for outputs of other shapes."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@contextmanager
def without_branch(block: Block):
    """The slow obvious way: the block's weights are zero during its own calls, but for a UNet's projecting shortcut."""
    named = [(n, p) for n, p in block.module.named_parameters() if "conv_shortcut" not in n]
    values = [p.detach().clone() for _, p in named]

    def clear(module, args):
        for _, p in named:
            p.zero_()

    def restore(module, args, output):
        for (_, p), value in zip(named, values, strict=True):
            p.copy_(value)

    handles = block.module.register_forward_pre_hook(clear), block.module.register_forward_hook(restore)
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def skip_error(model, inputs, blocks: list[Block]) -> float:
    """Largest difference between leaving a block out and zeroing its branch, over all blocks."""
    normal, worst = run(model, inputs), 0.0
    for block in blocks:
        with skip(block):
            skipped = run(model, inputs)
        with without_branch(block):
            worst = max(worst, difference(skipped, run(model, inputs)))
        assert difference(skipped, normal) > 0, f"{block.name} does something, so leaving it out must show"
    assert difference(run(model, inputs), normal) == 0, "nothing is left behind"
    return worst


def bypass_error(model, inputs, blocks: list[Block]) -> float:
    """Difference of the forward pass with every block bypassed."""
    normal = [t.detach() for t in run(model, inputs)]
    set_active(blocks, [], frozen="bypass")
    return difference([t.detach() for t in run(model, inputs)], normal)


def gradients(model, inputs) -> dict[str, Tensor]:
    """Gradients of a squared error, of the parameters where they are not zero."""
    generator = torch.Generator().manual_seed(7)
    loss = sum((t - torch.randn(t.shape, generator=generator)).square().mean() for t in run(model, inputs))
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, grads, strict=True) if g is not None and g.any()}


def some_blocks(blocks: list[Block]) -> list[Block]:
    """A random third of the blocks and the last, which alone reads what two-stream models carry along to the end."""
    drawn = torch.rand(len(blocks), generator=torch.Generator().manual_seed(1)) < 1 / 3
    return [b for b, taken in zip(blocks, drawn.tolist(), strict=True) if taken or b is blocks[-1]]


def cut(model, inputs, blocks: list[Block]) -> str:
    """Which trainable parameters of blocks lose their gradient when the other blocks run cheaply; prefix is exact."""
    active = some_blocks(blocks)
    found = {}
    for mode in ("pass", "prefix", "bypass"):
        set_active(blocks, active, frozen=mode)
        found[mode] = gradients(model, inputs)
    exact = found["pass"]
    assert exact.keys() == found["prefix"].keys()
    assert all(torch.equal(g, found["prefix"][n]) for n, g in exact.items()), "prefix is exact"
    inside = [n for n in exact if any(n.startswith(f"{b.name}.") for b in active)]
    assert inside
    lost = [n for n in inside if n not in found["bypass"]]
    return f"{len(lost)} lost" if lost else "all"


def step_is_right(model, inputs, blocks: list[Block]) -> bool:
    """One AdamW step with decay moves what trains and has a gradient, and nothing else."""
    for p in model.parameters():
        p.requires_grad_(False)
    set_active(blocks, some_blocks(blocks), frozen="bypass")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    loss = sum(t.square().mean() for t in run(model, inputs))
    loss.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    return bool(moved) and moved == reached and all(p.requires_grad for n, p in model.named_parameters() if n in moved)


@torch.no_grad()
def saved_and_loaded(model, inputs, blocks: list[Block], keys: list[str], folder: Path) -> bool:
    """After all modes, what save_pretrained wrote loads as the same model, with the keys it always had."""
    during = list(model.state_dict())
    set_active(blocks, blocks)
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).eval()
    # memory-mapped weights start at other addresses, where a matrix product may round otherwise
    same = difference(run(loaded, inputs), run(model, inputs)) < 1e-5
    same &= all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    clean = not any("forward" in vars(m) for m in model.modules())
    return same and clean and during == keys == list(model.state_dict()) == list(loaded.state_dict())


def without_example(model, blocks: list[Block]) -> str:
    """How find_blocks differs when it is given no example."""
    names, plain = [b.name for b in blocks], [b.name for b in find_blocks(model)]
    if set(names) == set(plain):
        return "same" if names == plain else "other order"
    extra, missing = sorted(set(plain) - set(names)), sorted(set(names) - set(plain))
    return "; ".join(f"{word} {', '.join(lists_of(n))}" for word, n in (("also", extra), ("not", missing)) if n)


def lists_of(names: list[str]) -> list[str]:
    counts = Counter(re.sub(r"\.\d+(?=\.)", ".*", name.rpartition(".")[0]) for name in names)
    return [f"`{name}` {count}" for name, count in counts.items()]


def row(name: str, folder: Path) -> str:
    """One line of the table, every cell measured."""
    model, inputs = build(name)
    blocks, keys = find_blocks(model, inputs), list(model.state_dict())
    inside = {id(p): p.numel() for b in blocks for p in b.module.parameters()}
    names = [b.name for b in blocks]
    assert not any(a != b and a.startswith(f"{b}.") for a in names for b in names), "none lies inside another"
    assert [b.index for b in blocks] == list(range(len(blocks)))
    cells = [
        name,
        ", ".join(lists_of(names)),
        len(blocks),
        f"{sum(inside.values()) / sum(p.numel() for p in model.parameters()):.2f}",
        f"{skip_error(model, inputs, blocks):g}",
        f"{bypass_error(model, inputs, blocks):g}",
        cut(model, inputs, blocks),
        "ok" if step_is_right(model, inputs, blocks) else "WRONG",
        "ok" if saved_and_loaded(model, inputs, blocks, keys, folder) else "WRONG",
        without_example(model, blocks),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


LONG = ("UNetMotionModel", "UNetSpatioTemporalConditionModel", "UNet3DConditionModel")  # ten seconds each


def is_row(line: str) -> bool:
    return line.split(" | ")[0][2:] in ZOO


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in ZOO])
def test_the_page_says_what_is_measured(name, tmp_path):
    measured = row(name, tmp_path)
    assert re.search(r"\| 0 \| 0 \| all \| ok \| ok \|", measured), measured
    assert measured in PAGE.read_text().splitlines(), "stale: python tests/test_zoo.py --write"


def test_the_page_has_one_row_for_every_model():
    rows = [line.split(" | ")[0][2:] for line in PAGE.read_text().splitlines() if is_row(line)]
    assert rows == list(ZOO)
    assert len(rows) >= 28
    assert "| " + " | ".join(HEADER) + " |" in PAGE.read_text()


@pytest.mark.slow
def test_blocks_do_not_depend_on_hash_order():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from zoo import build; from entprog.blocks import find_blocks; "
        "print([(b.name, b.outputs, b.shared) for name in sys.argv[2:] for b in find_blocks(*build(name))])"
    )
    names = ["FluxTransformer2DModel", "UNetMotionModel"]
    found = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parent), *names],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1 and "slots" in found.pop()


def write() -> None:
    """Measure every model and put the table into the page; the text around it stays."""
    import tempfile

    lines = PAGE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| class |"))
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    table = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    for name in ZOO:
        with tempfile.TemporaryDirectory() as folder:
            table.append(row(name, Path(folder)))
            print(table[-1])
    PAGE.write_text("\n".join([*lines[:start], *table, *lines[end:]]) + "\n")


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    torch.set_num_threads(1)
    write()
