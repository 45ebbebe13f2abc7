"""Operations with a readable reference and faster versions beside it.

Each operation is a package: ``reference.py`` (plain fp32 array code, the meaning of the operation),
``array.py`` (array code for any device), ``source.py`` with ``metal.py`` and ``cuda.py`` (one
kernel body, two compilers), and ``dispatch.py`` (which version serves a request, and why).
Importing this package compiles nothing.
"""

__all__: list[str] = []
