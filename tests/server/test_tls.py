"""A coordinator that encrypts with its own key, and one behind a proxy that an authority vouches for."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import re
import ssl
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.link import JoinLink
from psyche_lightning.protocol.requests import GetTerms, Join
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.server.clock import read_clock
from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import MemoryStore
from psyche_lightning.server.tls import coordinator_context
from psyche_lightning.wire.certificate import is_of, self_signed, server_context
from psyche_lightning.wire.identity import Identity

CONFIG = {"init_min_clients": 2, "total_steps": 9, "global_batch_size_start": 2}
TOKEN = "the owner's"


@contextlib.asynccontextmanager
async def coordinator(**options):
    server = CoordinatorServer(MemoryStore(), token=TOKEN, hosts=["localhost"], **options)
    url = await server.start(port=0)
    owner = CoordinatorAdmin(url, token=TOKEN)
    await asyncio.to_thread(owner.create, "r", CONFIG, by_link=True)
    try:
        yield url, await asyncio.to_thread(owner.link, "r")
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def in_between(url, context, heard):
    """Something that ends TLS with a context of its own, and passes on what it hears."""
    inner = ssl._create_unverified_context() if url.startswith("https") else None
    tasks = set()

    async def pump(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                heard.append(data)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader, writer):
        there, back = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]), ssl=inner)
        for pair in ((reader, back), (there, writer)):
            task = asyncio.ensure_future(pump(*pair))
            tasks.add(task)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()


async def terms(link):
    client = HttpCoordinator(str(link), "r", Identity.generate(), attempts=1)
    try:
        await client.request(Join("", {"run": {}}))
        return await client.request(GetTerms())
    finally:
        await client.close()


def refusal(call, *arguments):
    try:
        call(*arguments)
    except CoordinatorError as error:
        return error.code
    return ""


def test_a_certificate_of_the_coordinator_s_own_key(run):
    async def test():
        async with coordinator(tls=True) as (url, link):
            assert url.startswith("https://127.0.0.1:")
            assert (link.url, len(link.secret)) == (url, 16)
            assert (await terms(link)).config.total_steps == 9
            status = await asyncio.to_thread(CoordinatorAdmin(str(link)).status, "r")
            assert len(status["pending"]) == 1
            assert (await asyncio.to_thread(read_clock, str(link), looks=1, sleep=lambda s: None)).answer_seconds > 0
            # On this machine nobody is in between, so a plain URL suffices, as without encryption.
            assert await asyncio.to_thread(refusal, CoordinatorAdmin(url).status, "r") == ""

    run(test())


def test_nothing_is_said_to_who_has_another_key(run):
    async def test():
        async with coordinator(tls=True) as (url, link):
            heard = []
            async with in_between(url, coordinator_context(Identity.generate()), heard) as port:
                elsewhere = replace(link, url=f"https://127.0.0.1:{port}")
                with pytest.raises(CoordinatorError, match="shows a certificate") as caught:
                    await terms(elsewhere)
                assert caught.value.code == "Untrusted"
                admin = CoordinatorAdmin(str(elsewhere), token=TOKEN)
                assert await asyncio.to_thread(refusal, admin.pause, "r") == "Untrusted"
                assert await asyncio.to_thread(refusal, read_clock, str(elsewhere)) == "Untrusted"
            assert heard == []

    run(test())


def test_a_proxy_that_an_authority_vouches_for(run, tmp_path, monkeypatch):
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(datetime.datetime(2000, 1, 1))
        .not_valid_after(datetime.datetime(2999, 12, 31))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, None)
    )
    (tmp_path / "authority.pem").write_bytes(certificate.public_bytes(Encoding.PEM))

    async def test():
        async with coordinator() as (url, link), in_between(url, server_context(key, certificate), []) as port:
            behind = replace(link, url=f"https://localhost:{port}")
            with pytest.raises(CoordinatorError, match="no authority vouches"):
                await terms(behind)
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
            assert (await terms(behind)).config.total_steps == 9
            assert await asyncio.to_thread(refusal, CoordinatorAdmin(str(behind), token=TOKEN).pause, "r") == ""
            stranger = replace(behind, key=Identity.generate().public)  # the proxy is genuine, what is behind it not
            with pytest.raises(CoordinatorError, match="another coordinator answers"):
                await terms(stranger)

    run(test())


def test_a_certificate_has_the_key_that_it_has():
    one, other = (Ed25519PrivateKey.generate() for _ in range(2))
    data = self_signed(one).public_bytes(Encoding.DER)
    assert is_of(one.public_key().public_bytes_raw(), data)
    assert not is_of(other.public_key().public_bytes_raw(), data)
    assert not any(is_of(one.public_key().public_bytes_raw(), spoilt) for spoilt in (None, b"", data[:-9]))


def test_the_command_encrypts_off_loopback_and_tells_its_key(server_process, monkeypatch, tmp_path):
    monkeypatch.delenv("PSYCHE_COORDINATOR_TOKEN", raising=False)
    for options, beginning in (
        (("--plain", "--host", "0.0.0.0"), "http://0.0.0.0:"),
        (("--tls",), "https://127.0.0.1:"),
    ):
        server = server_process(*options)
        assert server.url.startswith(beginning)
        server.end()
    server = server_process("--host", "0.0.0.0")
    assert server.url.startswith("https://0.0.0.0:")
    told = [server.line() for _ in range(2)][1]
    (text,) = re.findall(r"'(https://ADDRESS:.*)'", told)
    link = JoinLink.parse(text.replace("ADDRESS", "127.0.0.1"))
    token = (server.directory / "owner.token").read_text().strip()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another machine"))
    CoordinatorAdmin(str(link), token=token).create("r", CONFIG)
    assert CoordinatorAdmin(str(link)).status("r")["by_link"] is False
    other = replace(link, key=Identity.generate().public)
    assert refusal(CoordinatorAdmin(str(other), token=token).pause, "r") == "Untrusted"
