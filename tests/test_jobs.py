"""jobs.run and utils.write: in one process, in several that torchrun starts, and when one of them dies."""

import json
import math
import os
import re
import subprocess
import sys
from functools import reduce
from operator import add

import pytest
from conftest import ROOT

from benchmarks.jobs import run, workers
from ministeer.utils import write

UNITS = [["b", 1], ["a", 2], {"name": "é", "n": None}, 3, "4"]
FLOATS = [0.1, 1 / 3, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.pi * 1e-300,
          2.0 ** 53 + 2, 1e22, math.nan]


class Work:
    """unit -> its text. done: the units so far. error: raised the first time at unit 3"""

    def __init__(self, error=None):
        self.done, self.error = [], error

    def __call__(self, unit):
        self.done.append(unit)
        if self.error and unit == 3 and self.done.count(3) == 1:
            raise self.error
        return str(unit)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_results_come_in_the_order_of_the_units_and_each_has_a_file(tmp_path):
    work, folder = Work(), tmp_path / "new" / "folder"
    assert run(UNITS, work, folder) == list(map(str, UNITS))
    assert work.done == UNITS
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    assert len(contents) == len(files(folder)) == len(UNITS)
    assert all(content["unit"] in UNITS and content["result"] == str(content["unit"]) for content in contents)
    assert run([], lambda unit: 1 / 0, folder) == []


@pytest.mark.parametrize(("units", "expected", "done"), [
    (UNITS[::-1], [str(unit) for unit in UNITS[::-1]], []),
    ([*UNITS, 5, ["b", 1]], [*map(str, [*UNITS, 5]), str(UNITS[0])], [5]),
    # The same keys in another order are the same unit, and a tuple is the list that JSON makes of it.
    ([{"n": None, "name": "é"}, ("b", 1)], [str(UNITS[2]), str(UNITS[0])], []),
    ([1, 2, 1, 1], ["1", "2", "1", "1"], [1, 2]),
])
def test_what_is_on_disk_is_not_done_again(tmp_path, units, expected, done):
    run(UNITS, Work(), tmp_path)
    work = Work()
    assert run(units, work, tmp_path) == expected
    assert work.done == done
    run(UNITS, work, tmp_path / "another")
    assert work.done == [*done, *UNITS]


@pytest.mark.parametrize(("result", "expected"), [(FLOATS, FLOATS), ({"pair": (1, 2.5), 3: None},
                                                                     {"pair": [1, 2.5], "3": None})])
def test_a_result_is_the_same_whether_just_done_or_read(tmp_path, result, expected):
    for _ in range(2):
        assert repr(run([0], lambda unit: result, tmp_path)) == repr([expected])


@pytest.mark.parametrize("new", [
    b"", b"{", b"[1]", b"3", b"{}", b'{"unit": 1}', b"\xff\xfe", b"[" * 100_000, {"unit": 2, "result": "2"},
    {"result": "2"}, {"result": math.nan}, {"sha256": None}, os.mkfifo, os.mkdir,
    lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 2 ** 30)])
def test_names_a_file_that_is_no_result(tmp_path, new):
    run([1], Work(), tmp_path)
    path, = tmp_path.iterdir()
    content = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    if callable(new):
        new(path)
    else:
        path.write_bytes(new if isinstance(new, bytes) else json.dumps({**content, **new}).encode())
    message = f"{path} is not a result that this program wrote. Delete it"
    with pytest.raises(ValueError, match=re.escape(message)):
        run([1], Work(), tmp_path)
    path.rename(tmp_path / "away")
    assert run([1], Work(), tmp_path) == ["1"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt("x"), SystemExit("x")])
def test_an_interrupted_run_goes_on_from_what_it_has(tmp_path, error):
    work = Work(error)
    with pytest.raises(type(error), match="x"):
        run(range(5), work, tmp_path)
    assert len(files(tmp_path)) == 3
    assert run(range(5), work, tmp_path) == ["0", "1", "2", "3", "4"]
    assert work.done == [0, 1, 2, 3, 3, 4]


