"""Builds the compiled kernels where the machine can; the package works, slower, without them.

    pip install --no-build-isolation .     torch must be installed first: the kernels compile
                                           against its headers

csrc/cpu   with any C++ compiler. No -march=native: each instruction set is its own source file
           with its own flags, and the right one is chosen when the package loads.
csrc/cuda  where nvcc and a CUDA build of torch are present.

PERL_KERNELS_BUILD=none skips both, =cpu only csrc/cuda, =require fails where the CPU build fails.
PERL_KERNELS_SANITIZE=address builds csrc/cpu with AddressSanitizer; see `make asan`.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
WANTED = os.environ.get("PERL_KERNELS_BUILD", "auto")
SANITIZE = os.environ.get("PERL_KERNELS_SANITIZE", "")


def say(message: str) -> None:
    print(f"perl-kernels: {message}", file=sys.stderr)


def cpu_extension():
    from torch.utils.cpp_extension import CppExtension

    # The C++ standard is the one that torch's headers ask for; BuildExtension adds it.
    # The sources use vector types of GCC and clang; other compilers end up with plain torch.
    flags = ["-O3", "-g0", "-Wno-psabi", *(["-fopenmp"] if sys.platform == "linux" else [])]
    links = []
    if SANITIZE:
        # -O2: below it GCC contracts no a * b + c, and the tests would hold another arithmetic
        flags += ["-O2", "-g", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZE}"]
        links += [f"-fsanitize={SANITIZE}"]
    return CppExtension(
        "perl_kernels._cpu",
        [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc/cpu").glob("*.cpp"))],
        include_dirs=[str(ROOT / "csrc/cpu")],
        depends=[str(p) for p in (ROOT / "csrc/cpu").glob("*.h")],
        extra_compile_args=flags,
        extra_link_args=links,
        optional=WANTED != "require",
    )


def cuda_extension():
    from torch.utils.cpp_extension import CUDAExtension

    return CUDAExtension(
        "perl_kernels._cuda",
        [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc/cuda").glob("*.cu"))],
        depends=[str(p) for p in (ROOT / "csrc/cuda").glob("*.cuh")],
        extra_compile_args={
            "cxx": ["-O3"],
            "nvcc": ["-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"],
        },
    )


def extensions() -> tuple[list, dict]:
    if WANTED == "none":
        return [], {}
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension
    except ImportError:
        say(
            "torch is not importable here, so no kernels are compiled. Install torch first, then "
            "this package with --no-build-isolation."
        )
        return [], {}

    class Build(BuildExtension):
        """Builds what it can, and writes down the torch each extension was compiled against."""

        def build_extension(self, extension) -> None:
            try:
                super().build_extension(extension)
            except Exception as error:  # whatever the compiler's failure, the package works
                if WANTED == "require":
                    raise
                say(f"{extension.name} is not compiled, plain torch will run instead: {error}")

        def run(self) -> None:
            super().run()
            for extension in self.extensions:
                binary = Path(self.get_ext_fullpath(extension.name))
                if binary.exists():
                    stamp = binary.parent / f"{extension.name.split('.')[-1]}.json"
                    stamp.write_text(json.dumps({"torch": torch.__version__}) + "\n")

    found = [cpu_extension()]
    has_cuda_sources = any((ROOT / "csrc/cuda").glob("*.cu"))
    if WANTED != "cpu" and has_cuda_sources and CUDA_HOME and torch.version.cuda:
        found.append(cuda_extension())
    say(f"compiling {', '.join(e.name for e in found)} on {platform.machine()}")
    return found, {"build_ext": Build}


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
