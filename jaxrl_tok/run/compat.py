"""Compatibility: published defaults of other systems as flags, their traps.

`--compat SYSTEM` changes defaults to those of `defaults`; a flag that the user
types wins. Batches, lengths and steps, which depend on machine and task, stay
the experiment's. TRAPS has the known traps of a system, DIFFERS the differences
that no flag removes; `warnings` are the lines of both for one run.

Read in the sources of TRL 1.10 to 1.16 (PPO: to 1.12, the last that has it),
verl 0.7.0 to 0.9.1, OpenRLHF 0.11.2 and Tunix 0.1.7 and 0.1.8 (its repository).

- All have a factor 1/2 in the value loss and value_coef has none: 0.5 is their
  1, and 0.05 is TRL's vf_coef of 0.1.
- None bootstraps from the value of a completion that was cut.
- A weight for the ratio of policy and sampler is off in all four, but comes
  with vLLM in TRL; so no importance_cap here.
- TRL's KL, once on, is k3 times the ratio: in flags, --kl reverse.
- TRL's scale_rewards='batch' is --scale batch_std, its
  multi_objective_aggregation a flag of that name.
"""

from collections.abc import Callable
from typing import NamedTuple

SYSTEMS = {
  'trl': 'TRL 1.10-1.16',
  'verl': 'verl 0.9',
  'openrlhf': 'OpenRLHF 0.11',
  'tunix': 'Tunix 0.1.7-0.1.8',
}

_NO_KL = {'kl': 'none', 'beta': 0.0}
_CLIP = {'loss': 'clip', 'clip_low': 0.2, 'clip_high': 0.2}
_TOKENS = {'aggregation': 'token_mean'}
_GROUP = {'credit': 'returns', 'baseline': 'group_mean', 'scale': 'group_std'}
_LEAVE_ONE_OUT = _GROUP | {'baseline': 'leave_one_out', 'scale': 'none'}
_CRITIC = _CLIP | {
  'num_generations': 1,
  'credit': 'gae',
  'gamma': 1.0,
  'bootstrap_truncated': False,
  'whiten': True,
  'critic': 'separate',
  'value_coef': 0.5,
  'aggregation': 'token_mean',
}
_WHITENED = _CLIP | {
  'credit': 'returns',
  'baseline': 'none',
  'gamma': 1.0,
  'whiten': True,
  'aggregation': 'token_mean',
}

_TRL = _NO_KL | {
  'temperature': 1.0,
  'learning_rate': 1e-6,
  'lr_schedule': 'linear',
  'min_lr_ratio': 0.0,
  'lr_warmup_steps': 0,
  'adam_b2': 0.999,
  'weight_decay': 0.0,
  'max_grad_norm': 1.0,
  'epochs': 1,
  'mini_batches': 1,
}
_TRL_GRPO = _TRL | _GROUP | _TOKENS | {'num_generations': 8}

_VERL = _NO_KL | {
  'temperature': 1.0,
  'learning_rate': 1e-6,
  'lr_schedule': 'constant',
  'lr_warmup_steps': 0,
  'adam_b2': 0.999,
  'weight_decay': 0.01,
  'weight_decay_all': True,
  'max_grad_norm': 1.0,
  'epochs': 1,
  'mini_batches': 4,  # 1024 prompts, 256 in an update
  'recompute_logp': True,
}
_VERL_CLIP = _VERL | _CLIP | _TOKENS | {'dual_clip': 3.0}

_OPENRLHF = _CLIP | {
  'temperature': 1.0,
  'learning_rate': 1e-6,
  'lr_schedule': 'cosine',
  'min_lr_ratio': 0.1,
  'adam_b2': 0.95,
  'weight_decay': 0.0,
  'max_grad_norm': 1.0,
  'epochs': 1,
  'mini_batches': 8,  # 1024 prompts, 128 completions in an update
  'recompute_logp': True,
  'aggregation': 'token_mean',
  'kl': 'reward',
  'beta': 0.01,
}

_TUNIX = _NO_KL | {
  'temperature': 0.9,
  'num_generations': 2,
  'epochs': 1,
  'mini_batches': 1,
  'aggregation': 'seq_mean_token_mean',
}

