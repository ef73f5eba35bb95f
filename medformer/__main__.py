"""`python -m medformer embed MODEL SCAN OUT.npy`: the tokens of a whole scan, and beside them where they lie."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import medformer
from medformer.data import read_volume


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code: 0 done, 2 an argument or a file that does not fit (one line on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m medformer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    embed = commands.add_parser("embed", help="tokens of a whole scan", description=medformer.embed.__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    embed.add_argument("model", help=".safetensors file that medformer.save wrote")
    embed.add_argument("scan", help="NIfTI file, DICOM folder, ...: whatever read_volume reads")
    embed.add_argument("out", type=Path, help=".npy file for the tokens; grid, affine and class token go to .json")
    embed.add_argument("--window", type=lambda text: [int(n) for n in text.split("x")],
                       help="voxels, zyx, as in training: 64x64x64")  # fmt: skip
    embed.add_argument("--overlap", type=float, default=0.5)
    embed.add_argument("--method", choices=["windows", "one_pass"], default="windows")
    embed.add_argument("--max-memory", default="4 GiB")
    given = parser.parse_args(argv)
    try:
        model: Any = medformer.load(given.model)
        found = medformer.embed(
            model, read_volume(given.scan), max_memory=given.max_memory, method=given.method,
            window=given.window, overlap=given.overlap, out=given.out,
        )  # fmt: skip
        about = {"grid": found.grid, "affine": found.affine.tolist(), "cls": found.cls.tolist(), "model": given.model}
        given.out.with_suffix(".json").write_text(json.dumps(about))
    except (OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
