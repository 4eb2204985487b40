"""Device rewards: JAX functions of a Rollout, without text or host.

  @on_device
  def short(rollout, limit, **columns):
    return rollout.mask.sum(1) <= limit  # [B], an outcome

A value [B, T] is a reward for every token; a pair (value, applies bool [B])
marks the rows that it applies to. Columns arrive for each row, [B, ...]:
numbers of the data by their name, and the answers as tokens (make_columns).
With --steps_per_call rollout, reward and update are one program.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_tok import masked
from jaxrl_tok.credit import sequence
from jaxrl_tok.rewards import accepted, unwrap
from jaxrl_tok.rewards.functions import Accepted, quote
from jaxrl_tok.types import Policy, Rollout

REWARD_MODEL = 'reward_model'  # its component's name


def on_device(function: Callable) -> Callable:
  """Marks a reward function (rollout, **columns) -> [B] or [B, T] of JAX."""
  function.on_device = True
  return function


def is_on_device(function: Callable) -> bool:
  """Tells whether a function, or the one inside a partial, is marked."""
  marked = getattr(function, 'on_device', False)
  return marked or getattr(unwrap(function), 'on_device', False)


@on_device
def exact_tokens(rollout: Rollout, answer, answer_mask) -> jax.Array:
  """Exact match: 1 for the answer's tokens and their end, else 0.

  answer int32 [B, T]; rewards.exact_match on the host also forgives spaces
  around it.
  """
  right = (rollout.tokens == answer) | ~answer_mask
  same = right & (rollout.mask == answer_mask)
  return jnp.all(same, axis=1).astype(jnp.float32)


@on_device
def digit_tokens(rollout: Rollout, answer, answer_mask) -> jax.Array:
  """Digits of the answer: each of its tokens in its place, the end included,
  earns one share; a right completion sums to 1. rewards.digits is its form on
  the host."""
  right = (rollout.tokens == answer) & answer_mask & rollout.mask
  return right / masked.count(answer_mask, axis=1)[:, None]


@on_device
def edit_tokens(rollout: Rollout, answer, answer_mask) -> jax.Array:
  """Edit distance to the answer, paid by token: phi(y_<=t) - phi(y_<t) with

    phi(y) = 1 - edits(y, answer) / tokens of the answer

  without the ends, whose reward is 0. Of characters where each is one token:
  rewards.potentials.edit_distance is its form on the host. The i-th row of the
  table of edits costs no loop: D_ij = j + min_{k <= j} (c_ik - k), with c_ik
  the cheapest way to it from the row before.
  """
  ends = rollout.ended[:, None] & masked.last_chosen(rollout.mask)
  own = rollout.mask & ~ends
  length = jnp.sum(answer_mask.astype(jnp.int32), axis=1) - 1
  columns = jnp.arange(answer.shape[1])

  def one(tokens, own, answer, length):
    def row(edits, token):
      other, chosen = token
      changed = edits[:-1] + (answer[: len(edits) - 1] != other)
      cheapest = (edits + 1).at[1:].min(changed)
      found = jax.lax.cummin(cheapest - columns) + columns
      edits = jnp.where(chosen, found, edits)
      return edits, edits[length]

    _, found = jax.lax.scan(row, columns, (tokens, own))
    before = jnp.concatenate([length[None], found[:-1]])
    return (before - found) / jnp.maximum(length, 1)

  return jax.vmap(one)(rollout.tokens, own, answer, length)


@on_device
def ends(rollout: Rollout, min_tokens: int = 0) -> jax.Array:
  """End by itself: 1 where the policy ended the completion, with an end token
  or a stop text, after min_tokens tokens or more; 0 where it was cut."""
  long = masked.count(rollout.mask, axis=1) >= min_tokens
  return (rollout.ended & long).astype(jnp.float32)


def score_tokens(model: Policy, params, rollout: Rollout) -> jax.Array:
  """Scores float32 [B, T] of a classifier of one label: column t has that of
  the prompt and the completion up to its token t.

  It reads the rollout's tokens as they are, so its tokenizer must be the
  policy's.
  """
  prefix = model.encode(params, rollout.prompts)
  hidden, _ = model.extend(params, prefix, rollout.tokens, None, 0)
  return model.value(params, hidden)


def on_last(scores: jax.Array, mask: jax.Array) -> jax.Array:
  """Score of the whole completion, on its last chosen token.

  # tokens [4 2 EOS pad]  scores [. . s .]  ->  [0 0 s 0]
  """
  return jnp.where(masked.last_chosen(mask), scores, 0.0)


def by_token(scores: jax.Array, mask: jax.Array) -> jax.Array:
  """Changes of the score by token, r_t = s_t - s_(t-1) with 0 before the first:
  they sum to the score of the whole completion. Tokens that the policy did not
  choose are passed over: what they change is paid on the next chosen one.

  # scores [3 5 4 .]  mask [1 1 1 0]  ->  [3 2 -1 0]
  """

  def one(scores, mask):
    ticked = sequence.to_clock(scores, mask)
    before = jnp.concatenate([jnp.zeros(1), ticked[:-1]])
    return sequence.from_clock(ticked - before, mask)

  return jax.vmap(one)(scores, mask)


# {word of --reward_model_by: (scores [B, T], mask [B, T]) -> rewards [B, T]}
SCORES_TO_REWARDS = {'sequence': on_last, 'token': by_token}


def reward_model(model: Policy, by: str = 'sequence') -> Callable:
  """Returns reward(params, Rollout) -> float32 [B, T], pure: the score that a
  classifier of one label gives prompt and completion. `by` is a word of
  SCORES_TO_REWARDS; the sum over a row is the same for each."""
  pay = SCORES_TO_REWARDS[by]

  def reward(params, rollout: Rollout) -> jax.Array:
    return pay(score_tokens(model, params, rollout), rollout.mask)

  return reward


def make_device_scorer(
  functions: dict[str, Callable], model: Callable | None = None
) -> Callable:
  """Returns score(params, Rollout, {column: [C, ...]}) -> (rewards {name:
  float32 [B, T]}, applies {name: bool [B]}), pure. A reward_model's component
  is named reward_model; `params` are its parameters."""
  takes = {name: _column_arguments(f) for name, f in functions.items()}

  def score(params, rollout: Rollout, columns: dict) -> tuple[dict, dict]:
    B, C = rollout.mask.shape[0], rollout.prompts.length.shape[0]
    rewards, applies = {}, {}
    for name, function in functions.items():
      given = takes[name].choose(columns)
      rows = {k: jnp.repeat(v, B // C, axis=0) for k, v in given.items()}
      found = function(rollout, **rows)
      rewards[name], applies[name] = _lift(found, rollout.mask, name)
    if model is not None:
      found = model(params, rollout)
      rewards[REWARD_MODEL], applies[REWARD_MODEL] = _lift(
        found, rollout.mask, REWARD_MODEL
      )
    return rewards, applies

  return score


def _lift(found, mask: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
  """Returns (float32 [B, T], bool [B]) of a function's value, or of a pair."""
  B, T = mask.shape
  applies = jnp.ones(B, bool)
  if isinstance(found, tuple) and len(found) == 2:
    found, applies = found
    is_bool = jnp.issubdtype(jnp.result_type(applies), jnp.bool_)
    if jnp.shape(applies) != (B,) or not is_bool:
      raise ValueError(
        f'@on_device reward {name} says where it applies by '
        f'{jnp.result_type(applies)} {list(jnp.shape(applies))}; it must be '
        f'bool [{B}], one for each completion'
      )
  if not hasattr(found, 'dtype') or found.shape not in ((B,), (B, T)):
    shape = getattr(found, 'shape', None)
    kind = type(found).__name__ if shape is None else f'shape {list(shape)}'
    raise ValueError(
      f'@on_device reward {name} returned {kind} for {B} completions of {T} '
      f'tokens; it must return an array [{B}] or [{B}, {T}]'
    )
  value = found.astype(jnp.float32)
  if value.ndim == 1:
    value, mask = value[:, None], masked.last_chosen(mask)
  return jnp.where(mask & applies[:, None], value, 0.0), applies