# {system: {algorithm: {flag: value}}}
DEFAULTS = {
  'trl': {
    'grpo': _TRL_GRPO | _CLIP,
    'rloo': _TRL
    | _LEAVE_ONE_OUT
    | _CLIP
    | {
      'num_generations': 2,
      'loss': 'sequence_clip',
      'whiten': False,
      'aggregation': 'seq_mean_token_sum',
      'kl': 'reward',
      'beta': 0.05,
    },
    'ppo': _TRL
    | _CRITIC
    | {
      'temperature': 0.7,
      'learning_rate': 3e-6,
      'max_grad_norm': 0.0,  # it has the option and never clips
      'epochs': 4,
      'recompute_logp': False,
      'gae_lambda': 0.95,
      'value_clip': 0.2,
      'value_coef': 0.05,
      'kl': 'reward',
      'beta': 0.05,
    },
    'dr_grpo': _TRL_GRPO | _CLIP | {'aggregation': 'seq_mean_token_sum_norm'},
    'cispo': _TRL_GRPO
    | {'loss': 'cispo', 'ratio_floor': 0.0, 'ratio_cap': 0.2},
    'dapo': _TRL_GRPO
    | _CLIP
    | {'dynamic_sampling_rounds': 0, 'overlong_buffer': 0},
  },
  'verl': {
    'grpo': _VERL_CLIP | _GROUP,
    'rloo': _VERL_CLIP | _LEAVE_ONE_OUT,
    'ppo': _VERL_CLIP
    | _CRITIC
    | {'gae_lambda': 1.0, 'value_clip': 0.5, 'critic_learning_rate': 1e-5},
    'dr_grpo': _VERL_CLIP
    | _GROUP
    | {'scale': 'none', 'aggregation': 'seq_mean_token_sum_norm'},
    'cispo': _VERL
    | _GROUP
    | _TOKENS
    | {'loss': 'cispo', 'ratio_floor': 0.8, 'ratio_cap': 1.2},
    'dapo': _VERL_CLIP
    | _GROUP
    | {
      'num_generations': 16,
      'clip_high': 0.28,
      'dual_clip': 10.0,
      'mini_batches': 16,  # 512 prompts, 32 in an update
      'lr_warmup_steps': 10,
      'weight_decay': 0.1,
      'dynamic_sampling_rounds': 10,
    },
    'reinforce_pp': _VERL_CLIP | _WHITENED | {'num_generations': 1},
    'reinforce_pp_baseline': _VERL_CLIP
    | _WHITENED
    | {'baseline': 'group_mean'},
  },
  'openrlhf': {
    'grpo': _OPENRLHF | _GROUP,
    'rloo': _OPENRLHF | _LEAVE_ONE_OUT,
    'ppo': _OPENRLHF
    | _CRITIC
    | {'gae_lambda': 1.0, 'value_clip': 0.5, 'critic_learning_rate': 9e-6},
    'dr_grpo': _OPENRLHF | _GROUP | {'scale': 'none'},
    'reinforce_pp': _OPENRLHF | _WHITENED | {'num_generations': 1},
    'reinforce_pp_baseline': _OPENRLHF | _WHITENED | {'baseline': 'group_mean'},
  },
  'tunix': {
    'grpo': _TUNIX | _CLIP | _GROUP,
    'rloo': _TUNIX | _CLIP | _LEAVE_ONE_OUT,
    'ppo': _TUNIX
    | _CRITIC
    | {'gae_lambda': 0.95, 'value_clip': 0.2, 'kl': 'reward', 'beta': 0.04},
    'dr_grpo': _TUNIX
    | _CLIP
    | _GROUP
    | {'scale': 'none', 'aggregation': 'seq_mean_token_sum_norm'},
    'dapo': _TUNIX
    | _CLIP
    | _GROUP
    | _TOKENS
    | {'clip_high': 0.28, 'dynamic_sampling_rounds': 0},
  },
}

