"""XML from archives: no document type, no entities, no more than a set size."""

from __future__ import annotations

from xml.etree import ElementTree

from medformer.data.geometry import ScanError

__all__ = ["parse_xml"]


def parse_xml(data: bytes, name: str, *, limit: int = 2**25) -> ElementTree.Element:
    """The root element. Raises ScanError for entities, which can grow without bound, and for what is no XML."""
    if len(data) > limit:
        raise ScanError(f"{name}: XML of {len(data):,} bytes, at most {limit:,} are parsed")
    plain = data.replace(b"\0", b"").upper()  # entities hide in UTF-16 too
    if b"<!DOCTYPE" in plain or b"<!ENTITY" in plain:
        raise ScanError(f"{name}: XML with a document type or entities is not parsed; remove them")
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ScanError(f"{name}: XML does not parse ({error}); copy the file again") from error
    for element in root.iter():
        element.tag = str(element.tag).rpartition("}")[2]  # without its namespace
    return root
