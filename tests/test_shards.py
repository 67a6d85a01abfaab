"""shards.run and write: on one process, on several that torchrun starts, and when one of them dies."""

import json
import math
import os
import re
import subprocess
import sys
from functools import reduce
from operator import add
from pathlib import Path

import pytest

from benchmarks.jobs import run, workers, write

UNITS = [["b", 1], ["a", 2], {"name": "é", "n": None}, 3, "4"]


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_results_come_in_the_order_of_the_units(tmp_path):
    done = []
    got = run(UNITS, lambda unit: done.append(unit) or {"of": unit}, tmp_path / "new" / "folder")
    assert got == [{"of": unit} for unit in UNITS]
    assert done == UNITS
    assert run([], lambda unit: 1 / 0, tmp_path) == []


def test_each_unit_has_a_file_of_its_own_that_says_what_it_is(tmp_path):
    run(UNITS, str, tmp_path)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("*.json")]
    assert len(found) == len(files(tmp_path)) == len(UNITS)
    assert sorted(map(str, (one["unit"] for one in found))) == sorted(map(str, UNITS))
    assert all(one["result"] == str(one["unit"]) for one in found)


def test_what_is_on_disk_is_not_done_again(tmp_path):
    first = run(UNITS, lambda unit: [str(unit), 0.1], tmp_path)
    assert run(UNITS[::-1], lambda unit: pytest.fail("done twice"), tmp_path) == first[::-1]
    done = []
    run([*UNITS, 5, ["b", 1]], lambda unit: done.append(unit) or 0, tmp_path)
    assert done == [5]
    # The same keys in another order are the same unit, and a tuple is the list that JSON makes of it.
    assert run([{"n": None, "name": "é"}, ("b", 1)], lambda unit: pytest.fail("done twice"), tmp_path) == [first[2], first[0]]
    done.clear()
    run(UNITS, lambda unit: done.append(unit) or 0, tmp_path / "another")
    assert done == UNITS


def test_a_unit_that_is_there_twice_is_done_once(tmp_path):
    done = []
    assert run([1, 2, 1, 1], lambda unit: done.append(unit) or -unit, tmp_path) == [-1, -2, -1, -1]
    assert done == [1, 2]


def test_floats_come_back_exactly(tmp_path):
    numbers = [0.1, 1 / 3, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.pi * 1e-300, 2.0 ** 53 + 2, 1e22]
    for _ in range(2):                                      # just done, and read
        got = run([0], lambda unit: [*numbers, math.nan], tmp_path)[0]
        assert list(map(repr, got)) == list(map(repr, [*numbers, math.nan]))


def test_a_result_is_the_same_whether_done_or_read(tmp_path):
    def work(unit):
        return {"pair": (1, 2.5), 3: None}
    first = run([0], work, tmp_path)
    assert first == run([0], work, tmp_path) == [{"pair": [1, 2.5], "3": None}]


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "{}", '{"unit": 1}', b"\xff\xfe"])
def test_a_file_that_is_no_result_is_named(tmp_path, content):
    run([1], lambda unit: "fine", tmp_path)
    path, = tmp_path.iterdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a result that this program wrote; delete it")):
        run([1], lambda unit: "again", tmp_path)
    path.unlink()
    assert run([1], lambda unit: "again", tmp_path) == ["again"]


