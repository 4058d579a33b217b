"""What the compiler made of the CUDA kernels: registers, stack, shared memory, tensor-core products, wide accesses.

`python -m benchmarks.cuda_report` reads the built extension `magnet_fast._cuda` with cuobjdump (the CUDA toolkit's,
or the one that comes with Triton) and prints a table, no GPU needed; `--markdown` prints it as docs/cuda.md holds it,
and `--results FILE` writes it as JSON with the compilers' versions and the date.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

_COUNTED = ("local", "matrix", "copies", "loads", "stores")
_ELEMENTS = {"f": "float32", "NS_8BFloat16E": "bfloat16", "NS_7Float16E": "float16"}


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture.

    Attributes:
        name: with the element and the numbers it was made for, e.g. `window_forward<bfloat16, 32, 8>`.
        architecture: such as `sm_90a`.
        registers: of a thread.
        stack: bytes of local memory of a thread; registers that were spilled lie there.
        local: instructions that read or write local memory.
        matrix: tensor-core instructions.
        copies: asynchronous copies of 16 bytes from global to shared memory.
        loads: reads of 16 bytes from global memory.
        stores: stores of 16 bytes to global memory.
    """

    name: str
    architecture: str
    registers: int
    stack: int
    local: int
    matrix: int
    copies: int
    loads: int
    stores: int

    @property
    def multiplies(self) -> bool:
        """Whether it is one of the kernels that are made of matrix products."""
        return self.name.split("<")[0] in {"window_forward", "window_backward", "scores", "spread", "gather"}

    @property
    def reads_vectors(self) -> bool:
        """Whether it is one of those of deformable attention that take 16 bytes of channels at a time."""
        return re.fullmatch(r"deformable_\w+<\w+, [48]>", self.name) is not None


def extension() -> Path | None:
    """The built `magnet_fast._cuda`, or None."""
    found = importlib.util.find_spec("magnet_fast._cuda")
    return Path(found.origin) if found is not None and found.origin else None


def cuobjdump() -> str | None:
    """The toolkit's (CUDA_HOME, PATH), else Triton's, else None."""
    places = [str(Path(os.environ["CUDA_HOME"], "bin"))] if os.environ.get("CUDA_HOME") else []
    places.append(os.environ.get("PATH", ""))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return next((found for place in places if (found := shutil.which("cuobjdump", path=place))), None)


def stacks(path: Path, tool: str) -> dict[tuple[str, str], int]:
    """(architecture, kernel) -> bytes of local memory of a thread. Takes no time: nothing is disassembled."""
    usage = _resources(_run(tool, "--dump-resource-usage", path))
    return {(architecture, _readable(mangled)): stack for (architecture, mangled), (_, stack) in usage}


def kernels(path: Path, tool: str, architecture: str | None = None) -> list[Kernel]:
    """Every kernel in the file at `path`, for every architecture or for one, such as `sm_80`."""
    usage = dict(_resources(_run(tool, "--dump-resource-usage", path)))
    chosen = ["--gpu-architecture", architecture] if architecture else []
    counts = _instructions(_run(tool, "--dump-sass", path, *chosen))
    found = [
        Kernel(_readable(mangled), architecture, *usage[architecture, mangled], **count)
        for (architecture, mangled), count in counts.items()
    ]
    return sorted(found, key=lambda kernel: (kernel.architecture, kernel.name))


def _run(tool: str, option: str, path: Path, *more: str) -> str:
    return subprocess.run([tool, option, *more, str(path)], capture_output=True, text=True, check=True).stdout


def _resources(text: str) -> Iterator[tuple[tuple[str, str], tuple[int, int]]]:
    """((architecture, mangled name), (registers, stack)) of cuobjdump's listing of resources."""
    architecture = name = ""
    for line in text.splitlines():
        if found := re.match(r"arch = (\S+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+)", line):
            yield (architecture, name), (int(found[1]), int(found[2]))


def _instructions(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, mangled name) -> how often a disassembly holds the instructions that `Kernel` counts."""
    architecture, found, count = "", {}, {}
    for line in text.splitlines():
        if line.startswith("arch = "):
            architecture = line.split()[-1]
        elif "Function : " in line:
            count = found[architecture, line.split()[-1]] = dict.fromkeys(_COUNTED, 0)
        elif "MMA." in line:
            count["matrix"] += 1
        elif "LDGSTS." in line:
            count["copies"] += ".128" in line
        elif "LDG." in line:
            count["loads"] += ".128" in line
        elif "STG." in line:
            count["stores"] += ".128" in line
        elif re.search(r" (?:LDL|STL)\b", line):
            count["local"] += 1
    return found


def _readable(mangled: str) -> str:
    found = re.search(r"(?<=\d)([a-z][a-z_]*)_kernel(?:I(f|NS_8BFloat16E|NS_7Float16E)((?:Li\d+E)*)E|E)", mangled)
    if found is None:
        return mangled
    if found[2] is None:
        return found[1]
    made_for = [_ELEMENTS[found[2]], *re.findall(r"Li(\d+)E", found[3])]
    return f"{found[1]}<{', '.join(made_for)}>"


def table(found: list[Kernel], markdown: bool = False) -> str:
    """One line for each kernel and architecture; copies, loads and stores are those of 16 bytes."""
    heads = ["kernel", "architecture", "registers", "stack", "local", "matrix", "copies", "loads", "stores"]
    rows = [astuple(kernel) for kernel in found]
    if markdown:
        lines = [heads, ["---"] * len(heads), *rows]
        return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return "\n".join(f"{line[0]:<36}" + "".join(f"{cell!s:>16}" for cell in line[1:]) for line in [heads, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="as docs/cuda.md holds it")
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    path, tool = extension(), cuobjdump()
    if path is None:
        raise SystemExit("magnet_fast._cuda is not built (`magnet-fast info`); nvcc is needed, see docs/cuda.md")
    if tool is None:
        raise SystemExit("cuobjdump was not found: not in CUDA_HOME, not on PATH, and no Triton is installed")
    found = kernels(path, tool)
    print(table(found, arguments.markdown))
    if arguments.results:
        content = {"date": datetime.date.today().isoformat(), **versions(), "kernels": [asdict(each) for each in found]}
        arguments.results.write_text(json.dumps(content, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Of the compilers on PATH, which are those that built the extension unless CUDA_HOME or CXX said otherwise."""
    found = {}
    for name, pattern in (("nvcc", r"release \S+, (V\S+)"), ("c++", r"(\d+\.\d+\.\d+)")):
        if shutil.which(name):
            text = subprocess.run([name, "--version"], capture_output=True, text=True).stdout
            found[name] = (re.search(pattern, text) or ["", "unknown"])[1]
    return found


if __name__ == "__main__":
    main()
