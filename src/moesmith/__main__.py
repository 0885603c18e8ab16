"""`python -m moesmith` is the `moesmith` command."""

import sys

from moesmith.cli import main

sys.exit(main())
