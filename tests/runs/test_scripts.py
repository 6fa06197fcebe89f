"""The commands as a person uses them: every shipped config, sweeps, evaluate, generate, report."""

import csv
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesaic.checkpoints import load_model, save_model
from moesaic.cli import evaluate, generate, report
from moesaic.cli.arguments import check_overrides, read_flags
from moesaic.config import from_mapping
from moesaic.distillation.config import DistillationConfig
from moesaic.errors import InputError
from moesaic.interop import config_to_hf
from moesaic.losses import SoftWeightConfig
from moesaic.models import DecoderConfig
from moesaic.training.config import RunConfig
from moesaic.training.run import run

Composed = Callable[..., dict[str, Any]]

ROOT = Path(__file__).resolve().parents[2]


def group(name: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / name).glob("*.yaml"))


RUNS = [name for name in group("experiment") if not name.startswith(("study_", "ladder_"))]
STAGES_ON_PICTURES = ("early_fusion", "fusion_encoder", "fusion_frozen")


@pytest.mark.slow_but_for("balancing")
@pytest.mark.filterwarnings("ignore:.*has collapsed:RuntimeWarning")  # 20 steps are no time to balance in
# stages on pictures are run in test_fusion_run.py, as their names do not fit into windows of this size
@pytest.mark.parametrize("experiment", [name for name in RUNS if name not in STAGES_ON_PICTURES])
def test_every_experiment_runs(composed: Composed, experiment: str, tmp_path: Path) -> None:
    overrides = [f"experiment={experiment}", "name=it"]
    if experiment == "codistill_joint":
        overrides.append("distillation.teacher_model.dim=24")
    elif experiment == "extend_context":
        run(composed("name=start", f"run_dir={tmp_path / 'start'}", "training.steps=2", "training.seq_len=32"))
        overrides += [f"ckpt_path={tmp_path / 'start' / 'checkpoints' / 'last.ckpt'}", "extend_context.multiple=2"]
    elif experiment == "upcycle":
        run(composed("experiment=dense_twin", f"run_dir={tmp_path / 'start'}", "training.steps=2"))
        overrides.append(f"upcycle.from={tmp_path / 'start' / 'checkpoints' / 'last.ckpt'}")
    elif experiment.startswith("codistill_"):
        run(composed("name=teacher", f"run_dir={tmp_path / 'teacher'}", "training.steps=2"))
        overrides.append(f"distillation.teacher={tmp_path / 'teacher' / 'checkpoints' / 'last.ckpt'}")
        if experiment == "codistill_cached":
            overrides.append(f"distillation.cache={tmp_path / 'targets'}")
    assert run(composed(*overrides))["status"] == "finished"


@pytest.mark.slow_but_for("upcycle")
@pytest.mark.parametrize("experiment", RUNS)
def test_every_experiment_is_valid(composed: Composed, experiment: str) -> None:
    given = {
        "codistill_frozen": ["distillation.teacher=it"],
        "codistill_cached": ["distillation.cache=it"],
        "extend_context": ["ckpt_path=it"],
        "upcycle": ["upcycle.from=it"],
        "fusion_frozen": ["fusion.text=it"],
    }
    config = from_mapping(RunConfig, composed(f"experiment={experiment}", *given.get(experiment, []), smoke=False))
    from_mapping(DecoderConfig, {**config.model, "vocab_size": 2048}, "model")


TOO_LARGE = (
    *("scout", "maverick", "behemoth", "mixtral_8x7b", "qwen3_30b_a3b", "olmoe_1b_7b", "gpt_oss_20b", "gpt_oss_120b"),
    *("deepseek_v3", "muse_spark"),
)


@pytest.mark.slow_but_for("small")
@pytest.mark.parametrize("model", [name for name in group("model") if name not in TOO_LARGE])
def test_every_model_runs_at_its_own_size(composed: Composed, corpus: Path, model: str) -> None:
    smoke = ["debug=smoke", "data=files", "data.tokenizer=bytes", f"data.path={corpus}", "training.steps=2"]
    assert run(composed(f"model={model}", *smoke, smoke=False))["status"] == "finished"


