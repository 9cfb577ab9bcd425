"""Silences anchorpy's plugins in every pytest run; ``pytest_xprocess.py`` explains their presence."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Ignore pytest-asyncio's warning of an unset option, which ends runs that treat warnings as errors."""
    early_config.addinivalue_line(
        "filterwarnings", 'ignore:The configuration option "asyncio_default_fixture_loop_scope" is unset'
    )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With ``-v``, pytest-xprocess lists processes to end, even if no test started one."""
    plugins = session.config.pluginmanager
    if plugins.hasplugin("xprocess") and not hasattr(session.config, "_xprocess"):
        plugins.unregister(name="xprocess")
