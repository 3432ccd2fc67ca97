"""What there is without a cuDNN that can be used: the reason, in words."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dgrad
from dgrad import _loader
from dgrad.cli import main
from fallbacks import W, X, run_python

pytestmark = pytest.mark.usefixtures("nothing_said_yet")


def forget_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loader look again, whenever it is asked."""
    for name in ("_imported", "load"):
        monkeypatch.setattr(_loader, name, getattr(_loader, name).__wrapped__)


@pytest.fixture
def loaded_as(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the loader says where importing the native module does `imported`."""

    def load(imported: Any, mapped: list[str] | None = None) -> tuple[Any, str | None]:
        def import_module(name: str, *rest: Any) -> Any:
            if name != "dgrad._core":
                return importlib.__import__(name, *rest)
            if isinstance(imported, Exception):
                raise imported
            return imported

        monkeypatch.setattr(_loader.importlib, "import_module", import_module)
        monkeypatch.setattr(_loader, "_wheel_library", lambda: None)
        monkeypatch.setattr(_loader, "_mapped_libraries", lambda: mapped or [])
        forget_what_is_loaded(monkeypatch)
        return _loader.load()

    return load


def test_without_cudnn_the_reason_says_how_to_get_it(loaded_as: Any) -> None:
    core, reason = loaded_as(
        ImportError("libcudnn.so.9: cannot open shared object file: No such file or directory")
    )
    assert core is None
    assert "libcudnn.so.9 was not found" in reason
    assert "pip install nvidia-cudnn-cu13" in reason


def test_without_the_native_module_the_reason_says_how_to_build_it(loaded_as: Any) -> None:
    core, reason = loaded_as(ModuleNotFoundError("No module named 'dgrad._core'"))
    assert core is None
    assert "dgrad._core is not built" in reason
    assert "pip install" in reason


def test_another_import_error_is_passed_on_in_words(loaded_as: Any) -> None:
    core, reason = loaded_as(ImportError("undefined symbol: _ZN5boost"))
    assert core is None
    assert reason == "the native module could not be loaded: undefined symbol: _ZN5boost"


@pytest.mark.parametrize(
    ("version", "text"),
    [(8907, "8.9.7"), (90000, "9.0.0"), (100000, "10.0.0"), (0, "0.0.0")],
)
def test_a_cudnn_that_is_too_old_or_too_new_is_refused(
    loaded_as: Any, version: int, text: str
) -> None:
    path = "/somewhere/libcudnn.so.9"
    core, reason = loaded_as(SimpleNamespace(cudnn_version=lambda: version), [path])
    assert core is None
    assert reason == f"cuDNN {text} is loaded from {path}, and dgrad needs 9.1.0 or a later 9.x"


def test_info_tells_the_versions_of_a_refused_cudnn_beside_the_reason(
    loaded_as: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    module = SimpleNamespace(cudnn_version=lambda: 90001, compiled_cudnn_version=91200)
    _, reason = loaded_as(module, ["/somewhere/libcudnn.so.9"])
    assert main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["versions"]["cudnn_loaded"] == "9.0.1"
    assert told["versions"]["cudnn_compiled"] == "9.12.0"
    assert told["versions"]["cudnn_path"] == "/somewhere/libcudnn.so.9"
    assert told["providers"]["legacy"] == {"usable": False, "reason": reason}


@pytest.mark.parametrize("version", [90100, 91200, 91900, 92600, 99999])
def test_every_other_cudnn_9_is_accepted(loaded_as: Any, version: int) -> None:
    module = SimpleNamespace(cudnn_version=lambda: version)
    assert loaded_as(module, ["/somewhere/libcudnn.so.9"]) == (module, None)


def test_a_process_with_another_major_version_is_refused(loaded_as: Any) -> None:
    core, reason = loaded_as(SimpleNamespace(), ["/a/libcudnn.so.8.9.7", "/b/libcudnn.so.9"])
    assert core is None
    assert "has loaded /a/libcudnn.so.8.9.7" in reason
    assert "cuDNN 9" in reason


def test_rocm_is_refused(loaded_as: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.0")
    core, reason = loaded_as(SimpleNamespace())
    assert core is None
    assert "ROCm" in reason


def test_what_needs_cudnn_raises_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_what_is_loaded(monkeypatch)
    monkeypatch.setattr(_loader, "_imported", lambda: (None, "it is not there"))
    assert dgrad.unavailable_reason() == "it is not there"
    assert not dgrad.is_available()
    assert (_loader.cudnn_version(), _loader.compiled_cudnn_version()) == (None, None)
    with pytest.raises(RuntimeError, match="cuDNN is not usable: it is not there"):
        _loader.require()
    assert torch.equal(dgrad.conv_transpose2d(X, W), F.conv_transpose2d(X, W))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_says_so() -> None:
    assert not dgrad.is_available()
    assert dgrad.unavailable_reason()


def test_the_package_works_in_a_process_without_cudnn() -> None:
    done = run_python("""
        import importlib

        import_module = importlib.import_module

        def without_cudnn(name, *rest):
            if name == "dgrad._core":
                raise ImportError("libcudnn.so.9: cannot open shared object file")
            return import_module(name, *rest)

        importlib.import_module = without_cudnn
        import sys, torch, dgrad

        assert "dgrad._core" not in sys.modules
        print(dgrad.is_available(), dgrad.unavailable_reason())
        layer = dgrad.ConvTranspose2d(1, 1, 2, bias=False)
        x = torch.ones(1, 1, 2, 2, requires_grad=True)
        layer(x).sum().backward()
        assert layer.weight.grad.sum() == 16
        model = torch.nn.Sequential(torch.nn.ConvTranspose2d(1, 1, 2))
        assert dgrad.convert(model) == ["0"]
        assert model(x).shape == (1, 1, 3, 3)
    """)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("False libcudnn.so.9 was not found")