# a part that the user replaces brings its own numbers
_OF_PART = {
  'loss': ('clip_low', 'clip_high', 'dual_clip', 'ratio_cap', 'ratio_floor'),
  'credit': (
    'baseline',
    'scale',
    'gae_lambda',
    'bootstrap_truncated',
    'value_coef',
    'value_clip',
    'critic_learning_rate',
  ),
}


class Said(NamedTuple):
  """Message about a run."""

  line: str
  flags: tuple[str, ...] = ()  # shown only while they have the system's values
  when: Callable = lambda flags: True  # {flag: value} of all -> whether shown


def _several_steps(flags: dict) -> bool:
  """Tells whether a rollout has several optimizer steps, so that ratios leave
  1."""
  return (flags['epochs'] or 1) * (flags['mini_batches'] or 1) > 1


def _rate_moves(flags: dict) -> bool:
  """Tells whether the learning rate differs between steps of a rollout."""
  moves = flags['lr_schedule'] != 'constant' or flags['lr_warmup_steps'] > 0
  return moves and _several_steps(flags)


_TOKEN_RATIO = Said(
  "its rloo clips each token's ratio, not the sequence's; so here too, and "
  "--loss sequence_clip --aggregation seq_mean_token_sum is the paper's",
  ('loss', 'aggregation'),
)
_LONE = Said('a group of one has A = R there; here it is refused')
_NO_K1 = (
  'here no KL is run, and --kl reverse --beta 0.04 does what that was to do'
)
_K1_MEAN = Said(
  'it adds 0.04 k1 to the loss, which as a mean over the tokens of a sequence '
  f'pulls to no reference and makes completions longer; {_NO_K1}',
  ('kl',),
)
_K1_SUM = Said(
  'it adds 0.04 k1 to the loss, which as a sum over tokens has an expected '
  f'gradient of 0 on-policy; {_NO_K1}',
  ('kl',),
)
# {(system, algorithm): lines}
TRAPS = {
  ('trl', 'dr_grpo'): (
    Said(
      "it divides by the group's standard deviation unless told "
      "scale_rewards='none'; so here too, and --scale none is the paper's",
      ('scale',),
    ),
  ),
  ('trl', 'cispo'): (
    Said(
      'its cap is an absolute ratio that, unset, becomes epsilon = 0.2: '
      'on-policy every token weighs 0.2; so here too, and --ratio_cap 5 is '
      'what its documentation advises',
      ('ratio_cap',),
    ),
  ),
  ('trl', 'dapo'): (
    Said(
      'its dapo is the mean over tokens alone: no wider upper clip, no groups '
      'drawn anew, no punishment of length; so here too, and --clip_high 0.28 '
      "--dynamic_sampling_rounds 10 --overlong_buffer TOKENS are the paper's",
      ('clip_high', 'dynamic_sampling_rounds', 'overlong_buffer'),
    ),
  ),
  ('trl', 'ppo'): (
    Said(
      'its max_grad_norm has no effect; no gradient is clipped here either, '
      'and --max_grad_norm 1 does it',
      ('max_grad_norm',),
    ),
  ),
  ('verl', 'grpo'): (_LONE,),
  ('verl', 'rloo'): (_TOKEN_RATIO, _LONE),
  ('verl', 'dr_grpo'): (
    _LONE,
    Said(
      'before 0.7.1 its seq-mean-token-sum-norm divided by the longest '
      'completion only, not by the batch; since then by both, as here',
      ('aggregation',),
    ),
  ),
  ('verl', 'cispo'): (
    _LONE,
    Said(
      'its bounds are relative, the ratio held in [0.8, 1.2]; so here too, and '
      '--ratio_floor 0 --ratio_cap 5 bounds it from above only',
      ('ratio_floor', 'ratio_cap'),
    ),
  ),
  ('verl', 'dapo'): (
    Said(
      "its trainer's own defaults leave all of dapo off; these are the numbers "
      'of its recipe for Qwen2.5-32B'
    ),
  ),
  ('verl', 'reinforce_pp_baseline'): (_LONE,),
  ('openrlhf', 'rloo'): (_TOKEN_RATIO,),
  ('openrlhf', 'dr_grpo'): (
    Said(
      'it drops the standard deviation and keeps the mean over tokens; so here '
      "too, and --aggregation seq_mean_token_sum_norm is the paper's",
      ('aggregation',),
    ),
  ),
  ('tunix', 'grpo'): (_K1_MEAN,),
  ('tunix', 'rloo'): (_TOKEN_RATIO, _K1_MEAN),
  ('tunix', 'dr_grpo'): (_K1_SUM,),
  ('tunix', 'ppo'): (
    Said(
      "it takes 0.04 k3 from the reward, the reverse KL's gradient minus the "
      "forward's: next to nothing near the reference; here k1 is taken, the "
      'reverse KL',
      ('kl',),
    ),
    Said(
      'its loss ignores the temperature, 0.9 unless set, so that its ratio is '
      'not 1 on-policy; here the temperature is part of the policy'
    ),
    Said('it puts scores into integers, 0.7 as 0; here they are floats'),
  ),
  ('tunix', 'dapo'): (
    Said(
      'it measures length in characters and punishes without a limit; here in '
      'tokens, by 1 at most'
    ),
    Said(
      'its dynamic_sampling is not written yet; so here no group is drawn anew '
      'either, and --dynamic_sampling_rounds 10 does it',
      ('dynamic_sampling_rounds',),
    ),
  ),
}
_WHOLE_VOCABULARY = (
  'it takes log-probs of the whole vocabulary where sampling cuts it, so that '
  'its ratio is not 1 on-policy; here they are of what is sampled from'
)

