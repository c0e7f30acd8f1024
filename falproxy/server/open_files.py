"""The process's limit on open files."""

import sys

if sys.platform == "win32":

    def raise_open_files_limit() -> None:
        """Do nothing: the system has no such limit."""

    def open_files_limit() -> int | None:
        return None

else:
    import resource

    OPEN_MAX = 10_240  # macOS accepts no larger limit, although it reports none

    def raise_open_files_limit() -> None:
        """Raise the limit to the highest that the process may set."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for limit in (hard, OPEN_MAX):
            if soft != resource.RLIM_INFINITY and (limit > soft or limit == resource.RLIM_INFINITY):
                try:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                except (ValueError, OSError):
                    continue
                return

    def open_files_limit() -> int | None:
        """Return the limit on open files, None for no limit."""
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return None if soft == resource.RLIM_INFINITY else soft
