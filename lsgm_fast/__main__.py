"""``python -m lsgm_fast`` is the command ``lsgm-fast``."""

from __future__ import annotations

import sys

from lsgm_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
