"""How fast fastce is: pytest-benchmark cases, a paired comparison with its rivals, and growth; see README.md."""
