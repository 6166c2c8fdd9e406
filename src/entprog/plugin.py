"""EntProg: carry a Progressive setting out inside any training loop.

It ranks the blocks, searches how many pay, freezes, unfreezes and sets modes when due. Inside a search it is the
supernet's Trial: it trains on the caller's batches with the caller's loss and optimizer.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from entprog import guards, memory, parallel, run_cost
from entprog.attention import find_attention
from entprog.blocks import Block, by_name, find_blocks, outside_blocks, record_example
from entprog.budget import Budget, Keeping
from entprog.bypass import choose_bypass
from entprog.cei import Scores
from entprog.cost import StepCost
from entprog.measure import Ledger, held_out_losses, saved_bytes
from entprog.modes import LossFn, Predict, predict_by_loss, running
from entprog.priority import samples
from entprog.ranking import boundaries, out_at_most, rank, selected
from entprog.schedule import SCHEDULES, Candidate, block_modes, block_sizes, nearest_to_linear
from entprog.snapshot import Snapshot, changing
from entprog.strategy import Progressive, ent_prog
from entprog.supernet import SEARCHES, BatchStream, SearchResult, at_average
from entprog.tokens import WHOLE, Shrink, Tokens

Decide = Callable[[str, Callable[[], Any]], Any]


class EntProg:
    """Carry a Progressive setting out in somebody's training loop.

        prog = EntProg(model, loss_fn, held_out=others, train_batches=lambda: iter(loader), total_steps=20_000)
        for step, batch in enumerate(loader):
            prog.step(step, optimizer)
            loss_fn(model, batch).backward(); optimizer.step(); optimizer.zero_grad(set_to_none=True)

    loss_fn(model, batch): scalar or per-sample (B,) loss. held_out: a batch or list of batches that judge searches.
    train_batches: callable that yields what searches train on (begun again when it runs out) and, unless score_batches
    is given, what scores are taken on. predict: raw prediction (B, ...), by default the first tensor of the forward
    that loss_fn makes. candidates: names of the blocks that may ever train, by default those that do now, or all.
    backward: backward(loss), with scaler and clipping. always: names of what was made for the task. t(batch) -> (B,)
    times for per-tau scores. ledger: charged with scoring and search. decide(key, compute): compute(), or what was
    recorded before a resume. max_memory: what training may hold, as "24GiB" or bytes; of the candidates those train
    that fit (budget.py).
    shrink(batch, tokens) -> batch: with axes="blocks,tokens", a batch of fewer or smaller frames (tokens.py); the loop
    then computes loss_fn(model, prog.shrunk(batch)).

    Build it before any wrapper (DDP, torch.compile); in several processes after data_parallel or fully_sharded, with
    the same held_out on every rank and train_batches of the rank's own. It leaves `param_groups` as they were;
    outside blocks it never enables a parameter that was frozen when it was built.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        held_out: Any,
        train_batches: Callable[[], Iterable[Any]],
        total_steps: int,
        predict: Predict | None = None,
        backward: Callable[[Tensor], Any] | None = None,
        always: Sequence[str] = (),
        strategy: Progressive | None = None,
        blocks: Sequence[Block] | None = None,
        candidates: Sequence[str] | None = None,
        t: Callable[[Any], Tensor] | None = None,
        clock: str = "wall",
        seconds: float | None = None,
        ledger: Ledger | None = None,
        decide: Decide | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        score_batches: Callable[[], Iterable[Any]] | None = None,
        max_memory: str | int | float | None = None,
        shrink: Shrink | None = None,
    ) -> None:
        self.settings = strategy or ent_prog()
        guards.check_inputs(clock, total_steps, train_batches, self.settings, shrink)
        guards.check_released(model)
        self.shrink = shrink
        self.model, self.total_steps, self.clock, self.seconds = model, total_steps, clock, seconds
        self.required = [(p, p.requires_grad) for p in model.parameters()]
        self.held_out = guards.held_out_batches(held_out, train_batches)
        self.train_batches, self.loss_fn, self.t = guards.begun(train_batches), loss_fn, t
        self._backward = guards.unscaled(backward, model) if backward else (lambda loss: loss.backward())
        self.score_batches = guards.begun(score_batches or train_batches)
        self.stream = BatchStream(self.train_batches)
        self.snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()
        self.bypass_sets: dict[Candidate, tuple[list[str], list[dict[str, Any]]]] = {}
        self._predict = predict or predict_by_loss(loss_fn)
        self.ledger = ledger or Ledger()
        self._on_event = on_event or (lambda event: None)
        self.decisions: dict[str, Any] = {}
        self._decide_outside = decide
        self.events: list[dict[str, Any]] = []
        parallel.prepared(model, blocks, self._try)
        self.blocks = list(blocks) if blocks is not None else find_blocks(model, record_example(model, self._try))
        self.candidates = guards.candidate_names(self.blocks, candidates)
        guards.check_adapters(self.settings, self.blocks)
        cut = self.settings.frozen == "bypass_attn"
        self.able = find_attention(self.blocks, self._try) if cut else [b.name for b in self.blocks]  # to be bypassed
        self.new = tuple(always)
        self.always, self.stem = outside_blocks(model, self.blocks, always, self._try)
        guards.check_always(model, always)
        self.scores: Scores | None = None
        self.skip_order: list[str] = []
        self.out: list[str] | None = None  # what still sits out; None: not chosen yet
        self.candidate: Candidate | None = None
        self.modes: dict[str, str] = {}
        self.stage = -1
        self.last_step = -1
        self.search_steps = 0  # batches of the stream that searches have trained on
        self.peak_bytes = 0  # of scoring, searching and measuring fidelity in this stage, and of its first step's trial
        self.held_bytes = 0  # gradients that a score or fidelity keeps
        self.model_seconds = 0.0  # of scoring, searching and measuring fidelity, by the model clock
        self.costs: dict[Tokens, StepCost] = {}
        self.tokens = WHOLE  # how much of a clip a training step sees now
        self.unshrunk = 0  # steps since a batch was last shrunk
        self.optimizer: torch.optim.Optimizer | None = None
        self.optimizer_state = self.settings.optimizer_state or ("keep" if max_memory is None else "park")
        self.keeping, self.stepping, self.released = Keeping(self.settings.frozen_weights), True, False
        self.wanted: Candidate | None = None  # what the schedule chose for this stage
        self.rotating, self.turns, self.period, self.stage_step = False, 0, 0, 0
        self.waited: dict[str, int] = {}  # periods since a block last trained
        self.drawn: list[str] = []  # what trains in this period of a rotation
        self._stopped = False  # whether the budget kept this stage's search from larger candidates
        self.budget: Budget | None = memory.budget_of(self, max_memory) if max_memory is not None else None

    def loss(self, model: nn.Module, batch: Any, tokens: Tokens = WHOLE) -> Tensor:
        """Return the mean loss; whatever needs gradients in here counts towards the run's peak memory."""
        self.charge(batch, backward=torch.is_grad_enabled(), tokens=tokens)
        if not torch.is_grad_enabled():
            return self.loss_fn(model, batch).mean()
        with saved_bytes(ignore=list(model.parameters())) as held:
            loss = self.loss_fn(model, batch).mean()
            if self.optimizer is not None:
                kept = held() + self.held_bytes + sum(s.bytes() for s in self.snapshots)
                self.peak_bytes = max(self.peak_bytes, memory.held(self, kept))
        return loss

    def charge(self, batch: Any, backward: bool, tokens: Tokens = WHOLE) -> None:
        run_cost.charge(self, batch, backward, tokens)

    def prediction(self, model: nn.Module, batch: Any) -> Tensor:
        self.charge(batch, backward=False)
        if self.budget is not None and self.optimizer is not None:  # a score keeps the inputs of all blocks
            self.peak_bytes = max(self.peak_bytes, memory.held(self, self.budget.one_sample()))
        return self._predict(model, batch)

    def _try(self) -> None:
        guards.check_loss(self.loss_fn, self.model, self.held_out[0])

    @property
    def active(self) -> list[str]:
        """Names of the blocks that train now, in execution order."""
        return [name for name, mode in self.modes.items() if mode == "train"]

    def step(self, step: int, optimizer: torch.optim.Optimizer, progress: float | None = None) -> None:
        """Bring the model into the state this optimizer step needs; call it before the forward pass.

        Repeating it with the same step changes nothing, unless it failed. `progress` in [0, 1) replaces step /
        total_steps where a run is measured in seconds. A search trains at the optimizer's learning rate: at 0, as a
        warm-up may begin, it cannot tell, and the linear schedule's number is taken. RuntimeError if gradients are
        pending while the trainable set has to change yet, ValueError for a step or progress that goes back, and if
        checkpointing is reentrant (guards.py).
        """
        if self.optimizer is not optimizer or self.released:
            self.optimizer = optimizer
            memory.resume(self)
        if step == self.last_step:
            return
        self.unshrunk += not self.tokens.whole
        guards.check_step(self, step, progress)
        last = progress is None and step >= self.total_steps - 1 and self.settings.axes != "blocks"
        progress = min(step / self.total_steps, 1 - 1e-9) if progress is None else progress
        due = max(progress, self.settings.tokens_until) if last else progress  # the last step is at full size
        stage = min(int(progress * self.settings.stages + 1e-9), self.settings.stages - 1)
        period = memory.due(self, step, progress) if stage == self.stage else 0
        if stage != self.stage or self._restored(progress, due) or period > self.period:
            guards.check_switchable(self.model, by_name(self.blocks, self.candidates), optimizer, self._try)
        with guards.retriable(self), guards.epoch_kept(optimizer):
            self.last_step = step
            if stage != self.stage:
                self._begin_stage(stage, progress)
            elif period > self.period:
                self.period = period
                memory.rotate(self, progress)
            if restored := self._restored(progress, due):
                self.enter(restored, progress, reason="restored")

    def _restored(self, progress: float, due: float) -> Candidate | None:
        """Return the present candidate with the blocks and tokens back that should be by now; None if none should."""
        back, most = self.candidate, out_at_most(self, progress) if self.out else 0
        if back and self.out and most < len(self.out):
            back = replace(back, skipped=most)
        if back and due >= self.settings.tokens_until:
            back = back.at_full_size
        return back if back != self.candidate else None

    def boundaries(self) -> list[float]:
        """Return the progress marks at which the state changes, for loops that plan in seconds."""
        return boundaries(self)

    def emit(self, event: str, progress: float, **values: Any) -> None:
        record = {"event": event, "step": self.last_step, "progress": progress} | values
        self.events.append(record)
        self._on_event(record)

    def decide(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return a decision that may depend on a clock: rank 0's, computed once, then replayed from the record."""
        if key not in self.decisions:
            outside = self._decide_outside or (lambda key, compute: compute())
            self.decisions[key] = parallel.agreed(self.model, lambda compute: outside(key, compute), compute)
        return self.decisions[key]

    def _begin_stage(self, stage: int, progress: float) -> None:
        self.stage, self.peak_bytes = stage, 0
        self.stage_step, self.period, self.drawn = self.last_step, 0, []
        self.rotating = self._stopped = False
        self.bypass_sets, self.stream = {}, BatchStream(self.train_batches, host=self.budget is not None)
        if self.scores is None or self.settings.rescore == "stage":
            with self.ledger("scoring"):
                rank(self, progress)
            self.bypass_sets = {}  # of an unranked model
        previous, most = self.candidate, out_at_most(self, progress)
        if previous and self.wanted:  # a period of a rotation may have trained fewer
            previous = replace(previous, active=max(previous.active, self.wanted.active), skipped=most)
        if self.budget is None and (stage == 0 or self.candidate is None):
            self.switch(Candidate(len(self.candidates)))  # modes are defined from here on
        schedule, sizes = SCHEDULES[self.settings.schedule], block_sizes(self.blocks, self.ranking(trainable=True))
        with self.ledger("search"):
            chosen = schedule(stage, self.settings.stages, sizes, self.settings, previous, self._search)
        chosen = run_cost.worth_freezing(self, replace(chosen, skipped=min(chosen.skipped, most)), progress)
        self.wanted = self.enter(chosen, progress, reason="stage")
        stopped = self._stopped or self.wanted.active < chosen.active
        growth = self.settings.growth or ("rotate" if stopped else "nested")
        self.rotating = growth == "rotate" and self.wanted.active < len(self.candidates)
        self.stream = BatchStream(self.train_batches)  # lets the batches of the search go

    def sets(self, candidate: Candidate) -> tuple[list[str], list[str]]:
        return selected(self, candidate)

    def ranking(self, trainable: bool = False) -> list[str]:
        """All blocks, best first, what a rotation has drawn before; those that may never train come last, or not."""
        ranking = self.scores.ranking if self.scores else [b.name for b in self.blocks]
        ranking = sorted(ranking, key=lambda name: (name not in self.drawn, name not in self.candidates))
        return ranking[: len(self.candidates)] if trainable else ranking

    def switch(self, candidate: Candidate) -> None:
        """Run the blocks as a candidate says (Trial), with the bypass set its fidelity allows, at its token scale."""
        self.tokens = candidate.tokens
        if not self.tokens.whole:
            self.step_cost(self.tokens)  # refuses a scale that saves nothing
        modes = self.modes_of(candidate, self.bypass_set(candidate)[0])
        memory.apply(self, modes, memory.kept(self, modes))

    def bypass_set(self, candidate: Candidate) -> tuple[list[str], list[dict[str, Any]]]:
        """Choose what a candidate bypasses, once a stage, before it trains a step: (names, measured fidelities).

        On whole clips: a set holds at any token scale and need not change when full size comes back.
        """
        candidate = candidate.at_full_size
        if candidate not in self.bypass_sets:
            self.bypass_sets[candidate] = self._chosen_bypass(candidate)
        return self.bypass_sets[candidate]

    def measures_fidelity(self, candidate: Candidate) -> bool:
        """Return whether something may be bypassed by a candidate, and what is depends on a measurement."""
        frozen = len(self.blocks) - sum(map(len, self.sets(candidate)))
        exact = self.settings.frozen == "pass" or self.settings.min_fidelity >= 1
        return frozen > 0 and not exact and self.scores is not None

    def _chosen_bypass(self, candidate: Candidate) -> tuple[list[str], list[dict[str, Any]]]:
        if not self.measures_fidelity(candidate):
            return [], []
        active, skipped = self.sets(candidate)
        batches: list[Any] = list(islice(self.score_batches(), 2))
        if self.budget is not None:
            batches = samples(batches[0])[:1]
        with self.ledger("search"), memory.within_fidelity(self, candidate):
            return choose_bypass(
                self.model,
                self.blocks,
                self.loss,
                batches,
                active,
                min_fidelity=self.settings.min_fidelity,
                min_new_fidelity=self.settings.min_new_fidelity,
                skipped=skipped,
                mode=self.settings.frozen,
                among=self.able,
            )

    def modes_of(self, candidate: Candidate, bypassed: Sequence[str] | None = None) -> dict[str, str]:
        """Every block's mode; without `bypassed` all frozen blocks that do not sit out are bypassed if allowed."""
        active, skipped = self.sets(candidate)
        names, around = [b.name for b in self.blocks], self.settings.frozen
        if around == "pass":
            return block_modes(names, active, skipped, (), "pass")
        return block_modes(names, active, skipped, self.able if bypassed is None else bypassed, "prefix", around)

    def enter(self, candidate: Candidate, progress: float, reason: str) -> Candidate:
        """Settle on a candidate, or within a budget on the largest that fits, and say so."""
        candidate = self.candidate = memory.settle(self, candidate, progress)
        self.out = self.sets(candidate)[1]
        curve = self.bypass_set(candidate)[1]
        size = sum(m == self.settings.frozen for m in self.modes.values())
        point = next((c for c in curve if c["size"] == size), None)
        state = {"stage": self.stage, "reason": reason, "active": self.active, "skipped": self.out, "modes": self.modes}
        if self.settings.axes != "blocks":
            state["tokens"] = asdict(candidate.tokens)
        self.emit("modes", progress, **state, fidelity=point, fidelity_curve=curve)
        return candidate

    def _search(self, options: Sequence[Candidate]) -> Candidate:
        """Ask the supernet which candidate pays most; the linear schedule's when it cannot tell."""
        assert self.optimizer is not None
        settings, result, note = self.settings, None, "one candidate"
        if self.budget is not None:
            memory.settle(self, options[0], self.stage / settings.stages)  # measured once, before any of them trains
            affordable = [c for c in options if memory.fits(self, c)] or [options[0]]
            self._stopped, options = len(affordable) < len(options), affordable
        if len(options) > 1 and all(group.get("lr") == 0 for group in self.optimizer.param_groups):
            note = "the learning rate is 0, no candidate would move: the linear schedule's number taken"
        elif len(options) > 1:
            note = "search unaffordable"
            result = SEARCHES[settings.search](self, options, run_cost.search_seconds(self))
        result = result or SearchResult(settings.search, None, 0, note=note)
        if (chosen := result.chosen) is None:
            sizes = block_sizes(self.blocks, self.ranking(trainable=True))
            chosen = result.chosen = nearest_to_linear(options, self.stage, sizes, settings)
        self._stopped = self._stopped and chosen.active == max(c.active for c in options)
        self.search_steps += result.steps
        self.emit("search", self.stage / settings.stages, stage=self.stage, **result.record())
        return chosen

    def full_step_seconds(self) -> float:
        return float(self.decide("full step seconds", lambda: run_cost.full_step_seconds(self)))

    def step_cost(self, tokens: Tokens = WHOLE) -> StepCost:
        return run_cost.step_cost(self, tokens)

    def step_flops(self, modes: Mapping[str, str], tokens: Tokens = WHOLE) -> int:
        """Return the FLOPs of a training step in some modes, blocks checkpointed as they are now."""
        return run_cost.step_flops(self, modes, tokens)

    def estimate(self, candidate: Candidate) -> float:
        """Seconds of one training step of a candidate (Trial), by FLOPs from the one timed full step."""
        return run_cost.estimate(self, candidate)

    def cost(self, candidate: Candidate) -> float:
        """Seconds of one training step of a candidate (Trial): FLOPs by the model clock, else timed and recorded."""
        return float(
            self.decide(f"step seconds, stage {self.stage}, {candidate}", lambda: run_cost.timed(self, candidate))
        )

    def shrunk(self, batch: Any, tokens: Tokens | None = None) -> Any:
        """Return what a training step sees of a batch now, or at another token scale: shrink(batch, tokens)."""
        self.unshrunk = 0
        tokens = self.tokens if tokens is None else tokens
        return batch if tokens.whole or self.shrink is None else self.shrink(batch, tokens)

    def train(self, start: int, steps: int) -> None:
        """Train on the stage's batches start, start + 1, ... (Trial)."""
        assert self.optimizer is not None
        for i in range(start, start + steps):
            batch = self.stream[i]
            with parallel.own_noise(self.model, 1000 + i):
                self._backward(self.loss(self.model, self.shrunk(batch), self.tokens))
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.model.zero_grad(set_to_none=True)  # what another optimizer holds

    def losses(self) -> Tensor:
        """Held-out losses (n,) of the whole network: fixed noise, raw weights, eval mode (Trial)."""
        with running(self.blocks, "train"), at_average(self.optimizer):  # nothing sits out
            values = held_out_losses(self.model, self.loss_fn, self.held_out)
            draws = 1 if len(values) >= 8 else 8 // len(values)  # a single number could not tell a tie
            if draws > 1:
                values = held_out_losses(self.model, self.loss_fn, self.held_out * draws)
            for batch in (self.held_out * draws)[:: parallel.ranks(self.model)]:
                self.charge(batch, backward=False)
            return values

    def snapshot(self) -> Snapshot:
        """Copy everything training can change (Trial)."""
        assert self.optimizer is not None
        inside = [p for b in self.blocks for p in (*b.parameters(), *b.adapters)]
        held = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]  # by the loss
        parameters = list(dict.fromkeys([*inside, *self.always, *self.stem, *held]))
        taken = Snapshot.take(parameters, self.optimizer, self.budget is not None, changing(self.model))
        self.snapshots.add(taken)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return everything but weights and optimizer state, as plain data."""
        return {
            "stage": self.stage,
            "last_step": self.last_step,
            "candidate": asdict(self.candidate) if self.candidate else None,
            "modes": self.modes,
            "scores": asdict(self.scores) if self.scores else None,
            "skip_order": self.skip_order,
            "out": self.out,
            "decisions": dict(self.decisions),
            "search_steps": self.search_steps,
            "model_seconds": self.model_seconds,
            "costs": run_cost.state(self),
            "settings": asdict(self.settings),
            "memory": memory.state(self),
            "bypass_sets": [[asdict(c), *found] for c, found in self.bypass_sets.items()],
        }

    def release(self, optimizer: bool = True) -> None:
        """Give the model back for use when training is over: its own weights, every block running, none checkpointed.

        What trained when it was built may train again. Parked optimizer state comes back to the device, unless
        `optimizer` is False. state_dict() and save_pretrained() hold the model's own weights before that, too. The next
        call of `step`, if there is one, freezes and parks again: so the whole network can be validated on the way.
        """
        memory.release(self, optimizer)
        self.tokens, self.released = WHOLE, True

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where state_dict left off. ValueError if the setting, or what may train, is another."""
        guards.check_settings(self.settings, state["settings"])
        guards.check_saved_modes(state["modes"], self.candidates)
        self.stage, self.last_step, self.search_steps = state["stage"], state["last_step"], state["search_steps"]
        self.model_seconds = state["model_seconds"]
        run_cost.load(self, state["costs"])
        self.candidate = Candidate(**state["candidate"]) if state["candidate"] else None
        self.tokens = self.candidate.tokens if self.candidate else WHOLE
        self.scores = Scores(**state["scores"]) if state["scores"] else None
        self.skip_order, self.out = list(state["skip_order"]), state["out"]
        self.decisions = dict(state["decisions"])
        memory.load(self, state["memory"])
        self.bypass_sets = {Candidate(**c): (names, curve) for c, names, curve in state["bypass_sets"]}
        if state["modes"]:
            memory.apply(self, state["modes"], self.keeping)
