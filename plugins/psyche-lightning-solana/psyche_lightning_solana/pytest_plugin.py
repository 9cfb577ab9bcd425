"""Keeps quiet what anchorpy brings into every pytest run; ``pytest_xprocess.py`` says why it is there."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """pytest-asyncio warns of an option that is not set, which ends a run that takes warnings for errors."""
    early_config.addinivalue_line(
        "filterwarnings", 'ignore:The configuration option "asyncio_default_fixture_loop_scope" is unset'
    )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """pytest-xprocess reminds, with ``-v``, of processes to end, also where no test started one."""
    plugins = session.config.pluginmanager
    if plugins.hasplugin("xprocess") and not hasattr(session.config, "_xprocess"):
        plugins.unregister(name="xprocess")
