"""The C++ twins' shared library: :mod:`.loader` finds and loads it; each family's ``native.py`` calls into it."""
