"""The README, the examples and the configuration are what the code is."""

import re
from operator import attrgetter
from pathlib import Path

import pytest
import yaml

from entprog.cli import _parser, main
from entprog.config import RunConfig, load_config, make_config
from entprog.modes import MODES
from entprog.recipe import is_recipe, load_recipe
from entprog.strategy import STRATEGIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_file_tree_is_the_package():
    tree = README.split("```\nsrc/entprog/\n")[1].split("```")[0]
    listed = {line.split()[0] for line in tree.splitlines() if line.startswith("  ")}
    package = ROOT / "src" / "entprog"
    folders = {name for name in listed if name.endswith("/")}
    there = {str(p.relative_to(package)) for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    there = {next((f for f in folders if name.startswith(f)), name) for name in there}
    assert listed == there - {f"{d}/__init__.py" for d in ("data", "models", "metrics")}


def test_the_readme_is_useful_before_line_30():
    first = README.splitlines()[:30]
    assert any("make demo" in line for line in first) and any("prog.step(step, optimizer)" in line for line in first)
    assert sum(line.startswith("+") for line in first) == 3


def test_tables_in_the_readme_name_what_exists():
    for mode in MODES:
        assert f"| `{mode}` |" in README
    for strategy in STRATEGIES:
        assert strategy in README
    for command in re.findall(r"`entprog (\w+)", README):
        assert command in _parser()._subparsers._group_actions[0].choices


def test_the_readme_names_every_example_loop():
    assert not [p.name for p in (ROOT / "examples").glob("*.py") if f"`{p.name}`" not in README]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_example_configurations_are_valid(path):
    if is_recipe(path):
        assert set(load_recipe(path).strategies) <= set(STRATEGIES)
    else:
        assert load_config(path).strategy in STRATEGIES


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("wan_*.yaml")), ids=lambda p: p.name)
def test_a_pipeline_trains_on_the_caption_that_its_header_encodes(path):
    assert f'--caption "{load_config(path).caption}"' in path.read_text()


def test_the_settings_in_the_readme_are_those_of_ent_prog():
    shown = yaml.safe_load(README.split("```yaml\nstrategy: ent-prog")[1].split("```")[0])
    assert shown == {k: getattr(STRATEGIES["ent-prog"](), k) for k in shown} and len(shown) > 10


def test_what_the_texts_call_is_there_after_import_entprog():
    import entprog

    loaded = (ROOT / "src" / "entprog" / "__init__.py").read_text()
    written = re.findall(r"\bentprog\.([a-z_.]+)\(", README + (ROOT / "docs" / "guide.md").read_text())
    assert len(written) > 10
    for path in (name.split(".") for name in written):
        assert callable(attrgetter(".".join(path))(entprog)), path
        assert len(path) == 1 or f"from entprog.{path[0]} import" in loaded, f"{path[0]} is not imported with entprog"


def test_configuration_round_trips_and_errors_name_the_choices(tmp_path):
    config = make_config({"seconds": 5, "strategy": "paper", "priority": "random"})
    config.save(tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config
    assert config.progressive().priority == "random" and config.progressive().search == "paired"
    assert load_config(tmp_path / "c.yaml", ["steps=7"]).seconds is None
    for wrong, says in (
        ({"steps": 1, "strategy": "fulll"}, "choose one of.*'full'"),
        ({"steps": 1, "objective": "x"}, "epsilon"),
        ({"steps": 1, "learning_rate": 1}, r"\['learning_rate'\] are unknown.*'lr'"),
        ({"steps": 1, "seconds": 1}, "exactly one"),
        ({"steps": "many"}, "steps = 'many'"),
        ({"steps": 1, "priority": "entropy"}, "choose one of.*'cei'"),
    ):
        with pytest.raises(ValueError, match=says):
            make_config(wrong)
    with pytest.raises(ValueError, match="key=value"):
        load_config(tmp_path / "c.yaml", ["steps"])
    assert load_config(tmp_path / "c.yaml", ["mixed_precision=no"]).mixed_precision == "no"  # YAML says False
    with pytest.raises(ValueError, match="mixed_precision = True"):
        load_config(tmp_path / "c.yaml", ["mixed_precision=yes"])


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("checkpoint_every", 0, 1), ("evaluations", 0, 1), ("num_inference_steps", 0, 1), ("batch_size", 0, 1),
        ("held_out_draws", 0, 1), ("held_out_clips", 0, 1), ("clips", 0, 1), ("steps", 0, 1), ("frames", 0, 1),
        ("size", 0, 1), ("frame_stride", 0, 1), ("lora_rank", 0, 1), ("samples", -1, 0), ("patch_size", -1, 0),
        ("lr", -1, 0), ("weight_decay", -0.1, 0), ("max_grad_norm", -1, 0), ("person_weight", -1, 0),
        ("face_weight", -1, 0), ("condition_dropout", 1.5, 1), ("joint_dropout", -0.1, 0), ("ema_decay", 1.5, 0),
        ("lr_warmup", 1.1, 0), ("lr", float("nan"), 1e-5),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_with_what_is_valid(key, wrong, right):
    with pytest.raises(ValueError, match=f"{key} = {wrong}: Input should be .*(greater|less) than"):
        make_config({"steps": 1} | {key: wrong})
    assert getattr(make_config({"steps": 1} | {key: right}), key) == right
    with pytest.raises(ValueError, match="seconds = 0"):
        make_config({"seconds": 0})


def test_exit_codes(tmp_path, capsys):
    assert main(["train", str(ROOT / "examples" / "cpu_toy.yaml"), "--out", str(tmp_path), "--dry-run"]) == 0
    assert "strategy: ent-prog" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "missing.yaml"), "--out", str(tmp_path)]) == 2
    assert main(["train", str(ROOT / "examples" / "cpu_toy.yaml"), "stages=none", "--out", str(tmp_path)]) == 2
    assert main(["sample", str(tmp_path)]) == 2 and main(["report", str(tmp_path)]) == 2
    with pytest.raises(SystemExit) as stop:
        main(["nonsense"])
    assert stop.value.code == 2


def test_bad_input_is_told_as_it_is_without_a_traceback(tmp_path, capsys, monkeypatch):
    def told(*command):
        assert main(command) == 2
        return capsys.readouterr().out.replace("\n", "")  # a terminal breaks a long path anywhere

    out = ["--out", str(tmp_path / "run")]
    assert "Is a directory" in told("train", str(tmp_path), *out)
    (tmp_path / "torn.yaml").write_text("steps: [1")
    assert "torn.yaml" in told("train", str(tmp_path / "torn.yaml"), *out)
    (tmp_path / "torn.safetensors").write_bytes(b"x")
    assert "eader" in told("export", str(tmp_path / "torn.safetensors"), "--as", "single-file", *out)
    assert "[/x] [wan]" in told("report", "[/x] [wan]")

    monkeypatch.setattr("entprog.report.write_report", lambda run: run / "report.html")
    assert main(["report", "[/x] [wan]"]) == 0 and "[/x] [wan]/report.html" in capsys.readouterr().out

    def missing(*_):
        raise ImportError("install the extra pose, pip install -e '.[pose]' in a clone")

    monkeypatch.setattr("entprog.report.write_report", missing)
    assert "pip install -e '.[pose]'" in told("report", str(tmp_path))


def test_every_field_of_the_settings_can_be_set_by_one_word():
    from dataclasses import fields

    from entprog.strategy import Progressive

    assert {f.name for f in fields(Progressive)} - {f.name for f in fields(RunConfig)} == {"grid", "also_score"}
