"""The command moesaic: its commands, their help, words and text on the command line, the user's own config files."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from moesaic import __version__
from moesaic.checkout import CONFIG_DIR
from moesaic.cli import COMMANDS, main
from moesaic.cli.arguments import check_overrides, complete
from moesaic.cli.bench import NAMES, exit_status_of, flags_of
from moesaic.cli.common import composed, prepare
from moesaic.cli.config_files import config_groups, default_options, help_text
from moesaic.config import flatten
from moesaic.errors import InputError
from moesaic.interrupts import Interrupted, interruptible

WITHOUT_TORCH = """
import sys
sys.modules.update(dict.fromkeys(["torch", "lightning", "rich", "matplotlib"]))  # an import of these fails
from moesaic.cli import main
for line in sys.argv[1:]:
    try:
        main(line.split(" "))
    except SystemExit as stopped:
        print(stopped.code, file=sys.stderr)
"""

QUICK = """
import sys
sys.modules.update(dict.fromkeys(["torch", "hydra", "lightning", "omegaconf"]))  # an import of these fails
from moesaic.cli import main
main(sys.argv[1:])
"""


def exit_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    return stopped.value.code, capsys.readouterr().err


def test_without_a_command_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown and command.summary in shown for name, command in COMMANDS.items())
    main(["--version"])
    assert capsys.readouterr().out == f"moesaic {__version__}\n"


def test_an_unknown_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = exit_of(["trian"], capsys)
    assert code == 2
    assert error.startswith("error: trian: unknown command (did you mean moesaic train?); must be one of train, ")
    assert "did you mean moesaic cache-targets?" in exit_of(["cache_targets"], capsys)[1]


@pytest.mark.slow
def test_typing_errors_are_answered_without_torch() -> None:
    expected = {
        "train training.stepz=5": "training.stepz: unknown key (did you mean training.steps?); must be one of ",
        "study experiment=study_balance": "experiment=study_balance: no such option (did you mean study_balancing?)",
        "memory small dtypo=x": "dtypo: unknown key (did you mean dtype?); must be one of ",
        "generate a.ckpt hi ho": "ho: no place for this word; must be moesaic generate CHECKPOINT [PROMPT] ",
        "train seed=0 -m --cgf job": "unrecognized arguments: --cgf job; moesaic train --help lists the flags",
        "train seed=0 --cfg": "argument --cfg/-c: expected one argument; moesaic train --help lists the flags",
        "report runs metrics=[a": "metrics=[a: cannot be read (",
        "train data.path=Ünï/日本[x]": "data.path=Ünï/日本[x]: cannot be read (",
        "train run_dir=a,b": "run_dir=a,b: several values are a sweep, which must have -m; one text must be in quotes "
        "inside quotes: \"run_dir='a,b'\"",
        "train experiment=recall,balancing": "experiment=recall,balancing: several values are a sweep, which must ",
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *expected], capture_output=True, text=True, check=False, encoding="utf-8"
    )
    lines = done.stderr.splitlines()
    assert lines[1::2] == ["2"] * len(expected), done.stderr
    for line, message in zip(lines[::2], expected.values(), strict=True):
        assert line.startswith(f"error: {message}")


@pytest.mark.slow_but_for("train-arguments3-flags3-overrides3")
@pytest.mark.parametrize(
    ("name", "arguments", "flags", "overrides"),
    [
        ("train", ["training.steps=5", "-m", "seed=0,1"], ["-m"], ["training.steps=5", "seed=0,1"]),
        ("train", ["seed=1", "--cfg", "job", "trainer.x=1"], ["--cfg", "job"], ["seed=1", "++trainer.x=1"]),
        ("train", ["--config-dir=CONF", "seed=1"], ["--config-dir=CONF"], ["seed=1"]),
        ("train", ["seed=1", "--config-dir", "CONF"], ["--config-dir", "CONF"], ["seed=1"]),
        ("generate", ["--cfg", "job", "a.ckpt", "- x"], ["--cfg", "job"], ["checkpoint='a.ckpt'", "prompt='- x'"]),
        ("generate", ["a.ckpt", "--", "--x"], [], ["checkpoint='a.ckpt'", "prompt='--x'"]),
    ],
)
def test_flags_may_stand_anywhere(
    name: str, arguments: list[str], flags: list[str], overrides: list[str], tmp_path: Path
) -> None:
    given = [argument.replace("CONF", str(tmp_path)) for argument in arguments]
    found = prepare(name, given)
    assert found == [*(flag.replace("CONF", str(tmp_path)) for flag in flags), *overrides]
    assert found.typed == given


def test_help_after_keys(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "training.steps=5", "-m", "seed=0,1", "--help"])
    assert capsys.readouterr().out.startswith("Train a model; -m for a sweep.\n")


@pytest.mark.slow_but_for("conformance", "cache-targets")
@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_key_and_every_choice(name: str) -> None:
    config_name = name.replace("-", "_")
    shown = help_text(name)
    config = composed(config_name, [])
    keys = {key for path in flatten(config) for key in path.split(".")}
    assert [key for key in sorted(keys) if f"{key}:" not in shown] == []
    assert "hydra:" not in shown and "defaults:" not in shown
    assert f"moesaic {name} " in shown.replace("\n", " "), "an example"
    for group in default_options(config_name):
        for option in config_groups(CONFIG_DIR)[group]:
            assert option in shown


@pytest.mark.slow_but_for("train --help")
@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_is_quick(argv: list[str]) -> None:
    """Nothing heavy is imported, and it takes less than 3 seconds of CPU time."""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", QUICK, *argv], capture_output=True, text=True, check=False)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert after.children_user + after.children_system - before.children_user - before.children_system < 3


def test_a_missing_package_is_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-c", QUICK, "generate", "x.ckpt"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: moesaic generate needs the package ")
    assert done.stderr.endswith(": pip install 'moesaic[train]'\n") and done.stderr.count("\n") == 1


@pytest.mark.slow_but_for("moesaic sc-expected0")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("moesaic sc", ["scaffold"]),
        ("moesaic train model=ll", ["model=llama4_tiny"]),
        ("moesaic evaluate loss_by_position.multi", ["loss_by_position.multiple="]),
    ],
)
def test_a_shell_completes_commands_and_keys(line: str, expected: list[str]) -> None:
    asks = [sys.executable, "-m", "moesaic", "-sc", "query=bash"]  # as what -sc install=bash prints does
    environment = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    found = subprocess.run(asks, env=environment, capture_output=True, text=True, check=True).stdout
    assert [word for word in found.split() if word.startswith(line.split()[-1])] == expected


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("generate", ["a.ckpt", "def main("], {"checkpoint": "a.ckpt", "prompt": "def main("}),
        ("generate", ["a.ckpt", "42", "seed=3"], {"prompt": "42", "seed": 3}),
        ("generate", ["a b/größe=1,2/x.ckpt", "f(x=1, 'y', \"z\")"], {"prompt": "f(x=1, 'y', \"z\")"}),
        ("generate", ["runs/lr=0.1/last.ckpt"], {"checkpoint": "runs/lr=0.1/last.ckpt"}),
        ("generate", ["a.ckpt", "${HOME} \\${x} \\ 'q\\'"], {"prompt": "${HOME} \\${x} \\ 'q\\'"}),
        (
            "generate",
            ["checkpoint=runs/é=1/a.ckpt", "prompt=x[y](z"],
            {"checkpoint": "runs/é=1/a.ckpt", "prompt": "x[y](z"},
        ),
        ("evaluate", ["a.ckpt", "data.path=my texts/é=1"], {"checkpoint": "a.ckpt"}),
        ("conformance", ["moesaic", "mine.layers:make", "markdown=true"], {"layers": ["moesaic", "mine.layers:make"]}),
        ("convert", ["a b", "c.ckpt"], {"source": "a b", "destination": "c.ckpt"}),
        ("cache-targets", ["t.ckpt", "to"], {"teacher": "t.ckpt", "directory": "to"}),
        ("tokenize", ["my texts/é=1", "ids[1]"], {"directory": "ids[1]"}),
        ("compare", ["new=model.dim=[1,2] model.x=3"], {"baseline": "", "new": "model.dim=[1,2] model.x=3"}),
        ("bench", ["experts", "smoke=true"], {"name": "experts", "smoke": True}),
    ],
)
def test_words_and_text_arrive_unchanged(name: str, arguments: list[str], expected: dict[str, object]) -> None:
    config = composed(name.replace("-", "_"), complete(name, arguments))
    assert {key: config[key] for key in expected} == expected


def test_a_word_without_a_place(capsys: pytest.CaptureFixture[str]) -> None:
    message = "error: balancing: no place for this word (did you mean experiment=balancing?); must be moesaic train "
    assert exit_of(["train", "balancing"], capsys)[1].startswith(message)


@pytest.mark.slow
def test_experiments_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my conf"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\ntraining: {steps: 7}\n")
    with pytest.raises(InputError, match="no such option"):
        check_overrides("train", ["experiment=mine"])
    check_overrides("train", ["experiment=mine"], str(folder))
    assert "study_irope, study_irope_no_conv" in help_text("train", ["--config-dir", str(folder)])
    assert ", mine, " in help_text("train", ["--config-dir", str(folder)])
    main(["train", "--config-dir", str(folder), "--cfg", "job", "experiment=mine"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["name"], shown["training"]["steps"]) == ("mine", 7)
    (folder / "experiment" / "broken.yaml").write_text("name: [\n")
    with pytest.raises(InputError, match=r"a file must be YAML: while parsing.*broken\.yaml"):
        check_overrides("train", ["experiment=broken"], str(folder))
    (folder / "experiment" / "recall.yaml").touch()
    assert (
        "recall.yaml: Moesaic has experiment=recall already"
        in exit_of(["train", "--config-dir", str(folder)], capsys)[1]
    )
    assert "no such directory" in exit_of(["train", "--config-dir", str(tmp_path / "none")], capsys)[1]


@pytest.mark.slow
def test_hydras_own_flags_work(capsys: pytest.CaptureFixture[str]) -> None:
    # in a process of its own: it leaves Hydra's logging at the level of debugging
    shown = subprocess.run(
        [sys.executable, "-m", "moesaic", "train", "--info", "defaults"], capture_output=True, text=True, check=True
    )
    assert "model/small" in shown.stdout
    main(["generate", "--cfg", "job", "seed=5"])
    assert "seed: 5" in capsys.readouterr().out


def test_bench_hands_its_keys_to_the_benchmark() -> None:
    defaults = composed("bench", [])
    assert flags_of(defaults) == []
    given = {**defaults, "name": "peers", "smoke": True, "layers": ["a:b", "c:d"], "memory_gb": 2}
    assert flags_of(given) == ["--smoke", "--layer", "a:b", "--layer", "c:d", "--memory-gb", "2"]
    assert flags_of({**defaults, "name": "loss", "rounds": 0}) == ["--rounds", "0"]
    with pytest.raises(
        InputError, match=r"layers=\['a:b'\]: running all does not have it; must be one of smoke, direct"
    ):
        flags_of({**defaults, "layers": ["a:b"]})
    with pytest.raises(InputError, match=r"name=expert \(did you mean experts\?\): must be one of acceleration, "):
        flags_of({**defaults, "name": "expert"})
    modules = {path.stem for path in (CONFIG_DIR.parent / "benchmarks").glob("*.py")}
    assert set(NAMES) == modules - {"__init__", "__main__", "harness", "layer", "limit"}


@pytest.fixture
def answered() -> Iterator[None]:
    """SIGINT interrupts, which the background jobs of a shell ignore from their start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("answered")
