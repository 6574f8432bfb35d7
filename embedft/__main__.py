"""`python -m embedft` is `embedft`."""

import sys

from .cli import main

sys.exit(main())
