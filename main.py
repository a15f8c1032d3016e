"""Find a lottery ticket, convert it to block-sparse layers, and measure whether it is faster."""

import os
import signal
import sys


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 done, 1 failed, 2 wrong flags, 130 interrupted, 141 nobody reads on."""
    from sparse_lth.program import command

    return command.main(argv)


def run_as_program() -> int:
    """main, in a process of its own: no interrupt, pipe or encoding ends in a traceback."""
    # importing torch takes a second or more, and an interrupt leaves nothing to clean up
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")
    import sparse_lth.program.command  # noqa: F401

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main()
    except SystemExit as exit:
        status = exit.code
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # of stderr
        status = 141
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own end has tracebacks, too
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:  # nobody reads on, or the disk is full; Python would try again, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = status or 141
    return status


if __name__ == "__main__":
    sys.exit(run_as_program())
