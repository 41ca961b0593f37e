"""TLS contexts for nodes that know each other by key: no names, no authorities, no resumption."""

from __future__ import annotations

import ssl
import tempfile
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ..errors import BadProof
from ..identity import check_public_key

ALPN = "shoal/tls/1"


def server_context(transport_secret: bytes) -> ssl.SSLContext:
    """Shows a self-signed certificate of the node's transport key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # every connection is a full handshake
    context.set_alpn_protocols([ALPN])
    with tempfile.TemporaryDirectory() as folder:  # load_cert_chain takes files only; mode 0700
        path = Path(folder) / "node.pem"
        path.write_bytes(_certificate_and_key(transport_secret))
        context.load_cert_chain(path)
    return context


def client_context() -> ssl.SSLContext:
    """Checks no chain: `presented_key` says who answered, and OpenSSL that it holds the key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([ALPN])
    return context


def check_protocol(tls: ssl.SSLObject) -> None:
    """Raise BadProof unless both sides agreed on ours: ssl itself lets a mismatch of ALPN pass."""
    if tls.version() != "TLSv1.3" or tls.selected_alpn_protocol() != ALPN:
        raise BadProof("the other side does not speak our protocol")


def presented_key(tls: ssl.SSLObject) -> bytes:
    """The Ed25519 key (32 bytes) of the other side's certificate. Raises BadProof."""
    try:
        certificate = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")
        key = certificate.public_key()
    except ValueError:
        raise BadProof("the other side's certificate cannot be read") from None
    if not isinstance(key, Ed25519PublicKey):
        raise BadProof("the other side's certificate has no Ed25519 key")
    return check_public_key(key.public_bytes_raw())


def _certificate_and_key(transport_secret: bytes) -> bytes:
    """PEM. The same secret gives the same bytes: no names, fixed dates."""
    key = Ed25519PrivateKey.from_private_bytes(transport_secret)
    nobody = x509.Name([])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(nobody)
        .issuer_name(nobody)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime(2020, 1, 1))
        .not_valid_after(datetime(9999, 12, 31, 23, 59, 59))
        .sign(key, None)
    )
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ) + certificate.public_bytes(serialization.Encoding.PEM)
