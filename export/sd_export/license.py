"""The licence that travels with the weights: found, copied into the bundle, and said aloud."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sd_engines.spec import LDM3D_UPSCALER, STABLE_DIFFUSION_XL, X2_UPSCALER, X4_UPSCALER

if TYPE_CHECKING:
    from pathlib import Path

    from sd_export.checkpoint import Checkpoint

LICENSE_FILE = "LICENSE.md"
MODEL_CARD_FILE = "MODEL_CARD.md"
_NAMES = {
    "creativeml-openrail-m": (
        "CreativeML Open RAIL-M",
        "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
    ),
    "openrail++": (
        "CreativeML Open RAIL++-M",
        "https://huggingface.co/stabilityai/stable-diffusion-2/blob/main/LICENSE-MODEL",
    ),
}
_OF_FAMILY = {
    "stable-diffusion-v1": ("Stable Diffusion v1", "creativeml-openrail-m"),
    "stable-diffusion-v2": ("Stable Diffusion v2", "openrail++"),
    STABLE_DIFFUSION_XL: ("Stable Diffusion XL", "openrail++"),
    LDM3D_UPSCALER: ("LDM3D's upscaler", "creativeml-openrail-m"),
    X2_UPSCALER: ("Stable Diffusion's x2 latent upscaler", "openrail++"),
    X4_UPSCALER: ("Stable Diffusion's x4 upscaler", "openrail++"),
}


def card_license(card: Path) -> str | None:
    """``license:`` of the model card's front matter, or None."""
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text("utf-8", "replace"), re.DOTALL)
    line = re.search(r"^license:[ \t]*([\w.+-]+)[ \t]*$", front[1], re.MULTILINE) if front else None
    return line[1] if line else None


def copy_license(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Write the checkpoint's licence, or the reference to it, and its card; names of the files.

    Where the checkpoint has licence files, `LICENSE_FILE` is their text, unchanged. Where it only
    names a licence, it says which and where its conditions are. Where it says nothing, so does
    the bundle, and points at the family's.
    """
    texts = [path.read_text("utf-8", "replace") for path in checkpoint.licenses]
    (folder / LICENSE_FILE).write_text("\n\n".join(texts) if texts else _notice(checkpoint))
    names = [LICENSE_FILE]
    if checkpoint.card is not None:
        (folder / MODEL_CARD_FILE).write_text(checkpoint.card.read_text("utf-8", "replace"))
        names.append(MODEL_CARD_FILE)
    return names


def license_words(checkpoint: Checkpoint) -> str:
    """One sentence for people, said when a bundle is made."""
    if checkpoint.license is None and not checkpoint.licenses:
        family, license_id = _OF_FAMILY[checkpoint.family]
        return (
            f"The checkpoint names no licence. Weights derived from {family} are under "
            f"{_NAMES[license_id][0]}, whose conditions travel with them (see {LICENSE_FILE})."
        )
    if checkpoint.license is None:
        return f"The checkpoint's licence travels with it: see {LICENSE_FILE} in the bundle."
    name, url = _NAMES.get(checkpoint.license, (checkpoint.license, ""))
    where = f" ({url})" if url else ""
    return f"The weights are under {name}{where}; its conditions travel with them: {LICENSE_FILE}."


def _notice(checkpoint: Checkpoint) -> str:
    family, family_license = _OF_FAMILY[checkpoint.family]
    license_id = checkpoint.license or family_license
    name, url = _NAMES.get(license_id, (license_id, ""))
    lines = ["# Licence of the weights in this bundle", ""]
    if checkpoint.license is None:
        lines += [
            f"The checkpoint this bundle was made from ({checkpoint.source}) names no licence.",
            f"Weights derived from {family} are under the {name} licence.",
        ]
    else:
        lines += [
            f"The weights in this bundle were made from {checkpoint.source} and are under the",
            f"licence `{license_id}` ({name}).",
        ]
    if url:
        lines += [
            "",
            "Its text, and the conditions of use that everyone who passes the weights on must",
            f"pass on too (for Open RAIL-M: paragraph 5 and Attachment A), are at {url}.",
        ]
    return "\n".join(lines) + "\n"
