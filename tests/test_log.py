"""The file of JSON lines stays one of lines, and the log follows its variable."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dgrad import config, log
from pretended import problem, selection

INFO = "[dgrad] PyTorch's own conv_transpose2d runs: a reason\n"
DEBUG = "[dgrad] rejected legacy:ALGO_1 (TENSOR_OP_MATH) for a problem: None\n"
Tell = Callable[[str | None], tuple[str, int, int]]


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "selections.jsonl"
    monkeypatch.setenv("DGRAD_LOG_FILE", str(path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA GPU {device}")
    monkeypatch.setattr(log, "_warned", {})
    return path


def _select(source: str = "measured") -> None:
    log.selected(selection(problem(), source), config.policy())


def _sources(lines: list[str]) -> list[Any]:
    return [json.loads(line)["source"] for line in lines]


# --- the file -----------------------------------------------------------------------------------


def test_the_file_is_for_its_user_alone(file: Path) -> None:
    before = os.umask(0o022)
    try:
        _select()
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_record_after_one_that_another_process_left_unfinished_begins_on_a_new_line(
    file: Path,
) -> None:
    file.write_text('{"format":3,"time":"20')
    before = os.listdir("/proc/self/fd")
    _select("measured")
    _select("stored")
    _, *whole = file.read_text().splitlines()
    assert _sources(whole) == ["measured", "stored"]
    assert set(os.listdir("/proc/self/fd")) <= set(before)


def test_what_one_write_leaves_over_the_next_one_writes(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:100]))
    _select("measured")
    _select("stored")
    assert _sources(file.read_text().splitlines()) == ["measured", "stored"]


def test_a_record_after_one_that_was_cut_off_begins_on_a_new_line(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _select("measured")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 50, limits[1]))
    try:
        _select("heuristic")
        _select("heuristic")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    _select("stored")
    first, cut, *rest = file.read_text().splitlines()
    assert 0 < len(cut) <= 50
    assert _sources([first, *rest]) == ["measured", "stored"]
    [warning] = _warnings(caplog)
    assert warning.startswith(f"DGRAD_LOG_FILE {file} cannot be written: ")
    assert os.strerror(errno.EFBIG) in warning


def test_a_file_that_may_be_written_alone_gets_every_record(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(*arguments)

    monkeypatch.setattr(log, "open", refuse, raising=False)
    for _ in range(3):
        _select()
    monkeypatch.undo()
    assert _sources(file.read_text().splitlines()) == ["measured"] * 3


def test_a_pipe_gets_whole_lines(file: Path) -> None:
    os.mkfifo(file)
    reader = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    try:
        _select("measured")
        _select("stored")
        assert _sources(os.read(reader, 1 << 16).decode().splitlines()) == ["measured", "stored"]
    finally:
        os.close(reader)


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_a_pipe_that_nobody_reads_costs_one_warning(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(file)
    _select()
    reader = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    _select("stored")
    assert _sources(os.read(reader, 1 << 16).decode().splitlines()) == ["stored"]
    os.close(reader)  # and its writer is not told of that in another way
    _select()
    (text,) = _warnings(caplog)
    assert text.startswith(f"DGRAD_LOG_FILE {file} cannot be written: ")


def test_a_pipe_whose_reader_goes_costs_one_warning(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(file)
    reader, real = os.open(file, os.O_RDONLY | os.O_NONBLOCK), os.write

    def write(descriptor: int, data: bytes) -> int:
        os.close(reader)
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        _select()
    (text,) = _warnings(caplog)
    assert os.strerror(errno.EPIPE) in text


def test_a_pipe_that_is_full_costs_one_warning(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(file)
    reader = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for _ in range(200):  # it holds 64 KiB
            _select()
    finally:
        os.close(reader)
    (text,) = _warnings(caplog)
    assert os.strerror(errno.EAGAIN) in text


def test_a_record_after_one_of_which_a_pipe_took_a_part_begins_on_a_new_line(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(file)
    reader = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    real, room = os.write, [100]

    def write(descriptor: int, data: bytes) -> int:
        if not room:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return real(descriptor, data[: room.pop()])

    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            for _ in range(3):
                _select()
        _select("stored")
        _select("heuristic")
        cut, *whole = os.read(reader, 1 << 16).decode().splitlines()
    finally:
        os.close(reader)
    assert len(cut) == 100
    assert _sources(whole) == ["stored", "heuristic"]


def test_a_device_that_takes_nothing_costs_one_warning(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DGRAD_LOG_FILE", "/dev/full")
    for _ in range(2):
        _select()
    (text,) = _warnings(caplog)
    assert os.strerror(errno.ENOSPC) in text


# --- DGRAD_LOG ----------------------------------------------------------------------------------


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Tell]:
    """What two records print under a value of the variable, and the level and handlers then."""
    before = logging.getLogger("dgrad").handlers[:]

    def tell(value: str | None) -> tuple[str, int, int]:
        if value is None:
            monkeypatch.delenv("DGRAD_LOG", raising=False)
        else:
            monkeypatch.setenv("DGRAD_LOG", value)
        log._told.clear()
        log.fallback("a reason")
        log.rejected("a problem", selection(problem()).candidate)
        added = len(logging.getLogger("dgrad").handlers) - len(before)
        return capsys.readouterr().err, logging.getLogger("dgrad").level, added

    tell(None)
    yield tell
    tell(None)
    assert logging.getLogger("dgrad").handlers == before


def test_the_variable_may_change_at_any_time(tell: Tell) -> None:
    for _ in range(2):
        assert tell("info") == (INFO, logging.INFO, 1)
        assert tell("debug") == (INFO + DEBUG, logging.DEBUG, 1)
        assert tell("info") == (INFO, logging.INFO, 1)
        assert tell(None) == ("", logging.NOTSET, 0)
    assert tell("loud")[0].splitlines(True)[0].startswith("[dgrad] DGRAD_LOG is 'loud'")
    assert tell("") == ("", logging.NOTSET, 0)


def test_a_level_that_the_program_sets_meanwhile_stays(tell: Tell) -> None:
    logger = logging.getLogger("dgrad")
    try:
        logger.setLevel(logging.ERROR)
        assert tell("debug")[1] == logging.DEBUG
        assert tell(None)[1] == logging.ERROR
        tell("info")
        logger.setLevel(logging.CRITICAL)
        assert tell(None)[1] == logging.CRITICAL
    finally:
        logger.setLevel(logging.NOTSET)


def test_threads_tell_of_one_reason_once(caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Barrier(8)

    def tell_all() -> None:
        gate.wait()
        for number in range(50):
            log.fallback(f"reason{number}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with caplog.at_level(logging.INFO, logger="dgrad"):
            threads = [threading.Thread(target=tell_all) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) == 50


def test_a_reason_with_other_numbers_is_the_same(caplog: pytest.LogCaptureFixture) -> None:
    table = "dgrad has no usable candidate for dgrad %s nchw x=%s w=4x8x3x3 padding=%s\n  eng%d"
    with caplog.at_level(logging.INFO, logger="dgrad"):
        log._told.clear()
        for number in range(1, 40):
            shape = f"{number}x8x{number + 1}x17"
            log.fallback(table % ("float16", shape, f"0,{number}", number))
            log.fallback(table % ("float64", shape, f"{number},0", number))
    first, second = (record.getMessage() for record in caplog.records)
    assert "float16 nchw x=1x8x2x17" in first
    assert "float64 nchw x=1x8x2x17" in second


def test_each_kind_of_warning_is_told_once(caplog: pytest.LogCaptureFixture, file: Path) -> None:
    for number in range(3):
        log.captured(f"problem {number}")
        log.warn_of_first("entry %s is spoiled", number)
    assert _warnings(caplog)[1] == "entry 0 is spoiled; this is told of the first one only"
    assert len(_warnings(caplog)) == 2


FIRST: dict[str, Callable[[], None]] = {
    "selected": lambda: _select(),
    "rejected": lambda: log.rejected("a problem", selection(problem()).candidate),
    "not measured": lambda: log.not_measured("a problem", ValueError("why")),
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_record_of_a_process_follows_the_variable(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert logging.getLogger("dgrad").level == logging.NOTSET
    monkeypatch.setenv("DGRAD_LOG", "debug")
    try:
        FIRST[name]()
        assert capsys.readouterr().err.startswith(f"[dgrad] {name}")
    finally:
        monkeypatch.delenv("DGRAD_LOG")
        log._configure()


def test_each_problem_of_a_capture_is_told_and_the_first_as_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_warned", {})
    caplog.set_level(logging.INFO, "dgrad")
    for number in range(3):
        log.captured(f"problem {number}")
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "INFO"]
    for number, record in enumerate(caplog.records):
        assert f"problem {number}; call dgrad.warm_up(model, *inputs)" in record.getMessage()
