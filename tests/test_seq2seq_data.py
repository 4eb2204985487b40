"""Prompts and completions of encoder-decoders: ids are those that the family's
own tokenizer in transformers gives, special tokens included."""

import importlib.util
import io
import json
import shutil

import numpy as np
import pytest
import sentencepiece
from conftest import SEQ2SEQ
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, MBartTokenizer

from jaxrl_tok import data
from jaxrl_tok.data.prompts import shorten
from jaxrl_tok.data.tokenizers import answer_ids, bytes_bound
from jaxrl_tok.hub.directory import open_model
from jaxrl_tok.hub.tokenizer import auto_difference, name_class, read_tokenizer

CORPUS = [
  'translate English to German: the cat sat on the mat.',
  'summarize: 47 dogs and 12 cats, is it not so?',
  'der Hund und die Katze sagen hallo, ja oder nein?',
]
TEXTS = [*CORPUS, 'the', '', ' a  b ', 'Katze</s>', 'ünbekannt 你好', '.' * 9]
T5_TOKENS = ['<pad>', '</s>', '<unk>']
BART_TOKENS = ['<s>', '<pad>', '</s>', '<unk>', '<mask>']
MBART_TOKENS = ['<s>', '<pad>', '</s>', '<unk>', 'en_XX', 'de_DE', 'ro_RO']


def unigram(special: list[str]) -> Tokenizer:
  """Unigram of pieces, as SentencePiece makes it."""
  found = Tokenizer(models.Unigram())
  found.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
  )
  found.decoder = decoders.Metaspace()
  trainer = trainers.UnigramTrainer(
    vocab_size=90,
    special_tokens=special,
    unk_token='<unk>',
    show_progress=False,
  )
  found.train_from_iterator(CORPUS * 4, trainer)
  return found


def byte_level(special: list[str]) -> Tokenizer:
  """Byte-level BPE, as GPT-2 and BART have it."""
  found = Tokenizer(models.BPE())
  found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  found.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=special,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  found.train_from_iterator(CORPUS * 4, trainer)
  return found


def write(at, tokenizer: Tokenizer, template: str, family: str, **named):
  """Directory of a tokenizer of the family, whose class it names."""
  ids = {t: tokenizer.token_to_id(t) for t in template.split() if t != '$A'}
  tokenizer.post_processor = TemplateProcessing(
    single=template, special_tokens=list(ids.items())
  )
  at.mkdir(exist_ok=True)
  tokenizer.save(str(at / 'tokenizer.json'))
  names = {'t5': 'T5', 'bart': 'Bart', 'mbart': 'MBart'}
  named |= {'eos_token': '</s>', 'pad_token': '<pad>', 'unk_token': '<unk>'}
  described = {'tokenizer_class': f'{names[family]}Tokenizer', **named}
  (at / 'tokenizer_config.json').write_text(json.dumps(described))
  (at / 'config.json').write_text(json.dumps({'model_type': family}))
  return at


def t5(at):
  return write(at, unigram(T5_TOKENS), '$A </s>', 't5', extra_ids=0)


def bart(at):
  return write(at, byte_level(BART_TOKENS), '<s> $A </s>', 'bart')


def mbart(at, **named):
  made = unigram(MBART_TOKENS)
  return write(at, made, '$A </s> en_XX', 'mbart', **named)


def trained_spm(corpus: list[str], **ids) -> bytes:
  """SentencePiece model of a corpus."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(corpus * 20),
    model_writer=model,
    vocab_size=50,
    hard_vocab_limit=False,
    minloglevel=2,
    **ids,
  )
  return model.getvalue()


@pytest.fixture(scope='module')
def marian(tmp_path_factory):
  """Directory of a Marian tokenizer: two SentencePiece models, one vocabulary,
  whose ids are neither's."""
  at = tmp_path_factory.mktemp('marian')
  pieces = []
  for name, corpus in (('source', CORPUS[:2]), ('target', CORPUS[2:])):
    (at / f'{name}.spm').write_bytes(trained_spm(corpus))
    read = sentencepiece.SentencePieceProcessor(
      model_file=str(at / f'{name}.spm')
    )
    pieces += [read.id_to_piece(i) for i in range(3, read.get_piece_size())]
  tokens = dict.fromkeys(['</s>', '<unk>', '>>de<<', *pieces, '<pad>'])
  vocab = {token: i for i, token in enumerate(tokens)}
  (at / 'vocab.json').write_text(json.dumps(vocab))
  (at / 'tokenizer_config.json').write_text('{}')
  (at / 'config.json').write_text('{"model_type": "marian"}')
  return at


