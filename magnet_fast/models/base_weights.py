"""Base weights: published ones that a model's encoders started from, named in a file of what was trained on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from magnet_fast.models.state import is_derived
from magnet_fast.models.wrapping import plain_name
from magnet_fast.showing import shown

if TYPE_CHECKING:
    from magnet_fast.models.base import ImageEncoder, ReferringModel, TextEncoder


class Base(NamedTuple):
    """What an encoder was loaded with.

    Attributes:
        source: name or path, as it was given; True for the published weights of the encoder's size.
        digests: SHA-256 of each of the encoder's parameters as it was loaded, but for those that loading made by
            interpolation: machines differ in their last bits.
    """

    source: str | bool
    digests: dict[str, str]


def base_of(encoder: ImageEncoder | TextEncoder, source: str | bool) -> Base:
    """The base of an encoder that was loaded this moment."""
    parameters = {plain_name(name): parameter for name, parameter in encoder.named_parameters()}
    return Base(source, {name: _digest(p) for name, p in parameters.items() if name not in encoder.resized})


def without_bases(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """What a file must hold of a model whose bases can be had again.

    Left out are the parameters that are not trained and still have the base's bits, where they are at least half of an
    encoder: to save less is not worth a file that cannot stand alone [our choice].

    Args:
        model: says by `bases` what it was loaded with; what has no such attribute has none.
        state: all its entries, under plain names.

    Returns:
        The entries to keep; and for each encoder that others were left out of, by "image" or "text": `source`, the
        number of `tensors` left out and their `sha256`.
    """
    kept, described = dict(state), {}
    frozen = {plain_name(name): p.numel() for name, p in model.named_parameters() if not p.requires_grad}
    for role, base in getattr(model, "bases", {}).items():
        below = _below(role)
        names = {below + entry: digest for entry, digest in base.digests.items()}
        same = {
            name: digest
            for name, digest in names.items()
            if name in frozen and name in state and _digest(state[name]) == digest
        }
        whole = sum(tensor.numel() for name, tensor in state.items() if name.startswith(below))
        if same and 2 * sum(frozen[name] for name in same) >= whole:
            described[role] = {"source": base.source, "tensors": len(same), "sha256": _together(same)}
            kept = {name: tensor for name, tensor in kept.items() if name not in same}
    return kept, described


def load_bases(model: ReferringModel, described: Mapping[str, Mapping[str, Any]], what: str) -> None:
    """Load the bases of a file into a model that was built for it.

    Args:
        described: as `without_bases` gives it.
        what: the file is called, in errors.

    Raises:
        ValueError: one cannot be had, or does not fit, or is not described as `without_bases` does.
    """
    for role, base in described.items():
        if role not in ("image", "text") or not isinstance(base, Mapping) or _DESCRIBED - base.keys():
            raise ValueError(
                f"{what}: expected bases of 'image' or 'text' with {', '.join(sorted(_DESCRIBED))}, got {role!r:.40}, "
                f"{shown(base)}"
            )
        try:
            model.load_pretrained({"image": False, "text": False, role: base["source"]})
        except ValueError as error:
            reason = str(error).partition(";")[0]
            raise ValueError(
                f"{what} holds only what was trained of its {role} encoder; the rest is {_named(base['source'])}, "
                f"which could not be loaded: {reason}. Bring it back under this name, or take a file that holds "
                "everything: magnet-fast merge writes one where the base is at hand"
            ) from error


def with_bases(
    state: Mapping[str, Tensor], present: Mapping[str, Tensor], described: Mapping[str, Mapping[str, Any]], what: str
) -> dict[str, Tensor]:
    """A file's entries, with those that it left to its bases.

    Args:
        state: of the file.
        present: of a model that was loaded with the bases; at least what the file lacks.
        described: as `without_bases` gave it.
        what: the file is called, in errors.

    Raises:
        ValueError: the model has other weights than the file was trained on.
    """
    whole = dict(state)
    for role, base in described.items():
        missing = {
            name: tensor
            for name, tensor in present.items()
            if name.startswith(_below(role)) and name not in state and not is_derived(name)
        }
        found = _together({name: _digest(tensor) for name, tensor in missing.items()})
        if found != base["sha256"]:
            raise ValueError(
                f"{what} was trained on another base: {_named(base['source'])} now gives its {role} encoder "
                f"{len(missing)} tensors with SHA-256 {found[:12]}…, expected {base['tensors']} with "
                f"{base['sha256']!s:.12}…; bring the weights back that it was trained on"
            )
        whole |= missing
    return whole


_DESCRIBED = {"source", "tensors", "sha256"}


def _below(role: str) -> str:
    return f"{role}_encoder."


def _named(source: str | bool) -> str:
    return "the published weights of its size" if source is True else repr(source)


def _digest(tensor: Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    found.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _together(digests: Mapping[str, str]) -> str:
    """Of names, dtypes, shapes and bytes, in the order of the names."""
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()
