"""Training losses by name. A new one is a file here with a class under `register`, imported below."""

from magnet_fast.training.terms.adversarial import AdversarialTerm
from magnet_fast.training.terms.alignment import AlignmentTerm
from magnet_fast.training.terms.category import CategoryTerm
from magnet_fast.training.terms.cross_entropy import CrossEntropyTerm
from magnet_fast.training.terms.global_alignment import GlobalAlignmentTerm
from magnet_fast.training.terms.grounding import GroundingTerm
from magnet_fast.training.terms.mask import MaskTerm
from magnet_fast.training.terms.minimap import MinimapTerm
from magnet_fast.training.terms.node_choice import NodeChoiceTerm
from magnet_fast.training.terms.objects import ObjectsTerm
from magnet_fast.training.terms.presence import PresenceTerm
from magnet_fast.training.terms.term import TERMS, Term, TermConfig, build_terms, read_terms, register

__all__ = [
    "TERMS",
    "AdversarialTerm",
    "AlignmentTerm",
    "CategoryTerm",
    "CrossEntropyTerm",
    "GlobalAlignmentTerm",
    "GroundingTerm",
    "MaskTerm",
    "MinimapTerm",
    "NodeChoiceTerm",
    "ObjectsTerm",
    "PresenceTerm",
    "Term",
    "TermConfig",
    "build_terms",
    "read_terms",
    "register",
]
