"""What a process may use of the machine is what its cgroups and its affinity leave it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdzram.machine import Machine
from nbdzram.values import memory

MIB = 1 << 20
UNLIMITED = str((1 << 63) - 4096)  # what version 1 writes where there is no limit


class Tree:
    """A process's directory and a cgroup file system as plain files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.machine = Machine(root)
        self.memberships: list[str] = []
        self.mounts: list[str] = []

    def hierarchy(self, mount: str, cgroup: str, *, controllers: str = "", root: str = "/") -> None:
        """One hierarchy, mounted from its cgroup `root` on, in which the process is in `cgroup`."""
        number = len(self.memberships) if controllers else 0
        self.memberships.append(f"{number}:{controllers}:{cgroup}")
        place = str(self.root / mount).replace(" ", "\\040")
        kind = f"cgroup cgroup rw,{controllers}" if controllers else "cgroup2 cgroup2 rw,nsdelegate"
        self.mounts.append(f"30 23 0:28 {root} {place} rw,relatime shared:9 - {kind}")
        for name, lines in (
            ("cgroup", self.memberships),
            ("mountinfo", ["22 1 0:2 / / rw - ext4 /dev/vda rw", *self.mounts]),
        ):
            (self.root / name).write_bytes(os.fsencode("\n".join(lines) + "\n"))

    def limit(self, directory: str, **files: str) -> Path:
        place = self.root / directory
        place.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (place / name.replace("__", ".")).write_text(f"{text}\n")
        return place


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_without_cgroups_the_machines_memory_counts(tree: Tree) -> None:
    share = tree.machine.memory()
    assert share.amount == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert str(share) == "this machine"


@pytest.mark.parametrize("name", ["memory__max", "memory__high"])
def test_version_2_limits_memory_hard_or_by_stalling(tree: Tree, name: str) -> None:
    tree.hierarchy("fs", "/a")
    where = tree.limit("fs/a", **{"memory__max": "max", name: str(64 * MIB)})
    share = tree.machine.memory()
    assert (share.amount, share.cgroup) == (64 * MIB, where)
    assert str(where) in str(share)


def test_the_smallest_limit_on_the_way_up_counts(tree: Tree) -> None:
    tree.hierarchy("fs", "/a/b/c")
    tree.limit("fs/a/b/c", memory__max=str(512 * MIB))
    smallest = tree.limit("fs/a/b", memory__max=str(128 * MIB))
    tree.limit("fs/a", memory__max=str(256 * MIB))
    assert tree.machine.memory().cgroup == smallest
    (smallest / "memory.max").write_text("max\n")
    assert tree.machine.memory().amount == 256 * MIB


def test_version_1_has_a_hierarchy_a_controller(tree: Tree) -> None:
    tree.hierarchy("fs/pids", "/elsewhere", controllers="pids")
    tree.hierarchy("fs/memory", "/job", controllers="memory")
    tree.limit("fs/pids/elsewhere", memory__limit_in_bytes=str(MIB))  # not memory's: must not be read
    tree.limit("fs/memory/elsewhere", memory__limit_in_bytes=str(MIB))  # memory's, but not where the process is
    tree.limit("fs/memory", memory__limit_in_bytes=UNLIMITED)
    tree.limit("fs/memory/job", memory__limit_in_bytes=str(96 * MIB))
    assert tree.machine.memory().amount == 96 * MIB


def test_no_limit_of_version_1_is_the_machines_memory(tree: Tree) -> None:
    tree.hierarchy("fs/memory", "/job", controllers="memory")
    tree.limit("fs/memory/job", memory__limit_in_bytes=UNLIMITED)
    assert tree.machine.memory().cgroup is None


def test_both_versions_mounted_together_are_both_asked(tree: Tree) -> None:
    tree.hierarchy("fs/memory", "/job", controllers="memory")
    tree.hierarchy("fs/unified", "/unit")
    tree.limit("fs/memory/job", memory__limit_in_bytes=str(96 * MIB))
    tree.limit("fs/unified/unit", memory__max=str(48 * MIB))
    assert tree.machine.memory().amount == 48 * MIB


