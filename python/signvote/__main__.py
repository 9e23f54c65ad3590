import sys

from signvote.cli import main

if __name__ == "__main__":  # the demo's workers import this file again under another name
    sys.exit(main())
