"""Makes tests/golden/algorithms.npz: results of each algorithm's equations.

One small batch (C=3 prompts, G=4 samples of each, T=6 columns) goes through
every preset x aggregation x KL form x kind of reward, and through the options
that a preset may be given. The equations are here a second time, as loops over
rows and tokens in float64, from the papers' definitions and nothing else:

1. rewards_of     rewards one by one with the rows that they apply to, among
                  them the penalty for length; the KL's penalty
2. advantage_of   returns, GAE, baselines, division by std, whitening, and the
                  KL's part of what was divided
3. weights_of     how per-token losses become a scalar
4. loss_of        the scalar. Log-probs are read twice, the ones that may move
                  and the ones that are held, to honour stop-gradients
5. slope          the gradient, by central differences of 4.

An entry that the policy did not choose is NaN here, so that a number which
used one would show. The file has

* inputs `l`, `l_old`, `l_roll`, `l_ref`, `H`, `V` [B, T], `V_old` [B, T+1]
  (column t is of the state before token t; T of the one after the last
  column), `outcome`, `dense` and `second` [B, T], `greedy` [C], `mask` and
  `cut`; `some`, the rows that a reward applies to in cases of "rows": "some";
  `applies` [2, B], those of the two rewards in cases of "several";
* `cases`, each a preset and what is changed of it, in JSON; in their order
  `loss`, `kl` (the mean of rho k3), `carry` (the EMA baseline afterwards),
  `advantage` and, over chosen tokens only, `target`, `by_l`, `by_H`, `by_V`;
* `togo`, `gae_*` and `vtrace_*` [B, T] of the dense reward, for the functions
  of one sequence, with the numbers that they were made with in `sequence`.

Needs NumPy, but neither jax nor the package. To rebuild the file:

  python tests/golden/make_algorithms.py
"""

import json
import math
from itertools import product
from pathlib import Path

import numpy as np

OUT = Path(__file__).parent / 'algorithms.npz'
C, G, T = 3, 4, 6
B = C * G
CARRY = 0.4  # EMA baseline before the batch
STEP = 1e-5  # central differences
NAN = float('nan')
MASK = np.array(
  [
    # the first prompt: all of it one token, cut, ended, a tool's text within
    [1, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 0, 0],
    [1, 1, 0, 0, 1, 0],
    # the second: in `outcome` its four rewards are equal
    [1, 1, 1, 0, 0, 0],
    [1, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 1, 1],
    [1, 1, 0, 0, 0, 0],
    # the third: nothing chosen, a tool's text and then cut
    [0, 0, 0, 0, 0, 0],
    [1, 0, 1, 1, 1, 1],
    [1, 1, 1, 1, 0, 0],
    [1, 1, 1, 1, 1, 0],
  ],
  bool,
)
CUT = np.isin(np.arange(B), (1, 5, 9))  # row 6 ended in the last column
OUTCOME = (1.0, -0.5, 0.25, 2.0, 0.5, 0.5, 0.5, 0.5, 0.0, 1.5, -1.0, 0.75)
GREEDY = (0.7, 0.5, -0.3)
# rows that a reward applies to, in cases of some: of the second prompt one
SOME = ~np.isin(np.arange(B), (1, 4, 6, 7, 10))
# a second reward, of weight 0.5: equal in the third prompt
SECOND = (0.0, 1.0, 1.0, 0.0, 2.0, -1.0, 0.5, 1.0, 3.0, 3.0, 3.0, 3.0)
WEIGHT = 0.5
# where the first and the second apply, in cases of both: neither in row 11
APPLIES = np.array(
  [~np.isin(np.arange(B), (3, 11)), ~np.isin(np.arange(B), (2, 4, 5, 6, 11))]
)

KINDS = ('outcome', 'dense')
KLS = {
  kl: {'kl': kl, 'beta': 0.1 if kl != 'none' else 0.0}
  for kl in ('none', 'reward', 'reverse', 'forward')
}
AGGREGATIONS = (
  'token_mean',
  'seq_mean_token_mean',
  'seq_mean_token_sum',
  'seq_mean_token_sum_norm',
)
BASELINES = ('none', 'batch_mean', 'ema', 'group_mean', 'loo', 'greedy')

