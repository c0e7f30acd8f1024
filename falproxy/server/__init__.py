"""The listening process: runner, supervisor of worker processes, fast path."""
