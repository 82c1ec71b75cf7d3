"""`python -m turbodiff.cli`: the command line without an installed script."""

from turbodiff.cli import main

main()
