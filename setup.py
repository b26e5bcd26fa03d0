"""Puts the CPU kernels into the wheel, compiled for each instruction set; all else of it is in pyproject.toml."""

import os
import platform
import shutil
import sys
import tempfile
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PURE = "PQCAD_PURE_WHEEL"
KERNELS = Path("pqcad_ao", "ops", "cpu")

spec = spec_from_file_location("build_kernels", Path(__file__).parent / KERNELS / "build.py")
build = module_from_spec(spec)
sys.modules[spec.name] = build  # where a dataclass looks for its module
spec.loader.exec_module(build)


def why_pure() -> str | None:
    """What keeps the kernels out of this wheel, so that they are compiled where they are first used; None: nothing."""
    if os.environ.get(PURE, "0") != "0":
        return f"{PURE} is set"
    if platform.system() != "Linux":
        return "the kernels are for Linux"
    if find_spec("torch") is None:
        return "PyTorch, whose headers they need, is not installed here; build without isolation"
    try:
        build.compiler()
    except FileNotFoundError as error:
        return str(error)
    return None


class BuildKernels(build_py):
    def run(self) -> None:
        super().run()
        reason = why_pure()
        if reason or self.editable_mode:
            print(f"no compiled kernels in the wheel: {reason or 'it is editable'}")
            return
        for left in Path(self.build_lib, KERNELS).glob("kernels-*.so"):  # by a build of other sources
            left.unlink()
        text = build.source()
        for instructions in build.INSTRUCTION_SETS.values():
            if instructions.machine == platform.machine():
                library = Path(self.build_lib, KERNELS, f"{build.library_name(instructions, text)}.so")
                with tempfile.TemporaryDirectory() as folder:
                    shutil.copyfile(build.compiled(text, instructions, Path(folder)), library)


class OfThisPlatform(Distribution):
    def has_ext_modules(self) -> bool:
        return why_pure() is None


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildKernels, "bdist_wheel": AnyPython}, distclass=OfThisPlatform)
