import json
import mmap
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from capped import requires_cgroup, run_capped
from hermes.memory import allocator, probe

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


def make_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@linux_only
def test_split_adds_up_to_resident():
    split = probe.memory_split()
    assert split.anon_bytes > 0
    assert split.file_bytes > 0
    total = split.anon_bytes + split.file_bytes + split.shmem_bytes
    # statm and status are read at different moments and sum per-CPU counters lazily
    assert total == pytest.approx(probe.resident_bytes(), abs=4 << 20)


@linux_only
def test_resident_follows_an_allocation_and_peak_keeps_it():
    before = probe.resident_bytes()
    block = bytearray(os.urandom(1)) * (64 << 20)
    grown = probe.resident_bytes()
    assert grown - before > 60 << 20
    peak = probe.peak_resident_bytes()
    assert peak >= grown - (4 << 20)
    del block
    assert probe.resident_bytes() < grown - (50 << 20)
    # the kernel sums per-CPU counters lazily for this figure too
    assert probe.peak_resident_bytes() >= peak - (4 << 20)


@linux_only
def test_peak_is_not_inherited_from_a_big_parent():
    script = "import resource; from hermes.memory.probe import peak_resident_bytes as peak; print(peak())"
    ballast = b"x" * (200 << 20)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 << 20
    assert len(ballast) == 200 << 20


def test_counters_never_go_back():
    faults, read = probe.major_faults(), probe.process_read_bytes()
    assert faults >= 0
    assert read is None or read >= 0
    assert probe.major_faults() >= faults
    assert probe.available_bytes() > 0
    pressure = probe.memory_pressure(probe.find_cgroup())
    assert pressure is None or 0 <= pressure <= 100


V1 = {
    "proc/self/cgroup": "5:cpu:/a\n4:memory:/a/b\n0::/\n",
    "proc/self/mountinfo": "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "999\n",
    "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1000\n",
    "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "600\n",
    "sys/fs/cgroup/memory/a/memory.stat": "pgmajfault 1\ntotal_pgmajfault 7\n",
    "sys/fs/cgroup/memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "2000\n",
    "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes": "500\n",
}
V2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "proc/self/mountinfo": "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    "sys/fs/cgroup/cgroup.controllers": "memory io\n",
    "sys/fs/cgroup/a/memory.max": "max\n",
    "sys/fs/cgroup/a/memory.current": "600\n",
    "sys/fs/cgroup/a/b/memory.max": "2000\n",
    "sys/fs/cgroup/a/b/memory.current": "500\n",
    "sys/fs/cgroup/a/b/memory.stat": "anon 1\nworkingset_refault_file 12\npgmajfault 3\n",
    "sys/fs/cgroup/a/b/memory.events": "low 0\noom 4\noom_kill 1\n",
    "sys/fs/cgroup/a/b/memory.pressure": "some avg10=3.50 avg60=1.00 avg300=0.10 total=5\nfull avg10=0.00\n",
}


def test_v1_takes_the_smallest_limit_of_the_ancestors(tmp_path):
    make_tree(tmp_path, V1)
    cgroup = probe.find_cgroup(tmp_path)
    assert cgroup is not None
    assert (cgroup.version, cgroup.limit_bytes) == (1, 1000)
    assert cgroup.directory == tmp_path / "sys/fs/cgroup/memory/a"
    assert (cgroup.charged_bytes(), cgroup.refaults(), cgroup.oom_kills()) == (600, 7, 2)


def test_v2_with_limits_below_an_unlimited_ancestor(tmp_path):
    make_tree(tmp_path, V2)
    cgroup = probe.find_cgroup(tmp_path)
    assert cgroup is not None
    assert (cgroup.version, cgroup.limit_bytes) == (2, 2000)
    assert (cgroup.charged_bytes(), cgroup.refaults(), cgroup.oom_kills()) == (500, 12, 1)
    assert probe.memory_pressure(cgroup) == 3.5


