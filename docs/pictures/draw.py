"""Draw all pictures of the site, each for a light and for a dark page.

    python docs/pictures/draw.py [--out FOLDER] [NAME ...]

The build of the site calls the function ``draw(path, dark)`` of each program beside this one by itself.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def pictures():
    """The names of all pictures: of the programs here that have a function ``draw(path, dark)``."""
    return [path.stem for path in sorted(HERE.glob("*.py")) if "\ndef draw(path, dark" in path.read_text()]


def main():
    """Draw those that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(pictures())}; all")
    parser.add_argument("--out", type=Path, default=Path("results/pictures"), help="folder (results/pictures)")
    parser.add_argument("--format", default="svg", choices=["svg", "png", "pdf"], help="of the files (svg)")
    opts = parser.parse_args()
    if unknown := set(opts.names) - set(pictures()):
        parser.error(f"no picture {', '.join(sorted(unknown))}: there are {', '.join(pictures())}")
    for name in opts.names or pictures():
        start = time.perf_counter()
        program = importlib.import_module(name)
        for dark in (False, True):
            program.draw(opts.out / f"{name}-{'dark' if dark else 'light'}.{opts.format}", dark)
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    print(f"the pictures are in {opts.out.resolve()}")


if __name__ == "__main__":
    main()
