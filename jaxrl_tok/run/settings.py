"""Settings of a run, in groups; nothing here imports jax.

A group is a frozen dataclass. flags.py turns settings into flags, and `train`
takes them as arguments of equal names. algorithm_settings.py has those of the
algorithm.
"""

import dataclasses
import difflib
from typing import Any, Literal

from jaxrl_tok.credit.names import DISCOUNTS
from jaxrl_tok.run.algorithm_settings import AlgorithmSettings

# words of --allow_change, see run/foundation.py
CHANGES = 'data', 'tokenizer', 'template', 'model', 'rewards', 'settings'


@dataclasses.dataclass(frozen=True)
class RunSettings:
  """The run: where it writes, how long it lasts."""

  output_dir: str | None = None
  """Directory of the run, or gs://BUCKET/RUN (extra [gcs]); default:
  runs/EXPERIMENT-TIME."""
  seed: int = 0
  """Seed of the data's order, the parameters and the sampling."""
  max_steps: int = 1000
  """Updates at most."""
  stop_at_reward: float | None = None
  """Stop when the held-out reward (greedy) is this or more."""
  patience: int = 0
  """Evaluations in a row without a better --best_metric that end the run; 0: no
  limit."""
  best_metric: str | None = None
  """Metric of evaluations, as eval/reward or eval/NAME/reward, whose best
  checkpoint is kept beside the newest ones; default: none is kept, and
  --patience and --export best go by eval/reward. The best of many noisy
  evaluations is too good to be true: judge what is exported on other data."""
  best_mode: Literal['max', 'min'] = 'max'
  """Whether more of --best_metric is better, or less."""
  export: Literal['auto', 'last', 'best'] = 'auto'
  """Policy in export/: that of the last step, or of the best evaluation while
  training; auto: the best with --patience, else the last."""
  eval_every: int = 50
  """Steps between evaluations on held-out data; 0: only before the first step
  and after the last."""
  audit: bool = True
  """Audit every evaluation by numbers that no reward sees, as repetition and
  copies of the prompt; warn where they become worse while the reward rises."""
  held_out: int | None = None
  """Held-out prompts at most; default: the task's number."""
  save_every: int = 200
  """Steps between checkpoints; 0: only the last."""
  keep: int = 2
  """Checkpoints on disk, the newest ones; with --best_metric also the best."""
  resume: str = 'never'
  """Checkpoint of output_dir to go on from: never, auto (the newest that is
  whole; from step 0 where there is none at all) or a step."""
  allow_change: str = ''
  """Changes since the checkpoint that a resumed run takes: data, tokenizer,
  template, model, rewards, settings; several with commas."""
  push_to_hub: str | None = None
  """Upload the policy to this repository, OWNER/NAME (HF_TOKEN); a new one is
  private."""
  steps_per_call: int = 0
  """Steps in one program, with rewards that are JAX functions; 0: step by step,
  with rewards on the host, too."""
  reward_on_error: Literal['raise', 'mask', 'zero'] = 'raise'
  """Treatment of a reward that fails: save and stop, mask (it does not apply to
  those completions) or zero. A value that is no finite number concerns its
  completion; an exception its function's whole batch, or with --reward_workers
  its completion, too."""
  reward_workers: int = 0
  """Processes that reward functions on the host run in, which are killed and
  replaced where a function hangs, exits or takes too much; each is called with
  the completions of some prompts, several side by side. 0: in this one."""
  reward_timeout: float = 60.0
  """Seconds of a call in a reward worker; where it fails, its completions are
  asked one by one, each in a tenth of them, and all in as many again."""
  reward_memory: float = 4.0
  """GiB that a reward worker and its children may hold; 0: no limit."""
  max_nonfinite: int = 3
  """Updates in a row that are not finite before the run stops; each is skipped.
  0: no limit."""
  max_kl: float = 0.0
  """KL to the starting policy, in nats a token, above which the run has
  diverged; 0: any."""
  min_entropy: float = 0.0
  """Entropy, in nats a token, below which the run has diverged; 0: any."""
  max_grad_ratio: float = 0.0
  """Gradient norm over its median in the last 50 steps, above which the run has
  diverged; 0: any."""
  divergence_steps: int = 3
  """Steps in a row beyond such a limit (that log the number) that end the
  run."""
  on_divergence: Literal['stop', 'rollback'] = 'stop'
  """Treatment of a run that has diverged: stop (exit status 1), or once go on
  from the last good checkpoint with half the learning rate."""
  step_timeout: float = 0.0
  """Seconds after which a step, or an evaluation, hangs: the stacks of all
  threads are written, and the run ends with exit status 75, to be started again
  with --resume auto. 0: never."""
  keep_special_tokens: bool = False
  """Keep special tokens in the completions that reward functions get."""
  report_to: Literal['tensorboard', 'none'] = 'tensorboard'
  """Writer of metrics, beside metrics.jsonl."""
  print_config: bool = False
  """Print every setting, the parameters and their placement, and exit."""
  dry_run: bool = False
  """Compile a step and print its memory, FLOPs and communication, and exit; a
  --model directory needs no weights. Prompts have --max_prompt_length tokens,
  or as many as the longest one."""
  target: str | None = None
  """Devices of a --dry_run that need not be here: v4:2x2x4, v5e:16x16,
  v5p:4x4x4, v6e:8x8 (extra [tpu]) or gpu:8; default: those of this machine."""

  @property
  def allowed(self) -> list[str]:
    """Words of allow_change."""
    return self.allow_change.split(',') if self.allow_change else []

  @property
  def exports_best(self) -> bool:
    patient = self.export == 'auto' and self.patience > 0
    return patient or self.export == 'best'

  @property
  def keeps_best(self) -> bool:
    return self.best_metric is not None or self.exports_best


