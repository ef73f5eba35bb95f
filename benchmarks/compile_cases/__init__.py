"""What each kernel family is compiled and counted on. A new family adds a file of its own and a line here."""

from compile_cases import disentangled, nystrom, patch_embed, performer, tnt
from compile_cases.shapes import WIDTHS, Case, Cost, Family, Floor

__all__ = ["FAMILIES", "WIDTHS", "Case", "Cost", "Family", "Floor"]

FAMILIES = {
    "performer": performer.FAMILY,
    "nystrom": nystrom.FAMILY,
    "patch_embed": patch_embed.FAMILY,
    "disentangled": disentangled.FAMILY,
    "tnt": tnt.FAMILY,
}
