"""``python -m vqlm`` is the command line ``vqlm``."""

from vqlm.cli import main

raise SystemExit(main())
