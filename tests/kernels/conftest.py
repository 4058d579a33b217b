"""Two kinds of tests: the files of this folder that INTERPRETED names run in Triton's interpreter, in a process of
their own (`test_interpreted.py` starts it), the others beside all other tests.

Triton decides when it is imported, its own functions included, whether it interprets. So a process can do one of the
two, and a variable set in the middle of a test session would depend on which test imported Triton first. To run one
file alone, or with a debugger: TRITON_INTERPRET=1 pytest tests/kernels/test_window_attention.py
"""

import dataclasses
import functools
from pathlib import Path

from magnet_fast.ops import _triton_backend

COMPILED = {"test_interpreted.py", "test_report.py", "test_runtime.py"}
INTERPRETED = sorted(path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in COMPILED)

collect_ignore = sorted(COMPILED) if _triton_backend.INTERPRETED else INTERPRETED

if _triton_backend.INTERPRETED:
    from triton.runtime import interpreter

    # Shapes here are too small for an int32 to overflow, and looking for it at every sum takes a third of the time.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    # The interpreter puts its own functions into triton.language at every call of a device function, and takes them
    # out after every kernel: once for each function and for good does the same in this process, for much less.
    interpreter._patch_lang = functools.cache(interpreter._patch_lang)
    interpreter._LangPatchScope.restore = lambda scope: None
