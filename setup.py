"""Packaging: two libraries in one distribution, ``whp_fast`` (the trainer) and ``whp_kernels`` (losses).

``whp_kernels._C`` is compiled from csrc/ if torch and a C++17 compiler are there
(``--no-build-isolation``); if not, the package is installed without it, and one line says why. It uses
torch's stable ABI and Python's limited API, so that what is built once runs with later versions of both.
Environment variables:

    WHP_KERNELS_SKIP_BUILD=1    do not build it
    WHP_KERNELS_FORCE_BUILD=1   failing to build it is an error
    WHP_KERNELS_FORCE_CUDA=1    compile csrc/cuda too (else: if CUDA_HOME is set and torch is built for CUDA)
    TORCH_CUDA_ARCH_LIST        for which GPUs, as torch's extensions read it (default: 9.0a)
"""

import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

REQUIREMENTS = [
    "torch>=2.11",
    "numpy>=1.26",
    "numba>=0.60",
    "safetensors>=0.4.3",
    "sentencepiece>=0.2",
    "tokenizers>=0.20",
    "ahocorasick_rs>=0.22",
    "jsonargparse[signatures]>=4.37",
    "pyyaml>=6",
    "rich>=13",
    "matplotlib>=3.8",
    "tensorboard>=2.15",
]
TEST_REQUIREMENTS = [
    "transformers>=4.57",
    "accelerate>=1.10",
    "datasets>=4.1",
    "trl>=0.24",
    "bitsandbytes>=0.50; platform_system == 'Linux'",
    "triton>=3.7.1; sys_platform == 'linux'",  # its interpreter beside NumPy 2.4
    "protobuf>=4",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "rouge-score>=0.1.2",
    "scipy>=1.14",
    "ruff>=0.9",
]

TORCH_ABI = (2, 11)  # the oldest torch that the extension runs with: install_requires says the same
LIMITED_API = "0x030a0000"
WARNINGS = ["-Wall", "-Wextra"]
# no contraction: the kernels choose themselves where a product and a sum are rounded once
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", *WARNINGS]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
SUFFIX_FLAGS = {"_avx2.cpp": AVX2, "_avx512.cpp": AVX512, "_avx512bf16.cpp": [*AVX512, "-mavx512bf16"]}
REASON_FILE = "_C.reason"  # what whp_kernels.extension.reason() tells


def switch(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


class Torch:
    """Where torch lies and what it is built for, without importing it."""

    def __init__(self):
        spec = importlib.util.find_spec("torch")
        if spec is None:
            raise LookupError("torch was not there when it was built")
        self.root = Path(spec.origin).parent
        version = importlib.util.spec_from_file_location("torch_version", self.root / "version.py")
        module = importlib.util.module_from_spec(version)
        version.loader.exec_module(module)
        self.version, self.cuda = module.__version__, module.cuda
        if tuple(int(part) for part in self.version.split(".")[:2]) < TORCH_ABI:
            raise LookupError(f"torch {self.version} is older than {'.'.join(map(str, TORCH_ABI))}")


class Cuda:
    """The toolkit that csrc/cuda is compiled with."""

    def __init__(self, torch: Torch):
        if torch.cuda is None:
            raise LookupError(f"torch {torch.version} is built without CUDA, there is nothing to link with")
        self.home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
        self.nvcc = self.home / "bin" / "nvcc"
        if not self.nvcc.is_file():
            raise LookupError(f"there is no {self.nvcc}")

    def flags(self) -> list[str]:
        flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
        for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0a").replace(";", " ").split():
            number = arch.removesuffix("+PTX").replace(".", "")
            flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
            if arch.endswith("+PTX"):
                flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
        return flags


def say(line: str) -> None:
    print(f"whp_kernels: {line}", file=sys.stderr)


def plan() -> tuple[list[Extension], str | None]:
    """The extension, or the reason why there is none."""
    try:
        if switch("WHP_KERNELS_SKIP_BUILD"):
            raise LookupError("WHP_KERNELS_SKIP_BUILD was set when the package was built")
        if sys.platform == "win32":
            raise LookupError("its sources are written for GCC and Clang")
        if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            raise LookupError("Python.h was not there when it was built (Debian and Ubuntu: python3-dev)")
        torch = Torch()
    except LookupError as error:
        if switch("WHP_KERNELS_FORCE_BUILD") and not switch("WHP_KERNELS_SKIP_BUILD"):
            raise SystemExit(f"whp_kernels: WHP_KERNELS_FORCE_BUILD is set, but {error}") from None
        return [], str(error)
    extension = Extension(
        "whp_kernels._C",
        sources=sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
        depends=sorted(glob("csrc/**/*.*", recursive=True)),  # into every sdist
        include_dirs=["csrc"],
        define_macros=[
            ("Py_LIMITED_API", LIMITED_API),
            ("TORCH_TARGET_VERSION", f"0x{TORCH_ABI[0]:02x}{TORCH_ABI[1]:02x}000000000000"),
        ],
        library_dirs=[str(torch.root / "lib")],
        libraries=["torch_cpu"],  # found at run time because torch is imported before
        py_limited_api=True,
        optional=not switch("WHP_KERNELS_FORCE_BUILD"),
    )
    extension.torch, extension.cuda = torch, None
    if switch("WHP_KERNELS_FORCE_CUDA") or (os.environ.get("CUDA_HOME") and torch.cuda):
        try:
            extension.cuda = Cuda(torch)
            extension.sources += sorted(glob("csrc/cuda/*.cu"))
            extension.library_dirs.append(str(extension.cuda.home / "lib64"))
            extension.libraries += ["torch_cuda", "cudart"]
        except LookupError as error:
            if not extension.optional:
                raise SystemExit(f"whp_kernels: WHP_KERNELS_FORCE_BUILD is set, but {error}") from None
            say(f"csrc/cuda is not compiled: {error}")
    return [extension], None


def record(folder: Path, reason: str | None) -> None:
    """Leave the reason where the extension would be, and no extension of older sources; or take it away."""
    (folder / REASON_FILE).unlink(missing_ok=True)
    if reason is not None:
        for stale in folder.glob("_C.*so"):
            stale.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REASON_FILE).write_text(reason + "\n", encoding="utf-8")
        say(f"the C++ extension is not built: {reason}")


