"""The worker itself, started by path as the scripted one is."""

import sys

from turbodiff.runtime.worker import main

if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--device", "cpu"]))
