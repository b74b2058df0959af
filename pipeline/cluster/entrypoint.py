"""The first module that a submitted job runs, on whatever Python the cluster has: it checks that, and whose code runs.

Arguments: the Python that the job was submitted from, as in 3.11, and those of `refinedet`. Nothing of this project is
imported before the check, so that an older Python prints the reason instead of a traceback.
"""

import importlib.util
import os
import runpy
import sys


def main() -> None:
    here = "%d.%d" % sys.version_info[:2]  # noqa: UP031 - runs on any Python
    wanted = sys.argv.pop(1)
    if here != wanted:
        sys.stderr.write(
            "refinedet: the cluster runs Python %s, the job was submitted from %s; submit from an environment with "  # noqa: UP031
            "Python %s, or use an image with %s.\n" % (here, wanted, here, wanted)
        )
        sys.exit(2)
    found = importlib.util.find_spec("refinedet.pipeline")
    if found is not None and not str(found.origin).startswith(os.getcwd() + os.sep):
        sys.stderr.write(
            "refinedet: the cluster has an installation for development, %s, which comes before the submitted code; "  # noqa: UP031
            "its own code runs.\n" % found.origin
        )
    runpy.run_module("refinedet.pipeline.cli", run_name="__main__")


if __name__ == "__main__":
    main()
