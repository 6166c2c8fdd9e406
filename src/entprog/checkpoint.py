"""What survives a crash: the event log with its decisions, and checkpoints that are whole or not there.

A decision is a value that came from a clock. It is written before it is used; a resumed run finds it and uses it again,
so it takes the same steps. Weights and moments are safetensors, everything else JSON.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from entprog.cei import Scores
from entprog.frozen import set_value, value_of


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place and move it there: a kill leaves the old file or the new one, never a part."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


class RunLog:
    """The run folder's events.jsonl: one JSON object a line, on disk when `append` returns."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "events.jsonl"
        self.count = 0
        self.decisions: dict[str, Any] = {}

    def append(self, record: dict[str, Any]) -> None:
        """Write one event."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.count += 1

    def keep_scores(self, event: dict[str, Any]) -> dict[str, Any]:
        """Write a score event's scores to scores/*.json; returns the event with the file's path in their place."""
        path = f"scores/{event['priority']}-{event['step']:06d}.json"
        kept = {k: v for k, v in event.items() if k in {f.name for f in fields(Scores)}}
        Scores(**kept).save(self.path.parent / path)
        short = ("event", "step", "progress", "priority", "samples", "share_negative", "zero", "stopped_early",
                 "inherited", "skip_order", "agreement")  # fmt: skip
        return {k: event[k] for k in short if k in event} | {"path": path}

    def decide(self, key: str, compute: Callable[[], Any], step: int) -> Any:
        """Return the recorded decision, or compute and record it."""
        if key not in self.decisions:
            self.decisions[key] = compute()
            self.append({"event": "decision", "step": step, "key": key, "value": self.decisions[key]})
        return self.decisions[key]

    def rewind(self, keep: int, replay: bool = True) -> None:
        """Go back to the first `keep` events; a resumed run writes the others again.

        With `replay` the decisions among the others are kept, to be used again; without, the run makes them anew,
        which gives the same where no clock is read. A last line that a crash cut short is dropped.
        """
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        try:
            json.loads(lines[-1] if lines else "{}")
        except json.JSONDecodeError:
            lines.pop()
        events = [json.loads(line) for line in lines]
        kept = events[:keep] + [e for e in events[keep:] if replay and e["event"] == "decision"]
        self.decisions = {e["key"]: e["value"] for e in kept if e["event"] == "decision"}
        write_whole(self.path, "".join(json.dumps(e) + "\n" for e in kept))
        self.count = len(kept)


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write checkpoints/STEP beside the last one, move it into place whole, then delete the older."""
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({k: value_of(v).detach().contiguous() for k, v in tensors.items()}, partial / "state.safetensors")
    (partial / "state.json").write_text(json.dumps(state))
    for path in partial.iterdir():  # on disk before the name says so
        with path.open("rb") as file:
            os.fsync(file.fileno())
    target = folder / f"{step:08d}"
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    for old in folder.glob("[0-9]*"):
        if old != target:
            shutil.rmtree(old)


def load_checkpoint(folder: Path, device: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Read the last checkpoint, (state, tensors), or None if there is none."""
    found = sorted(folder.glob("[0-9]*"))
    if not found:
        return None
    state = json.loads((found[-1] / "state.json").read_text())
    return state, load_file(found[-1] / "state.safetensors", device=device)


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name what training changes: `model.NAME` and `optimizer.NAME.KEY` for the parameters' names."""
    names: dict[Tensor, str] = {p: n for n, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {f"model.{n}": p for p, n in names.items()}
    for p, state in optimizer.state.items():
        tensors |= {f"optimizer.{names[p]}.{k}": v for k, v in state.items()}
    return tensors


def put_back(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Set weights, in place, and optimizer state to what `named_state` named.

    State of what does not train stays where it was loaded, but for scalars: optimizers want those beside the parameter.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            set_value(p, tensors[f"model.{name}"])
            prefix = f"optimizer.{name}."
            own = {
                k.removeprefix(prefix): v.to(p.device) if p.requires_grad or not v.ndim else v
                for k, v in tensors.items()
                if k.startswith(prefix)
            }
            if own:
                optimizer.state[p] = own


def write_results(out: Path, ledger: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Write a run folder's ledger.json and results.json, which gets the ledger's wall time; returns the results."""
    write_whole(out / "ledger.json", json.dumps(ledger, indent=1) + "\n")
    results = results | {"wall_seconds": ledger["wall"]}
    write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    return results
