"""What a call of a class runs, as fingerprints of source: how a copy of a published class is known.

A fingerprint is a hash of the syntax tree of one function. Left out of it: comments, white space, line breaks, quotes
and brackets that mean nothing (they are not in a tree), docstrings and other strings that stand alone, and all
annotations of parameters, results and variables. Everything else counts: names, numbers, defaults, decorators, order.

Source is read and parsed. Nothing is imported or executed.
"""

from __future__ import annotations

import ast
import builtins
import dis
import hashlib
import inspect
import json
import linecache
import warnings
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

# What these names mean is not told: everybody's `F` is this one. Under another meaning they are.
_CUSTOMARY = {"torch": "torch", "nn": "torch.nn", "F": "torch.nn.functional", "math": "math", "np": "numpy"}
_CONSTANTS = (type(None), bool, int, float, str)
_NOT_IN_A_CALL = {"__init__", "extra_repr"}

_units_of: WeakKeyDictionary[type, dict[str, str]] = WeakKeyDictionary()


class UnreadableError(Exception):
    """There is no source, or it is not that of the code that runs."""


def fingerprints(cls: type) -> dict[str, str]:
    """Fingerprints of all that a call of a module of this class runs, by name.

    That is `forward`; each method of the class that one of them names; each function that one of them finds outside
    the class, and what that finds; of a class found there, its methods and what they find (`Class.name`). What else is
    found under a name is described ("module numpy.linalg", "= 3", "missing"). `__init__` is not among them: it makes
    parameters, numbers and parts, which whoever uses a module can look at. Methods that nothing names (`flops`) and
    `extra_repr` are not either. A method that stands in the place of one of `nn.Module`'s, as `__call__`, is, and so
    are bases other than `nn.Module`.

    Raises:
        UnreadableError: the source of one of them cannot be read (a class typed in at a prompt), is not that of the
            code that runs (a file edited since it was imported), or the function is put together when it is run.
    """
    if cls not in _units_of:
        _units_of[cls] = _Search(cls).found
    return dict(_units_of[cls])


class _Search:
    def __init__(self, cls: type) -> None:
        self.found: dict[str, str] = {}
        self._objects: dict[str, Any] = {}
        self._files: dict[str, _File] = {}
        self._cls = cls
        bases = cls.__mro__[1:-1]
        if bases != (nn.Module,):
            self.found["bases"] = ", ".join(_path(base) for base in bases)
        if type(cls) is not type:
            self.found["metaclass"] = _path(type(cls))
        self._method("forward")
        for name, member in vars(cls).items():
            if hasattr(nn.Module, name) and name not in _NOT_IN_A_CALL and _functions(member):
                self._method(name)

    def _method(self, name: str) -> None:
        for function in _functions(inspect.getattr_static(self._cls, name)):
            self._function(name, function)

    def _function(self, name: str, function: FunctionType) -> None:
        if self._objects.setdefault(name, function) is not function:
            name = f"{name} of {function.__module__}"
        if name in self.found:
            return
        self._objects[name] = function
        self.found[name] = self._digest(function)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if not isinstance(default, _CONSTANTS):
                self.found[f"a default of {name}"] = _described(default)
        names, attributes = _names(function.__code__)
        within = name.rpartition(".")[0] + "." if "." in name else ""
        for one in sorted(names):
            if one in function.__globals__:
                self._outside(within + one, function.__globals__[one])
            elif not hasattr(builtins, one):
                self.found[within + one] = "missing"
        for one in sorted(attributes):
            own = [base for base in self._cls.__mro__ if base not in (nn.Module, object) and one in vars(base)]
            if own and _functions(vars(own[0])[one]):
                self._method(one)

    def _digest(self, function: FunctionType) -> str:
        if set(function.__code__.co_freevars) - {"__class__"}:
            raise UnreadableError(f"{function.__qualname__} uses variables of the function that made it")
        name = function.__code__.co_filename
        if name not in self._files:
            try:
                self._files[name] = _File.read(function)
            except (OSError, TypeError, SyntaxError, ValueError, RecursionError) as error:
                raise UnreadableError(f"the source of {function.__qualname__} cannot be read") from error
        return self._files[name].digest(function)

    def _outside(self, name: str, value: Any) -> None:
        """What a function finds under a name in its module; behind the name of a class, what its methods find."""
        if isinstance(value, ModuleType) and _CUSTOMARY.get(name.rpartition(".")[2]) == value.__name__:
            return
        if isinstance(value, FunctionType) and not _of_torch(value):
            self._function(name, value)
        elif isinstance(value, type) and not _of_torch(value):
            if name in self.found:
                return
            self.found[name] = "class of " + ", ".join(map(_path, value.__bases__))
            for method, member in list(vars(value).items()):
                for function in _functions(member):
                    self._function(f"{name}.{method}", _undecorated(function))
        else:
            self.found[name] = _described(value)