@pytest.mark.parametrize(
    ("tree", "limit"), [(V1, "memory.limit_in_bytes:9223372036854771712"), (V2, "memory.max:max")], ids=["v1", "v2"]
)
def test_unlimited_is_none_and_reads_its_own_group(tmp_path, tree, limit):
    name, _, unlimited = limit.partition(":")
    make_tree(tmp_path, {path: unlimited if path.endswith(name) else text for path, text in tree.items()})
    cgroup = probe.find_cgroup(tmp_path)
    assert cgroup is not None
    assert cgroup.limit_bytes is None
    assert cgroup.directory.name == "b"


def test_container_sees_its_own_group_as_the_root(tmp_path):
    inside = {path.replace("cgroup/a/b/", "cgroup/"): text for path, text in V2.items() if "cgroup/a/m" not in path}
    inside["proc/self/mountinfo"] = "41 31 0:38 /a/b /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    make_tree(tmp_path, inside)
    cgroup = probe.find_cgroup(tmp_path)
    assert cgroup is not None
    assert (cgroup.limit_bytes, cgroup.directory) == (2000, tmp_path / "sys/fs/cgroup")


@pytest.mark.parametrize("own", ["/a/b", "/"], ids=["whole-path", "namespace"])
def test_another_groups_subtree_mounted_before_ones_own(tmp_path, own):
    tree = {path.replace("cgroup/a/b/", "cgroup/" if own == "/" else "cgroup/a/b/"): text for path, text in V2.items()}
    tree["proc/self/cgroup"] = f"0::{own}\n"
    tree["proc/self/mountinfo"] = "30 29 0:38 /other /host rw - cgroup2 cgroup2 rw\n" + V2["proc/self/mountinfo"]
    make_tree(tmp_path, tree | {"host/memory.current": "1\n", "host/memory.max": "77\n"})
    cgroup = probe.find_cgroup(tmp_path)
    assert cgroup is not None
    assert cgroup.limit_bytes == 2000


@pytest.mark.parametrize(("high", "limit"), [("1500\n", 1500), ("2500\n", 2000), ("max\n", 2000)])
def test_v2_takes_the_lower_of_its_two_limits(tmp_path, high, limit):
    make_tree(tmp_path, V2 | {"sys/fs/cgroup/a/b/memory.high": high})
    cgroup = probe.find_cgroup(tmp_path)
    assert cgroup is not None
    assert cgroup.limit_bytes == limit


def test_a_mount_point_with_a_space(tmp_path):
    moved = {path.replace("sys/fs/cgroup", "my cgroups"): text for path, text in V2.items()}
    moved["proc/self/mountinfo"] = "41 31 0:38 / /my\\040cgroups rw - cgroup2 cgroup2 rw\n"
    make_tree(tmp_path, moved)
    cgroup = probe.find_cgroup(tmp_path)
    assert cgroup is not None
    assert cgroup.limit_bytes == 2000


def test_no_memory_cgroup(tmp_path):
    assert probe.find_cgroup(tmp_path) is None
    make_tree(tmp_path, {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2["proc/self/mountinfo"]})
    assert probe.find_cgroup(tmp_path) is None


def run_script(script: str, *, limit_bytes: int, **options):
    return run_capped([sys.executable, "-c", textwrap.dedent(script)], limit_bytes=limit_bytes, **options)


@requires_cgroup
def test_real_limit_and_charge_are_seen_from_inside():
    script = """
        import json, resource
        from hermes.memory.probe import find_cgroup, peak_resident_bytes
        block = b"x" * (32 << 20)
        group = find_cgroup()
        print(json.dumps({"limit": group.limit_bytes, "charge": group.charged_bytes(), "kills": group.oom_kills(),
                          "peak": peak_resident_bytes(),
                          "maxrss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
    """
    ballast = b"x" * (200 << 20)
    result = run_script(script, limit_bytes=96 << 20)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    assert seen["limit"] == 96 << 20
    assert 32 << 20 < seen["charge"] <= 96 << 20
    assert seen["kills"] == result.oom_kills == 0
    # neither figure knows of this process's ballast
    assert 32 << 20 < seen["peak"] < 96 << 20
    assert seen["maxrss"] == pytest.approx(seen["peak"], abs=4 << 20)
    assert result.peak_bytes is None or 32 << 20 < result.peak_bytes <= 96 << 20
    assert len(ballast) == 200 << 20


