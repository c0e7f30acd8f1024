"""The listening process: runner, supervisor of workers, fast path."""
