from .stand_in import machine  # noqa: F401 - a fixture