# --- ids


@pytest.mark.parametrize(
  ('make', 'start', 'end'),
  [
    (t5, [], ['</s>']),
    (bart, ['<s>'], ['</s>']),
    (mbart, [], ['</s>', 'en_XX']),
  ],
)
def test_an_encoder_reads_what_transformers_reads(make, start, end, tmp_path):
  at = make(tmp_path)
  found, _ = read_tokenizer(at, 10_000)
  theirs = AutoTokenizer.from_pretrained(at, local_files_only=True)
  want = [theirs(text)['input_ids'] for text in TEXTS]
  got = data.encode_prompts(found, TEXTS, whole=True)
  assert got == want
  for ids in got:
    tokens = found.convert_ids_to_tokens(ids)
    assert tokens[: len(start)] == start
    assert tokens[-len(end) :] == end
  assert data.decode_all(found, got) == [
    theirs.decode(ids, skip_special_tokens=True) for ids in want
  ]
  # a text that a decoder would continue ends nothing
  assert data.prompt_ids(found, 'the')[-1] != found.eos_token_id


@pytest.mark.parametrize('language', ['en_XX', 'de_DE', None])
def test_the_source_language_is_the_one_that_is_named(language, tmp_path):
  named = {'src_lang': language} if language else {}
  at = mbart(tmp_path, **named)
  found, _ = read_tokenizer(at, 10_000)
  theirs = MBartTokenizer.from_pretrained(at, local_files_only=True)
  for text in TEXTS:
    (ids,) = data.encode_prompts(found, [text], whole=True)
    assert ids == theirs(text)['input_ids']
    assert ids[-1] == found.convert_tokens_to_ids(language or 'en_XX')
  assert auto_difference(at) is None
  assert name_class(at)


def test_a_source_language_that_is_no_token_is_refused(tmp_path):
  with pytest.raises(ValueError, match="src_lang 'xx_XX', which is no token"):
    read_tokenizer(mbart(tmp_path, src_lang='xx_XX'), 10_000)


def test_marian_reads_by_the_source_and_writes_by_the_target(marian):
  found, _ = read_tokenizer(marian, 10_000)
  theirs = AutoTokenizer.from_pretrained(marian, local_files_only=True)
  texts = [*TEXTS, '>>de<< the cat']
  got = data.encode_prompts(found, texts, whole=True)
  assert got == [theirs(text)['input_ids'] for text in texts]
  assert all(ids[-1] == found.eos_token_id == 0 for ids in got)
  german = 'der Hund und die Katze'
  answer = answer_ids(found, german, (0,))
  assert answer == theirs(text_target=german)['input_ids']
  assert answer != theirs(german)['input_ids']
  assert data.decode_all(found, [answer]) == [german]


def test_a_t5_of_sentencepiece_alone_is_read(tmp_path):
  ids = {'pad_id': 0, 'eos_id': 1, 'unk_id': 2, 'bos_id': -1}
  (tmp_path / 'spiece.model').write_bytes(trained_spm(CORPUS, **ids))
  (tmp_path / 'config.json').write_text('{"model_type": "t5"}')
  found, _ = read_tokenizer(tmp_path, 10_000)
  theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
  got = data.encode_prompts(found, TEXTS, whole=True)
  assert got == [theirs(text)['input_ids'] for text in TEXTS]
  assert {ids[-1] for ids in got} == {1}


