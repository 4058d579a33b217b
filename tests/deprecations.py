"""What PyTorch, transformers or timm call deprecated fails the test that meets it: `pytest -p tests.deprecations`.

`make versions` does so with the newest versions. They say it by warnings, and transformers also in its log, where each
line comes once in a process.
"""

from __future__ import annotations

import logging
import re

import pytest

# Of packages that the tests use and the library does not, or of one upstream package to another: nothing we could mend.
FOREIGN = [
    "ignore:__array__ implementation:DeprecationWarning",  # PyTorch to NumPy
    "ignore:.torch.jit.(trace|script|save|load)[a-z_]*. is (deprecated|not supported):FutureWarning",  # in tests
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",  # in tests
    "ignore:torch.quantize_per_tensor:UserWarning",  # of that
    "ignore:Using a non-tuple sequence:UserWarning",  # timm to PyTorch
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",  # PEFT to transformers
    "ignore:Use 'content=:DeprecationWarning",  # huggingface_hub to httpx
]
_TOLD = re.compile(r"deprecat|will be removed|removed in (a future|version|v?\d)", re.I)
_LOGS = ("torch", "torchvision", "transformers", "timm", "tokenizers", "huggingface_hub")


class Deprecated(logging.Handler):
    """Raise where a log says that something is deprecated."""

    def emit(self, record: logging.LogRecord) -> None:
        if _TOLD.search(record.getMessage()):
            raise DeprecationWarning(f"{record.name}: {record.getMessage()}")


def pytest_configure(config: pytest.Config) -> None:
    for category in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"error::{category}")
    config.addinivalue_line("filterwarnings", "error:(?i).*deprecated:UserWarning")
    for line in FOREIGN:
        config.addinivalue_line("filterwarnings", line)
    handler = Deprecated(logging.WARNING)
    for name in _LOGS:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        config.add_cleanup(lambda logger=logger: logger.removeHandler(handler))