# --- columns -----------------------------------------------------------------


def make_columns(
  functions: dict[str, Callable],
  sample_record: dict,
  answers: str | None,
  encode_answer: Callable[[str], list[int]],
  T: int,
) -> Callable:
  """Returns columns(C records) -> {name: numpy [C, ...]}: the columns that
  device rewards name, and with **columns all that are numbers.

  The answers are `answer` int32 [C, T] and `answer_mask` bool [C, T], 0 after
  the end token, for functions that name them; their own column's name gives
  the tokens, too. Numbers are int32, float32 or bool. Raises ValueError for
  text and for names that the data lacks.

  Args:
    functions: {name: function of JAX}.
    sample_record: a record of the data, which decides the dtypes.
    answers: the column of the answers, or None.
    encode_answer: text -> token ids, the end token included.
    T: max_completion_length.
  """
  kinds = {k: _kind(v) for k, v in sample_record.items()}
  tokens = set()
  if answers:
    own = {'answer'} - kinds.keys()  # another column may have the name
    tokens = {answers, 'answer_mask'} | own
  names = set()
  for name, function in functions.items():
    names |= _names_read(name, _column_arguments(function), kinds, tokens)
  if names & tokens and answers not in kinds:
    raise ValueError(
      f'the data has no column {answers} for the answers; it has '
      f'{", ".join(kinds)}'
    )

  def columns(records: list[dict]) -> dict[str, np.ndarray]:
    found = {}
    if names & tokens:
      ids, mask = _encode_all(records, answers, encode_answer, T)
      found = dict.fromkeys(tokens, ids) | {'answer_mask': mask}
    for name in names - tokens:
      found[name] = _stack([r.get(name) for r in records], name, kinds[name])
    return {name: found[name] for name in sorted(names)}

  return columns


