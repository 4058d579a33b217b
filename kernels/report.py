"""Compiles every Triton kernel ahead of time, without a GPU, and tells what each program takes of the chip.

    python -m magnet_fast.kernels.report [--quick] [--kernel NAME] [--arch 80 90] [--dtype bfloat16] [--jobs N]
                                         [--results FILE] [--markdown FILE]

A kernel file takes part by a function `launches(dtype, quick)` that yields (label, call): each call runs the file's
host function on *meta* tensors. Nothing is launched: every launch of a call, with every configuration that its
autotuner may choose, is compiled as it would be on a GPU, from the same arguments. Registers and spills are those of
the compiled program as `cuobjdump` and `nvdisasm` see it. Triton's cache keeps what was compiled: another run takes
minutes.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import json
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from magnet_fast.kernels import _runtime
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

KERNEL_FILES = (
    "window_attention",
    "relative_attention",
    "cross_modal_attention",
    "deformable_attention",
    "pixel_contrastive_loss",
)
"""Modules of this package with kernels."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that one block can have, by architecture."""

_CHIPS = {80: "A100", 90: "H100, H200"}
_REGISTERS, _THREADS, _BLOCKS = 1 << 16, 2048, 32  # of a multiprocessor, both architectures
_SHARED = {80: 164 << 10, 90: 228 << 10}  # of a multiprocessor
_SHARED_RESERVED = 1 << 10  # of every block
_MULTIPROCESSORS = {80: 108, 90: 132}  # A100, H100 and H200: they decide how many programs are beside each other
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.bool: "*i1"}
_POINTERS |= {torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8"}


# Names of constants that say how a launch is cut into tiles.
_SIZES = re.compile(r"QUERIES|KEY|PIXELS|WORDS|ROWS|COLUMNS|BLOCK|ENTRIES|.*TILE")


class Launch(NamedTuple):
    """One launch as a host function asked for it."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def tiles(self) -> str:
        """How the launch is cut, in words."""
        sizes = {name: value for name, value in self.arguments.items() if _SIZES.match(name)}
        return " ".join(f"{name.lower()}={value}" for name, value in sizes.items() if value)


class Program(NamedTuple):
    """One compiled kernel."""

    operator: str  # the kernel file
    kernel: str
    cases: tuple[str, ...]  # labels of the calls that launch it
    dtype: str
    arch: int
    tiles: str
    warps: int
    stages: int
    registers: int  # of a thread
    spills: int  # instructions that store to, or load from, local memory
    shared: int  # bytes of a block

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's threads that can be there at once, by registers, shared memory and blocks."""
        threads = 32 * self.warps
        registers = -(-self.registers * 32 // 256) * 256 * self.warps  # allocated by the warp, 256 at a time
        blocks = min(
            _REGISTERS // registers,
            _SHARED[self.arch] // (self.shared + _SHARED_RESERVED),
            _THREADS // threads,
            _BLOCKS,
        )
        return blocks * threads / _THREADS

    @property
    def fits(self) -> bool:
        return self.spills == 0 and self.shared <= SHARED_LIMIT[self.arch]


def launches(
    dtype: torch.dtype, quick: bool = False, kernel: str = "", arch: int = 90
) -> Iterator[tuple[str, str, list[Launch]]]:
    """(kernel file, label, launches) of every call of every kernel file, every configuration included."""
    for name in KERNEL_FILES:
        for label, call in import_module(f".{name}", __package__).launches(dtype, quick):
            with _recording(arch) as found:
                call()
            wanted = [launch for launch in found if kernel in f"{name}.{launch.kernel.__name__}"]
            if wanted:
                yield name, label, wanted


@contextmanager
def _recording(arch: int) -> Iterator[list[Launch]]:
    """Within the context launches are noted instead of run, and an autotuner tries all of its candidates."""
    found: list[Launch] = []

    def note(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {key: named.pop(key) for key in ("num_warps", "num_stages", "num_ctas", "maxnreg") if key in named}
        bound = {**dict(zip(kernel.arg_names, arguments, strict=False)), **named}
        found.append(Launch(kernel, {name: bound[name] for name in kernel.arg_names}, options))

    def try_all(tuner: _runtime.Autotuner, launch: Callable[..., Any], device: torch.device, *key: Any) -> Any:
        return [launch(config) for config in tuner.candidates(*key)][-1]

    replaced = [
        (JITFunction, "run", note),
        (_runtime.Autotuner, "__call__", try_all),
        (torch.cuda, "get_device_properties", lambda device: _Properties(_MULTIPROCESSORS[arch])),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield found
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)


class _Properties(NamedTuple):
    multi_processor_count: int


class Request(NamedTuple):
    """A program to compile."""

    operator: str
    cases: tuple[str, ...]
    dtype: torch.dtype
    arch: int
    launch: Launch


def compile_program(request: Request) -> Program:
    """Compile it as Triton would on such a GPU."""
    operator, cases, dtype, arch, launch = request
    compiled = triton.compile(_source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options)
    registers, spills = _resources(compiled)
    return Program(
        operator=operator,
        kernel=launch.kernel.__name__.strip("_"),
        cases=cases,
        dtype=_name(dtype),
        arch=arch,
        tiles=launch.tiles,
        warps=compiled.metadata.num_warps,
        stages=compiled.metadata.num_stages,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
    )


def _source(launch: Launch) -> ASTSource:
    """What Triton compiles for these arguments: its rules for what is constant, and for what is divisible by 16."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[index,] = [["tt.divisibility", 16]]  # torch's allocations are
            continue
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or isinstance(value, bool) or (free and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if free and value % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
        elif isinstance(value, tuple):  # of ints
            signature[parameter.name] = ("i32",) * len(value)
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(launch.kernel, signature, constants, attributes)


def _resources(compiled: Any) -> tuple[int, int]:
    """(registers, instructions that go to local memory, where spilled registers are) of a compiled kernel.

    They are kept beside it in Triton's cache: taking a large program apart takes as long as compiling a small one.
    """
    cache = get_cache_manager(compiled.hash)
    if path := cache.get_file("resources.json"):
        return tuple(json.loads(Path(path).read_text()))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        code = _output(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    found = int(re.search(r"REG:(\d+)", usage)[1]), len(re.findall(r"\b(?:STL|LDL)\b", code))
    cache.put(json.dumps(found), "resources.json", binary=False)
    return found


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def requests(quick: bool, kernel: str, archs: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[Request]:
    """Everything there is to compile, each distinct program once."""
    found: dict[tuple[str, ...], Request] = {}
    for dtype in dtypes:
        for arch in archs:
            for operator, label, each in launches(dtype, quick, kernel, arch):
                for launch in each:
                    key = (_name(dtype), arch, _source(launch).hash(), str(sorted(launch.options.items())))
                    cases = found[key].cases if key in found else ()
                    cases += () if label in cases else (label,)
                    found[key] = Request(operator, cases, dtype, arch, launch)
    return list(found.values())


def programs(
    quick: bool = False,
    kernel: str = "",
    archs: Sequence[int] = (80, 90),
    dtypes: Sequence[torch.dtype] = DTYPES,
    jobs: int = 1,
) -> Iterator[Program]:
    """Compile everything, in so many processes."""
    work = requests(quick, kernel, archs, dtypes)
    if jobs == 1:
        yield from map(compile_program, work)
        return
    with multiprocessing.get_context("fork").Pool(jobs, _take, (work,)) as pool:
        yield from pool.imap(_compile_number, range(len(work)))


_work: list[Request] = []  # of a process of `programs`: kernels cannot be sent to one


def _take(work: list[Request]) -> None:
    _work[:] = work


def _compile_number(number: int) -> Program:
    return compile_program(_work[number])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sources() -> str:
    """A digest of all jitted functions of this package, comments and docstrings left out: what results belong to."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
                if ast.get_docstring(node):
                    node.body = node.body[1:]
                digest.update(ast.unparse(node).encode())
    return digest.hexdigest()


def results(found: Sequence[Program]) -> dict[str, Any]:
    """What a results file holds: versions, the number of programs, and a row for each kernel in each case.

    A row has the most registers a thread that any configuration takes, by dtype and architecture (in the order of
    "archs"), the number of configurations by dtype, the most shared memory of a block, and the least occupancy. A
    program may have a part in several cases.
    """
    archs = sorted({program.arch for program in found})
    members: dict[tuple[str, str, str], list[Program]] = {}
    operators = list(dict.fromkeys(program.operator for program in found))
    for program in sorted(found, key=lambda program: operators.index(program.operator)):
        for case in program.cases:
            members.setdefault((program.operator, program.kernel, case), []).append(program)
    return {
        "date": date.today().isoformat(),
        "triton": triton.__version__,
        "ptxas": {f"sm_{arch}": _ptxas(arch) for arch in archs},
        "torch": torch.__version__,
        "sources": sources(),
        "archs": archs,
        "programs": len(found),
        "do_not_fit": sum(not program.fits for program in found),
        "rows": [_row(key, each, archs) for key, each in members.items()],
    }


def _row(key: tuple[str, str, str], members: Sequence[Program], archs: Sequence[int]) -> dict[str, Any]:
    dtypes = [name for name in map(_name, DTYPES) if any(program.dtype == name for program in members)]

    def of(dtype: str, arch: int) -> list[Program]:
        return [program for program in members if (program.dtype, program.arch) == (dtype, arch)]

    return {
        **dict(zip(("operator", "kernel", "case"), key, strict=True)),
        "registers": {
            name: [max(program.registers for program in of(name, arch)) for arch in archs if of(name, arch)]
            for name in dtypes
        },
        "configurations": {name: max(len(of(name, arch)) for arch in archs) for name in dtypes},
        "shared": max(program.shared for program in members),
        "occupancy": round(min(program.occupancy for program in members), 4),
    }


def _ptxas(arch: int) -> str:
    return re.search(r"release \S+, V(\S+)", get_ptxas_version(arch))[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the few launches that the tests compile")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=sorted(SHARED_LIMIT))
    names = [_name(dtype) for dtype in DTYPES]
    parser.add_argument("--dtype", nargs="+", choices=names, default=names)
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--results", type=Path, help="write a summary, with versions and the date, to this JSON file")
    parser.add_argument("--markdown", type=Path, help="write the summary as tables to this file")
    arguments = parser.parse_args()
    found = []
    dtypes = [getattr(torch, name) for name in arguments.dtype]
    for program in programs(arguments.quick, arguments.kernel, arguments.arch, dtypes, arguments.jobs):
        found.append(program)
        print(_line(program), flush=True)
    print(f"{len(found)} programs, {sum(not p.fits for p in found)} of them spill or do not fit")
    contents = results(found)
    if arguments.results:
        arguments.results.write_text(text(contents))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(contents))


def text(contents: dict[str, Any]) -> str:
    """The results file: JSON with a line for each row."""
    head = json.dumps({**contents, "rows": []}, indent=1)
    rows = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in contents["rows"])
    return head.replace('"rows": []', f'"rows": [\n{rows}\n ]') + "\n"


def _line(p: Program) -> str:
    return (
        f"sm_{p.arch} {p.dtype:<8} {p.kernel:<24} {p.cases[0]:<28} {p.registers:4} registers {p.spills:5} spills "
        f"{p.shared / 1024:6.1f} KB shared {100 * p.occupancy:4.0f} % occupancy  {p.tiles}"
    )


_HEAD = """# What the Triton kernels take of a chip

Of {count} distinct programs for {archs}, {bad} spill registers to local memory or want more shared memory than a block
can have ({limits}). Triton {triton}, ptxas {ptxas}, {date}.
A line is a kernel in one case: the most registers a thread that any of its configurations takes ({order}), the most
shared memory of a block, and the least occupancy. "-" stands where a kernel has no part in a dtype.
"""


def markdown(contents: dict[str, Any]) -> str:
    """The tables of a results file."""
    names = [name for name in map(_name, DTYPES) if any(name in row["registers"] for row in contents["rows"])]
    archs = contents["archs"]
    lines = _HEAD.format(
        count=contents["programs"],
        bad=contents["do_not_fit"],
        limits=", ".join(f"{SHARED_LIMIT[arch] >> 10} KB on sm_{arch}" for arch in archs),
        ptxas=", ".join(f"{version} for {arch}" for arch, version in contents["ptxas"].items()),
        archs=" and ".join(f"sm_{arch} ({_CHIPS[arch]})" for arch in archs),
        order=" / ".join(f"sm_{arch}" for arch in archs),
        triton=contents["triton"],
        date=contents["date"],
    ).splitlines()
    heads = ["kernel", "case", *(f"registers, {name}" for name in names), "shared KB", "occupancy"]
    for operator, rows in itertools.groupby(contents["rows"], key=lambda row: row["operator"]):
        lines += ["", f"## {operator}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in rows:
            registers = [" / ".join(map(str, row["registers"].get(name, "-"))) for name in names]
            cells = [row["kernel"].removesuffix("_kernel"), row["case"], *registers]
            cells += [f"{row['shared'] / 1024:.1f}", f"{100 * row['occupancy']:.0f} %"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
