"""A file that cannot be written keeps its content; an error about an argument says what is possible."""

import os
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import UNTRACED

from ministeer.utils import (
    batches,
    check_list,
    check_number,
    check_target,
    check_texts,
    check_whole,
    printable,
    sweep,
    write,
)

WRITE = "import sys; from ministeer.utils import write\n" \
        "for _ in range(50): write(sys.argv[1], sys.argv[2].encode() * 50_000)"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [
    "file", "x" * 255, os.fsdecode(b"caf\xe9"), "a\nb\x1b[31m", "link", "dangling",
])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_file_is_replaced_and_a_link_stays(folder, name, before):
    os.symlink("file", "link")
    os.symlink("nothing", "dangling")
    if before:
        Path(name).write_bytes(before)
        os.chmod(name, 0o640)
    write(name, b"new")
    assert Path(name).read_bytes() == b"new"
    written = {"link": "file", "dangling": "nothing"}.get(name, name)
    assert set(os.listdir()) == {"link", "dangling", written}
    assert os.path.islink("link") and os.path.islink("dangling")
    assert not before or Path(name).stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("path, message", [
    ("", "existing folder"), (".", "existing folder"), ("nowhere/file", "existing folder"),
    ("file/below", "existing folder"), ("fifo", "a pipe"), ("link", "a pipe"), (os.devnull, "a device"),
    ("read-only", "it is read-only"), ("a\0b", "null"),
])
def test_what_is_no_writable_file_is_refused_and_stays(folder, path, message):
    os.mkfifo("fifo")
    os.symlink("fifo", "link")
    Path("file").touch()
    Path("read-only").touch(0o444)
    before = {name: os.lstat(name) for name in [*os.listdir(), os.devnull]}
    for refuse in (check_target, lambda path: write(path, b"new")):
        with pytest.raises(ValueError, match=message):
            refuse(path)
    assert [(os.lstat(name).st_mode, os.lstat(name).st_ino) for name in before] == \
        [(old.st_mode, old.st_ino) for old in before.values()]
    assert {*os.listdir(), os.devnull} == set(before)


def test_a_read_only_folder_is_refused(folder, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)        # root may write anywhere
    with pytest.raises(ValueError, match="its folder is read-only"):
        check_target("file")


def test_a_full_disk_keeps_the_old_file_and_is_named(folder):
    Path("file").write_bytes(b"old")
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)\n" + WRITE
    done = subprocess.run([sys.executable, "-c", code, "file", "xxx"], stderr=subprocess.PIPE, env=UNTRACED)
    assert done.stderr.endswith(b"File too large: 'file'\n")
    assert os.listdir() == ["file"] and Path("file").read_bytes() == b"old"


def test_threads_and_processes_that_write_one_file_do_not_meet(folder):
    faults = []

    def work(letter):
        for _ in range(50):
            try:
                write("file", letter * 50_000)
            except Exception as error:
                faults.append(error)
    threads = [threading.Thread(target=work, args=(letter,)) for letter in (b"a", b"b", b"c", b"d")]
    argv = [sys.executable, "-c", WRITE, "file"]
    children = [subprocess.Popen([*argv, letter], env=UNTRACED) for letter in ("e", "f")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [child.wait(60) for child in children] == [0, 0]
    assert faults == []
    content = Path("file").read_bytes()
    assert len(content) == 50_000 and len(set(content)) == 1
    assert os.listdir() == ["file"]


def test_part_files_are_swept_once_they_are_a_day_old(folder):
    for name, hours in ((".ministeer-0.part", 25), (".ministeer-1.part", 23), ("other.part", 99)):
        Path(name).touch()
        os.utime(name, (0, Path(name).stat().st_mtime - 3600 * hours))
    os.mkdir(".ministeer-folder.part")
    os.utime(".ministeer-folder.part", (0, 0))
    sweep.cache_clear()
    write("file", b"new")
    assert sorted(os.listdir()) == [".ministeer-1.part", ".ministeer-folder.part", "file", "other.part"]


@pytest.mark.parametrize("value", [
    float("nan"), float("inf"), np.float32("inf"), 10**400, True, None, "1", b"1", 1j, [1.0], {}, "x" * 10**6,
])
def test_what_is_no_number_is_refused_on_less_than_a_line(value):
    for check, wanted in ((check_number, "a finite number"), (check_whole, "a whole number, 0 or more")):
        if not (check is check_whole and type(value) is int):
            with pytest.raises(ValueError, match=f"x must be {wanted}; given: ") as info:
                check("x", value)
            assert len(str(info.value)) < 100


def test_numbers_come_back_as_python_has_them():
    assert check_whole("x", 10**400) == 10**400
    for check, value, wanted in ((check_whole, np.int8(100), 100), (check_number, Fraction(1, 4), 0.25),
                                 (check_number, np.float32(0.5), 0.5)):
        assert check("x", value) == wanted and type(check("x", value)) is type(wanted)
    for check, value, message in ((check_whole, -1, "x must be a whole number, from 0 to 3"),
                                  (check_whole, 4, "from 0 to 3; given: 4"),
                                  (check_number, 3.5, "x must be a number from 0 to 3; given: 3.5")):
        with pytest.raises(ValueError, match=message):
            check("x", value, 0, 3)


@pytest.mark.parametrize("value", [None, 5, b"a", b"", [1], ["a", b"b"], [["a"]], np.array(3)])
def test_what_is_no_list_of_texts_is_refused(value):
    for or_one, wanted in ((True, "a text or a list of texts"), (False, "a list of texts")):
        with pytest.raises(ValueError, match=f"x must be {wanted}; given: "):
            check_texts("x", value, or_one)


def test_lists_of_texts_come_back_as_lists():
    assert check_texts("x", ("a", "b")) == check_texts("x", iter("ab")) == ["a", "b"]
    assert check_texts("x", "ab", or_one=True) == ["ab"]
    for check in (check_texts, check_list):
        with pytest.raises(ValueError, match="x must be a list"):
            check("x", "ab")


@pytest.mark.parametrize("most", [0, -1, 1.5, "8", None])
def test_batches_need_a_whole_number_of_tokens(most):
    with pytest.raises(ValueError, match="max_batch_tokens must be a whole number, 1 or more"):
        list(batches([3, 2], most))


def test_only_line_ends_pass_among_control_characters():
    assert printable("a\x1b[31m\x07\x9b\u202e\udcff\r\tb\nc é 你") == "a·[31m······b\nc é 你"
