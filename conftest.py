"""What holds for the tests of the package and of its plugins."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No test asserts a wall-clock time: an example that takes long on a busy machine is no failure.
settings.register_profile("psyche", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("psyche")