@pytest.mark.slow_but_for("cpu-selective_copying", "cpu-sheets", "gpu-sheets")
@pytest.mark.parametrize("data", group("data"))
@pytest.mark.parametrize("trainer", group("trainer"))
def test_every_data_and_trainer_config_is_valid(composed: Composed, data: str, trainer: str) -> None:
    path = "data.path=somewhere" if data in ("files", "memmap", "image_folder") else "++data.path=null"
    from_mapping(RunConfig, composed(f"data={data}", f"trainer={trainer}", path, smoke=False))


def test_train_yaml_lists_every_key_that_can_be_set(composed: Composed) -> None:
    """So that any of them can be overridden on the command line without a plus sign."""
    config = composed()
    assert set(config) == {field.name for field in dataclasses.fields(RunConfig)}
    # a format is said by stored configs alone: composed ones may be from before a word was renamed
    assert set(config["model"]) == {field.name for field in dataclasses.fields(DecoderConfig)} - {"format"}
    sections = [field for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(field.type)]
    assert len(sections) >= 6
    for section in sections:
        fields = [field for field in dataclasses.fields(section.type) if "other_keys" not in field.metadata]
        assert set(config[section.name]) == {field.name for field in fields}, section.name


@pytest.mark.parametrize("experiment", ["codistill_frozen", "codistill_joint", "codistill_cached"])
def test_the_codistillation_experiments_list_every_key_and_the_defaults(composed: Composed, experiment: str) -> None:
    section = composed(f"experiment={experiment}", smoke=False)["distillation"]
    assert set(section) == {field.name for field in dataclasses.fields(DistillationConfig)}
    listed = from_mapping(SoftWeightConfig, section["soft_weight"])
    section = {**section, "soft_weight": None, "teacher": "it", "cache": "it"}
    takes = {"frozen": ["teacher"], "joint": [], "cached": ["teacher", "cache"]}[section["source"]]
    given = {key: value for key, value in section.items() if key not in ("teacher", "cache") or key in takes}
    assert from_mapping(DistillationConfig, given).weight_policy == listed


def test_llama4_tiny_has_exactly_the_published_layout(composed: Composed) -> None:
    model = {**composed("model=llama4_tiny", smoke=False)["model"], "vocab_size": 1024}
    config = from_mapping(DecoderConfig, model)
    assert [(layer.mixer, layer.ffn) for layer in config.layers] == [
        ("chunked_rope", "dense"),
        ("chunked_rope", "moe"),
        ("chunked_rope", "dense"),
        ("nope", "moe"),
    ]
    assert config.attention.conv_width == 0
    assert config.moe is not None
    assert (config.moe.top_k, config.moe.score_function, config.moe.score_before_experts) == (1, "sigmoid", True)
    assert config.hidden_dim == 2 * config.moe.hidden_dim
    assert config.attention.temperature is not None
    assert config.attention.temperature.attn_scale == 0.1


