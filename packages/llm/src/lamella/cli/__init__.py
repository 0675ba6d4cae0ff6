"""The command ``lamella``: generate, bench, doctor, check. Results go to stdout, everything else to stderr."""
