"""How much memory this process may have."""

from pathlib import Path

import pytest

from moesaic.devices import cgroup_limit, gigabytes, machine_memory, require_memory
from moesaic.errors import InputError


def group(root: Path, name: str, value: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(value + "\n")


def test_the_smallest_limit_of_the_groups_counts(tmp_path: Path) -> None:
    lists, root = tmp_path / "cgroup", tmp_path / "fs"
    lists.write_text("0::/jobs/mine\n")
    assert cgroup_limit(lists, root) is None
    group(root, "jobs/mine/memory.max", "max")
    assert cgroup_limit(lists, root) is None
    group(root, "jobs/memory.max", "5000")
    group(root, "memory.max", "7000")
    assert cgroup_limit(lists, root) == 5000
    lists.write_text("5:cpu,cpuacct:/jobs\n4:memory:/docker/a\n")
    group(root, "memory/docker/a/memory.limit_in_bytes", "4000")
    group(root, "memory/memory.limit_in_bytes", "9223372036854771712")
    assert cgroup_limit(lists, root) == 4000
    assert cgroup_limit(tmp_path / "absent", root) is None


def test_more_than_there_is_is_refused_with_both_numbers() -> None:
    there, owner = machine_memory()
    require_memory("a model", there)
    with pytest.raises(InputError) as refusal:
        require_memory("a model", there + 10**12, advice="must be smaller")
    assert str(refusal.value) == (
        f"a model needs {gigabytes(there + 10**12)} of memory, but {owner} has {gigabytes(there)}; must be smaller"
    )