PLAIN = {
  'credit': 'returns',  # or 'gae', 'vtrace'
  'gamma': 1.0,
  'lam': 1.0,
  'rho_bar': 1.0,
  'c_bar': 1.0,
  'baseline': 'none',
  'scale': 'none',  # 'group_std', 'batch_std'
  'several': None,  # two rewards: 'sum_then_normalize', 'normalize_then_sum'
  'rows': 'all',  # that are valid; or 'some'
  'mask_truncated': False,
  'whiten': False,
  'advantage_clip': None,
  'bootstrap': False,  # of rows that were cut
  'overlong': 0,  # tokens of the buffer; 0 is no penalty
  'surrogate': 'plain',  # 'clip', 'row' (rloo), 'geometric' (gspo), 'cispo'
  'low': 0.2,
  'high': 0.2,
  'dual_clip': None,
  'cap': None,  # cispo's
  'importance_cap': None,
  'importance_mode': 'token_truncate',
  'on_policy': False,  # one pass a rollout: l_old is the held l
  'value_coef': 0.0,
  'value_clip': None,
  'entropy_coef': 0.0,
  'kl': 'none',
  'beta': 0.0,
  'aggregate': 'token_mean',
  'reward': 'outcome',
}
PPO = {
  'credit': 'gae',
  'lam': 0.95,
  'whiten': True,
  'surrogate': 'clip',
  'value_coef': 0.5,
  'value_clip': 0.2,
}
GRPO = {
  'baseline': 'group_mean',
  'scale': 'group_std',
  'surrogate': 'clip',
  'aggregate': 'seq_mean_token_mean',
}
PRESETS = {
  'reinforce': {'baseline': 'loo', 'aggregate': 'seq_mean_token_sum'},
  'rloo': {
    'baseline': 'loo',
    'surrogate': 'row',
    'aggregate': 'seq_mean_token_sum',
  },
  'remax': {'baseline': 'greedy', 'aggregate': 'seq_mean_token_sum'},
  'a2c': {'credit': 'gae', 'gamma': 0.99, 'value_coef': 0.5},
  'ppo': PPO,
  'grpo': GRPO,
  'dr_grpo': GRPO | {'scale': 'none', 'aggregate': 'seq_mean_token_sum_norm'},
  'dapo': GRPO | {'high': 0.28, 'overlong': 2, 'aggregate': 'token_mean'},
  'gspo': GRPO | {'surrogate': 'geometric', 'low': 3e-4, 'high': 4e-4},
  'cispo': GRPO | {'surrogate': 'cispo', 'cap': 5.0, 'aggregate': 'token_mean'},
  'reinforce_pp': {
    'surrogate': 'clip',
    'whiten': True,
    'kl': 'reward',
    'beta': 0.01,
  },
  'reinforce_pp_baseline': {
    'surrogate': 'clip',
    'baseline': 'group_mean',
    'whiten': True,
    'kl': 'reward',
    'beta': 0.01,
  },
  'nlpo': PPO,
}
SEQUENCE = {'gamma': 0.9, 'lam': 0.8, 'rho_bar': 1.2, 'c_bar': 0.9}


def make_inputs() -> dict:
  """Inputs, in numbers that float32 holds; NaN where not chosen."""
  rng = np.random.default_rng(0)
  l = -rng.uniform(0.1, 3.0, (B, T))
  change = rng.normal(0, 0.25, (B, T))  # l - l_old
  # a row's mean change on both sides of gspo's bounds, 3e-4 and 4e-4
  means = {2: 3.5e-4, 3: -3.5e-4, 4: 2e-4, 6: 4.5e-4, 11: -2e-4}
  for b, mean in means.items():
    noise = rng.normal(0, 0.01, T)
    change[b] = mean + noise - noise[MASK[b]].mean()
  change[1, 2], change[9, 3] = 1.9, 2.1  # ratios above cispo's cap, 5
  change[10, 1], change[0, 0] = -0.9, 0.26  # dapo clips at 1.28, ppo at 1.2
  change[7, 1] = 0.22
  l_old = l - change
  log_change = rng.normal(0, 0.5, (B, T))  # l_old - l_roll; log(2) is 0.69
  V_old = rng.normal(0, 1, (B, T + 1))
  data = {
    'l': l,
    'l_old': l_old,
    'l_roll': l_old - log_change,
    'l_ref': l - rng.normal(0, 0.5, (B, T)),
    'H': rng.uniform(0.1, 2.0, (B, T)),
    'V': V_old[:, :T] + rng.normal(0, 0.3, (B, T)),
    'dense': rng.normal(0, 1, (B, T)),
    'outcome': np.zeros((B, T)),
    'second': np.zeros((B, T)),
  }
  for b in range(B):
    if MASK[b].any():
      data['outcome'][b, chosen(b)[-1]] = OUTCOME[b]
      data['second'][b, chosen(b)[-1]] = SECOND[b]
  data = {name: np.where(MASK, x, NAN) for name, x in data.items()}
  last = np.where(CUT, V_old[:, T], NAN)
  before = np.where(MASK, V_old[:, :T], NAN)
  data['V_old'] = np.concatenate([before, last[:, None]], axis=1)
  data['greedy'] = np.array(GREEDY)
  # the loops below read exactly the float32 numbers of the file
  return {k: x.astype(np.float32).astype(float) for k, x in data.items()}


