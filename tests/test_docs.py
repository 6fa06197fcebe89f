"""What README and docs promise as texts: short, in order, in plain sentences, with links that lead somewhere."""

import ast
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from prose import paragraphs, sentences, words

import moesaic
from moesaic.training.lightning_options import DOUBLES
from moesaic.training.starting import FREE

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GENERATED = set((ROOT / "docs/studies").rglob("*.md"))
DATED = {ROOT / "docs/LOG.md"}
TOP = [
    ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md")
]
PAGES = [*TOP, *sorted(set((ROOT / "docs").rglob("*.md")) - GENERATED - DATED)]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def test_the_readme_has_at_most_1000_words() -> None:
    text = re.sub(r"^```.*?^```$|^    .*?$", "", README, flags=re.DOTALL | re.MULTILINE)  # tables count, code does not
    assert len(words(re.sub(r"\]\([^)]*\)", "]", text))) <= 1000


def test_the_readme_is_in_order() -> None:
    marks = [
        "# Moesaic",
        "![",
        "pip install 'moesaic[train]'",
        "## Import the layers",
        "## Add your own router",
        "## What the studies found",
        "| idea | source | file |",
        "## Benchmarks",
        "when to use something else",
        "## Links",
    ]
    places = [README.index(mark) for mark in marks]
    assert places == sorted(places)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_sentence_is_longer_than_25_words(page: Path) -> None:
    long = [sentence for sentence in sentences(page.read_text(encoding="utf-8")) if len(words(sentence)) > 25]
    assert not long


def test_prose_is_told_from_markup() -> None:
    page = (
        "# A title\n\nOne sentence. Two, with `some code here`: still two.\n\n"
        "    moesaic train name=code\n\n- An item\n  goes on.\n- Another [link](a.md).\n\n| a | b |\n|---|---|\n"
    )
    assert paragraphs(page) == [
        "# A title",
        "One sentence. Two, with code: still two.",
        "- An item goes on.",
        "- Another link.",
    ]
    assert sentences(page)[1:3] == ["One sentence.", "Two, with code: still two."]


LINKS = [
    (page, link)
    for page in [*PAGES, *sorted(GENERATED | DATED)]
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", page.read_text(encoding="utf-8"))
]


def slug(heading: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


@pytest.mark.parametrize(("page", "link"), LINKS, ids=[f"{page.relative_to(ROOT)}-{link}" for page, link in LINKS])
def test_links_lead_somewhere(page: Path, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    assert target.exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in map(slug, headings)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_named_in_prose_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:src|tests|conf|benchmarks|examples|docs)/[\w./]+\.\w+)`", page.read_text(encoding="utf-8")
    )
    readers_own = ("conf/experiment/mine.yaml", "conf/experiment/study_NAME.yaml", "conf/experiment/study_cosine.yaml")
    assert [name for name in named if not (ROOT / name).exists() and name not in readers_own] == []


def test_every_page_of_the_site_is_in_its_navigation() -> None:
    class Loader(yaml.SafeLoader):
        pass

    found: set[str] = set()

    def collect(entry: object) -> None:
        if isinstance(entry, str):
            found.add(entry)
        elif isinstance(entry, (list, dict)):
            for value in entry.values() if isinstance(entry, dict) else entry:
                collect(value)

    collect(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"])
    pages = {str(path.relative_to(ROOT / "docs")) for path in set((ROOT / "docs").rglob("*.md")) - GENERATED}
    assert found == pages


def test_the_keys_that_lightning_doubles_or_resume_leaves_free_are_all_named() -> None:
    text = (ROOT / "docs/how-to.md").read_text(encoding="utf-8")
    assert [name for name in (*FREE, *DOUBLES) if f"`{name}`" not in text] == []


def test_the_reference_is_of_modules_that_exist() -> None:
    pages = (ROOT / "docs/reference").glob("*.md")
    named = [
        name for page in pages for name in re.findall(r"^::: (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(named) > 20
    assert [name for name in named if importlib.util.find_spec(name) is None] == []


def test_the_map_names_every_module() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = dict(re.findall(r"^ {6}(\w+)/ +(.*\n(?: {10,}.*\n)*)", text, re.MULTILINE))
    package = ROOT / "src/moesaic"
    assert {path.parent.name for path in package.glob("*/__init__.py")} <= set(rooms)
    modules = {room: {path.stem for path in (package / room).glob("*.py")} for room in set(rooms) - {"cli"}}
    for room, names in modules.items():
        assert names - {"__init__", "__main__"} <= set(re.findall(r"\w+", rooms[room])), room
    assert {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"} <= set(re.findall(r"\w+", text))


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            if is_documented and not getattr(node, "name", "").startswith("_"):
                first = (ast.get_docstring(node) or "").split(" ")[0]
                found += [(path.name, first)] if first in ("By", "In", "None", "Of", "Those", "Which") else []
    assert not found


def test_there_is_one_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    newest = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    assert version == cited == newest
    assert isinstance(moesaic.__version__, str)
