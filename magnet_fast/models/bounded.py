"""Models of a configuration that a file states, built only where they are of the size of what the file holds.

A configuration is a few hundred bytes and may ask for any number of layers of any width. So the model is first built
without memory, on PyTorch's meta device, and its numbers and tensors are counted while it comes into being: many
layers of next to nothing take minutes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from magnet_fast.models.registry import from_config, parse_config

if TYPE_CHECKING:
    from magnet_fast.models.base import ReferringModel

SLACK = 1 << 26
"""Numbers that a model may have beyond its file's bytes: tables that follow from its sizes, and are in no file."""
MORE_TENSORS = 4096
"""Tensors that a model may have beyond its file's: those tables, and base weights that the file leaves out."""
MOST = 1 << 33
"""Numbers of a model whose file leaves its base weights out, and so does not tell its size."""


class _TooLargeError(ValueError):
    pass


def build_for(
    config: Mapping[str, Any], state: Mapping[str, Tensor], what: str, *, with_bases: bool = False
) -> ReferringModel:
    """The model of a configuration, with random weights.

    Args:
        config: as `parse_config` takes it.
        state: what the file holds of it.
        what: the file is called, in errors.
        with_bases: base weights are loaded beside `state`.

    Raises:
        ValueError: settings that are wrong, a model that cannot be built, or one that is far larger than `state`.
    """
    try:
        parsed = parse_config(config)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    except Exception as error:  # of a part's own libraries
        raise ValueError(f"{what}: the model of its configuration cannot be built: {_told(error)}") from error
    most = MOST if with_bases else _bytes_of(state) + SLACK, len(state) + MORE_TENSORS
    try:
        with _at_most(*most):
            try:
                with torch.device("meta"):
                    from_config(parsed)
            except _TooLargeError:
                raise
            except Exception:  # what needs values cannot be built without memory
                pass
        with _at_most(*most):
            return from_config(parsed)
    except _TooLargeError as error:
        raise ValueError(
            f"{what}: its configuration asks for a model of over {error}, and the file holds "
            f"{_bytes_of(state)} bytes in {len(state)} tensors: it is damaged, or no model's"
        ) from error
    except Exception as error:  # of memory, of sizes, of a part's own libraries
        raise ValueError(f"{what}: the model of its configuration cannot be built: {_told(error)}") from error


def _bytes_of(state: Mapping[str, Tensor]) -> int:
    """In memory: of views of one storage, such as a number spread over a large shape, once."""
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    return sum(storages.values())


@contextmanager
def _at_most(numbers: int, tensors: int) -> Iterator[None]:
    """Raise where the modules that this thread makes have more numbers than this, or more tensors."""
    thread, made, held = threading.get_ident(), 0, 0

    def count(module: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal made, held
        if value is not None and threading.get_ident() == thread:
            made, held = made + value.numel(), held + 1
            if made > numbers:
                raise _TooLargeError(f"{numbers} numbers")
            if held > tensors:
                raise _TooLargeError(f"{tensors} tensors")

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _told(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
