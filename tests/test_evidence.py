"""Signed statements of finished runs: an honest folder is confirmed, and every changed byte is found."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import Called, call, contents, succeed

from dau_fast.__main__ import main
from dau_fast.errors import UserError
from dau_fast.job.ledger import append_entry, read_entries
from dau_fast.report.envelope import canonical, seal, unseal
from dau_fast.report.manifest import ENVELOPE, OPENING
from dau_fast.report.statement import NOT_PROVEN, commit, describe_measures

pytest.importorskip("cryptography")


def command(*arguments: object) -> Called:
    """Run `python -m dau_fast ARGUMENTS` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["dau-fast", *map(str, arguments)])
        patch.setenv("COLUMNS", "400")
        try:
            main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        finally:
            torch.set_flush_denormal(False)
    return Called(code, out.getvalue(), err.getvalue(), Path())


Keys = tuple[Path, Path]


def make_keys(folder: Path, kind: str) -> Keys:
    """A private and a public key in PEM files."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    key: Any = {
        "ed25519": ed25519.Ed25519PrivateKey.generate,
        "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
    }[kind]()
    private, public = folder / f"{kind}.key", folder / f"{kind}.pub"
    private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture(scope="module")
def keys(place: Path) -> Keys:
    return make_keys(place, "ed25519")


@pytest.fixture(scope="module")
def attested(place: Path, keys: Keys) -> Path:
    """A folder with its evidence; the ledger stands beside it."""
    run = succeed(place / "attested", "--epochs", 1, "--methods", "ft,retrain", "--forget", "class:3")
    ledger = place / "ledger.jsonl"
    found = command(
        "attest", run.folder, "--key", keys[0], "--request-id", "R-7", "--method", "ft", "--ledger", ledger
    )
    assert found.code == 0, found.stderr
    return run.folder


def verified(folder: Path, keys: Keys, *arguments: object) -> Called:
    return command("verify", folder, "--key", keys[1], "--device", "cpu", *arguments)


# ---- an honest folder


def test_an_honest_folder_is_confirmed(attested: Path, keys: Keys, place: Path) -> None:
    before = contents(attested)
    found = verified(attested, keys, "--ledger", place / "ledger.jsonl")
    assert (found.code, found.stderr) == (0, "")
    lines = found.stdout.splitlines()
    assert len([line for line in lines if line.startswith("confirmed: ")]) == 6
    assert "rates of 3 models, measured again, differ by 0.000 points at most" in found.stdout
    assert contents(attested) == before


def test_the_statement_is_one_of_in_toto_and_says_what_it_does_not_prove(attested: Path, keys: Keys) -> None:
    statement = unseal((attested / ENVELOPE).read_bytes(), keys[1])
    report = json.loads((attested / "report.json").read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert [subject["name"] for subject in statement["subject"]] == ["original.safetensors", "ft.safetensors"]
    for subject in statement["subject"]:
        content = (attested / subject["name"]).read_bytes()
        assert subject["digest"] == {"sha256": hashlib.sha256(content).hexdigest()}
    predicate = statement["predicate"]
    assert predicate["request"]["id"] == "R-7"
    assert predicate["doesNotProve"] == list(NOT_PROVEN)
    assert predicate["forgetSet"]["count"] == report["run"]["forget"]["count"]
    low, high = predicate["measures"]["ft"]["ra"]["interval95"]
    assert low <= predicate["measures"]["ft"]["ra"]["percent"] <= high
    assert set(predicate["kept"]) == {*report["files"], "report.json"}
    assert predicate["code"]["digest"]["sha256"] == report["run"]["digests"]["code"]


def test_the_statement_does_not_tell_the_forget_set(attested: Path, keys: Keys) -> None:
    payload = base64.b64decode(json.loads((attested / ENVELOPE).read_text())["payload"]).decode()
    report = json.loads((attested / "report.json").read_text())
    assert report["run"]["forget"]["sha256"] not in payload
    assert "class:3" not in payload
    opened = json.loads((attested / OPENING).read_text())
    assert opened["indices"] == report["run"]["forget"]["indices"]
    value = json.loads(payload)["predicate"]["forgetSet"]["commitment"]["value"]
    assert value == commit(opened["indices"], bytes.fromhex(opened["salt"]))
    assert value != commit(opened["indices"], b"")


def test_a_commitment_is_the_hash_of_salt_and_indices() -> None:
    by_hand = hashlib.sha256(b"salt" + b"\2" + bytes(7) + b"\0\1" + bytes(6)).hexdigest()
    assert commit([2, 256], b"salt") == by_hand


def test_intervals_are_those_of_wilson() -> None:
    entry = {"ua": 10.0, "ra": 100.0, "ta": None, "mia_efficacy": 0.0, "avg_gap": 1.0, "attacks": {}}
    sets = {"forget": 10, "retain": 50, "test": 0}
    found = describe_measures({"run": {"sets": sets}, "methods": {"ft": entry}, "runs": None})["ft"]
    assert found["ua"]["interval95"] == pytest.approx([1.788, 40.415], abs=0.01)  # R's binom.confint
    assert found["ra"]["interval95"][1] == 100
    assert found["ta"] == {"percent": None, "interval95": None}


def test_an_attested_folder_is_not_written_to(attested: Path, keys: Keys) -> None:
    before = contents(attested)
    called = call(attested)
    assert called.code == 2
    assert "holds a run that is attested" in called.stderr
    again = command("attest", attested, "--key", keys[0], "--request-id", "R-8", "--method", "ft")
    assert again.code == 2
    assert "has its evidence already" in again.stderr
    assert contents(attested) == before


# ---- changed ones


def test_every_changed_byte_is_found(attested: Path, keys: Keys, place: Path, tmp_path: Path) -> None:
    """Of files and evidence, one at a time; nothing is measured, as that comes after all of this."""
    folder, chance = tmp_path / "copy", random.Random(0)
    shutil.copytree(attested, folder)
    ledger = tmp_path / "ledger.jsonl"
    shutil.copy(place / "ledger.jsonl", ledger)
    files = [*sorted(folder.iterdir()), ledger]
    assert verified(folder, keys, "--no-measure", "--ledger", ledger).code == 0
    for number in range(60):
        file = files[number % len(files)]
        content = file.read_bytes()
        changed = bytearray(content)
        changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(changed)
        found = verified(folder, keys, "--no-measure", "--ledger", ledger)
        assert found.code != 0, file
        assert found.stderr.count("\n") == 1
        if file.suffix in (".safetensors", ".html") or file.name == "report.json":
            assert file.name in found.stderr
        file.write_bytes(content)
    assert verified(folder, keys, "--no-measure", "--ledger", ledger).code == 0


@pytest.mark.slow
def test_a_thousand_changed_bytes_are_found(
    attested: Path, keys: Keys, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dau_fast.commands.verify import verify

    folder, chance = tmp_path / "copy", random.Random(1)
    shutil.copytree(attested, folder)
    ledger = tmp_path / "ledger.jsonl"
    shutil.copy(place / "ledger.jsonl", ledger)
    files = [*sorted(folder.iterdir()), ledger]
    arguments = [str(folder), "--key", str(keys[1]), "--no-measure", "--ledger", str(ledger)]

    def check() -> None:
        with redirect_stdout(io.StringIO()):
            verify.main(arguments, standalone_mode=False)

    check()
    for number in range(1000):
        file = files[number % len(files)]
        content = file.read_bytes()
        changed = bytearray(content)
        changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(changed)
        with pytest.raises(UserError):
            check()
        file.write_bytes(content)
    check()


def test_a_capital_digit_of_the_salt_is_found(attested: Path, keys: Keys, tmp_path: Path) -> None:
    """Which opens the commitment as the small one does."""
    folder = tmp_path / "copy"
    shutil.copytree(attested, folder)
    content = (folder / OPENING).read_bytes()
    salt = json.loads(content)["salt"].encode()
    assert salt.upper() != salt
    (folder / OPENING).write_bytes(content.replace(salt, salt.upper()))
    assert "does not open the commitment" in verified(folder, keys, "--no-measure").stderr


def test_numbers_that_are_not_those_of_the_models_are_refuted(
    attested: Path, keys: Keys, tmp_path: Path
) -> None:
    """A signer who lies: every byte is as signed, and the report tells of another model."""
    folder = tmp_path / "lie"
    shutil.copytree(attested, folder)
    for name in (ENVELOPE, OPENING):
        (folder / name).unlink()
    report = json.loads((folder / "report.json").read_text())
    report["methods"]["ft"]["ra"] -= 1.0
    (folder / "report.json").write_text(json.dumps(report))
    assert command("attest", folder, "--key", keys[0], "--request-id", "x", "--method", "ft").code == 0
    found = verified(folder, keys)
    assert found.code == 2
    assert found.stderr.startswith("error: refuted: ra of ft is ")
    assert verified(folder, keys, "--tolerance", 2).code == 0


def test_other_data_are_refuted(attested: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dau_fast.job.verification.digest_images", lambda _: "0" * 64)
    found = verified(attested, keys)
    assert found.stderr.startswith("error: refuted: the data are others")


def test_another_key_does_not_vouch(attested: Path, place: Path, tmp_path: Path) -> None:
    found = verified(attested, make_keys(tmp_path, "ed25519"))
    assert found.code == 2
    assert "was signed by another key" in found.stderr


# ---- envelopes and keys


@pytest.mark.parametrize("kind", ["ed25519", "p256"])
def test_an_envelope_opens_with_its_key_alone(kind: str, tmp_path: Path) -> None:
    private, public = make_keys(tmp_path, kind)
    content = seal({"a": [1, "\u00fc"]}, private)
    assert unseal(content, public) == {"a": [1, "\u00fc"]}
    assert content == canonical(json.loads(content))


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "payload": lambda e: e.update(payload=base64.b64encode(b'{"a":2}\n').decode()),
    "type": lambda e: e.update(payloadType="text/plain"),
    "no signature": lambda e: e.update(signatures=[]),
    "twice": lambda e: e.update(signatures=e["signatures"] * 2),
    "more": lambda e: e.update(more=1),
    "signature": lambda e: e["signatures"][0].update(sig=base64.b64encode(bytes(64)).decode()),
    "padding": lambda e: e["signatures"][0].update(sig=e["signatures"][0]["sig"].replace("==", "")),
    "key": lambda e: e["signatures"][0].update(keyid="0" * 64),
    "kinds": lambda e: e.update(payload=3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_envelope_is_refused(change: str, tmp_path: Path) -> None:
    private, public = make_keys(tmp_path, "ed25519")
    envelope = json.loads(seal({"a": 1}, private))
    CHANGES[change](envelope)
    with pytest.raises(UserError):
        unseal(canonical(envelope), public)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff", b'{"payload": 1}'])
def test_what_is_no_envelope_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the envelope is damaged"):
        unseal(content, make_keys(tmp_path, "ed25519")[1])


def test_keys_of_other_kinds_are_refused(tmp_path: Path) -> None:
    private, public = make_keys(tmp_path, "rsa")
    with pytest.raises(UserError, match="expected Ed25519 or an elliptic curve"):
        seal({}, private)
    with pytest.raises(UserError, match="is no private key in PEM"):
        seal({}, public)
    with pytest.raises(UserError, match="is no private key in PEM"):
        seal({}, tmp_path / "absent")


# ---- the ledger


def test_lines_of_a_ledger_follow_one_another(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    for number in range(4):
        append_entry(path, {"request": str(number)})
    assert [entry["request"] for entry in read_entries(path)] == ["0", "1", "2", "3"]
    lines = path.read_bytes().splitlines(keepends=True)
    without, swapped = [lines[0], *lines[2:]], [lines[1], lines[0], *lines[2:]]
    for broken in (lines[1:], without, swapped, [*lines[:3], lines[3][:-1]]):
        path.write_bytes(b"".join(broken))
        with pytest.raises(UserError, match=r"of the ledger '.*' was changed"):
            read_entries(path)
        with pytest.raises(UserError, match="was changed"):
            append_entry(path, {"request": "more"})
        assert path.read_bytes() == b"".join(broken)
