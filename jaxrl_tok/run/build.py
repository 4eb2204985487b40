"""Builder of the algorithm, from settings and values of the user's own."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optax

from jaxrl_tok.credit import advantages, algorithms, losses
from jaxrl_tok.credit.names import Constraint
from jaxrl_tok.run.settings import Settings
from jaxrl_tok.step.constraints import constrained
from jaxrl_tok.types import Algorithm, Policy


class Own(NamedTuple):
  """Values of the user's own, in place of settings; None: by the setting."""

  algorithm: Algorithm | None = None
  policy: Any = None  # types.Policy
  optimizer: Any = None  # optax.GradientTransformation
  credit: Callable | None = None  # these four as algorithms.py takes them
  baseline: Any = None
  loss: Callable | None = None
  aggregate: Callable | None = None

  @property
  def parts(self) -> dict:
    """Parts of an algorithm."""
    names = 'credit', 'baseline', 'loss', 'aggregate'
    found = {name: getattr(self, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


_KINDS = (
  ('algorithm', Algorithm, 'jaxrl_tok', 'as algorithms.grpo()'),
  ('policy', Policy, 'jaxrl_tok', 'or fill in the record'),
  ('optimizer', optax.GradientTransformation, 'optax', 'as optax.adam(1e-3)'),
)


def check_own(own: Own) -> None:
  """Refuses values of another type, such as a function that makes one."""
  for name, kind, home, cure in _KINDS:
    value = getattr(own, name)
    if value is not None and not isinstance(value, kind):
      raise ValueError(
        f'{name} is a {type(value).__name__}, not '
        f'{"an" if home == "optax" else "a"} {home}.{kind.__name__}; call its '
        f'maker, {cure}'
      )


# settings of the algorithm's group that are no choice of compose.compose
_OTHERS = (
  'algorithm',
  'compat',
  'credit_split',
  'constraint',
  'constraint_rate',
  'constraint_damping',
  'ema_decay',
  'log_kl',
  'critic',
  'critic_learning_rate',
)
# choices that 0 on the command line turns off
_LIMITS = (
  'advantage_clip',
  'dual_clip',
  'importance_cap',
  'max_update_kl',
  'kl_target',
  'value_clip',
)


def choices_of(settings: Settings) -> dict:
  """Choices {name: value} for compose.compose, of the settings given."""
  f = settings.algorithm
  given = {k: v for k, v in vars(f).items() if k not in _OTHERS}
  given['reference_dtype'] = (
    None if f.reference_dtype == 'auto' else f.reference_dtype
  )
  found = {k: v for k, v in given.items() if v is not None}
  found |= {k: found[k] or None for k in _LIMITS if k in found}
  if f.scale == 'none':
    found['scale'] = None
  if 'aggregation' in found:
    found['aggregate'] = found.pop('aggregation')
  if settings.turns.discount != 'token':
    found['discount'] = settings.turns.discount
  if f.baseline == 'ema':
    found['baseline'] = advantages.ema(f.ema_decay)
  return found


def make_algorithm(
  settings: Settings,
  own: Own,
  max_length: int,
  limits: Sequence[Constraint] = (),
) -> Algorithm:
  """Makes the Algorithm that the settings name, or takes the user's own, and
  lets it keep the limits.

  Raises ValueError for choices that are impossible or have no effect.
  """
  f, G = settings.algorithm, settings.sampling.num_generations
  changes = choices_of(settings) | own.parts
  if own.algorithm is not None:
    if changes:
      raise ValueError(
        f'{", ".join(changes)} would change an algorithm that is given as a '
        'value; change the value instead'
      )
    algorithm = own.algorithm
  else:
    alone = f.algorithm == 'reinforce' and G == 1
    if alone and not {'baseline', 'credit'} & changes.keys():
      changes['baseline'] = advantages.ema(f.ema_decay)
    make = algorithms.by_name(f.algorithm)
    algorithm = make(max_length=max_length, **changes)
  algorithm = with_off_policy(settings, algorithm)
  check_algorithm(settings, own, algorithm)
  return with_constraints(settings, algorithm, limits)


def with_off_policy(settings: Settings, algorithm: Algorithm) -> Algorithm:
  """Adds a ratio to the sampler's log-probs, for rollouts of older policies."""
  sampling = settings.sampling
  flag = '--replay_groups' if sampling.replay_groups else '--ahead'
  if not (sampling.replay_groups or sampling.ahead):
    return algorithm
  choices, passes = algorithm.settings, algorithm.passes
  corrected = choices.get('importance_cap') or choices.get('credit') is (
    advantages.vtrace
  )
  if corrected:
    old_logp = 'recomputed'
  elif choices.get('loss') is losses.reinforce:
    raise ValueError(
      f'{flag} gives {algorithm.name} rollouts of an older policy, and its '
      'loss has no ratio; pass --importance_cap 2, --loss clip, or --credit '
      'vtrace'
    )
  else:
    old_logp = passes.old_logp
    old_logp = 'sampler' if old_logp == 'current' else old_logp
  return algorithm._replace(passes=passes._replace(old_logp=old_logp))


def with_log_kl(settings: Settings, algorithm: Algorithm) -> Algorithm:
  """Adds a reference to the algorithm, if the KL is measured for the log."""
  f = settings.algorithm
  if not f.log_kl or algorithm.kl is not None:
    return algorithm
  dtype = None if f.reference_dtype == 'auto' else f.reference_dtype
  carries = {'reference': losses.reference(0, dtype)} | algorithm.carries
  return algorithm._replace(carries=carries)


def with_constraints(
  settings: Settings, algorithm: Algorithm, limits: Sequence[Constraint]
) -> Algorithm:
  """Adds the multipliers of constraints."""
  if limits and algorithm.dynamic_sampling_rounds > 1:
    raise ValueError(
      f'{algorithm.name} draws groups of equal rewards anew, whatever their '
      'constraints say; pass --dynamic_sampling_rounds 0, or no constraint'
    )
  f = settings.algorithm
  return constrained(algorithm, limits, f.constraint_rate, f.constraint_damping)


def check_algorithm(settings: Settings, own: Own, algorithm: Algorithm) -> None:
  """Refuses an algorithm that does not fit the other settings."""
  f, sampling, model = settings.algorithm, settings.sampling, settings.model
  G, learned = sampling.num_generations, algorithm.value_loss is not None
  adapted = bool(model.lora_rank or model.lora_adapter)
  shared = learned and f.critic == 'shared'
  no_value = own.policy is not None and own.policy.value is None
  rules = (
    (
      algorithm.min_group > G,
      f'{algorithm.name} compares the samples of a prompt and needs '
      f'{algorithm.min_group}; pass --num_generations {algorithm.min_group} or '
      'more, or --baseline ema --scale none',
    ),
    (
      learned and f.critic == 'none',
      f'{algorithm.name} needs a critic; pass --critic shared or separate',
    ),
    (
      learned and no_value,
      f'{algorithm.name} needs a critic, and the policy has no value; give it '
      'Policy(value=...), or choose an algorithm without one',
    ),
    (
      learned and own.policy is not None and f.critic == 'separate',
      'a critic of its own is a copy of a model; with a policy of your own, '
      'pass critic=shared',
    ),
    (
      adapted and shared,
      'adapters leave no value head to train; pass --critic separate',
    ),
    (
      adapted and bool(f.ref_sync_steps),
      'the reference of adapters is their base, which stays; leave '
      '--ref_sync_steps out',
    ),
    (
      not learned and f.critic_learning_rate is not None,
      f'--critic_learning_rate has no effect: {algorithm.name} has no critic',
    ),
    (
      'mask_policy' in algorithm.carries and not sampling.truncates,
      f'{algorithm.name} masks by the sampling rule, which keeps every token; '
      'pass --top_p 0.9',
    ),
    (
      algorithm.dynamic_sampling_rounds > 1
      and bool(sampling.ahead or settings.run.steps_per_call),
      f'{algorithm.name} draws groups anew, which needs the host between '
      'rollouts; pass --dynamic_sampling_rounds 0, or leave --steps_per_call '
      'and --ahead out',
    ),
    (
      sampling.ahead and algorithm.greedy,
      f'{algorithm.name} compares with greedy completions of the policy that '
      'is trained, and --ahead samples from an older one; leave it out',
    ),
  )
  for refused, message in rules:
    if refused:
      raise ValueError(message)
  passes = algorithm.passes.mini_batches
  prompts = sampling.num_prompts + sampling.replay_groups
  if prompts % passes:
    raise ValueError(
      f'{algorithm.name} makes {passes} mini-batches of {prompts} prompts, '
      'which do not divide equally; change --num_prompts'
    )
