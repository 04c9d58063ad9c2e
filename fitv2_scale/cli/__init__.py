"""The command line, one file per command: ``add`` declares it, the function behind it calls the room that does it.

Heavy imports (torch) are inside the functions that need them: `fitv2 --help` answers at once.
"""