_VLLM = Said(
  'no completion is dropped for a ratio of policy and sampler above 3 (there '
  'with vLLM; --importance_cap 3 --importance_mode sequence_mask does it)',
  when=lambda flags: not flags['importance_cap'],
)
_WHITEN = Said(
  'whitening divides by n, and adds 1e-8 to the standard deviation (there by '
  'n - 1, and to the variance)',
  ('whiten',),
)
_RATE = Said(
  'the learning rate moves with every optimizer step (there once a rollout)',
  when=_rate_moves,
)
_UNBOUNDED = Said(
  'log-ratios are bounded above, at 10 (there not at all)', when=_several_steps
)
_BOUNDED_20 = Said(
  'log-ratios are bounded above, at 10, and keep a gradient beyond (there at '
  '-20 and 20, without one)',
  when=_several_steps,
)
_BOUNDED_VERL = Said(
  'log-ratios are bounded above, at 10, and keep a gradient beyond (there at '
  "-20 and 20, a sequence's mean at 10, without one)",
  when=_several_steps,
)
_SUMMED = Said(
  "a token's return begins with its own reward (there the rewards of tokens "
  'are summed into one score of the completion)'
)
_IN_ORDER = Said(
  'mini-batches are drawn anew in each epoch (there in the order of the data)',
  when=_several_steps,
)
_WARM = Said(
  'the first step of a warm-up learns (there its rate is 0)',
  when=lambda flags: flags['lr_warmup_steps'] > 0,
)
_EPS_6 = Said('1e-4 is added to the standard deviation (there 1e-6)')
_EPS_9 = Said('1e-4 is added to the standard deviation (there 1e-9)')
_OPENRLHF_ALL = (
  Said(
    'rewards and the KL of a token are not clipped (there to [-10, 10] both)'
  ),
  Said(
    'no warm-up of the learning rate (there 3 % of the steps)',
    when=lambda flags: not flags['lr_warmup_steps'],
  ),
  _BOUNDED_20,
)
_VERL_ALL = (_BOUNDED_VERL, _IN_ORDER, _RATE, _WARM)
_GROUPS = (
  Said(
    'a rollout is 8 updates of whole groups (there as many as it has batches '
    'of 128 completions)',
    ('mini_batches',),
  ),
  Said(
    'the KL of a row is compared with the KL of its group (there it is '
    'subtracted as it is)',
    ('kl',),
  ),
)
_OPTIMIZER = Said("the optimizer is the experiment's (there the user's)")
# {(system, algorithm): lines} of differences
DIFFERS = {
  ('trl', 'grpo'): (_VLLM, _UNBOUNDED),
  ('trl', 'rloo'): (_UNBOUNDED,),
  ('trl', 'ppo'): (
    _WHITEN,
    _RATE,
    _UNBOUNDED,
    Said(
      'the score stands on the end token, the last whose value is learnt '
      '(there one column later)'
    ),
  ),
  ('trl', 'dr_grpo'): (_VLLM, _UNBOUNDED),
  ('trl', 'cispo'): (_VLLM, _UNBOUNDED),
  ('trl', 'dapo'): (_VLLM, _UNBOUNDED),
  ('verl', 'grpo'): (_EPS_6, _SUMMED, *_VERL_ALL),
  ('verl', 'rloo'): (_SUMMED, *_VERL_ALL),
  ('verl', 'ppo'): (_WHITEN, *_VERL_ALL),
  ('verl', 'dr_grpo'): (_SUMMED, *_VERL_ALL),
  ('verl', 'cispo'): (_EPS_6, _SUMMED, *_VERL_ALL),
  ('verl', 'dapo'): (_EPS_6, _SUMMED, *_VERL_ALL),
  ('verl', 'reinforce_pp'): (_WHITEN, *_VERL_ALL),
  ('verl', 'reinforce_pp_baseline'): (_WHITEN, _SUMMED, *_VERL_ALL),
  ('openrlhf', 'grpo'): (*_OPENRLHF_ALL, _EPS_9, *_GROUPS),
  ('openrlhf', 'rloo'): (*_OPENRLHF_ALL, *_GROUPS),
  ('openrlhf', 'ppo'): _OPENRLHF_ALL,
  ('openrlhf', 'dr_grpo'): (*_OPENRLHF_ALL, *_GROUPS),
  ('openrlhf', 'reinforce_pp'): _OPENRLHF_ALL,
  ('openrlhf', 'reinforce_pp_baseline'): (*_OPENRLHF_ALL, *_GROUPS),
  ('tunix', 'grpo'): (_OPTIMIZER, _EPS_6, _BOUNDED_20),
  ('tunix', 'rloo'): (_OPTIMIZER, _BOUNDED_20),
  ('tunix', 'ppo'): (_OPTIMIZER, _WHITEN, _UNBOUNDED),
  ('tunix', 'dr_grpo'): (_OPTIMIZER, _BOUNDED_20),
  ('tunix', 'dapo'): (_OPTIMIZER, _EPS_6, _BOUNDED_20),
}


