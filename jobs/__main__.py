"""`python -m jobs COMMAND` is `corral COMMAND`."""

import sys

from jobs.main import command

sys.exit(command())
