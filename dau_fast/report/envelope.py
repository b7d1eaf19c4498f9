"""DSSE envelopes: a payload, and signatures over it and its type, as JSON that is the same byte by byte.

https://github.com/secure-systems-lab/dsse/blob/master/protocol.md and .../envelope.md. Keys are PEM files,
Ed25519 or elliptic curves, as OpenSSL makes and model-signing takes them; no network is needed.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from dau_fast.errors import UserError

PAYLOAD_TYPE = "application/vnd.in-toto+json"
# More is no statement of ours.
_MOST_BYTES = 64 << 20


def canonical(content: Any) -> bytes:
    """`content` as JSON in the one way that counts here: sorted, without spaces, in ASCII, one line."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def seal(statement: dict[str, Any], key: Path) -> bytes:
    """`statement` in an envelope that the private key in the file `key` signs; UserError for no key."""
    payload = canonical(statement)
    private = _read_key(key, private=True)
    signature = {"keyid": _identify(private.public_key()), "sig": _text(_sign(private, _encode(payload)))}
    return canonical({"payload": _text(payload), "payloadType": PAYLOAD_TYPE, "signatures": [signature]})


def unseal(content: bytes, key: Path) -> dict[str, Any]:
    """The statement in the envelope `content`, every byte of which the public key in `key` vouches for.

    Raises UserError for anything else.
    """
    try:
        if len(content) > _MOST_BYTES:
            raise ValueError("it is too large")
        envelope = json.loads(content)
        if canonical(envelope) != content:
            raise ValueError("it is not written as this program writes it")
        (signature,) = envelope["signatures"]
        payload, signed = _bytes(envelope["payload"]), _bytes(signature["sig"])
        if {*envelope, *signature} != {"payload", "payloadType", "signatures", "keyid", "sig"}:
            raise ValueError("it holds more than a payload and a signature")
        if envelope["payloadType"] != PAYLOAD_TYPE:
            raise ValueError("its payload is no in-toto statement")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"the envelope is damaged: {error}") from error
    public = _read_key(key, private=False)
    if signature["keyid"] != _identify(public):
        raise UserError(f"the envelope was signed by another key than '{key}': give the signer's public key")
    _check_signature(public, signed, _encode(payload))
    statement = json.loads(payload)
    if not isinstance(statement, dict) or canonical(statement) != payload:
        raise UserError("the envelope holds no statement of this program")
    return statement


def _encode(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding of a payload and its type."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _bytes(text: str) -> bytes:
    content = base64.b64decode(text, validate=True)
    if _text(content) != text:  # unused bits of the last letter
        raise ValueError("its base64 is not the usual one")
    return content


# ---- keys


def _read_key(path: Path, *, private: bool) -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
    except ImportError as error:
        raise UserError(
            "signatures need cryptography, which is not installed: pip install 'dau-fast[evidence]'"
        ) from error
    kind = "private" if private else "public"
    try:
        content = path.read_bytes()
        key = load_pem_private_key(content, None) if private else load_pem_public_key(content)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{path}' is no {kind} key in PEM, without a password: {reason}") from error
    curves = (ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey)
    if not isinstance(key, (*curves, ed25519.Ed25519PrivateKey, ed25519.Ed25519PublicKey)):
        raise UserError(f"the key '{path}' is of another kind: expected Ed25519 or an elliptic curve")
    return key


def _identify(public: Any) -> str:
    """SHA-256 of the public key in DER."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    content = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(content).hexdigest()


def _algorithm(key: Any) -> tuple[Any, ...]:
    """What signing and checking take beside the bytes: nothing for Ed25519."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    return (ec.ECDSA(hashes.SHA256()),) if hasattr(key, "curve") else ()


def _sign(private: Any, content: bytes) -> bytes:
    signature: bytes = private.sign(content, *_algorithm(private))
    return signature


def _check_signature(public: Any, signature: bytes, content: bytes) -> None:
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(signature, content, *_algorithm(public))
    except InvalidSignature as error:
        raise UserError("the signature does not fit the statement: one of the two was changed") from error
