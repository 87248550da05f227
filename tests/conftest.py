"""Settings of the whole test run: hypothesis profiles, threads, seeds, the `cuda` marker."""

import gc
import os
import random
import tempfile
from collections.abc import Iterator

# Read when torch and transformers are imported, here and in the processes that tests start: tests
# run in parallel processes of one thread each and build every model from a config.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Rates that are measured beside other tests are of no use to anybody else.
os.environ.setdefault("FXCKPT_CACHE_DIR", tempfile.mkdtemp(prefix="fxckpt-tests-"))

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# No deadline and no complaint about slow generation: an example may build and trace a whole model.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=25, **_COMMON)
settings.register_profile("ci", max_examples=50, derandomize=True, print_blob=True, **_COMMON)
settings.register_profile("thorough", max_examples=1000, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seeds every generator, so that a test alone sees what it sees among others."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    # What is imported of torch's own tests switches off assignments to torch.backends.
    # (`torch.backends` is not the module that its functions were defined in.)
    flags = torch.backends.flags_frozen.__globals__
    flags["__allow_nonbracketed_mutation_flag"] = True
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def others_frozen() -> Iterator[None]:
    """The collector passes over what there was before: it takes no time after hundreds of tests."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Lists and counts what ran eagerly, as tests say it of themselves."""
    reports = terminalreporter.getreports("passed")
    found = [text for r in reports for key, text in r.user_properties if key == "runs eagerly"]
    if found:
        terminalreporter.section(f"{len(found)} operations run eagerly")
        terminalreporter.write_line("\n".join(sorted(found)))