def test_a_container_sees_its_cgroup_where_the_hierarchy_is_mounted(tree: Tree) -> None:
    tree.hierarchy("fs/memory", "/docker/4f1c/nested", controllers="memory", root="/docker/4f1c")
    tree.limit("fs/memory", memory__limit_in_bytes=str(96 * MIB))
    tree.limit("fs/memory/nested", memory__limit_in_bytes=str(64 * MIB))
    assert tree.machine.memory().amount == 64 * MIB


@pytest.mark.parametrize("cgroup", ["/../sibling", "/not/below/the/root"])
def test_a_cgroup_outside_what_is_mounted_falls_back_to_the_mount(tree: Tree, cgroup: str) -> None:
    tree.hierarchy("fs", cgroup, root="/docker/4f1c" if ".." not in cgroup else "/")
    tree.limit("fs", memory__max=str(96 * MIB))
    tree.limit("sibling", memory__max=str(MIB))
    assert tree.machine.memory().amount == 96 * MIB


def test_a_blank_in_the_mount_point_is_read(tree: Tree) -> None:
    tree.hierarchy("fs of ours", "/a")
    tree.limit("fs of ours/a", memory__max=str(64 * MIB))
    assert tree.machine.memory().amount == 64 * MIB


@pytest.mark.parametrize("end", ["\f", "\v", "\x1c", "\x85", "\u2028", "\udcff"])
def test_a_directory_whose_name_ends_lines_elsewhere_is_one_line_of_the_kernels(tree: Tree, end: str) -> None:
    """Whoever may mount something, or make a cgroup, chooses its name, which need be no text; a server that met one did
    not start."""
    tree.mounts.append(f"31 23 0:29 / /home/a{end}b rw - fuse.sshfs a{end}b rw")
    tree.hierarchy("fs", f"/a{end}b")
    tree.limit(f"fs/a{end}b", memory__max=str(64 * MIB))
    assert tree.machine.memory().amount == 64 * MIB
    assert not tree.machine.keeps_in_memory(tree.root)


def test_a_percentage_of_memory_is_of_what_the_process_may_use(monkeypatch: pytest.MonkeyPatch, tree: Tree) -> None:
    tree.hierarchy("fs", "/a")
    tree.limit("fs/a", memory__max=str(512 * MIB))
    monkeypatch.setattr("nbdzram.values.Machine", lambda: tree.machine)
    assert memory("50%") == 256 * MIB


@pytest.fixture
def four_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 7})
    monkeypatch.setattr(os, "cpu_count", lambda: 256)


@pytest.mark.usefixtures("four_allowed")
def test_affinity_says_how_many_processors_there_are(tree: Tree) -> None:
    assert tree.machine.processors() == 4


@pytest.mark.usefixtures("four_allowed")
@pytest.mark.parametrize(
    ("maximum", "processors"),
    [("150000 100000", 2), ("100000 100000", 1), ("1000 100000", 1), ("900000 100000", 4), ("max 100000", 4)],
)
def test_a_quota_of_version_2_is_rounded_up_to_processors(tree: Tree, maximum: str, processors: int) -> None:
    tree.hierarchy("fs", "/a/b")
    tree.limit("fs/a/b", cpu__max="max 100000")
    tree.limit("fs/a", cpu__max=maximum)
    assert tree.machine.processors() == processors


@pytest.mark.usefixtures("four_allowed")
@pytest.mark.parametrize(("quota", "processors"), [("250000", 3), ("-1", 4)])
def test_a_quota_of_version_1_counts_too(tree: Tree, quota: str, processors: int) -> None:
    tree.hierarchy("fs/cpu", "/job", controllers="cpu,cpuacct")
    tree.limit("fs/cpu/job", cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
    assert tree.machine.processors() == processors


def test_tasks_are_what_the_smallest_cgroup_allows(tree: Tree) -> None:
    assert tree.machine.tasks() is None
    tree.hierarchy("fs/pids", "/a/b", controllers="pids")
    tree.limit("fs/pids/a/b", pids__max="max")
    where = tree.limit("fs/pids/a", pids__max="128")
    share = tree.machine.tasks()
    assert share is not None
    assert (share.amount, share.cgroup) == (128, where)
