"""How cmake/FindCUDNN.cmake searches, and what it refuses: in a project of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Variables by which a machine may point to a cuDNN or CUDA of its own.
POINTERS = ("CUDNN_ROOT", "CUDAToolkit_ROOT", "CUDA_HOME", "CUDA_PATH", "CMAKE_PREFIX_PATH")

Find = Callable[..., subprocess.CompletedProcess[str]]


def write_cudnn(folder: Path, version: str) -> Path:
    include, lib = folder / "include", folder / "lib"
    include.mkdir(parents=True)
    lib.mkdir()
    (include / "cudnn.h").touch()
    names = zip(("MAJOR", "MINOR", "PATCHLEVEL"), version.split("."), strict=True)
    (include / "cudnn_version.h").write_text(
        "".join(f"#define CUDNN_{name} {number}\n" for name, number in names)
    )
    (lib / "libcudnn.so.9").touch()
    return folder


def write_cuda(folder: Path, crt: Path | None = None) -> Path:
    headers = folder / "include/cuda_runtime_api.h", (crt or folder) / "include/crt/host_defines.h"
    for header in headers:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.touch()
    return folder


@pytest.fixture
def find(tmp_path: Path) -> Find:
    """find(arguments, environment, **variables): configures a project that finds CUDNN."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")

    def find(
        arguments: str, environment: Mapping[str, object] | None = None, **variables: object
    ) -> subprocess.CompletedProcess[str]:
        source = tmp_path / "project"
        source.mkdir(exist_ok=True)
        (source / "CMakeLists.txt").write_text(
            "cmake_minimum_required(VERSION 3.18)\n"
            "project(user LANGUAGES NONE)\n"
            f'list(APPEND CMAKE_MODULE_PATH "{(ROOT / "cmake").as_posix()}")\n'
            "message(STATUS begin)\n"
            f"find_package(CUDNN {arguments})\n"
            "message(STATUS end)\n"
            'message(STATUS "found=${CUDNN_FOUND} version=${CUDNN_VERSION}")\n'
            'message(STATUS "library=${CUDNN_LIBRARY} include=${CUDNN_INCLUDE_DIRS}")\n'
            "if(TARGET CUDNN::cudnn)\n  message(STATUS target)\nendif()\n"
        )
        variables = {"Python_EXECUTABLE": sys.executable} | variables
        clean = {name: value for name, value in os.environ.items() if name not in POINTERS}
        return subprocess.run(
            [cmake, "-S", source, "-B", tmp_path / "build"]
            + [f"-D{name}={value}" for name, value in variables.items()],
            env=clean | {name: str(value) for name, value in (environment or {}).items()},
            capture_output=True,
            text=True,
        )

    return find


