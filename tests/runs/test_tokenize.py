"""moesaic tokenize as a person uses it: killed and continued, interrupted, trained from."""

from pathlib import Path

import pytest
from rich.console import Console
from small_runs import kill_in_call

import moesaic
from moesaic.cli.common import composed
from moesaic.cli.tokenize import tokenize
from moesaic.data import DataConfig, load_data
from moesaic.errors import InputError
from moesaic.training.run import run

MAIN = Path(moesaic.__file__).with_name("__main__.py")
SMALL = ["data.vocab_size=290", "shard_bytes=900"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.py").write_text(f"def f{i}(x):\n    return x * {i}\n" * (i + 9))
    return folder


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".lock"}


def write(*overrides: str) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        tokenize(composed("tokenize", overrides), console)
    return capture.get()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_continued_equals_uninterrupted(text: Path, tmp_path: Path, workers: int) -> None:
    """Its processes end with it: the pipe of what they print would be open for ever."""
    words = ["tokenize", str(text), str(tmp_path / "killed"), *SMALL, f"workers={workers}"]
    kill_in_call("moesaic.data.sharding", "append", 4, [str(MAIN), *words], tmp_path)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    there = contents(tmp_path / "killed")
    assert len([name for name in there if name.startswith("train-")]) >= 3
    given = [*SMALL, f"data.path={text}", "workers=1"]
    printed = write(*given, f"directory={tmp_path / 'killed'}")
    write(*given, f"directory={tmp_path / 'whole'}")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert f"moesaic train data=memmap data.path={tmp_path / 'killed'}" in printed


@pytest.mark.slow
def test_a_run_trains_from_shards_as_from_the_text(text: Path, tmp_path: Path) -> None:
    write(*SMALL, f"data.path={text}", f"directory={tmp_path / 'ids'}")
    sizes = ["debug=smoke", "trainer.precision=32-true", f"output_dir={tmp_path}", "finish=score", "logger=none"]
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    runs = {
        name: run(composed("train", [*sizes, cache, f"name={name}", *data]))
        for name, data in {
            "shards": ["data=memmap", f"data.path={tmp_path / 'ids'}"],
            "text": ["data=files", f"data.path={text}", "data.vocab_size=290"],
        }.items()
    }
    for key in ("validation/bits_per_byte", "validation/loss", "train/loss"):
        assert runs["shards"].get(key) == runs["text"].get(key)
    assert runs["shards"]["validation/bits_per_byte"] > 0

    [checkpoint] = (tmp_path / "shards").glob("*/checkpoints/last.ckpt")
    (text / "0.py").write_text("other text\n" * 50)
    write(f"checkpoint={checkpoint}", f"data.path={text}", f"directory={tmp_path / 'more'}")
    tokenizers = [load_data(DataConfig("memmap", str(tmp_path / name))).tokenizer for name in ("ids", "more")]
    assert tokenizers[0] is not None and tokenizers[1] is not None
    assert tokenizers[0].to_dict() == tokenizers[1].to_dict()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["directory=null"], r"directory=None: it is needed \(directory=ids\)"),
        (["data.path=null"], r"data.path=None: source=files needs one"),
        (["workers=0"], r"workers=0: must be an integer from 1 to 64"),
        (["shard_bytes=x"], r"shard_bytes='x': must be an integer from 1 to"),
        (["data.tokenizer=words"], r"data.tokenizer: found 'words' \(str\); must be bpe \| bytes"),
        (["checkpoint=nowhere.ckpt"], r"nowhere.ckpt"),
        (["data.path=nowhere"], r"data.path='nowhere': no such file or folder"),
    ],
)
def test_bad_configuration_is_refused_by_name(text: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write(f"data.path={text}", f"directory={tmp_path / 'ids'}", *overrides)
    assert not (tmp_path / "ids").exists()
