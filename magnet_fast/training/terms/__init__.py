"""Training losses by name. A new one is a file here with a class under `register`, imported below."""

from magnet_fast.training.terms.term import TERMS, Term, TermConfig, build_terms, read_terms, register
from magnet_fast.training.terms.mask import MaskTerm  # isort: skip (the order of the sums)
from magnet_fast.training.terms.cross_entropy import CrossEntropyTerm  # isort: skip
from magnet_fast.training.terms.presence import PresenceTerm  # isort: skip
from magnet_fast.training.terms.alignment import AlignmentTerm  # isort: skip
from magnet_fast.training.terms.grounding import GroundingTerm  # isort: skip

__all__ = [
    "TERMS",
    "AlignmentTerm",
    "CrossEntropyTerm",
    "GroundingTerm",
    "MaskTerm",
    "PresenceTerm",
    "Term",
    "TermConfig",
    "build_terms",
    "read_terms",
    "register",
]
