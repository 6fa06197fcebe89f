"""Rigged routings whose measures are known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from moesaic.evaluation import specialization_plots
from moesaic.evaluation.plotting import new_card, pixels, save_figure
from moesaic.evaluation.specialization import (
    BYTE_CLASSES,
    FileKinds,
    Specialization,
    byte_class,
    explained_share,
    overlap,
)
from moesaic.evaluation.specialization_plots import plot_explained, plot_specialization
from moesaic.layers import Routing, count_tokens

STRINGS = [b"a", b"7", b" ", b"(", b"\xc3\xa9", b""]


def rigged(num_experts: int, **layers: Tensor) -> dict[str, Routing]:
    """Routing by layer from expert_ids (T, K)."""
    return {
        name: Routing(torch.zeros(ids.size(0), num_experts), torch.ones(ids.shape), ids, count_tokens(ids, num_experts))
        for name, ids in layers.items()
    }


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (b"def", "letters"),
        (b" if", "letters"),
        (b" x", "letters"),
        (b"_x", "letters"),
        (b"__x", "punctuation"),
        (b"42", "digits"),
        (b" 7", "digits"),
        (b"\n    ", "whitespace"),
        (b"\t", "whitespace"),
        (b"):\n", "punctuation"),
        (b"~", "punctuation"),
        (b"\xc3\xa9", "other"),
        (b"\x00", "other"),
        (b"\x7f", "other"),
        (b"", "other"),
    ],
)
def test_byte_classes(token: bytes, expected: str) -> None:
    assert byte_class(token) == expected


def test_explained_share_is_1_0_or_in_between() -> None:
    decided = torch.tensor([[5, 0], [0, 3], [0, 2], [5, 0]])  # more tokens than experts
    assert explained_share(decided) == pytest.approx(1)
    assert explained_share(torch.tensor([[6, 3], [2, 1]])) == pytest.approx(0, abs=1e-12)
    assert explained_share(torch.tensor([[6, 0], [2, 0]])) == 0, "one expert takes all: there is nothing to explain"
    one = torch.tensor([[0, n] for n in (1003, 2477, 3374, 1562, 178)])  # whose entropy is rounded to more than 0
    assert explained_share(one) == 0
    # H(expert) = log 2, H(expert | token) = the entropy of (3/4, 1/4)
    conditional = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert explained_share(torch.tensor([[3, 1], [1, 3]])) == pytest.approx(1 - conditional / math.log(2))


def test_overlap_by_hand() -> None:
    shared = overlap(torch.tensor([[2, 0, 1], [2, 0, 0], [0, 4, 3]]))  # columns: (.5 .5 0), (0 0 1), (.25 0 .75)
    expected = [[1, 0, 0.25], [0, 1, 0.75], [0.25, 0.75, 1]]
    assert torch.allclose(shared, torch.tensor(expected, dtype=torch.float64))


def test_routing_by_token_is_explained_by_the_token_alone() -> None:
    tokens = torch.randint(6, (8, 64))
    seen = Specialization(6, STRINGS)
    output = rigged(3, first=tokens.flatten()[:, None] % 3, second=torch.randint(3, (512, 1)))
    seen.update(output, {"tokens": tokens})
    numbers = seen.numbers()
    assert numbers["router/first/token_expert_nmi"] == pytest.approx(1)
    assert numbers["router/first/expert_overlap"] == 0
    for key in ("router/first/position_expert_nmi", "router/first/next_layer_expert_nmi"):
        assert numbers[key] < 0.05, key
    assert numbers["router/second/token_expert_nmi"] < 0.05
    assert numbers["router/second/expert_overlap"] > 0.8
    assert "router/second/next_layer_expert_nmi" not in numbers
    by_class = seen.by_class("first")
    assert by_class is not None
    counts = torch.bincount(tokens.flatten(), minlength=6).tolist()
    letters, other = (by_class[BYTE_CLASSES.index(name)].tolist() for name in ("letters", "other"))
    assert letters == [counts[0], 0, 0]
    assert other == [0, counts[4], counts[5]]


def test_routing_by_position_and_by_the_layer_before() -> None:
    ids = torch.tensor([0, 1, 1, 2, 2, 2, 2])[:, None].repeat(4, 1)  # octaves of the position
    seen = Specialization(5)
    seen.update(rigged(3, first=ids, second=2 - ids), {"tokens": torch.randint(5, (4, 7))})
    numbers = seen.numbers()
    assert numbers["router/first/position_expert_nmi"] == pytest.approx(1)
    assert numbers["router/first/next_layer_expert_nmi"] == pytest.approx(1)
    assert not any("byte_class" in key for key in numbers)
    assert seen.layers["first"].then is not None
    assert seen.layers["first"].then.tolist() == [[0, 0, 4], [0, 8, 0], [16, 0, 0]]


def test_coactivation_padding_and_batches_that_add_up() -> None:
    ids = torch.tensor([[0, 1], [0, 1], [0, 2], [2, 0]])
    tokens = torch.tensor([[0, 1], [2, 3]])
    valid = torch.tensor([[True, True], [True, False]])
    seen = Specialization(5)
    seen.update(rigged(3, it=ids), {"tokens": tokens, "valid": valid})
    counts = seen.layers["it"]
    assert counts.together.tolist() == [[3, 2, 1], [2, 2, 0], [1, 0, 1]]
    assert counts.by_token.tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert counts.by_position.tolist() == [[2, 1, 1], [1, 1, 0]]
    seen.update(rigged(3, it=ids[:3]), {"tokens": torch.tensor([[4, 4, 4]])})
    added = seen.layers["it"]
    assert added.by_token[4].tolist() == [3, 2, 1]
    assert added.by_position.tolist() == [[3, 2, 1], [2, 2, 0], [1, 0, 1]]


@pytest.mark.slow_but_for("strings")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("strings", "top_k"), [(STRINGS, 1), ([b"$\\", *STRINGS[1:]], 2), (None, 1)], ids=["strings", "mathtext", "ids"]
)
def test_plot(tmp_path: Path, strings: list[bytes] | None, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(
        specialization_plots, "save_figure", lambda figure, out: figures.append(figure) or save_figure(figure, out)
    )
    seen = Specialization(6, strings)
    ids = torch.stack([torch.randperm(4)[:top_k] for _ in range(40)])
    seen.update(rigged(4, first=ids, second=ids), {"tokens": torch.randint(6, (2, 20))})
    assert plot_specialization(seen, tmp_path / "plots" / "it.png")
    titles = [axis.get_title() for axis in figures[0].axes]
    assert titles.count("overlap of the experts' tokens") == 2
    assert titles.count("chosen too, of what an expert takes") == (2 if top_k > 1 else 0)
    assert (tmp_path / "plots" / "it.png").read_bytes().startswith(b"\x89PNG")
    assert not plot_specialization(Specialization(6), tmp_path / "none.png")


def test_experts_are_numbered_by_whole_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(specialization_plots, "save_figure", lambda figure, out: figures.append(figure))
    seen = Specialization(6)
    ids = torch.arange(40).view(40, 1) % 4
    seen.update(rigged(4, first=ids, second=ids), {"tokens": torch.randint(6, (2, 20))})
    plot_specialization(seen, tmp_path / "it.png")
    [panel] = [axis for axis in figures[0].axes if axis.get_title() == "first choice in the next MoE layer"]
    assert list(panel.get_xticks()) == list(panel.get_yticks()) == [0, 1, 2, 3]


# three files between ends of text (0): the positions of README.md are 0 to 2, of a.py 3 to 6, of b.PY 7 and 8
FILES = np.array([0, 5, 5, 0, 6, 6, 6, 0, 7, 0], dtype=np.uint16)
NAMES = ["README.md", "source/a.py", "b.PY"]


def test_kinds_of_files_by_hand() -> None:
    kinds = FileKinds(FILES, 0, NAMES)
    assert kinds.names == [".md", ".py"]
    assert kinds.at(torch.arange(9).view(3, 3)).tolist() == [[0, 0, 0], [1, 1, 1], [1, 1, 1]]
    assert FileKinds(FILES, 0, ["LICENSE", "x.tar.gz", "a/.b/c"]).names == [".gz", "no suffix"]
    with pytest.raises(ValueError, match=r"4 ends of text must be one more than the 2 documents"):
        FileKinds(FILES, 0, NAMES[:2])


def test_routing_by_kind_of_file() -> None:
    seen = Specialization(8, file_kinds=FileKinds(FILES, 0, NAMES))
    # windows of 4 at 0 and 4, the second one with a token of padding: expert 2 for Markdown, 0 or 1 for Python
    ids = torch.tensor([[2], [2], [2], [0], [1], [0], [1], [2]])
    batch = {
        "tokens": torch.from_numpy(FILES[:8].astype(np.int64)).view(2, 4),
        "valid": torch.tensor([[True] * 4, [True, True, True, False]]),
        "starts": torch.tensor([0, 4]),
    }
    seen.update(rigged(3, it=ids), batch)
    by_kind = seen.by_file_kind("it")
    assert by_kind is not None
    assert list(by_kind) == [".py", ".md"], "the most frequent first"
    assert [row.tolist() for row in by_kind.values()] == [[2, 2, 0], [0, 0, 3]]
    # H(expert | kind) is log 2 for four tokens of seven
    entropy = -(2 * 2 / 7 * math.log(2 / 7) + 3 / 7 * math.log(3 / 7))
    explained = 1 - 4 / 7 * math.log(2) / entropy
    assert seen.numbers()["router/it/file_kind_expert_nmi"] == pytest.approx(explained)
    seen.update(rigged(3, it=ids[:3]), {"tokens": torch.tensor([[5, 5, 0]]), "starts": torch.tensor([1])})
    added = seen.by_file_kind("it")
    assert added is not None
    assert {kind: row.tolist() for kind, row in added.items()} == {".py": [2, 2, 1], ".md": [0, 0, 5]}


@pytest.mark.slow
def test_one_kind_of_file_has_nothing_to_tell(tmp_path: Path) -> None:
    tokens = torch.from_numpy(FILES[3:7].astype(np.int64))[None]
    ids = torch.tensor([[0], [1], [2], [0]])
    unknown = Specialization(8)
    unknown.update(rigged(3, it=ids), {"tokens": tokens})
    alone = Specialization(8, file_kinds=FileKinds(FILES, 0, NAMES))  # only files of one kind are seen
    alone.update(rigged(3, it=ids), {"tokens": tokens, "starts": torch.tensor([3])})
    both = Specialization(8, file_kinds=FileKinds(FILES, 0, NAMES))
    both.update(rigged(3, it=ids), {"tokens": tokens, "starts": torch.tensor([1])})
    heights = {}
    for name, seen in (("unknown", unknown), ("alone", alone), ("both", both)):
        assert (seen.by_file_kind("it") is None) == (name != "both")
        assert ("router/it/file_kind_expert_nmi" in seen.numbers()) == (name == "both")
        assert plot_specialization(seen, tmp_path / f"{name}.png")
        heights[name] = imread(tmp_path / f"{name}.png").shape[0]
    assert heights["unknown"] == heights["alone"] < heights["both"], "a row more"


@pytest.mark.slow
def test_many_layers_make_no_larger_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(specialization_plots, "save_figure", lambda figure, out: figures.append(figure))
    seen = Specialization(6, STRINGS)
    ids = torch.arange(40).view(40, 1) % 4
    layers = {f"layers.{i}.ffn": ids for i in range(24)}
    seen.update(rigged(4, **layers), {"tokens": torch.randint(6, (2, 20))})
    plot_specialization(seen, tmp_path / "it.png")
    [figure] = figures
    assert figure.get_suptitle() == "What each expert takes, in 3 of 24 MoE layers"
    titles = [axis.get_title().splitlines()[0] for axis in figure.axes[:3]]
    assert titles == ["layers.0.ffn", "layers.12.ffn", "layers.23.ffn"]
    labels = [axis.get_ylabel() for axis in figure.axes if axis.get_label() == "<colorbar>"]
    assert len(labels) == 5 and all(labels), "every color bar says what it is of"
    card, axis = new_card()
    plot_explained(axis, seen.numbers())
    assert {line.get_label() for line in axis.lines} == {"token", "byte class", "position", "next layer"}
    assert len(axis.get_xticks()) == 6 and pixels(card).shape[1] == 500


@pytest.mark.slow
def test_plot_of_many_kinds_of_files(tmp_path: Path) -> None:
    tokens = np.zeros(41, dtype=np.uint16)
    tokens[1::2] = 1
    seen = Specialization(2, file_kinds=FileKinds(tokens, 0, [f"x.${i}$ {'long' * i}" for i in range(20)]))
    ids = torch.randint(4, (40, 1))
    batch = {"tokens": torch.from_numpy(tokens[:40].astype(np.int64))[None], "starts": torch.tensor([0])}
    seen.update(rigged(4, first=ids, second=ids), batch)
    by_kind = seen.by_file_kind("first")
    assert by_kind is not None
    assert len(by_kind) == 20
    assert plot_specialization(seen, tmp_path / "it.png")