def test_deepseek_v3_tiny_has_exactly_the_published_layout(composed: Composed) -> None:
    model = {**composed("model=deepseek_v3_tiny", smoke=False)["model"], "vocab_size": 1024}
    config = from_mapping(DecoderConfig, model)
    assert [(layer.mixer, layer.ffn) for layer in config.layers] == [("mla", "dense"), *[("mla", "moe")] * 3]
    assert config_to_hf(config, {}, "float32")["model_type"] == "deepseek_v3"


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["training.accumulate=2"],
        ["optimizer.name=adamw", "schedule.name=cosine"],
        ["trainer.precision=bf16-mixed"],
        ["trainer.precision=bf16-true"],
        ["trainer.checkpoint_activations=true"],
        ["balance.router_z_loss_weight=0.01", "balance.load_balance_scope=global_batch"],
        ["model.moe.top_k=2", "model.moe.score_function=softmax", "model.moe.normalize_scores=true"],
        ["model.moe.score_before_experts=false", "model.moe.shared_hidden_dim=0"],
        ["model.moe.backend=padded"],
        ["model.tie_embeddings=true", "model.attention.bias=true", "model.init_std=null"],
        ["data.tokenizer=bpe", "data.vocab_size=300"],
        ["training.validation_seq_len=128", "training.validation_batches=null"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_options_run(composed: Composed, overrides: list[str]) -> None:
    config = composed("training.steps=6", "training.validate_every=3", *overrides)
    assert run(config)["status"] == "finished"


@pytest.mark.slow
def test_sweep_survives_a_failed_run_and_ends_in_a_table(corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "-m", "debug=smoke", "training.steps=4"]
    command += ["data=files", "data.tokenizer=bytes", f"data.path={corpus}", f"output_dir={tmp_path}"]
    command += ["model.moe.top_k=1,99", "seed=0,1", "model.dim=16", "model.attention.head_dim=4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "2 run(s) of this sweep failed" in done.stderr
    [sweep] = (tmp_path / "smoke").glob("sweep-*")
    table = (sweep / "report.md").read_text()
    assert "| top_k=1 | 2 of 2 |" in table
    assert "| top_k=99 | 0 of 2 |" in table
    assert "must be 1 to num_experts=8" in table
    assert table in done.stdout
    assert f"curves: tensorboard --logdir {sweep}" in done.stdout
    runs = sorted(path.name for path in sweep.iterdir() if path.is_dir())
    assert runs == [f"{2 * (k > 1) + seed}-top_k={k},seed={seed}" for k in (1, 99) for seed in (0, 1)]
    stored = yaml.safe_load((sweep / runs[0] / "config.yaml").read_text())
    assert stored["logger"]["tensorboard"]["swept"] == ["model.moe.top_k", "seed"]
    assert (sweep / "report.png").stat().st_size > 0
    with (sweep / "report.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2


def test_evaluate_agrees_with_the_end_of_training(trained: Path, composed: Composed, tmp_path: Path) -> None:
    final = json.loads((trained.parents[1] / "metrics.json").read_text())
    config = composed("data=files", f"checkpoint={trained}", f"output={tmp_path / 'scored'}", config="evaluate")
    numbers = evaluate.evaluate(config)
    assert numbers["loss"] == pytest.approx(final["validation/loss"], rel=1e-5)
    assert numbers["bits_per_byte"] == pytest.approx(final["validation/bits_per_byte"], rel=1e-5)
    assert json.loads((tmp_path / "scored" / "evaluation.json").read_text())["tokens"] == numbers["tokens"]
    assert (tmp_path / "scored" / "evaluation.png").exists()
    elsewhere = tmp_path / "other.txt"
    elsewhere.write_text("Some English prose.\n" * 200)
    config = composed("data=files", f"data.path={elsewhere}", f"checkpoint={trained}", config="evaluate")
    assert evaluate.evaluate(config)["bits_per_byte"] > numbers["bits_per_byte"]


@pytest.mark.slow
def test_specialization_and_drift(trained: Path, composed: Composed, tmp_path: Path) -> None:
    final = json.loads((trained.parents[1] / "metrics.json").read_text())
    asked = ["data=files", f"checkpoint={trained}", "task=specialization", f"output={tmp_path / 'seen'}"]
    numbers = evaluate.evaluate(composed(*asked, f"other_checkpoint={trained}", config="evaluate"))
    assert numbers["router/layers.1.ffn/drift"] == numbers["router/layers.3.ffn/drift"] == 0
    assert json.loads((tmp_path / "seen" / "evaluation.json").read_text())["router/layers.1.ffn/drift"] == 0
    assert (tmp_path / "seen" / "specialization.png").stat().st_size > 0
    counts = json.loads((tmp_path / "seen" / "specialization.json").read_text())["layers.1.ffn"]
    assert sum(map(sum, counts["by_token"])) == sum(map(sum, counts["by_position"])) == numbers["tokens"]
    assert [sum(column) for column in zip(*counts["by_token"], strict=True)] == [
        row[i] for i, row in enumerate(counts["together"])
    ]
    assert len(counts["by_byte_class"]) == len(counts["byte_classes"]) == 5
    key = "router/layers.1.ffn/token_expert_nmi"
    assert numbers[key] == pytest.approx(final[key], abs=1e-3)

    other = load_model(trained)
    for layer in (1, 3):
        other.decoder.get_submodule(f"layers.{layer}.ffn.router").weight.data.neg_()
    save_model(tmp_path / "other.ckpt", other.decoder, other.tokenizer)
    asked = ["data=files", f"checkpoint={trained}", "task=specialization"]
    numbers = evaluate.evaluate(composed(*asked, f"other_checkpoint={tmp_path / 'other.ckpt'}", config="evaluate"))
    assert numbers["router/layers.1.ffn/drift"] > 0.9, "the least likely expert in place of the most likely one"

    save_model(tmp_path / "bare.ckpt", other.decoder)
    with pytest.raises(InputError, match=r"other_checkpoint=.*bare.ckpt: it has another tokenizer than checkpoint"):
        evaluate.evaluate(composed(*asked, f"other_checkpoint={tmp_path / 'bare.ckpt'}", config="evaluate"))
    with pytest.raises(InputError, match=r"other_checkpoint=x: only task=specialization has it"):
        evaluate.evaluate(composed("data=files", f"checkpoint={trained}", "other_checkpoint=x", config="evaluate"))
    twin = run(composed("model.dense_twin=true", "training.steps=1", f"run_dir={tmp_path / 'dense'}"))
    assert twin["status"] == "finished"
    dense = f"checkpoint={tmp_path / 'dense' / 'checkpoints' / 'last.ckpt'}"
    with pytest.raises(InputError, match=r"task=specialization: .*last.ckpt has no MoE layers"):
        evaluate.evaluate(composed("data=files", dense, "task=specialization", config="evaluate"))


def test_evaluate_refuses_bad_input(trained: Path, composed: Composed) -> None:
    with pytest.raises(InputError, match=r"split='test': must be one of validation, train"):
        evaluate.evaluate(composed("data=files", f"checkpoint={trained}", "split=test", config="evaluate"))
    with pytest.raises(InputError, match=r"no such file"):
        evaluate.evaluate(composed("data=files", "checkpoint=/nowhere", config="evaluate"))


@pytest.mark.slow
def test_evaluate_refuses_what_it_would_overwrite_or_cannot_fill(
    trained: Path, composed: Composed, tmp_path: Path
) -> None:
    asked = ["data=files", f"checkpoint={trained}", f"output={tmp_path / 'scored'}"]
    numbers = evaluate.evaluate(composed(*asked, config="evaluate"))
    before = {path: path.read_bytes() for path in (tmp_path / "scored").iterdir()}
    with pytest.raises(
        InputError, match=r"evaluation.json: results of another evaluation, .*: seq_len: '\(absent\)' there, 16 now"
    ):
        evaluate.evaluate(composed(*asked, "seq_len=16", config="evaluate"))
    with pytest.raises(InputError, match=r"results of another evaluation, .*task: 'score' there, 'specialization' now"):
        evaluate.evaluate(composed(*asked, "task=specialization", config="evaluate"))
    assert {path: path.read_bytes() for path in (tmp_path / "scored").iterdir()} == before
    again = evaluate.evaluate(composed(*asked, "batch_size=3", config="evaluate"))
    assert again["loss"] == pytest.approx(numbers["loss"], rel=1e-5)
    copy = tmp_path / "copy.ckpt"  # results are known by what is in a checkpoint, and by no key that they do not read
    copy.write_bytes(trained.read_bytes())
    evaluate.evaluate(composed("data=files", f"checkpoint={copy}", asked[2], "needle.samples=3", config="evaluate"))
    model = load_model(trained)
    copy.unlink()
    save_model(copy, model.decoder, model.tokenizer)
    with pytest.raises(InputError, match=r"results of another evaluation, .*: checkpoint_digest: "):
        evaluate.evaluate(composed("data=files", f"checkpoint={copy}", asked[2], config="evaluate"))
    (tmp_path / "scored" / "evaluation.json").unlink()
    with pytest.raises(InputError, match=r"scored/evaluation.png: would be overwritten"):
        evaluate.evaluate(composed(*asked, config="evaluate"))
    for key in ("checkpoint", "other_checkpoint", "output"):
        config = composed("data=files", f"checkpoint={trained}", "task=specialization", config="evaluate")
        with pytest.raises(InputError, match=f"{key}=2024: must be a path"):
            evaluate.evaluate({**config, key: 2024})
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"output=.*file/x.*cannot be written"):
        evaluate.evaluate(composed(*asked[:2], f"output={tmp_path / 'file' / 'x'}", config="evaluate"))
    (tmp_path / "scored" / "evaluation.json").write_text("[]")
    with pytest.raises(InputError, match=r"evaluation.json: found a list; must be a mapping"):
        evaluate.evaluate(composed(*asked, config="evaluate"))
    with pytest.raises(InputError, match=r"seq_len=1000000: longer than the data, the validation split has \d+ tokens"):
        evaluate.evaluate(composed("data=files", f"checkpoint={trained}", "seq_len=1000000", config="evaluate"))


@pytest.mark.slow
def test_generate_continues_the_prompt(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(trained), "def f1(", "max_new_tokens=12", "seed=3"]
    generate.main(arguments)
    first = capsys.readouterr().out
    generate.main(arguments)
    assert capsys.readouterr().out == first
    assert first.startswith("def f1(")
    assert len(first) > len("def f1(") + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere.ckpt"], "error: checkpoint /nowhere.ckpt: no such file\n"),
        (["TRAINED", "temperature=-1"], "error: temperature=-1.0: must be a number >= 0 (0: greedy)\n"),
        (["TRAINED", "top_p=2"], "error: top_p=2.0: must be 0 < top_p <= 1, or null\n"),
    ],
)
def test_generate_refuses_bad_input(
    trained: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        generate.main([str(trained) if argument == "TRAINED" else argument for argument in arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == message


def test_report_refuses_a_folder_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path)])
    assert stopped.value.code == 2
    assert "no run in it; a run is a directory with a config.yaml" in capsys.readouterr().err