def defaults(flags: dict) -> dict:
  """Defaults {flag: value} of a system's algorithm, both named by `flags`.

  flags: {flag: value} of all flags as typed; the numbers of a part that it
    replaces are left out.

  Raises ValueError for an algorithm without known defaults.
  """
  system, algorithm = flags['compat'], flags['algorithm']
  if system == 'none':
    return {}
  known = DEFAULTS[system]
  if algorithm not in known:
    raise ValueError(
      f'--compat {system} has no defaults for {algorithm}; pass --algorithm '
      + ', '.join(known)
    )
  found = dict(known[algorithm])
  for part, numbers in _OF_PART.items():
    if flags[part] not in (None, found[part]):
      found = {k: v for k, v in found.items() if k not in numbers}
  if flags['kl'] == 'none':
    found['beta'] = 0.0
  return found


def warnings(flags: dict) -> list[str]:
  """Warnings of a run, one line each; flags: {flag: value} of all."""
  system, algorithm = flags['compat'], flags['algorithm']
  if system == 'none':
    return []
  theirs = defaults(flags)

  def lines(table):
    return [
      message.line
      for message in table.get((system, algorithm), ())
      if message.when(flags)
      and all(n in theirs and flags[n] == theirs[n] for n in message.flags)
    ]

  name = SYSTEMS[system]
  found = [f'{name}: {line}' for line in lines(TRAPS)]
  if flags['top_p'] < 1 or flags['top_k'] or flags['min_p']:
    found.append(f'{name}: {_WHOLE_VOCABULARY}')
  differs = lines(DIFFERS)
  if differs:
    found.append(f'not as in {name}: ' + '; '.join(differs))
  return found
