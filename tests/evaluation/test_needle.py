"""Needles stand where they should; a model that knows scores 1, one that knows nothing about chance."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moesaic.data import BPETokenizer, ByteTokenizer, Tokenizer
from moesaic.errors import InputError
from moesaic.evaluation.long_context_plots import plot_needles
from moesaic.evaluation.needle import NeedleCell, NeedleConfig, NeedleTask, score_needles, summarize_needles
from moesaic.evaluation.results import ResultFile
from moesaic.evaluation.variants import Variant
from moesaic.models import Decoder, build_decoder, llama4_toy

CODE = b"".join(b"def f%d(x):\n    return x + %d\n\n\n" % (i, 7 * i) for i in range(400))
SMALL = NeedleConfig(multiples=(1.0, 2.0), depths=(0.0, 0.5, 1.0), samples=3)


def task_of(tokenizer: Tokenizer, config: NeedleConfig = SMALL, train_length: int = 250) -> NeedleTask:
    return NeedleTask(tokenizer, tokenizer.encode(CODE), config, train_length)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else BPETokenizer.train([CODE], 400)


class Seen:
    """A cache that keeps the tokens themselves."""

    def __init__(self) -> None:
        self.tokens: Tensor | None = None


class Rigged(Decoder):
    """Continues by what followed the longest earlier match with its context, if that has `shortest` tokens.

    A match cannot be long enough where `shortest` is infinite: a uniform model.
    """

    def __init__(self, vocab_size: int, shortest: float, cached: bool = True, confidence: float = 20.0) -> None:
        super().__init__(vocab_size=vocab_size, dim=vocab_size, blocks=[])
        self.shortest = shortest
        self.cached = cached
        self.confidence = confidence
        self.read = 0
        torch.nn.init.eye_(self.head.weight)

    def make_cache(self) -> list[Any] | None:
        return [Seen()] if self.cached else None

    def hidden_states(
        self, tokens: Tensor, cache: list[Any] | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        self.read += tokens.numel()
        everything = tokens
        if cache is not None:
            seen = cache[0].tokens
            everything = cache[0].tokens = tokens if seen is None else torch.cat((seen, tokens), dim=1)
        hidden = torch.zeros(*tokens.shape, self.vocab_size)
        for row, ids in enumerate(everything.tolist()):
            for back in range(1, 1 + min(8, tokens.size(1))):  # nobody asks for more than a value
                followed = self._followed(ids[: len(ids) - back + 1])
                if followed is not None:
                    hidden[row, -back, followed] = self.confidence
        return hidden, {}

    def _followed(self, ids: list[int]) -> int | None:
        best, answer = self.shortest - 1, None
        for end in range(1, len(ids)):
            size = 0
            while size < end and ids[end - 1 - size] == ids[-1 - size]:
                size += 1
            if size > best:
                best, answer = size, ids[end]
        return answer


@pytest.mark.slow_but_for("bytes-True")
@pytest.mark.parametrize("cached", [True, False])
def test_a_model_that_knows_scores_one(tokenizer: Tokenizer, cached: bool) -> None:
    task = task_of(tokenizer)
    cells = score_needles([Variant("it", Rigged(tokenizer.vocab_size, 3, cached))], task, batch_size=2)["it"]
    assert [(cell.length, cell.depth) for cell in cells] == task.cells
    for cell in cells:
        assert cell.accuracy == cell.exact_match == cell.rank == [1.0] * 3
    summary = summarize_needles(cells, 15)
    assert summary["accuracy"] == summary["rank_score"] == summary["exact_match"] == 1
    assert summary["accuracy_standard_error"] == 0


def test_a_uniform_model_is_at_chance_exactly(tokenizer: Tokenizer) -> None:
    cells = score_needles([Variant("uniform", Rigged(tokenizer.vocab_size, math.inf))], task_of(tokenizer))["uniform"]
    for cell in cells:
        assert cell.accuracy == [1 / 16] * 3
        assert cell.rank == [1 + 15 / 2] * 3
        assert cell.exact_match == [0.0] * 3
    assert summarize_needles(cells, 15)["rank_score"] == 0.5


def test_an_untrained_model_is_near_chance() -> None:
    config = NeedleConfig(multiples=(1.0,), depths=(0.5,), samples=64, distractors=3, planted=1)
    task = task_of(ByteTokenizer(), config, 120)
    cells = score_needles([Variant("it", build_decoder(llama4_toy(257)).eval())], task, batch_size=16)["it"]
    assert abs(summarize_needles(cells, 3)["accuracy"] - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 64)
    assert abs(summarize_needles(cells, 3)["rank_score"] - 0.5) < 4 * 0.37 / 8


def test_a_model_that_avoids_the_true_value_is_last() -> None:
    cells = score_needles([Variant("it", Rigged(257, 6, confidence=-20.0))], task_of(ByteTokenizer()))["it"]
    assert all(cell.rank == [16.0] * 3 and cell.accuracy == [0.0] * 3 for cell in cells)


def test_a_window_sees_only_what_is_near() -> None:
    task = task_of(ByteTokenizer(), NeedleConfig(multiples=(2.0,), depths=(0.0, 1.0), samples=4, planted=0))
    far, near = score_needles([Variant("it", Rigged(257, 6), window=100)], task)["it"]
    assert far.accuracy == [1 / 16] * 4
    assert near.accuracy == [1.0] * 4


@pytest.mark.slow
def test_caches_and_batches_do_not_change_scores() -> None:
    decoder = build_decoder(llama4_toy(257, init_std=None)).eval()
    task = task_of(ByteTokenizer(), NeedleConfig(multiples=(1.0,), depths=(0.0, 1.0), samples=5, chunk_tokens=17))
    together = score_needles([Variant("it", decoder)], task, batch_size=5)["it"]
    alone = score_needles([Variant("it", decoder)], task, batch_size=1)["it"]
    decoder.make_cache = lambda: None  # type: ignore[method-assign]
    whole = score_needles([Variant("it", decoder)], task, batch_size=5)["it"]
    assert together == alone == whole
    assert len({rank for cell in together for rank in cell.rank}) > 3


def test_prompts_are_code_with_the_needle_at_its_depth(tokenizer: Tokenizer) -> None:
    task = task_of(tokenizer)
    for cell, (length, depth) in enumerate(task.cells):
        for sample in range(3):
            context, values = task.prompt(cell, sample)
            assert len(context) == length
            text = tokenizer.decode(context.tolist())
            answers = [tokenizer.decode(value.tolist()) for value in values]
            name = text.rpartition(b"\n")[2]
            assert name.endswith(b" =")
            needle = b"\n" + name + answers[0] + b"\n"
            assert text.count(needle) == 1 and text.count(name) == 2
            assert abs(text.index(needle) / len(text) - depth) < 0.25, "the other needles are in the way"
            if depth == 0:
                assert text.startswith(needle)
            assert len(set(answers)) == 16
            assert sum(b"=" + answer + b"\n" in text for answer in answers) == 4


INDENTED = b"".join(b"class C%d:\n    def f(self):\n        return %d\n" % (i, i) for i in range(400))


@pytest.mark.parametrize("text", [INDENTED, INDENTED.replace(b"\n", b";")], ids=["indented", "one line"])
def test_the_depth_is_the_one_asked_for(text: bytes) -> None:
    """Of indented code most newlines share a token with the spaces behind them; one line has no newline at all."""
    tokenizer = BPETokenizer.train([INDENTED], 400)
    config = NeedleConfig(multiples=(2.0,), depths=(0.0, 0.3, 0.7, 1.0), samples=8, planted=0)
    task = NeedleTask(tokenizer, tokenizer.encode(text), config, 250)
    for cell, (_, depth) in enumerate(task.cells):
        for sample in range(config.samples):
            code = tokenizer.decode(task.prompt(cell, sample)[0].tolist())
            name = code.rpartition(b"\n")[2]
            before, _, rest = code.partition(b"\n" + name)
            after = rest.partition(b"\n")[2].rpartition(b"\n")[0]
            assert abs(len(before) / len(before + after) - depth) < 0.06
            if text is INDENTED and before and after:
                assert after.startswith((b"class", b"\n")), "no line is broken"


def test_prompts_depend_on_the_seed_only() -> None:
    task, again = task_of(ByteTokenizer()), task_of(ByteTokenizer())
    other = task_of(ByteTokenizer(), NeedleConfig(multiples=(1.0, 2.0), depths=(0.0, 0.5, 1.0), samples=3, seed=1))
    wider = task_of(ByteTokenizer(), NeedleConfig(multiples=(2.0,), depths=(0.5,), samples=3))
    for mine, same in zip(task.prompt(4, 2), again.prompt(4, 2), strict=True):
        assert torch.equal(mine, same)
    assert not torch.equal(task.prompt(4, 2)[0], other.prompt(4, 2)[0])
    assert torch.equal(task.prompt(4, 2)[0], wider.prompt(0, 2)[0]), "a cell does not depend on the rest of the grid"
    contexts = [task.prompt(cell, sample)[0] for cell in range(3) for sample in range(3)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(contexts, 2))


@pytest.mark.slow
def test_a_stopped_grid_goes_on(tmp_path: Path) -> None:
    task = task_of(ByteTokenizer())
    model = Rigged(257, 6)
    expected = score_needles([Variant("it", model)], task)["it"]
    whole = model.read

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert total == 3 * 3 * (250 + 500)
        raise Stop

    with pytest.raises(Stop):
        score_needles([Variant("it", model)], task, results=ResultFile(tmp_path / "it.json", {}), advance=stop)
    model.read = 0
    assert score_needles([Variant("it", model)], task, results=ResultFile(tmp_path / "it.json", {}))["it"] == expected
    assert 0 < model.read < whole


def test_summary_of_long_contexts_only() -> None:
    cells = [NeedleCell(8, 0.0, [1.0, 0.0], [1.0, 3.0], [0.0, 0.0]), NeedleCell(16, 0.0, [1.0], [1.0], [1.0])]
    assert summarize_needles(cells, 4, start=8) == {"accuracy": 1.0, "rank_score": 1.0, "exact_match": 1.0}
    everything = summarize_needles(cells, 4)
    assert everything["accuracy"] == pytest.approx(2 / 3)
    assert everything["rank_score"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert everything["accuracy_standard_error"] == pytest.approx(1 / 3)
    assert summarize_needles(cells, 4, start=16) == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NeedleConfig(multiples=(100.0,)), "a context of 25000 tokens: longer than the data, the text has"),
        (NeedleConfig(multiples=(0.3,)), "a context of 75 tokens: shorter than the needles and the question"),
        (NeedleConfig(multiples=(1.0, 1.001)), "one of them stands twice"),
    ],
)
def test_impossible_grids_are_refused_before_any_work(config: NeedleConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        task_of(ByteTokenizer(), config)


def test_too_many_values_for_the_tokenizer() -> None:
    with pytest.raises(InputError, match=r"needle\.distractors=8000: must be a number below 8000"):
        task_of(ByteTokenizer(), NeedleConfig(distractors=8000))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 0}, "samples=0: must be an integer >= 1"),
        ({"planted": 16}, "planted=16: must be 0 to distractors=15"),
        ({"multiples": ()}, r"multiples=\[\]: must be one or more numbers > 0"),
        ({"multiples": (1.0, math.inf)}, r"multiples=\[1\.0, inf\]: must be one or more numbers > 0"),
        ({"seed": -1}, "seed=-1: must be an integer >= 0"),
        ({"depths": (0.5, 1.5)}, r"depths=\[0\.5, 1\.5\]: must be one or more numbers from 0 to 1"),
    ],
)
def test_bad_config(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeedleConfig(**values)


def test_no_planted_distractors() -> None:
    task = task_of(ByteTokenizer(), NeedleConfig(multiples=(1.0,), depths=(0.5,), samples=1, planted=0))
    context, values = task.prompt(0, 0)
    text = ByteTokenizer().decode(context.tolist())
    assert sum(ByteTokenizer().decode(value.tolist()) + b"\n" in text for value in values) == 1


def test_not_finite_is_refused() -> None:
    decoder = build_decoder(llama4_toy(257))
    with torch.no_grad():
        decoder.head.weight.fill_(math.nan)
    with pytest.raises(InputError, match="variants: it: its log-likelihoods are not finite"):
        score_needles([Variant("it", decoder)], task_of(ByteTokenizer()))


@pytest.mark.slow_but_for("1")
@pytest.mark.parametrize("variants", [1, 3])
def test_pictures(tmp_path: Path, variants: int) -> None:
    draw = np.random.default_rng(0)
    cells = [NeedleCell(n, d, [draw.random()], [1.0], [0.0]) for n in (64, 128, 256) for d in (0.0, 0.5, 1.0)]
    plot_needles({f"variant {i}": cells for i in range(variants)}, tmp_path / "it.png", NeedleConfig(), 128)
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
