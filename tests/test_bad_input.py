"""Bad input on the command lines of all commands: one line that names what is wrong, exit code 2, nothing left behind.

No case trains. Each row is a command line and the words that its message must have.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console

from moesaic.checkpoints import save_model
from moesaic.cli import main
from moesaic.cli.common import composed, exit_on_bad_input
from moesaic.cli.evaluate import evaluate, evaluate_long_context
from moesaic.cli.memory import report
from moesaic.cli.study import study
from moesaic.cli.train import train
from moesaic.data import ByteTokenizer
from moesaic.distillation.fill import fill_cache
from moesaic.models import llama4_toy
from moesaic.models.decoder import build_decoder
from moesaic.overrides import apply_overrides

TEXT = ["data=files", "data.path=text", "data.tokenizer=bytes"]
SMALL = ["debug=smoke", *TEXT, "trainer.precision=32-true", "run_dir=run"]
COMPARE = f"compare debug=smoke {' '.join(TEXT)} only=costs rounds=0"

COMPOSED: dict[str, tuple[list[str], Callable[[dict[str, Any]], object]]] = {
    "train": (SMALL, train),
    "evaluate": (
        ["checkpoint=toy.ckpt", *TEXT, "output=out"],
        lambda config: (evaluate if config["task"] == "score" else evaluate_long_context)(config),
    ),
    "cache-targets": (
        ["teacher=toy.ckpt", "directory=targets", "seq_len=16", *TEXT],
        lambda config: fill_cache(config, Console(quiet=True)),
    ),
    "study": (
        ["experiment=study_balancing", "output_dir=out", "results_dir=out"],
        lambda config: study(config, "moesaic study", Console(quiet=True)),
    ),
    "memory": (["name=small"], report),
}
"""What `VALUES` change, and the function of the command that takes it."""

VALUES: list[tuple[str, list[str]]] = [
    ("train optimizer.learning_rate=nan", ["optimizer.learning_rate=nan", "must be a finite number"]),
    ("train optimizer.eps=inf", ["optimizer.eps=inf", "finite"]),
    ("train optimizer.weight_decay=-inf", ["optimizer.weight_decay=-inf", "finite"]),
    ("train balance.router_z_loss_weight=nan", ["balance.router_z_loss_weight=nan", "finite"]),
    ("train schedule.final_factor=nan", ["schedule.final_factor=nan", "finite"]),
    (
        "train model.moe.router={type:capacity,capacity_factor:0.0001}",
        ["layers.1.ffn.router: capacity_factor=0.0001: leaves no row to an expert", "training.batch_size larger"],
    ),
    ("train model.norm_eps=inf", ["model.norm_eps=inf", "finite"]),
    ("train model.init_std=nan", ["model.init_std=nan", "finite"]),
    ("train model.attention.rope_theta=inf", ["model.attention.rope_theta=inf", "finite"]),
    ("train training.gradient_clip=nan", ["training.gradient_clip=nan", "finite"]),
    ("train sample.temperature=inf", ["sample.temperature=inf", "finite"]),
    ("train data.validation_fraction=nan", ["data.validation_fraction=nan", "finite"]),
    ("train training.steps=nan", ["training.steps", "must be an integer"]),
    ("train training.steps=1e25", ["training.steps=1", "at most 1000000000"]),
    ("train training.batch_size=3000000000", ["training.batch_size=3000000000", "at most"]),
    ("train training.seq_len=9e14", ["training.seq_len=900000000000000", "at most"]),
    ("train training.accumulate=1e12", ["training.accumulate=1000000000000", "at most"]),
    ("train trainer.threads=70000", ["trainer.threads=70000", "at most 1024"]),
    ("train trainer.devices=90000", ["trainer.devices=90000", "at most 1024"]),
    ("train seed=20261130010203", ["seed=20261130010203", "at most 4294967295"]),
    ("train seed=-7", ["seed=-7", "must be an integer from 0 to 4294967295"]),
    ("train model.moe.num_experts=250000", ["model.moe.num_experts=250000", "at most"]),
    ("train model.num_layers=60000", ["model.num_layers=60000", "at most 1024"]),
    ("train model.vocab_size=1e12", ["model.vocab_size=1000000000000", "at most"]),
    ("train model.dim=4e9", ["model.dim=4000000000", "at most"]),
    ("train sample.max_new_tokens=1e10", ["sample.max_new_tokens=10000000000", "at most"]),
    ("train data.vocab_size=5e9 data.tokenizer=bpe", ["data.vocab_size=5000000000", "at most"]),
    ("train model.dim=262144 model.hidden_dim=1000000", ["memory, but", "has", "training.batch_size=2"]),
    ("train training.batch_size=900000 training.seq_len=900000", ["training.seq_len=900000", "memory, but"]),
    ("train trainer.num_nodes=0", ["trainer.num_nodes=0", "must be a number >= 1"]),
    (
        "train trainer.devices=2 model.moe.num_experts=16384 model.moe.hidden_dim=400000",
        ["2 processes on this machine, each", "of memory, but"],
    ),
    ("train model.moe.num_experts=16384 model.moe.hidden_dim=400000", ["model, training", "of memory, but"]),
    ("train data.cache_dir=text/0.txt", ["data.cache_dir='text/0.txt'", "cannot be written"]),
    ("train ckpt_path=nowhere.ckpt", ["nowhere.ckpt"]),
    ("train ckpt_path=text/0.txt", ["text/0.txt"]),
    ("train resume=true run_dir=text", ["run_dir='text'", "not a run directory"]),
    ("train trainer.precision=8", ["trainer.precision", "must be"]),
    ("train model.moe.top_k=0", ["model.moe.top_k=0", "must be 1 to num_experts"]),
    ("train model.attention.num_heads=0", ["model.attention.num_heads=0", "must be"]),
    ("train model.activation=tanhh", ["model.activation: found 'tanhh'", "must be silu | gelu"]),
    ("train optimizer.name=sgd", ["optimizer.name", "adamw", "muon"]),
    ("train name=a/b", ["name='a/b'", "must be a directory name"]),
    ("cache-targets temperature=inf", ["temperature=inf", "finite"]),
    ("evaluate task=loss_by_position loss_by_position.multiple=inf", ["loss_by_position.multiple=inf", "finite"]),
    ("evaluate task=needle needle.depths=[0,nan]", ["needle.depths[1]=nan", "finite"]),
    ("study study.tune.factors=[1,inf]", ["study.tune.factors[1]=inf", "finite"]),
    ("evaluate task=needle needle.samples=1e9", ["needle.samples=1000000000", "at most"]),
    ("evaluate task=needle needle.seed=1e13", ["needle.seed=10000000000000", "at most 4294967295"]),
    ("evaluate task=loss_by_position loss_by_position.chunk_tokens=1e12", ["chunk_tokens=1000000000000", "at most"]),
    ("study study.seeds=[0,5000000000]", ["study.seeds[1]=5000000000", "at most 4294967295"]),
    ("study study.tune.seed=1e11", ["study.tune.seed=100000000000", "at most"]),
    ("study model.hidden_dim=4000000 model.dim=65536", ["study.arms.", "of memory, but"]),
    ("memory batch_size=0", ["batch_size=0", "must be"]),
    (f"memory seq_len={10**30}", ["seq_len=1000", "at most 1,099,511,627,776"]),
    ("memory trace=falsch", ["trace='falsch'", "must be true or false"]),
    ("memory name=[small]", ["name=['small']", "must be one of"]),
    ("memory trace=true seq_len=100000000", ["seq_len=100000000", "at most"]),
    ("evaluate split=test", ["split='test'", "must be one of"]),
    ("evaluate batch_size=0", ["batch_size=0", "must be"]),
    ("evaluate task=everything", ["task='everything'", "must be one of"]),
    ("evaluate seq_len=1000000", ["seq_len=1000000", "must be"]),
    ("cache-targets seq_len=0", ["seq_len=0", "must be"]),
    ("cache-targets kind=all", ["kind", "top_k"]),
    ("cache-targets k=0", ["k=0", "must be"]),
    ("cache-targets windows_per_shard=7", ["windows_per_shard=7", "multiple of batch_size"]),
    ("study workers=0", ["workers=0", "must be"]),
    ("study results_dir=2026", ["results_dir=2026", "must be a path"]),
    ("study study=null", ["study=None", "must be a section"]),
    ("train resume=true run_dir=2026", ["run_dir=2026", "must be a path"]),
    ("memory dtype=int4", ["dtype='int4'", "must be one of"]),
    ("memory optimizer=sgd", ["optimizer='sgd'", "must be one of"]),
]
"""Composed once per command, for the time, of which Hydra takes the most."""

ROWS: list[tuple[str, list[str]]] = [
    ("generate toy.ckpt temperature=nan", ["temperature=nan", "finite"]),
    ("generate toy.ckpt seed=8589934592", ["seed=8589934592", "must be an integer from 0 to 4294967295"]),
    ("generate toy.ckpt top_p=-inf", ["top_p=-inf", "finite"]),
    (f"{COMPARE} new='optimizer.beta1=nan'", ["beta1=nan: optimizer.beta1=nan", "finite"]),
    (f"{COMPARE} new='training.batch_size=1e9'", ["training.batch_size=1000000000", "at most"]),
    ("compare new=model.dense_twin=true rounds=1e8", ["rounds=100000000", "at most"]),
    (
        "compare new='model.hidden_dim=3000000 model.dim=65536' model.vocab_size=2048",
        ["hidden_dim=3000000", "memory"],
    ),
    ("train data=files data.path=nowhere run_dir=run", ["data.path='nowhere'", "no such file or folder"]),
    ("train data=files data.path=binary run_dir=run", ["binary", "must be UTF-8 text"]),
    ("train data=files data.path=empty run_dir=run", ["data.path='empty'"]),
    ("train data=files data.source=memmap data.path=text run_dir=run", ["text", "manifest.json"]),
    ("evaluate nowhere.ckpt", ["nowhere.ckpt"]),
    ("evaluate text/1.txt", ["text/1.txt"]),
    ("evaluate cut.ckpt", ["cut.ckpt"]),
    ("generate nowhere.ckpt", ["nowhere.ckpt"]),
    ("generate cut.ckpt", ["cut.ckpt"]),
    ("convert nowhere out", ["nowhere"]),
    ("convert nowhere x.ckpt", ["nowhere: no such file"]),
    ("convert text/0.txt x.ckpt", ["text/0.txt: truncated or not a checkpoint"]),
    ("convert text out.ckpt", ["text", "config.json"]),
    ("convert toy.ckpt toy.ckpt", ["toy.ckpt"]),
    ("convert toy.ckpt out dtype=int8", ["dtype='int8'", "must be one of"]),
    ("cache-targets nowhere.ckpt targets", ["teacher='nowhere.ckpt'", "no such file"]),
    ("cache-targets cut.ckpt targets data=files data.path=text data.tokenizer=bytes", ["cut.ckpt"]),
    ("compare new=model.dense_twin=true output_dir=there", ["output_dir", "results_dir"]),
    ("compare new=model.dense_twin=true resume=true", ["resume", "left out"]),
    ("parallel-check trace=many", ["trace='many'", "from 0 to"]),
    ("transfer chek", ["action='chek'", "must be check"]),
    ("transfer check kinds=[sparse]", ["kinds=sparse", "must be one of moe, dense"]),
    ("transfer check parametrizations=[]", ["parametrizations=[]", "one or more of standard"]),
    ("transfer check widths=[64] depths=[2]", ["widths=[64]", "two of them"]),
    ("transfer check widths=[65,130]", ["dim=65", "must be whole"]),
    ("transfer check widths=[64,64]", ["widths=[64, 64]", "different whole numbers"]),
    ("train model.parametrization=transfer model.tie_embeddings=true", ["tie_embeddings=True", "must be false"]),
    ("train transfer.base.dim=0", ["transfer.base.dim=0", "must be a number >= 1"]),
    ("tokenize nowhere ids", ["data.path='nowhere'", "no such file or folder"]),
    ("tokenize binary ids", ["data.path='binary'", "must be UTF-8 text"]),
    ("tokenize text", ["directory=None", "it is needed"]),
    ("tokenize text binary", ["directory='binary'", "must be new, empty or begun by this command"]),
    ("tokenize text ids checkpoint=cut.ckpt", ["cut.ckpt"]),
    ("tokenize text ids data.vocab_size=9", ["data.vocab_size=9", "at least 257"]),
    ("train launcher=submitit", ["launcher=submitit", "must have -m and hydra/launcher"]),
    ("train -m hydra/launcher=joblibb seed=0,1", ["hydra/launcher/joblibb", "pip install hydra-joblibb-launcher"]),
    ("report nowhere", ["nowhere"]),
    ("generate", ["checkpoint", "missing"]),
    ("generate toy.ckpt max_new_tokens=-1", ["max_new_tokens=-1", "must be"]),
    ("generate toy.ckpt hello world", ["world", "no place"]),
    ("evaluate", ["checkpoint", "missing"]),
    ("study experiment=study_nothing", ["study_nothing", "no such option"]),
    ("study", ["experiment", "must be one of"]),
    ("ladder", ["experiment", "must be one of ladder_conv"]),
    ("ladder experiment=ladder_moe ladder.rungs=[1e11,1e12]", ["rungs=[1e11, 1e12]", "too few"]),
    ("predict", ["directory=None", "must be a results directory of moesaic ladder"]),
    ("predict text", ["at=None", "must be a number of FLOPs"]),
    ("predict text at=1e14", ["text", "it has no ladder.yaml"]),
    ("predict text at=1e14 asymptote=none", ["asymptote=none", "must be one of pinned, free"]),
    ("compare new=model.dense_twin=true equal=speed", ["equal", "must be"]),
    ("compare new=model.dense_twin=true rounds=-1", ["rounds=-1", "must be"]),
    ("memory", ["name", "must be one of"]),
    ("memory mavrick", ["name=mavrick (did you mean maverick?)", "must be one of"]),
    ("plan llama5", ["model='llama5'", "must be one of"]),
    ("plan small devices=6 parallel.expert=4", ["parallel.expert=4", "must divide the 6 processes", "1, 2, 3, 6"]),
    ("plan small devices=6 training.batch_size=8", ["training.batch_size=8", "must be a multiple of 6", "6 or 12"]),
    ("plan small model.vocab_size=0", ["vocab_size", "must be a number > 0"]),
    ("plan small devices=9", ["devices=9", "gpus_per_node=8"]),
    ("bench nothing", ["name=nothing", "must be one of"]),
    ("bench rooflin", ["name=rooflin (did you mean roofline?)", "must be one of"]),
    ("conformance moesaic-top2-bais", ["did you mean moesaic-top2-bias?"]),
    ("conformance layers=5", ["layers=5", "must be a list"]),
    ("conformance layers=moesaic", ["layers='moesaic'", "must be a list, such as layers=[moesaic]"]),
    ("bench peers layers=a:b", ["layers='a:b'", "must be a list"]),
    ("report text metrics=nan", ["metrics=nan", "must be a list"]),
    ("report text metrics=[[a]]", ["metrics=[['a']]", "must be a list"]),
    ("scaffold x folder=5", ["folder=5", "must be a path"]),
    ("train text", ["text", "no place", "did you mean data=files data.path=text?"]),
    (f"evaluate toy.ckpt output={'o' * 300}", ["output: a name of 300 bytes", "at most 255", "file system"]),
    (f"train debug=smoke run_dir=a/{'ü' * 130}", ["run_dir: a name of 260 bytes", "at most 255"]),
    (f"generate {'d/' * 2100}", ["checkpoint: a path of 4200 bytes", "at most 4096"]),
    ("bench loss tokens=4", ["tokens=4", "must be one of"]),
    ("conformance nothing", ["nothing", "must be package.module:factory"]),
    ("conformance no_such_module:make", ["no_such_module", "cannot be imported"]),
    ("report", ["directory", "missing"]),
    ("trainn", ["trainn", "did you mean moesaic train"]),
    ("train debug=smoke training.stepz=3", ["training.stepz", "did you mean training.steps"]),
    ("train debug=smoke model=huge", ["model=huge", "no such option"]),
    ("train debug=smoke trainer.max_time=5", ["trainer.max_time", "must be a string"]),
    ("train debug=smoke data=induction data.task={test_sequences:1e11}", ["test_sequences=100000000000", "at most"]),
]

AS_PROCESSES = [
    f"train {' '.join(SMALL)} optimizer.muon_learning_rate=inf",
    "evaluate gone.ckpt",
    "memory llama9",
    f"cache-targets toy.ckpt targets {' '.join(TEXT)} seed=99999999999",
    "conformance elsewhere",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with some text, a small checkpoint and a cut one."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("text", "binary", "empty"):
        (folder / name).mkdir()
    for i in range(8):
        (folder / "text" / f"{i}.txt").write_text(f"line {i} of a small text\n" * 40)
    (folder / "binary" / "x.bin").write_bytes(b"\0\1\2" * 50)
    with torch.random.fork_rng():
        save_model(folder / "toy.ckpt", build_decoder(llama4_toy()), ByteTokenizer(), seq_len=32)
    (folder / "cut.ckpt").write_bytes((folder / "toy.ckpt").read_bytes()[:5000])
    return folder


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder as the working directory; afterwards it must hold what it held before."""
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    yield place
    made = [path for path in sorted(place.rglob("*")) if path not in before and ".cache" not in path.parts]
    assert made == [], "something is left behind"