def refusals(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    assert "Could NOT find CUDNN" in done.stderr
    return " ".join(done.stderr.split())


def between_begin_and_end(text: str) -> str:
    return text.split("-- begin\n")[1].split("-- end\n")[0]


def test_a_quiet_search_that_finds_nothing_says_nothing(find: Find, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for root in "empty", "nowhere":
        assert_found_nothing_quietly(find("QUIET", CUDNN_ROOT=tmp_path / root))


def assert_found_nothing_quietly(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0
    assert between_begin_and_end(done.stdout) == ""
    assert done.stderr == ""
    assert "found=FALSE" in done.stdout
    assert "-- target" not in done.stdout


def test_a_required_search_that_finds_nothing_says_where_it_looked(
    find: Find, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    done = find("REQUIRED", CUDNN_ROOT=tmp_path / "empty")
    assert f"{tmp_path / 'empty'}: no cudnn.h" in refusals(done)


def test_a_search_without_wheels_names_every_place_and_the_wheel(
    find: Find, tmp_path: Path
) -> None:
    done = find("99 REQUIRED", Python_EXECUTABLE="/bin/false", CUDA_HOME=tmp_path / "toolkit")
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "wheel nvidia-cudnn: not installed" in message
    assert f"{tmp_path / 'toolkit'}: no cudnn.h" in message
    assert "/usr/local/cuda: " in message
    assert "the system: " in message


def test_cudnn_root_wins_over_the_wheels_as_variable_and_as_environment(
    find: Find, tmp_path: Path
) -> None:
    root = write_cudnn(tmp_path / "cudnn", "9.77.1")
    cuda = write_cuda(tmp_path / "cuda")
    for done in (
        find("9.0 REQUIRED", CUDNN_ROOT=root, CUDAToolkit_ROOT=cuda),
        find("9.0 REQUIRED", {"CUDNN_ROOT": root, "CUDA_HOME": cuda}),
    ):
        assert done.returncode == 0, done.stderr
        assert "version=9.77.1" in done.stdout
        library = root / "lib/libcudnn.so.9"
        assert f"library={library} include={root}/include;{cuda}/include" in done.stdout
        assert "-- target" in done.stdout


def test_the_soname_is_preferred_to_the_development_link(find: Find, tmp_path: Path) -> None:
    root = write_cudnn(tmp_path / "cudnn", "9.12.0")
    (root / "lib/libcudnn.so").touch()
    done = find("REQUIRED", CUDNN_ROOT=root, CUDAToolkit_ROOT=write_cuda(tmp_path / "cuda"))
    assert f"library={root}/lib/libcudnn.so.9 " in done.stdout


def test_an_older_cudnn_than_asked_for_is_refused_by_its_version(
    find: Find, tmp_path: Path
) -> None:
    done = find("9.12 REQUIRED", CUDNN_ROOT=write_cudnn(tmp_path / "cudnn", "9.11.1"))
    assert done.returncode != 0
    assert 'version "9.11.1" is older than 9.12' in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("version", "arguments"), [("10.1.0", "9.0 REQUIRED"), ("90.0.0", "REQUIRED")]
)
def test_a_cudnn_of_a_later_major_version_is_refused(
    find: Find, tmp_path: Path, version: str, arguments: str
) -> None:
    root, cuda = write_cudnn(tmp_path / "cudnn", version), write_cuda(tmp_path / "cuda")
    (root / "lib/libcudnn.so.9").rename(root / "lib/libcudnn.so")
    words = f'version "{version}", and dgrad needs libcudnn.so.9'
    done = find(arguments, CUDNN_ROOT=root, CUDAToolkit_ROOT=cuda)
    assert f"{root}: {words}" in refusals(done)
    given = {"CUDNN_LIBRARY": root / "lib/libcudnn.so", "CUDNN_INCLUDE_DIR": root / "include"}
    assert f"{root / 'include'}: {words}" in refusals(find(arguments, **given))


def test_an_earlier_major_version_is_refused_without_a_wanted_one_too(
    find: Find, tmp_path: Path
) -> None:
    root = write_cudnn(tmp_path / "cudnn", "8.9.7")
    words = f'{root}: version "8.9.7", and dgrad needs libcudnn.so.9'
    assert words in refusals(find("REQUIRED", CUDNN_ROOT=root))


def test_a_place_with_another_major_version_is_passed_over(find: Find, tmp_path: Path) -> None:
    write_cudnn(tmp_path / "toolkit", "10.0.0")
    root = write_cudnn(tmp_path / "cuda", "9.77.0")
    cuda = write_cuda(tmp_path / "cuda")
    done = find("REQUIRED", CUDAToolkit_ROOT=tmp_path / "toolkit", CUDA_HOME=cuda)
    assert done.returncode == 0, done.stderr
    assert f"version=9.77.0\n-- library={root}/lib/libcudnn.so.9 " in done.stdout


def test_what_replaces_the_search_is_taken(find: Find, tmp_path: Path) -> None:
    root, cuda = write_cudnn(tmp_path / "cudnn", "9.77.0"), write_cuda(tmp_path / "cuda")
    given = {"CUDNN_LIBRARY": root / "lib/libcudnn.so.9", "CUDNN_INCLUDE_DIR": root / "include"}
    done = find("9.0 REQUIRED", CUDAToolkit_ROOT=cuda, **given)
    assert done.returncode == 0, done.stderr
    assert f"version=9.77.0\n-- library={root}/lib/libcudnn.so.9 " in done.stdout


def test_relative_files_are_those_of_the_source_folder(find: Find, tmp_path: Path) -> None:
    write_cudnn(tmp_path / "project/cudnn", "9.77.0")
    cuda = write_cuda(tmp_path / "cuda")
    given = {"CUDNN_LIBRARY": "cudnn/lib/libcudnn.so.9", "CUDNN_INCLUDE_DIR": "cudnn/include"}
    done = find("9.0 REQUIRED", CUDAToolkit_ROOT=cuda, **given)
    assert done.returncode == 0, done.stderr
    root = tmp_path / "project/cudnn"
    assert f"library={root}/lib/libcudnn.so.9 include={root}/include;" in done.stdout


@pytest.mark.parametrize(
    ("runtime", "crt"),
    [("cu13", "cu13"), ("cuda_runtime", "cuda_nvcc")],
    ids=["CUDA 13", "CUDA 12"],
)
def test_the_wheels_are_found_through_the_interpreter_in_either_layout(
    find: Find, tmp_path: Path, runtime: str, crt: str
) -> None:
    nvidia = tmp_path / "site" / "nvidia"
    write_cudnn(nvidia / "cudnn", "9.77.0")
    write_cuda(nvidia / runtime, nvidia / crt)
    # -S leaves site-packages out: this interpreter sees these wheels and no others.
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}/site" exec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    done = find("REQUIRED", Python_EXECUTABLE=bare)
    assert done.returncode == 0, done.stderr
    includes = ";".join(dict.fromkeys(f"{nvidia / name}/include" for name in (runtime, crt)))
    assert f"include={nvidia}/cudnn/include;{includes}" in done.stdout


@pytest.mark.parametrize("name", ["CUDNN_ROOT", "CUDNN_LIBRARY", "CUDNN_INCLUDE_DIR"])
def test_a_path_that_does_not_exist_is_refused_though_there_is_another_cudnn(
    find: Find, tmp_path: Path, name: str
) -> None:
    root, cuda = write_cudnn(tmp_path / "cudnn", "9.77.0"), write_cuda(tmp_path / "cuda")
    given = {"CUDNN_LIBRARY": root / "lib/libcudnn.so.9", "CUDNN_INCLUDE_DIR": root / "include"}
    missing = tmp_path / "nowhere"
    # beside a whole one in each place that is searched, and in what replaces the search
    for others in (given, {"CUDAToolkit_ROOT": write_cuda(root)}):
        done = find("9.0 REQUIRED", **{"CUDAToolkit_ROOT": cuda, **others, name: missing})
        assert f"{name} {missing}: " in refusals(done)
    quiet = find("9.0 QUIET", **{"CUDAToolkit_ROOT": cuda, **given, name: missing})
    assert_found_nothing_quietly(quiet)


def test_a_folder_of_the_environment_that_does_not_exist_is_refused_too(
    find: Find, tmp_path: Path
) -> None:
    root = write_cuda(write_cudnn(tmp_path / "cudnn", "9.77.0"))
    missing = tmp_path / "nowhere"
    pointers = {"CUDNN_ROOT": missing, "CUDA_HOME": root}
    assert f"CUDNN_ROOT {missing}: no such folder" in refusals(find("9.0 REQUIRED", pointers))
    pointers["CUDNN_ROOT"] = f"{root}:{missing}"
    assert f"CUDNN_ROOT {missing}: no such folder" in refusals(find("9.0 REQUIRED", pointers))
    done = find("9.0 REQUIRED", pointers, CUDNN_ROOT=root)  # stronger, so that is not read
    assert done.returncode == 0, done.stderr
    off = find("9.0 REQUIRED", {"CUDNN_ROOT": root, "CUDA_HOME": root}, CUDNN_ROOT="OFF")
    assert "OFF: no such folder" in refusals(off)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"CUDNN_LIBRARY": "lib/libcudnn.so.9"}, "libcudnn.so.9: give CUDNN_INCLUDE_DIR too"),
        ({"CUDNN_INCLUDE_DIR": "include"}, "include: give CUDNN_LIBRARY too"),
        ({"CUDNN_LIBRARY": "lib", "CUDNN_INCLUDE_DIR": "include"}, "/lib: is a folder"),
        (
            {"CUDNN_LIBRARY": "lib/libcudnn.so.9", "CUDNN_INCLUDE_DIR": "lib"},
            "CUDNN_INCLUDE_DIR {root}/lib: no cudnn.h",
        ),
    ],
)
def test_half_of_what_replaces_the_search_is_refused(
    find: Find, tmp_path: Path, given: dict[str, str], words: str
) -> None:
    root = write_cuda(write_cudnn(tmp_path / "cudnn", "9.77.0"))
    paths = {name: root / path for name, path in given.items()}
    assert words.format(root=root) in refusals(find("REQUIRED", CUDAToolkit_ROOT=root, **paths))