def test_a_signal_while_a_command_is_imported_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str, arguments: list[str]) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("moesaic.cli.common.prepare", interrupted)
    assert exit_of(["memory", "small"], capsys) == (130, "interrupted\n")


def test_a_benchmark_ends_with_the_command_that_started_it_and_all_its_processes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "held")
    held = os.open(tmp_path / "held", os.O_RDONLY | os.O_NONBLOCK)
    script = 'sleep 1000 > held & echo > "held" & kill -TERM $PPID; wait'
    with interruptible(), pytest.raises(Interrupted) as ended:
        exit_status_of(["bash", "-c", f"cd {tmp_path}; {script}"], os.environ)
    assert ended.value.signum == signal.SIGTERM
    os.set_blocking(held, True)
    while os.read(held, 9):  # nothing more once nobody holds the other end
        pass
    os.close(held)


def test_a_benchmark_that_a_signal_ended_has_its_exit_status() -> None:
    assert exit_status_of(["bash", "-c", "kill -SEGV $$"], os.environ) == 128 + signal.SIGSEGV
    assert exit_status_of(["bash", "-c", "exit 2"], os.environ) == 2


def test_a_study_writes_where_you_stand(tmp_path: Path) -> None:
    from moesaic.cli.study import default_results

    assert default_results("mine", tmp_path) == Path("studies/mine")
    assert default_results("mine", CONFIG_DIR.parent) == Path("docs/studies/mine")