def chosen(b) -> list:
  """Columns of row b that the policy chose."""
  return [t for t in range(T) if MASK[b, t]]


def valid_rows(case) -> list:
  """Rows that a reward applies to."""
  on = SOME if case['rows'] == 'some' else np.ones(B, bool)
  if case['several']:
    on = on & APPLIES.any(0)
  return [b for b in range(B) if on[b]]


def learnt_rows(case) -> list:
  """Valid rows whose tokens are in the loss."""
  leave = CUT if case['mask_truncated'] else np.zeros(B, bool)
  return [b for b in valid_rows(case) if not leave[b]]


# 1. rewards


def overlong_penalty(n, longest, buffer) -> float:
  """Penalty: 0 up to longest - buffer tokens, linear to -1 at the longest."""
  if n <= longest - buffer:
    return 0.0
  return ((longest - buffer) - n) / buffer


def at_tokens(x, rows) -> list:
  """x[b][t] at the chosen tokens of those rows, 0 elsewhere."""
  found = [[0.0] * T for _ in range(B)]
  for b in rows:
    for t in chosen(b):
      found[b][t] = x[b, t]
  return found


def rewards_of(case, data) -> list:
  """Rewards (weight, r[b][t], rows that it applies to)."""
  valid = valid_rows(case)
  rewards = [(1.0, data[case['reward']], valid)]
  if case['several']:
    first, second = ([b for b in valid if on[b]] for on in APPLIES)
    rewards = [
      (1.0, data[case['reward']], first),
      (WEIGHT, data['second'], second),
    ]
  if case['overlong']:
    penalty = np.zeros((B, T))
    for b in valid:
      columns = chosen(b)
      if columns:
        n = len(columns)
        penalty[b, columns[-1]] = overlong_penalty(n, T, case['overlong'])
    rewards.append((1.0, penalty, valid))
  return [(w, at_tokens(x, rows), rows) for w, x, rows in rewards]


def sum_of(rewards) -> list:
  """Weighted sum r[b][t] of rewards."""
  return [
    [sum(w * r[b][t] for w, r, _ in rewards) for t in range(T)]
    for b in range(B)
  ]


def penalty_of(case, data) -> list:
  """Penalty of the KL in the reward, p[b][t]."""
  beta = case['beta'] if case['kl'] == 'reward' else 0.0
  return at_tokens(beta * (data['l_roll'] - data['l_ref']), valid_rows(case))


# 2. returns and advantages


def reward_to_go(r, columns, gamma) -> list:
  """G_t = r_t + gamma G of the next chosen token, which the columns before it
  that are not chosen have, too."""
  togo, after = [0.0] * T, 0.0
  for t in reversed(range(T)):
    if t in columns:
      after = r[t] + gamma * after
    togo[t] = after
  return togo


def by_clock(togo, columns) -> list:
  """Returns of the first, second, ... chosen token, the last held after it."""
  if not columns:
    return [0.0] * T
  return [togo[columns[min(k, len(columns) - 1)]] for k in range(T)]


def gae(r, V, last, columns, gamma, lam):
  """GAE (A, A + V): delta_t = r_t + gamma V_{t+1} - V_t,
  A = delta + gamma lam A'.

  The next state is the one before the next chosen token; `last` is its value
  after the last chosen token.
  """
  advantage, target = [0.0] * T, [0.0] * T
  A_next, V_next = 0.0, last
  for t in reversed(columns):
    delta = r[t] + gamma * V_next - V[t]
    advantage[t] = delta + gamma * lam * A_next
    target[t] = advantage[t] + V[t]
    A_next, V_next = advantage[t], V[t]
  return advantage, target


