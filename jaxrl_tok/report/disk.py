"""Disks that are full: one line, and an exit status that says: try again.

A run whose disk is full stops. What it has written stays as it is: rows up to
the last whole one, and every checkpoint but the one that was being written.
"""

import contextlib
import errno
import os

FULL = errno.ENOSPC, errno.EDQUOT  # of a disk, of a user's share of it


def is_full(error: BaseException | None) -> bool:
  """Tells whether an error, or one that it came from, is of a full disk."""
  while error is not None:
    words = str(error)
    if getattr(error, 'errno', None) in FULL:
      return True
    if any(os.strerror(number) in words for number in FULL):
      return True
    error = error.__cause__ or error.__context__
  return False


@contextlib.contextmanager
def writing(what: str, place):
  """Turns what writing may raise, in a library of many words, into an OSError
  of one line; other ValueErrors and OSErrors pass."""
  try:
    yield
  except Exception as e:
    if is_full(e):
      full = OSError(
        f'the disk is full: {what} cannot be written to {place}; what is there '
        'stays as it was: make room'
      )
      full.errno = errno.ENOSPC
      raise full from None
    if isinstance(e, ValueError | OSError):
      raise
    said = ' '.join(str(e).split())[:100] or type(e).__name__
    raise OSError(f'{what} cannot be written to {place} ({said})') from None
