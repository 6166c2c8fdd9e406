"""What tests/test_parallel.py runs in two processes, and in one for comparison. Every function returns plain data."""

import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import Plain, _wan
from torch.distributed.fsdp import MixedPrecisionPolicy

import entprog
from entprog import EntProg, Progressive, parallel
from entprog.blocks import forked_rng
from entprog.modes import running, set_active

RANKS = 2


def part(batch, alone):
    """This rank's rows of a batch, all of them where one process works alone."""
    if alone:
        return batch
    size = len(next(iter(batch.values()))) // RANKS
    return {k: v[dist.get_rank() * size : (dist.get_rank() + 1) * size] for k, v in batch.items()}


def full(value):
    """A tensor that may be sharded, whole and plain."""
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


def whole(model):
    return {n: full(p) for n, p in model.named_parameters()}


def whole_gradients(model):
    return {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def wan(kind):
    """The tiny Wan, no gate zero; ranks begin with different weights, of which rank 0's count."""
    with forked_rng(0 if kind == "alone" else dist.get_rank()):
        model, _ = _wan()
        for p in model.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.05)
    return model


def wan_batch(i):
    g = torch.Generator().manual_seed(i)
    latents, noise = torch.randn(2, 4, 4, 2, 8, 8, generator=g)
    return {"x": latents, "noise": noise, "t": torch.rand(4, generator=g), "text": torch.randn(4, 6, 16, generator=g)}


def wan_inputs(b):
    x_t = torch.lerp(b["x"], b["noise"], b["t"].view(-1, 1, 1, 1, 1))
    return {"hidden_states": x_t, "timestep": 1000 * b["t"], "encoder_hidden_states": b["text"]}


def wan_loss(model, b):
    prediction = model(**wan_inputs(b), return_dict=False)[0]
    return (prediction - (b["noise"] - b["x"])).square().flatten(1).mean(1)


def wan_run(kind):
    """Train through two races, the first with a block that sits out (so with a probe); returns weights and events."""
    alone, model, blocks = kind == "alone", wan(kind), None
    if kind == "hooks":
        entprog.data_parallel(model)
    if kind == "fsdp":
        example = part(wan_batch(0), alone)
        blocks = entprog.find_blocks(model, wan_inputs(example))
        entprog.fully_sharded(model, blocks, lambda: wan_loss(model, example))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = Progressive(
        stages=2, search_budget=3.75, min_fidelity=0.5, grid=(0.34, 0.67), skip=0.34, restore_at=0.75
    )
    prog = EntProg(
        model, wan_loss, blocks=blocks, held_out=[wan_batch(900 + i) for i in range(3)], strategy=settings,
        train_batches=lambda: (part(wan_batch(500 + i), alone) for i in count()), total_steps=16, clock="model",
        t=lambda b: b["t"],
    )  # fmt: skip
    for step in range(16):
        prog.step(step, optimizer)
        wan_loss(model, part(wan_batch(step), alone)).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"weights": whole(model), "events": prog.events}


def plain(kind, depth=4):
    with forked_rng(0 if kind == "alone" else dist.get_rank()):
        return Plain(depth)


def plain_batch(i):
    g = torch.Generator().manual_seed(i)
    return {"x": torch.randn(8, 5, 8, generator=g), "y": torch.randn(8, 5, 8, generator=g)}


def plain_loss(model, b):
    return (model(b["x"]) - b["y"]).square().mean()


def plain_made(kind, depth=4, **options):
    """(model, blocks) of the tiny residual network, made parallel as `kind` says."""
    model = plain(kind, depth)
    blocks = entprog.find_blocks(model, {"x": plain_batch(0)["x"]})
    if kind == "hooks":
        model.sync = entprog.data_parallel(model)
    if kind == "fsdp":
        entprog.fully_sharded(model, blocks, lambda: model(plain_batch(0)["x"]), **options)
    return model, blocks


