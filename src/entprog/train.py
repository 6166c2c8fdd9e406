"""Trainer: one Accelerate loop for every strategy, with exact resume and a ledger.

A run is cut into segments at the marks where something happens: a stage begins, blocks come back, the held-out loss is
measured. How many steps a segment has is decided when it begins, from the time left and the time a step takes, and
written down before it is used; a resumed run replays what was written. All randomness of a step comes from its
position in the stream of batches (data/batches.py).

Under torchrun or accelerate launch each process takes its share of every batch, gradients are averaged by hooks
(parallel.py), and rank 0 alone writes the run folder, which every process must see to resume.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import astuple
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from entprog import memory
from entprog.blocks import find_blocks, record_example
from entprog.checkpoint import RunLog, load_checkpoint, named_state, put_back, save_checkpoint, write_results
from entprog.checkpointing import checkpoint_blocks
from entprog.config import RunConfig, check_same
from entprog.cost import MODEL_CLOCK_FLOPS
from entprog.data.batches import Batch, Data, batch_at, fixed_batches, to_device
from entprog.ema import Ema
from entprog.measure import NET, Ledger, held_out_losses, now, saved_bytes, training_bytes
from entprog.metrics.protocol import mean_interval
from entprog.models.pretrained import batch_settings, candidate_blocks, freeze_for_good, new_modules, predict_and_loss
from entprog.models.shrinking import shrink_of
from entprog.modes import running
from entprog.optim import cosine
from entprog.parallel import agreed, data_parallel, on_cpus
from entprog.plugin import EntProg
from entprog.profiling import cost_of, trained_outside
from entprog.schedule import UNSEARCHED
from entprog.strategy import add_adapters, add_lora
from entprog.tokens import WHOLE, Tokens


class Trainer:
    """Train one model on one data set by one strategy, into one run folder.

    `data` and `held_out` are data sets (data/batches.py). `run` resumes from the folder's last checkpoint.
    `on_progress` gets a dict with step, progress, stage, active, loss, seconds and bytes after each step.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        data: Data,
        held_out: Data,
        out: Path,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.config, self.out = config, out
        clips, settings = len(data["video"]), config.progressive()
        searched = settings is not None and settings.schedule not in UNSEARCHED
        kept_back = max(1, min(32, clips // 8)) if searched else 0
        self.data = {k: v[: clips - kept_back] for k, v in data.items()}
        judges = {k: v[clips - (kept_back or min(clips, config.batch_size)) :] for k, v in data.items()}
        self.ledger = Ledger()
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=on_cpus())
        self.writes = self.accelerator.is_main_process
        self.share = (self.accelerator.process_index, self.accelerator.num_processes)
        self.on_progress = on_progress or (lambda info: None)
        self.settings = batch_settings(config)
        self.predict, self.loss_fn = predict_and_loss(config)
        self.device = self.accelerator.device
        self.model = model.to(self.device).train()
        self.held_out = self._fixed(held_out)
        self.judged_by = self._fixed(judges) if settings else []
        self.log = RunLog(out)
        self.blocks = find_blocks(model, record_example(model, lambda: self.loss_fn(model, self.held_out[0])))
        self.candidates = candidate_blocks(self.blocks, config.candidates)
        self.wrapped = self._prepare()
        if config.checkpointing != "none":
            checkpoint_blocks(self.blocks, config.checkpointing, model=model)
        if self.accelerator.num_processes > 1:
            data_parallel(self.wrapped)
        self.optimizer = torch.optim.AdamW(  # fused: one pass over each tensor instead of twelve
            self.wrapped.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.step = self.segment = self.within = 0
        self.prog: EntProg | None = None
        self.prog = self._plug_in()
        self.ema = Ema(self.wrapped, config.ema_decay, host=config.max_memory is not None)
        self.own_flops: int | None = None  # of a step, where no strategy changes it
        self.model_seconds = 0.0
        self.times: list[float] = []  # of the last steps in the present modes
        self.curve: list[dict[str, float]] = []
        self.stages: dict[int, dict[str, float]] = {}
        self.peak_bytes, self.byte_steps, self.step_bytes = 0, 0.0, 0
        self.measured_at: Any = None

    # -- setting up ----------------------------------------------------------------------------------------------------

    def _fixed(self, data: Data) -> list[Batch]:
        size = 8 if self.settings["frames"] else self.config.batch_size  # a pipeline's clips may be large
        fixed = fixed_batches(data, batch_size=size, draws=self.config.held_out_draws, **self.settings)
        return [to_device(b, self.device) for b in fixed]

    def _prepare(self) -> nn.Module:
        """Freeze what may not train and apply strategies that change the model itself; returns what is trained."""
        freeze_for_good(self.model, self.candidates, self.config)
        settings = self.config.progressive()
        if settings and settings.adapters:
            return add_adapters(self.model, self.candidates, self.config.lora_rank)
        if self.config.strategy != "lora":
            return self.model
        always = (*new_modules(self.model, self.config), "final_layer") if self.config.candidates == "all" else ()
        return add_lora(self.model, self.candidates, self.config.lora_rank, always=always)

    def _plug_in(self) -> EntProg | None:
        settings = self.config.progressive()
        if settings is None:
            return None
        return EntProg(
            self.model,
            self.loss_fn,
            held_out=self.judged_by,
            train_batches=self._upcoming,
            total_steps=self.config.steps or 1,
            predict=self.predict,
            backward=self._backward,
            always=new_modules(self.model, self.config),
            strategy=settings, blocks=self.blocks, candidates=[b.name for b in self.candidates],
            t=lambda batch: batch["t"], clock=self.config.clock, seconds=self.config.seconds, ledger=self.ledger,
            decide=self._record_decision, on_event=self._write_event, score_batches=self._complete,
            max_memory=self.config.max_memory, shrink=shrink_of(self.config, self.model),
        )  # fmt: skip

    @property
    def position(self) -> int:
        """Return the next place in the stream of batches: steps of the loop and steps kept from searches."""
        return self.step + (self.prog.search_steps if self.prog else 0)

    def _batch(self, position: int, complete: bool = False) -> Batch:
        config = self.config
        with self.ledger("data"):
            batch = batch_at(
                self.data,
                position,
                batch_size=config.batch_size,
                seed=config.seed,
                condition_dropout=0.0 if complete else config.condition_dropout,
                joint_dropout=0.0 if complete else config.joint_dropout,
                **self.settings,
                share=self.share,
            )
            return to_device(batch, self.device)

    def _complete(self) -> Iterator[Batch]:
        """Yield batches for scoring: every condition there, times stratified within each batch."""
        for position in count(self.position):
            batch = self._batch(position, complete=True)
            size, (part, parts) = len(batch["t"]), self.share
            batch["t"] = (torch.arange(size, device=self.device) + part * size + batch["t"]) / (size * parts)
            yield batch

    def _upcoming(self) -> Iterator[Batch]:
        for position in count(self.position):
            yield self._batch(position)

    # -- the record ----------------------------------------------------------------------------------------------------

    def _write_event(self, record: dict[str, Any]) -> None:
        if not self.writes:
            return
        if record["event"] == "score":
            record = self.log.keep_scores(record)
        self.log.append({"event": record["event"], "step": self.step} | record | {"net_seconds": self.net_seconds()})

    def _record_decision(self, key: str, compute: Callable[[], Any]) -> Any:
        return self.log.decide(key, compute, self.step)

    def _decide(self, key: str, compute: Callable[[], Any]) -> Any:
        return agreed(self.wrapped, lambda compute: self._record_decision(key, compute), compute)

    def net_seconds(self) -> float:
        """Return the net seconds so far, by the run's clock."""
        return self.model_seconds if self.config.clock == "model" else self.ledger.net()

    def overhead_seconds(self) -> float:
        """Return how much of the net seconds went into scoring and searching, by the run's clock."""
        if self.config.clock == "model":
            return self.prog.model_seconds if self.prog else 0.0
        spent = self.ledger.summary()["seconds"]
        return spent["scoring"] + spent["search"]

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end of the budget, save the model and return the results so far (no samples yet)."""
        check_same(self.config, self.out)
        self.accelerator.wait_for_everyone()
        if self.writes:
            self.config.save(self.out / "config.yaml")
        self._resume()
        marks = self._marks()
        while self.segment < len(marks) - 1:
            begin, end = marks[self.segment], marks[self.segment + 1]
            if self.within == 0:
                self._advance_strategy(begin)
            steps = int(self._decide(f"segment {self.segment}: steps", lambda: self._plan(begin, end)))  # noqa: B023
            while self.within < steps:
                self._train_step(begin + (end - begin) * self.within / steps)
                self.within += 1
                if self.step % self.config.checkpoint_every == 0:
                    self._checkpoint()
            self.segment, self.within = self.segment + 1, 0
            if self._is_evaluation(end):
                self._evaluate(end)
        return self._finish()

    def _marks(self) -> list[float]:
        evaluations = [i / self.config.evaluations for i in range(self.config.evaluations + 1)]
        changes = self.prog.boundaries() if self.prog else []
        replanned = [i / 20 for i in range(20)]  # how many steps are left to take is reckoned anew at each
        return sorted({0.0, 0.02, 0.99, 1.0, *replanned, *changes, *evaluations})

    def _is_evaluation(self, mark: float) -> bool:
        return any(math.isclose(mark, i / self.config.evaluations) for i in range(self.config.evaluations + 1))

    def _advance_strategy(self, progress: float) -> None:
        """Let the strategy score, search and switch where it is due, on the run's clock."""
        if self.segment == 0:
            self._evaluate(0.0)
        self._set_lr(max(progress, self.config.lr_warmup))  # a search trains at this rate, past the warm-up
        with self.ledger("training"):
            self._step_strategy(progress)

    def _step_strategy(self, progress: float) -> None:
        if self.prog:
            if self.device.type == "cuda":  # what this stage's scores and searches hold, not what steps held before
                torch.cuda.reset_peak_memory_stats()
            before = self.prog.model_seconds
            self.prog.step(self.step, self.optimizer, progress)
            self.model_seconds += self.prog.model_seconds - before

    def _modes(self) -> dict[str, str]:
        if self.prog:
            return self.prog.modes
        mode = "lora" if self.config.strategy == "lora" else "train"
        return {b.name: mode if b in self.candidates else "pass" for b in self.blocks}

    def _setting(self) -> list[Any]:
        """Return what a step's cost depends on: modes, and how much of a clip it sees."""
        return [self._modes(), *astuple(self.prog.tokens if self.prog else WHOLE)]

    def _plan(self, begin: float, end: float) -> int:
        """Return how many steps bring the run from one mark to the next."""
        if self.config.steps is not None:
            return max(0, round(end * self.config.steps) - self.position)  # a search's kept steps count
        assert self.config.seconds is not None
        seconds = self._step_seconds()
        if seconds is None:
            return 4
        return max(1, round((end * self.config.seconds - self.net_seconds()) / seconds))

    def _step_seconds(self) -> float | None:
        """Seconds of a step in the present modes: by FLOPs, or the recent steps', rescaled if the modes changed."""
        flops = self._flops(*self._setting())
        if self.config.clock == "model":
            return flops / MODEL_CLOCK_FLOPS
        if not self.times:
            return None
        return median(self.times) * flops / self._flops(*self.measured_at)

    def _flops(self, modes: dict[str, str], frames: float, size: float) -> int:
        if self.prog:
            return self.prog.step_flops(modes, Tokens(frames, size))
        if self.own_flops is None:
            batch = self._batch(0, complete=True)
            cost = cost_of(self.model, self.blocks, lambda: self.loss_fn(self.model, batch))
            self.own_flops = cost.step(modes, outside=trained_outside(self.model, self.blocks))
        return self.own_flops

    def _set_lr(self, progress: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = cosine(self.config.lr, progress, self.config.lr_warmup)

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)
        if self.config.max_grad_norm:
            trained = [p for p in self.wrapped.parameters() if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(trained, self.config.max_grad_norm)

    def _train_step(self, progress: float) -> None:
        with self.ledger("training"):
            self._set_lr(progress)
            self._step_strategy(progress)
            switched = self._setting() != self.measured_at
            batch = self._batch(self.position, complete=switched)  # what is measured has all its conditions
            batch = self.prog.shrunk(batch) if self.prog else batch
            begun = now()
            loss = self._measured_loss(batch) if switched else self.loss_fn(self.wrapped, batch).mean()
            self._backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.ema.update()
            if switched and self.device.type == "cuda":
                self.step_bytes = torch.cuda.max_memory_allocated()
            if not switched:  # the first step after a switch does not count
                self.times = [*self.times[-19:], now() - begun]
        self._account()
        self.step += 1
        self.on_progress(self._info(progress, loss))

    def _measured_loss(self, batch: Batch) -> Tensor:
        """Return the loss, counting what the step holds for backward: once per set of modes."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with saved_bytes(ignore=list(self.wrapped.parameters())) as held:
            loss = self.loss_fn(self.wrapped, batch).mean()
            prog, kept = self.prog, held()
            self.step_bytes = memory.held(prog, kept) if prog else training_bytes(self.wrapped, self.optimizer, kept)
        self.measured_at, self.times = self._setting(), []
        return loss

    def _account(self) -> None:
        seconds = self._flops(*self._setting()) / MODEL_CLOCK_FLOPS
        self.model_seconds += seconds
        stage = self.stages.setdefault(self.prog.stage if self.prog else 0, {"peak_bytes": 0, "seconds": 0.0})
        stage["peak_bytes"] = max(stage["peak_bytes"], self.step_bytes, self.prog.peak_bytes if self.prog else 0)
        timed = self.times[-1] if self.times else 0.0  # the first step after a switch is not timed
        stage["seconds"] += seconds if self.config.clock == "model" else timed
        self.peak_bytes = max(self.peak_bytes, int(stage["peak_bytes"]))
        self.byte_steps += self.step_bytes

    def _info(self, progress: float, loss: Tensor) -> dict[str, Any]:
        return {
            "step": self.step,
            "progress": progress,
            "stage": self.prog.stage if self.prog else 0,
            "active": sum(m == "train" for m in self._modes().values()),
            "blocks": len(self.blocks),
            "loss": loss.item(),
            "seconds": self.net_seconds(),
            "bytes": self.step_bytes,
        }

    def held_out_loss(self) -> Tensor:
        """Return the held-out losses of the whole network, (n,)."""
        with running(self.blocks, "train"):
            return held_out_losses(self.wrapped, self.loss_fn, self.held_out)

    def _evaluate(self, progress: float) -> None:
        with self.ledger("held_out"):
            losses = self.held_out_loss().double()
        mean, interval = mean_interval(losses)
        point = {"step": self.step, "net_seconds": self.net_seconds(), "loss": mean}
        self.curve.append(point | {"overhead_seconds": self.overhead_seconds()})
        self._write_event({"event": "held_out", "progress": progress, "loss": mean, "interval": interval})

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step, "segment": self.segment, "within": self.within, "curve": self.curve,
            "stages": {str(k): v for k, v in self.stages.items()}, "peak_bytes": self.peak_bytes,
            "byte_steps": self.byte_steps, "model_seconds": self.model_seconds, "events": self.log.count,
            "times": self.times, "measured_at": self.measured_at, "step_bytes": self.step_bytes,
            "ledger": self.ledger.summary(), "ema_updates": self.ema.updates,
            "prog": self.prog.state_dict() if self.prog else None,
            "peak_search": self.prog.peak_bytes if self.prog else 0,
        }  # fmt: skip

    def _checkpoint(self) -> None:
        if not self.writes:
            return
        with self.ledger("checkpoint"):
            tensors = named_state(self.wrapped, self.optimizer)
            tensors |= {f"ema.{n}": v for n, v in self.ema.average.items()}
            save_checkpoint(self.out / "checkpoints", self.step, tensors, self._state())

    def _resume(self) -> None:
        """Go back to the last checkpoint, if there is one, and keep every recorded decision."""
        cpu = self.device.type == "cpu" or self.config.max_memory is not None  # a copy of all may not fit a GPU
        device = "cpu" if cpu else str(self.device)  # not cpu:0, which safetensors refuses
        found = load_checkpoint(self.out / "checkpoints", device)
        if self.writes:
            self.log.rewind(found[0]["events"] if found else 0, replay=self.config.clock == "wall")
        if found:
            self._load(*found)
        self.accelerator.wait_for_everyone()  # nobody writes while somebody reads

    def _load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for key in ("step", "segment", "within", "curve", "peak_bytes", "byte_steps", "model_seconds", "times",
                    "measured_at", "step_bytes"):  # fmt: skip
            setattr(self, key, state[key])
        self.stages = {int(k): v for k, v in state["stages"].items()}
        self.ledger.seconds |= {k: v for k, v in state["ledger"]["seconds"].items() if k != "other"}
        self.ledger.earlier = state["ledger"]["wall"]
        self.ema.updates = state["ema_updates"]
        if self.prog:
            self.prog.load_state_dict(state["prog"])
            self.prog.peak_bytes = state["peak_search"]
        put_back(tensors, self.wrapped, self.optimizer)
        self.ema.load({k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")})

    def _finish(self) -> dict[str, Any]:
        """Save the model for use and return the results; results.json is written by `write_results`."""
        if self.ema.average:
            self.ema.swap()
        if self.prog:
            self.prog.release(optimizer=False)  # of no use any more, and there may be no room for it
        with self.ledger("held_out"):
            losses = self.held_out_loss().double()
        if self.wrapped is not self.model:  # adapters are merged
            self.model = self.wrapped.merge_and_unload()  # type: ignore[operator]
        with self.ledger("checkpoint"):
            if self.writes:
                self.model.save_pretrained(self.out / "checkpoints" / "final")  # type: ignore[operator]
            self.accelerator.wait_for_everyone()
        self._write_event({"event": "done", "progress": 1.0})
        return self._results(losses)

    def _results(self, losses: Tensor) -> dict[str, Any]:
        spent = self.ledger.summary()["seconds"]
        whole = sum(spent[k] for k in NET)
        mean, interval = mean_interval(losses)
        return {
            "kind": "run",
            "strategy": self.config.strategy,
            "seed": self.config.seed,
            "clock": self.config.clock,
            "steps": self.position,
            "net_seconds": self.net_seconds(),
            "scoring_share": spent["scoring"] / whole,
            "search_share": spent["search"] / whole,
            "peak_bytes": self.peak_bytes,
            "mean_bytes": self.byte_steps / max(1, self.step),
            "held_out": {"loss": mean, "interval": interval, "samples": len(losses)},
            "held_out_losses": losses.tolist(),
            "curve": self.curve,
            "trainable_parameters": sum(p.numel() for p in self.optimizer.state),
        }

    def write_results(self, results: dict[str, Any]) -> dict[str, Any]:
        """Write results.json and ledger.json, completed by the wall time; returns the results."""
        stages = [{"stage": k} | v for k, v in sorted(self.stages.items())]
        return write_results(self.out, self.ledger.summary() | {"stages": stages}, {"metrics": {}} | results)