def test_a_file_with_another_unit_in_it_is_not_believed(tmp_path):
    run([1], lambda unit: "of one", tmp_path)
    path, = tmp_path.iterdir()
    path.write_text(json.dumps({"unit": 2, "result": "of two"}), encoding="utf-8")
    assert run([1], lambda unit: "of one again", tmp_path) == ["of one again"]
    assert run([1], lambda unit: pytest.fail("done twice"), tmp_path) == ["of one again"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_keeps_what_it_has_and_no_half_of_the_rest(tmp_path, error):
    done = []

    def work(unit):
        done.append(unit)
        if unit == 3 and done.count(3) == 1:
            raise error("in the middle")
        return 10 * unit
    with pytest.raises(error, match="in the middle"):
        run(range(5), work, tmp_path)
    assert len(files(tmp_path)) == 3
    assert run(range(5), work, tmp_path) == [0, 10, 20, 30, 40]
    assert done == [0, 1, 2, 3, 3, 4]


def test_an_interruption_while_writing_leaves_no_file(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run([1], str, tmp_path)
    assert files(tmp_path) == []
    assert run([1], str, tmp_path) == ["1"]


def test_a_result_that_json_cannot_hold_leaves_no_file(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        run([1], lambda unit: object(), tmp_path)
    assert files(tmp_path) == []


def test_progress_counts_units_done_and_units_found(tmp_path):
    seen = []
    run([1, 2], lambda unit: unit, tmp_path)
    run([1, 2, 3], lambda unit: seen.append("work") or unit, tmp_path, progress=seen.append)
    assert seen == [1, 1, "work", 1]


def test_a_lone_process_is_worker_0_of_1(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with workers() as rank:
        assert rank == (0, 1)


def test_write_replaces_the_whole_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    for data in (b"first, and longer", "sécond".encode()):
        write(path, data)
        assert path.read_bytes() == data
    monkeypatch.chdir(tmp_path)
    write("bare", b"a name without a folder")
    assert files(tmp_path) == ["bare", "file.txt"]
    (tmp_path / "usual").touch()
    assert (tmp_path / "bare").stat().st_mode == (tmp_path / "usual").stat().st_mode        # others may read it, if they may read the rest


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write(path, b"old")
    with pytest.raises(TypeError):
        write(path, "a text")
    for error in (OSError("disk full"), KeyboardInterrupt()):
        monkeypatch.setattr("os.replace", lambda *paths, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            write(path, b"new")
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["file.txt"]


# What follows runs on real processes.

N = 60
SCRIPT = '''
import math, os, sys, time
from pathlib import Path
from benchmarks import jobs as shards

folder, n, dies = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["dies"]
first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
on_disk = len(list((folder / "units").glob("*.json")))      # before any process of this start can work
worked = 0

def note(file, line):
    with open(folder / file, "a") as lines:
        lines.write(line + "\\n")

def work(i):
    global worked
    if dies and first and rank == 1 and worked == 5:
        while not (folder / "log-0").exists():
            time.sleep(0.01)
        os._exit(3)
    worked += 1
    note(f"log-{rank}", str(i))
    return math.sin(i) * 10.0 ** (i % 17 - 8)

with shards.workers() as (rank, processes):
    note("starts", f"{rank} {processes} {on_disk}")
    total = 0.0
    for x in shards.run(list(range(n)), work, folder / "units"):
        total += x
    sys.stdout.write(f"sum {rank} {processes} {total!r}\\n")        # whole lines, or two processes' get mixed
'''


def value(i):
    return math.sin(i) * 10.0 ** (i % 17 - 8)


TOTAL = repr(reduce(add, map(value, range(N)), 0.0))


def start(tmp_path, processes, *arguments, restarts=0):
    """The script on so many processes, started by torchrun. -> what came of it"""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "out").mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    return subprocess.run([*command, str(script), str(tmp_path / "out"), str(N), *arguments], env=environment, cwd=tmp_path, capture_output=True,
                          encoding="utf-8", timeout=300)


def lines(tmp_path, pattern):
    return [line for path in sorted((tmp_path / "out").glob(pattern)) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_sum_in_another_order_has_other_last_digits():
    # Or the next test would show nothing.
    for processes in (2, 4):
        parts = [reduce(add, map(value, range(rank, N, processes)), 0.0) for rank in range(processes)]
        assert repr(reduce(add, parts)) != TOTAL


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_sum_is_the_same_to_the_last_digit_on_any_number_of_processes(tmp_path, processes):
    done = start(tmp_path, processes)
    assert done.returncode == 0, done.stderr
    # Every process has every result.
    assert sorted(done.stdout.splitlines()) == [f"sum {rank} {processes} {TOTAL}" for rank in range(processes)]
    assert sorted(map(int, lines(tmp_path, "log-*"))) == list(range(N))         # each unit once
    assert len(list((tmp_path / "out").glob("log-*"))) == processes             # and everyone worked
    assert len(files(tmp_path / "out" / "units")) == N


def test_after_the_death_of_a_process_the_others_go_on_from_what_is_there(tmp_path):
    done = start(tmp_path, 2, "dies", restarts=1)
    assert done.returncode == 0, done.stderr
    assert [line for line in sorted(done.stdout.splitlines()) if line.startswith("sum")] == [f"sum {rank} 2 {TOTAL}" for rank in range(2)]
    starts = [tuple(map(int, line.split())) for line in lines(tmp_path, "starts")]
    assert sorted(starts[:2]) == [(0, 2, 0), (1, 2, 0)]                         # the first start found nothing
    (_, _, kept), (_, _, same) = starts[2:]
    assert kept == same
    assert 5 <= kept < N                                                        # the second what both had finished by then
    worked = list(map(int, lines(tmp_path, "log-*")))
    assert set(worked) == set(range(N))
    # What was on disk was not done again: at most the one that process 0 was ended in was begun twice.
    assert N <= len(worked) <= N + 1
    assert lines(tmp_path, "log-1") == list(map(str, range(1, N, 2)))


def test_what_a_dead_run_left_another_number_of_processes_completes(tmp_path):
    done = start(tmp_path, 2, "dies")
    assert done.returncode != 0
    assert "sum" not in done.stdout
    before = set(map(int, lines(tmp_path, "log-*")))
    on_disk = len(list((tmp_path / "out" / "units").glob("*.json")))
    assert {1, 3, 5, 7, 9} <= before
    assert 11 not in before                                                     # the one that process 1 died in
    again = []
    got = run(list(range(N)), lambda i: again.append(i) or value(i), tmp_path / "out" / "units")
    assert repr(reduce(add, got, 0.0)) == TOTAL
    assert len(again) == N - on_disk
    assert not {1, 3, 5, 7, 9} & set(again)