def plain_scores(kind):
    """Scores of each priority that looks at the model, and a fidelity."""
    model, blocks = plain_made(kind)
    batches = [part(plain_batch(i), kind == "alone") for i in range(3)]
    found = {}
    for name in ("cei", "loss", "block_influence", "grad_norm", "gain", "oracle"):
        predict, loss = (lambda m, b: m(b["x"])), plain_loss
        scores = entprog.score(model, blocks, predict, batches, name, loss_fn=loss)
        found[name] = scores.values
    names = [b.name for b in blocks]
    found["fidelity"] = entprog.fidelity(model, blocks, plain_loss, batches[0], names[:2], names[2:])
    return found


def accumulated(kind, paused):
    """Gradients of three backward passes, with communication in each or in the last only."""
    model, _ = plain_made(kind)
    for i in range(3):
        loss = plain_loss(model, part(plain_batch(i), kind == "alone"))
        if paused and i < 2:
            with model.sync.no_sync():
                loss.backward()
        else:
            loss.backward()
    return whole_gradients(model)


COLLECTIVES = {"all_reduce": "reduce", "reduce_scatter_tensor": "scatter", "all_gather_into_tensor": "gather"}
if hasattr(dist, "all_gather_single"):  # what newer FSDP2 calls
    COLLECTIVES = {"all_reduce": "reduce", "reduce_scatter_single": "scatter", "all_gather_single": "gather"}


@contextmanager
def counted():
    """Count calls of collectives, and the values that go into reductions."""
    seen, originals = Counter(), {name: getattr(dist, name) for name in COLLECTIVES}

    def watching(name, kind):
        def call(*args, **kwargs):
            value = args[0] if kind == "reduce" else kwargs["input"] if "input" in kwargs else args[1]
            seen[kind] += 1
            seen[f"{kind} values"] += value.numel()
            return originals[name](*args, **kwargs)

        return call

    for name, kind in COLLECTIVES.items():
        setattr(dist, name, watching(name, kind))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def volume(kind):
    """What one step sends with only the last block trainable, and how many values there are to send."""
    model, blocks = plain_made(kind)
    model.requires_grad_(False)
    set_active(blocks, blocks[-1:], frozen="prefix")
    with counted() as seen:
        plain_loss(model, part(plain_batch(0), False)).backward()
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    return dict(seen) | {"values": sum(p.numel() for p in blocks[-1].parameters()), "frozen with gradient": frozen}


def modes_when_sharded(kind):
    """The middle block in each mode: prediction, gradients, gathers of weights in the forward and the backward pass."""
    found = {}
    for mode in ("train", "pass", "prefix", "bypass", "skip"):
        model, blocks = plain_made(kind, depth=3)
        frozen = {} if mode == "train" else {blocks[1].name: mode}
        set_active(blocks, [b for b in blocks if b.name not in frozen], frozen=frozen)
        for _ in range(2):  # a second pass after the first
            model.zero_grad(set_to_none=True)
            with counted() as forward:
                loss = plain_loss(model, part(plain_batch(0), kind == "alone"))
            with counted() as backward:
                loss.backward()
        grads = whole_gradients(model)
        set_active(blocks, blocks)  # and everything trains again
        model.zero_grad(set_to_none=True)
        plain_loss(model, part(plain_batch(1), kind == "alone")).backward()
        after = full(model.blocks[1].mlp[0].weight.grad)
        found[mode] = {
            "gradients": grads,
            "gathers": [c["gather"] for c in (forward, backward)],
            "after": after,
        }
    return found


