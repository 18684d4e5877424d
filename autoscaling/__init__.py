"""What decides: how many replicas, when, and what that cost; and the `relight` command line."""
