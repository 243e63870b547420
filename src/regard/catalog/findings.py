"""The findings by name: `regard study NAME` makes each (see `regard.study.finding`)."""

#: name -> what it shows, in a line; the module in `regard.study.findings` has underscores for its hyphens
FINDINGS: dict[str, str] = {}
