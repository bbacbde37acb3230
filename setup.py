"""Builds the extensions; everything else about the package is in pyproject.toml."""

import os
import shutil
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError

NEEDED = (
    "proteinbert_fast needs a C++17 compiler and the headers of Python to build its extensions; "
    "on Debian or Ubuntu: apt-get install g++ python3-dev"
)


class BuildExtensions(build_ext):
    """Says in one line what is needed when the compiler is missing or fails."""

    def build_extensions(self) -> None:
        compiler = getattr(self.compiler, "compiler_cxx", None)  # MSVC finds its own
        if compiler and shutil.which(compiler[0]) is None:
            raise SystemExit(f"error: {NEEDED} (looked for {compiler[0]!r}; CXX chooses another)")
        # One extension has a file, so that compiling an extension's files side by side saves nothing.
        self.parallel = self.parallel or os.cpu_count()
        try:
            super().build_extensions()
        except CompileError as error:
            raise SystemExit(f"error: {NEEDED} (the compiler's own message is above)") from error


def extension(name: str) -> Pybind11Extension:
    # No -march: the build must run on any processor of its family, so kernels are chosen at run time.
    return Pybind11Extension(
        f"proteinbert_fast._{name}",
        [f"csrc/{name}.cpp"],
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        cxx_std=17,
        # Vectors of 64 bytes never leave a file, so how they would be passed between files does not matter.
        extra_compile_args=["-O3", "-Wno-psabi"],
    )


setup(
    ext_modules=[extension("tokenizer"), extension("cpu_kernels"), extension("records")],
    cmdclass={"build_ext": BuildExtensions},
)
