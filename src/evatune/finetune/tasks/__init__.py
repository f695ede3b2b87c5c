"""Domains of fine-tuning tasks. To add one: a file or folder beside these, and a line here."""

from __future__ import annotations

from evatune.errors import ConfigError
from evatune.finetune.tasks.base import DataSource, Domain, ModelKind, Part, Task
from evatune.utils.extras import extras

with extras(__name__):
    from evatune.finetune.tasks import generation, images, rl, understanding

_MODULES = (generation, understanding, images, rl)
DOMAINS: dict[str, Domain] = {module.DOMAIN.name: module.DOMAIN for module in _MODULES}


def find_domain(name: str) -> Domain:
    """Return a domain by its name. ConfigError for one that does not exist."""
    if name not in DOMAINS:
        raise ConfigError(f"domain is {name!r}; choose one of {', '.join(DOMAINS)}")
    return DOMAINS[name]


__all__ = ["DOMAINS", "DataSource", "Domain", "ModelKind", "Part", "Task", "find_domain"]