@pytest.mark.parametrize(
    ("known", "asked", "words"),
    [
        ("9", "", None),
        ("9", "9.0", None),
        ("9.12", "9.12", None),
        ("9", "9 EXACT", None),
        ("9.12.0", "9.12.0 EXACT", None),
        ("9", "9.12", 'its headers say version "9" and no more, and 9.12 is asked for'),
        ("9.12", "9.12.1", 'its headers say version "9.12" and no more, and 9.12.1 is asked for'),
        ("9", "9.0 EXACT", 'its headers say version "9" and no more, and 9.0 is asked for'),
        ("9.11", "9.12", 'version "9.11" is older than 9.12'),
        ("10", "9.0", 'version "10", and dgrad needs libcudnn.so.9'),
        ("8", "", 'version "8", and dgrad needs libcudnn.so.9'),
        ("", "9.0", "its headers do not say which version they are"),
        ("", "", "its headers do not say which version they are"),
    ],
)
def test_a_version_is_as_exact_as_its_headers_say(
    find: Find, tmp_path: Path, known: str, asked: str, words: str | None
) -> None:
    root = write_cuda(write_cudnn(tmp_path / "cudnn", "9.77.0"))
    names = ("MAJOR", "MINOR", "PATCHLEVEL")
    (root / "include/cudnn_version.h").write_text(
        "".join(f"#define CUDNN_{n}  {v}\n" for n, v in zip(names, known.split("."), strict=False))
    )
    done = find(f"{asked} REQUIRED", CUDNN_ROOT=root)
    if words is None:
        assert done.returncode == 0, done.stderr
        assert f"version={known}\n" in done.stdout
    else:
        assert f"{root}: {words}" in refusals(done)


def test_an_early_version_is_read_from_cudnn_h_itself(find: Find, tmp_path: Path) -> None:
    root = write_cudnn(tmp_path / "cudnn", "7.6.5")
    (root / "include/cudnn_version.h").rename(root / "include/cudnn.h")
    words = 'version "7.6.5", and dgrad needs libcudnn.so.9'
    assert words in refusals(find("REQUIRED", CUDNN_ROOT=root))
