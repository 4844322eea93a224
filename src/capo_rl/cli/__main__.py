"""`python -m capo_rl.cli`, which launchers of several processes call."""

import sys

from capo_rl.cli import main

if __name__ == "__main__":
    sys.exit(main())
