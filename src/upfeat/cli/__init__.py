"""The ``upfeat`` command: one module per subcommand."""

from upfeat.cli.main import main

__all__ = ["main"]