@requires_cgroup
def test_a_process_over_the_limit_is_killed_and_counted():
    result = run_script("print('started', flush=True); b'x' * (128 << 20)", limit_bytes=64 << 20)
    assert result.returncode == 137
    assert result.stdout == "started\n"
    assert result.oom_kills >= 1


@requires_cgroup
def test_refaults_rise_when_pages_in_use_are_squeezed_out(tmp_path):
    file = tmp_path / "bigger-than-the-group"
    file.write_bytes(os.urandom(1 << 20) * 96)
    script = f"""
        from hermes.memory.probe import find_cgroup, major_faults, process_read_bytes
        group, counts = find_cgroup(), []
        for _ in range(3):
            with open({str(file)!r}, "rb", buffering=0) as stream:
                while stream.read(1 << 20):
                    pass
            counts.append(group.refaults())
        print(counts[0] < counts[2], process_read_bytes() > 100 << 20)
    """
    result = run_script(script, limit_bytes=48 << 20)
    assert result.stdout.split() == ["True", "True"], (result.stdout, result.stderr)
    assert result.read_bytes is None or result.read_bytes > 100 << 20


@requires_cgroup
def test_read_limit_slows_reading_down(tmp_path):
    file = tmp_path / "payload"
    file.write_bytes(os.urandom(1 << 20) * 24)
    script = f"""
        with open({str(file)!r}, "rb", buffering=0) as stream:
            while stream.read(1 << 20):
                pass
    """
    result = run_script(script, limit_bytes=256 << 20, read_bytes_per_second=16 << 20, disk_of=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.seconds > 1.2


def test_threads_take_and_return_memory_with_a_tight_heap():
    """Runs in a process of its own: allocator settings cannot be undone."""
    script = textwrap.dedent("""
        from hermes.memory.allocator import keep_heap_tight, trim_heap
        from hermes.memory.probe import resident_bytes
        print(keep_heap_tight() and keep_heap_tight())
        before = resident_bytes()
        for size in (4 << 20, 16 << 20, 24 << 20):
            block = bytearray(b"x") * size
            del block
        trim_heap()
        print(resident_bytes() - before < 4 << 20)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    tight, returned = done.stdout.split()
    assert tight == "False" or returned == "True"


def test_a_held_heap_takes_no_page_twice():
    script = textwrap.dedent("""
        import resource
        from hermes.memory.allocator import hold_heap, keep_heap_tight
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(20):
                bytearray(20 << 20)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        keep_heap_tight()
        tight = faults()
        assert hold_heap(1 << 20) and hold_heap(64 << 20)
        faults()
        print(tight, faults())
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    tight, held = map(int, done.stdout.split())
    assert held < tight / 10


def test_a_grown_heap_is_there_when_it_is_taken():
    script = textwrap.dedent("""
        import resource
        from hermes.memory.allocator import grow_heap, keep_heap_tight
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            bytearray(12 << 20)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        keep_heap_tight()
        assert grow_heap(14 << 20)
        print(faults())
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < (12 << 20) / mmap.PAGESIZE / 10


def test_no_allocator_to_set(monkeypatch):
    class Bare:
        pass

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: Bare())
    assert allocator.keep_heap_tight() is False
    assert allocator.hold_heap(1 << 30) is False
    assert allocator.grow_heap(1 << 20) is False
    assert allocator.trim_heap() is False


def test_probing_starts_no_thread():
    before = threading.active_count()
    probe.find_cgroup()
    probe.memory_split()
    assert threading.active_count() == before
