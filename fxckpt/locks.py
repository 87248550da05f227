"""The one lock of the library."""

import os
import threading

# Held while something is captured, and while modules are read that another thread may be capturing:
# what hides a capture from the program is in part global.
LOCK = threading.RLock()

if hasattr(os, "register_at_fork"):  # a child is never born in the middle of a capture
    os.register_at_fork(
        before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release
    )
