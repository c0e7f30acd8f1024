"""Errors of the operating system in words for people who run the proxy."""

import errno
import os

REASONS = {
    errno.EACCES: "this user has no permission",
    errno.EPERM: "this user has no permission",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.ENOENT: "there is no such file or folder",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "there is a file of this name",
    errno.EISDIR: "there is a folder of this name",
    errno.EIO: "the disk has an error",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open",
    errno.EADDRINUSE: "another program uses it",
    errno.EADDRNOTAVAIL: "it is not an address of this machine",
    errno.ECONNREFUSED: "nothing listens there",
    errno.ECONNRESET: "the connection was closed",
    errno.EHOSTUNREACH: "the network has no way to it",
    errno.ENETUNREACH: "the network has no way to it",
    errno.ETIMEDOUT: "it did not respond in time",
}


def describe_os_error(error: OSError) -> str:
    """Return the reason of an error, without a number or a path."""
    code = error.errno or 0
    return REASONS.get(code) or (os.strerror(code).lower() if code > 0 else "it is not known")
