"""Build hook that compiles the kernels of ``lqlora/backends/cpu/kernels``, where there is a C++ compiler.

Without a compiler the package is installed all the same and runs on NumPy. ``lqlora.backends.available()`` says which.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("lqlora", "backends", "cpu", "kernels")
LIBRARY = "kernels.shared"  # not .so: Python would take it for a module

#: No contraction of products and sums, so that every processor returns the same bytes.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math", "-pthread"]
#: Instruction sets beside the baseline of a processor. Those that the compiler does not know are left out.
ISAS_OF_X86 = {"avx2": "-march=x86-64-v3", "avx512": "-march=x86-64-v4"}


class NativeKernels(BuildHookInterface):
    """Adds the compiled library to wheels and to editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatch's signature
        """Compile the kernels, or warn in one line why they were not compiled."""
        if self.target_name != "wheel":
            return
        folder = Path(self.root) / FOLDER
        (folder / LIBRARY).unlink(missing_ok=True)
        try:
            compile_kernels(folder, folder / LIBRARY)
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"lqlora is installed without compiled kernels: {reason(error)}")
            return
        build_data["artifacts"].append(str(FOLDER / LIBRARY))
        build_data["pure_python"] = False
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{tag}"  # it is loaded by ctypes: any Python will do


def compile_kernels(folder: Path, library: Path, compiler: str | None = None, *, machine: str | None = None) -> None:
    """Compile the sources in a folder into a shared library.

    ``kernels.cpp`` is compiled once for each instruction set, every other ``.cpp`` file once for the baseline.

    Parameters
    ----------
    folder : Path
        Folder of the sources.
    library : Path
        File that is written.
    compiler : str, optional
        A command, as in the environment variable ``CXX``; g++ or clang++ if neither is given.
    machine : str, optional
        The processor to compile for; this one if not given.

    Raises
    ------
    OSError
        If there is no compiler.
    subprocess.CalledProcessError
        If compiling for the baseline fails.
    """
    command = (compiler or os.environ.get("CXX") or found_compiler()).split()
    is_x86 = (machine or platform.machine()).lower() in ("x86_64", "amd64")
    with tempfile.TemporaryDirectory() as place:
        objects = [compiled(command, folder, "kernels.cpp", place, "-DLQLORA_ISA=baseline")]
        known = [f'-DLQLORA_SOURCES="{digest(folder)}"']
        for isa, flag in ISAS_OF_X86.items() if is_x86 else ():
            try:
                objects.append(compiled(command, folder, "kernels.cpp", place, f"-DLQLORA_ISA={isa}", flag))
            except subprocess.CalledProcessError:
                continue
            known.append(f"-DLQLORA_HAS_{isa.upper()}")
        others = sorted({path.name for path in folder.glob("*.cpp")} - {"kernels.cpp"})
        objects += [compiled(command, folder, source, place, *known) for source in others]
        made = Path(place, LIBRARY)
        run([*command, "-shared", "-pthread", *objects, "-o", str(made)])
        # Moved there in one step: whoever has the old library open keeps it.
        beside = library.with_name(f"{library.name}.{os.getpid()}")
        shutil.copyfile(made, beside)
        beside.replace(library)


def compiled(command: list[str], folder: Path, source: str, place: str, *flags: str) -> str:
    """Compile one file and return the path of the object."""
    target = f"{place}/{len(list(Path(place).iterdir()))}.o"
    run([*command, *FLAGS, *flags, "-c", str(folder / source), "-o", target])
    return target


def found_compiler() -> str:
    """Return the first C++ compiler that is installed."""
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return name
    raise OSError("there is no C++ compiler (c++, g++, clang++, or the one that CXX names).")


def digest(folder: Path) -> str:
    """Return a hash of the sources. The package refuses a library that was compiled from other sources."""
    sources = sorted([*folder.glob("*.h"), *folder.glob("*.cpp")], key=lambda path: path.name)
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def run(command: list[str]) -> None:
    """Run a compiler quietly."""
    subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - the command is composed here


def reason(error: Exception) -> str:
    """Return the first line that says what went wrong."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in str(error.stderr).splitlines() if "error" in line] or [str(error)]
        return lines[0]
    return str(error)


if __name__ == "__main__":  # after a change of the sources: python hatch_build.py
    here = Path(__file__).parent / FOLDER
    try:
        compile_kernels(here, here / LIBRARY)
    except (OSError, subprocess.CalledProcessError) as problem:
        sys.exit(reason(problem))
