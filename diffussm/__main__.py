"""`python -m diffussm` is the command `diffussm`."""

from diffussm.cli import main

raise SystemExit(main())
