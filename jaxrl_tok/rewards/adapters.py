"""Reward functions that were written for other trainers, a line each:

  Task('gsm8k.parquet', from_verl(compute_score))
  Task('gsm8k.jsonl', from_tunix(check_answer, tmvp_config=config))
  Task(records, from_reasoning_gym(dataset.score_answer))
  Task('qa.jsonl', {from_verifiers(correct, parser=parser): 0.8})

Each adapter takes a function of one convention and returns a reward function
(prompts, completions, ...) of its name.
"""

import inspect
from collections.abc import Callable

from jaxrl_tok.rewards.functions import accepted, get_name, make_signature


def get_text(completion) -> str:
  """Text of a completion: itself, or of the last of its messages."""
  return (
    completion if isinstance(completion, str) else completion[-1]['content']
  )


def _named(adapter: Callable, function: Callable) -> Callable:
  adapter.__name__ = adapter.__qualname__ = get_name(function)
  return adapter


def _gather(values: list):
  """Values, or a coroutine of them where they are awaitable."""
  if not any(map(inspect.isawaitable, values)):
    return values

  async def wait():
    return [await v for v in values]

  return wait()


# entries that verl adds to extra_info
ROLLOUT_INFO = {'num_turns': None, 'rollout_reward_scores': {}}


def from_verl(compute_score: Callable) -> Callable:
  """verl's compute_score(data_source, solution_str, ground_truth, extra_info)
  -> float or {'score': float, ...}, plain or async.

  Columns of the data are verl's: data_source, reward_model with its
  ground_truth, and extra_info if there is one. Other numbers of a dict are
  added to the samples as columns.
  """

  def reward(
    completions, data_source, reward_model, extra_info=None, log_extra=None
  ):
    infos = extra_info or [None] * len(completions)
    values = [
      compute_score(
        data_source=source,
        solution_str=get_text(completion),
        ground_truth=model['ground_truth'],
        extra_info={**ROLLOUT_INFO, **(info or {})},
      )
      for completion, source, model, info in zip(
        completions, data_source, reward_model, infos
      )
    ]
    found = _gather(values)
    if inspect.iscoroutine(found):
      return _later(found, lambda v: scores(v, log_extra))
    return scores(found, log_extra)

  def scores(values: list, log_extra) -> list:
    dicts = [v for v in values if isinstance(v, dict)]
    for name in sorted({k for d in dicts for k in d} - {'score'}):
      if log_extra is not None:
        log_extra(
          name, [v.get(name) if isinstance(v, dict) else None for v in values]
        )
    return [v['score'] if isinstance(v, dict) else v for v in values]

  return _named(reward, compute_score)


async def _later(coroutine, function: Callable):
  return function(await coroutine)


def from_tunix(function: Callable, mode: str = 'train', **settings) -> Callable:
  """Tunix's and MaxText's f(prompts, completions, mode=..., **columns) ->
  numbers for text completions.

  mode: 'train', or 'eval' in Task(eval_rewards=...).
  settings: arguments that are no columns, as MaxText's tmvp_config.
  """
  has = accepted(function)

  def reward(prompts, completions, **columns):
    given = {
      **columns,
      'prompts': prompts,
      'completions': [get_text(c) for c in completions],
      'mode': mode,
      **settings,
    }
    return function(**has.choose(given))

  own = {*has.required} - {'mode', *settings}
  reward.__signature__ = make_signature({*own, 'prompts', 'completions'})
  return _named(reward, function)


def from_reasoning_gym(score_answer: Callable, column: str = 'entry'):
  """reasoning-gym's score_answer(answer=, entry=) -> float. A column of the
  data holds the entries: {'prompt': e['question'], 'entry': e}."""

  def reward(completions, **columns):
    return [
      float(score_answer(answer=get_text(c), entry=e))
      for c, e in zip(completions, columns[column])
    ]

  reward.__signature__ = make_signature(['completions', column], (), False)
  return _named(reward, score_answer)


def from_verifiers(function: Callable, **objects) -> Callable:
  """A function of a verifiers Rubric, plain or async, for one completion at a
  time: any of prompt, completion, answer, state, task, info -> float.

  Where the data lacks answer, task or info they are '', 'default' and {}.
  `objects` are arguments that are no columns, as its parser. An exception
  stops the run; verifiers would score 0.
  """
  has = accepted(function)

  def reward(prompts, completions, **columns):
    values = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
      own = {k: v[row] for k, v in columns.items() if isinstance(v, list)}
      given = {'answer': '', 'task': 'default', 'info': {}} | own
      given |= {'prompt': prompt, 'completion': completion}
      given |= {'state': given | {'turn': 1}} | objects
      values.append(function(**has.choose(given)))
    return _gather(values)

  always = {'prompt', 'completion', 'answer', 'task', 'info', 'state'}
  own = {*has.required} - always - objects.keys()
  reward.__signature__ = make_signature({*own, 'prompts', 'completions'})
  return _named(reward, function)
