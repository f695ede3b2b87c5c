"""`evatune methods`."""

from __future__ import annotations

import json

from evatune.finetune.methods import METHODS
from tests.conftest import Command


def test_every_method_is_listed_with_what_it_does(command: Command) -> None:
    shown = command("methods")
    assert shown.status == 0
    for method in METHODS.values():
        assert 0 < len(method.about) <= 80
        assert any(
            line.split()[:1] == [method.name] and method.about in line and method.source in line
            for line in shown.out.splitlines()
        )
    facts = json.loads(command("methods", "--json").out)["methods"]
    assert [fact["name"] for fact in facts] == list(METHODS)
