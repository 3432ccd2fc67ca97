"""What the wheel holds and links to, and how cmake/FindCUDNN.cmake searches.

The wheel is the file named by DGRAD_WHEEL, else one that pip builds once (PIP_NO_BUILD_ISOLATION
and pip's other variables hold for it as for any pip call).
"""

from __future__ import annotations

import configparser
import email.message
import email.parser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

import dgrad

pytest.importorskip("elftools", reason="needs pyelftools, of the extra 'test'")

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = re.compile(r"lib(stdc\+\+|gcc_s|c|m|pthread|dl|rt)\.so\.\d+|ld-linux-.*\.so\.\d+")


# --- the wheel ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("DGRAD_WHEEL"):
        return Path(given)
    dist = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-w", str(dist)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(build)} failed:\n{done.stdout}\n{done.stderr}"
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def content(wheel: Path) -> Mapping[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}


@pytest.fixture(scope="session")
def metadata(content: Mapping[str, bytes]) -> email.message.Message:
    (text,) = (data for name, data in content.items() if name.endswith(".dist-info/METADATA"))
    return email.parser.BytesParser().parsebytes(text)


@pytest.fixture
def dynamic(content: Mapping[str, bytes], tmp_path: Path) -> Iterable[DynamicSection]:
    (data,) = (data for name, data in content.items() if name.endswith(".so"))
    module = tmp_path / "_core.so"
    module.write_bytes(data)
    with module.open("rb") as file:
        yield ELFFile(file).get_section_by_name(".dynamic")


def test_the_module_needs_cudnn_and_the_c_and_cpp_runtime_only(dynamic: DynamicSection) -> None:
    needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
    assert {name for name in needed if not RUNTIME.fullmatch(name)} == {"libcudnn.so.9"}


def test_the_module_looks_for_cudnn_beside_itself_and_nowhere_on_the_build_machine(
    dynamic: DynamicSection,
) -> None:
    assert [tag.runpath for tag in dynamic.iter_tags("DT_RUNPATH")] == [
        "$ORIGIN/../nvidia/cudnn/lib"
    ]
    assert not list(dynamic.iter_tags("DT_RPATH"))  # would be stronger than LD_LIBRARY_PATH


def test_the_module_shows_no_symbol_but_its_entry(
    content: Mapping[str, bytes], tmp_path: Path
) -> None:
    (data,) = (data for name, data in content.items() if name.endswith(".so"))
    module = tmp_path / "_core.so"
    module.write_bytes(data)
    with module.open("rb") as file:
        symbols = ELFFile(file).get_section_by_name(".dynsym").iter_symbols()
        ours = {s.name for s in symbols if s["st_shndx"] != "SHN_UNDEF" and "dgrad" in s.name}
    assert ours == set()


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 3e6


def test_the_wheel_holds_the_package_and_nothing_else(content: Mapping[str, bytes]) -> None:
    package = ROOT / "python" / "dgrad"
    python = {
        f"dgrad/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.suffix in {".py", ".pyi", ".json"} or path.name == "py.typed"
    }
    assert {"dgrad/__init__.py", "dgrad/_core.pyi", "dgrad/py.typed"} <= python
    (module,) = (name for name in content if name.startswith("dgrad/_core.") and ".so" in name)
    info = f"dgrad-{dgrad.__version__}.dist-info"
    assert set(content) == python | {module} | {
        f"{info}/{name}"
        for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }


def test_the_wheel_tells_its_name_version_license_and_needs(
    metadata: email.message.Message,
) -> None:
    assert metadata["Name"] == "dgrad"
    assert metadata["Version"] == dgrad.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["License-File"] == "LICENSE"
    needs = metadata.get_all("Requires-Dist", [])
    assert {need for need in needs if "extra ==" not in need} == {"torch>=2.4", "rich"}
    assert set(metadata.get_all("Provides-Extra", [])) == {"cudnn", "plot", "test", "dev"}


def test_the_wheel_installs_the_dgrad_command(content: Mapping[str, bytes]) -> None:
    (text,) = (data for name, data in content.items() if name.endswith("/entry_points.txt"))
    commands = configparser.ConfigParser()
    commands.read_string(text.decode())
    assert dict(commands["console_scripts"]) == {"dgrad": "dgrad.cli:main"}


# --- FindCUDNN ------------------------------------------------------------------------------------

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


def between_begin_and_end(text: str) -> str:
    return text.split("-- begin\n")[1].split("-- end\n")[0]


def test_a_quiet_search_that_finds_nothing_says_nothing(find: Find, tmp_path: Path) -> None:
    done = find("QUIET", CUDNN_ROOT=tmp_path / "empty")
    assert done.returncode == 0
    assert between_begin_and_end(done.stdout) == ""
    assert done.stderr == ""
    assert "found=FALSE" in done.stdout
    assert "-- target" not in done.stdout


def test_a_required_search_that_finds_nothing_says_where_it_looked(
    find: Find, tmp_path: Path
) -> None:
    done = find("REQUIRED", CUDNN_ROOT=tmp_path / "empty")
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "Could NOT find CUDNN" in message
    assert f"{tmp_path / 'empty'}: no cudnn.h" in message


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


def refusals(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    assert "Could NOT find CUDNN" in done.stderr
    return " ".join(done.stderr.split())


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
