"""The libraries that fastce meets are not its dependencies: is one here, and is it new enough?"""

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


def require(extra, module, package, at_least):
    """Raise ImportError unless `module`, of the distribution `package`, can be imported and is new enough.

    It is looked for, not imported: most of what is done for a library needs none of its code.
    """
    remedy = f'pip install "fastce[{extra}]"'
    if find_spec(module) is None:
        raise ImportError(f"fastce.integrations.{extra} needs {package}>={at_least}, which is not installed: {remedy}")
    try:
        installed = version(package)
    except PackageNotFoundError:  # installed under another name, which says nothing about its age
        return
    if numbers(installed) < numbers(at_least):
        raise ImportError(f"fastce.integrations.{extra} needs {package}>={at_least}, got {installed}: {remedy}")


def numbers(text):
    """Return the first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
