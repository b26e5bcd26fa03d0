"""Locks that the system gives back when a process ends, however it ends."""

try:
    import fcntl
except ImportError:  # on Windows nothing is locked, and nothing that a kill left behind is swept
    fcntl = None  # type: ignore[assignment]


def try_lock(descriptor: int) -> bool | None:
    """Whether an open file or folder is this process's until it closes it or ends; None where locks are not known."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return None
    return True