@dataclasses.dataclass(frozen=True)
class ModelSettings:
  """The model and the machine."""

  model: str | None = None
  """Model to start from: Hugging Face directory, GGUF file, hub id, or
  pip:PACKAGE, an installed package that holds a GGUF file."""
  revision: str | None = None
  """Branch, tag or commit of a hub id."""
  param_dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
  """Dtype that parameters are stored in; auto: float32, and for a base that
  LoRA freezes that of its file. bfloat16: gradients are too, and each
  optimizer step, made in float32, is rounded stochastically; float32 with
  --dtype bfloat16 holds float32 masters. float16: for a frozen base only."""
  quantize: Literal['none', 'int8'] = 'none'
  """Storage of weights that nothing trains, LoRA's base and the --reward_model.
  int8: matrices as 8-bit integers (load_in_8bit), a scale for each output,
  multiplied by it in the product: a byte for each weight."""
  lora_rank: int = 0
  """Rank of LoRA adapters, trained in place of the model; 0: train the
  model."""
  lora_alpha: float = 32.0
  """Alpha of LoRA: adapters are scaled by alpha / rank."""
  lora_targets: tuple[str, ...] = ('all-linear',)
  """Matrices with an adapter, by the ends of their names."""
  lora_adapter: str | None = None
  """Directory of PEFT adapters to start from, with their rank, alpha and
  targets."""
  reward_model: str | None = None
  """Classifier of one label (directory or hub id), whose score is added to the
  reward."""
  reward_model_weight: float = 1.0
  """Weight of the reward model's score."""
  reward_model_by: Literal['sequence', 'token'] = 'sequence'
  """Place of the reward model's score: on the last token of a completion
  (sequence), or its changes from token to token (token), which sum to it."""
  dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'
  """Compute dtype; auto: float32 on CPU, bfloat16 elsewhere."""
  remat: Literal['auto', 'none', 'dots', 'full'] = 'auto'
  """Recomputation in the backward pass, by block: nothing; all but products
  with weights; all. Saves memory, costs time. auto: nothing on a CPU, as little
  as fits elsewhere."""
  attention: Literal['auto', 'xla', 'cudnn', 'splash'] = 'auto'
  """Kernel of attention over many tokens; auto: cudnn on GPU, splash on TPU,
  else xla, as in encoder-decoders."""
  scan_layers: Literal['auto', 'true', 'false'] = 'auto'
  """Compile one layer and scan it (true), or all of them in a loop (false),
  for many tokens at once; auto: scan on accelerators, and 8 layers or more on a
  CPU."""
  cpu_devices: int = 1
  """Devices that a CPU is split into, each with rows of its own and a copy of
  the weights. Two on two cores sample faster, and learn no faster."""
  mesh: str = 'data=-1,fsdp=1,tensor=1'
  """Devices along each axis of the mesh; -1: all that are left. auto: chosen by
  the sizes of model and memory, and explained."""
  micro_batch: int | Literal['auto'] = 'auto'
  """Completions in one micro-batch of the gradient; 0: all at once; auto: as
  many as the accelerator's memory or the CPU's last cache holds."""
  length_buckets: int = 2
  """Completion lengths that the update is compiled for, each half the one
  before, down to 32 tokens; a step takes the shortest that holds its
  completions. So it is with the transcripts that turns are sampled after."""


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
  """Prompts, and sampling of completions."""

  num_prompts: int = 32
  """Prompts in a step (C)."""
  num_generations: int = 16
  """Completions of each prompt (G)."""
  max_completion_length: int | None = None
  """Tokens in a completion at most (T), the end token included; default: the
  longest answer of a supervised start, else 64."""
  temperature: float = 1.0
  """Temperature, which divides the logits; part of the trained policy."""
  top_k: int = 0
  """Keep the k most likely tokens; 0: all."""
  top_p: float = 1.0
  """Keep the most likely tokens that together reach this probability."""
  min_p: float = 0.0
  """Keep tokens of at least this share of the largest probability."""
  stop_token: tuple[str, ...] = ()
  """Tokens that end a completion beside the model's own, by text or id."""
  stop: tuple[str, ...] = ()
  """Texts that end a completion, each by the token that completes it; they stay
  in the completion. A new line is $'\\n' in bash."""
  compact_levels: int = 0
  """Compactions of a batch while it is sampled (one device): once half of the
  rows have ended, the others move together. Faster where lengths differ much
  and prompts are short; longer to compile."""
  replay_groups: int = 0
  """Groups of earlier steps added to each batch; 0: none. Needs importance_cap,
  V-trace or a loss with a ratio."""
  replay_capacity: int = 256
  """Groups that the replay buffer holds."""
  ahead: bool = False
  """Sample the next batch while this one is scored and learnt from, one step
  off-policy. Needs importance_cap, V-trace or a loss with a ratio."""

  @property
  def truncates(self) -> bool:
    return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclasses.dataclass(frozen=True)
