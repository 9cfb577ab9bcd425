"""Conformance kits: test classes that authors of plugins subclass."""

import contextlib

with contextlib.suppress(ImportError):  # the extra "testing" has it; without it there is nothing to rewrite
    import pytest

    # pytest rewrites assertions of test modules alone; a kit's should tell the values, too.
    pytest.register_assert_rewrite(
        *(f"{__name__}.{kit}" for kit in ("coordinators", "data", "models", "network", "peers", "transport"))
    )
