"""Folders and files of the store that cannot be used, or are not the user's own."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dgrad import store
from stored import (
    CANDIDATES,
    HERE,
    MARKS,
    a_fifo,
    a_folder,
    a_link,
    assert_is_a_miss_with_one_warning,
    make_problem,
    numbered,
    refuse,
    written,
)

pytestmark = MARKS


def assert_costs_one_warning(warnings_of_store: Callable[[], list[str]]) -> None:
    for number in range(1, 4):
        store.write(numbered(number), CANDIDATES)
        assert store.read(numbered(number)) is None
    (text,) = warnings_of_store()
    assert str(store.path()) in text


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("call", ["open", "replace", "mkdir"])
def test_a_folder_that_cannot_be_written_costs_one_warning(
    store_root: Path,
    call: str,
    error: int,
    monkeypatch: pytest.MonkeyPatch,
    warnings_of_store: Callable[[], list[str]],
) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, call, error, lambda path: str(path).endswith(".tmp") or call == "mkdir")
        assert_costs_one_warning(warnings_of_store)
    assert [file for file in store_root.rglob("*") if not file.is_dir()] == []


def test_a_full_disk_costs_one_warning_and_leaves_nothing(
    store_root: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_store: Callable[[], list[str]]
) -> None:
    real = os.open

    def open_full(path: Any, flags: int, *arguments: Any) -> int:
        descriptor = real(path, flags, *arguments)
        if flags & os.O_CREAT:
            full = real("/dev/full", os.O_WRONLY)
            os.dup2(full, descriptor)  # every write to it says that no space is left
            os.close(full)
        return descriptor

    monkeypatch.setattr(os, "open", open_full)
    assert_costs_one_warning(warnings_of_store)
    assert "No space left" in warnings_of_store()[0]
    assert [*(store_root / HERE).iterdir()] == []


@pytest.mark.parametrize(
    "path", ["/proc/none", "/sys/none", "/dev/null/none", "/" + "x" * 300, "/proc/self/status"]
)
def test_a_path_where_no_folder_can_be_costs_one_warning(
    path: str, monkeypatch: pytest.MonkeyPatch, warnings_of_store: Callable[[], list[str]]
) -> None:
    monkeypatch.setenv("DGRAD_STORE", path)
    assert_costs_one_warning(warnings_of_store)


def test_a_file_in_place_of_a_folder_costs_one_warning(
    store_root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    store_root.touch()
    assert_costs_one_warning(warnings_of_store)


def test_a_dangling_link_in_place_of_the_folder_costs_one_warning(
    store_root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    store_root.symlink_to(store_root.with_name("nowhere"))
    assert store.read(make_problem()) is None
    assert warnings_of_store() == []
    assert_costs_one_warning(warnings_of_store)


@pytest.mark.parametrize("which", ["store_root", "leaf"])
def test_a_link_to_a_folder_of_the_users_own_is_followed(
    store_root: Path, which: str, warnings_of_store: Callable[[], list[str]]
) -> None:
    written(store_root)
    link = store_root if which == "store_root" else store_root / HERE
    aside = store_root.with_name("aside")
    os.replace(link, aside)
    link.symlink_to(aside)
    assert store.read(make_problem()) == CANDIDATES
    store.write(numbered(1), CANDIDATES)
    assert len(store.list()) == 2
    assert warnings_of_store() == []


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make another user the owner of ``path``; where that is not allowed, say that it is so."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
        return
    inode = path.stat().st_ino

    def pretend(real: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def call(*arguments: Any, **options: Any) -> os.stat_result:
            result = real(*arguments, **options)
            values = [
                12345 if i == 4 and result.st_ino == inode else v for i, v in enumerate(result)
            ]
            return os.stat_result(values)

        return call

    for name in ("stat", "fstat"):
        monkeypatch.setattr(os, name, pretend(getattr(os, name)))


@pytest.mark.parametrize("which", ["store_root", "leaf"])
def test_a_folder_of_another_user_is_refused_with_one_warning(
    store_root: Path,
    which: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings_of_store: Callable[[], list[str]],
) -> None:
    file = written(store_root)
    before = file.read_bytes()
    exported = tmp_path / "export.json"
    store.export(exported)
    give_away(store_root if which == "store_root" else store_root / HERE, monkeypatch)
    for _ in range(2):
        assert store.read(make_problem()) is None
        store.write(make_problem(), CANDIDATES[:2])
        store.write(numbered(1), CANDIDATES)
    commands = (store.list, store.spoiled, store.forget, partial(store.export, exported))
    for command in (*commands, partial(store.load, exported)):
        with pytest.raises(PermissionError, match="belongs to user 12345"):
            command()
    assert [*(store_root / HERE).iterdir()] == [file]
    assert file.read_bytes() == before
    assert len(warnings_of_store()) == 1
    assert "belongs to user 12345" in warnings_of_store()[0]


@pytest.mark.parametrize("which", ["store_root", "leaf"])
def test_a_link_to_a_folder_of_another_user_is_refused_with_one_warning(
    store_root: Path,
    which: str,
    monkeypatch: pytest.MonkeyPatch,
    warnings_of_store: Callable[[], list[str]],
) -> None:
    written(store_root)
    link = store_root if which == "store_root" else store_root / HERE
    aside = store_root.with_name("aside")
    os.replace(link, aside)
    give_away(aside, monkeypatch)
    link.symlink_to(aside)
    assert store.read(make_problem()) is None
    store.write(numbered(1), CANDIDATES)
    with pytest.raises(PermissionError, match="belongs to user 12345"):
        store.list()
    (text,) = warnings_of_store()
    assert "belongs to user 12345" in text


def test_a_new_folder_is_not_made_in_the_root_of_another_user(
    store_root: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_store: Callable[[], list[str]]
) -> None:
    store_root.mkdir()
    give_away(store_root, monkeypatch)
    store.write(make_problem(), CANDIDATES)
    assert [*store_root.iterdir()] == []
    assert len(warnings_of_store()) == 1


def test_a_file_of_another_user_is_a_miss(
    store_root: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_store: Callable[[], list[str]]
) -> None:
    give_away(written(store_root), monkeypatch)
    assert "12345" in assert_is_a_miss_with_one_warning(warnings_of_store)


def a_dangling_link(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))


def a_link_to_a_device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [a_link, a_dangling_link, a_fifo, a_folder, a_link_to_a_device])
def test_what_is_not_a_regular_file_is_a_miss(
    store_root: Path, make: Callable[[Path], None], warnings_of_store: Callable[[], list[str]]
) -> None:
    make(written(store_root))
    text = assert_is_a_miss_with_one_warning(warnings_of_store)
    assert ("symbolic links" if "link" in make.__name__ else "not a regular file") in text
    assert store.list() == []


def test_a_file_that_cannot_be_opened_is_a_miss(
    store_root: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_store: Callable[[], list[str]]
) -> None:
    file = written(store_root)
    refuse(monkeypatch, "open", errno.EACCES, lambda path: path == file)
    assert_is_a_miss_with_one_warning(warnings_of_store)


def test_a_file_replaced_by_another_nfs_client_is_a_silent_miss(
    store_root: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_store: Callable[[], list[str]]
) -> None:
    file = written(store_root)
    refuse(monkeypatch, "open", errno.ESTALE, lambda path: path == file)
    assert store.read(make_problem()) is None
    assert warnings_of_store() == []


def test_files_that_go_meanwhile_keep_no_others(
    store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(store_root).parent
    left = [folder / f".{'0' * 31}{i}.json.{'0' * 16}.tmp" for i in range(3)]
    for file in left:
        file.touch()
        os.utime(file, (0, 0))
    real = os.lstat

    def vanishing(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if Path(path) == left[0]:
            raise FileNotFoundError(path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "lstat", vanishing)
    store._sweep(folder)
    monkeypatch.undo()
    assert [file.exists() for file in left] == [True, False, False]
