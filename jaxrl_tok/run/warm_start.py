"""Warm start: supervised learning of the data's right answers, cached on disk.

The cache holds saved policies under ~/.cache/jaxrl_tok (or XDG_CACHE_HOME),
by a hash of all settings and data that decide the outcome.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np

from jaxrl_tok import __version__, data, digest, processes, sharding
from jaxrl_tok.finite import check_finite
from jaxrl_tok.hub import directory
from jaxrl_tok.hub.weights import read_params
from jaxrl_tok.report import disk
from jaxrl_tok.rewards.functions import describe_weights, get_name
from jaxrl_tok.run.cache import user_cache
from jaxrl_tok.run.evaluations import jit_scorer, make_draw, run_evaluation
from jaxrl_tok.run.fit import Plan, fit
from jaxrl_tok.run.inputs import answer_ids
from jaxrl_tok.run.networks import make_networks
from jaxrl_tok.run.prepare import Setup
from jaxrl_tok.step.compile import QUICKLY
from jaxrl_tok.step.supervised import answer_loss

DIGESTS = 'digests.json'  # beside the weights of a kept start


def digest_of(records) -> str:
  """Hash of all records; of endless ones, that of the first prompts."""
  if records.num_records is None:
    return data.data_fingerprint(records)
  found = hashlib.sha256()
  for record in records:
    text = json.dumps(record, sort_keys=True, default=str)
    found.update(text.encode(errors='replace'))
  return found.hexdigest()


def tokenizer_text(tokenizer) -> str:
  """Text that tells tokenizers apart: tokenizer.json, or the vocabulary."""
  backend = getattr(tokenizer, 'backend_tokenizer', None)
  if backend is not None:
    return backend.to_str()
  return json.dumps(tokenizer.get_vocab(), sort_keys=True)


def cache_dir(setup: Setup) -> Path:
  """Directory of this warm start in the cache."""
  rule = jax.device_get(setup.rule)
  never = () if rule.forbidden is None else np.flatnonzero(rule.forbidden)
  recipe = {
    'version': __version__,
    'format': 3,
    'jax': jax.__version__,
    'settings': dataclasses.asdict(setup.settings.warm_start),
    'seed': setup.settings.run.seed,
    'length': setup.config.max_completion_length,
    'dtype': setup.dtype,
    'model': setup.model.hf_config,
    'tokenizer': tokenizer_text(setup.model.tokenizer),
    # the parts of the rule that evaluate and greedy completions read
    'temperature': rule.temperature.item(),
    'end_tokens': rule.end_tokens.tolist(),
    'forbidden': list(map(int, never)),
    'stop': list(setup.settings.sampling.stop),
    'rewards': sorted(
      describe_weights(setup.evaluations[0].rewards.weights).items()
    ),
    'data': [
      digest_of(setup.data.records),
      digest_of(setup.evaluations[0].data.records),
    ],
  }
  if setup.world is not None:
    name = get_name(setup.task.environment)
    turns = dataclasses.asdict(setup.settings.turns)
    recipe['turns'] = [name, turns, setup.config.turn_length]
  text = json.dumps(recipe, sort_keys=True).encode()
  key = hashlib.sha256(text).hexdigest()[:16]
  return user_cache() / f'{setup.caller.name}-{key}'


def plain_policy(setup: Setup):
  """The policy without NLPO's slow copy, which begins with the updates."""
  carries = dict(setup.algorithm.carries)
  carries.pop('mask_policy', None)
  algorithm = setup.algorithm._replace(carries=carries)
  made = make_networks(setup.settings, setup.model, setup.trainable, algorithm)
  return made.policy


def shown_episode(setup: Setup, example: dict) -> tuple[list, list]:
  """(ids, mask) of a record's demonstration. Raises ValueError."""
  T, turns = setup.config.max_completion_length, example.get(setup.task.answers)
  talk, length = setup.world.talk, setup.config.turn_length
  ids, mask = data.demonstrate(talk, example, turns, length)
  if len(ids) > T:
    raise ValueError(
      f'--max_episode_length {T} cannot hold a demonstration of {len(ids)} '
      f'tokens; pass --max_episode_length {len(ids)} or more'
    )
  return ids, mask


def target(setup: Setup, example: dict) -> tuple[list, list]:
  """(ids, mask) that are learnt of a record: its answer, or of an episode the
  policy's turns."""
  if setup.world is not None:
    return shown_episode(setup, example)
  ids = target_ids(setup, example)
  return ids, [True] * len(ids)


def target_ids(setup: Setup, example: dict) -> list[int]:
  """Ids of a record's right answer; it names a record that has none, or too
  long a one, which only endless records can hold here."""
  answer, T = (
    example.get(setup.task.answers),
    setup.config.max_completion_length,
  )
  if not isinstance(answer, str):
    raise ValueError(
      f'the record of prompt {str(example["prompt"])[:60]!r} has no '
      f'{setup.task.answers!r} that is text; a supervised start needs an '
      'answer for each prompt, or pass --model'
    )
  row = answer_ids(setup.settings, setup.model, answer)
  if len(row) > T:
    raise ValueError(
      f'--max_completion_length {T} cannot hold the answer {answer[:60]!r} of '
      f'{len(row) - 1} tokens and the end; pass --max_completion_length '
      f'{len(row)} or more'
    )
  return row


