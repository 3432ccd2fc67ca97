"""What the wheel holds and links to.

The wheel is the file named by DGRAD_WHEEL, else one that pip builds once (PIP_NO_BUILD_ISOLATION
and pip's other variables hold for it as for any pip call).
"""

from __future__ import annotations

import configparser
import email.message
import email.parser
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import dgrad

pytest.importorskip("elftools", reason="needs pyelftools, of the extra 'test'")

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = re.compile(r"lib(stdc\+\+|gcc_s|c|m|pthread|dl|rt)\.so\.\d+|ld-linux-.*\.so\.\d+")


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
