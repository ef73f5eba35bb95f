"""The nine terms of the score, and the four products that they all are sums of.

Each side of a term is content (c), position (p) or content + position (cp), so that cp2p = c2p + p2p and so on: any
choice of terms is wcc c2c + wcp c2p + wpc p2c + wpp p2p with small whole weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["DEFAULT_TERMS", "TERMS", "Weights", "check_terms"]

DEFAULT_TERMS = ("c2c", "c2p", "p2c")
TERMS = ("c2c", "c2p", "p2c", "p2p", "cp2c", "c2cp", "cp2cp", "cp2p", "p2cp")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How often each product stands in the chosen terms."""

    cc: int
    cp: int
    pc: int
    pp: int

    @classmethod
    def of(cls, terms: Iterable[str]) -> Weights:
        """The weights of `terms`, each 'query side' 2 'key side'."""
        sides = [term.split("2") for term in terms]

        def count(query: str, key: str) -> int:
            return sum(query in left and key in right for left, right in sides)

        return cls(cc=count("c", "c"), cp=count("c", "p"), pc=count("p", "c"), pp=count("p", "p"))

    @property
    def query_position(self) -> bool:
        """A position of the query is needed."""
        return self.pc > 0 or self.pp > 0

    @property
    def key_position(self) -> bool:
        return self.cp > 0 or self.pp > 0


def check_terms(function: str, terms: Iterable[str]) -> tuple[str, ...]:
    """`terms` as a tuple.

    Raises:
        ValueError: none is chosen, one is unknown or stands twice.
    """
    if isinstance(terms, str):
        raise ValueError(f"{function}: terms={terms!r} must be a sequence of names, such as ('c2c', 'c2p')")
    chosen = tuple(terms)
    if not chosen:
        raise ValueError(f"{function}: terms=() must name at least one of {', '.join(TERMS)}")
    for term in chosen:
        if term not in TERMS:
            raise ValueError(f"{function}: terms holds {term!r}, which must be one of {', '.join(TERMS)}")
        if chosen.count(term) > 1:
            raise ValueError(f"{function}: terms holds {term!r} twice; name each term once")
    return chosen
