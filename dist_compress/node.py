"""`python -m dist_compress.node +recipe=resnet_prune ...`: the ranks of this machine in a run on several ones.

What launch/multinode starts. Where and how many is in the environment: NNODES, MASTER_ADDR, and, if wanted,
MASTER_PORT, NPROC_PER_NODE, RUN_ID, JOIN_TIMEOUT_S.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping

from dist_compress.errors import UserError

_EXAMPLE = "NNODES=2 MASTER_ADDR=10.0.0.1 launch/multinode +recipe=resnet_prune run_dir=FOLDER"


def main(arguments: list[str], environ: Mapping[str, str] = os.environ) -> int:
    """Start torchrun for this machine, and wait. Exit code: 0; 1 when ranks failed; 2 for what the user can mend."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    try:
        options = torchrun_options(environ)
        torchrun([*options, "-m", "dist_compress", *arguments])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RendezvousError as error:
        print(f"error: {not_met(environ)} ({type(error).__name__}: {error})", file=sys.stderr)
        return 2
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def torchrun_options(environ: Mapping[str, str]) -> list[str]:
    """Raises UserError for what is missing or fits not together."""
    missing = [name for name in ("NNODES", "MASTER_ADDR") if not environ.get(name)]
    if missing:
        raise UserError(
            f"{' and '.join(missing)}: not set. Give the number of machines and the address of one of them, the same "
            f"on each: {_EXAMPLE}"
        )
    nodes, ranks = _number(environ, "NNODES", ""), _number(environ, "NPROC_PER_NODE", "1")
    port, timeout_s = _number(environ, "MASTER_PORT", "29400"), _number(environ, "JOIN_TIMEOUT_S", "600")
    head = environ["MASTER_ADDR"]
    if ":" in head.strip("[]") and not head.startswith("["):
        raise UserError(f"MASTER_ADDR={head}: an address without a port, which is MASTER_PORT; an IPv6 address in [].")
    if port > 65535:
        raise UserError(f"MASTER_PORT={port}: a port is at most 65535.")
    if "WORLD_SIZE" in environ:
        raise UserError("WORLD_SIZE is set: this is a rank of another torchrun. Start launch/multinode by itself.")
    return [
        f"--nnodes={nodes}",
        f"--nproc-per-node={ranks}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={head}:{port}",
        f"--rdzv-id={environ.get('RUN_ID') or 'none'}",
        f"--rdzv-conf=join_timeout={timeout_s},read_timeout={timeout_s}",
    ]


def not_met(environ: Mapping[str, str]) -> str:
    """What to check when the machines did not come together."""
    nodes, head = environ["NNODES"], environ["MASTER_ADDR"]
    port, timeout_s = environ.get("MASTER_PORT", "29400"), environ.get("JOIN_TIMEOUT_S", "600")
    return (
        f"The {nodes} machines of NNODES did not come together in {timeout_s} s; this is {socket.gethostname()}. Check "
        f"that the same command was started on each of the {nodes}, with the same NNODES, MASTER_ADDR, MASTER_PORT and "
        f"RUN_ID; that MASTER_ADDR={head} is the address of one of them, as that machine itself knows it; that each "
        f"reaches port {port} there (nc -vz {head} {port}). If they only start late, raise JOIN_TIMEOUT_S"
    )


def _number(environ: Mapping[str, str], name: str, default: str) -> int:
    text = environ.get(name) or default
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"{name}={text}: a whole number of at least 1 is needed. For example: {_EXAMPLE}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
