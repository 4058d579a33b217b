"""The emulation finds what a GPU would only sometimes show."""

import pytest

pytestmark = pytest.mark.slow

ERRORS = {
    1: "access of 4 bytes",
    2: "uninitialised",
    3: "not aligned",
    4: "race of a",
    5: "race of a",
    6: "asynchronous copy that was not waited for",
    7: "write over an asynchronous copy",
    8: "others wait in line",
    9: "wait for ever",
    10: "wait",
    11: "ends with asynchronous copies",
    12: "global memory: an address is not aligned to 8",
}


def test_a_kernel_without_errors_runs(built):
    for reverse in (0, 1):
        built.device.set_reversed(reverse)
        assert built.device.run_faulty(0) == b""
    built.device.set_reversed(0)


@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("error", ERRORS)
def test_errors_are_found(built, error, reverse):
    built.device.set_reversed(reverse)
    found = built.device.run_faulty(error).decode()
    built.device.set_reversed(0)
    assert ERRORS[error] in found
    assert built.device.run_faulty(0) == b""  # and leave nothing behind