class TurnSettings:
  """Episodes of several turns, of a task with an environment;
  --max_completion_length is that of a turn."""

  max_turns: int = 8
  """Turns of an episode at most."""
  max_episode_length: int | None = None
  """Tokens of an episode at most, observations included and its prompt not (the
  T of an update); default: twice --max_turns times --max_completion_length."""
  cut_turns: Literal['act', 'end'] = 'act'
  """Turns without an end token within --max_completion_length: the environment
  gets their text (act), or the episode is over (end)."""
  discount: Literal[DISCOUNTS] = 'token'
  """Unit that --gamma and --gae_lambda count: tokens, or turns."""
  seats: Literal[1, 2] = 1
  """Seats of the environment, all played by the policy (self-play); each is
  credited with its own rewards."""
  history: Literal['template', 'sampled'] = 'template'
  """Earlier turns in a later one's prompt, where prompts are messages: as the
  chat template writes them, refused where it rewrites them, or always as they
  were sampled."""
  turn_deadline: float = 30.0
  """Seconds in which an environment must answer; a late one ends its
  episode."""
  environment_workers: int = 8
  """Environments that answer side by side."""
  environment_processes: bool = False
  """Run each environment in a process of its own, which can be ended where it
  is late; a thread cannot."""


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """The data: columns and long prompts."""

  rename: tuple[str, ...] = ()
  """Rename columns, old=new: question=prompt."""
  max_prompt_length: int | None = None
  """Tokens in a prompt at most (P); default: those of the longest one."""
  long_prompts: Literal['error', 'drop', 'cut_left', 'cut_right'] = 'error'
  """Treatment of longer prompts: refuse the data, drop the prompt, or cut its
  left or right end."""
  chat_template_kwargs: str = '{}'
  """Variables of the model's chat template, as JSON: {"enable_thinking":
  false}."""
  chat_date: str | None = None
  """Date YYYY-MM-DD that a chat template gets where it asks for one; default:
  that of the run's first start."""


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """The optimizer."""

  learning_rate: float | None = None
  """Peak learning rate; default: 1e-5 of a --model, 1e-4 of its adapters, 1e-3
  of a new policy."""
  optimizer: Literal['adamw', 'muon', 'adafactor', 'sgd'] = 'adamw'
  """Direction of an optimizer step. muon: orthogonal ones for hidden matrices,
  adamw's for embeddings, heads, norms and biases; adafactor: factored second
  moments, no scale by the parameters; sgd: the gradient, no momentum."""
  lr_schedule: Literal['constant', 'linear', 'cosine'] = 'constant'
  """Learning rate after the warm-up, by optimizer steps made; linear and cosine
  end after max_steps full updates."""
  min_lr_ratio: float | None = None
  """Share of the peak at which linear and cosine end; default: 0.1."""
  lr_warmup_steps: int = 0
  """Steps of linear warm-up; the first has peak / lr_warmup_steps."""
  adam_b2: float | None = None
  """Decay of the second moment of adamw, and of muon's share of it; default:
  0.95."""
  weight_decay: float = 0.0
  """Decoupled weight decay, times the learning rate; not of biases and scales
  of norms."""
  weight_decay_all: bool = False
  """Decay biases and scales of norms, too."""
  max_grad_norm: float = 1.0
  """Global norm that gradients are scaled down to; 0: no clipping."""
  moment_dtype: Literal['float32', 'bfloat16'] = 'float32'
  """Dtype that the moments of adamw and muon are stored in; bfloat16 halves
  their memory, with stochastic rounding."""


