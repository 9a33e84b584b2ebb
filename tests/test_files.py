"""Files that are replaced whole, by many writers, also by killed ones; locks that end with their process."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from fused_resnet import files
from fused_resnet.files import Locked, locked, replace_file, with_section

FORK = multiprocessing.get_context("fork")


def started(function, *args):
    """`function(*args)` in a process of its own."""
    process = FORK.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def wait_for(condition) -> None:
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.002)


def write_many(path: Path, byte: int) -> None:
    for _ in range(50):
        replace_file(path, lambda file: [file.write(bytes([byte])) for _ in range(1000)])


def test_readers_beside_many_writers_see_whole_files(tmp_path):
    path = tmp_path / "table.json"
    write_many(path, 0)
    writers = [started(write_many, path, byte) for byte in range(1, 5)]
    reads = 0
    while any(writer.is_alive() for writer in writers):
        content = path.read_bytes()
        assert len(content) == 1000 and len(set(content)) == 1
        reads += 1
    assert reads > 0 and all(writer.exitcode == 0 for writer in writers)
    assert list(tmp_path.iterdir()) == [path]


def write_for_ever(path: Path) -> None:
    def write(file):
        file.write(b"half")
        file.flush()
        time.sleep(60)

    replace_file(path, write)


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_stays(tmp_path):
    path = tmp_path / "file"
    (tmp_path / "file.part").write_bytes(b"of an older release")
    killed, living = started(write_for_ever, path), started(write_for_ever, path)
    wait_for(lambda: len([p for p in tmp_path.glob("file.?*.part") if p.read_bytes() == b"half"]) == 2)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    replace_file(path, lambda file: file.write(b"whole"))
    assert path.read_bytes() == b"whole"
    assert len(list(tmp_path.iterdir())) == 2, "the file, and the living writer's part"
    living.kill()
    living.join()
    replace_file(path, lambda file: file.write(b"again"))
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    """Else a machine that loses power has a name with nothing behind it, and no older file."""
    path, done = tmp_path / "file", []

    def fsync(descriptor):
        done.append(("fsync", os.pread(descriptor, 100, 0)))

    def replace(source, target, real=os.replace):
        done.append(("replace", Path(source).read_bytes()))
        real(source, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    replace_file(path, lambda file: file.write(b"content"))
    assert done == [("fsync", b"content"), ("replace", b"content")]
    assert path.read_bytes() == b"content"


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def half(file):
        file.write(b"ne")
        raise ValueError("it rains")

    with pytest.raises(ValueError, match="it rains"):
        replace_file(path, half)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_name_with_a_pattern_in_it_is_a_name(tmp_path):
    (tmp_path / "ab.part").write_bytes(b"somebody's")
    replace_file(tmp_path / "[a]*", lambda file: file.write(b"x"))
    assert {p.name for p in tmp_path.iterdir()} == {"[a]*", "ab.part"}


# ---- locks -----------------------------------------------------------------------------------------------------------


def hold_for_ever(path: Path) -> None:
    with locked(path):
        time.sleep(60)


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    path = tmp_path / "lock"
    holder = started(hold_for_ever, path)
    wait_for(lambda: path.exists() and path.read_text().strip())
    with pytest.raises(Locked, match=rf"lock: process {holder.pid} holds this lock"), locked(path, wait=False):
        pass
    holder.kill()
    holder.join()
    assert path.exists(), "what a killed process leaves"
    with locked(path, wait=False):
        assert path.read_text().strip() == str(os.getpid())
    assert not path.exists()


def test_a_number_in_a_lock_file_is_no_lock(tmp_path):
    """Of a killed process, whose number another process has now."""
    path = tmp_path / "lock"
    path.write_text(f"{os.getppid()}\n")
    with locked(path, wait=False):
        assert path.read_text() == f"{os.getpid()}\n"


def test_one_thread_at_a_time(tmp_path):
    """Also while the file is removed and made again: a counter that each reads, changes and writes loses nothing."""
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count():
        for _ in range(100):
            with locked(tmp_path / "lock"):
                counter.write_text(str(int(counter.read_text()) + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "400" and list(tmp_path.iterdir()) == [counter]


def test_where_the_file_can_not_be_made(tmp_path):
    with pytest.raises(OSError, match="No such file or directory"), locked(tmp_path / "absent" / "lock"):
        pass


def test_a_section_of_a_page_is_replaced():
    page = "a\n<!-- made by: b -->\nold\n<!-- end -->\nc\n<!-- made by: d -->\n\n<!-- end -->\n"
    assert with_section(page, "b", "new\nlines") == page.replace("old", "new\nlines")
    assert with_section(page, "d", "x") == page.replace("d -->\n\n", "d -->\nx\n")
    for damaged, command in ((page, "e"), (page.replace("<!-- end -->", ""), "b")):
        with pytest.raises(ValueError, match=f"expected the lines '<!-- made by: {command} -->' and"):
            with_section(damaged, command, "x")
