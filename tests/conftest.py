"""Runs before any test module is imported: the environment JAX reads, and shape checks of annotated functions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# JAX reads these once, when it is imported. Tests run on the CPU unless told otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Tests compile thousands of programs and run each a few times: three quarters of the compiler's time would go to speed that nobody sees.
# XLA passes over an extra option that it does not know. Processes that tests start read the flags by this name (tests/processes).
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["TESTS_XLA_FLAGS"] = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
# Eight devices for what is sharded; everything else runs on the first.
devices = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), os.environ["TESTS_XLA_FLAGS"], devices])
# Triton kernels run in its interpreter, chosen when a kernel's module is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Nothing is downloaded in a test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping

# Shapes and dtypes of annotated arguments and results are checked at run time, in tests only, in the rooms that handle arrays.
SHAPE_CHECKED = (
    "mllmrec_jax.data.group_batch",
    "mllmrec_jax.model",
    "mllmrec_jax.generate",
    "mllmrec_jax.rewards",
    "mllmrec_jax.objectives",
    "mllmrec_jax.train",
    # Not the Triton files: the hook would wrap a kernel, and Triton compile it with the wrapper's globals.
    "mllmrec_kernels.logprob_kl.api",
)
_ = jaxtyping.install_import_hook(SHAPE_CHECKED, "beartype.beartype")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the public data sets (MLLMREC_SHARED_DATA, else ../shared/data beside the clone); skips where there is none."""
    folder = Path(os.environ.get("MLLMREC_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set MLLMREC_SHARED_DATA")
    return folder