@dataclasses.dataclass(frozen=True)
class SizeSettings:
  """The decoder, when no --model is given."""

  d_model: int = 64
  """Width (D)."""
  num_layers: int = 2
  """Blocks (L)."""
  num_heads: int = 4
  """Query heads (N)."""
  num_kv_heads: int = 2
  """Key/value heads (K)."""
  d_ff: int = 192
  """Feed-forward width (F)."""


@dataclasses.dataclass(frozen=True)
class WarmStartSettings:
  """The supervised start on right answers, when no --model is given."""

  warm_start_stop_at: float = 0.4
  """Held-out reward that ends the supervised start."""
  warm_start_max_steps: int = 1000
  """Steps of the supervised start at most."""
  warm_start_batch_size: int = 128
  """Prompts in a step of the supervised start."""
  warm_start_learning_rate: float = 3e-3
  """Peak learning rate of the supervised start (Adam, cosine)."""
  warm_start_check_every: int = 5
  """Steps between evaluations of the supervised start."""
  cache: bool = True
  """Cache the supervised start under ~/.cache/jaxrl_tok for later runs."""


@dataclasses.dataclass(frozen=True)
class ProcessSettings:
  """Several processes, one for each machine; found by themselves on Cloud TPU,
  GKE, SLURM and Open MPI."""

  coordinator_address: str | None = None
  """HOST:PORT of process 0."""
  num_processes: int | None = None
  """Processes of the run; 1: this one alone, whatever the cluster says."""
  process_id: int | None = None
  """Number of this process, from 0."""
  start_timeout: int = 300
  """Seconds to wait for the other processes at the start."""
  heartbeat_timeout: int = 60
  """Seconds without a sign of life from a process before the others end."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run, all groups."""

  run: RunSettings = RunSettings()
  data: DataSettings = DataSettings()
  model: ModelSettings = ModelSettings()
  sampling: SamplingSettings = SamplingSettings()
  turns: TurnSettings = TurnSettings()
  algorithm: AlgorithmSettings = AlgorithmSettings()  # noqa: RUF009  frozen
  optimizer: OptimizerSettings = OptimizerSettings()
  size: SizeSettings = SizeSettings()
  warm_start: WarmStartSettings = WarmStartSettings()
  process: ProcessSettings = ProcessSettings()


# old names of flags
RENAMED = {
  'eval_prompts': 'held_out',
  'halvings': 'compact_levels',
  'update_lengths': 'length_buckets',
  'resample_rounds': 'dynamic_sampling_rounds',
  'reference_every': 'ref_sync_steps',
  'mask_every': 'mask_sync_steps',
}


def flatten(settings) -> dict:
  """Flattens groups to {name: value} of every setting."""
  found = {}
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    if dataclasses.is_dataclass(value):
      found |= flatten(value)
    else:
      found[field.name] = value
  return found


def with_values(settings, values: dict[str, Any]):
  """Replaces the values of settings by name, in whatever group; a list stands
  for a tuple."""
  changes = {}
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    if dataclasses.is_dataclass(value):
      changes[field.name] = with_values(value, values)
    elif field.name in values:
      new = values[field.name]
      texts = isinstance(value, tuple) and isinstance(new, list)
      changes[field.name] = tuple(new) if texts else new
  return dataclasses.replace(settings, **changes)


def suggest(name: str, known) -> str:
  """Suggests a cure for a name that is not known."""
  if name in RENAMED:
    return f'it is called {RENAMED[name]} now'
  near = difflib.get_close_matches(name, sorted(known), 1, 0.6)
  return f'did you mean {near[0]}?' if near else '--help lists the flags'


def check_names(values: dict, known) -> None:
  """Refuses a name that is no setting."""
  for name in values:
    if name not in known:
      raise ValueError(f'{name} is no setting; {suggest(name, known)}')
