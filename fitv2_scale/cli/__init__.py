"""The command line, a file a command: ``add`` declares it, the functions behind it call the part that knows.

Heavy imports (torch) stand inside the functions that need them: `fitv2 --help` answers at once.
"""
