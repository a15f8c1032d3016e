"""python -m sparse_lth.experiments"""

import sys

from .paper import main

sys.exit(main())
