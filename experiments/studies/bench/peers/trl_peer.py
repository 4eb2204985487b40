"""TRL's GRPOTrainer: seconds for one whole GRPO step on the CPU.

Measured: from asking the data loader for a batch of C prompts x G copies,
through the rollout (generate, T tokens a row), the reward, the loss and its
gradient on all C x G rows at once, to the end of the optimizer's step.
`trainer.train()` owns the loop, so a callback stands between two steps: it is
called when a step has ended, closes that round and waits for the next one to
be asked for. (on_step_begin would do as well: it is fired before TRL generates,
in training_step -> _prepare_inputs; only the fetch of the prompts is earlier.)

The model is hf_peer's, whole or with adapters (peft) on all linear layers. One
inner iteration, no reference (beta 0), no
gradient checkpointing, no gradient clipping, no logging, no saving.
min_new_tokens keeps every row going to T; TRL has no way to do without an end
token.

  python trl_peer.py '{"bench": "step", "size": {...}, "prompts": 8, ...}'
"""

import protocol

# isort: split
import tempfile

import datasets
import hf_peer
import numpy as np
import tokenizers
import torch
import transformers
import trl


def make_tokenizer(vocab_size):
  """Makes a tokenizer of one word a token: 't7' is token 7, 0 and 1 are pad and
  end."""
  names = ['<pad>', '<end>', *(f't{i}' for i in range(2, vocab_size))]
  vocab = {name: i for i, name in enumerate(names)}
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, '<pad>'))
  words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token='<pad>', eos_token='<end>'
  )


def make_prompts(job, tokenizer, count):
  """Random prompts, each of exactly P tokens."""
  shape = (count, job['prompt_length'])
  rng = np.random.default_rng(0)
  tokens_CxP = rng.integers(2, job['size']['vocab_size'], shape)
  texts = [' '.join(f't{i}' for i in row) for row in tokens_CxP]
  found = {len(ids) for ids in tokenizer(texts)['input_ids']}
  protocol.check('prompt lengths', found, {job['prompt_length']})
  return datasets.Dataset.from_dict({'prompt': texts})


def make_reward(job):
  lengths = [job['completion_length']] * (job['prompts'] * job['samples'])

  def share_of_even_tokens(completion_ids, **_):
    found = [len(ids) for ids in completion_ids]
    protocol.check('tokens in each completion', found, lengths)
    return [float(np.mean(np.array(ids) % 2 == 0)) for ids in completion_ids]

  return share_of_even_tokens


class BetweenSteps(transformers.TrainerCallback):
  """Starts a round when one is asked for; ends training with the input."""

  def __init__(self, job):
    packages = ['torch', 'transformers', 'trl']
    packages += ['peft'] if job['adapters'] else []
    self.rounds = protocol.rounds(packages, job)

  def on_train_begin(self, args, state, control, **_):
    next(self.rounds)

  def on_step_end(self, args, state, control, **_):
    control.should_training_stop = not next(self.rounds, False)


def make_config(job, directory):
  return trl.GRPOConfig(
    output_dir=directory,
    use_cpu=True,
    bf16=job['dtype'] == 'autocast',
    per_device_train_batch_size=job['prompts'] * job['samples'],
    num_generations=job['samples'],
    max_completion_length=job['completion_length'],
    generation_kwargs={'min_new_tokens': job['completion_length']},
    temperature=1.0,
    beta=0.0,
    learning_rate=job['learning_rate'],
    lr_scheduler_type='constant',
    max_grad_norm=0.0,
    max_steps=1_000_000,
    gradient_checkpointing=False,
    dataloader_pin_memory=False,
    logging_strategy='no',
    save_strategy='no',
    report_to='none',
    disable_tqdm=True,
  )


def make_adapters(job):
  """Makes the PEFT configuration of a job, or None."""
  if job['adapters'] is None:
    return None
  import peft  # no need of it otherwise

  return peft.LoraConfig(
    r=job['adapters']['rank'],
    lora_alpha=job['adapters']['alpha'],
    lora_dropout=0.0,
    target_modules='all-linear',
    task_type='CAUSAL_LM',
  )


def main():
  job = protocol.read_job()
  protocol.check('bench of trl_peer', job['bench'], 'step')
  torch.set_num_threads(job['threads'])
  torch.manual_seed(0)

  # bfloat16 is the whole model in it. Autocast (bf16=True on float32 weights)
  # casts the weights anew at every token; it was no faster: 35 and 26.8 s a
  # step against 27.1 and 26.7 s on a busy CPU without bfloat16 instructions.
  dtype = torch.bfloat16 if job['dtype'] == 'bfloat16' else torch.float32
  model = hf_peer.make_model(job).to(dtype)
  tokenizer = make_tokenizer(job['size']['vocab_size'])
  with tempfile.TemporaryDirectory() as directory:
    trainer = trl.GRPOTrainer(
      model=model,
      reward_funcs=make_reward(job),
      args=make_config(job, directory),
      # Enough for 256 steps without the data loader starting again.
      train_dataset=make_prompts(job, tokenizer, 256 * job['prompts']),
      processing_class=tokenizer,
      callbacks=[BetweenSteps(job)],
      peft_config=make_adapters(job),
    )
    trainer.train()


if __name__ == '__main__':
  main()
