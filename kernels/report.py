"""Compiles every Triton kernel ahead of time, without a GPU, and tells what each program takes of the chip.

    python -m magnet_fast.kernels.report [--quick] [--kernel NAME] [--arch 80 90] [--dtype bfloat16] [--markdown FILE]

A kernel file takes part by a function ``launches(dtype, quick)`` that yields (label, call): each call runs the file's
host function on *meta* tensors. Nothing is launched: every launch of a call, with every configuration that its
autotuner may choose, is compiled as it would be on a GPU, from the same arguments. Registers and spills are those of
the compiled program as ``cuobjdump`` and ``nvdisasm`` see it.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from . import _runtime

KERNEL_FILES = (
    "window_attention",
    "cross_modal_attention",
    "deformable_attention",
    "pixel_contrastive_loss",
)
"""Modules of this package with kernels."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that one block can have, by architecture."""

_REGISTERS, _THREADS, _BLOCKS = 1 << 16, 2048, 32  # of a multiprocessor, both architectures
_SHARED = {80: 164 << 10, 90: 228 << 10}  # of a multiprocessor
_SHARED_RESERVED = 1 << 10  # of every block
_MULTIPROCESSORS = {80: 108, 90: 132}  # A100, H100 and H200: they decide how many programs are beside each other
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.bool: "*i1"}
_POINTERS |= {torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8"}


# Names of constants that say how a launch is cut into tiles.
_SIZES = re.compile(r"QUERIES|KEYS|PIXELS|WORDS|ROWS|COLUMNS|BLOCK|ENTRIES|.*TILE")


class Launch(NamedTuple):
    """One launch as a host function asked for it."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]


class Program(NamedTuple):
    """One compiled kernel."""

    kernel: str
    label: str
    dtype: str
    arch: int
    options: str
    registers: int  # of a thread
    spills: int  # instructions that store to, or load from, local memory
    shared: int  # bytes of a block
    warps: int

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
) -> Iterator[tuple[str, list[Launch]]]:
    """(label, launches) of every call of every kernel file, every configuration included."""
    for name in KERNEL_FILES:
        for label, call in import_module(f".{name}", __package__).launches(dtype, quick):
            with _recording(arch) as found:
                call()
            wanted = [launch for launch in found if kernel in f"{name}.{launch.kernel.__name__}"]
            if wanted:
                yield label, wanted


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


def compile_launch(launch: Launch, label: str, dtype: torch.dtype, arch: int) -> Program:
    """Compile one launch for an architecture, as Triton would on such a GPU."""
    source = _source(launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    registers, spills = _resources(compiled)
    sizes = {name: launch.arguments[name] for name in launch.arguments if _SIZES.match(name)}
    text = " ".join(f"{name.lower()}={value}" for name, value in sizes.items() if value)
    name, warps = launch.kernel.__name__.strip("_"), compiled.metadata.num_warps
    return Program(name, label, str(dtype)[6:], arch, text, registers, spills, compiled.metadata.shared, warps)


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


def programs(
    quick: bool = False,
    kernel: str = "",
    archs: Sequence[int] = (80, 90),
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Iterator[Program]:
    """Compile everything, each distinct program once."""
    for dtype in dtypes:
        for arch in archs:
            seen = set()
            for label, found in launches(dtype, quick, kernel, arch):
                for launch in found:
                    source = _source(launch)
                    key = (label, source.hash(), str(sorted(launch.options.items())))
                    if key not in seen:
                        seen.add(key)
                        yield compile_launch(launch, label, dtype, arch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the few launches that the tests compile")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=sorted(SHARED_LIMIT))
    names = [str(dtype)[6:] for dtype in DTYPES]
    parser.add_argument("--dtype", nargs="+", choices=names, default=names)
    parser.add_argument("--markdown", type=Path, help="write the table, with versions and the date, to this file")
    arguments = parser.parse_args()
    found = []
    dtypes = [getattr(torch, name) for name in arguments.dtype]
    for program in programs(arguments.quick, arguments.kernel, arguments.arch, dtypes):
        found.append(program)
        print(_line(program), flush=True)
    print(f"{len(found)} programs, {sum(not p.fits for p in found)} of them spill or do not fit")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(found, sys.argv[1:]))


def markdown(found: list[Program], arguments: Sequence[str]) -> str:
    """The table as a document; ``arguments`` are those of the command that wrote it."""
    rows = [
        f"| {p.kernel} | {p.label} | {p.dtype} | sm_{p.arch} | {p.registers} | {p.spills} | {p.shared / 1024:.1f} | "
        f"{p.warps} | {100 * p.occupancy:.0f} % | {p.options} |"
        for p in found
    ]
    return "\n".join(
        [
            "# What the Triton kernels take of a chip",
            "",
            f"Written by `{shlex.join(['python', '-m', 'magnet_fast.kernels.report', *arguments])}`,",
            "which compiles every launch of these dtypes, with every configuration that its autotuner may choose,",
            "without a GPU. Registers are a thread's; spills are instructions that go to local memory; shared memory",
            "is a block's, of at most "
            + " and ".join(f"{limit >> 10} KB on sm_{arch}" for arch, limit in SHARED_LIMIT.items())
            + ".",
            "Occupancy is estimated from these three and the warps of a block. No kernel was run for this table.",
            "",
            f"{date.today().isoformat()}, Triton {triton.__version__}, torch {torch.__version__}.",
            f"{len(found)} programs, {sum(not p.fits for p in found)} of them spill or do not fit.",
            "",
            "| kernel | case | dtype | chip | registers | spills | shared KB | warps | occupancy | tiles |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _line(p: Program) -> str:
    return (
        f"sm_{p.arch} {p.dtype:<8} {p.kernel:<24} {p.label:<28} {p.registers:4} registers {p.spills:5} spills "
        f"{p.shared / 1024:6.1f} KB shared {100 * p.occupancy:4.0f} % occupancy  {p.options}"
    )


if __name__ == "__main__":
    main()
