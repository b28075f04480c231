"""`python -m bench`"""

from bench.app import main

main(prog_name="python -m bench")
