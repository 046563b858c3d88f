"""Packages fastmaml: metadata in pyproject.toml, sources and flags in fastmaml/build.py.

Where torch and a C++ compiler are at hand the compiled module goes into the wheel. Where they are not (an isolated build has no
torch) it is left out, and the first import builds it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# By path: importing the package would need torch.
_spec = importlib.util.spec_from_file_location("fastmaml_build", ROOT / "fastmaml" / "build.py")
assert _spec is not None and _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
sys.modules["fastmaml_build"] = build
_spec.loader.exec_module(build)


def progress(done: int, of: int, what: str) -> None:
    print(f"[{done}/{of}] {what}", flush=True)


class BuildModule(build_ext):
    def run(self) -> None:
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            folder = ROOT / "build" / str(sys.implementation.cache_tag)
            build.build(target, folder, progress)
            if build.torch_has_cuda():
                self.build_cuda(target.with_name(build.CUDA_LIBRARY))

    def build_cuda(self, target: Path) -> None:
        """The CUDA library too, where nvcc is; without it the package is whole, and says at use what is missing."""
        try:
            build.build_cuda(target, ROOT / "build" / "cuda", progress)
        except build.BuildError as reason:
            print(f"fastmaml: the CUDA library is left out: {reason}", file=sys.stderr)


class CopySources(build_py):
    """An installed package carries csrc/, so that the first import can build where the wheel's module does not fit."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "fastmaml" / "csrc"
        shutil.rmtree(target, ignore_errors=True)
        keep = shutil.ignore_patterns("build", "Makefile", "*.o", "*.md")
        shutil.copytree(ROOT / "csrc", target, ignore=keep)


def extensions() -> list[Extension]:
    if os.environ.get("FASTMAML_NO_COMPILE") == "1":  # the Makefile installs first and builds in place
        return []
    try:
        build.torch_folder()
        build.compiler()
    except build.BuildError as reason:
        print(f"fastmaml: the compiled module is left out, the first import builds it: {reason}", file=sys.stderr)
        return []
    return [Extension("fastmaml._C", sources=[])]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildModule, "build_py": CopySources})
