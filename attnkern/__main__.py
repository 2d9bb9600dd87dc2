import sys

from attnkern.cli import main

sys.exit(main())