def require_one_line(error: str, words: list[str]) -> None:
    lines = [line for line in error.splitlines() if line.strip()]
    assert "Traceback" not in error
    assert lines and lines[-1].startswith("error: "), error
    assert len(lines) == 1, error
    assert [word for word in words if word not in lines[-1]] == [], error


@pytest.mark.slow_but_for(
    "tokenize binary ids",
    "generate toy.ckpt top_p=-inf",
    "tokenize text ids checkpoint=cut.ckpt",
    "train -m hydra/launcher=joblibb seed=0,1",
    "tokenize text ids data.vocab_size=9",
)
@pytest.mark.parametrize(("line", "words"), ROWS, ids=[line for line, _ in ROWS])
def test_is_refused_in_one_line(line: str, words: list[str], inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(line))
    require_one_line(capsys.readouterr().err, words)
    assert stopped.value.code == 2


@pytest.fixture(scope="module")
def configs(place: Path) -> dict[str, dict[str, Any]]:
    return {name: composed(name.replace("-", "_"), words) for name, (words, _) in COMPOSED.items()}


@pytest.mark.parametrize(("line", "words"), VALUES, ids=[line for line, _ in VALUES])
def test_a_value_is_refused_in_one_line(
    line: str,
    words: list[str],
    configs: dict[str, dict[str, Any]],
    inside: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, *given = shlex.split(line)
    overrides = {each.key_or_group: each.value() for each in OverridesParser.create().parse_overrides(given)}
    config = apply_overrides(configs[name], overrides, name)
    with pytest.raises(SystemExit) as stopped:
        exit_on_bad_input(lambda: COMPOSED[name][1](config))
    require_one_line(capsys.readouterr().err, words)
    assert stopped.value.code == 2


def test_there_are_enough_rows() -> None:
    lines = {line for line, _ in [*ROWS, *VALUES]}
    assert len(lines) == len(ROWS) + len(VALUES) >= 80


@pytest.mark.slow
@pytest.mark.parametrize("line", AS_PROCESSES)
def test_the_same_as_a_process(line: str, inside: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "moesaic", *shlex.split(line)], capture_output=True, text=True, env=environment
    )
    require_one_line(done.stderr, [])
    assert done.returncode == 2
