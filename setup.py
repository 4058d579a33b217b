"""Builds the torch-free extensions ``magnet_fast._cpu`` and, where nvcc is found, ``magnet_fast._cuda``;
everything else is declared in pyproject.toml.

Environment: ``CXX`` (compiler), ``CXXFLAGS`` and ``LDFLAGS`` (added flags of ``_cpu``), ``MAX_JOBS`` (parallel
compilations). Without a working C++ compiler the package installs as pure Python and says so.

``MAGNET_FAST_CUDA``: 0 leaves ``_cuda`` out, 1 makes it an error when it cannot be built; unset, it is built when
there is an nvcc (``CUDA_HOME``, else ``PATH``) that works with the C++ compiler. ``MAGNET_FAST_CUDA_ARCHS``: its GPU
architectures, such as "80;90a"; unset, those of the GPUs that ``nvidia-smi`` shows, else 80 and 90a. PTX is included,
for GPUs that are newer still.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# Compiled once per SIMD level with that level's own flags; simd_level.cpp picks one at run time.
SIMD_SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*_kernel.cpp"))
CPU_SOURCES = sorted(
    str(path)
    for path in (*Path("csrc/bindings").glob("*_module.cpp"), *Path("csrc/cpu").glob("*.cpp"))
    if str(path) not in SIMD_SOURCES and not path.name.startswith("cuda_")
)
# Compiled once per element of tensors.
ELEMENT_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*_kernel.cu"))
CUDA_SOURCES = sorted(
    str(path)
    for path in (*Path("csrc/bindings").glob("cuda_*.cpp"), *Path("csrc/cuda").glob("*.c*"))
    if path.suffix in (".cpp", ".cu") and str(path) not in ELEMENT_SOURCES
)
ELEMENTS = ("float", "BFloat16", "Float16")
# float64 is scalar, for gradient checks; launchers use it for tensors of that dtype only.
SIMD_FLAGS = {"portable": [], "float64": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    avx512 = ["-mavx512f", "-mfma", "-mf16c"]
    bf16 = ["-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"]
    SIMD_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    SIMD_FLAGS["avx512"] = avx512
    SIMD_FLAGS["avx512_bf16"] = [*avx512, *bf16, "-DMAGNET_FAST_SIMD_AVX512=1"]
    # Where the compiler and its assembler know the tiles.
    SIMD_FLAGS["amx"] = [*SIMD_FLAGS["avx512_bf16"], "-DMAGNET_FAST_SIMD_AVX512_BF16=1", "-mamx-tile", "-mamx-bf16"]
AMX_PROBE = "#include <immintrin.h>\nint main() { _tile_dpbf16ps(0, 1, 2); _tile_release(); return 0; }\n"

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
CUDA_FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
DEFAULT_ARCHITECTURES = ("80", "90a")


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


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else the one on PATH, else None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def nvcc_command() -> list[str]:
    """nvcc's command words, with the C++ compiler of the rest of the build."""
    return [find_nvcc() or "nvcc", "-ccbin", compiler()[0]]


