"""A CA of our own, and one certificate for the names of fal that the upstream answers to."""

from pathlib import Path

import trustme

NAMES = ("queue.fal.run", "fal.run", "rest.fal.ai", "fal.ai")


def write_certificates(folder: Path) -> None:
    """ca.pem, server.pem (with its chain) and server.key, for P-256 as fal's own."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    server = authority.issue_cert(*NAMES)
    server.private_key_pem.write_to_path(str(folder / "server.key"))
    for position, blob in enumerate(server.cert_chain_pems):
        blob.write_to_path(str(folder / "server.pem"), append=position > 0)