def _column_arguments(function: Callable) -> Accepted:
  """Arguments after the first, which is the rollout."""
  has = accepted(function)
  if has.positional_only:
    return has
  return has._replace(
    names=has.names - {has.first},
    required=tuple(name for name in has.required if name != has.first),
  )


def _names_read(
  name: str, has: Accepted, kinds: dict, tokens: set[str]
) -> set[str]:
  """Columns that a function's signature asks for."""
  numbers = {k for k, kind in kinds.items() if kind} - tokens
  known = ', '.join(sorted(numbers | tokens)) or 'none'
  for missing in has.required:
    if missing not in tokens | kinds.keys():
      cure = f'it can read: {known}'
      if missing in ('answer', 'answer_mask'):
        cure = "name the answers' column, Task(answers=...)"
      raise ValueError(
        f'@on_device reward {name} asks for {missing}, which is no column of '
        f'the data; {cure}'
      )
  for column in sorted(has.names & kinds.keys() - tokens - numbers):
    raise ValueError(
      f'@on_device reward {name} reads the column {column}, which is text or '
      'does not fit int32, float32 or bool; name it as the answers '
      f'(Task(answers={column!r})) to read its tokens, or make it numbers '
      f'(it can read: {known})'
    )
  return has.names & (numbers | tokens) | (numbers if has.any_name else set())


def _kind(value):
  """Dtype of numbers and nested lists of them: int32, float32, bool or None."""
  try:
    array = np.asarray(value)
  except ValueError:  # ragged lists
    return None
  if array.dtype.kind in 'iu' and not np.array_equal(
    array, array.astype(np.int32)
  ):
    return None
  kinds = {'b': np.bool_, 'i': np.int32, 'u': np.int32, 'f': np.float32}
  return kinds.get(array.dtype.kind)


def _stack(values: list, name: str, dtype) -> np.ndarray:
  """A column of numbers, [C, ...]."""
  taken = {np.bool_: 'b', np.int32: 'iu', np.float32: 'iuf'}[dtype]
  try:
    found = np.asarray(values)
    stacked = found.astype(dtype)
    fits = found.dtype.kind in taken and (
      dtype is np.float32 or np.array_equal(found, stacked)
    )
  except (TypeError, ValueError):  # ragged, text or None
    fits = False
  if not fits:
    raise ValueError(
      f'the column {name} is {np.dtype(dtype).name} in the first record and '
      'not in all others; @on_device rewards need numbers of one type and '
      'shape (without **columns they get only the columns that they name)'
    )
  return stacked


def _encode_all(
  records: list[dict], answers: str, encode: Callable, T: int
) -> tuple[np.ndarray, np.ndarray]:
  """Encodes the records' answers: (tokens int32 [C, T], mask bool [C, T])."""
  ids = np.zeros((len(records), T), np.int32)
  mask = np.zeros((len(records), T), bool)
  for c, record in enumerate(records):
    if record.get(answers) is None:
      raise ValueError(
        f'the record of prompt {quote(str(record["prompt"]))} has no '
        f'{answers!r}, which @on_device rewards read; give one to every record'
      )
    text = str(record[answers])
    row = list(encode(text))
    if len(row) > T:
      raise ValueError(
        f'the answer {quote(text)} has {len(row)} tokens with its end, and '
        f'completions have {T}; pass --max_completion_length {len(row)}'
      )
    ids[c, : len(row)] = row
    mask[c, : len(row)] = True
  return ids, mask