@pytest.mark.slow_but_for("Could not load", "a file is among", "a file must be YAML")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("defaults:\n  - override /model: none\n", "Could not find 'model/none' Available options in 'model': "),
        ("defaults:\n  - nowhere\n", "Could not load 'experiment/nowhere'."),
        ("defaults:\n  - override /nothing: x\n", "Could not override 'nothing'. No match in the defaults list."),
        ("defaults: 3\n", "defaults must be a list (got int)"),
        ("defaults:\n  - mine\n", "a file is among its own defaults, which must not be"),
        ("- 1\n", "Cannot merge DictConfig with ListConfig"),
        ("hydra:\n  nothing: 3\n", "Key 'nothing' not in 'HydraConf' at hydra.nothing"),
        ("training:\n  steps: ${training.seq_len\n", "at training.steps"),
        ("training:\n  steps: ${training.seq_len}\n  seq_len: ${training.steps}\n", "interpolation"),
        ("training:\n  steps: ${oc.env:NOT_SET_ANYWHERE}\n", "'NOT_SET_ANYWHERE' not found\" at training.steps"),
        ("training:\n  steps: ${no_resolver:1}\n", "Unsupported interpolation type no_resolver at training.steps"),
        ("training:\n  steps: ${no.key}\n", "Interpolation key 'no.key' not found at training.steps"),
        ("trust: ${oc.env:NOT_SET_ANYWHERE}\n", "'NOT_SET_ANYWHERE' not found"),
        ("training: {steps: 3\n", "a file must be YAML: "),
    ],
)
def test_a_broken_file_of_the_user_is_refused_in_one_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{content}", encoding="utf-8")
    code, error = exit_of(["train", "--config-dir", str(tmp_path), "experiment=mine"], capsys)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 5\n", "experiment: its file must begin with # @package _global_"),
        (b"\xef\xbb\xbf# @package _global_\nseed: 5\n", "without a byte order mark"),
        (b"# @package _global_\n# gr\xf6\xdfe\nseed: 5\n", "experiment/mine.yaml: damaged (UnicodeDecodeError"),
    ],
)
def test_a_file_that_would_change_nothing_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)):
        check_overrides("train", ["experiment=mine"], tmp_path)


