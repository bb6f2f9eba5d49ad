"""``python -m lowvram``."""

from lowvram.cli import main

main(prog_name="lowvram")