def without_cuda() -> str | None:
    """Why ``_cuda`` cannot be built here, or None when it can."""
    if find_nvcc() is None:
        where = "CUDA_HOME" if os.environ.get("CUDA_HOME") else "CUDA_HOME is not set; PATH"
        return f"no nvcc found ({where})"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <cuda_runtime_api.h>\n__global__ void probe() {}\nint main() { return 0; }\n")
        command = [*nvcc_command(), "-std=c++17", "-cudart", "static", str(source), "-o", str(source.with_suffix(""))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = next(
            (line for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()), "no message"
        )
        return (
            f"{find_nvcc()} and the C++ compiler {' '.join(compiler())!r} do not fit together ({words.strip()}); "
            "CXX chooses another compiler, CUDA_HOME another nvcc"
        )
    return None


def architectures() -> list[str]:
    """GPU architectures to compile for, such as "80" or "90a", the oldest first."""
    wanted = os.environ.get("MAGNET_FAST_CUDA_ARCHS")
    if wanted:
        names = [name.strip().replace(".", "") for name in re.split("[;, ]+", wanted) if name.strip()]
        wrong = [name for name in names if not re.fullmatch(r"\d{2,3}[af]?", name)]
        if wrong or not names:
            raise SystemExit(f"MAGNET_FAST_CUDA_ARCHS: expected numbers such as '80;90a', got {wanted!r}")
    else:
        names = [name for name in present_architectures() if int(name) >= 80] or list(DEFAULT_ARCHITECTURES)
    return sorted(set(names), key=lambda name: (int(name.rstrip("af")), name))


def present_architectures() -> list[str]:
    """Those of the GPUs in this machine, as far as nvidia-smi knows."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return [major + minor for major, minor in re.findall(r"^(\d+)\.(\d+)$", done.stdout, re.M)]


os.umask(0o022)  # the permissions of what is built do not depend on whose machine it is
REASON = without_extension()
if not compiles(AMX_PROBE, "-mamx-tile", "-mamx-bf16"):
    SIMD_FLAGS.pop("amx", None)
if os.environ.get("MAGNET_FAST_CUDA", "") not in ("", "0", "1"):
    raise SystemExit(f"MAGNET_FAST_CUDA: expected 0 or 1, got {os.environ['MAGNET_FAST_CUDA']!r}")
CUDA_WANTED = os.environ.get("MAGNET_FAST_CUDA")
CUDA_REASON = REASON or (None if CUDA_WANTED == "0" else without_cuda())
if CUDA_WANTED == "1" and CUDA_REASON:
    raise SystemExit(f"magnet_fast: MAGNET_FAST_CUDA=1, but the CUDA extension cannot be built: {CUDA_REASON}")


def say(text: str) -> None:
    """Between two bars, where it is not missed."""
    bar = "*" * 100
    print(f"{bar}\n{text}\n{bar}", file=sys.stderr, flush=True)


class BuildPython(build_py):
    """build_py that says, once and plainly, which extension the package is installed without."""

    def copy_file(
        self, infile: str, outfile: str, preserve_mode: bool = True, *more: object, **named: object
    ) -> object:
        """Not with the permissions of this copy of the sources, which would be in the wheel."""
        return super().copy_file(infile, outfile, False, *more, **named)

    def run(self) -> None:
        if REASON:
            say(
                f"magnet_fast: installing WITHOUT the C++ extension: {REASON}.\n"
                "Everything works on the slower PyTorch path. To get the extension, install a C++ compiler\n"
                "(for example `apt install g++ python3-dev`) and install magnet_fast again."
            )
        elif CUDA_REASON and CUDA_WANTED != "0" and find_nvcc():
            say(f"magnet_fast: installing WITHOUT the CUDA extension: {CUDA_REASON}.")
        super().run()


class BuildExtension(build_ext):
    """Compiles the objects in parallel (ninja when present, else threads), then links them."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        include = [f"-I{Path('csrc').resolve()}", f"-I{sysconfig.get_paths()['include']}"]
        include.append(f"-I{pybind11.get_include()}")
        # No folder of this machine's in the objects: the same sources give the same bytes wherever they are built.
        include += [f"-ffile-prefix-map={Path.cwd()}=.", f"-ffile-prefix-map={pybind11.get_include()}=pybind11"]
        folder = Path(self.build_temp, ext.name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        jobs, link = (cuda_jobs if ext.name.endswith("_cuda") else cpu_jobs)(folder, include)
        compile_objects(folder, jobs)

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Linked under a temporary name: replacing the file leaves processes that have it loaded undisturbed.
        unfinished = target.with_name(target.name + ".tmp")
        objects = [str(obj) for obj, _, _ in jobs]
        run([*link, *objects, "-o", str(unfinished)])
        os.replace(unfinished, target)


class BuildWheel(bdist_wheel):
    """bdist_wheel without the permissions that the licence has in this copy of the sources."""

    def egg2dist(self, egginfo_path: str, distinfo_path: str) -> None:
        super().egg2dist(egginfo_path, distinfo_path)
        for path in Path(distinfo_path).rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)


Job = tuple[Path, Path, list[str]]
"""An object file, its source, and the command without input and output."""


def cpu_jobs(folder: Path, include: list[str]) -> tuple[list[Job], list[str]]:
    """What ``_cpu`` is made of, and the command that links it."""
    openmp = [OPENMP] if compiles("#include <omp.h>\nint main() { return 0; }", OPENMP) else []
    if not openmp:
        print("magnet_fast: the C++ compiler has no OpenMP; the extension will run on one thread", file=sys.stderr)
    common = [*compiler(), *FLAGS, *openmp, *shlex.split(os.environ.get("CXXFLAGS", "")), *include]
    common += [f"-DMAGNET_FAST_HAS_{level.upper()}=1" for level in SIMD_FLAGS]
    jobs = [(folder / f"{Path(name).stem}.o", Path(name).resolve(), common) for name in CPU_SOURCES]
    for level, flags in SIMD_FLAGS.items():
        level_flags = [
            *common,
            *flags,
            f"-DMAGNET_FAST_SIMD_LEVEL={level}",
            f"-DMAGNET_FAST_SIMD_{level.upper()}=1",
        ]
        jobs += [(folder / f"{Path(name).stem}_{level}.o", Path(name).resolve(), level_flags) for name in SIMD_SOURCES]
    return jobs, [*compiler(), "-shared", "-s", *openmp, *shlex.split(os.environ.get("LDFLAGS", ""))]


def cuda_jobs(folder: Path, include: list[str]) -> tuple[list[Job], list[str]]:
    """What ``_cuda`` is made of, and the command that links it, with CUDA's runtime inside. nvcc takes none of CXXFLAGS
    and LDFLAGS, which are meant for the C++ compiler."""
    names = architectures()
    generate = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    # For GPUs newer than all of these: the kernels use nothing that came after 8.0, so the oldest PTX serves, and it
    # is a by-product. That of an architecture with a letter would run on no other.
    plain = next((name for name in names if name.isdigit()), names[0].rstrip("af"))
    generate.append(f"-gencode=arch=compute_{plain},code=compute_{plain}")
    paths = [f"-Xcompiler={one}" if one.startswith("-ffile") else one for one in include]
    common = [*nvcc_command(), *CUDA_FLAGS, *paths, "-DMAGNET_FAST_MODULE=_cuda"]
    jobs = [
        (folder / f"{Path(name).stem}.o", Path(name).resolve(), [*common, *(generate if name.endswith(".cu") else [])])
        for name in CUDA_SOURCES
    ]
    for element in ELEMENTS:
        flags = [*common, *generate, f"-DMAGNET_FAST_ELEMENT={element}"]
        # The longest ones first.
        jobs = [
            *((folder / f"{Path(name).stem}_{element}.o", Path(name).resolve(), flags) for name in ELEMENT_SOURCES),
            *jobs,
        ]
    return jobs, [*nvcc_command(), "-shared", "-cudart", "static", "-nodlink", "-Xlinker", "-s"]


def compile_objects(folder: Path, jobs: list[Job]) -> None:
    """Compiles every one of ``jobs``."""
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
            + ("\nMAGNET_FAST_CUDA=0 leaves the CUDA extension out." if "_cuda" in shlex.join(command) else "")
        )


setup(
    packages=[*find_packages(include=["magnet_fast", "magnet_fast.*"]), "magnet_fast.kernels"],
    package_dir={"magnet_fast.kernels": "kernels"},
    ext_modules=[
        *([] if REASON else [Extension("magnet_fast._cpu", sources=CPU_SOURCES + SIMD_SOURCES)]),
        *(
            []
            if CUDA_REASON or CUDA_WANTED == "0"
            else [Extension("magnet_fast._cuda", CUDA_SOURCES + ELEMENT_SOURCES)]
        ),
    ],
    cmdclass={"build_py": BuildPython, "build_ext": BuildExtension, "bdist_wheel": BuildWheel},
)
