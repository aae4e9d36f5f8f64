"""`python -m fastvlm_convert` is the same program as `fastvlm-convert`."""

from fastvlm_convert.cli.main import main

raise SystemExit(main())
