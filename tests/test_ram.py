"""RAM is the machine's, or what the control groups around the process leave of it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from moesmith import ram

VERSIONS = {
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "7:memory:"),
    2: ("", "memory.max", "memory.current", "inactive_file", "0::"),
}


@pytest.fixture(params=VERSIONS)
def group(request, tmp_path, monkeypatch):
    """Writes a control group of this version; the process is in /outer/inner."""
    folder, limit_file, current_file, cached, line = VERSIONS[request.param]
    (tmp_path / "own").write_text(f"5:cpu,cpuacct:/elsewhere\n{line}/outer/inner\n")
    monkeypatch.setattr(ram, "OWN", tmp_path / "own")
    monkeypatch.setattr(ram, "MOUNTED", tmp_path / "mounted")

    def write(path: str, limit: str, taken: int = 0, files: int = 0) -> None:
        where: Path = tmp_path / "mounted" / folder / path
        where.mkdir(parents=True, exist_ok=True)
        (where / limit_file).write_text(f"{limit}\n")
        (where / current_file).write_text(f"{taken}\n")
        (where / "memory.stat").write_text(f"anon 5\n{cached} {files}\n{cached.replace('in', '')} 1000\n")

    return write


def test_without_groups_it_is_the_machines(group):
    assert ram.total() == psutil.virtual_memory().total
    assert 0.5 < ram.available() / psutil.virtual_memory().available < 2


def test_pages_of_files_do_not_count_as_taken(group):
    group("", "5000000", taken=3_000_000, files=999_000)
    assert (ram.total(), ram.available()) == (5_000_000, 3_000_000)


def test_the_narrowest_of_nested_groups_counts(group):
    group("", "max")
    group("outer", "6000000", taken=5_000_000)
    group("outer/inner", "4000000", taken=2_000_000)
    group("elsewhere", "10")
    assert (ram.total(), ram.available()) == (4_000_000, 1_001_000)


def test_a_group_that_is_over_its_limit_has_nothing_left(group):
    group("outer/inner", "1000000", taken=3_000_000)
    assert ram.available() == 0


def test_no_limit_is_no_limit(group):
    group("", "max", taken=3_000_000)
    group("outer", str((1 << 63) - 4096), taken=3_000_000)
    assert ram.total() == psutil.virtual_memory().total and ram.available() > 10_000_000


def test_figures_that_cannot_be_read_are_passed_over(group, tmp_path):
    group("outer", "5000000")
    for file in (tmp_path / "mounted").rglob("memory.stat"):
        file.unlink()
    assert ram.available() > 5_000_000
    (tmp_path / "own").unlink()
    assert ram.total() == psutil.virtual_memory().total