def test_an_interruption_while_writing_leaves_no_file(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail_with(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run([1], str, tmp_path)
    assert files(tmp_path) == []
    with pytest.raises(TypeError, match="not JSON serializable"):
        run([1], lambda unit: object(), tmp_path)
    assert files(tmp_path) == []
    assert run([1], str, tmp_path) == ["1"]


def test_progress_counts_units_done_and_units_read(tmp_path):
    seen = []
    run([1, 2], str, tmp_path)
    run([1, 2, 3], lambda unit: seen.append("work") or unit, tmp_path, progress=seen.append)
    assert seen == [1, 1, "work", 1]


def test_a_lone_process_is_worker_0_of_1(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with workers() as rank:
        assert rank == (0, 1)


# utils.write

def fail_with(error):
    def fail(*paths):
        raise error
    return fail


def test_write_replaces_the_whole_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    for data in (b"first, and longer", "sécond".encode()):
        write(path, data)
        assert path.read_bytes() == data
    monkeypatch.chdir(tmp_path)
    write("bare", b"a name without a folder")
    assert files(tmp_path) == ["bare", "file.txt"]
    (tmp_path / "usual").touch()
    assert (tmp_path / "bare").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write(path, b"old")
    with pytest.raises(TypeError):
        write(path, "a text")
    for error in (OSError("disk full"), KeyboardInterrupt()):
        monkeypatch.setattr("os.replace", fail_with(error))
        with pytest.raises(type(error)):
            write(path, b"new")
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["file.txt"]


# On real processes

N = 60
SCRIPT = '''
import math, os, sys, time
from pathlib import Path
from benchmarks import jobs

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

with jobs.workers() as (rank, processes):
    note("starts", f"{rank} {processes} {on_disk}")
    total = 0.0
    for x in jobs.run(list(range(n)), work, folder / "units"):
        total += x
    sys.stdout.write(f"sum {rank} {processes} {total!r}\\n")        # whole lines, or two processes' get mixed
'''


def value(i):
    return math.sin(i) * 10.0 ** (i % 17 - 8)


def total(indices):
    return reduce(add, map(value, indices), 0.0)


def start(tmp_path, processes, *arguments, restarts=0):
    """Run the script in so many processes of torchrun -> the finished process, {name: lines} of its logs"""
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT, encoding="utf-8")
    out.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(processes), "--max-restarts", str(restarts), str(script), str(out), str(N), *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, encoding="utf-8",
                          timeout=300)
    return done, {path.name: path.read_text().splitlines() for path in out.iterdir() if path.is_file()}


def worked_on(logs):
    return sorted(int(line) for name, lines in logs.items() if name.startswith("log-") for line in lines)


def sums(done):
    return sorted(line for line in done.stdout.splitlines() if line.startswith("sum"))


def expected_sums(processes):
    return [f"sum {rank} {processes} {total(range(N))!r}" for rank in range(processes)]


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_sum_is_the_same_to_the_last_digit_in_any_number_of_processes(tmp_path, processes):
    done, logs = start(tmp_path, processes)
    assert done.returncode == 0, done.stderr
    assert sums(done) == expected_sums(processes)               # every process has every result
    assert worked_on(logs) == list(range(N))                    # each unit once
    assert len(logs) == 1 + processes                           # and every process worked
    assert len(files(tmp_path / "out" / "units")) == N
    if processes > 1:                           # in another order the sum has other last digits
        parts = [total(range(rank, N, processes)) for rank in range(processes)]
        assert reduce(add, parts) != total(range(N))


@pytest.mark.long
def test_after_the_death_of_a_process_the_others_go_on_from_what_is_there(tmp_path):
    done, logs = start(tmp_path, 2, "dies", restarts=1)
    assert done.returncode == 0, done.stderr
    assert sums(done) == expected_sums(2)
    starts = [tuple(map(int, line.split())) for line in logs["starts"]]
    assert sorted(starts[:2]) == [(0, 2, 0), (1, 2, 0)]         # the first start found nothing
    (_, _, kept), (_, _, same) = starts[2:]
    assert kept == same
    assert 5 <= kept < N                        # the second found what both had finished by then
    assert set(worked_on(logs)) == set(range(N))
    # What was on disk was not done again: at most the one that process 0 was ended in was begun twice.
    assert N <= len(worked_on(logs)) <= N + 1
    assert logs["log-1"] == list(map(str, range(1, N, 2)))


@pytest.mark.long
def test_another_number_of_processes_completes_what_a_dead_run_left(tmp_path):
    done, logs = start(tmp_path, 2, "dies")
    assert done.returncode != 0
    assert sums(done) == []
    assert {1, 3, 5, 7, 9} <= set(worked_on(logs))
    assert 11 not in worked_on(logs)            # the one that process 1 died in
    # Process 0 is ended at any moment, even between writing a result and giving it its name.
    on_disk = len(list((tmp_path / "out" / "units").glob("*.json")))
    again = []
    results = run(list(range(N)), lambda i: again.append(i) or value(i), tmp_path / "out" / "units")
    assert reduce(add, results, 0.0) == total(range(N))
    assert len(again) == N - on_disk
    assert not {1, 3, 5, 7, 9} & set(again)
