"""``python -m sd_runtime.embed FOLDER``."""

import sys

from sd_runtime.embed.cli import main

sys.exit(main())
