"""What keeps the tests honest on any machine: no patched private names, no clock that decides what is seen.

And one spelling of names, here and in the sources.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
OURS = {"moesaic", "benchmarks"}
SLEEPERS = {
    ("runs/test_study.py", "wait_for"),  # polls for a condition
    ("runs/test_compare.py", "test_the_command_is_killed_and_goes_on_in_its_directory"),
    ("studies/test_workers.py", "wait_for"),
    ("benchmarks/test_harness.py", "test_cpu_time_is_of_this_process_only"),  # what is measured is that it sleeps
    ("benchmarks/test_harness.py", "test_wall_clock_sees_sleep"),
}


def is_private(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last.startswith("_") and not last.endswith("__")


def private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of each private name that is patched, imported from our packages, or read from our modules."""
    imported = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    ours = [alias for node in imported for alias in node.names if package(node, alias) in OURS]
    modules = {alias.asname or alias.name for alias in ours if alias.name[:1].islower()}
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom():
                yield from (
                    (node.lineno, alias.name) for alias in node.names if alias in ours and is_private(alias.name)
                )
            case ast.Call(func=ast.Attribute(attr="setattr")):
                names = [argument.value for argument in node.args[:2] if isinstance(argument, ast.Constant)]
                yield from ((node.lineno, name) for name in names if isinstance(name, str) and is_private(name))
            case ast.Attribute(value=ast.Name(id=module)) if module in modules and is_private(node.attr):
                yield node.lineno, f"{module}.{node.attr}"


def package(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> str:
    """What an import names first."""
    return ((node.module or "") if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]


def sleeps(tree: ast.AST, function: str = "") -> Iterator[tuple[int, str]]:
    """Line of each sleep, and the outermost function around it."""
    for node in ast.iter_child_nodes(tree):
        inside = function or (node.name if isinstance(node, ast.FunctionDef) else "")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.sleep", "sleep"):
            yield node.lineno, inside
        yield from sleeps(node, inside)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_private_name_is_used_and_no_sleep_decides(path: Path) -> None:
    tree, name = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(TESTS).as_posix()
    assert list(private_names(tree)) == [], "test behavior, or make the seam public"
    assert [line for line, function in sleeps(tree) if (name, function) not in SLEEPERS] == [], "wait for a condition"


@pytest.mark.parametrize(
    "source",
    [
        "monkeypatch.setattr(module, '_build', None)",
        "monkeypatch.setattr('moesaic.data.streams._build', None)",
        "from moesaic.studies.report import _sizes",
        "from moesaic.studies import runner\nrunner._locked()",
        "import moesaic.studies.runner as runner\nrunner._locked()",
    ],
)
def test_a_private_name_is_seen(source: str) -> None:
    assert len(list(private_names(ast.parse(source)))) == 1


def test_a_sleep_is_seen_with_its_function() -> None:
    assert list(sleeps(ast.parse("def f():\n    def g():\n        time.sleep(1)\n"))) == [(3, "f")]
    assert not list(private_names(ast.parse("monkeypatch.setattr(module, '__all__', [])")))


BRITISH = re.compile(
    r"(character|central|general|initial|maxim|minim|normal|optim|organ|parallel|parametr|quant|random|recogn|regular|"
    r"serial|special|summar|synchron|token|vector)is(e|ing|ation)|colour|behaviour|neighbour|favour|honour|"
    r"(label|model|cancel|travel)l(ed|ing)|centre|centring|grey|catalogue|analyse",
    re.IGNORECASE,
)
NAMED = sorted(file for folder in ("src", "benchmarks", "tests") for file in (TESTS.parent / folder).rglob("*.py"))


def names(tree: ast.AST) -> Iterator[str]:
    """Names that a file gives or uses: of functions, classes, arguments, variables and attributes."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name) | ast.Attribute(attr=name):
                yield name
            case ast.arg(arg=name) | ast.keyword(arg=str(name)) | ast.alias(name=name):
                yield name


@pytest.mark.slow
def test_names_are_spelled_the_american_way() -> None:
    found = {
        (path.relative_to(TESTS.parent).as_posix(), name)
        for path in NAMED
        for name in [path.stem, *names(ast.parse(path.read_text(encoding="utf-8")))]
        if BRITISH.search(name)
    }
    assert found == set()
