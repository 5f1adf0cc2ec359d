"""The documentation site's generated parts: its figure, its strategies, its options and its commands. `mkdocs.yml` names `docgen/site.py`."""