def vtrace(r, V, last, log_rho, columns, numbers):
  """V-trace's (policy-gradient advantage, target), as in IMPALA and rlax.

  target_t = V_t + rho_t delta_t + gamma c_t (target_{t+1} - V_{t+1}) with
  rho_t = min(rho_bar, rho), c_t = lam min(c_bar, rho); the advantage is
  min(1, rho) (r_t + gamma (lam target_{t+1} + (1 - lam) V_{t+1}) - V_t), and
  both the target and V of what follows the last token are `last`.
  """
  gamma, lam = numbers['gamma'], numbers['lam']
  advantage, target = [0.0] * T, [0.0] * T
  V_next = target_next = last
  for t in reversed(columns):
    ratio = math.exp(log_rho[t])
    rho = min(numbers['rho_bar'], ratio)
    c = lam * min(numbers['c_bar'], ratio)
    delta = r[t] + gamma * V_next - V[t]
    target[t] = V[t] + rho * delta + gamma * c * (target_next - V_next)
    q = r[t] + gamma * (lam * target_next + (1 - lam) * V_next)
    advantage[t] = min(1.0, ratio) * (q - V[t])
    V_next, target_next = V[t], target[t]
  return advantage, target


def mean(values) -> float:
  return sum(values) / len(values)


def std(values, ddof) -> float:
  center = mean(values)
  squares = sum((x - center) ** 2 for x in values)
  return math.sqrt(squares / (len(values) - ddof))