def snapshot_after_forward(kind):
    """Restore weights after a forward pass without gradients: the next one must see them, root included."""
    from entprog.snapshot import Snapshot

    model, _ = plain_made(kind)
    batch = part(plain_batch(0), False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    kept = Snapshot.take(list(model.parameters()), optimizer)
    with torch.no_grad():
        before = float(plain_loss(model, batch))
    plain_loss(model, batch).backward()
    optimizer.step()
    with torch.no_grad():
        moved = float(plain_loss(model, batch))
    kept.restore()
    with torch.no_grad():
        return {"before": before, "moved": moved, "restored": float(plain_loss(model, batch))}


def mixed_precision(kind):
    """Freeze before sharding, unfreeze afterwards, bf16 in forward: the blocks' gradients and their precision."""
    model = plain(kind)
    blocks = entprog.find_blocks(model, {"x": plain_batch(0)["x"]})
    set_active(blocks, blocks[-1:])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if kind == "fsdp":
        entprog.fully_sharded(model, blocks, lambda: model(plain_batch(0)["x"]), mp_policy=policy)
    kept = [p.requires_grad for b in blocks for p in b.parameters()]
    set_active(blocks, blocks)
    plain_loss(model, part(plain_batch(0), kind == "alone")).backward()
    return {
        "kept": kept,
        "gradients": whole_gradients(model),
        "precisions": sorted({str(p.dtype) for p in model.parameters()}),
    }


def agreement():
    """Decisions, maxima and joined rows."""
    model, _ = plain_made("hooks")
    me, asked = dist.get_rank(), []

    def compute():
        asked.append(me)
        return parallel.slowest(model, 1.0 + me)

    recorded = {"old": "of rank 0"} if me == 0 else {}

    def decide(key):
        return parallel.agreed(model, lambda make: recorded.get(key) or make(), compute)

    def twice(i, item):
        return torch.tensor([item * 2.0])

    return {
        "decided": [decide("old"), decide("new")],
        "asked": len(asked),
        "joined": parallel.joined(model, torch.full((me + 1, 2), float(me))),
        "in step": list(parallel.in_step(model, range(3 + me))),
        "spread": torch.cat(parallel.divided(model, [1, 2, 3], twice)),
    }


def refusals():
    """Messages of what is refused in two processes."""
    model, blocks = plain_made("alone")
    sharded, _ = plain_made("fsdp")
    ddp = torch.nn.parallel.DistributedDataParallel(plain("alone"))
    arguments = {"held_out": plain_batch(0), "train_batches": lambda: [plain_batch(0)], "total_steps": 2}
    found = {}
    for name, wrapped in (("apart", model), ("sharded", sharded), ("ddp", ddp)):
        try:
            EntProg(wrapped, plain_loss, **arguments)
        except ValueError as error:
            found[name] = str(error)
    with running(blocks, "train"):  # what belongs to one process only asks nobody
        entprog.score(model, blocks, lambda m, b: m(b["x"]), [plain_batch(0)] * (1 + dist.get_rank()))
    return found


def trained(folder, kill_at=None):
    """The Trainer on drawn figures, resumed after an error at a step if one is given; returns what its run left."""
    from test_train import TINY, broken_off, make

    config = replace(TINY, strategy="ent-prog", schedule="adaptive", search_budget=1.5, priority="cei", batch_size=4,
                     ema_decay=0.9, lr=3e-4)  # fmt: skip
    trainer = broken_off(config, folder, kill_at) if kill_at else make(config, folder)
    if not kill_at:
        trainer.run()
    events = [e for e in trainer.prog.events if e["event"] == "modes"]
    return {"weights": whole(trainer.model), "active": [e["active"] for e in events], "wrote": trainer.log.count > 0}


def everything(folder):
    found = {f"wan {kind}": wan_run(kind) for kind in ("hooks", "fsdp")}
    for kind in ("hooks", "fsdp"):
        found |= {f"scores {kind}": plain_scores(kind), f"volume {kind}": volume(kind)}
    found |= {f"accumulated {paused}": accumulated("hooks", paused) for paused in (False, True)}
    found |= {"accumulated fsdp": accumulated("fsdp", False), "modes": modes_when_sharded("fsdp")}
    found |= {"snapshot": snapshot_after_forward("fsdp"), "mixed": mixed_precision("fsdp")}
    found |= {"agreement": agreement(), "refusals": refusals()}
    found["trainer"] = trained(Path(folder) / "run")
    return found


def resumed(folder):
    return {"trainer": trained(Path(folder) / "run"), "resumed": trained(Path(folder) / "killed", kill_at=13)}


def work(me, folder, port, what):
    """Be one of two processes that run `what`, a function of this file, on a folder."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(me), "LOCAL_RANK": str(me), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")
    torch.save(globals()[what](folder), f"{folder}/{me}.pt")
    dist.barrier()
    dist.destroy_process_group()
