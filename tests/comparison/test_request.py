"""What a comparison refuses, and what it says of arms that are trained on other batches."""

from pathlib import Path
from typing import Any

import pytest

from moesaic.comparison.arms import Arm
from moesaic.comparison.request import Request, own_differences, read_arms, unequal_training
from moesaic.config import to_mapping
from moesaic.errors import InputError
from moesaic.overrides import apply_overrides
from moesaic.training.config import RunConfig

RUN = to_mapping(RunConfig())


def request(words: str, *, fixed: frozenset[str] = frozenset(), **changes: Any) -> Request:
    config = apply_overrides(RUN, {f"training.{key}": value for key, value in changes.items()}, "new")
    arm = Arm("new", config, words=(words,))
    return Request(Arm("baseline", RUN), (arm,), Path("x"), fixed=fixed)


def told(asked: Request) -> tuple[str, ...]:
    return unequal_training(asked, asked.new[0])


def test_other_batches_are_said() -> None:
    assert told(request("a.R", log_every=7)) == ()
    assert told(request("a", batch_size=16)) == ("2.00 times the tokens", "4,096 tokens in a step instead of 2,048")
    assert told(request("a", batch_size=4, seq_len=512)) == ("windows of 512 tokens instead of 256",)
    steps = request("training.steps=600", steps=600, fixed=frozenset({"training.steps"}))
    assert told(steps) == ("0.50 times the tokens",)
    assert own_differences(steps, steps.new[0]) == {"training.steps": 600}


def test_the_budgets_steps_hold_for_all_arms() -> None:
    with pytest.raises(InputError, match=r"training\.steps: the budget sets it for all arms"):
        request("training.steps=600", steps=600)
    of_experiment = request("experiment=long", steps=600, log_every=7)
    assert own_differences(of_experiment, of_experiment.new[0]) == {"training.log_every": 7}
    assert told(of_experiment) == ()


def test_text_that_no_window_fits_into_is_refused_once_and_a_path_is_no_fault_of_an_arm(tmp_path: Path) -> None:
    (tmp_path / "little.txt").write_text("one line\n" * 30)

    def asked(path: str, **lengths: int) -> Request:
        base = apply_overrides(
            RUN,
            {"data.source": "files", "data.path": str(tmp_path / path), "data.tokenizer": "bytes"}
            | {"data.cache_dir": str(tmp_path / "cache")},
            "data",
        )
        base = apply_overrides(base, {f"training.{key}": value for key, value in lengths.items()}, "config")
        arm = Arm("top_k=2", apply_overrides(base, {"model.moe.top_k": 2}, "new"), words=("model.moe.top_k=2",))
        return Request(Arm("baseline", base), (arm,), tmp_path / "out")

    with pytest.raises(InputError, match=r"^training\.seq_len=256: the training split has \d+ tokens; at least 513"):
        read_arms(asked("little.txt"))
    with pytest.raises(InputError, match=r"^data\.path=.*nothing.*: no such file"):
        read_arms(asked("nothing"))
    subjects, data = read_arms(asked("little.txt", seq_len=32, validation_seq_len=32))
    assert len(subjects) == 2 and data.task is None
