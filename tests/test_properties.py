"""Random optimizers and random sequences of calls, compared after every call with a slow model of the optimizer
(model_of_sam.py).

The profile ``ci`` (the default) tries 300 sequences, ``nightly`` 10,000, a number that many:
``SAM_FAST_HYPOTHESIS=nightly python -m pytest tests/test_properties.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
from followed_run import Run
from hypothesis import given
from hypothesis import strategies as st
from random_optimizers import optimizers, profile, specs
from torch import nn

from sam_fast import SAM

calls = st.one_of(
    *(
        st.tuples(st.just(name))
        for name in ("first_step", "first_step", "first_step", "second_step", "second_step", "second_step")
    ),
    *(
        st.tuples(st.just(name))
        for name in ("step", "restore", "save_and_load", "deepcopy", "pickle", "raise_in_second_pass")
    ),
    st.tuples(
        st.just("gradients"),
        st.integers(0, 99),
        st.sampled_from(["all", "all", "some", "none", "zero", "inf", "nan", "layout"]),
    ),
    st.tuples(st.just("gradients"), st.integers(0, 99), st.sampled_from(["all", "some"])),
    st.tuples(st.just("zero_grad"), st.booleans()),
    st.tuples(st.just("closure"), st.integers(0, 99), st.sampled_from([0, 0, 1, 2])),
    st.tuples(st.just("freeze"), st.integers(0, 8)),
    st.tuples(st.just("other_memory"), st.integers(0, 8)),
    st.tuples(st.just("add_group"), specs),
    st.tuples(
        st.just("option"),
        st.integers(0, 2),
        st.sampled_from([("lr", 0.02), ("rho", 0.7), ("perturb", True), ("perturb", False), ("adaptive", True)]),
    ),
)


@pytest.mark.guarantee(id="restore")
@pytest.mark.guarantee(id="addresses")
@pytest.mark.guarantee(id="one-state")
@profile
@given(made=optimizers(), sequence=st.lists(calls, min_size=6, max_size=20))
def test_every_call_does_what_the_model_does(
    made: tuple[SAM, list[nn.Parameter]], sequence: list[tuple[Any, ...]]
) -> None:
    Run(*made).follow(sequence)
