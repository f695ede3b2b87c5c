"""Loggers of other libraries that tell at each start what is no concern of the user's."""

from __future__ import annotations

import logging

# A torchao of another torch's time, and bitsandbytes, name the kernels that they do without.
_NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes")


def quiet_loggers() -> None:
    """Silence them but for errors; to be called before they are imported."""
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