@pytest.mark.slow_but_for("5")
@pytest.mark.parametrize("trust", ["5", "[5]", "[a b]", "''", "[null]"])
def test_trust_must_be_names(trust: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = exit_of(["generate", "nowhere.ckpt", f"trust={trust}"], capsys)
    assert code == 2 and error.startswith("error: trust: found ") and "must be names of packages" in error


@pytest.mark.parametrize("word", [os.fsdecode(b"a\xff"), "a\0b"])
def test_arguments_are_utf8_text(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = exit_of(["train", f"name={word}"], capsys)
    assert code == 2 and "must be UTF-8 text without NUL" in error


def test_a_path_that_cannot_be_read_is_not_said_to_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = exit_of(["report", "x" * 300], capsys)
    assert (code, error) == (
        2,
        "error: directory: a name of 300 bytes; must be at most 255, the limit of the file system\n",
    )


def test_what_a_file_is_called_stays_in_its_line_and_tells_the_terminal_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, error = exit_of(["generate", "a\nb\x1b[2Jü.ckpt"], capsys)
    assert (code, error) == (2, "error: checkpoint a\\nb\\x1b[2Jü.ckpt: no such file\n")


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("evaluate x.ckpt output=", "output"),
        ("train resume=true run_dir=", "run_dir"),
        ("train data=files data.path=''", "data.path"),
    ],
)
def test_a_variable_that_the_shell_did_not_know_is_no_path(
    line: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_of(line.split(), capsys) == (2, f"error: {key}=: empty; must be a path or a name, or be left out\n")


@pytest.mark.slow
@pytest.mark.parametrize("text", ["my.Router", "my:Router"])
def test_a_module_given_as_text_gets_a_hint(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = exit_of(["train", "debug=smoke", f"model.moe.router={text}"], capsys)
    assert code == 2
    assert f"model.moe.router: found '{text}' (str) (did you mean {{type: {text}}}?); must be top_k |" in error


@pytest.mark.slow
def test_a_config_is_shown_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "train --cfg job seed=11"], capture_output=True, text=True, check=False
    )
    assert "\nseed: 11\n" in done.stdout and not done.stderr
