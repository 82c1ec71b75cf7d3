"""`python -m turbodiff`: the command line without an installed script."""

from turbodiff.cli import main

main()
