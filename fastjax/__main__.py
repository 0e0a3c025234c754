"""`python -m fastjax`: the command line."""

from fastjax.cli import main

raise SystemExit(main())
