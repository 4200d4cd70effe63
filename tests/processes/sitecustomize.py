"""Put on the path of a process that a test starts: it compiles as tests do, and keeps every program for the next start of its like.

JAX writes programs of process 0 alone, and on the CPU each process looks for its own. Python imports this by its name.
"""

import os
import sys
import types

if "launch" not in sys.orig_argv:  # the launcher only starts the others
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["XLA_FLAGS"] = " ".join(os.environ.get(name, "") for name in ("XLA_FLAGS", "TESTS_XLA_FLAGS"))
    from jax._src import compiler

    compiler.distributed = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0, client=None))
