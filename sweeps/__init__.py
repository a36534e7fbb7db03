"""WHICH configurations run: questions, search, results."""

from cnnjepa.run.console import require_own

require_own()
