"""The token axis in the Trainer: exact resume, whole clips where losses are judged, which pipelines can."""

import json
from dataclasses import replace

import pytest
import torch
from test_train import TINY, broken_off, make, same, tiny_model, weights

from entprog.models.shrinking import shrink_of
from entprog.tokens import WHOLE, Tokens

HALF = Tokens(0.5, 0.5)
TOKENS = replace(TINY, strategy="ent-prog", axes="blocks,tokens", token_grid=((0.5, 0.5),))
CASES = {
    "linear": TOKENS,
    "race": replace(TOKENS, schedule="adaptive", steps=None, seconds=0.12, search_budget=0.6),
    "strided": replace(TOKENS, token_frames="strided", token_positions="kept", schedule="fixed"),
}


@pytest.mark.parametrize("name", ["linear", *(pytest.param(n, marks=pytest.mark.slow) for n in ("race", "strided"))])
@pytest.mark.parametrize("when", [0.3, pytest.param(0.8, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_exactly_and_ends_at_full_size(name, when, tmp_path):
    whole = make(CASES[name], tmp_path / "whole")
    sizes = []
    whole.on_progress = lambda info: sizes.append(whole.prog.tokens.share)
    results = whole.run()
    assert sizes[-1] == 1 and (sizes[0] == 0.125 or name == "race") and results["kind"] == "run"
    assert sizes == sorted(sizes)
    broken_off(CASES[name], tmp_path / "broken", 1 + int(when * (whole.step - 1)))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    events = [json.loads(line) for line in (tmp_path / "whole" / "events.jsonl").read_text().splitlines()]
    assert [e["tokens"]["size"] for e in events if e["event"] == "modes"][-1] == 1.0


def test_held_out_batches_of_a_run_are_whole_and_small_steps_are_cheaper(tmp_path):
    trainer = make(TOKENS, tmp_path)
    spent = {}

    def look(info):
        spent.setdefault(trainer.prog.tokens, trainer._flops(*trainer._setting()))

    trainer.on_progress = look
    trainer.run()
    assert all(b["video"].shape[2:] == (2, 8, 8) for b in [*trainer.held_out, *trainer.judged_by])
    assert spent[HALF] < spent[WHOLE] / 4


def test_runs_say_which_pipelines_have_no_smaller_clips(tmp_path):
    from tiny_wan import save

    model = tiny_model()
    for kind, word in (("t2v", None), ("i2v", None), ("vace", "masks"), ("animate", "face frames")):
        folder = save(tmp_path / kind, kind)
        config = replace(TOKENS, model=str(folder), data="d")
        if word:
            with pytest.raises(ValueError, match=word):
                shrink_of(config, model)
            continue
        batch = {k: torch.randn(1, 4, 3, 8, 8) for k in ("video", "noise", "condition")} | {
            "text": torch.zeros(1, 5, 3)
        }
        small = shrink_of(config, model)(batch, HALF)
        assert {k: tuple(v.shape[2:]) for k, v in small.items() if v.ndim == 5}["video"] == (2, 4, 4)
        assert (
            small["condition"].shape[2:] == ((2, 4, 4) if kind == "i2v" else (3, 8, 8)) and len(small["text"][0]) == 5
        )
        with pytest.raises(ValueError, match="choose 'first'"):
            shrink_of(replace(config, token_frames="strided"), model)
    assert (
        shrink_of(replace(TOKENS, axes="blocks"), model) is None
        and shrink_of(replace(TINY, strategy="full"), model) is None
    )
