"""The compiled part: loaded late, missing with a reason, built by setup.py from what is there."""

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from whp_kernels import extension

ROOT = Path(__file__).resolve().parents[2]
SWITCHES = ("WHP_KERNELS_SKIP_BUILD", "WHP_KERNELS_FORCE_BUILD", "WHP_KERNELS_FORCE_CUDA", "CUDA_HOME")


@pytest.fixture
def setup_py(monkeypatch):
    """Runs setup.py up to its call of setup() under environment variables; gives its names and arguments."""
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)

    def run(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        calls = []
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: calls.append(arguments))
        monkeypatch.chdir(ROOT)
        names = runpy.run_path(str(ROOT / "setup.py"))
        if "Python.h" in str(names["REASON"]):
            pytest.skip(names["REASON"])
        return names, calls[0]

    return run


def build(folder, *options, **environment):
    """``setup.py build_ext`` in another folder than the one of this checkout."""
    clean = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder]
    return subprocess.run(
        [*command, *options], cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True
    )


@pytest.fixture
def fresh():
    extension._load.cache_clear()
    yield
    extension._load.cache_clear()


# --------------------------------------------------------------------------------------------- at run time


def test_importing_the_package_does_not_load_it():
    code = "import sys; from whp_kernels import extension, losses; sys.exit('whp_kernels._C' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_loading_registers_the_operators():
    module = extension.load()
    if module is None:
        pytest.skip(extension.reason())
    assert extension.reason() is None and extension.load() is module
    assert module.__name__ == "whp_kernels._C"
    assert "portable" in torch.ops.whp_kernels_C.cpu_isas()


def test_a_missing_extension_has_a_reason(fresh, monkeypatch, tmp_path):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(extension, "_REASON_FILE", tmp_path / "_C.reason")
    assert extension.load() is None
    assert re.search("missing: it was not built; .*--no-build-isolation", extension.reason())
    extension._load.cache_clear()
    (tmp_path / "_C.reason").write_text("the compiler was on holiday\n")
    assert extension.load() is None
    assert "missing: the compiler was on holiday; " in extension.reason()


def test_an_extension_that_cannot_be_loaded_has_a_reason(fresh, monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: aoti_torch_something")

    monkeypatch.setattr(importlib, "import_module", broken)
    assert extension.load() is None
    assert "cannot be loaded: undefined symbol: aoti_torch_something; " in extension.reason()


def test_only_the_stable_abi_is_used():
    """What the library wants from torch are C functions: no name of its C++ namespaces."""
    if extension.load() is None or shutil.which("nm") is None:
        pytest.skip("needs the extension and nm")
    command = ["nm", "-D", "--undefined-only", extension.load().__file__]
    wanted = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert any(name.startswith("aoti_torch_") for name in wanted)
    assert not [name for name in wanted if re.match(r"_ZNK?(2at|3c10|5torch|6caffe2)", name)]
    assert Path(extension.load().__file__).name.startswith("_C.abi3.")


# ------------------------------------------------------------------------------------------------ setup.py


def test_every_source_is_compiled(setup_py):
    _, arguments = setup_py()
    [planned] = arguments["ext_modules"]
    sources = {f"csrc/cpu/{path.name}" for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    assert set(planned.sources) == {"csrc/module.cpp", *sources} and len(sources) > 3
    assert planned.optional and planned.py_limited_api
    assert ("TORCH_TARGET_VERSION", "0x020b000000000000") in planned.define_macros


def test_a_build_that_is_skipped(setup_py):
    names, arguments = setup_py(WHP_KERNELS_SKIP_BUILD="1", WHP_KERNELS_FORCE_BUILD="1")
    assert arguments["ext_modules"] == [] and "SKIP_BUILD" in names["REASON"]


def test_a_build_without_torch(setup_py, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name)
    )
    names, arguments = setup_py()
    assert arguments["ext_modules"] == [] and names["REASON"] == "torch was not there when it was built"
    with pytest.raises(SystemExit, match="FORCE_BUILD is set, but torch was not there"):
        setup_py(WHP_KERNELS_FORCE_BUILD="1")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA")
def test_cuda_without_a_torch_for_it(setup_py, capsys):
    _, arguments = setup_py(CUDA_HOME="/usr/local/cuda")
    assert capsys.readouterr().err == ""  # a toolkit that lies around is no wish
    _, arguments = setup_py(WHP_KERNELS_FORCE_CUDA="1")
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch("whp_kernels: csrc/cuda is not compiled: torch .* is built without CUDA, .*", line)
    assert not any(source.endswith(".cu") for source in arguments["ext_modules"][0].sources)
    with pytest.raises(SystemExit, match="built without CUDA"):
        setup_py(WHP_KERNELS_FORCE_CUDA="1", WHP_KERNELS_FORCE_BUILD="1")


def test_cuda_for_a_torch_with_it(setup_py, monkeypatch, tmp_path):
    """The toolkit decides, not a GPU; the list of architectures is read as torch reads it."""
    names, _ = setup_py()
    cuda = object.__new__(names["Torch"])
    cuda.version, cuda.cuda, cuda.root = "2.13.0+cu130", "13.0", Path(torch.__file__).parent
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(LookupError, match="there is no .*nvcc"):
        names["Cuda"](cuda)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert "arch=compute_90a,code=sm_90a" in names["Cuda"](cuda).flags()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a;10.0+PTX")
    chosen = [flag for flag in names["Cuda"](cuda).flags() if flag.startswith("arch=")]
    assert chosen == [
        "arch=compute_90a,code=sm_90a",
        "arch=compute_100,code=sm_100",
        "arch=compute_100,code=compute_100",
    ]


def test_a_reason_takes_the_place_of_an_older_extension(setup_py, tmp_path):
    names, _ = setup_py()
    (tmp_path / "_C.abi3.so").touch()
    (tmp_path / "_other.so").touch()
    names["record"](tmp_path, "no compiler")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_C.reason", "_other.so"]
    assert (tmp_path / "_C.reason").read_text() == "no compiler\n"
    (tmp_path / "_C.abi3.so").touch()
    names["record"](tmp_path, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_C.abi3.so", "_other.so"]


def test_without_a_compiler_one_line_says_so(tmp_path):
    done = build(tmp_path, CC="/bin/false", CXX="/bin/false")
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("whp_kernels:")]
    assert line.startswith("whp_kernels: the C++ extension is not built: compiling it failed")
    assert (tmp_path / "whp_kernels" / "_C.reason").is_file()
    assert not list((tmp_path / "whp_kernels").glob("*.so"))


def test_without_a_compiler_a_forced_build_fails(tmp_path):
    done = build(tmp_path, CC="/bin/false", CXX="/bin/false", WHP_KERNELS_FORCE_BUILD="1")
    assert done.returncode != 0
