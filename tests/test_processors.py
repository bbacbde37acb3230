"""How many processors may be used: affinity, and the limits of both versions of control groups."""

import os
import subprocess
import sys

import pytest
import torch

from proteinbert_fast import processors
from proteinbert_fast.ops.cpu import kernel_threads

AFFINITY = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.fixture
def machine(tmp_path):
    """Makes a /proc/self, and the groups that it names, from what they say."""

    def make(cgroup, mounts, limits):
        (tmp_path / "cgroup").write_text(cgroup)
        (tmp_path / "mountinfo").write_text("".join(f"30 23 0:26 {line}\n" for line in mounts))
        for name, text in limits.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def test_second_version(machine, tmp_path):
    """The least limit of a group and those above it."""
    proc = machine(
        "0::/user/job\n",
        [f"/ {tmp_path}/groups rw - cgroup2 cgroup2 rw,nsdelegate"],
        {"groups/user/job/cpu.max": "max 100000\n", "groups/user/cpu.max": "150000 100000\n"},
    )
    assert processors.cpu_limit(proc) == 1.5
    (tmp_path / "groups/user/job/cpu.max").write_text("50000 100000\n")
    processors.cpu_limit.cache_clear()
    assert processors.cpu_limit(proc) == 0.5


def test_first_version(machine, tmp_path):
    """Where each controller has a hierarchy of its own."""
    proc = machine(
        "4:memory:/elsewhere\n2:cpu,cpuacct:/job\n0::/\n",
        [
            f"/ {tmp_path}/memory rw - cgroup cgroup rw,memory",
            f"/ {tmp_path}/cpu rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct",
        ],
        {
            "cpu/job/cpu.cfs_quota_us": "300000\n", "cpu/job/cpu.cfs_period_us": "100000\n",
            "cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n",
            "memory/elsewhere/cpu.cfs_quota_us": "100000\n", "memory/elsewhere/cpu.cfs_period_us": "100000\n",
        },
    )  # fmt: skip
    assert processors.cpu_limit(proc) == 3.0


def test_a_container_that_sees_its_own_group_as_the_root(machine, tmp_path):
    proc = machine(
        "2:cpu:/docker/abc\n",
        [f"/docker/abc {tmp_path}/cpu\\040groups ro - cgroup cgroup rw,cpu"],
        {"cpu groups/cpu.cfs_quota_us": "250000\n", "cpu groups/cpu.cfs_period_us": "100000\n"},
    )
    assert processors.cpu_limit(proc) == 2.5


@pytest.mark.parametrize("text", ["max 100000\n", "", "junk\n", "-1 100000\n", "100000 0\n", "a b\n"])
def test_no_limit(machine, tmp_path, text):
    proc = machine("0::/\n", [f"/ {tmp_path}/g rw - cgroup2 none rw"], {"g/cpu.max": text})
    assert processors.cpu_limit(proc) is None


def test_a_system_without_control_groups(tmp_path):
    assert processors.cpu_limit(tmp_path) is None


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, AFFINITY), (0.25, 1), (1.0, 1), (1.5, min(2, AFFINITY)), (1e6, AFFINITY)]
)
def test_usable_processors(monkeypatch, limit, expected):
    monkeypatch.setattr(processors, "cpu_limit", lambda: limit)
    assert processors.usable_processors() == expected


def test_kernels_run_on_no_more_threads_than_can_run_at_once(monkeypatch):
    before = torch.get_num_threads()
    try:
        for threads in (1, AFFINITY + 62):
            torch.set_num_threads(threads)
            assert kernel_threads() == min(threads, processors.usable_processors())
        monkeypatch.setattr(processors, "cpu_limit", lambda: 0.5)
        assert kernel_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("variable", "limit", "threads"),
    [
        ("", "None", None),
        ("", "1.0", 1),
        ("6400", "None", AFFINITY),
        ("6400", "1.0", 1),
        ("1", "None", 1),
        ("dynamic", "1.0", 1),
    ],
)
def test_the_command_starts_pytorch_with_so_many_threads(variable, limit, threads):
    code = (
        "from proteinbert_fast import processors\n"
        f"processors.cpu_limit = lambda: {limit}\n"
        "from proteinbert_fast.cli.main import main\n"
        "main(['--version'])\n"
        "import os; print(os.environ.get('OMP_NUM_THREADS'))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if variable:
        environment["OMP_NUM_THREADS"] = variable
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == str(threads)