def batch_at(setup: Setup, number: int) -> tuple:
  """Batch of a step: (Prompts, answers int32 [n, T], mask bool [n, T])."""
  n = setup.settings.warm_start.warm_start_batch_size
  own = processes.own_rows(setup.mesh, n)
  examples, prompts, _ = data.batch_at(
    setup.data,
    setup.settings.run.seed,
    number * n,
    n,
    own,
    processes.largest,
  )
  n = len(own)
  P = setup.data.buckets[-1]
  more = ((0, 0), (0, P - prompts.tokens.shape[1]))
  prompts = prompts._replace(tokens=np.pad(prompts.tokens, more))
  T = setup.config.max_completion_length
  tokens = np.full((n, T), setup.model.pad_token, np.int32)
  mask = np.zeros((n, T), bool)
  for i, example in enumerate(examples):
    row, on = target(setup, example)
    tokens[i, : len(row)], mask[i, : len(row)] = row, on
  return sharding.put_rows(setup.mesh, (prompts, tokens, mask))


def make_judge(setup: Setup):
  """Returns evaluate(params) -> held-out reward of greedy completions."""
  e = setup.evaluations[0]
  own = dataclasses.replace(e.evaluation, metrics=())  # the reward alone
  e, device = e._replace(evaluation=own), jit_scorer(setup, e)
  plain = setup._replace(policy=plain_policy(setup))
  draw = make_draw(plain, setup.config.greedy)

  def evaluate(params) -> float:
    def sample(*args):
      return draw(params, *args, setup.rule)

    return run_evaluation(setup, e, sample, device)[0]['eval/reward']

  return evaluate


def learn(setup: Setup):
  """Trains from random weights, until warm_start_stop_at is reached or for
  warm_start_max_steps. Returns (params, steps, held-out reward)."""
  f, policy = setup.settings.warm_start, plain_policy(setup)
  params, _ = sharding.born_sharded(
    policy.init,
    setup.mesh,
    policy.partition_rules,
    jax.random.key(setup.settings.run.seed),
    compiler_options=QUICKLY,
  )
  judge = make_judge(setup)
  params, done, found = fit(
    answer_loss(policy, setup.rule),
    params,
    None,
    functools.partial(batch_at, setup),
    lambda params: {'eval/reward': judge(params)},
    Plan(
      name='supervised start',
      phase='warm_start',
      watched='eval/reward',
      max_steps=f.warm_start_max_steps,
      learning_rate=f.warm_start_learning_rate,
      check_every=f.warm_start_check_every,
      stop_at=f.warm_start_stop_at,
    ),
    policy.partition_rules,
    setup.logger,
  )
  # a critic begins with the updates
  params = {k: v for k, v in params.items() if k != 'value_head'}
  return params, done, found['eval/reward']


def warm_start(setup: Setup):
  """Parameters after the warm start, from the cache if it has them."""
  where, keep = cache_dir(setup), setup.settings.warm_start.cache
  if keep and all(processes.exchange(where.is_dir())):
    try:
      params = read_params(directory.open_model(where), setup.mesh)
      check_start(params, where)
      setup.logger.message(
        f'supervised start from {where} (--no_cache makes it anew)'
      )
      return params
    except (ValueError, OSError) as e:
      setup.logger.warn(f'{e}; the supervised start is made anew')
      shutil.rmtree(where, ignore_errors=True)
  params, steps, score = learn(setup)
  check_finite(
    params, 'the supervised start', 'lower --warm_start_learning_rate'
  )
  setup.logger.message(f'supervised start: {steps} steps, held-out {score:.3f}')
  if keep:
    save_start(setup, params, where)
  return params


def digests(params) -> dict[str, str]:
  """Digests {path: text} of parameters."""
  return digest.to_text(digest.lanes(params))


def check_start(params, where: Path) -> None:
  """Refuses parameters that are not those that were kept."""
  file = where / DIGESTS
  if not file.is_file():  # of an older version
    return
  if json.loads(file.read_text()) != digests(params):
    raise ValueError(f'{where} is not what was kept')


def save_start(setup: Setup, params, where: Path) -> None:
  """Saves the warm start. Parallel runs may save one place; a failure is a
  warning."""
  own = where.with_name(f'{where.name}.{os.getpid()}')
  card = {'title': 'supervised start', 'data': setup.task.description}
  try:
    with disk.writing('it', where.parent):
      directory.save(own, setup.model, params, card)
    found = digests(params)
    if processes.is_main():
      (own / DIGESTS).write_text(json.dumps(found))
      os.replace(own, where)
  except OSError as e:
    if not where.is_dir():  # else another run was first
      setup.logger.warn(f'the supervised start cannot be kept: {e}')
  finally:
    shutil.rmtree(own, ignore_errors=True)
