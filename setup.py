"""Builds the torch-free C++ extension ``magnet_fast._cpu``; everything else is declared in pyproject.toml.

Environment: ``CXX`` (compiler), ``CXXFLAGS`` (added flags), ``MAX_JOBS`` (parallel compilations). Without a
working C++ compiler the package installs as pure Python and says so.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# Compiled once per SIMD level with that level's own flags; simd_level.cpp picks one at run time.
SIMD_SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*_kernel.cpp"))
CPU_SOURCES = sorted(
    str(path)
    for path in (*Path("csrc/bindings").glob("*_module.cpp"), *Path("csrc/cpu").glob("*.cpp"))
    if str(path) not in SIMD_SOURCES
)
# float64 is scalar, for gradient checks; launchers use it for tensors of that dtype only.
SIMD_FLAGS = {"portable": [], "float64": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    avx512 = ["-mavx512f", "-mfma", "-mf16c"]
    bf16 = ["-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"]
    SIMD_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    SIMD_FLAGS["avx512"] = avx512
    SIMD_FLAGS["avx512_bf16"] = [*avx512, *bf16, "-DMAGNET_FAST_SIMD_AVX512=1"]

FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",
]
# Contraction to FMA is wanted; -ffast-math is not, because NaN and infinity must come out as they went in.
# Without trapping arithmetic and errno the compiler may vectorise comparisons; values do not change.
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
OPENMP = "-fopenmp"


def compiler() -> list[str]:
    """The C++ compiler's command words: ``CXX``, else the one Python was built with, else c++."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    built_with = shlex.split(sysconfig.get_config_var("CXX") or "")[:1]
    return next(([name] for name in [*built_with, "c++", "g++", "clang++"] if shutil.which(name)), ["c++"])


def compiles(source: str, *flags: str) -> bool:
    """Whether ``source`` compiles and links with ``flags``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source)
        command = [*compiler(), *flags, str(path), "-o", str(path.with_suffix(".out"))]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


def without_extension() -> str | None:
    """Why the extension cannot be built here, or None when it can."""
    if not compiles("#include <vector>\nint main() { return int(std::vector<int>().size()); }", "-std=c++17"):
        return f"no working C++17 compiler ({' '.join(compiler())!r} does not compile a test program)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python's development headers (Python.h) are not installed"
    return None


REASON = without_extension()


class BuildPython(build_py):
    """build_py that says, once and plainly, when the package is installed without its C++ extension."""

    def run(self) -> None:
        if REASON:
            bar = "*" * 100
            print(
                f"{bar}\nmagnet_fast: installing WITHOUT the C++ extension: {REASON}.\n"
                "Everything works on the slower PyTorch path. To get the extension, install a C++ compiler\n"
                f"(for example `apt install g++ python3-dev`) and install magnet_fast again.\n{bar}",
                file=sys.stderr,
                flush=True,
            )
        super().run()


class BuildExtension(build_ext):
    """Compiles the objects in parallel (ninja when present, else threads), then links them."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        include = [f"-I{Path('csrc').resolve()}", f"-I{sysconfig.get_paths()['include']}"]
        include.append(f"-I{pybind11.get_include()}")
        openmp = [OPENMP] if compiles("#include <omp.h>\nint main() { return 0; }", OPENMP) else []
        if not openmp:
            print(
                "magnet_fast: the C++ compiler has no OpenMP; the extension will run on one thread",
                file=sys.stderr,
            )
        common = [*compiler(), *FLAGS, *openmp, *shlex.split(os.environ.get("CXXFLAGS", "")), *include]
        common += [f"-DMAGNET_FAST_HAS_{level.upper()}=1" for level in SIMD_FLAGS]

        folder = Path(self.build_temp, ext.name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [(folder / f"{Path(name).stem}.o", Path(name).resolve(), common) for name in CPU_SOURCES]
        for level, flags in SIMD_FLAGS.items():
            level_flags = [
                *common,
                *flags,
                f"-DMAGNET_FAST_SIMD_LEVEL={level}",
                f"-DMAGNET_FAST_SIMD_{level.upper()}=1",
            ]
            jobs += [
                (folder / f"{Path(name).stem}_{level}.o", Path(name).resolve(), level_flags) for name in SIMD_SOURCES
            ]
        compile_objects(folder, jobs)

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Linked under a temporary name: replacing the file leaves processes that have it loaded undisturbed.
        unfinished = target.with_name(target.name + ".tmp")
        objects = [str(obj) for obj, _, _ in jobs]
        run(
            [
                *compiler(),
                "-shared",
                "-s",
                *openmp,
                *shlex.split(os.environ.get("LDFLAGS", "")),
                *objects,
                "-o",
                str(unfinished),
            ]
        )
        os.replace(unfinished, target)


def compile_objects(folder: Path, jobs: list[tuple[Path, Path, list[str]]]) -> None:
    """Compiles every (object, source, command without input and output) of ``jobs``."""
    limit = int(os.environ.get("MAX_JOBS") or 0) or len(os.sched_getaffinity(0))
    ninja = find_ninja()
    if ninja is None:
        with ThreadPoolExecutor(limit) as pool:
            list(pool.map(lambda job: run([*job[2], "-c", str(job[1]), "-o", str(job[0])]), jobs))
        return
    lines = [
        "rule compile",
        "  command = $compile -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    for obj, source, command in jobs:
        lines.append(f"build {ninja_path(obj)}: compile {ninja_path(source)}")
        lines.append("  compile = " + shlex.join(command).replace("$", "$$"))
    Path(folder, "build.ninja").write_text("\n".join(lines) + "\n")
    run([ninja, "-C", str(folder), "-j", str(limit)])


def find_ninja() -> str | None:
    """The ninja of the build environment's ``ninja`` package, else the one on PATH, else None."""
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        inside = Path(ninja.BIN_DIR, "ninja")
        if inside.exists():
            return str(inside)
    return shutil.which("ninja")


def ninja_path(path: Path) -> str:
    """``path`` with the characters that ninja reads as syntax escaped."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def run(command: list[str]) -> None:
    """Runs ``command`` and ends the build, showing the compiler's own words, when it fails."""
    print(shlex.join(command), flush=True)
    done = subprocess.run(command)
    if done.returncode:
        raise SystemExit(
            f"magnet_fast: building the C++ extension failed (exit status {done.returncode}) in: {shlex.join(command)}"
        )


setup(
    packages=[*find_packages(include=["magnet_fast", "magnet_fast.*"]), "magnet_fast.kernels"],
    package_dir={"magnet_fast.kernels": "kernels"},
    ext_modules=[] if REASON else [Extension("magnet_fast._cpu", sources=CPU_SOURCES + SIMD_SOURCES)],
    cmdclass={"build_py": BuildPython, "build_ext": BuildExtension},
)