def group(b, rows) -> list:
  """Rows, of those, that answer the prompt of row b."""
  return [i for i in rows if i // G == b // G]


def baseline_of(case, data, held, rows, b, k) -> float:
  """Number to subtract from the return of row b's k-th token."""
  match case['baseline']:
    case 'none':
      return 0.0
    case 'batch_mean':
      return mean([held[i][k] for i in rows])
    case 'ema':
      return CARRY
    case 'group_mean':
      return mean([held[i][k] for i in group(b, rows)])
    case 'loo':
      others = [held[i][k] for i in group(b, rows) if i != b]
      return mean(others) if others else held[b][k]
    case 'greedy':
      return data['greedy'][b // G]


def centred(case, data, held, rows) -> np.ndarray:
  """Returns minus the baseline [B, k], 0 in other rows."""
  found = np.zeros((B, T))
  for b, k in product(rows, range(T)):
    found[b, k] = held[b][k] - baseline_of(case, data, held, rows, b, k)
  return found


def scaled(case, found, held, rows) -> np.ndarray:
  """Those divided by the standard deviation of whole returns; rows that are
  compared with no other have nothing left."""
  if case['scale'] == 'none':
    return found
  out = np.zeros((B, T))
  for b in rows:
    among = group(b, rows) if case['scale'] == 'group_std' else rows
    if len(among) > 1:
      whole = [held[i][0] for i in among]
      out[b] = found[b] / (std(whole, ddof=1) + 1e-4)
  return out


def returns_of(reward, gamma) -> list:
  """Returns by the clock, held[b][k]."""
  return [
    by_clock(reward_to_go(reward[b], chosen(b), gamma), chosen(b))
    for b in range(B)
  ]


def compared(case, rows) -> list:
  """Rows that have an advantage: where a group's rows are compared with each
  other, those with company."""
  together = case['baseline'] in ('group_mean', 'loo')
  if case['credit'] != 'returns' or not (
    together or case['scale'] == 'group_std'
  ):
    return rows
  return [b for b in rows if len(group(b, rows)) > 1]


def by_returns(case, data):
  """Returns (A [B, T] by the clock, whole returns that the EMA sees)."""
  rewards, valid, gamma = (
    rewards_of(case, data),
    valid_rows(case),
    case['gamma'],
  )
  total, penalty = sum_of(rewards), penalty_of(case, data)
  less = [[x - y for x, y in zip(*both)] for both in zip(total, penalty)]
  task, net = returns_of(total, gamma), returns_of(less, gamma)
  plain = centred(case, data, net, valid)
  if case['scale'] == 'none':
    return plain, [net[b][0] for b in valid]
  kl_part = plain - centred(case, data, task, valid)
  if case['several'] != 'normalize_then_sum':
    found = scaled(case, centred(case, data, task, valid), task, valid)
    return found + kl_part, [task[b][0] for b in valid]
  found, some = np.zeros((B, T)), set()
  for weight, reward, rows in rewards:
    held, rows = returns_of(reward, gamma), compared(case, rows)
    found += weight * scaled(case, centred(case, data, held, rows), held, rows)
    some |= set(rows)
  some = sorted(some)
  whole = [found[b, 0] for b in some]
  for b in some:
    found[b] = (found[b] - mean(whole)) / (std(whole, ddof=1) + 1e-4)
  return found + kl_part, None


def by_value(case, data):
  """Returns (advantage, value target) by GAE or V-trace."""
  advantage, target = np.zeros((B, T)), np.zeros((B, T))
  total, penalty = sum_of(rewards_of(case, data)), penalty_of(case, data)
  for b in valid_rows(case):
    reward = [x - y for x, y in zip(total[b], penalty[b])]
    V, columns = data['V_old'][b], chosen(b)
    last = V[T] if CUT[b] and case['bootstrap'] else 0.0
    if case['credit'] == 'gae':
      advantage[b], target[b] = gae(
        reward, V, last, columns, case['gamma'], case['lam']
      )
    else:
      log_change = data['l_old'][b] - data['l_roll'][b]
      advantage[b], target[b] = vtrace(
        reward, V, last, log_change, columns, case
      )
  return advantage, target


def advantage_of(case, data):
  """Returns (advantage, value target, EMA afterwards); 0 where not chosen."""
  advantage, target, carry = np.zeros((B, T)), np.zeros((B, T)), CARRY
  valid = valid_rows(case)
  if case['credit'] == 'returns':
    found, whole = by_returns(case, data)
    for b in valid:
      for k, t in enumerate(chosen(b)):
        advantage[b, t] = found[b, k]
    if case['baseline'] == 'ema':
      carry = 0.9 * CARRY + 0.1 * mean(whole)
  else:
    advantage, target = by_value(case, data)
  if case['whiten']:
    rows = compared(case, valid)
    every = [advantage[b, t] for b in rows for t in chosen(b)]
    center, spread = mean(every), std(every, ddof=0)
    for b in rows:
      for t in chosen(b):
        advantage[b, t] = (advantage[b, t] - center) / (spread + 1e-8)
    for b in set(valid) - set(rows):
      advantage[b] = 0.0
  if case['advantage_clip']:
    bound = case['advantage_clip']
    advantage = np.clip(advantage, -bound, bound)
  for b in set(valid) - set(learnt_rows(case)):
    advantage[b] = 0.0
  return advantage, target, carry


# 3. aggregation


def weights_of(aggregate, valid, learnt) -> dict:
  """Weights {b: w}: the scalar sums w[b] times the loss of a chosen token of
  the learnt rows. Means over rows count all valid ones."""
  tokens = sum(len(chosen(b)) for b in learnt)
  rows = len(valid)
  return {
    b: {
      'token_mean': 1 / tokens,
      'seq_mean_token_mean': 1 / (rows * max(len(chosen(b)), 1)),
      'seq_mean_token_sum': 1 / rows,
      'seq_mean_token_sum_norm': 1 / (rows * T),
    }[aggregate]
    for b in learnt
  }


# 4. the loss


def clipped(A, ratio, case) -> float:
  """Clipped loss max(-A rho, -A clip(rho)), for A < 0 never above -c A."""
  within = min(max(ratio, 1 - case['low']), 1 + case['high'])
  loss = max(-A * ratio, -A * within)
  if case['dual_clip'] and A < 0:
    loss = min(loss, -case['dual_clip'] * A)
  return loss


def policy_loss(case, A, l, l_held, l_old, b, t) -> float:
  """Surrogate of one chosen token."""
  columns = chosen(b)
  match case['surrogate']:
    case 'plain':
      return -A[b, t] * l[b, t]
    case 'clip':
      return clipped(A[b, t], math.exp(l[b, t] - l_old[b, t]), case)
    case 'row':  # all of a row's loss is at its last chosen token
      if t != columns[-1]:
        return 0.0
      ratio = math.exp(sum(l[b, k] - l_old[b, k] for k in columns))
      return clipped(A[b, columns[0]], ratio, case)
    case 'geometric':
      s = math.exp(mean([l_held[b, k] - l_old[b, k] for k in columns]))
      return clipped(A[b, t], s * math.exp(l[b, t] - l_held[b, t]), case)
    case 'cispo':
      ratio = math.exp(l_held[b, t] - l_old[b, t])
      return -min(ratio, case['cap']) * A[b, t] * l[b, t]


def kl_loss(case, data, l, l_held, l_old, b, t) -> float:
  """beta sg(rho) times k2 (the reverse KL) or k3 (the forward)."""
  d = l[b, t] - data['l_ref'][b, t]
  estimate = {
    'none': 0.0,
    'reward': 0.0,
    'reverse': d**2 / 2,
    'forward': math.exp(-d) + d - 1,
  }[case['kl']]
  ratio = math.exp(l_held[b, t] - l_old[b, t])
  return case['beta'] * ratio * estimate


def importance_weight(case, data, l_old, b, t) -> float:
  """Ratio of a token or of its row, up to the cap; above it the cap or 0."""
  level, rule = case['importance_mode'].split('_')
  columns = chosen(b) if level == 'sequence' else [t]
  ratio = math.exp(sum(l_old[b, k] - data['l_roll'][b, k] for k in columns))
  if ratio <= case['importance_cap']:
    return ratio
  return case['importance_cap'] if rule == 'truncate' else 0.0


def value_loss(case, V, V_old, target) -> float:
  loss = (V - target) ** 2
  if case['value_clip'] is not None:
    step = min(max(V - V_old, -case['value_clip']), case['value_clip'])
    loss = max(loss, (V_old + step - target) ** 2)
  return case['value_coef'] * loss


def loss_of(case, data, A, target, l, H, V, l_held) -> float:
  """Scalar loss. l may move; l_held is l under a stop-gradient."""
  l_old = l_held if case['on_policy'] else data['l_old']
  valid, learnt = valid_rows(case), learnt_rows(case)
  weights = weights_of(case['aggregate'], valid, learnt)
  value_weights = weights_of('token_mean', valid, learnt)
  total = 0.0
  for b in learnt:
    for t in chosen(b):
      loss = policy_loss(case, A, l, l_held, l_old, b, t)
      if case['importance_cap']:
        loss *= importance_weight(case, data, l_old, b, t)
      loss += kl_loss(case, data, l, l_held, l_old, b, t)
      loss -= case['entropy_coef'] * H[b, t]
      total += weights[b] * loss
      if case['value_coef']:
        total += value_weights[b] * value_loss(
          case, V[b, t], data['V_old'][b, t], target[b, t]
        )
  return total


# 5. the gradient


def slope(function, x) -> np.ndarray:
  """d function(x) / d x at each chosen token, by central differences."""
  gradient = []
  for b in range(B):
    for t in chosen(b):
      up, down = x.copy(), x.copy()
      up[b, t] += STEP
      down[b, t] -= STEP
      gradient.append((function(up) - function(down)) / (2 * STEP))
  return np.array(gradient)


def solve(case, data) -> dict:
  """Results of one case, as the file has them."""
  case = PLAIN | PRESETS[case['preset']] | case
  A, target, carry = advantage_of(case, data)
  l, H, V = data['l'], data['H'], data['V']

  def loss(l=l, H=H, V=V):
    return loss_of(case, data, A, target, l, H, V, l_held=data['l'])

  none = np.zeros(MASK.sum())
  on = MASK & np.isin(np.arange(B), learnt_rows(case))[:, None]
  d = (l - data['l_ref'])[on]
  rho = np.exp((l - (l if case['on_policy'] else data['l_old']))[on])
  return {
    'loss': loss(),
    'kl': mean(rho * (np.exp(-d) + d - 1)),
    'carry': carry,
    'advantage': A,
    'target': target[MASK],
    'by_l': slope(lambda x: loss(l=x), l),
    'by_H': slope(lambda x: loss(H=x), H) if case['entropy_coef'] else none,
    'by_V': slope(lambda x: loss(V=x), V) if case['value_coef'] else none,
  }


# the cases


def make_cases() -> list:
  """Cases, each a preset's name and its changes."""
  cases = [
    {'preset': preset, 'reward': reward, 'aggregate': aggregate} | KLS[kl]
    for preset, reward, kl, aggregate in product(
      PRESETS, KINDS, KLS, AGGREGATIONS
    )
    # rloo has one loss a row, so no mean over tokens
    if preset != 'rloo' or 'sum' in aggregate
  ]
  for preset, reward in product(PRESETS, KINDS):
    cases.append({'preset': preset, 'reward': reward})  # as it comes
  for preset, kl in product(PRESETS, ('none', 'reverse')):
    cases.append(
      {'preset': preset, 'reward': 'dense', 'on_policy': True} | KLS[kl]
    )
  for baseline, reward, kl in product(BASELINES, KINDS, ('none', 'reward')):
    cases.append(
      {'preset': 'reinforce', 'reward': reward, 'baseline': baseline}
      | {'gamma': 0.9}
      | KLS[kl]
    )
  for preset in PRESETS:
    plain = {'preset': preset, 'reward': 'dense'} | KLS['none']
    cases += [
      plain | {'gamma': 0.9} | KLS['reward'],
      plain | {'entropy_coef': 0.01},
    ]
    if PRESETS[preset].get('surrogate') != 'row':  # its ratio is no token's
      cases.append(plain | {'importance_cap': 2.0} | KLS['reverse'])
    if PRESETS[preset].get('whiten'):
      cases.append(plain | {'advantage_clip': 0.5})
    if PRESETS[preset].get('credit') == 'gae':
      cases.append(plain | {'bootstrap': True})
      cases.append(plain | {'credit': 'vtrace'} | SEQUENCE)
    if PRESETS[preset].get('surrogate') == 'clip':
      cases.append(plain | {'dual_clip': 3.0, 'importance_cap': 2.0})
  return cases + importance_cases() + row_cases() + scale_cases()


def importance_cases() -> list:
  """Cases of weights by token or by row, truncated or masked."""
  return [
    {'preset': preset, 'reward': 'dense', 'rows': rows}
    | {'importance_cap': 2.0, 'importance_mode': mode}
    | KLS[kl]
    for preset, mode, (rows, kl) in product(
      ('reinforce', 'rloo', 'grpo', 'gspo', 'cispo', 'ppo'),
      ('token_mask', 'sequence_truncate', 'sequence_mask'),
      (('all', 'none'), ('some', 'forward')),
    )
    # a row's ratio takes no weights of tokens
    if preset != 'rloo' or mode != 'token_mask'
  ]


def row_cases() -> list:
  """Cases with rows that are not valid, or not learnt from."""
  cases = []
  for preset, reward, aggregate in product(PRESETS, KINDS, AGGREGATIONS):
    if preset == 'rloo' and 'sum' not in aggregate:
      continue
    some = {'preset': preset, 'reward': reward, 'rows': 'some'}
    cases += [
      some | {'aggregate': aggregate} | KLS['reward'],
      some | {'aggregate': aggregate, 'mask_truncated': True} | KLS['reverse'],
    ]
  for baseline, reward in product(BASELINES, KINDS):
    cases.append(
      {'preset': 'reinforce', 'reward': reward, 'baseline': baseline}
      | {'rows': 'some', 'gamma': 0.9}
      | KLS['reward']
    )
  return cases


def scale_cases() -> list:
  """Cases of scales, with a KL in the reward, and of several rewards."""
  cases = []
  plain = {'preset': 'reinforce', 'gamma': 0.9} | KLS['reward']
  for baseline, scale, reward in product(
    BASELINES, ('group_std', 'batch_std'), KINDS
  ):
    one = plain | {'baseline': baseline, 'scale': scale, 'reward': reward}
    rows = 'some' if scale == 'group_std' else 'all'
    cases.append(one | {'rows': rows})
    if baseline not in ('ema', 'greedy'):
      cases.append(one | {'several': 'normalize_then_sum'})
  for preset, several, rows, reward in product(
    ('grpo', 'dapo'),
    ('sum_then_normalize', 'normalize_then_sum'),
    ('all', 'some'),
    KINDS,
  ):
    cases.append(
      {'preset': preset, 'several': several, 'rows': rows, 'reward': reward}
    )
  for reward in KINDS:
    cases.append(
      {'preset': 'reinforce_pp_baseline', 'reward': reward}
      | {'scale': 'group_std', 'several': 'normalize_then_sum', 'rows': 'some'}
    )
  return cases


def check_inputs(data):
  """Refuses a batch that misses a side of a bound or comes close to one."""
  change = (data['l'] - data['l_old'])[MASK]
  ratio = np.exp(change)
  A, target, _ = advantage_of(PLAIN | PPO | {'reward': 'dense'}, data)
  for bound in (0.8, 1.2, 1.28, 5.0):
    for side in (ratio < bound, ratio > bound):
      assert side.any(), bound
      if bound < 5:
        assert (side & (A[MASK] > 0)).any(), bound
        assert (side & (A[MASK] < 0)).any(), bound
    assert abs(ratio - bound).min() > 1e-3, bound
  assert (ratio[A[MASK] < 0] > 3).any(), 'the dual clip'
  rows = [b for b in range(B) if chosen(b)]
  logs = [mean((data['l'] - data['l_old'])[b, MASK[b]]) for b in rows]
  for bound in (1 - 3e-4, 1 + 4e-4):
    side = np.exp(logs) < bound
    assert 0 < side.sum() < len(rows), bound
    assert abs(np.exp(logs) - bound).min() > 3e-5, bound
  sums = [sum((data['l'] - data['l_old'])[b, MASK[b]]) for b in rows]
  for bound in (0.8, 1.2):
    side = np.exp(sums) < bound
    assert 0 < side.sum() < len(rows), bound
    assert abs(np.exp(sums) - bound).min() > 1e-3, bound
  lag = data['l_old'] - data['l_roll']
  whole = np.exp([lag[b, MASK[b]].sum() for b in rows])
  assert 0 < (whole > 2).sum() < len(rows)
  assert abs(whole - 2).min() > 1e-3
  weight = np.exp(lag[MASK])
  for bound in (SEQUENCE['c_bar'], SEQUENCE['rho_bar'], 2.0):
    assert (weight > bound).any(), bound
    assert (weight < bound).any(), bound
  move = (data['V'] - data['V_old'][:, :T])[MASK]
  error = (data['V'] - target)[MASK]
  for sign in (1, -1):  # out of the bound, towards the target and from it
    assert (sign * move > 0.2).any(), sign
    assert ((abs(move) > 0.2) & (sign * move * error > 0)).any(), sign
  assert abs(abs(move) - 0.2).min() > 1e-4


def main():
  data = make_inputs()
  check_inputs(data)
  cases = make_cases()
  solved = [solve(case, data) for case in cases]
  out = {name: np.stack([s[name] for s in solved]) for name in solved[0]}
  togo, found = [], []
  numbers = SEQUENCE
  for b in range(B):
    r = [data['dense'][b, t] if MASK[b, t] else 0.0 for t in range(T)]
    last = data['V_old'][b, T] if CUT[b] else 0.0
    V, columns = data['V_old'][b], chosen(b)
    log_change = data['l_old'][b] - data['l_roll'][b]
    togo.append(reward_to_go(r, chosen(b), numbers['gamma']))
    found.append(
      gae(r, V, last, columns, numbers['gamma'], numbers['lam'])
      + vtrace(r, V, last, log_change, columns, numbers)
    )
  names = ('gae_advantage', 'gae_target', 'vtrace_advantage', 'vtrace_target')
  out |= {name: np.array(x) for name, x in zip(names, zip(*found))}
  out['togo'] = np.array(togo)
  for name, x in out.items():
    assert np.isfinite(x).all(), f'{name} used an entry that was not chosen'
  exact = {'loss', 'kl', 'carry'}
  out = {k: x if k in exact else x.astype(np.float32) for k, x in out.items()}
  inputs = {k: np.nan_to_num(x.astype(np.float32)) for k, x in data.items()}
  np.savez_compressed(
    OUT,
    mask=MASK,
    cut=CUT,
    some=SOME,
    applies=APPLIES,
    cases=np.array([json.dumps(case) for case in cases]),
    sequence=np.array(json.dumps(SEQUENCE)),
    carry_before=np.array(CARRY),
    **inputs,
    **out,
  )
  print(f'{OUT.name}: {len(cases)} cases, {OUT.stat().st_size:,} bytes')


if __name__ == '__main__':
  main()
