"""`signvote bench`, for those who look for it here: `python bench/bench_ops.py --help`."""

import sys

from signvote.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