def test_a_vocabulary_without_its_reader_says_what_to_install(
  marian, monkeypatch
):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='pip install sentencepiece') as e:
    read_tokenizer(marian, 10_000)
  assert str(e.value).startswith('source.spm is read by the package')


# --- lengths


@settings(max_examples=60)
@given(
  st.lists(st.integers(5, 9), max_size=8),
  st.sampled_from([([], []), ([], [1]), ([0], [2]), ([], [2, 3])]),
  st.integers(1, 6),
  st.sampled_from(['cut_left', 'cut_right']),
)
def test_a_cut_leaves_the_tokens_around_a_text(text, frame, room, side):
  start, end = frame
  limit = room + len(start) + len(end)
  cut = list(shorten([*start, *text, *end], limit, side, frame))
  want = text[-room:] if side == 'cut_left' else text[:room]
  assert cut == [*start, *want, *end]


def test_prompts_are_cut_and_padded_behind_their_end(tmp_path):
  found, _ = read_tokenizer(t5(tmp_path), 10_000)
  eos, records = found.eos_token_id, [{'prompt': text} for text in CORPUS]
  short = {'max_prompt_length': 5, 'long_prompts': 'cut_right'}
  prompts, _ = data.prompt_set(records, found, 999, **short, whole=True).batch(
    records
  )
  whole = data.encode_prompts(found, CORPUS, whole=True)
  want = [[*ids[:4], eos] for ids in whole]
  assert prompts.tokens.tolist() == want
  assert prompts.length.tolist() == [5, 5, 5]
  short['max_prompt_length'] = 1
  with pytest.raises(ValueError, match=r'puts around a text; pass 2 or more'):
    data.prompt_set(records, found, 999, **short, whole=True)


def test_the_bound_of_bytes_counts_the_tokens_around_a_text(tmp_path):
  found, _ = read_tokenizer(bart(tmp_path), 10_000)
  assert bytes_bound(found) == (1, 1)
  assert bytes_bound(found, whole=True) == (1, 2)


# --- directories


def altered(name, tmp_path, file='config.json', **changes):
  """Copy of a fixture with another configuration; None: without the key."""
  at = tmp_path / name
  shutil.copytree(SEQ2SEQ / name, at, dirs_exist_ok=True)
  found = json.loads((at / file).read_text()) | changes
  kept = {k: v for k, v in found.items() if v is not None}
  (at / file).write_text(json.dumps(kept))
  return at


def test_the_first_tokens_are_those_of_generation_config(tmp_path):
  at = altered('mbart', tmp_path, forced_bos_token_id=259)
  assert open_model(at).config.start_tokens == (257, 260)
  altered('mbart', tmp_path, 'generation_config.json', forced_bos_token_id=None)
  assert open_model(at).config.start_tokens == (257,)


@pytest.mark.parametrize(
  ('name', 'start', 'says'),
  [
    ('t5', 999, 'the decoder begins with 999, which is no id below 264'),
    ('marian', -1, 'the decoder begins with -1, which is no id below 264'),
  ],
)
def test_a_start_that_is_no_row_is_one_line(name, start, says, tmp_path):
  file = 'generation_config.json'
  at = altered(name, tmp_path, file, decoder_start_token_id=start)
  with pytest.raises(ValueError, match=says) as e:
    open_model(at)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', ['t5', 'bart'])
def test_a_classifier_that_is_an_encoder_decoder_is_refused(name, tmp_path):
  kind = {'t5': 'T5', 'bart': 'Bart'}[name]
  at = altered(
    name,
    tmp_path,
    architectures=[f'{kind}ForSequenceClassification'],
    num_labels=1,
  )
  with pytest.raises(ValueError, match='not supported') as e:
    open_model(at)
  assert '\n' not in str(e.value)


def test_ids_of_a_prompt_are_rows_of_the_model():
  model = open_model(SEQ2SEQ / 'bart')
  ids = data.encode_prompts(model.tokenizer, ['a', 'ab'], whole=True)
  assert ids == [[258, ids[0][1], 257], [258, *ids[1][1:3], 257]]
  assert np.max(ids[1]) < model.vocab_size
