"""The HTTP face: ``app`` (routes), ``health`` (the contract), ``run`` (the process)."""
