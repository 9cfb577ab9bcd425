"""Sends the spans of rounds where OpenTelemetry's own variables say."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from psyche_lightning.errors import ConfigError

logger = logging.getLogger(__name__)

ADDRESSES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Export spans by OTLP over HTTP while the block runs, if a variable has an address for them.

    Raises:
        ConfigError: it has, and OpenTelemetry is not installed.
    """
    name = next((name for name in ADDRESSES if os.environ.get(name)), None)
    if name is None:
        yield
        return
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"{name} asks for traces, and {error.name or 'OpenTelemetry'} is not installed. Install it with "
            f"`pip install 'psyche-lightning[otel]'`, or unset {name}."
        ) from error
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):  # else this program has set up its own
        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "psyche"}
        provider = TracerProvider(resource=Resource.create(named))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(provider)
        logger.info("traces of rounds go where %s says", name)
    try:
        yield
    finally:
        provider.force_flush()
