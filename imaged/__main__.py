"""`python -m imaged` is `imaged`."""

from imaged.cli import main

main()
