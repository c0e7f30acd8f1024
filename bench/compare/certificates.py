"""A private CA, and one certificate for the host names of fal."""

from pathlib import Path

import trustme

NAMES = ("queue.fal.run", "fal.run", "rest.fal.ai", "fal.ai")


def write_certificates(folder: Path) -> None:
    """Write ca.pem, server.pem (with its chain) and server.key, with P-256 keys like fal's."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    server = authority.issue_cert(*NAMES)
    server.private_key_pem.write_to_path(str(folder / "server.key"))
    for position, blob in enumerate(server.cert_chain_pems):
        blob.write_to_path(str(folder / "server.pem"), append=position > 0)