def test_report_on_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([str(trained.parents[1]), "metrics=[validation/loss]"])
    assert "| (all equal) | 1 of 1 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        report.main([str(trained.parents[1]), "metrics=[accuracy]"])
    assert "metrics: no run has accuracy; found: active_flops" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "training.step=5",
            r"training.step: unknown key (did you mean training.steps?); must be one of training.steps, ",
        ),
        ("trainng.steps=5", r"trainng.steps: unknown key (did you mean training.steps?); must be one of model, data, "),
        ("model.attention.heads=2", r"model.attention.heads: unknown key (did you mean model.attention.num_heads?)"),
        ("+extra.key=1", r"extra.key: unknown key; must be one of model, data, "),
        ("~training", r"~training: this key cannot be taken away"),
        ("data=null", r"data=null: no such option; must be one of associative_recall, "),
        ("model.num_expert=4", r"model.num_expert: unknown key (did you mean model.moe.num_experts?)"),
        ("data.batch_size=4", r"data.batch_size: unknown key (did you mean training.batch_size?)"),
        ("modle=small", r"modle: unknown key (did you mean model?)"),
        ("experiment=balanceing", r"experiment=balanceing: no such option (did you mean balancing?)"),
        ("experiment=recall,balanceing", r"no such option (did you mean balancing?)"),
        ("optimizer=adamw", r"optimizer is a section (did you mean optimizer.name=adamw?)"),
        ("model.pattern=[{mixer", r"""model.pattern=[{mixer: cannot be read (no viable alternative"""),
        ("name='x", "must be in quotes inside quotes: \"name='\\\\'x'\""),
        ("small", r"small: must be key=value"),
    ],
)
def test_unknown_keys_are_answered_with_the_allowed_ones(argument: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_overrides("train", ["seed=1,2", argument])


def test_keys_of_a_section_that_only_the_experiment_gives() -> None:
    check_overrides("train", ["experiment=codistill_frozen", "distillation.soft_weight.value=0.1"])
    with pytest.raises(
        InputError, match=re.escape("distillation.teachr: unknown key (did you mean distillation.teach")
    ):
        check_overrides("train", ["experiment=codistill_frozen", "distillation.teachr=x"])


def test_known_keys_groups_and_hydra_syntax_pass() -> None:
    known = ["experiment=balancing", "model=llama4_tiny", "+data.extra=1", "~data.task", "hydra.run.dir=x", "seed=1"]
    check_overrides("train", [*known, "model.attention.rope_scaling.factor=8", "hydra/launcher=joblib"])
    check_overrides("train", ["experiment=codistill_frozen,balancing"])
    assert read_flags("train", ["-sc", "install=bash"])[0].shell_completion


@pytest.mark.slow
def test_unknown_key_on_the_command_line() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "optimizer.lr=1"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        "error: optimizer.lr: unknown key (did you mean optimizer.learning_rate?); must be one of optimizer.name, "
    )
    assert refused.stderr.count("\n") == 1
