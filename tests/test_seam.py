"""The seam between Python and the native kernels: what is stated on both sides is the same."""

from __future__ import annotations

from typing import Any

import pytest

from sam_fast import backends
from sam_fast.backends.native import DTYPE_CODES, FIELDS
from sam_fast.steps import RULES, Rule


def modules() -> list[Any]:
    return [module for module in (backends.cpu._cpu, backends.cuda._cuda) if module is not None]


def test_struct_bucket_has_the_fields_that_python_fills() -> None:
    if backends.cpu._cpu is None:
        pytest.skip("the native module was not built")
    assert backends.cpu._cpu.bucket_fields == FIELDS
    assert list(DTYPE_CODES.values()) == list(range(4))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_every_rule_has_the_options_and_states_of_its_kernel(rule: Rule) -> None:
    for module in modules():
        _, options, states, counts = module.steps[rule.name]
        assert (options, states) == (rule.options, rule.states)
        assert counts is (rule.counter is not None)
    assert rule.options[0] == "lr"
    assert "maximize" in rule.options


def test_every_kernel_has_a_rule() -> None:
    for module in modules():
        assert set(module.steps) == {rule.name for rule in RULES}


def test_no_class_has_two_rules() -> None:
    classes = [cls for rule in RULES for cls in rule.classes]
    assert len(classes) == len(set(classes))