def _functions(member: Any) -> tuple[FunctionType, ...]:
    """The functions behind a member of a class."""
    if isinstance(member, property):
        return tuple(function for function in (member.fget, member.fset) if isinstance(function, FunctionType))
    function = getattr(member, "__func__", member)
    return (function,) if isinstance(function, FunctionType) else ()


def _undecorated(function: FunctionType) -> FunctionType:
    """The function within PyTorch's own decorators, whose names are in its source."""
    while _of_torch(function) and isinstance(getattr(function, "__wrapped__", None), FunctionType):
        function = function.__wrapped__
    return function


def _of_torch(value: Any) -> bool:
    """Whether PyTorch wrote it: a function by where its code looks for names, which a decorator does not change."""
    module = value.__globals__.get("__name__") if isinstance(value, FunctionType) else value.__module__
    return str(module).partition(".")[0] == "torch"


def _described(value: Any) -> str:
    if isinstance(value, ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, _CONSTANTS):
        return f"= {value!r}"
    if hasattr(value, "__qualname__"):
        return _path(value)
    return f"a {_path(type(value))}"


def _path(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _names(code: CodeType) -> tuple[set[str], set[str]]:
    """The global names that code reads, and the names of attributes; of the functions within it, too."""
    names: set[str] = set()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(step.argval)
    attributes = set(code.co_names) - names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more, of_those = _names(inner)
            names |= more
            attributes |= of_those
    return names, attributes


class _File(NamedTuple):
    """A file of source as it is now."""

    functions: dict[tuple[str, int], ast.FunctionDef]
    """By name and first line, as a code object has them."""
    codes: list[CodeType]

    @classmethod
    def read(cls, function: FunctionType) -> _File:
        """The whole file: what code becomes of a function depends on what the file imports."""
        name = function.__code__.co_filename
        linecache.checkcache(name)
        text = "".join(linecache.getlines(name, function.__globals__))
        if not text:
            raise OSError(f"{name}: no source")
        with warnings.catch_warnings():  # of its author's matters, as an escape in a docstring
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
            compiled = compile(tree, name, "exec", dont_inherit=True)
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        first = [min([node, *node.decorator_list], key=lambda part: part.lineno).lineno for node in nodes]
        functions = {(node.name, line): node for node, line in zip(nodes, first, strict=True)}
        return cls(functions, list(_inner(compiled)))

    def digest(self, function: FunctionType) -> str:
        code = function.__code__
        node = self.functions.get((code.co_name, code.co_firstlineno))
        if node is None or code not in self.codes:
            raise UnreadableError(f"the code of {function.__qualname__} is not that of its source")
        return hashlib.sha256(json.dumps(_plain(node)).encode()).hexdigest()[:16]


def _inner(code: CodeType) -> Iterator[CodeType]:
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield one
            yield from _inner(one)


def _plain(node: Any) -> Any:
    """A syntax tree as lists, the same for every version of Python: without what is left out, and without what is
    None or empty."""
    if isinstance(node, list):
        return [_plain(one) for one in node if not _says_nothing(one)]
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.AnnAssign):
        node = ast.Assign(targets=[node.target], value=node.value)
    fields = {name: getattr(node, name, None) for name in node._fields if name not in _LEFT_OUT}
    return [type(node).__name__, *([name, _plain(x)] for name, x in fields.items() if x is not None and x != [])]


_LEFT_OUT = {"annotation", "returns", "type_comment", "type_ignores", "type_params", "ctx", "kind"}


def _says_nothing(node: Any) -> bool:
    """A string that stands alone, as a docstring, or the mere annotation of a variable."""
    if isinstance(node, ast.AnnAssign):
        return node.value is None
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
