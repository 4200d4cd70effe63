"""Put on the path of a process that a test starts: it keeps every program it compiles, so that the next start of its like compiles none.

JAX writes programs of process 0 alone, and on the CPU each process looks for its own. Python imports this by its name.
"""

import os
import sys
import types

if "launch" not in sys.orig_argv:  # the launcher only starts the others
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    from jax._src import compiler

    compiler.distributed = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0, client=None))
