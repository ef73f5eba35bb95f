"""`python -m medformer.data inspect DIR` and `python -m medformer.data doctor`."""

from __future__ import annotations

import argparse
import sys

from medformer.data.geometry import ScanError


def main(arguments: list[str] | None = None) -> int:
    """0: all is readable (inspect), or some data set is ready (doctor). 1: not so. 2: bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m medformer.data", description="Look at medical data.")
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("inspect", help="every scan and image in a folder, with what is wrong and the way out")
    look.add_argument("folder", help="folder (or one file) to look through, nested and mixed with anything")
    look.add_argument("--json", action="store_true", help="print JSON")
    look.add_argument("--read", action="store_true", help="decode every scan too: slower, finds damaged pixels")
    look.add_argument("--workers", type=int, default=None, help="processes that read headers; default: by file count")
    doctor = commands.add_parser("doctor", help="which of the known data sets are here, and what is missing")
    doctor.add_argument("--root", default=None, help="data root; default: MEDFORMER_DATA, then TENSOR_RELOADED_DATADIR")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(arguments)
    try:
        if args.command == "inspect":
            from medformer.data.inspect_folder import as_json, inspect, report

            found = inspect(args.folder, read=args.read, workers=args.workers)
            print(as_json(found) if args.json else report(found))
            return 0 if found["scans"] and not found["problems"] else 1
        from medformer.data.datasets.doctor import as_json, examine, report

        states = examine(args.root)
        print(as_json(states) if args.json else report(states))
        return 0 if any(state.records for state in states.found) else 1
    except ScanError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
