"""`python -m refinedet.pipeline.cli`: the command `refinedet`."""

from refinedet.pipeline.cli.main import main

main()
