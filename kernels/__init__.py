"""Operations with a readable reference and faster versions beside it.

Each operation is a package: ``reference.py`` (plain fp32 array code, the meaning of the operation),
``array.py`` (array code for any device), ``source.py`` with ``metal.py`` and ``cuda.py`` (one
kernel body, two compilers), and ``dispatch.py`` (which version serves a request, and why).
Importing this package compiles nothing.

An implementation is what the hook `register_kernels` offers under ``operation/implementation``: an
object, usually the module that holds it. All of these attributes are optional:

- ``why_not_here() -> str | None``: why the default device cannot run it; not there: it can.
- ``by_default() -> bool``: whether ``auto`` runs it here; not there: it does not. A kernel that has
  not been timed on a device says False there, and runs where it is named.
- ``STOCK``: True for the one that ``off`` means, if ``off`` means an implementation at all.
- ``why_not_for(target: TargetInfo) -> str | None``: why a target has no use for the operation;
  `bench --ablate` leaves it out then.
- ``checks() -> Iterable[Check]``: its parity checks (`draftloom.kernels.check`) on the default
  device, made of shapes that it supports, odd lengths and masks among them; ``doctor --self-test``
  runs them and turns off what fails. They live beside the kernel (``<op>/checks.py``) and take
  about a second together.

What a component calls is the operation's own business. It learns what was chosen from
`KernelSettings` (`Tunable.tune`, `BindContext.kernels`): ``auto`` must then run what `by_default`
says.
"""

__all__: list[str] = []