class BuildPython(build_py):
    def run(self):
        super().run()
        if REASON is not None:
            in_source = Path(self.get_package_dir("whp_kernels"))
            record(in_source if self.editable_mode else Path(self.build_lib) / "whp_kernels", REASON)


class BuildExtension(build_ext):
    """Compiles every source with the flags that its name asks for, and only those that changed."""

    def run(self):
        if self.editable_mode:
            self.build_temp = "build/editable"  # kept, so that the next build compiles what changed
        self.in_source = bool(self.inplace)  # the base class clears it while it builds
        super().run()
        if REASON is not None and self.in_source:
            record(self.source_folder(), REASON)

    def source_folder(self) -> Path:
        return Path(self.get_finalized_command("build_py").get_package_dir("whp_kernels"))

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        reason = None
        try:
            self.compile_and_link(ext, target)
        except Exception as error:
            if not ext.optional:
                raise
            shows = "`python setup.py build_ext --inplace` shows why"
            reason = f"compiling it failed with {type(error).__name__}; {shows}"
            target.unlink(missing_ok=True)
        record(self.source_folder() if self.in_source else target.parent, reason)

    def compile_and_link(self, ext, target: Path) -> None:
        folder = Path(self.build_temp) / f"torch-{ext.torch.version}"
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: self.compile_one(ext, source, folder), ext.sources))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects,
            str(target),
            libraries=ext.libraries,
            library_dirs=ext.library_dirs,
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def compile_one(self, ext, source: str, folder: Path) -> str:
        output = folder / f"{source}.o"
        headers = [path for path in ext.depends if path.endswith((".h", ".cuh"))]
        inputs = [source, *headers, "setup.py"]
        if output.exists() and output.stat().st_mtime > max(os.path.getmtime(path) for path in inputs):
            return str(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        torch_include = ext.torch.root / "include"
        if source.endswith(".cu"):
            macros = [f"-D{name}={value}" for name, value in ext.define_macros]
            folders = [f"-I{path}" for path in [*ext.include_dirs, torch_include]]
            command = [ext.cuda.nvcc, *ext.cuda.flags(), *macros, *folders, "-c", source, "-o", output]
            subprocess.run([str(part) for part in command], check=True)
            return str(output)
        flags = [*CXX_FLAGS, "-isystem", str(torch_include)]
        if platform.machine() in ("x86_64", "AMD64"):
            flags += next((extra for suffix, extra in SUFFIX_FLAGS.items() if source.endswith(suffix)), [])
        [built] = self.compiler.compile(
            [source],
            output_dir=str(folder),
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=flags,
        )
        os.replace(built, output)
        return str(output)


EXTENSIONS, REASON = plan()

setup(
    name="whp_fast",
    version="0.1.0",
    description="Make a language model forget a corpus: 'Who's Harry Potter?' unlearning, fast and exact",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["whp_fast", "whp_fast.*"]), *find_packages("kernels")],
    package_dir={"whp_kernels": "kernels/whp_kernels"},
    package_data={"whp_fast": ["configs/*.yaml"]},
    install_requires=REQUIREMENTS,
    extras_require={"test": TEST_REQUIREMENTS, "lm-eval": ["lm-eval>=0.4.13"]},
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
